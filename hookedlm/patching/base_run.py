"""The base prompts, run once: what patched runs share with that run, and how they go on from it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum
from functools import cached_property
from typing import Any, TypeAlias
from weakref import WeakKeyDictionary, ref

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from hookedlm.hooks import HookPoint, HookRequest, attached
from hookedlm.layers.attention import Attention
from hookedlm.layers.block import AttentionBranch
from hookedlm.layers.context import Context
from hookedlm.lent import loop_of
from hookedlm.model import HookedTransformer
from hookedlm.patching.packing import Pack, Step, packs

Stream = Float[Tensor, "batch pos d_model"]
KeysValues = tuple[Float[Tensor, "batch pos kv_head d_head"], Float[Tensor, "batch pos kv_head d"]]


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
    contexts: list[Context] = field(default_factory=list)
    """What each block was called with."""
    keys: list[KeysValues] = field(default_factory=list)
    """Each layer's keys and values of all positions, rotated, if positions may be reused."""
    seen: dict[str, Float[Tensor, "batch pos ..."]] = field(default_factory=dict)
    """By hook point, if positions may be reused: what passed those that will be patched and cost
    nothing to look at, and what attention handed on where a layer is patched behind it."""

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
        return self.model.unembed(self.entering[-1][:1, :0]).dtype

    def rows(self, x: Tensor, n_cells: int) -> Tensor:
        """A tensor of the base prompts once for every cell: ``[cells * batch, ...]``."""
        if x.shape[0] == 1:
            return x.expand(n_cells, *x.shape[1:])
        return x.repeat(n_cells, *[1] * (x.ndim - 1))


def listened(model: HookedTransformer) -> bool:
    """Whether somebody's hooks are in the model: those may count on whole runs of the prompts."""
    return any(point.wanted for point in model.hook_dict.values())


@torch.no_grad()
def run_base(
    model: HookedTransformer,
    tokens: Any,
    mask: Tensor | None = None,
    points: Iterable[HookPoint] = (),
) -> BaseRun:
    """The base run of text, texts or tokens; no run at all where none can be shared. ``points``
    will be patched: what goes before them is kept."""
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
    keeps = keeps and all(
        _keeps_positions(block, context, base.n_examples, base.length)
        for block, context in zip(model.blocks, contexts, strict=True)
    )
    base.contexts = contexts
    base.reuse = Reuse.POSITIONS if keeps else Reuse.LAYERS
    _through_blocks(base, stream, _looked_at(points, model) if keeps else [])
    return base


def _through_blocks(base: BaseRun, stream: Stream, looked_at: Sequence[HookPoint]) -> None:
    """Fill a base run; less of it may be reused if a trial says so, or blocks lie apart."""
    device = stream.device
    known = base.length, base.mask is None, stream.dtype, device
    verdicts = _verdicts(base.model)
    trial = None

    def look(x: Tensor, hook: HookPoint) -> None:
        base.seen.setdefault(hook.name or "", x)

    with attached([HookRequest(point, look, observes=True) for point in looked_at]):
        for layer, (block, ctx) in enumerate(zip(base.model.blocks, base.contexts, strict=True)):
            base.entering.append(stream)
            if base.reuse == Reuse.POSITIONS:
                ctx = replace(ctx, remember=_keeper(base.keys))
            stream = block(stream, ctx)
            if stream.device != device:
                base.reuse = Reuse.LAYERS
            if base.reuse == Reuse.POSITIONS and base.length > 2 and known not in verdicts:
                trial = trial or Trial(base)
                trial.follow(layer, block, stream)
    base.entering.append(stream)
    if trial is not None and base.reuse == Reuse.POSITIONS:
        verdicts[known] = trial.agrees
    if not verdicts.get(known, True):
        base.reuse = Reuse.LAYERS


def _keeps_positions(block: Any, context: Context, n_examples: int, length: int) -> bool:
    """Whether what a block does at a position hangs on earlier ones by keys and values alone."""
    attn = block._modules.get("attn")
    plain = isinstance(attn, Attention) and attn.spec.causal
    whole = not context.kwargs and context.positions is None
    packs_runs = isinstance(block, AttentionBranch) and block.packs
    return plain and whole and packs_runs and packs(context, n_examples, length)


def _keeper(kept: list[KeysValues]) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    def remember(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        kept.append((k.transpose(1, 2), v.transpose(1, 2)))
        return k, v

    return remember


FREE = {
    "hook_resid_pre", "hook_resid_mid", "hook_resid_post", "hook_attn_out", "hook_mlp_out",
    "attn.hook_q", "attn.hook_k", "attn.hook_v", "attn.hook_z",
}  # fmt: skip
"""Points of a block at which a listener makes nobody compute anything in another way."""


def _looked_at(points: Iterable[HookPoint], model: HookedTransformer) -> list[HookPoint]:
    names = {point.name or "" for point in points}
    looked_at = {name for name in names if ".".join(name.split(".")[2:]) in FREE}
    looked_at |= {z_of(name) for name in names if is_behind_attention(name, model)}
    return [model.hook_dict[name] for name in sorted(looked_at)]


def z_of(name: str) -> str:
    """Of the block that a point belongs to, what attention hands on."""
    return ".".join([*name.split(".")[:2], "attn.hook_z"])


def is_behind_attention(name: str, model: HookedTransformer) -> bool:
    """Whether a point of a block fires behind its attention, at ``hook_z`` or later."""
    z, names = z_of(name), list(model.hook_dict)
    return z in model.hook_dict and names.index(name) >= names.index(z)


Parts: TypeAlias = list["ref[nn.Module]"]
VERDICTS: WeakKeyDictionary[HookedTransformer, tuple[Parts, dict[Any, bool]]] = WeakKeyDictionary()


def _verdicts(model: HookedTransformer) -> dict[Any, bool]:
    """What trials of these very modules said, by length, padding, dtype and device."""
    parts = list(_parts(model.blocks))
    before, verdicts = VERDICTS.get(model, ([], {}))
    if len(before) != len(parts) or any(a() is not b for a, b in zip(before, parts, strict=True)):
        verdicts = {}
        VERDICTS[model] = [ref(part) for part in parts], verdicts
    return verdicts


def _parts(module: nn.Module) -> Iterator[nn.Module]:
    """All modules in it but hook points."""
    for part in module._modules.values():
        if part is not None and not isinstance(part, HookPoint):
            yield part
            yield from _parts(part)


class Trial:
    """Whether a run of the last two positions, packed, comes to what the base run comes to, and its
    last block read at the last position alone. It is tried beside the base run (whose weights are
    at hand), for a part may look back in ways that nobody declared."""

    def __init__(self, base: BaseRun):
        self.base, self.start = base, base.length - 2
        self.pack = Pack(base, [self.start])
        self.stream = self.pack.entering(base.entering[0], 0, base.n_examples)
        self.agrees = True

    def follow(self, layer: int, block: nn.Module, after: Stream) -> None:
        """Through a block that the base run left as ``after``."""
        base, n = self.base, self.base.n_examples
        last = layer == len(base.contexts) - 1
        step = Step(self.pack, layer, n, n, base.length - 1 if last else None, n if last else 0)
        if last:
            self._compare(base.entering[layer][:, self.start :], self.start)
        self.stream = block(self.stream, step.context(base.contexts[layer]))
        if last:
            self._compare(after[:, -1:], base.length - 1)

    def _compare(self, whole: Stream, start: int) -> None:
        mask = self.base.mask
        real = slice(None) if mask is None else mask[:, start:].bool()
        found, whole = self.stream.view(whole.shape)[real], whole[real]
        room = 1e-4 if whole.dtype == torch.float32 else 0.1  # half precision rounds others so
        self.agrees &= bool((found - whole).abs().max() <= room * whole.abs().max())


class RowContexts:
    """Contexts for the base prompts once for every cell: what opaque parts are called with."""

    def __init__(self, base: BaseRun):
        self.base = base
        self._prepared: dict[int, list[Context]] = {}

    def at(self, layer: int, n_cells: int) -> Context:
        """What a block needs besides the stream of these many cells."""
        if n_cells not in self._prepared:
            base = self.base
            mask = None if base.mask is None else base.rows(base.mask, n_cells)
            tokens, stream = (base.rows(x, n_cells) for x in (base.tokens, base.entering[0]))
            driver = base.model.driver
            known = None if mask is None else driver.full_mask(mask, base.length, 0, None)
            prepared = driver.prepare(
                stream=stream,
                tokens=tokens,
                mask=known,
                position_ids=driver.positions(known, base.length, 0, stream.device),
                cache=None,
            )
            nothing: Any = {"remember": None}
            self._prepared = {n_cells: [replace(c, **nothing) for c in prepared.contexts]}
        return self._prepared[n_cells][layer]
