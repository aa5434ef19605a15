"""Gemma: norm weights are stored less one, embeddings are scaled; from 2 on, two post-norms."""

from hookedlm.families.llama import LLAMA, PER_HEAD_NORMS

GEMMA = LLAMA.but(
    norm_offset=1.0, norm_late_cast=True, embed_scale="model.embed_tokens.embed_scale"
)
GEMMA2 = GEMMA.but(
    ln1_post="post_attention_layernorm",
    ln2="pre_feedforward_layernorm",
    ln2_post="post_feedforward_layernorm",
    logit_softcap="config.final_logit_softcapping",
    window="self_attn.sliding_window",
)

ROWS = {
    "gemma": GEMMA,
    "gemma2": GEMMA2.but(softcap="self_attn.attn_logit_softcapping"),
    "gemma3_text": GEMMA2.but(**PER_HEAD_NORMS),
}
