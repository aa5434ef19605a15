"""Gemma: norm weights are stored less one, embeddings are scaled; from 2 on, two post-norms."""

from hookedlm.families.llama import LLAMA, PER_HEAD_NORMS

GEMMA = LLAMA.but(
    norm_offset=1.0,
    embed_scale="model.embed_tokens.embed_scale",
    causal="self_attn.is_causal",
)
GEMMA2 = GEMMA.but(
    ln1_post="post_attention_layernorm",
    ln2="pre_feedforward_layernorm",
    ln2_post="post_feedforward_layernorm",
    logit_softcap="config.final_logit_softcapping",
    window="self_attn.sliding_window",
)

GEMMA4 = GEMMA2.but(
    **PER_HEAD_NORMS,
    norm_offset=0.0,
    v=("self_attn.v_proj", "self_attn.k_proj"),
    v_norm="self_attn.v_norm",
    rotary="single",
    keys_name="self_attn.layer_type",
    stores_keys="self_attn.store_full_length_kv",
    reuses_keys="self_attn.is_kv_shared_layer",
    post_scale=".layer_scalar",
    ple_gate="per_layer_input_gate",
    ple_proj="per_layer_projection",
    ple_norm="post_per_layer_input_norm",
    ple_act="act_fn",
    token_inputs=(("per_layer_inputs", "get_per_layer_inputs"),),
)

ROWS = {
    "gemma": GEMMA,
    "gemma2": GEMMA2.but(softcap="self_attn.attn_logit_softcapping"),
    "vaultgemma": GEMMA2.but(
        softcap="self_attn.attn_logit_softcapping", ln1_post=None, ln2_post=None
    ),
    "gemma3_text": GEMMA2.but(**PER_HEAD_NORMS),
    "gemma4_text": GEMMA4,
    "gemma4_unified_text": GEMMA4.but(token_inputs=()),
}
