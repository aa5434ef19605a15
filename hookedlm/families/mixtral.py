"""Mixtures of experts in Llama's body."""

from hookedlm.families.llama import LLAMA, PER_HEAD_NORMS

MIXTRAL = LLAMA.but(router="mlp.gate", window="config.sliding_window")

ROWS = {
    "mixtral": MIXTRAL,
    "qwen3_moe": MIXTRAL.but(**PER_HEAD_NORMS, routing_normalised="mlp.gate.norm_topk_prob"),
    "gpt_oss": LLAMA.but(
        norm_late_cast=True,
        sinks="self_attn.sinks",
        window="self_attn.sliding_window",
        router="mlp.router",
        routing="topk_softmax",
    ),
}
