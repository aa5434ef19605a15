"""Which options of a config nobody here read: reported, so that none is silently ignored."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig
from transformers.utils import logging

from hookedlm.convert.hf import ConfigReads

INERT = {
    "vocab_size",
    "hidden_size",
    "n_embd",
    "d_model",
    "intermediate_size",
    "ffn_dim",
    "n_inner",
    "num_hidden_layers",
    "n_layer",
    "n_layers",
    "num_layers",
    "num_attention_heads",
    "n_head",
    "n_heads",
    "num_heads",
    "num_key_value_heads",
    "num_kv_heads",
    "head_dim",
    "qk_head_dim",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "v_head_dim",
    "q_lora_rank",
    "kv_lora_rank",
    "n_routed_experts",
    "n_shared_experts",
    "n_positions",
    "n_ctx",
    "max_position_embeddings",
    "max_seq_len",
    "architectures",
    "dtype",
    "torch_dtype",
    "model_type",
    "transformers_version",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "use_cache",
    "initializer_range",
    "tie_word_embeddings",
    "attention_dropout",
    "hidden_dropout",
    "attn_pdrop",
    "embd_pdrop",
    "resid_pdrop",
    "resid_dropout",
    "embed_dropout",
    "dropout",
    "activation_dropout",
    "layerdrop",
    "residual_dropout",
    "embedding_dropout",
    "_name_or_path",
    "name_or_path",
    "task_specific_params",
    "return_dict",
    "output_router_logits",
    "router_aux_loss_coef",
    "router_jitter_noise",
    "summary_activation",
    "summary_first_dropout",
    "summary_proj_to_labels",
    "summary_type",
    "summary_use_proj",
    "pretraining_tp",
    "word_embed_proj_dim",
    "id2label",
    "label2id",
}
"""Config keys that say sizes (read from the tensors), names, or what matters only in training."""

FROM_MODULES = {
    "rms_norm_eps",
    "layer_norm_eps",
    "layer_norm_epsilon",
    "norm_epsilon",
    "norm_eps",
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
    "partial_rotary_factor",
    "layer_types",
    "sliding_window",
    "use_sliding_window",
    "max_window_layers",
    "attention_layers",
    "attention_types",
    "window_size",
    "hidden_act",
    "hidden_activation",
    "activation_function",
    "activation",
    "attention_bias",
    "mlp_bias",
    "bias",
    "use_bias",
    "enable_bias",
    "use_qkv_bias",
    "query_pre_attn_scalar",
    "attention_multiplier",
    "scale_attn_weights",
    "scale_attn_by_inverse_layer_idx",
    "qk_layernorm",
    "use_qk_norm",
    "num_experts",
    "num_local_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "norm_topk_prob",
    "n_group",
    "topk_group",
    "topk_method",
    "routed_scaling_factor",
    "first_k_dense_replace",
    "mlp_layer_types",
    "index_n_heads",
    "index_head_dim",
    "index_topk",
    "indexer_types",
    "scale_depth",
    "scale_emb",
    "mlp_only_layers",
    "decoder_sparse_step",
    "residual_multiplier",
    "rotary_dim",
    "attn_config",
    "num_ln_in_parallel_attn",
    "layer_norm_elementwise_affine",
    "swiglu_limit",
    "swiglu_alpha",
    "ffn_hidden_size",
    "multi_query",
    "sliding_window_pattern",
    "_remove_final_layer_norm",
    "original_max_position_embeddings",
}
"""Config keys whose effect is read off the modules that were built with them."""


def unread(config: ConfigReads) -> tuple[str, ...]:
    """Keys away from their class's default that no row read and that are not inert."""
    if not isinstance(config.config, PretrainedConfig):
        return ()
    default = _defaults(config.config)
    known = config.read | INERT | FROM_MODULES
    changed = {key for key, value in config.config.to_dict().items() if default.get(key) != value}
    return tuple(sorted(key for key in changed - known if not key.startswith("_")))


def _defaults(config: Any) -> dict[str, Any]:
    """What the config's class says when nothing is given, without its advice about such a model."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        return type(config)().to_dict()
    finally:
        logging.set_verbosity(verbosity)
