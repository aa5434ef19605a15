"""Hybrids: attention in some layers, another mixer of tokens in the rest (or beside it). The mixer
runs as Hugging Face wrote it; the stream, the norms, attention and the MLPs around it are uniform.
"""

from hookedlm.families.deepseek import DEEPSEEK
from hookedlm.families.llama import (
    FULL_WIDTH_NORMS,
    GRANITE_MOE,
    LLAMA,
    PER_HEAD_NORMS,
    PLAIN_MLP,
)
from hookedlm.families.mamba import MAMBA

# Mixers that keep their past call transformers' cache by this name.
KEEPS_PAST = {"mixer_args": {"cache_params": "past_key_values"}}


def instead(place: str) -> dict[str, object]:
    """What differs in a layer whose mixer stands in attention's place."""
    return {"mixer": place, "attn": None, **KEEPS_PAST}


FEED_FORWARD = {
    "ln2": "pre_ff_layernorm",
    "mlp": "feed_forward",
    "gate": "feed_forward.gate_proj",
    "up": "feed_forward.up_proj",
    "down": "feed_forward.down_proj",
    "act": "feed_forward.act_fn",
    "router": "feed_forward.router",
    "experts": "feed_forward.experts",
}
BAMBA = LLAMA.but(
    **FEED_FORWARD, ln_final="model.final_layernorm", when={"mamba": instead("mamba")}
)
LFM2 = LLAMA.but(
    **PER_HEAD_NORMS,
    ln_final="model.embedding_norm",
    ln1="operator_norm",
    ln2="ffn_norm",
    mlp="feed_forward",
    gate="feed_forward.w1",
    up="feed_forward.w3",
    down="feed_forward.w2",
    act_name="silu",
    router="feed_forward.gate",
    experts="feed_forward.experts",
    router_bias="feed_forward.expert_bias",
    when={"conv": {"mixer": "conv", "attn": None}},
)
QWEN3_NEXT = LLAMA.but(
    **PER_HEAD_NORMS,
    norm_offset=1.0,
    attn_gate="self_attn.q_proj",
    rotary="partial",
    router="mlp.gate",
    shared="mlp.shared_expert",
    shared_gate="mlp.shared_expert_gate",
    when={"linear_attn": instead("linear_attn")},
)
NEMOTRON_H = LLAMA.but(
    ln1="norm",
    ln2=None,
    attn="mixer",
    q="mixer.q_proj",
    k="mixer.k_proj",
    v="mixer.v_proj",
    o="mixer.o_proj",
    d_head="mixer.head_dim",
    scale="mixer.scaling",
    rotary=None,
    mlp=None,
    ln_final="model.norm_f",
    embed="model.embeddings",
)
MIXER_MLP = {
    "ln1": None,
    "ln2": "norm",
    "attn": None,
    "mlp": "mixer",
    "gate": None,
    "up": "mixer.up_proj",
    "down": "mixer.down_proj",
    "act": "mixer.act_fn",
    "router": "mixer.gate",
    "experts": "mixer.experts",
    "shared": "mixer.shared_experts",
}

# Every layer a mixer; some run a shared attention block before it, and stay as they were written.
ZAMBA = LLAMA.but(
    ln_final="model.final_layernorm",
    mixer="mamba",
    attn=None,
    mlp=None,
    ln2=None,
    **KEEPS_PAST,
)

ROWS = {
    "mamba2": MAMBA,
    "zamba": ZAMBA,
    "zamba2": ZAMBA,
    "bamba": BAMBA.but(rotary="partial"),
    "jamba": BAMBA.but(rotary=None),
    "falcon_h1": BAMBA.but(
        embed_scale="model.embedding_multiplier",
        logit_scale="model.lm_head_multiplier",
        mixer="mamba",
        mixer_args={"cache_params": "past_key_values", "attention_mask": "mamba_attention_mask"},
        mixer_scale=".ssm_out_multiplier",
        residual_scale=".attn_out_multiplier",
        attn_in_scale=".attention_in_multiplier",
        key_scale="self_attn.key_multiplier",
        act_in_scale="feed_forward.gate_multiplier",
        mlp_residual_scale="feed_forward.down_multiplier",
        when={},
    ),
    "granitemoehybrid": GRANITE_MOE.but(when={"mamba": instead("mamba")}),
    "lfm2": LFM2.but(
        o="self_attn.out_proj",
        q_norm="self_attn.q_layernorm",
        k_norm="self_attn.k_layernorm",
    ),
    "lfm2_moe": LFM2.but(
        o="self_attn.out_proj",
        q_norm="self_attn.q_layernorm",
        k_norm="self_attn.k_layernorm",
    ),
    "lfm3": LFM2.but(
        attn_gate="self_attn.g_proj", ln1_post="post_operator_norm", ln2_post="post_ffn_norm"
    ),
    "nemotron_h": NEMOTRON_H.but(
        when={
            "mixer.q_proj": {},
            "mixer.up_proj": MIXER_MLP,
            "mixer.experts": MIXER_MLP,
            "mixer": instead("mixer"),
        }
    ),
    "olmo_hybrid": LLAMA.but(
        **FULL_WIDTH_NORMS,
        ln1=None,
        ln2=None,
        ln1_post="post_attention_layernorm",
        ln2_post="post_feedforward_layernorm",
        when={
            "linear_attn": {
                **instead("linear_attn"),
                "ln1": "input_layernorm",
                "ln2": "post_attention_layernorm",
                "ln1_post": None,
                "ln2_post": None,
            }
        },
    ),
    "qwen3_next": QWEN3_NEXT,
    "qwen3_5": QWEN3_NEXT,
    "qwen3_5_text": QWEN3_NEXT,
    "qwen3_5_moe": QWEN3_NEXT,
    "qwen3_5_moe_text": QWEN3_NEXT,
    "recurrent_gemma": LLAMA.but(
        embed_scale="model.normalizer",
        norm_offset=1.0,
        ln_final="model.final_norm",
        ln1="temporal_pre_norm",
        ln2="channel_pre_norm",
        attn="temporal_block",
        q="temporal_block.q_proj",
        k="temporal_block.k_proj",
        v="temporal_block.v_proj",
        o="temporal_block.o_proj",
        d_head="temporal_block.head_dim",
        scale="temporal_block.scaling",
        window="temporal_block.sliding_window",
        rotary="partial",
        rotary_tables="temporal_block.rotary_emb",
        mlp="mlp_block",
        gate="mlp_block.gate_proj",
        up="mlp_block.up_proj",
        down="mlp_block.down_proj",
        act="mlp_block.act_fn",
        logit_softcap="config.logits_soft_cap",
        when={
            "temporal_block.q_proj": {},
            "temporal_block": {"mixer": "temporal_block", "attn": None},
        },
    ),
    "kimi_linear": DEEPSEEK.but(
        rotary=None,
        when={"self_attn.kv_b_proj": {}, "self_attn": instead("self_attn")},
    ),
    "bailing_hybrid": DEEPSEEK.but(
        rotary="interleaved",
        attn_gate="self_attn.g_proj",
        when={"self_attn.kv_b_proj": {}, "self_attn": instead("self_attn")},
    ),
    "minimax": LLAMA.but(
        layout="normed_stream",
        router="mlp.gate",
        keep_attn=".attn_alpha_factor",
        keep_mlp=".mlp_alpha_factor",
        residual_scale=".attn_beta_factor",
        mlp_residual_scale=".mlp_beta_factor",
        rotary="partial",
        when={
            "self_attn.qkv_proj": {"mixer": "self_attn", "attn": None},
        },
    ),
    "doge": LLAMA.but(
        **PER_HEAD_NORMS, keep_attn=".input_residual", keep_mlp=".post_attention_residual"
    ),
    "rwkv": LLAMA.but(
        base="rwkv",
        blocks="rwkv.blocks",
        embed="rwkv.embeddings",
        embed_norm="rwkv.embeddings.norm",
        entry_norm="rwkv.blocks.0.pre_ln",
        ln_final="rwkv.ln_out",
        unembed="head",
        norm="LN",
        ln1="ln1",
        ln2="ln2",
        mixer="attention",
        attn=None,
        mlp="feed_forward",
        up=None,
    ),
    "xlstm": LLAMA.but(
        base="backbone",
        blocks="backbone.blocks",
        embed="backbone.embeddings",
        ln_final="backbone.out_norm",
        logit_softcap="config.output_logit_soft_cap",
        ln1="norm_mlstm",
        ln2="norm_ffn",
        mixer="mlstm_layer",
        attn=None,
        mlp="ffn",
        gate="ffn.proj_up_gate",
        up="ffn.proj_up",
        down="ffn.proj_down",
        act="ffn.act_fn",
    ),
    "inkling_text": LLAMA.but(
        embed_norm="model.embed_tokens.embed_norm",
        logit_divisor="config.logits_mup_width_multiplier",
    ),
    "diffllama": LLAMA,
    "jetmoe": LLAMA.but(
        attn="self_attention", mlp="mlp", **PLAIN_MLP, up=None, q=None, k=None, v=None
    ),
    "minimax_m3_vl_text": LLAMA.but(
        **PER_HEAD_NORMS,
        norm_offset=1.0,
        rotary="partial",
        gate=None,
        up=None,
        gate_up="mlp.gate_up_proj",
        swish_beta="config.swiglu_alpha",
        gated_limit="config.swiglu_limit",
        router="mlp.gate",
        routed_scale="mlp.routed_scaling_factor",
        shared="mlp.shared_experts",
    ),
}
