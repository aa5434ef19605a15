"""Sites: which part of which activation each cell of a grid means, for many cells at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hookedlm.hooks import HookPoint

Rows = Float[Tensor, "rows ..."]
Index = Int[Tensor, "cells"] | Int[Tensor, "cells batch"]


@dataclass(frozen=True)
class Sites:
    """The same part of an activation, in every layer's and each cell's own place.

    ``layers``: of each cell. ``index``: by axis of the activation, where each cell points along it
    (positions for every example, if they differ); along axes that are not named it means all.
    """

    points: Mapping[int, HookPoint]
    layers: Sequence[int]
    index: Mapping[str, Index]

    def __len__(self) -> int:
        return len(self.layers)

    def starts(self) -> list[int]:
        """The first position at which each cell changes anything."""
        if "pos" not in self.index:
            return [0] * len(self)
        positions = self.index["pos"]
        return (positions if positions.ndim == 1 else positions.amin(1)).tolist()

    def to(self, device: torch.device) -> Sites:
        """With the index on a device."""
        moved = {axis: where.to(device) for axis, where in self.index.items()}
        return Sites(self.points, self.layers, moved)

    def part(
        self, axes: Sequence[str], cells: Int[Tensor, "cells"], shape: Sequence[int], start: int
    ) -> tuple[Tensor, ...]:
        """What indexes an activation ``[cells, batch, *shape]`` that begins at position ``start``.

        The part has the axes cells, batch, and then in their order those that cells point at (of
        length 1), with all between them, up to the last of these.
        """
        inner = list(axes[1:])
        last = max((inner.index(axis) for axis in self.index), default=-1)
        n_dims, device = 2 + last + 1, cells.device
        n_examples = shape[0]

        def along(x: Tensor, *dims: int) -> Tensor:
            sizes = [1] * n_dims
            for dim, size in zip(dims, x.shape, strict=True):
                sizes[dim] = size
            return x.reshape(sizes)

        found = [along(torch.arange(len(cells), device=device), 0)]
        found.append(along(torch.arange(n_examples, device=device), 1))
        for dim, axis in enumerate(inner[: last + 1]):
            if axis not in self.index:
                found.append(along(torch.arange(shape[1 + dim], device=device), 2 + dim))
                continue
            where = self.index[axis][cells]
            if axis == "pos" and start:
                where = where - start
            found.append(along(where, *range(where.ndim)))
        return tuple(found)
