"""`Context`: everything a block needs in one pass besides the stream."""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from jaxtyping import Bool, Float
from torch import Tensor

Remember = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Appends this pass's keys and values to the key-value cache and returns all of them."""


class Packed(Protocol):
    """Runs of different lengths along one row of positions, each attending within itself
    (`hookedlm.patching.packing`). Not all that go into attention need go on from it, and others may
    join behind it."""

    def attend(
        self, attend: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, ctx: Context
    ) -> Float[Tensor, "1 pos head d_head"]:
        """``attend(q, k, v, ctx)`` with a row for each run."""
        ...

    def kept(self, x: Float[Tensor, "1 pos ..."]) -> Float[Tensor, "1 pos_on ..."]:
        """Those of the positions that went into attention which go on from it."""
        ...

    def joined(self, z: Float[Tensor, "1 pos_on ..."]) -> Float[Tensor, "1 pos_out ..."]:
        """With those that join behind attention."""
        ...

    def onward(self, stream: Float[Tensor, "1 pos d_model"]) -> Float[Tensor, "1 pos_out d_model"]:
        """The stream as attention is added to it."""
        ...


@dataclass(frozen=True)
class Context:
    """Prepared once per layer and pass, never changed.

    ``mask`` as it was prepared: None (causal, or everything for a single query), boolean (True may
    be attended to) or additive. ``temperature`` multiplies queries by their position. ``bias`` is
    added to the scores (ALiBi). ``rotary`` holds the tables the layer's rotation understands.
    ``positions`` are position embeddings that queries and keys read apart from the stream
    (Shortformer). ``layer_input`` is what the tokens say to this layer alone; through
    ``shared_keys`` a layer hands keys and values to later ones, through ``handed`` which keys it
    picked. ``kwargs`` are what Hugging Face would call its own block with, by name, for opaque
    parts. ``skipped``: this pass goes around the block. ``packed``: positions are those of many
    runs.
    """

    mask: Tensor | None = None
    temperature: Float[Tensor, "batch 1 pos 1"] | None = None
    bias: Float[Tensor, "batch head pos key_pos"] | None = None
    layer_input: Float[Tensor, "batch pos d_layer_input"] | None = None
    shared_keys: MutableMapping[Any, tuple[Tensor, Tensor]] | None = None
    handed: MutableMapping[str, Tensor] | None = None
    rotary: tuple[Tensor, ...] | None = None
    positions: Float[Tensor, "batch pos d_model"] | None = None
    remember: Remember | None = None
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    skipped: bool = False
    packed: Packed | None = None

    def onward(self, stream: Float[Tensor, "batch pos d_model"]) -> Tensor:
        """The stream as a block adds to it."""
        return stream if self.packed is None else self.packed.onward(stream)

    def allowed(self, n_query: int, n_key: int) -> Bool[Tensor, "batch head pos key_pos"] | None:
        """Which keys each query may attend to, as booleans; None means all of them."""
        if self.mask is None:
            return None
        mask = self.mask[..., -n_query:, :n_key]
        if mask.dtype == torch.bool:
            return mask
        return mask > torch.finfo(mask.dtype).min / 2
