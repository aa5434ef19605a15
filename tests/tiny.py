"""Tiny random Hugging Face models: one small configuration per option that changes a forward pass.

Every parity test runs over this table. Each family has a base configuration and named variants;
a variant is the base with a few options replaced. All of them are small enough to build and run
on a CPU in milliseconds, and `Tiny.build` gives every parameter (norm weights, biases and sinks
included) a random value, so that nothing an implementation forgets can stay hidden behind an
all-ones norm or an all-zeros bias.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from sizes import sizes_of
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging as hf_logging

VOCAB = 96
LAYERS = 3


@dataclass(frozen=True, eq=False)  # eq=False keeps it hashable although `config` is a dict
class Tiny:
    """One small configuration of one model family."""

    model_type: str
    variant: str
    config: dict

    @property
    def id(self) -> str:
        return f"{self.model_type}-{self.variant}"

    def build(self, dtype: torch.dtype = torch.float32, seed: int = 0) -> PreTrainedModel:
        """The model in eval mode, every parameter random, the same for the same seed.

        The global random state is left as it was. In float64, padding can give NaN in Bloom, MPT
        and Gemma 2: Transformers masks with the lowest float64 there, which overflows in the
        float32 softmax of these families as soon as a padding token sees no token at all.
        """
        # Configuration classes write defaults into nested dicts, so each build gets its own copy.
        options = copy.deepcopy(self.config)
        # The grouped matrix product that experts use by default has no float64 kernel.
        kernels = {"experts_implementation": "eager"} if dtype == torch.float64 else {}
        # fork_rng: `from_config` draws initial weights from the global generator.
        with quiet_transformers(), torch.random.fork_rng(devices=[]):
            config = AutoConfig.for_model(self.model_type, **options)
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, **kernels).eval()
        perturb(model, seed)
        return model


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep advice that Transformers logs (legacy options, rope factors) out of the test output."""
    verbosity = hf_logging.get_verbosity()
    hf_logging.set_verbosity_error()
    try:
        yield
    finally:
        hf_logging.set_verbosity(verbosity)


@torch.no_grad()
def perturb(model: PreTrainedModel, seed: int) -> None:
    """Give every parameter a random value of a size that keeps activations of order one.

    Values are drawn in float32 whatever the model's dtype, so the same seed means the same
    weights (rounded) in every dtype.
    """
    generator = torch.Generator().manual_seed(seed)
    seen: set[int] = set()
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if id(parameter) in seen:  # tied embeddings: keep what the embedding was given
                continue
            seen.add(id(parameter))
            noise = torch.randn(parameter.shape, generator=generator)
            if bool((parameter == 0).all()) or bool((parameter == 1).all()):
                # Norm weights start at 1 (at 0 where the family stores an offset from 1) and
                # biases at 0: move them around the value they start from.
                value = parameter.float() + 0.3 * noise
            elif isinstance(module, torch.nn.Embedding):
                value = 0.5 * noise
            else:
                # 1.5 rather than 1: attention patterns far from uniform, logits far from zero.
                value = 1.5 * noise / fan_in(module, parameter) ** 0.5
            parameter.copy_(value)


def fan_in(module: torch.nn.Module, parameter: torch.nn.Parameter) -> int:
    """Number of inputs that each output of a weight sums over."""
    if isinstance(module, Conv1D):  # GPT-2 stores [in, out]
        return parameter.shape[0]
    if getattr(module, "is_transposed", False):  # GPT-OSS experts: [expert, in, out]
        return parameter.shape[-2]
    return parameter.shape[-1]


def family(model_type: str, base: dict, /, **variants: dict) -> list[Tiny]:
    """All variants of a family: `base` with each variant's options put over it."""
    common = {"vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return [Tiny(model_type, name, common | base | more) for name, more in variants.items()]


# Norm epsilons as large as 0.1 appear below on purpose: with the usual 1e-5 an implementation
# that reads the wrong epsilon would still agree to six digits.

# --- Base configurations in the three naming schemes that families use ---------------------------

GPT2_NAMES = {"n_embd": 32, "n_layer": LAYERS, "n_head": 4, "n_positions": 64}
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
LLAMA_NAMES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}

# --- Rope scalings (head dim 8, so four frequencies, unless said otherwise) ----------------------

ROPE_LINEAR = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
# Dynamic scaling does nothing until a sequence is longer than `max_position_embeddings`, which
# variants that use it therefore set to DYNAMIC_MAX.
ROPE_DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
DYNAMIC_MAX = 8
ROPE_YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "rope_theta": 10000.0,
}
# Betas chosen so that the ramp between the two frequency bands covers several frequencies.
ROPE_YARN_RAMP = {
    "rope_type": "yarn",
    "factor": 2.0,
    "original_max_position_embeddings": 32,
    "rope_theta": 100.0,
    "beta_fast": 2.0,
    "beta_slow": 0.1,
    "truncate": False,
    "attention_factor": 1.25,
}
ROPE_YARN_MSCALE = ROPE_YARN | {"mscale": 1.0, "mscale_all_dim": 0.5}
# With this theta one frequency is kept, one is smoothed and two are divided by the factor.
ROPE_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
    "rope_theta": 100.0,
}
ROPE_LONG = {
    "rope_type": "longrope",
    "short_factor": [1.0, 1.5, 2.0, 3.0],
    "long_factor": [2.0, 3.0, 5.0, 8.0],
    "rope_theta": 10000.0,
}

# --- Learned positions and ALiBi -----------------------------------------------------------------

GPT2 = family(
    "gpt2",
    GPT2_NAMES | NO_DROPOUT,
    base={},
    unscaled={"scale_attn_weights": False},
    inverse_layer={"scale_attn_by_inverse_layer_idx": True, "n_inner": 48},
    # Reordering is an eager-only detail of precision; the scale is what matters here.
    upcast={"reorder_and_upcast_attn": True, "scale_attn_by_inverse_layer_idx": True},
    untied={
        "tie_word_embeddings": False,
        "activation_function": "relu",
        "n_inner": 48,
        "layer_norm_epsilon": 0.1,
    },
)

GPT_BIGCODE = family(
    "gpt_bigcode",
    GPT2_NAMES | NO_DROPOUT,
    multi_query={},
    full_heads={"multi_query": False},
    unscaled={"scale_attn_weights": False, "n_inner": 48},
    untied={
        "tie_word_embeddings": False,
        "activation_function": "gelu",
        "layer_norm_epsilon": 0.1,
    },
    fp32_off={
        "attention_softmax_in_fp32": False,
        "scale_attention_softmax_in_fp32": False,
        "activation_function": "relu",
    },
)

GPT_NEO = family(
    "gpt_neo",
    {
        "hidden_size": 32,
        "num_layers": 4,
        "num_heads": 4,
        "max_position_embeddings": 64,
        "window_size": 4,
        "attention_types": [[["global", "local"], 2]],
    },
    alternating={},
    all_global={"attention_types": [[["global"], 4]], "intermediate_size": 48},
    all_local={"attention_types": [[["local"], 4]], "window_size": 3},
    local_first={
        "attention_types": [[["local"], 1], [["global"], 3]],
        "activation_function": "silu",
        "layer_norm_epsilon": 0.1,
        "tie_word_embeddings": False,
    },
)

OPT = family(
    "opt",
    {
        "hidden_size": 32,
        "num_hidden_layers": LAYERS,
        "ffn_dim": 48,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "dropout": 0.0,
    },
    pre_norm={},
    post_norm={"do_layer_norm_before": False},
    # The layout of opt-350m.
    post_norm_projected={"do_layer_norm_before": False, "word_embed_proj_dim": 16},
    pre_norm_projected={"word_embed_proj_dim": 16, "tie_word_embeddings": False},
    no_final_norm={"_remove_final_layer_norm": True, "activation_function": "gelu"},
    # The layout of Galactica.
    no_bias={
        "enable_bias": False,
        "layer_norm_elementwise_affine": False,
        "activation_function": "gelu",
    },
)

BLOOM = family(
    "bloom",
    {"hidden_size": 32, "n_layer": LAYERS, "n_head": 4},
    base={},
    post_norm_residual={"apply_residual_connection_post_layernorm": True},
    # Six heads: ALiBi slopes for a head count that is no power of two.
    six_heads={"hidden_size": 48, "n_head": 6},
    untied={"tie_word_embeddings": False, "layer_norm_epsilon": 0.1},
    # With this option Transformers leaves out the biases of both output projections.
    slow_but_exact={"slow_but_exact": True, "pretraining_tp": 2},
)

MPT = family(
    "mpt",
    {"d_model": 32, "n_layers": LAYERS, "n_heads": 4, "max_seq_len": 64},
    base={},
    clip_qkv={"attn_config": {"clip_qkv": 0.5}},
    softmax_scale={"attn_config": {"softmax_scale": 0.7}, "layer_norm_epsilon": 0.1},
    six_heads={"d_model": 48, "n_heads": 6},
    untied={"tie_word_embeddings": False},
    # Nothing in this variant changes the forward pass in Transformers except `n_heads`.
    ignored={
        "n_heads": 2,
        "expansion_ratio": 2,
        "no_bias": False,
        "logit_scale": 0.5,
        "learned_pos_emb": True,
        "attn_config": {"alibi": False, "alibi_bias_max": 4, "qk_ln": True},
    },
)

# --- Rotary with a fused or parallel layout ------------------------------------------------------

GPTJ = family(
    "gptj",
    GPT2_NAMES | NO_DROPOUT | {"rotary_dim": 4},
    base={},
    full_rotary={"rotary_dim": 8},
    tied={"tie_word_embeddings": True, "n_inner": 48},
    relu={"activation_function": "relu", "layer_norm_epsilon": 0.1, "rotary_dim": 2},
)

GPT_NEOX = family(
    "gpt_neox",
    {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        # The names that the checkpoints use.
        "rotary_pct": 0.5,
        "rotary_emb_base": 10000,
    },
    parallel={},
    sequential={"use_parallel_residual": False},
    full_rotary={"rotary_pct": 1.0, "rotary_emb_base": 500},
    default_rotary={"rotary_pct": 0.25, "hidden_act": "gelu_new", "layer_norm_eps": 0.1},
    no_bias={"attention_bias": False, "tie_word_embeddings": True},
    rope_linear={"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
)

FALCON = family(
    "falcon",
    {
        "hidden_size": 32,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
    },
    multi_query={},  # falcon-7b
    full_heads={"multi_query": False, "bias": True},
    new_two_norms={"new_decoder_architecture": True, "num_kv_heads": 2},  # falcon-40b
    new_one_norm={  # falcon-11b
        "new_decoder_architecture": True,
        "num_kv_heads": 2,
        "num_ln_in_parallel_attn": 1,
        "ffn_hidden_size": 48,
    },
    new_biased={
        "new_decoder_architecture": True,
        "num_kv_heads": 1,
        "bias": True,
        "activation": "relu",
        "tie_word_embeddings": False,
        "layer_norm_epsilon": 0.1,
    },
    alibi_sequential={  # falcon-rw-1b
        "alibi": True,
        "multi_query": False,
        "parallel_attn": False,
        "bias": True,
    },
    # Six heads: slopes that bfloat16, in which Falcon computes ALiBi, cannot represent.
    alibi_six_heads={"alibi": True, "hidden_size": 48, "num_attention_heads": 6},
    alibi_new={"alibi": True, "new_decoder_architecture": True, "num_kv_heads": 2},
    sequential={"parallel_attn": False, "bias": True, "multi_query": True},
    rope_linear={"rope_parameters": ROPE_LINEAR},
)

PHI = family(
    "phi",
    LLAMA_NAMES | {"num_key_value_heads": 4},
    base={},
    qk_layernorm={"qk_layernorm": True, "layer_norm_eps": 0.1},
    grouped={"num_key_value_heads": 2, "partial_rotary_factor": 0.25},
    full_rotary={"partial_rotary_factor": 1.0, "rope_theta": 500.0, "hidden_act": "gelu"},
    tied={"tie_word_embeddings": True, "num_key_value_heads": 1},
    rope_linear={"rope_parameters": ROPE_LINEAR | {"partial_rotary_factor": 0.5}},
)

STABLELM = family(
    "stablelm",
    LLAMA_NAMES | {"num_key_value_heads": 4},
    base={},
    qkv_bias={"use_qkv_bias": True, "partial_rotary_factor": 0.5, "layer_norm_eps": 0.1},
    qk_layernorm={"qk_layernorm": True, "num_key_value_heads": 2},
    parallel={"use_parallel_residual": True},
    parallel_qk_layernorm={  # stablelm-2-12b
        "use_parallel_residual": True,
        "qk_layernorm": True,
        "num_key_value_heads": 2,
    },
    tied={"tie_word_embeddings": True, "partial_rotary_factor": 1.0, "hidden_act": "gelu"},
    rope_linear={"rope_parameters": ROPE_LINEAR | {"partial_rotary_factor": 0.5}},
)

COHERE = family(
    "cohere",
    LLAMA_NAMES | {"num_key_value_heads": 4},
    base={},
    qk_norm={"use_qk_norm": True},
    qk_norm_grouped={"use_qk_norm": True, "num_key_value_heads": 2, "layer_norm_eps": 0.1},
    biased={"attention_bias": True, "num_key_value_heads": 1, "logit_scale": 0.5},
    untied={"tie_word_embeddings": False, "logit_scale": 1.0, "hidden_act": "gelu"},
    head_dim={"head_dim": 16, "rope_parameters": ROPE_LINEAR},
)

# --- Llama and its relatives ---------------------------------------------------------------------

LLAMA = family(
    "llama",
    LLAMA_NAMES,
    grouped={},
    full_heads={"num_key_value_heads": None, "rope_theta": 500.0},
    multi_query={"num_key_value_heads": 1, "hidden_act": "gelu"},
    head_dim={"head_dim": 16},
    tied={"tie_word_embeddings": True, "rms_norm_eps": 0.1},
    biased={"attention_bias": True, "mlp_bias": True},
    rope_linear={"rope_parameters": ROPE_LINEAR},
    rope_dynamic={"rope_parameters": ROPE_DYNAMIC, "max_position_embeddings": DYNAMIC_MAX},
    rope_yarn={"rope_parameters": ROPE_YARN},
    rope_yarn_ramp={"rope_parameters": ROPE_YARN_RAMP},
    rope_yarn_mscale={"rope_parameters": ROPE_YARN_MSCALE},
    rope_llama3={"rope_parameters": ROPE_LLAMA3},
    # The same with the names that the checkpoints use.
    rope_llama3_legacy={
        "rope_theta": 100.0,
        "rope_scaling": {k: v for k, v in ROPE_LLAMA3.items() if k != "rope_theta"},
        "tie_word_embeddings": True,
    },
    rope_long={
        "rope_parameters": ROPE_LONG | {"factor": 4.0, "original_max_position_embeddings": 4}
    },
)

MISTRAL = family(
    "mistral",
    LLAMA_NAMES | {"sliding_window": None},
    base={},
    sliding={"sliding_window": 4},
    head_dim={"head_dim": 16, "num_key_value_heads": 4, "rms_norm_eps": 0.1},
    tied={"tie_word_embeddings": True, "num_key_value_heads": 1, "hidden_act": "gelu"},
    rope_yarn={"rope_parameters": ROPE_YARN, "sliding_window": 3},
)

QWEN2 = family(
    "qwen2",
    LLAMA_NAMES,
    base={},
    sliding={"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    layer_types={
        "use_sliding_window": True,
        "sliding_window": 3,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "tie_word_embeddings": True,
    },
    multi_query={"num_key_value_heads": 1, "rms_norm_eps": 0.1, "rope_theta": 500.0},
    # `use_sliding_window` is off, so the window must be ignored.
    window_off={"use_sliding_window": False, "sliding_window": 4, "max_window_layers": 0}
    | {"num_key_value_heads": 4},
    head_dim={"head_dim": 16, "hidden_act": "gelu"},
    rope_yarn={"rope_parameters": ROPE_YARN},
)

QWEN3 = family(
    "qwen3",
    LLAMA_NAMES | {"head_dim": 16},
    base={},
    small_head={"head_dim": 8, "num_key_value_heads": 4, "tie_word_embeddings": True},
    biased={"attention_bias": True, "num_key_value_heads": 1, "rms_norm_eps": 0.1},
    sliding={"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2},
    layer_types={
        "use_sliding_window": True,
        "sliding_window": 3,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "hidden_act": "gelu",
    },
    rope_yarn={"rope_parameters": ROPE_YARN_RAMP, "head_dim": 8},
)

GEMMA = family(
    "gemma",
    LLAMA_NAMES | {"head_dim": 16},
    base={},
    full_heads={"num_key_value_heads": 4, "head_dim": 8, "hidden_act": "silu"},
    multi_query={"num_key_value_heads": 1, "rms_norm_eps": 0.1, "rope_theta": 500.0},
    untied_biased={"tie_word_embeddings": False, "attention_bias": True},
    rope_linear={"rope_parameters": ROPE_LINEAR},
)

GEMMA2 = family(
    "gemma2",
    LLAMA_NAMES | {"head_dim": 16, "sliding_window": 4, "query_pre_attn_scalar": 16},
    base={},
    # Caps low enough to bend most scores and logits.
    tight_softcaps={"attn_logit_softcapping": 1.5, "final_logit_softcapping": 2.0},
    no_softcaps={
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "query_pre_attn_scalar": 4,
    },
    layer_types={
        "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
        "num_key_value_heads": 1,
        "sliding_window": 3,
        "rms_norm_eps": 0.1,
    },
    all_full={"layer_types": ["full_attention"] * LAYERS, "num_key_value_heads": 4},
    untied_biased={
        "tie_word_embeddings": False,
        "attention_bias": True,
        "hidden_activation": "silu",
        "head_dim": 8,
    },
    rope_linear={"rope_parameters": ROPE_LINEAR},
)

GEMMA3 = family(
    "gemma3_text",
    LLAMA_NAMES
    | {"head_dim": 16, "sliding_window": 4, "query_pre_attn_scalar": 16, "num_hidden_layers": 4},
    # The names that the checkpoints use: a pattern, and two rope bases.
    base={"sliding_window_pattern": 2, "rope_theta": 1_000_000.0, "rope_local_base_freq": 500.0},
    rope_linear={
        "sliding_window_pattern": 2,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        "query_pre_attn_scalar": 4,
    },
    layer_types={
        "layer_types": ["full_attention", *["sliding_attention"] * 2, "full_attention"],
        "sliding_window": 3,
        "num_key_value_heads": 1,
        "rms_norm_eps": 0.1,
    },
    rope_per_layer_type={
        "sliding_window_pattern": 3,
        "head_dim": 8,
        "rope_parameters": {
            "full_attention": ROPE_YARN,
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
        },
    },
    # Transformers ignores the attention softcap of this family; the one on the logits works.
    final_softcap={
        "sliding_window_pattern": 2,
        "final_logit_softcapping": 2.0,
        "attn_logit_softcapping": 1.5,
    },
    all_sliding={
        "layer_types": ["sliding_attention"] * 4,
        "tie_word_embeddings": False,
        "attention_bias": True,
        "hidden_activation": "silu",
    },
)

PHI3 = family(
    "phi3",
    LLAMA_NAMES | {"num_key_value_heads": 4, "original_max_position_embeddings": 64},
    base={},
    grouped={"num_key_value_heads": 2, "rms_norm_eps": 0.1, "tie_word_embeddings": True},
    sliding={"sliding_window": 4, "hidden_act": "gelu", "rope_theta": 500.0},
    # Which factors apply depends on whether a sequence is longer than the original maximum:
    # the short ones for anything tests run here, ...
    rope_long_short={"rope_scaling": ROPE_LONG, "original_max_position_embeddings": 48},
    # ... and the long ones from five tokens on.
    rope_long_long={"rope_scaling": ROPE_LONG, "original_max_position_embeddings": 4},
    # The layout of Phi-4-mini: longrope on three quarters of each head.
    partial_rotary={
        "partial_rotary_factor": 0.75,
        "num_key_value_heads": 2,
        "original_max_position_embeddings": 4,
        "rope_scaling": {
            "rope_type": "longrope",
            "short_factor": [1.0, 1.5, 2.0],
            "long_factor": [2.0, 3.0, 5.0],
        },
    },
    partial_default={"partial_rotary_factor": 0.5, "num_key_value_heads": 1},
)

OLMO = family(
    "olmo",
    LLAMA_NAMES | {"num_key_value_heads": 4},
    base={},
    clip_qkv={"clip_qkv": 0.5},
    grouped={"num_key_value_heads": 2, "attention_bias": True},
    tied={"tie_word_embeddings": True, "num_key_value_heads": 1, "hidden_act": "gelu"},
    rope_linear={"rope_parameters": ROPE_LINEAR},
)

OLMO2 = family(
    "olmo2",
    LLAMA_NAMES | {"num_key_value_heads": 4},
    base={},
    grouped={"num_key_value_heads": 2, "rms_norm_eps": 0.1},
    biased={"attention_bias": True, "num_key_value_heads": 1},
    tied={"tie_word_embeddings": True, "hidden_act": "gelu", "rope_theta": 500.0},
    head_dim={"head_dim": 16, "num_key_value_heads": 2},
    rope_yarn={"rope_parameters": ROPE_YARN},
)

STARCODER2 = family(
    "starcoder2",
    LLAMA_NAMES,
    base={},
    no_bias={"use_bias": False, "num_key_value_heads": 4},
    sliding={"sliding_window": 4, "norm_epsilon": 0.1},
    untied={"tie_word_embeddings": False, "hidden_act": "gelu", "num_key_value_heads": 1},
    rope_linear={"rope_parameters": ROPE_LINEAR},
)

GRANITE = family(
    "granite",
    LLAMA_NAMES
    | {
        "embedding_multiplier": 3.0,
        "attention_multiplier": 0.2,
        "residual_multiplier": 0.4,
        "logits_scaling": 2.0,
    },
    multipliers={},
    # All multipliers at their default of 1, which leaves attention scores unscaled.
    plain={
        "embedding_multiplier": 1.0,
        "attention_multiplier": 1.0,
        "residual_multiplier": 1.0,
        "logits_scaling": 1.0,
    },
    biased={"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 4},
    tied={"tie_word_embeddings": True, "num_key_value_heads": 1, "rms_norm_eps": 0.1},
    head_dim={"head_dim": 16, "hidden_act": "gelu", "rope_theta": 500.0},
    rope_linear={"rope_parameters": ROPE_LINEAR},
)

# --- Mixtures of experts -------------------------------------------------------------------------

MIXTRAL = family(
    "mixtral",
    LLAMA_NAMES | {"num_local_experts": 4, "num_experts_per_tok": 2},
    base={},
    sliding={"sliding_window": 4, "rms_norm_eps": 0.1},
    top_one={"num_experts_per_tok": 1, "num_key_value_heads": 1, "hidden_act": "gelu"},
    top_three={"num_experts_per_tok": 3, "num_local_experts": 6, "tie_word_embeddings": True},
    head_dim={"head_dim": 16, "num_key_value_heads": 4, "rope_parameters": ROPE_LINEAR},
)

QWEN3_MOE = family(
    "qwen3_moe",
    LLAMA_NAMES
    | {
        "head_dim": 16,
        "moe_intermediate_size": 24,
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
    },
    base={},
    raw_topk={"norm_topk_prob": False, "tie_word_embeddings": True},
    mlp_only_layers={"mlp_only_layers": [1], "rms_norm_eps": 0.1},
    sparse_step={"decoder_sparse_step": 2, "num_experts_per_tok": 3},
    all_dense={"mlp_only_layers": [0, 1, 2], "num_key_value_heads": 1},
    biased={"attention_bias": True, "num_experts_per_tok": 1, "hidden_act": "gelu"},
    sliding={"use_sliding_window": True, "sliding_window": 4, "num_key_value_heads": 4},
    rope_yarn={"rope_parameters": ROPE_YARN, "head_dim": 8},
)

OLMOE = family(
    "olmoe",
    LLAMA_NAMES
    | {
        "num_key_value_heads": 4,
        "intermediate_size": 24,
        "num_experts": 6,
        "num_experts_per_tok": 2,
    },
    base={},
    norm_topk={"norm_topk_prob": True, "num_experts_per_tok": 3},
    clip_qkv={"clip_qkv": 0.5, "tie_word_embeddings": True},
    grouped={"num_key_value_heads": 2, "rms_norm_eps": 0.1},
    biased={"attention_bias": True, "num_experts_per_tok": 1, "hidden_act": "gelu"},
    rope_linear={"rope_parameters": ROPE_LINEAR},
)

GPT_OSS = family(
    "gpt_oss",
    LLAMA_NAMES
    | {
        "head_dim": 8,
        "intermediate_size": 24,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": 4,
        "rope_parameters": ROPE_YARN_RAMP,
    },
    base={},
    # A limit low enough to clip often.
    tight_limit={"swiglu_limit": 0.5, "swiglu_alpha": 1.0, "num_key_value_heads": 1},
    no_bias={"attention_bias": False, "rope_parameters": ROPE_LINEAR, "rms_norm_eps": 0.1},
    all_full={
        "layer_types": ["full_attention"] * LAYERS,
        "num_experts_per_tok": 3,
        "num_local_experts": 6,
        "head_dim": 16,
    },
    layer_types={
        "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
        "sliding_window": 3,
        "num_experts_per_tok": 1,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
    },
)

TINIES: list[Tiny] = [
    *GPT2,
    *GPT_BIGCODE,
    *GPT_NEO,
    *GPTJ,
    *GPT_NEOX,
    *OPT,
    *BLOOM,
    *FALCON,
    *MPT,
    *LLAMA,
    *MISTRAL,
    *MIXTRAL,
    *QWEN2,
    *QWEN3,
    *QWEN3_MOE,
    *GEMMA,
    *GEMMA2,
    *GEMMA3,
    *PHI,
    *PHI3,
    *OLMO,
    *OLMO2,
    *OLMOE,
    *STABLELM,
    *STARCODER2,
    *GRANITE,
    *COHERE,
    *GPT_OSS,
]


def tinies(*model_types: str) -> list[Tiny]:
    """The variants of the given families, in the table's order."""
    unknown = set(model_types) - {tiny.model_type for tiny in TINIES}
    if unknown:
        raise KeyError(f"no tiny configurations for {sorted(unknown)}")
    return [tiny for tiny in TINIES if tiny.model_type in model_types]


def one_per_family() -> list[Tiny]:
    """The first variant of each family."""
    first: dict[str, Tiny] = {}
    for tiny in TINIES:
        first.setdefault(tiny.model_type, tiny)
    return list(first.values())


def registered(model_types: Iterable[str]) -> list[Tiny]:
    """`TINIES`, and one of small sizes for every type that has none there."""
    known = {tiny.model_type for tiny in TINIES}
    new = [kind for kind in model_types if kind not in known and kind in CAUSAL]
    return TINIES + [tiny for kind in new for tiny in family(kind, sizes_of(kind), generic={})]
