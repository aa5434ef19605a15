"""Llama and the families that only tweak it: RMSNorm, rotary positions, gated MLP."""

from hookedlm.families.row import Choice, Row

LLAMA = Row()

PER_HEAD_NORMS = {"q_norm": "self_attn.q_norm", "k_norm": "self_attn.k_norm", "qk_norm": "head"}
FULL_WIDTH_NORMS = {**PER_HEAD_NORMS, "qk_norm": "full"}
PLAIN_MLP = {"gate": None, "gate_up": None}
FUSED_MLP = {
    "gate": None, "up": None, "gate_up": "mlp.gate_up_proj", "act": "mlp.activation_fn",
}  # fmt: skip
FUSED_QKV = {"q": None, "k": None, "v": None, "qkv": "self_attn.qkv_proj"}
FLOAT32_SINKS = {"sinks": "self_attn.sinks", "scores32": True}
LOCAL_IF_ANY = Choice(
    "sliding_window", {None: True, True: "self_attn.is_sliding", False: "self_attn.is_sliding"}
)
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
    "ministral3": LLAMA.but(window="config.sliding_window", temperature="log"),
    "hunyuan_v1_dense": LLAMA.but(
        q_norm="self_attn.query_layernorm", k_norm="self_attn.key_layernorm", qk_late=True
    ),
    "bitnet": LLAMA.but(z_norm="self_attn.attn_sub_norm", mlp_norm="mlp.ffn_sub_norm"),
    "nanochat": LLAMA.but(
        **PLAIN_MLP,
        **PER_HEAD_NORMS,
        qk_late=True,
        up="mlp.fc1",
        down="mlp.fc2",
        act="mlp.activation_fn",
        embed_norm="model.norm",
        embed_scale=None,
        logit_softcap="config.final_logit_softcapping",
    ),
    "smollm3": LLAMA.but(rotary_if="self_attn.use_rope"),
    "arcee": LLAMA.but(**PLAIN_MLP),
    "jais2": LLAMA.but(**PLAIN_MLP, norm="LN"),
    "nemotron": LLAMA.but(**PLAIN_MLP, norm="LN", norm_offset=1.0),
    "moshi": LLAMA.but(
        **{x: f"self_attn.{x}_proj.linear" for x in "qkvo"},
        rotary_tables="self_attn.rotary_emb",
        gate=None,
        up=None,
        gate_up="mlp.fc1",
        down="mlp.fc2",
        act="mlp.activation_fn",
    ),
    "modernbert-decoder": LLAMA.but(
        norm="LN",
        embed="model.embeddings.tok_embeddings",
        embed_norm="model.embeddings.norm",
        ln_final="model.final_norm",
        head_dense="lm_head.dense",
        head_act="lm_head.act",
        head_norm="lm_head.norm",
        unembed="decoder",
        ln1="attn_norm",
        ln2="mlp_norm",
        attn="attn",
        **{x: f"attn.{x}_proj" for x in "qkv"},
        o="attn.Wo",
        d_head="attn.head_dim",
        scale="attn.scaling",
        window="attn.sliding_window",
        gate=None,
        up=None,
        gate_up="mlp.Wi",
        down="mlp.Wo",
        act="mlp.act",
    ),
    "apertus": LLAMA.but(
        **PLAIN_MLP, **PER_HEAD_NORMS, ln1="attention_layernorm", ln2="feedforward_layernorm"
    ),
    "glm": GLM,
    "glm4": GLM.but(ln1_post="post_self_attn_layernorm", ln2_post="post_mlp_layernorm"),
    "granite": GRANITE,
    "granite_swa": GRANITE.but(**FLOAT32_SINKS, window="self_attn.sliding_window"),
    "granitemoe": GRANITE_MOE,
    "granitemoeshared": GRANITE_MOE,
    "granitemoe_swa": GRANITE_MOE.but(**FLOAT32_SINKS, window="self_attn.sliding_window"),
    "hyperclovax": GRANITE.but(
        ln1_post="post_norm1",
        ln2_post="post_norm2",
        logit_divisor=None,
        logit_scale="config.logits_scaling",
    ),
    "phi3": LLAMA.but(**FUSED_QKV, **FUSED_MLP, window="config.sliding_window"),
}
