"""Prepare: masks, rotary tables and biases of a pass, from a config."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from hookedlm.config import HookedTransformerConfig
from hookedlm.convert.prepare import Prepared
from hookedlm.errors import InputError, UnknownInputError
from hookedlm.layers import rotary
from hookedlm.layers.context import Context


@dataclass(frozen=True)
class LayerKind:
    """What a layer's context depends on: how far it sees, and how it rotates."""

    window: int | None
    base: float | None
    parts: rotary.NTKByParts | None


class ToyPreparer:
    """Makes masks, rotary tables and biases; layers of one kind share one context."""

    module: nn.Module | None = None
    reusable = True
    reads_tokens = False
    remembers = True
    own_cache = None
    no_start = ""
    accepts: frozenset[str] = frozenset()

    def __init__(self, cfg: HookedTransformerConfig):
        self.causal = cfg.attention_dir == "causal"
        self.rotary_dim = cfg.rotary_dim
        self.shortformer = cfg.positional_embedding_type == "shortformer"
        alibi = cfg.positional_embedding_type == "alibi"
        self.slopes = alibi_slopes(cfg.n_heads) if alibi else None
        self.kinds = [_layer_kind(cfg, layer) for layer in range(cfg.n_layers)]

    def __call__(
        self,
        *,
        tokens: Int[Tensor, "batch pos"] | None = None,
        embeds: Float[Tensor, "batch pos d_model"] | None = None,
        attention_mask: Int[Tensor, "batch all_pos"] | None = None,
        position_ids: Int[Tensor, "batch pos"] | None = None,
        cache: Any = None,
        pos_embed: Float[Tensor, "batch pos d_model"] | None = None,
    ) -> Prepared:
        """Contexts for one pass over tokens or embeddings of that shape.

        Raises InputError where position embeddings stay apart from the stream and were not given.
        """
        given = tokens if embeds is None else embeds
        assert given is not None, "neither tokens nor embeds"
        if self.shortformer and pos_embed is None:
            raise InputError(
                "queries and keys of a shortformer model read position embeddings besides the "
                "stream: give them too, shortformer_pos_embed=model.pos_embed(tokens)"
            )
        n_new = given.shape[1]
        past = 0 if cache is None else int(cache.get_seq_length())
        if attention_mask is not None and bool(attention_mask.all()):
            attention_mask = None
        if position_ids is None:
            position_ids = _positions(attention_mask, past, n_new, given.device)
        bias = None if self.slopes is None else self._alibi(past, n_new, given.device)
        dtype = torch.float64 if given.dtype == torch.float64 else torch.float32
        made = {
            kind: Context(
                mask=self._mask(kind.window, attention_mask, past, n_new, given.device),
                bias=bias,
                rotary=None
                if kind.base is None
                else rotary.tables(position_ids, self.rotary_dim, kind.base, kind.parts, dtype),
                positions=pos_embed if self.shortformer else None,
            )
            for kind in set(self.kinds)
        }
        return Prepared([made[kind] for kind in self.kinds])

    def check(self, names: Iterable[str]) -> None:
        """Raise UnknownInputError: a model of a config takes nothing besides tokens."""
        if unknown := sorted(names):
            raise UnknownInputError(f"{', '.join(unknown)}: this model takes tokens only")

    def _mask(
        self, window: int | None, padding: Tensor | None, past: int, n_new: int, device: Any
    ) -> Bool[Tensor, "#batch 1 pos key_pos"] | None:
        """Which keys each query may attend to; None for plainly causal or everything."""
        n_key = past + n_new
        sees_all = window is None or window >= n_key
        plain = not self.causal or n_new == 1 or past == 0  # a kernel's own causal mask fits
        if padding is None and sees_all and plain:
            return None
        distance = _distance(past, n_new, device)
        allowed = distance >= 0 if self.causal else torch.ones_like(distance, dtype=torch.bool)
        if window is not None:
            allowed = allowed & (distance.abs() < window)
        allowed = allowed[None, None]
        return allowed if padding is None else allowed & (padding != 0)[:, None, None]

    def _alibi(self, past: int, n_new: int, device: Any) -> Float[Tensor, "1 head pos key_pos"]:
        """Minus slope times distance (arXiv 2108.12409)."""
        slopes = torch.tensor(self.slopes, dtype=torch.float32, device=device)
        return -slopes[:, None, None] * _distance(past, n_new, device).abs()[None, None]


def alibi_slopes(n_heads: int) -> list[float]:
    """One slope per head: the powers of ``2 ** (-8 / n)``; if n_heads is no power of two, those of
    the power below, then every other one of the power above (the paper's own code)."""
    n = 2 ** int(math.log2(n_heads))
    slopes = [2 ** (-8 * i / n) for i in range(1, n + 1)]
    return slopes + [2 ** (-4 * i / n) for i in range(1, 2 * (n_heads - n) + 1, 2)]


def _layer_kind(cfg: HookedTransformerConfig, layer: int) -> LayerKind:
    """A local layer with a base of its own rotates unscaled, as in Gemma 3."""
    window = window_of(cfg, layer)
    if cfg.positional_embedding_type != "rotary":
        return LayerKind(window, None, None)
    if window is not None and cfg.rotary_base_local is not None:
        return LayerKind(window, float(cfg.rotary_base_local), None)
    if not cfg.use_NTK_by_parts_rope:
        return LayerKind(window, float(cfg.rotary_base), None)
    parts = rotary.NTKByParts(
        factor=cfg.NTK_by_parts_factor,
        low=cfg.NTK_by_parts_low_freq_factor,
        high=cfg.NTK_by_parts_high_freq_factor,
        n_original=cfg.NTK_original_ctx_len,
    )
    return LayerKind(window, float(cfg.rotary_base), parts)


def _positions(
    attention_mask: Tensor | None, past: int, n_new: int, device: Any
) -> Int[Tensor, "#batch pos"]:
    """Places of the new tokens; padding does not count."""
    if attention_mask is None:
        return torch.arange(past, past + n_new, device=device)[None]
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -n_new:]


def _distance(past: int, n_new: int, device: Any) -> Int[Tensor, "pos key_pos"]:
    """How many positions the key lies behind the query."""
    places = torch.arange(past + n_new, device=device)
    return places[past:, None] - places


def window_of(cfg: HookedTransformerConfig, layer: int) -> int | None:
    """How many positions a layer sees, the present one included; None for all."""
    local = cfg.use_local_attn and cfg.attn_types is not None and cfg.attn_types[layer] == "local"
    return cfg.window_size if local else None
