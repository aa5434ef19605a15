"""The base prompts, run once: what patched runs share with that run, and how they go on from it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from enum import IntEnum
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import DynamicCache

from hookedlm.layers.attention import Attention
from hookedlm.layers.context import Context
from hookedlm.lent import loop_of
from hookedlm.model import HookedTransformer

Stream = Float[Tensor, "batch pos d_model"]
KeysValues = tuple[Float[Tensor, "batch kv_head pos d_head"], Float[Tensor, "batch kv_head pos d"]]


class Reuse(IntEnum):
    """What a patched run may take over from the base run."""

    NOTHING = 0
    """It is run from its tokens: Hugging Face owns the loop, or layers hand each other more than
    the stream."""
    LAYERS = 1
    """It starts at the patched block: parts with a state of their own want all positions."""
    POSITIONS = 2
    """It starts there, and at the first position that is patched: what went before it is known."""


@dataclass
class BaseRun:
    """One pass of the base prompts, unpatched."""

    model: HookedTransformer
    tokens: Int[Tensor, "batch pos"]
    mask: Int[Tensor, "batch pos"] | None
    reuse: Reuse
    entering: list[Stream] = field(default_factory=list)
    """The stream as it enters each block; behind the last of them, as it leaves it."""
    keys: list[KeysValues] = field(default_factory=list)
    """Each layer's keys and values of all positions, rotated, if positions may be reused."""

    @property
    def n_examples(self) -> int:
        """How many base prompts there are."""
        return self.tokens.shape[0]

    @property
    def length(self) -> int:
        """How many positions they have."""
        return self.tokens.shape[1]

    @cached_property
    def logits_dtype(self) -> torch.dtype:
        """What logits are computed in: some families' are float32 whatever the model is in."""
        assert self.model.unembed is not None
        return self.model.unembed(self.entering[-1][:1, -1:]).dtype

    def rows(self, x: Tensor, n_cells: int) -> Tensor:
        """A tensor of the base prompts once for every cell: ``[cells * batch, ...]``."""
        if x.shape[0] == 1:
            return x.expand(n_cells, *x.shape[1:])
        return x.repeat(n_cells, *[1] * (x.ndim - 1))


def listened(model: HookedTransformer) -> bool:
    """Whether somebody's hooks are in the model: those may count on whole runs of the prompts."""
    return any(point.wanted for point in model.hook_dict.values())


@torch.no_grad()
def run_base(model: HookedTransformer, tokens: Any, mask: Tensor | None = None) -> BaseRun:
    """The base run of text, texts or tokens; no run at all where none can be shared."""
    ids, known, _ = model._read_input(tokens, None, None, None, None, mask)
    assert ids is not None
    base = BaseRun(model, ids, known, Reuse.NOTHING)
    if (
        listened(model)
        or loop_of(model) is not None
        or model.driver.preparer.no_start
        or model.unembed is None
    ):
        return base
    stream, prepared = model._enter(ids, None, known, 0, None, None)
    contexts: list[Context] = prepared.contexts
    handing = any(c.shared_keys is not None or c.handed is not None for c in contexts)
    if handing or any(context.skipped for context in contexts):
        return base
    preparer = model.driver.preparer
    keeps = preparer.remembers and preparer.own_cache is None
    keeps = keeps and all(map(_keeps_positions, model.blocks, contexts))
    for block, context in zip(model.blocks, contexts, strict=True):
        base.entering.append(stream)
        if keeps:
            context = replace(context, remember=_keeper(base.keys))
        stream = block(stream, context)
    base.entering.append(stream)
    base.reuse = Reuse.POSITIONS if keeps else Reuse.LAYERS
    if keeps and not _goes_on(base):
        base.reuse = Reuse.LAYERS
    return base


def _shape(base: BaseRun) -> tuple[Any, ...]:
    """What contexts of an unpadded run hang on."""
    stream = base.entering[0]
    return base.length, stream.dtype, stream.device, torch.is_inference_mode_enabled()


def _keeps_positions(block: Any, context: Context) -> bool:
    """Whether what a block does at a position hangs on earlier ones by keys and values alone."""
    attn = block._modules.get("attn")
    plain = isinstance(attn, Attention) and attn.spec.causal
    return plain and not context.kwargs and context.positions is None


def _keeper(kept: list[KeysValues]) -> Callable[[Tensor, Tensor], KeysValues]:
    def remember(k: Tensor, v: Tensor) -> KeysValues:
        kept.append((k, v))
        return k, v

    return remember


def _goes_on(base: BaseRun) -> bool:
    """Whether a run of the last two positions comes to what the base run came to. It is tried, for
    a part may look back in ways that nobody declared."""
    start = max(1, base.length - 2)
    if start == base.length:
        return True
    contexts = RowContexts(base, start)
    stream = base.entering[0][:, start:]
    for layer, block in enumerate(base.model.blocks):
        stream = block(stream, contexts.at(layer, 1))
    whole = base.entering[-1][:, start:]
    real = slice(None) if base.mask is None else base.mask[:, start:].bool()
    room = 1e-4 if whole.dtype == torch.float32 else 0.1  # half precision rounds other batches so
    return bool((stream[real] - whole[real]).abs().max() <= room * whole[real].abs().max())


class RowContexts:
    """Contexts for the base prompts once for every cell, from the position ``start`` on."""

    def __init__(self, base: BaseRun, start: int):
        self.base, self.start = base, start
        self._prepared: dict[int, list[Context]] = {}
        self._broadcasts = base.reuse == Reuse.POSITIONS
        self._varies: list[set[str]] | None = None
        if not self._broadcasts:
            return
        if base.mask is None:
            given = (base.tokens[:1], None, base.entering[0][:1], slice(1))
            self._contexts = (
                base.model.driver.kept((start, *_shape(base)), lambda: self._prepare(*given))
                if base.model.driver.preparer.reusable
                else self._prepare(*given)
            )
            return
        tokens, mask, stream = base.tokens, base.mask, base.entering[0]
        self._contexts = self._prepare(tokens, mask, stream, slice(None))
        if base.n_examples > 1:
            padded = int(base.mask.sum(1).argmin())
            only = slice(padded, padded + 1)
            one = self._prepare(tokens[only], mask[only], stream[only], only)
            self._varies = list(map(_varying, self._contexts, one))

    def at(self, layer: int, n_cells: int) -> Context:
        """What a block needs besides the stream of these many cells."""
        if not self._broadcasts:
            return self._for_rows(n_cells)[layer]
        context, start = self._contexts[layer], self.start
        if self._varies is not None and n_cells > 1:
            context = _repeated(context, self._varies[layer], n_cells)
        if not start:
            return context
        keys, values = (self.base.rows(x[:, :, :start], n_cells) for x in self.base.keys[layer])

        def remember(k: Tensor, v: Tensor) -> KeysValues:
            return torch.cat([keys, k], dim=2), torch.cat([values, v], dim=2)

        return replace(context, remember=remember)

    def _for_rows(self, n_cells: int) -> list[Context]:
        """Opaque parts are called with what Hugging Face prepares for so many rows."""
        if n_cells not in self._prepared:
            base = self.base
            mask = None if base.mask is None else base.rows(base.mask, n_cells)
            tokens, stream = (base.rows(x, n_cells) for x in (base.tokens, base.entering[0]))
            self._prepared = {n_cells: self._prepare(tokens, mask, stream, slice(None))}
        return self._prepared[n_cells]

    def _prepare(
        self, tokens: Tensor, mask: Tensor | None, stream: Stream, examples: slice
    ) -> list[Context]:
        model, start = self.base.model, self.start
        cache = None
        if start:
            cache = DynamicCache()
            for layer, (k, v) in enumerate(self.base.keys):
                cache.update(k[examples, :, :start], v[examples, :, :start], layer)
        driver, n_new = model.driver, stream.shape[1] - start
        known = None if mask is None else driver.full_mask(mask, n_new, start, cache)
        prepared = driver.prepare(
            stream=stream[:, start:],
            tokens=tokens[:, start:],
            mask=known,
            position_ids=driver.positions(known, n_new, start, stream.device),
            cache=cache,
        )
        nothing: Any = {"remember": None}
        return [replace(context, **nothing) for context in prepared.contexts]


def _varying(here: Context, there: Context) -> set[str]:
    """The fields that have a row for each example: they differ in length from those of one."""
    found = set()
    for name in ("mask", "temperature", "bias", "layer_input"):
        ours, theirs = vars(here)[name], vars(there)[name]
        if ours is not None and ours.shape[0] != theirs.shape[0]:
            found.add(name)
    if here.rotary is not None and there.rotary is not None:
        longer = len(here.rotary[0]) != len(there.rotary[0])
        found |= {"rotary"} if longer else set()
    return found


def _repeated(context: Context, names: set[str], n_cells: int) -> Context:
    def repeat(x: Tensor) -> Tensor:
        return x.repeat(n_cells, *[1] * (x.ndim - 1))

    changes: dict[str, Any] = {
        name: tuple(map(repeat, x)) if isinstance(x := vars(context)[name], tuple) else repeat(x)
        for name in names
    }
    return replace(context, **changes)
