"""Parts of activations: any cross product of positions, heads, neurons and dimensions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from hookedlm.errors import InputError
from hookedlm.interventions.part import Picked, Source, Step
from hookedlm.interventions.what import short

Index = int | slice | Sequence[int] | Int[Tensor, "..."] | None
"""int (its axis goes) | slice | several (list, tuple, range) | None: all. Of positions also, one
or several for each example: a tensor ``[batch]`` or ``[batch, n]``."""

FIELDS = {
    "position": ("pos", "key_pos"),
    "head": ("head", "kv_head"),
    "expert": ("expert",),
    "neuron": ("d_mlp",),
}
"""Field of an intervention -> the axes it may select from, the first that is there. ``dims``
selects from the last axis."""

CALLED = {
    "pos": "positions",
    "key_pos": "positions",
    "head": "heads",
    "kv_head": "key/value heads",
    "d_mlp": "neurons",
    "expert": "experts",
}


@dataclass(frozen=True, eq=False)
class Along:
    """A selection along one axis: ``index [1, n]``, ``[batch, n]`` (for each example) or a slice.
    ``drops``: it is one index, whose axis is gone from the part. ``of``: of what, for messages."""

    field: str
    of: str
    axis: str
    dim: int
    index: Int[Tensor, "rows n"] | slice
    drops: bool = False

    @property
    def rows(self) -> int:
        """For how many examples it is given; 1 means for all alike."""
        return self.index.shape[0] if isinstance(self.index, Tensor) else 1

    def places(self, size: int, may_grow: bool = False) -> Int[Tensor, "rows n"]:
        """The indices, counted from 0; raises InputError on those that an axis of ``size`` lacks
        (``may_grow``: for now), and on one that stands there twice."""
        if isinstance(self.index, slice):
            return torch.arange(size)[self.index][None]
        low, high = int(self.index.min()), int(self.index.max())
        if low < -size or (high >= size and not may_grow):
            things = CALLED.get(self.axis, "dimensions")
            raise InputError(
                f"{self.field}={low if low < -size else high} of {self.of}: there are {size} "
                f"{things}, 0 to {size - 1} (or {-size} to -1)"
            )
        places = torch.where(self.index < 0, self.index + size, self.index)
        if any(len(set(row)) < len(row) for row in places.tolist()):
            raise InputError(f"{self.field}={self.index.tolist()}: one stands there twice")
        return places

    def count(self, size: int | None) -> int | None:
        """How many are selected; None if that depends on an unknown ``size``."""
        if isinstance(self.index, Tensor):
            return self.index.shape[1]
        return None if size is None else len(range(size)[self.index])


def along(field: str, of: str, axis: str, dim: int, index: Index, drops: bool = True) -> Along:
    """What ``index`` means along an axis; raises InputError on what is no index."""
    if isinstance(index, slice) and (index.step is None or index.step > 0):
        return Along(field, of, axis, dim, index)
    if is_int(index):
        return Along(field, of, axis, dim, torch.tensor([[int(index)]]), drops)
    if isinstance(index, Tensor):
        whole = index.dtype not in (torch.bool, torch.uint8) and not index.is_floating_point()
        places = index.detach().cpu().long()
        if whole and index.ndim == 0:
            return Along(field, of, axis, dim, places.view(1, 1), drops)
        if whole and index.ndim == 1 and field != "position":
            return Along(field, of, axis, dim, places[None])
        if whole and index.ndim in (1, 2) and field == "position" and index.numel():
            single = index.ndim == 1
            return Along(field, of, axis, dim, places[:, None] if single else places, single)
    elif isinstance(index, Sequence) and not isinstance(index, str):
        listed = list(index)
        if listed and all(is_int(i) for i in listed):
            return Along(field, of, axis, dim, torch.tensor([listed]))
    raise InputError(
        f"{field}={index!r}: expected an int, a slice that goes forwards, or several ints"
        + (", or a tensor [batch] or [batch, n] of integers" if field == "position" else "")
    )


def is_int(x: Any) -> TypeGuard[int]:
    """Whether ``x`` is a whole number, numpy's included."""
    return isinstance(x, (int, np.integer)) and not isinstance(x, bool)


class Where:
    """A part of the activations at one hook point, whatever their length.

    ``given``: indices by field (those of `FIELDS`, and ``dims``), None where all is meant;
    ``elsewhere``: the positions in the source, if they are others. Raises InputError on a field
    for which the point has no axis, and on what is no index.
    """

    def __init__(
        self, name: str, axes: Sequence[str], given: Mapping[str, Index], elsewhere: Index = None
    ):
        self.axes = tuple(axes)
        self.alongs: list[Along] = []
        last = len(self.axes) - 1
        for field, index in given.items():
            if index is None:
                continue
            found = [self.axes.index(a) for a in FIELDS.get(field, ()) if a in self.axes]
            dim = last if field == "dims" else next(iter(found), -1)
            if dim < 0:
                raise InputError(
                    f"{field}={index!r}: {name} has no such axis; its axes are "
                    f"{' '.join(self.axes) or 'unknown'}"
                )
            if any(a.dim == dim for a in self.alongs):
                raise InputError(f"{field} and another field both select from {self.axes[dim]}")
            self.alongs.append(along(field, name, self.axes[dim], dim, index, dim != last))
        self.alongs.sort(key=lambda a: a.dim)
        self.position = next((a for a in self.alongs if a.field == "position"), None)
        self.elsewhere: Along | None = None
        if elsewhere is not None:
            self.elsewhere = self._elsewhere(elsewhere)

    def _elsewhere(self, index: Index) -> Along:
        here = self.position
        if here is None:
            raise InputError("a position in the source wants one in the intervention")
        there = along("position", "the source", here.axis, here.dim, index)
        if isinstance(here.index, slice) or isinstance(there.index, slice):
            raise InputError("positions in the source: write both out, a slice has no fixed number")
        if here.index.shape[1] != there.index.shape[1]:
            raise InputError(
                f"{there.index.shape[1]} positions in the source for {here.index.shape[1]} here"
            )
        return there

    @property
    def grows(self) -> int | None:
        """The axis that a run with a key-value cache continues: that of positions, if there."""
        return self.axes.index("pos") if "pos" in self.axes else None

    def part(self, sizes: Sequence[int | None]) -> list[int | None]:
        """The shape of the part of an activation of ``sizes``; None where unknown."""
        shape = list(sizes)
        for a in self.alongs:
            shape[a.dim] = a.count(sizes[a.dim])
        return [n for dim, n in enumerate(shape) if not any(a.dim == dim for a in self._dropped)]

    @property
    def _dropped(self) -> list[Along]:
        return [a for a in self.alongs if a.drops]

    def pick(
        self, x: Float[Tensor, "..."], offset: int, source: Source | None = None
    ) -> Picked | None:
        """The part of ``x``, whose positions begin at ``offset``; None if it has none of it.

        Raises InputError on indices out of range, positions that the source lacks, and positions
        for another number of examples.
        """
        steps: list[Step] = []
        source_steps: list[Step] = []
        for a in self.alongs:
            if a.dim == self.grows:
                step, there = self._positions(a, x, offset, source)
                if step is None:
                    return None
            else:
                step = there = Step(a.dim, a.places(x.shape[a.dim]).to(x.device))
                if self.elsewhere is not None and a is self.position and source is not None:
                    there = Step(a.dim, self.elsewhere.places(source.x.shape[a.dim]).to(x.device))
            steps.append(step)
            source_steps.append(there)
        if self.grows is not None and self.position is None and source is not None:
            source_steps += self._all_positions(x.shape[self.grows], offset, source)
        return Picked(tuple(steps), tuple(source_steps), tuple(a.dim for a in self._dropped))

    def _all_positions(self, n: int, offset: int, source: Source) -> list[Step]:
        """All of this run's positions in the source."""
        dim = self.grows
        assert dim is not None
        if source.start is None:
            return []
        end = source.start + source.x.shape[dim]
        if end != offset + n or source.start > offset:
            raise InputError(
                f"the source has {end} positions and the run {offset + n}: say which to take, for "
                f"instance position=range({min(end, offset + n)}), or make them equally long"
            )
        if source.start == offset:
            return []
        index = torch.arange(offset - source.start, end - source.start, device=source.x.device)
        return [Step(dim, index[None])]

    def _positions(
        self, a: Along, x: Tensor, offset: int, source: Source | None
    ) -> tuple[Step | None, Step]:
        """Positions in a run that begins at ``offset``, and in the source."""
        rows, total = x.shape[0], offset + x.shape[a.dim]
        places = a.places(total, may_grow=True)
        there = places
        if source is not None and source.start is not None and self.elsewhere is not None:
            there = self.elsewhere.places(source.start + source.x.shape[a.dim])
        for each in (places, there):
            if len(each) not in (1, rows):
                raise InputError(
                    f"position is given for {len(each)} examples, and the run has {rows}"
                )
        inside = (places >= offset) & (places < total)
        if isinstance(a.index, slice):
            places, there, inside = (y[:, inside[0]] for y in (places, there, inside))
        if not bool(inside.any()):
            return None, Step(a.dim, places)
        local = places - offset
        step = Step(a.dim, local.to(x.device))
        if not bool(inside.all()):
            valid = inside.expand(rows, -1).to(x.device)
            local = local.clamp(0, x.shape[a.dim] - 1).expand(rows, -1)
            step = Step(a.dim, local.to(x.device), valid)
        if source is None or source.start is None:
            return step, step
        at, size = there - source.start, source.x.shape[a.dim]
        if bool((inside & ((at < 0) | (at >= size))).any()):
            raise InputError(
                f"{a.field}={short(a.index)}: the source has positions {source.start} to "
                f"{source.start + size - 1}"
            )
        return step, Step(a.dim, at.clamp(0, size - 1).to(x.device))
