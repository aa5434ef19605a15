"""OLMo: norms without weights, then norms on the branches' outputs."""

from hookedlm.families.llama import FULL_WIDTH_NORMS, LLAMA, LOCAL_IF_ANY

OLMO2 = LLAMA.but(
    **FULL_WIDTH_NORMS,
    ln1=None,
    ln2=None,
    ln1_post="post_attention_layernorm",
    ln2_post="post_feedforward_layernorm",
)

ROWS = {
    "olmo": LLAMA.but(norm="LN", norm_eps=1e-5, clip="config.clip_qkv"),
    "olmo2": OLMO2,
    "olmo3": OLMO2.but(window="self_attn.sliding_window"),
    "flex_olmo": OLMO2.but(router="mlp.gate"),
    "exaone4": OLMO2.but(
        qk_norm="head",
        window="self_attn.sliding_window",
        rotary_if=LOCAL_IF_ANY,
    ),
    "olmoe": LLAMA.but(
        **FULL_WIDTH_NORMS,
        clip="config.clip_qkv",
        router="mlp.gate",
    ),
}
