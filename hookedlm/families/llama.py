"""Llama and the families that only tweak it: RMSNorm, rotary positions, gated MLP."""

from hookedlm.families.row import Row

LLAMA = Row()

PER_HEAD_NORMS = {"q_norm": "self_attn.q_norm", "k_norm": "self_attn.k_norm", "qk_norm": "head"}
FULL_WIDTH_NORMS = {**PER_HEAD_NORMS, "qk_norm": "full"}
PLAIN_MLP = {"gate": None, "gate_up": None}
FUSED_MLP = {
    "gate": None, "up": None, "gate_up": "mlp.gate_up_proj", "act": "mlp.activation_fn",
}  # fmt: skip
FUSED_QKV = {"q": None, "k": None, "v": None, "qkv": "self_attn.qkv_proj"}
MULTIPLIERS = {
    "embed_scale": "config.embedding_multiplier",
    "residual_scale": ".residual_multiplier",
    "logit_divisor": "config.logits_scaling",
}

GLM = LLAMA.but(**FUSED_MLP, rotary="partial")
GRANITE = LLAMA.but(**MULTIPLIERS)
GRANITE_MOE = GRANITE.but(
    router="block_sparse_moe.router",
    experts="block_sparse_moe.experts",
    mlp=("shared_mlp", "block_sparse_moe"),
    gate=None,
    up=None,
    gate_up="shared_mlp.input_linear",
    down="shared_mlp.output_linear",
    act="shared_mlp.activation",
    shared="shared_mlp",
)

ROWS = {
    "llama": LLAMA,
    "internlm3": LLAMA,
    "iquestcoder": LLAMA,
    "emu3": LLAMA,
    "emu3_text_model": LLAMA,
    "helium": LLAMA,
    "ernie4_5": LLAMA,
    "seed_oss": LLAMA,
    "mistral": LLAMA.but(window="config.sliding_window"),
    "ministral": LLAMA.but(window="self_attn.sliding_window"),
    "cwm": LLAMA.but(window="self_attn.sliding_window"),
    "qwen2": LLAMA.but(window="self_attn.sliding_window"),
    "qwen3": LLAMA.but(**PER_HEAD_NORMS, window="self_attn.sliding_window"),
    "smollm3": LLAMA.but(rotary_if="self_attn.use_rope"),
    "arcee": LLAMA.but(**PLAIN_MLP),
    "apertus": LLAMA.but(
        **PLAIN_MLP, **PER_HEAD_NORMS, ln1="attention_layernorm", ln2="feedforward_layernorm"
    ),
    "glm": GLM,
    "glm4": GLM.but(ln1_post="post_self_attn_layernorm", ln2_post="post_mlp_layernorm"),
    "granite": GRANITE,
    "granite_swa": GRANITE.but(sinks="self_attn.sinks", window="self_attn.sliding_window"),
    "granitemoe": GRANITE_MOE,
    "granitemoeshared": GRANITE_MOE,
    "granitemoe_swa": GRANITE_MOE.but(sinks="self_attn.sinks", window="self_attn.sliding_window"),
    "hyperclovax": GRANITE.but(ln1_post="post_norm1", ln2_post="post_norm2"),
    "phi3": LLAMA.but(**FUSED_QKV, **FUSED_MLP, window="config.sliding_window"),
}
