"""DeepSeek and relatives: queries, keys and values through latents, experts from some layer on."""

from hookedlm.families.llama import LLAMA
from hookedlm.families.row import Choice

LATENT = {
    "q": ("self_attn.q_b_proj", "self_attn.q_proj"),
    "k": None,
    "v": None,
    "d_head": "self_attn.qk_head_dim",
    "q_down": "self_attn.q_a_proj",
    "q_latent_norm": "self_attn.q_a_layernorm",
    "kv_down": "self_attn.kv_a_proj_with_mqa",
    "kv_latent_norm": "self_attn.kv_a_layernorm",
    "kv_up": "self_attn.kv_b_proj",
}
EXPERTS = {"router": "mlp.gate", "shared": "mlp.shared_experts"}
INTERLEAVED = Choice("rope_interleave", {True: "interleaved", False: "tables"})

DEEPSEEK = LLAMA.but(**LATENT, **EXPERTS, rotary=INTERLEAVED)

# Some layers pick which keys to attend to, the others take what an earlier one picked.
SPARSE = DEEPSEEK.but(
    rotary="interleaved",
    selector="self_attn.indexer",
    selected_before="self_attn.skip_topk",
)

ROWS = {
    "deepseek_v2": DEEPSEEK.but(rotary="complex_heads"),
    "deepseek_v3": DEEPSEEK,
    "deepseek_v32": SPARSE,
    "glm4_moe_lite": DEEPSEEK,
    "glm_moe_dsa": SPARSE,
    "axk1": DEEPSEEK.but(ln2_post=("mlp.post_mlp_layernorm",)),
    "axk2": DEEPSEEK.but(rotary="interleaved"),
    "mistral4": DEEPSEEK.but(temperature="log"),
    "dots3_note_text": DEEPSEEK.but(rotary="interleaved"),
    "youtu": DEEPSEEK,
    "minicpm3": DEEPSEEK.but(
        rotary="tables",
        embed_scale="model.embed_tokens.scalar_embed_scale",
        residual_scale=".residual_scale",
        logit_divisor="config.logits_scaling",
    ),
}
