"""The driver: makes each pass ready and remembers what does not depend on the input."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import replace
from functools import partial
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from hookedlm.convert.check import positions_of
from hookedlm.convert.prepare import Prepared
from hookedlm.errors import InputError
from hookedlm.layers.context import Context
from hookedlm.past_key_values import HookedTransformerKeyValueCache

KEPT = 4
"""Shapes whose contexts are kept: a sweep alternates between one or two."""


class Preparer(Protocol):
    """Makes contexts: Hugging Face's own code (`HFPreparer`), or ours for toy models."""

    module: nn.Module | None
    reusable: bool
    remembers: bool
    own_cache: type | None
    reads_tokens: bool
    no_start: str
    accepts: AbstractSet[str]

    def check(self, names: Iterable[str]) -> None:
        """Raise InputError on inputs that this model has no use for."""
        ...

    def __call__(
        self,
        *,
        tokens: Tensor | None = None,
        embeds: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Any = None,
        pos_embed: Tensor | None = None,
    ) -> Prepared:
        """Contexts for one pass."""
        ...


class LatestContexts:
    """The contexts of the last pass, for entries of a cache that are computed when read."""

    def __init__(self) -> None:
        self.latest: list[Context] = []

    def forget(self) -> None:
        """Drop them: the weights moved."""
        self.latest = []


class Driver:
    """Positions, masks and contexts of a pass.

    Contexts of an unpadded pass without a key-value cache depend on nothing but the shape; the
    last few are kept.
    """

    def __init__(self, preparer: Preparer):
        self.preparer = preparer
        self._kept: OrderedDict[tuple[Any, ...], Prepared] = OrderedDict()
        self._masks: WeakKeyDictionary[Any, Tensor] = WeakKeyDictionary()
        self.latest: list[Context] = []

    def full_mask(
        self, mask: Tensor | None, n_new: int, past: int, cache: Any
    ) -> Int[Tensor, "batch all_pos"] | None:
        """The mask over cached and new positions; raises InputError if lengths don't fit."""
        remembered = self._remembered(cache)
        if mask is None and remembered is None:
            return None
        if mask is None:
            mask = remembered.new_ones(remembered.shape[0], n_new)
        mask = mask.long()
        if past and mask.shape[1] == n_new:
            before = remembered if remembered is not None else mask.new_ones(mask.shape[0], past)
            # A pass that failed, or an embedding without its pass, left a longer mask than keys.
            mask = torch.cat([before[:, :past].to(mask.device), mask], dim=1)
        if mask.shape[1] != past + n_new:
            raise InputError(
                f"attention_mask has {mask.shape[1]} positions; expected {n_new} for the new tokens"
                + (f" or {past + n_new} with the {past} cached ones" if past else "")
            )
        if isinstance(cache, HookedTransformerKeyValueCache):
            cache.remember_mask(mask)
            return mask if (mask == 0).any() else None
        if cache is not None:
            self._masks[cache] = mask
        return mask

    def _remembered(self, cache: Any) -> Int[Tensor, "batch past_pos"] | None:
        """Which cached positions are real; None if all are."""
        if isinstance(cache, HookedTransformerKeyValueCache):
            return cache.previous_attention_mask
        mask = None if cache is None else self._masks.get(cache)
        return None if mask is None or bool(mask.all()) else mask

    def positions(
        self, mask: Tensor | None, n_new: int, past: int, device: torch.device
    ) -> Int[Tensor, "batch pos"]:
        """Position ids ``[batch or 1, pos]``: padding does not count."""
        if mask is None:
            return torch.arange(past, past + n_new, device=device)[None]
        return positions_of(mask)[:, -n_new:]

    def prepare(
        self,
        *,
        stream: Float[Tensor, "batch pos d_model"] | None,
        tokens: Int[Tensor, "batch pos"] | None,
        mask: Int[Tensor, "batch all_pos"] | None,
        position_ids: Int[Tensor, "batch pos"] | None,
        cache: Any,
        pos_embed: Tensor | None = None,
        embeds: Float[Tensor, "batch pos d_embed"] | None = None,
        others: Mapping[str, Any] | None = None,
    ) -> Prepared:
        """Everything the blocks need for this pass, from the stream entering block 0 (or, where
        only Hugging Face can embed, from the tokens). ``embeds`` stand for the rows of an embedding
        table, before anything is added to them; ``others`` is what else the base takes."""
        plain = mask is None and cache is None and not others
        key: tuple[Any, ...] | None = None
        if plain and self.preparer.reusable and stream is not None and pos_embed is None:
            key = (
                tuple(stream.shape),
                stream.dtype,
                stream.device,
                torch.is_inference_mode_enabled(),
            )
            if key in self._kept:
                self._kept.move_to_end(key)
                self.latest = self._kept[key].contexts
                return self._kept[key]
        extra: dict[str, Any] = {} if pos_embed is None else {"pos_embed": pos_embed}
        if others:
            extra["others"] = others
        told = self.preparer.reads_tokens  # some of what is prepared then comes from the stream
        if stream is not None:
            flows = told or self.preparer.no_start
            embeds = stream if flows else stream.detach()
        prepared = self.preparer(
            tokens=tokens if embeds is None or told else None,
            embeds=embeds,
            attention_mask=mask,
            position_ids=None if plain else position_ids,
            cache=cache,
            **extra,
        )
        # What a pass hands from layer to layer must not be found by the next one.
        if key is not None and all(ctx.shared_keys is None for ctx in prepared.contexts):
            prepared = Prepared(prepared.contexts, None)
            self._kept[key] = prepared
            if len(self._kept) > KEPT:
                self._kept.popitem(last=False)
        if cache is not None:
            prepared = Prepared(remembering(prepared.contexts, cache), prepared.stream)
        self.latest = [] if cache is not None else prepared.contexts
        return prepared

    def forget(self) -> None:
        """Drop what was kept: the modules moved or changed."""
        self._kept.clear()
        self.latest = []

    def __getstate__(self) -> dict[str, Any]:
        return {"preparer": self.preparer}

    def __setstate__(self, state: dict[str, Any]) -> None:
        fresh = Driver(state["preparer"])
        vars(self).update(vars(fresh))


def remembering(contexts: Sequence[Context], cache: Any) -> list[Context]:
    """Contexts whose layers append to, and read from, a transformers ``Cache``."""

    def update(k: Tensor, v: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        return cache.update(k, v, layer)

    return [replace(ctx, remember=partial(update, layer=i)) for i, ctx in enumerate(contexts)]
