"""Position-dependent temperatures of queries: each way by its name in a row.

``given``: the model's loop computes it and hands it to each block. ``log``: growing with the
logarithm of the position (Ministral 3). ``tuned``: the same in layers without rotation, from
attributes of the attention (Llama 4).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

Values = Mapping[str, Any]
"""What Hugging Face called the block with, by name."""


def _given(attn: Any, values: Values, hidden: Tensor, past: int) -> Tensor | None:
    return values.get("attention_scaling")


def _log(attn: Any, values: Values, hidden: Tensor, past: int) -> Tensor | None:
    scale = vars(sys.modules[type(attn).__module__])["get_llama_4_attn_scale"]
    rope = attn.config.rope_parameters
    beta, n = rope.get("llama_4_scaling_beta"), rope.get("original_max_position_embeddings")
    return None if beta is None else scale(values["position_ids"], beta, n)


def _tuned(attn: Any, values: Values, hidden: Tensor, past: int) -> Tensor | None:
    if not attn.attn_temperature_tuning or attn.use_rope:
        return None
    positions = torch.arange(hidden.shape[1], device=hidden.device) + past
    grown = torch.log1p(torch.floor((positions.float() + 1.0) / attn.floor_scale))
    return (grown * attn.attn_scale + 1.0)[None, None, :, None]


STYLES: dict[str, Callable[[Any, Values, Tensor, int], Tensor | None]] = {
    "given": _given,
    "log": _log,
    "tuned": _tuned,
}


class Temperature:
    """The temperature of one layer (a class, so that models can be pickled)."""

    def __init__(self, style: str, attn: Any):
        self.style = style
        self.attn = attn

    def __call__(
        self, values: Values, hidden: Float[Tensor, "batch pos d_model"], past: int
    ) -> Float[Tensor, "batch 1 pos 1"] | None:
        return STYLES[self.style](self.attn, values, hidden, past)
