"""BART's decoder half and its relatives, as language models of their own, without an encoder.

Names are those of fairseq, as in OPT: `self_attn_layer_norm` is the attention's norm and
`final_layer_norm` the MLP's, before it or after the addition.
"""

from hookedlm.families.gpt2 import GPT2

FAIRSEQ = GPT2.but(
    base="model.decoder",
    blocks="model.decoder.layers",
    embed="model.decoder.embed_tokens",
    embed_scale="model.decoder.embed_tokens.embed_scale",
    pos_embed="model.decoder.embed_positions",
    ln_final="model.decoder.layer_norm",
    ln1="self_attn_layer_norm",
    ln2="final_layer_norm",
    attn="self_attn",
    q="self_attn.q_proj",
    k="self_attn.k_proj",
    v="self_attn.v_proj",
    qkv=None,
    o="self_attn.out_proj",
    d_head="self_attn.head_dim",
    scale="self_attn.scaling",
    mlp="",
    up="fc1",
    down="fc2",
    act="activation_fn",
    unused=("encoder_attn", "encoder_attn_layer_norm"),
)
LEARNED = {"pos_offset": 2}
SCALED = {"embed_scale": "model.decoder.embed_scale"}
BART = FAIRSEQ.but(
    **LEARNED,
    embed_sum_norm="model.decoder.layernorm_embedding",
    ln_final=None,
    layout="post_norm",
)
PREFIXED = {
    "base": "biogpt",
    "blocks": "biogpt.layers",
    "embed": "biogpt.embed_tokens",
    "embed_scale": "biogpt.embed_tokens.embed_scale",
    "pos_embed": "biogpt.embed_positions",
    "ln_final": "biogpt.layer_norm",
    "unembed": "output_projection",
}
BARE = {
    "base": "model",
    "blocks": "model.layers",
    "embed": "model.embed_tokens",
    "embed_scale": "model.embed_tokens.embed_scale",
    "pos_embed": "model.embed_positions",
    "ln_final": "model.layer_norm",
}

CODEBOOKS = {"embed": "model.decoder.embed_tokens.0", "embed_scale": None, "unembed": "lm_heads"}

ROWS = {
    "biogpt": FAIRSEQ.but(**PREFIXED, **LEARNED),
    "xglm": FAIRSEQ.but(**BARE, **LEARNED, scale_query=True),
    "bart": BART,
    "mvp": BART.but(**SCALED, scale_query=True),
    "plbart": BART,
    "trocr": BART.but(
        pos_embed="model.decoder.embed_positions.weight",  # sinusoids follow padding tokens
        unembed="output_projection",
        scale_query=True,
    ),
    "mbart": FAIRSEQ.but(**LEARNED, embed_sum_norm="model.decoder.layernorm_embedding"),
    "bigbird_pegasus": FAIRSEQ.but(ln_final="model.decoder.layernorm_embedding"),
    "blenderbot": FAIRSEQ,
    "blenderbot-small": BART.but(
        embed_scale=None,
        pos_offset=0,
        embed_norm="model.decoder.layernorm_embedding",
        embed_sum_norm=None,
    ),
    "marian": FAIRSEQ.but(**SCALED, layout="post_norm", ln_final=None),
    "pegasus": FAIRSEQ.but(**SCALED),
    "musicgen_decoder": FAIRSEQ.but(**CODEBOOKS, codebooks="config.num_codebooks"),
    "musicgen_melody_decoder": FAIRSEQ.but(**CODEBOOKS, codebooks="config.num_codebooks"),
    "whisper": FAIRSEQ.but(embed_scale=None, unembed="proj_out", scale_query=True),
}
