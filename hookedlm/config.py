"""`HookedTransformerConfig`: what a model is, in TransformerLens' words."""

from __future__ import annotations

import dataclasses
import difflib
import math
import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from hookedlm.errors import ConfigError

DTYPES = {
    "float32": torch.float32,
    "float": torch.float32,
    "fp32": torch.float32,
    "float64": torch.float64,
    "double": torch.float64,
    "float16": torch.float16,
    "half": torch.float16,
    "fp16": torch.float16,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
}
CHOICES: dict[str, tuple[str | None, ...]] = {
    "normalization_type": (None, "LN", "LNPre", "RMS", "RMSPre"),
    "attention_dir": ("causal", "bidirectional"),
    "init_mode": (
        "gpt2",
        "xavier_uniform",
        "xavier_normal",
        "kaiming_uniform",
        "kaiming_normal",
        "muP",
    ),
}
"""Field -> the values it may have."""

BUILDABLE: dict[str, tuple[str | None, ...]] = {
    "positional_embedding_type": (None, "none", "standard", "rotary", "shortformer", "alibi"),
    "act_fn": (
        None,
        "solu",
        "solu_ln",
        "gelu",
        "gelu_new",
        "gelu_fast",
        "gelu_pytorch_tanh",
        "silu",
        "relu",
        "xielu",
    ),
}
"""The same for fields that may say something else when they describe a loaded model."""


@dataclass(repr=False)
class HookedTransformerConfig:
    """The fields of TransformerLens 2.x, with its names, order and defaults.

    A config to build a model from is checked at construction; ``original_architecture`` says that
    it describes a loaded model instead, whose own parts need no names here. What -1 and None stand
    for is filled in at construction, except that ``d_vocab`` may wait for a tokenizer. ``seed``
    makes the initial weights reproducible; it does not touch any global random state.
    """

    n_layers: int
    d_model: int
    n_ctx: int
    d_head: int
    model_name: str = "custom"
    n_heads: int = -1
    d_mlp: int | None = None
    act_fn: str | None = None
    d_vocab: int = -1
    eps: float = 1e-5
    use_attn_result: bool = False
    use_attn_scale: bool = True
    attn_scale: float = -1.0
    use_split_qkv_input: bool = False
    use_hook_mlp_in: bool = False
    use_attn_in: bool = False
    use_qk_norm: bool = False
    use_local_attn: bool = False
    ungroup_grouped_query_attention: bool = False
    original_architecture: str | None = None
    from_checkpoint: bool = False
    checkpoint_index: int | None = None
    checkpoint_label_type: str | None = None
    checkpoint_value: int | None = None
    tokenizer_name: str | None = None
    window_size: int | None = None
    attn_types: list[str] | None = None
    init_mode: str = "gpt2"
    normalization_type: str | None = "LN"
    device: str | None = None
    n_devices: int = 1
    attention_dir: str = "causal"
    attn_only: bool = False
    seed: int | None = None
    initializer_range: float = -1.0
    init_weights: bool = True
    scale_attn_by_inverse_layer_idx: bool = False
    positional_embedding_type: str | None = "standard"
    final_rms: bool = False
    d_vocab_out: int = -1
    parallel_attn_mlp: bool = False
    rotary_dim: int | None = None
    n_params: int | None = None
    use_hook_tokens: bool = False
    gated_mlp: bool = False
    default_prepend_bos: bool = True
    dtype: torch.dtype = torch.float32
    tokenizer_prepends_bos: bool | None = None
    n_key_value_heads: int | None = None
    post_embedding_ln: bool = False
    rotary_base: int | float = 10000
    rotary_base_local: int | float | None = None
    trust_remote_code: bool = False
    rotary_adjacent_pairs: bool = False
    load_in_4bit: bool = False
    num_experts: int | None = None
    experts_per_token: int | None = None
    relative_attention_max_distance: int | None = None
    relative_attention_num_buckets: int | None = None
    decoder_start_token_id: int | None = None
    tie_word_embeddings: bool = False
    use_normalization_before_and_after: bool = False
    attn_scores_soft_cap: float = -1.0
    output_logits_soft_cap: float = -1.0
    use_NTK_by_parts_rope: bool = False
    NTK_by_parts_low_freq_factor: float = 1.0
    NTK_by_parts_high_freq_factor: float = 4.0
    NTK_by_parts_factor: float = 8.0
    NTK_original_ctx_len: int = 8192

    def __post_init__(self) -> None:
        self.dtype = _dtype_of(self.dtype)
        self._check_sizes()
        self._derive()
        self._check_attention()
        for name, choices in CHOICES.items():
            _check_choice(name, vars(self)[name], choices)
        if self.original_architecture is None:
            self._check_parts()

    # Filled in ------------------------------------------------------------------------------------

    def _derive(self) -> None:
        if self.n_heads == -1:
            if self.d_model % self.d_head:
                raise ConfigError(
                    f"n_heads can't be derived: d_model={self.d_model} is not a multiple of "
                    f"d_head={self.d_head}. Give n_heads, or another d_head."
                )
            self.n_heads = self.d_model // self.d_head
        if self.d_mlp is None and not self.attn_only:
            self.d_mlp = 4 * self.d_model
        if self.d_vocab_out == -1:
            self.d_vocab_out = self.d_vocab
        if self.use_attn_scale and self.attn_scale == -1.0:
            self.attn_scale = math.sqrt(self.d_head)
        if self.initializer_range < 0:  # gpt2: a standard deviation; the other modes: a gain
            gpt2 = self.init_mode == "gpt2"
            self.initializer_range = 0.8 / math.sqrt(self.d_model) if gpt2 else 1.0
        if self.positional_embedding_type == "rotary" and self.rotary_dim is None:
            self.rotary_dim = self.d_head
        if self.device is None:
            self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.n_params = self._count()

    def _count(self) -> int:
        """Attention and MLP weights; embeddings, biases and norms are not counted."""
        per_layer = 4 * self.d_model * self.d_head * self.n_heads
        if not self.attn_only:
            assert self.d_mlp is not None
            mlp = self.d_model * self.d_mlp * (2 + self.gated_mlp)
            per_layer += (mlp + self.d_model) * self.num_experts if self.num_experts else mlp
        return self.n_layers * per_layer

    # Checked --------------------------------------------------------------------------------------

    def _check_sizes(self) -> None:
        if self.n_layers < 0:
            raise ConfigError(f"n_layers={self.n_layers}: a model has 0 layers or more")
        for name in ("d_model", "n_ctx", "d_head"):
            if vars(self)[name] <= 0:
                raise ConfigError(f"{name}={vars(self)[name]}: expected a positive size")
        for name in ("n_heads", "d_vocab", "d_vocab_out"):
            value = vars(self)[name]
            if value <= 0 and value != -1:
                raise ConfigError(f"{name}={value}: expected a positive number, or -1 to derive it")

    def _check_attention(self) -> None:
        if self.n_key_value_heads is not None and (
            self.n_key_value_heads <= 0 or self.n_heads % self.n_key_value_heads
        ):
            fitting = [n for n in range(1, self.n_heads + 1) if self.n_heads % n == 0]
            raise ConfigError(
                f"n_key_value_heads={self.n_key_value_heads} does not divide "
                f"n_heads={self.n_heads}; these do: {fitting}"
            )
        if self.attn_types is not None and len(self.attn_types) != self.n_layers:
            raise ConfigError(
                f"attn_types has {len(self.attn_types)} entries; expected one for each of the "
                f"{self.n_layers} layers, 'global' or 'local'"
            )

    def _check_parts(self) -> None:
        """The values of fields from which parts are built."""
        for name, choices in BUILDABLE.items():
            also = ("relative_positional_bias",) if name == "positional_embedding_type" else ()
            _check_choice(name, vars(self)[name], (*choices, *also))
        if self.act_fn is None and not self.attn_only:
            raise ConfigError(
                f"act_fn is missing: choose one of {BUILDABLE['act_fn'][1:]}, or attn_only=True "
                "for a model without MLPs"
            )
        if self.is_layer_norm_activation() and (self.gated_mlp or self.num_experts):
            raise ConfigError(
                f"act_fn={self.act_fn!r} normalises the activations of a plain MLP; with gated_mlp "
                "or num_experts use 'solu'"
            )
        if self.use_local_attn:
            if self.attn_types is None or self.window_size is None or self.window_size < 1:
                raise ConfigError(
                    "use_local_attn needs window_size (how many positions a local layer sees, the "
                    "present one included) and attn_types (one 'global' or 'local' per layer)"
                )
            for kind in self.attn_types:
                _check_choice("attn_types", kind, ("global", "local"))
        if self.positional_embedding_type == "rotary":
            assert self.rotary_dim is not None
            if self.rotary_dim % 2 or not 0 < self.rotary_dim <= self.d_head:
                raise ConfigError(
                    f"rotary_dim={self.rotary_dim}: pairs of dimensions are rotated, so it must be "
                    f"even, and at most d_head={self.d_head}"
                )
        if self.num_experts is not None and not (
            self.experts_per_token and 0 < self.experts_per_token <= self.num_experts
        ):
            raise ConfigError(
                f"experts_per_token={self.experts_per_token}: expected 1 to "
                f"num_experts={self.num_experts}"
            )

    def check_buildable(self) -> None:
        """Raise ConfigError unless a model can be built from this config alone."""
        self._check_parts()
        for name, choices in BUILDABLE.items():
            _check_choice(name, vars(self)[name], choices)
        if self.d_vocab <= 0 or self.d_vocab_out <= 0:
            missing = "d_vocab" if self.d_vocab <= 0 else "d_vocab_out"
            raise ConfigError(f"{missing} is missing: give it, or a tokenizer that sets it")
        if self.tie_word_embeddings and self.d_vocab != self.d_vocab_out:
            raise ConfigError(
                f"tie_word_embeddings needs d_vocab_out={self.d_vocab_out} to be "
                f"d_vocab={self.d_vocab}: the two matrices are one"
            )
        if self.load_in_4bit:
            raise ConfigError(
                "load_in_4bit: weights made from a config are not quantised. Load a quantised "
                "Hugging Face model instead."
            )

    # Other forms ----------------------------------------------------------------------------------

    @classmethod
    def unwrap(cls, config: HookedTransformerConfig | Mapping[str, Any]) -> HookedTransformerConfig:
        """``config`` itself, or the config its dictionary describes."""
        return cls.from_dict(config) if isinstance(config, Mapping) else config

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any]) -> HookedTransformerConfig:
        """The config with these fields; raises ConfigError on unknown or missing ones."""
        fields = {field.name: field for field in dataclasses.fields(cls)}
        for name in config_dict:
            if name not in fields:
                raise ConfigError(
                    f"HookedTransformerConfig has no field {name!r}.{_nearest(name, fields)}"
                )
        needed = [name for name, f in fields.items() if f.default is dataclasses.MISSING]
        missing = [name for name in needed if name not in config_dict]
        if missing:
            raise ConfigError(f"missing: {', '.join(missing)}. These have no default.")
        return cls(**config_dict)

    def to_dict(self) -> dict[str, Any]:
        """All fields by name, in a dictionary of the caller's own."""
        return {field.name: vars(self)[field.name] for field in dataclasses.fields(self)}

    def set_seed_everywhere(self, seed: int) -> None:
        """Seed the global generators of torch, numpy and Python."""
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)

    def is_layer_norm_activation(self) -> bool:
        """Whether a LayerNorm stands behind the activation (``solu_ln``)."""
        return self.act_fn is not None and self.act_fn.endswith("_ln")

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Unpickled: fields that the config was pickled without have their defaults."""
        fields = dataclasses.fields(self)
        defaults = {f.name: f.default for f in fields if f.default is not dataclasses.MISSING}
        vars(self).update(defaults | state)

    def __repr__(self) -> str:
        lines = [
            f"    {field.name}={vars(self)[field.name]!r},"
            for field in dataclasses.fields(self)
            if vars(self)[field.name] != field.default
        ]
        return "\n".join([f"{type(self).__name__}(", *lines, ")"])


def _dtype_of(dtype: Any) -> torch.dtype:
    if isinstance(dtype, torch.dtype):
        return dtype
    if isinstance(dtype, str) and dtype.removeprefix("torch.") in DTYPES:
        return DTYPES[dtype.removeprefix("torch.")]
    raise ConfigError(f"dtype={dtype!r}: expected a torch.dtype or one of {sorted(DTYPES)}")


def _check_choice(name: str, value: Any, choices: tuple[str | None, ...]) -> None:
    if value not in choices:
        hint = _nearest(str(value), [choice for choice in choices if choice is not None])
        raise ConfigError(f"{name}={value!r}: expected one of {choices}.{hint}")


def _nearest(name: str, candidates: Iterable[str]) -> str:
    by_lower = {candidate.lower(): candidate for candidate in candidates}
    close = difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=0.5)
    return f" Did you mean {by_lower[close[0]]!r}?" if close else ""
