"""What interventions take from other runs, computed before theirs."""

from __future__ import annotations

import zlib
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from hookedlm.cache import ActivationCache
from hookedlm.errors import CacheKeyError, InputError
from hookedlm.hooks import HookPoint
from hookedlm.interventions.from_runs import Freeze, Mean, Noise, Patch, Resample
from hookedlm.interventions.part import Source
from hookedlm.interventions.what import What

if TYPE_CHECKING:
    from hookedlm.model import HookedTransformer

BATCH_ROWS = 32
"""Rows of a tensor of examples that run at once."""

IN_SOURCE_RUN: ContextVar[bool] = ContextVar("IN_SOURCE_RUN", default=False)

Activation = Float[Tensor, "batch ..."]


@contextmanager
def source_run(model: HookedTransformer) -> Iterator[None]:
    """Within it only permanent hooks (and those added within) are in; then all others are back."""
    kept = [(p, p.fwd_hooks, p.bwd_hooks) for p in model.hook_points() if p.wanted]
    token, runs = IN_SOURCE_RUN.set(True), model.run_state.runs
    try:
        for point, forward, _ in kept:
            point.fwd_hooks = [handle for handle in forward if handle.is_permanent]
            point.bwd_hooks = []
            point.wanted = bool(point.fwd_hooks)
        with torch.no_grad():
            yield
    finally:
        for point, forward, backward in kept:
            point.fwd_hooks, point.bwd_hooks = forward, backward
            point.wanted = bool(forward or backward)
        IN_SOURCE_RUN.reset(token)
        model.run_state.runs = runs  # whoever waits for a run does not wait for this one


def recorded(
    model: HookedTransformer, names: Iterable[str], *args: Any, **kwargs: Any
) -> dict[str, Activation]:
    """Activations of a run without other hooks, by name."""
    options: dict[str, Any] = {"names_filter": list(names), "return_cache_object": False}
    with source_run(model):
        _, found = model.run_with_cache(*args, **(kwargs | {"return_type": None}), **options)
    return dict(found)


def run_needed(what: What) -> Hashable | None:
    """Of which run ``what`` needs activations: equal keys, one run. None: of none beforehand."""
    if isinstance(what, (Patch, Freeze)) and what.needs_source:
        source = what.source
        if source is None:
            return None
        texts = isinstance(source, (str, list, tuple))
        return (
            ("texts", *([source] if isinstance(source, str) else source)) if texts else id(source)
        )
    if isinstance(what, Mean) and what.needs_source:
        return "mean", id(what.examples), what.per_position
    if isinstance(what, Resample) and what.examples is not None:
        return "examples", id(what.examples)
    return None


def run_for(
    model: HookedTransformer, what: What, names: Sequence[str], **reading: Any
) -> dict[str, Activation]:
    """The activations that ``what`` needs, by name; ``reading``: how texts become tokens.

    Raises CacheKeyError on those that a given cache lacks, InputError on examples of several
    lengths where one is needed.
    """
    if isinstance(what, (Patch, Freeze)):
        return of_run(model, what.source, names, **reading)
    if isinstance(what, Mean):
        return _mean(model, what, names, reading)
    assert isinstance(what, Resample)
    found: list[dict[str, Tensor]] = []
    for tokens, mask in _batches(model, what.examples, **reading):
        found.append(recorded(model, names, tokens, attention_mask=mask))
    return {name: _joined([each[name] for each in found], "Resample") for name in names}


def of_run(
    model: HookedTransformer, source: Any, names: Sequence[str], **reading: Any
) -> dict[str, Activation]:
    """Activations of a `Run`, with their batch axis; raises CacheKeyError on those it lacks."""
    if isinstance(source, ActivationCache):
        found = {name: source[name] for name in names}
        return found if source.has_batch_dim else {name: x[None] for name, x in found.items()}
    if isinstance(source, Mapping):
        if missing := [name for name in names if name not in source]:
            raise CacheKeyError(
                f"no activation {missing[0]!r} in the dictionary to patch from; it has "
                f"{', '.join(map(str, list(source)[:4]))}"
            )
        return {name: source[name] for name in names}
    return recorded(model, names, source, **reading)


# Datasets -----------------------------------------------------------------------------------------


def _batches(
    model: HookedTransformer,
    examples: Any,
    prepend_bos: bool | None = None,
    padding_side: Literal["left", "right"] | None = None,
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """(tokens, mask of real positions or None) of one batch after the other."""
    if isinstance(examples, Tensor):
        examples = (examples if examples.ndim == 2 else examples[None]).split(BATCH_ROWS)
    n = 0
    for batch in examples:
        tokens, mask, stream = model._read_input(batch, prepend_bos, padding_side, None, None, None)
        if stream is not None or tokens is None:
            raise InputError("examples are batches of tokens or texts")
        yield tokens, mask
        n += len(tokens)
    if not n:
        raise InputError("a dataset without examples")


def _joined(batches: Sequence[Tensor], whose: str) -> Tensor:
    if len({x.shape[1:] for x in batches}) > 1:
        raise InputError(
            f"{whose} wants examples of one length, got {sorted({x.shape[1] for x in batches})}"
        )
    return torch.cat(list(batches))


def _mean(
    model: HookedTransformer, what: Mean, names: Sequence[str], reading: dict[str, Any]
) -> dict[str, Activation]:
    totals: dict[str, Tensor] = {}
    counts: dict[str, Tensor] = {}
    for tokens, mask in _batches(model, what.examples, **reading):
        found = recorded(model, names, tokens, attention_mask=mask)
        real = torch.ones_like(tokens) if mask is None else mask[:, -tokens.shape[1] :]
        for name, x in found.items():
            total, count = _sums(x, real, model.hook_dict[name].axes or (), what.per_position)
            if name in totals and totals[name].shape != total.shape:
                raise InputError(
                    f"the mean of {name} wants examples of one length: its shape is "
                    f"{list(totals[name].shape)}, then {list(total.shape)}"
                )
            totals[name] = totals[name] + total if name in totals else total
            counts[name] = counts[name] + count if name in counts else count
    return {name: total / counts[name].clamp(min=1) for name, total in totals.items()}


def _sums(
    x: Tensor, real: Tensor, axes: Sequence[str], per_position: bool
) -> tuple[Tensor, Tensor]:
    """Sums over what is real, and over how many; the axes that are summed over are 1."""
    shape = [1] * x.ndim
    shape[0] = len(real)
    if "pos" in axes:
        shape[axes.index("pos")] = real.shape[1]
    else:
        real = torch.ones_like(real[:, 0])
    is_real = (real > 0).view(shape).to(x.device)
    summed = ("batch",) if per_position else ("batch", "pos")
    dims = [dim for dim, axis in enumerate(axes) if axis in summed] or [0]
    # Padding is chosen away, not multiplied by 0: it may be infinite or no number.
    kept = torch.where(is_real, x.float(), 0.0)
    return kept.sum(dims, keepdim=True), is_real.float().sum(dims, keepdim=True)


# At the hook point --------------------------------------------------------------------------------


class Supply:
    """Where the source of one intervention at one hook point comes from."""

    def __init__(self, what: What, point: HookPoint, found: Activation | None = None):
        self.what = what
        self.found = found
        self.axes = point.axes or ()
        name = (point.name or "").encode()
        self.seed = zlib.crc32(name, what.seed) if isinstance(what, Noise) else 0
        self.noise: dict[tuple[int, ...], tuple[torch.Generator, list[Tensor]]] = {}
        self.now: Activation | None = None
        self.start = 0

    @property
    def of_same_run(self) -> bool:
        """Whether it is the same run without interventions that is wanted."""
        what = self.what
        return (isinstance(what, Freeze) and what.source is None) or (
            isinstance(what, Resample) and what.examples is None
        )

    def __call__(self, x: Activation, offset: int) -> Source | None:
        """The source of an activation whose positions begin at ``offset``; None if none is needed.

        Raises InputError on a source that does not fit.
        """
        what = self.what
        if not what.needs_source:
            return None
        if isinstance(what, Noise):
            return Source(self._unit_noise(x, offset))
        if self.of_same_run:
            assert self.now is not None, "call the model, not its forward"
            found = self._other_rows(self.now) if isinstance(what, Resample) else self.now
            return self._fitted(found, x, self.start)
        assert self.found is not None
        found = self._drawn(self.found, len(x)) if isinstance(what, Resample) else self.found
        everywhere = isinstance(what, Mean) and not what.per_position
        return self._fitted(found, x, None if everywhere else 0)

    def _fitted(self, found: Tensor, x: Tensor, start: int | None) -> Source:
        """A source with the axes of ``x``, those of length 1 expanded."""
        found = found.to(x.device)
        shape = list(x.shape)
        pos = self.axes.index("pos") if "pos" in self.axes else None
        if pos is not None and start is not None and found.ndim == x.ndim:
            shape[pos] = found.shape[pos]
        check_fits(list(found.shape), shape, self.axes)
        return Source(found.expand(shape), start)

    def _drawn(self, found: Tensor, rows: int) -> Tensor:
        assert isinstance(self.what, Resample)
        generator = torch.Generator().manual_seed(self.what.seed)
        return found[torch.randint(len(found), (rows,), generator=generator).to(found.device)]

    def _other_rows(self, now: Tensor) -> Tensor:
        assert isinstance(self.what, Resample)
        rows = len(now)
        if rows < 2:
            raise InputError("Resample() takes other rows of the batch, and this one has none")
        generator = torch.Generator().manual_seed(self.what.seed)
        steps = torch.randint(1, rows, (rows,), generator=generator)
        return now[((torch.arange(rows) + steps) % rows).to(now.device)]

    def _unit_noise(self, x: Tensor, offset: int) -> Tensor:
        """Noise for all positions so far: each drawn when first reached."""
        pos = self.axes.index("pos") if "pos" in self.axes else None
        shape = tuple(n for dim, n in enumerate(x.shape) if dim != pos)
        n = 1 if pos is None else offset + x.shape[pos]
        if shape not in self.noise:
            self.noise[shape] = torch.Generator().manual_seed(self.seed), []
        generator, drawn = self.noise[shape]
        while len(drawn) < n:
            drawn.append(torch.randn(shape, generator=generator).to(x.device))
        return drawn[0] if pos is None else torch.stack(drawn[:n], dim=pos)


def check_fits(
    found: Sequence[int], shape: Sequence[int | None], axes: Sequence[str], what: str = "the source"
) -> None:
    """Raise InputError unless ``found`` broadcasts to ``shape`` (None: unknown)."""
    if len(found) != len(shape) or any(
        n != m and n != 1 and m is not None for n, m in zip(found, shape, strict=False)
    ):
        wanted = ["any" if n is None else n for n in shape]
        raise InputError(
            f"{what} has shape {list(found)}, and the activation {wanted} ({' '.join(axes)}): they "
            "must agree, or the source's be 1"
        )
