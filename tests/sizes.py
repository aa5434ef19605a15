"""Small sizes for every causal-LM type in transformers, and other configurations of each.

Sizes go by the names that configuration classes give them; `NEEDED` is what a type wants besides.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from transformers import AutoConfig, PretrainedConfig
from transformers.utils import logging as hf_logging

VOCAB = 96
LAYERS = 4
WIDTHS = ("hidden_size", "d_model", "n_embd", "emb_dim", "dim", "embedding_size")
INNER = (
    "intermediate_size", "ffn_dim", "n_inner", "d_inner", "dff", "d_ff", "mlp_dim", "dim_ff",
    "ffn_hidden_size", "encoder_ffn_dim", "decoder_ffn_dim",
)  # fmt: skip
DEPTHS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers",
          "num_decoder_layers")  # fmt: skip
HEADS = (
    "num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads",
    "encoder_attention_heads", "num_decoder_attention_heads", "num_encoder_attention_heads",
)  # fmt: skip
LENGTHS = ("n_positions", "max_position_embeddings", "max_seq_len", "max_sequence_length")
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
PICKED = ("num_experts_per_tok", "moe_k", "moe_topk", "num_experts_per_token")
NARROW = ("moe_intermediate_size", "expert_ffn_hidden_size", "shared_expert_intermediate_size")

SMALL: dict[str, int] = {
    **dict.fromkeys(WIDTHS, 32),
    **dict.fromkeys(INNER, 48),
    **dict.fromkeys(DEPTHS, LAYERS),
    **dict.fromkeys(HEADS, 4),
    **dict.fromkeys(LENGTHS, 64),
    **dict.fromkeys(EXPERTS, 4),
    **dict.fromkeys(PICKED, 2),
    **dict.fromkeys(NARROW, 24),
    **dict.fromkeys(("n_group", "topk_group", "num_expert_group"), 1),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank", "v_head_dim"), 16),
    **dict.fromkeys(("qk_nope_head_dim", "qk_rope_head_dim", "head_dim"), 8),
    **dict.fromkeys(("state_size", "ssm_state_size", "mamba_d_state"), 8),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads", "mamba_dt_rank"), 4),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim"), 16),
    **dict.fromkeys(("mamba_n_groups", "n_groups"), 1),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 8),
    **dict.fromkeys(("num_key_value_heads", "linear_num_key_heads", "index_n_heads"), 2),
    **dict.fromkeys(("encoder_layers", "num_encoder_layers"), LAYERS),
    **dict.fromkeys(("sliding_window", "index_topk", "linear_num_value_heads"), 4),
    "mamba_d_ssm": 64,
    "index_head_dim": 16,
    "image_size": 32,
    "patch_size": 8,
    "num_channels": 3,
}
IDS = {"vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}

LATENT = (
    "deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite", "glm_moe_dsa", "axk1", "axk2",
    "youtu", "minicpm3", "longcat_flash", "bailing_hybrid", "kimi_linear", "dots3_note",
    "dots3_note_text",
)  # fmt: skip
MIXED = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
GEMMA4: dict[str, Any] = {
    "layer_types": MIXED,
    "num_kv_shared_layers": 2,
    "global_head_dim": 16,
    "num_global_key_value_heads": 1,
}
LAYER_INPUTS = {"vocab_size_per_layer_input": VOCAB, "hidden_size_per_layer_input": 8}

LIKE_BERT = (
    "bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "electra", "ernie",
    "megatron-bert", "rembert", "roberta", "roberta-prelayernorm", "roc_bert", "roformer",
    "xlm-roberta", "xlm-roberta-xl",
)  # fmt: skip

LINEAR = ["linear_attention", "full_attention"] * 2
QWEN4: dict[str, Any] = {
    "layer_types": LINEAR, "hc_count": 2, "hc_lowrank": 4, "indexer_n_heads": 2,
    "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 4,
    "indexer_compress_ratio": 2, "ple_layer_ids": [1, 3], "ngram_vocab_size_base": 50,
    "heads_per_ngram": 2, "make_ngram_vocab_size_divisible_by": 1, "split_ngram_parts": 1,
    "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
ZAMBA: dict[str, Any] = {
    "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
    "num_key_value_heads": 4, "attention_hidden_size": 64, "attention_head_dim": 16,
}  # fmt: skip

NEEDED: dict[str, dict[str, Any]] = {
    **{kind: {"is_decoder": True} for kind in LIKE_BERT},
    **{kind: {"num_key_value_heads": 4, "num_experts_per_tok": 2} for kind in LATENT},
    **{
        kind: {"layer_types": LINEAR}
        for kind in ("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text", "olmo_hybrid", "minimax")
    },
    **{kind: {"text_config": {"layer_types": LINEAR}} for kind in ("qwen3_5", "qwen3_5_moe")},
    **{
        kind: {"layer_types": ["conv", "full_attention"] * 2}
        for kind in ("lfm2", "lfm2_moe", "lfm3")
    },
    "bailing_hybrid": {
        "num_key_value_heads": 4, "num_experts_per_tok": 2, "layer_types": LINEAR,
    },
    "bamba": {"attn_layer_indices": [1, 3]},
    "blt": {
        "encoder_config": {"hidden_size_global": 32},
        "decoder_config": {"hidden_size_global": 32},
        "encoder_hash_byte_group_vocab": 50,
        "local_attention_window_len": 6,
        "use_cache": False,  # transformers finds no number of layers for one
        "patch_size": 4,
    },
    "codegen": {"rotary_dim": 4},
    "cohere_compass_text": {
        "layer_types": MIXED,
        "rope_parameters": {"sliding_attention": ROPE, "full_attention": None},
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {
            "ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 32,
        },
    },
    "dots3_note": {
        "text_config": {"num_key_value_heads": 4, "num_experts_per_tok": 2},
        "vision_config": {
            "mlp_layer_types": ["dense"] * 4, "adapter_in_dim": 32, "adapter_out_dim": 32,
        },
        "audio_config": {"adapter_input_size": 32, "adapter_out_dim": 32},
    },
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "gemma3n_text": {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
        "laurel_rank": 4,
        "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0],
        "intermediate_size": [48] * 4,
        **LAYER_INPUTS,
    },
    "gemma4": {"text_config": GEMMA4 | LAYER_INPUTS},
    "gemma4_text": GEMMA4 | LAYER_INPUTS,
    "gemma4_unified": {"text_config": GEMMA4},
    "gemma4_unified_text": GEMMA4,
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "window_size": 4},
    "gptj": {"rotary_dim": 4},
    "granitemoehybrid": {"layer_types": LINEAR, "shared_intermediate_size": 48},
    "hunyuan_v1_dense": {"head_dim": 8, "num_key_value_heads": 2},
    "hunyuan_v1_moe": {"head_dim": 8, "num_key_value_heads": 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": {
        "num_key_value_heads": 4, "num_experts_per_tok": 2, "layer_types": LINEAR,
        "linear_num_heads": 4, "linear_head_dim": 8,
    },
    "mamba2": {"num_heads": 4, "head_dim": 16, "n_groups": 1},
    "ministral": {"head_dim": 8, "num_key_value_heads": 2},
    "nemotron": {"head_dim": 8, "num_key_value_heads": 2},
    "qwen4_exp": {"text_config": QWEN4},
    "qwen4_exp_text": QWEN4,
    "reformer": {
        "is_decoder": True, "axial_pos_shape": [8, 8], "axial_pos_embds_dim": [16, 16],
        "attn_layers": ["local", "lsh"] * 2, "num_buckets": 4, "attention_head_size": 8,
        "local_attn_chunk_length": 64, "lsh_attn_chunk_length": 64, "feed_forward_size": 48,
        "hash_seed": 0,
    },
    "xmod": {"default_language": "en_XX", "languages": ["en_XX"], "is_decoder": True},
    "zamba": ZAMBA | {"n_mamba_heads": 2, "mamba_dt_rank": 4},
    "zamba2": ZAMBA | {
        "num_mem_blocks": 2, "n_mamba_heads": 4, "adapter_rank": 4, "chunk_size": 8,
        "use_shared_attention_adapter": True,
    },
    "xlstm": {"use_cache": False},
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip

NOT_BUILT: dict[str, str] = {
    "gemma3n": "its vision tower needs the timm package",
    "gemma4_assistant": "a draft model: transformers cannot build it alone",
    "gemma4_unified_assistant": "a draft model: transformers cannot build it alone",
    "musicgen": "AutoModelForCausalLM hands its config to a class that wants another",
    "musicgen_melody": "AutoModelForCausalLM hands its config to a class that wants another",
}
"""Types that transformers itself does not build from a config here, and why."""

FLIPPED = (
    "attention_bias", "mlp_bias", "use_bias", "bias", "enable_bias", "use_qkv_bias", "lm_head_bias",
    "add_bias_linear", "tie_word_embeddings", "norm_topk_prob", "scale_attn_weights",
    "scale_attn_by_inverse_layer_idx", "do_layer_norm_before", "parallel_attn",
    "use_parallel_residual", "multi_query", "alibi", "qk_layernorm", "use_qk_norm", "mup_enabled",
    "scale_embedding", "use_sliding_window", "attention_k_eq_v", "attn_temperature_tuning",
    "enable_moe_fp32_combine",
    "apply_residual_connection_post_layernorm",
)  # fmt: skip
"""Options that the second configuration of a type turns over."""

CHANGED: dict[str, Any] = {
    "num_key_value_heads": 4,
    "head_dim": 16,
    "sliding_window": 3,
    "n_group": 2,
    "topk_group": 1,
    "routed_scaling_factor": 1.7,
    "residual_multiplier": 0.7,
    "embedding_multiplier": 1.3,
    "logits_scaling": 1.9,
    "logit_scale": 0.4,
    "attention_multiplier": 0.2,
    "first_k_dense_replace": 1,
    "q_lora_rank": None,
    "final_logit_softcapping": 3.0,
    "attn_logit_softcapping": 2.0,
    "partial_rotary_factor": 0.5,
    "clip_qkv": 0.5,
    "new_decoder_architecture": True,
    "moe_num_shared_experts": 0,
    "num_shared_experts": 1,
}
"""What the third configuration changes, where a type has it."""


@cache
def default_of(kind: str) -> PretrainedConfig:
    """The configuration that a type has when nothing is said."""
    verbosity = hf_logging.get_verbosity()
    hf_logging.set_verbosity_error()
    try:
        return AutoConfig.for_model(kind)
    finally:
        hf_logging.set_verbosity(verbosity)


def sizes_of(kind: str) -> dict[str, Any]:
    """Every size in `SMALL` that this type's configuration has and gives a value."""
    try:
        sizes = small(default_of(kind))
    except Exception:  # no default of its own, in one way or another: name the usual ones
        names = ("hidden_size", "num_hidden_layers", "num_attention_heads")
        sizes = {name: SMALL[name] for name in names}
    return merged(sizes, NEEDED.get(kind, {}))


def small(config: PretrainedConfig) -> dict[str, Any]:
    """The sizes of a configuration and of those it holds."""
    own = config.to_dict()
    sizes: dict[str, Any] = {
        key: value
        for key, value in SMALL.items()
        if own.get(key) is not None and not isinstance(own[key], (list, dict))
    }
    for name in config.sub_configs:
        part = getattr(config, name, None)
        if isinstance(part, PretrainedConfig):
            sizes[name] = small(part) | IDS | {"model_type": part.model_type}
    return sizes


def merged(base: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    """``base`` with ``more`` over it, nested dictionaries key by key."""
    result = dict(base)
    for key, value in more.items():
        old = result.get(key)
        both = isinstance(value, dict) and isinstance(old, dict)
        result[key] = old | value if both else value
    return result


def variants_of(kind: str) -> dict[str, dict[str, Any]]:
    """Other configurations: options turned over, and sizes, multipliers and rope changed."""
    try:
        own = default_of(kind).to_dict()
    except Exception:  # it must be told something
        return {}
    flipped = {key: not own[key] for key in FLIPPED if isinstance(own.get(key), bool)}
    changed = {key: value for key, value in CHANGED.items() if key in own}
    if kind in LATENT:
        changed.pop("num_key_value_heads", None)
        changed.pop("head_dim", None)
    rope = own.get("rope_parameters")
    if isinstance(rope, dict) and "rope_type" in rope:
        changed["rope_parameters"] = rope | {"rope_type": "linear", "factor": 4.0}
    found = {"flipped": flipped, "changed": changed}
    return {name: options for name, options in found.items() if options}
