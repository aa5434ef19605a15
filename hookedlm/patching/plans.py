"""Plans: what a grid of patches does to its activation."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hookedlm.hooks import HookPoint
from hookedlm.patching.packing import on_device
from hookedlm.patching.sites import Sites

Rows = Float[Tensor, "rows ..."]
Tokens = Float[Tensor, "token ..."]
TokenOf = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(which cell, example, position) -> which token."""
New = Callable[[Tensor, Tensor | None], Tensor]
"""(a part of an activation, the same part of the source run) -> what is put there."""


class Plan(ABC):
    """What a grid of patches does: its cells, by number."""

    layers: Sequence[int]
    starts: list[int]
    """The first position at which each cell changes anything."""

    @abstractmethod
    def point(self, layer: int) -> HookPoint:
        """Where the patches of a layer go."""

    @abstractmethod
    def edit(self, rows: Rows, cells: Sequence[int], start: int) -> Rows:
        """The activation ``[cells * batch, ...]`` of these cells, which begins at position
        ``start``, with their patches."""

    def settle(self, seen: Mapping[str, Tensor]) -> list[int]:
        """Cells that are known to change nothing, from what the base run had at hook points. May
        set the starts of others later."""
        return []

    def edit_packed(self, tokens: Tokens, cells: Sequence[int], token_of: TokenOf) -> None:
        """Patch, in place, cells that begin at positions of their own, one behind the other."""
        raise NotImplementedError(f"{type(self).__name__} has cells that all begin at once")


def from_source(part: Tensor, source: Tensor | None) -> Tensor:
    """What activation patching puts in a part's place: the same part of the source run."""
    assert source is not None
    return source


class SitePlan(Plan):
    """One site for each cell: its part of the activation becomes ``new(part, source part)``.

    ``source``: each layer's activation ``[batch or 1, ...]`` in another run; ``source_sites``:
    which parts of it, if others.
    """

    def __init__(
        self,
        sites: Sites,
        new: New,
        source: Mapping[int, Tensor] | None,
        n_examples: int,
        source_sites: Sites | None = None,
    ):
        self.sites, self.new, self.source, self.n_examples = sites, new, source, n_examples
        self.source_sites = sites if source_sites is None else source_sites
        self.layers, self.starts = sites.layers, sites.starts()

    def point(self, layer: int) -> HookPoint:
        """Where the patches of a layer go."""
        return self.sites.points[layer]

    def settle(self, seen: Mapping[str, Tensor]) -> list[int]:
        """Where both runs have the same, to the bit, as before the first token in which the prompts
        differ, there is nothing to patch."""
        if self.new is not from_source or self.source_sites is not self.sites:
            return []
        assert self.source is not None
        layers = [layer for layer in sorted(set(self.layers)) if self.point(layer).name in seen]
        if not layers:
            return []
        differs = torch.stack([self._differs(layer, seen).cpu() for layer in layers])
        number = {layer: i for i, layer in enumerate(layers)}
        cells = [cell for cell, layer in enumerate(self.layers) if layer in number]
        rows = torch.tensor([number[self.layers[cell]] for cell in cells])
        if "pos" not in self.sites.index:
            same = differs.any(1).cumsum(-1) == 0  # so far, from the first position on
            alike = same.sum(-1).tolist()
            for cell in cells:
                self.starts[cell] = min(alike[number[self.layers[cell]]], differs.shape[-1] - 1)
            changing = differs.any(2).any(1)[rows]
        else:
            positions = self.sites.index["pos"].cpu()[cells]
            each = positions if positions.ndim == 2 else positions[:, None]
            changing = differs[rows[:, None], torch.arange(self.n_examples), each].any(1)
        return [cell for cell, changed in zip(cells, changing.tolist(), strict=True) if not changed]

    def _differs(self, layer: int, seen: Mapping[str, Tensor]) -> Bool[Tensor, "batch pos"]:
        assert self.source is not None
        here, there = seen[self.point(layer).name or ""], self.source[layer]
        return (here != there.to(here.device)).flatten(2).any(-1)

    def edit(self, rows: Rows, cells: Sequence[int], start: int) -> Rows:
        """The rows of these cells, each with its part replaced, in place."""
        layer = self.layers[cells[0]]
        axes = self.point(layer).axes or ()
        x = rows.unflatten(0, (len(cells), self.n_examples))
        numbers = on_device(cells, rows.device)
        self._put(x, self.sites.part(axes, numbers, x.shape[1:], start), layer, numbers, start)
        return rows

    def edit_packed(self, tokens: Tokens, cells: Sequence[int], token_of: TokenOf) -> None:
        """Each cell's part replaced, in place; cells that begin apart say where along ``pos``."""
        layer = self.layers[cells[0]]
        axes = self.point(layer).axes or ()
        numbers = on_device(cells, tokens.device)
        shape = (self.n_examples, 1, *tokens.shape[1:])
        cell, example, pos, *inner = self.sites.part(axes, numbers, shape, 0)
        self._put(tokens, (token_of(cell, example, pos), *inner), layer, numbers)

    def _put(
        self, x: Tensor, where: tuple[Tensor, ...], layer: int, cells: Tensor, start: int = 0
    ) -> None:
        axes = self.point(layer).axes or ()
        source = None if self.source is None else self._source_part(layer, axes, cells, start)
        part = x[where]
        x[where] = self.new(part, source).to(part.dtype).expand_as(part)

    def _source_part(
        self, layer: int, axes: Sequence[str], cells: Tensor, start: int
    ) -> Float[Tensor, "#cells batch ..."]:
        assert self.source is not None
        source = self.source[layer]
        source = source.expand(self.n_examples, *source.shape[1:])
        if start and "pos" in axes and "pos" not in self.source_sites.index:
            pos = axes.index("pos")  # all positions that there are
            source = source.narrow(pos, start, source.shape[pos] - start)
        _, *where = self.source_sites.part(axes, cells, source.shape, 0)
        return source[tuple(where)]


class SetterPlan(Plan):
    """A user's own setter, ``setter(activation, index, clean) -> activation``, a cell at a time on
    whole activations of the base prompts."""

    def __init__(
        self,
        setter: Callable[[Tensor, Sequence[int], Tensor], Tensor],
        indices: Sequence[Sequence[int]],
        points: Mapping[int, tuple[HookPoint, Tensor]],
        n_examples: int,
    ):
        self.setter, self.indices, self.points = setter, indices, points
        self.n_examples = n_examples
        self.layers = [int(index[0]) for index in indices]
        self.starts = [0] * len(indices)

    def point(self, layer: int) -> HookPoint:
        """Where the patches of a layer go."""
        return self.points[layer][0]

    def edit(self, rows: Rows, cells: Sequence[int], start: int) -> Rows:
        """The rows of these cells, as the setter returns them."""
        point, clean = self.points[self.layers[cells[0]]]
        clean = clean.to(rows.device, rows.dtype)
        n = self.n_examples
        for i, cell in enumerate(cells):
            here = rows[i * n : (i + 1) * n]
            edited = self.setter(here.clone(), list(self.indices[cell]), clean)
            here.copy_(point._checked(edited, here))
        return rows
