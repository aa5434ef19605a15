"""Mixtures of experts in Llama's body."""

from hookedlm.families.llama import FULL_WIDTH_NORMS, LLAMA, PER_HEAD_NORMS

MIXTRAL = LLAMA.but(router="mlp.gate", window="config.sliding_window")
SHARED = MIXTRAL.but(shared="mlp.shared_experts")
WINDOW = {"window": "self_attn.sliding_window"}

ROWS = {
    "mixtral": MIXTRAL,
    "mellum": MIXTRAL.but(**PER_HEAD_NORMS, **WINDOW),
    "phimoe": MIXTRAL.but(norm="LN", router="mlp.router"),
    "qwen2_moe": MIXTRAL.but(
        shared="mlp.shared_expert", shared_gate="mlp.shared_expert_gate", **WINDOW
    ),
    "qwen3_moe": MIXTRAL.but(**PER_HEAD_NORMS),
    "minimax_m2": MIXTRAL.but(
        **FULL_WIDTH_NORMS, rotary="partial", router_bias="mlp.e_score_correction_bias"
    ),
    "aria_text": SHARED.but(router="mlp.router"),
    "ernie4_5_moe": SHARED,
    "dots1": SHARED.but(**PER_HEAD_NORMS, **WINDOW),
    "glm4_moe": SHARED.but(**PER_HEAD_NORMS, rotary="partial"),
    "solar_open": SHARED,
    "exaone_moe": SHARED.but(**PER_HEAD_NORMS, **WINDOW, rotary_if="self_attn.use_rope"),
    "hy_v3": SHARED.but(**PER_HEAD_NORMS, router_bias="mlp.e_score_correction_bias"),
    "flint": SHARED.but(
        **PER_HEAD_NORMS, **WINDOW, shared="mlp.shared_expert", sinks="self_attn.sinks"
    ),
    "kolibri1": SHARED.but(
        **PER_HEAD_NORMS,
        **WINDOW,
        ln1_post="post_self_attn_layernorm",
        ln2_post="post_mlp_layernorm",
    ),
    "gpt_oss": LLAMA.but(
        norm_late_cast=True,
        sinks="self_attn.sinks",
        window="self_attn.sliding_window",
        router="mlp.router",
    ),
}
