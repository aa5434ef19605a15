"""One part of one tensor, read and written out of place, and the same part of a source."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Step:
    """Some indices along one axis, of one tensor. Where not ``valid``, nothing is written."""

    dim: int
    index: Int[Tensor, "rows n"]
    valid: Bool[Tensor, "batch n"] | None = None

    def read(self, x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """What is selected."""
        if self.index.shape[0] == 1:
            return x.index_select(self.dim, self.index[0])
        return torch.take_along_dim(x, _placed(self.index, x.ndim, self.dim), self.dim)

    def write(self, x: Float[Tensor, "..."], new: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """A copy of ``x`` with ``new`` in the selected places."""
        if self.index.shape[0] == 1 and self.valid is None:
            return x.index_copy(self.dim, self.index[0], new)
        index = _placed(self.index, x.ndim, self.dim)
        if self.valid is None:
            return x.scatter(self.dim, index.expand(new.shape), new)
        valid = _placed(self.valid, x.ndim, self.dim)
        # One after another: what is not valid may point where another one writes.
        for i in range(index.shape[self.dim]):
            at, ok, one = (y.narrow(self.dim, i, 1) for y in (index, valid, new))
            one = torch.where(ok, one, torch.take_along_dim(x, at, self.dim))
            x = x.scatter(self.dim, at.expand(one.shape), one)
        return x


def _placed(rows: Tensor, ndim: int, dim: int) -> Tensor:
    """``[batch, n]`` with the batch first and n at ``dim``."""
    shape = [1] * ndim
    shape[0], shape[dim] = rows.shape
    return rows.view(shape)


@dataclass(frozen=True, eq=False)
class Source:
    """What a part is taken from: axes like the activation's, its positions from ``start`` on.
    ``start`` is None where the same holds for all positions."""

    x: Float[Tensor, "..."]
    start: int | None = 0


@dataclass(frozen=True, eq=False)
class Picked:
    """A part of one tensor, and the same part of a source."""

    steps: tuple[Step, ...]
    source_steps: tuple[Step, ...]
    drops: tuple[int, ...]

    def read(self, x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """The part."""
        return self._read(x, self.steps)

    def read_source(self, source: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """The same part of a source."""
        return self._read(source, self.source_steps)

    def _read(self, x: Tensor, steps: Sequence[Step]) -> Tensor:
        for step in steps:
            x = step.read(x)
        for dim in reversed(self.drops):
            x = x.squeeze(dim)
        return x

    def write(self, x: Float[Tensor, "..."], new: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """A copy of ``x`` with ``new`` in the part's place."""
        for dim in self.drops:
            new = new.unsqueeze(dim)
        return _write(x, new, self.steps)


def _write(x: Tensor, new: Tensor, steps: Sequence[Step]) -> Tensor:
    if not steps:
        return new
    first, *rest = steps
    return first.write(x, _write(first.read(x), new, rest) if rest else new)
