"""Llama and the families that only tweak it: RMSNorm, rotary positions, gated MLP."""

from hookedlm.families.row import Row

LLAMA = Row()

PER_HEAD_NORMS = {"q_norm": "self_attn.q_norm", "k_norm": "self_attn.k_norm", "qk_norm": "head"}
FULL_WIDTH_NORMS = {**PER_HEAD_NORMS, "qk_norm": "full"}

ROWS = {
    "llama": LLAMA,
    "mistral": LLAMA.but(window="config.sliding_window"),
    "qwen2": LLAMA.but(window="self_attn.sliding_window"),
    "qwen3": LLAMA.but(**PER_HEAD_NORMS, window="self_attn.sliding_window"),
    "smollm3": LLAMA.but(rotary_if="self_attn.use_rope"),
    "granite": LLAMA.but(
        embed_scale="config.embedding_multiplier",
        residual_scale=".residual_multiplier",
        logit_divisor="config.logits_scaling",
    ),
    "phi3": LLAMA.but(
        q=None,
        k=None,
        v=None,
        qkv="self_attn.qkv_proj",
        gate=None,
        up=None,
        gate_up="mlp.gate_up_proj",
        act="mlp.activation_fn",
        window="config.sliding_window",
    ),
}
