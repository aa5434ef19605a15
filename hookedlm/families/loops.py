"""Models whose loop stays Hugging Face's: over several lists of blocks, or one repeatedly."""

from hookedlm.families.llama import LLAMA

ROWS = {
    # Two stacks, each gone through several times (Hierarchical Reasoning Model, arXiv 2506.21734).
    "hrm_text": LLAMA.but(
        blocks="model.L_module.layers",
        more_blocks=("model.H_module.layers",),
        attn_gate="self_attn.gate_proj",
        ln_final=None,
    ),
    # Bytes, patches of bytes, bytes again (Byte Latent Transformer, arXiv 2412.09871). The patcher,
    # which only says where patches begin, stays unseen.
    "blt": LLAMA.but(
        blocks="model.local_encoder.layers",
        more_blocks=("model.global_transformer.layers", "model.local_decoder.layers"),
        embed="model.local_encoder.embed_tokens",
        ln_final="model.local_decoder.norm",
    ),
}
