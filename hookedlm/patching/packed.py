"""Patched runs as one growing row: each enters at the block that it patches, and the last block
goes on from attention with the positions that are read alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hookedlm.errors import HookNeverFiredError
from hookedlm.hooks import HookPoint, HookRequest, LensHandle, attached
from hookedlm.patching.base_run import BaseRun, is_behind_attention, z_of
from hookedlm.patching.packing import Pack, Row, Step
from hookedlm.patching.plans import Plan


class PackedRuns:
    """Cells, in the order of their layers, run up to the last block; that one is run when somebody
    reads, for the positions that are read."""

    def __init__(self, base: BaseRun, plan: Plan, cells: Sequence[int]):
        self.base, self.plan, self.cells = base, plan, cells
        self.pack = Pack(base, [plan.starts[cell] for cell in cells])
        self.entered = 0
        self.stream: Row = base.entering[0][:1, :0]
        self.last = len(base.model.blocks) - 1
        names = {layer: plan.point(layer).name or "" for layer in set(plan.layers)}
        self.behind = {
            layer
            for layer, name in names.items()
            if z_of(name) in base.seen and is_behind_attention(name, base.model)
        }
        for layer in range(plan.layers[cells[0]], self.last):
            before, self.entered = self.entered, self._entered_by(layer)
            self.stream = self._through(layer, before, None)

    def _entered_by(self, layer: int) -> int:
        return entered_by(self.plan, self.cells, self.entered, layer)

    def _through(self, layer: int, before: int, reads: int | Tensor | None) -> Row:
        """The stream behind a block. Cells from number ``before`` on enter there."""
        base, pack, n = self.base, self.pack, self.base.n_examples
        entered, stream = self._entered_by(layer), self.stream
        here = self.cells[before:entered]
        n_in, n_out = before * n, entered * n
        point = self.plan.point(layer) if here else None
        if here and not (before and layer in self.behind):
            new = pack.entering(base.entering[layer], n_in, n_out)
            stream = torch.cat([stream, new], dim=1) if before else new
            n_in = n_out
        step = Step(pack, layer, n_in, n_out, reads, before * n if reads is not None else 0)
        hook = PackedEditor(self, before, entered)
        with attached([HookRequest(point, hook)] if point is not None else []) as handles:
            stream = base.model.blocks[layer](stream, step.context(base.contexts[layer]))
        demand_fired(handles)
        return stream

    # Reading -------------------------------------------------------------------------------------

    def at(self, positions: int | Int[Tensor, "batch"]) -> Float[Tensor, "cells batch d_model"]:
        """The last stream of every cell at a position, or at each example's own."""
        base, pack, n = self.base, self.pack, self.base.n_examples
        n_runs = len(self.cells) * n
        if isinstance(positions, int):
            positions_of = torch.full_like(pack.starts, positions)
            known = base.entering[-1][:, positions]
        else:
            positions_of = positions[pack.examples]
            known = base.entering[-1][torch.arange(n, device=positions.device), positions]
        before = self.entered
        reads = None if self._sees_patterns() or not before else positions
        stream = self._through(self.last, before, reads)[0]
        runs = torch.arange(n_runs, device=stream.device)
        at = pack.tokens(runs, positions_of)
        if reads is not None:
            skipped = pack.ends[before * n] - before * n
            at = torch.cat([runs[: before * n], at[before * n :] - skipped])
        found = stream.index_select(0, at).unflatten(0, (-1, n))
        if isinstance(positions, int) and positions >= max(self.plan.starts):
            return found
        patched = (positions_of >= pack.starts).view(-1, n, 1)
        return torch.where(patched, found, known[None])

    def whole(self) -> Float[Tensor, "cells*batch pos d_model"]:
        """The last stream of every cell at every position."""
        base, pack = self.base, self.pack
        rows = pack.rows(base.entering[-1], 0, len(self.cells) * base.n_examples).contiguous()
        stream = self._through(self.last, self.entered, None)[0]
        rows.view(-1, rows.shape[-1]).index_copy_(0, pack.place, stream)
        return rows

    def _sees_patterns(self) -> bool:
        """Whether the last block is patched inside attention, where there is a row for each run."""
        return self._entered_by(self.last) > self.entered and not is_packed(
            self.plan.point(self.last)
        )


def entered_by(plan: Plan, cells: Sequence[int], entered: int, layer: int) -> int:
    """Of cells in the order of their layers, how many have entered with this layer, when
    ``entered`` had with the layer before."""
    while entered < len(cells) and plan.layers[cells[entered]] == layer:
        entered += 1
    return entered


def demand_fired(handles: Sequence[LensHandle]) -> None:
    """Raise HookNeverFiredError unless all hooks fired: something was to be patched."""
    for handle in handles:
        if not handle.fired:
            raise HookNeverFiredError(f"{handle.point.name!r} never fired: nothing was patched")


def is_packed(point: HookPoint) -> bool:
    """Whether a point of a block sees runs one behind the other, and not a row for each."""
    return (point.axes or ())[:2] == ("batch", "pos")


class PackedEditor:
    """A hook that edits the runs of the cells that enter: they come last."""

    def __init__(self, runs: PackedRuns, before: int, entered: int):
        self.runs, self.before, self.entered = runs, before, entered

    def __call__(self, x: Tensor, hook: HookPoint) -> Tensor:
        runs, n = self.runs, self.runs.base.n_examples
        pack, plan, cells = runs.pack, runs.plan, runs.cells[self.before : self.entered]
        first, end = self.before * n, self.entered * n
        if not is_packed(hook):
            x[first:end] = plan.edit(x[first:end], cells, pack.first)
            return x
        n_tokens = pack.ends[end] - pack.ends[first]
        tokens = x[0, x.shape[1] - n_tokens :]
        starts = {plan.starts[cell] for cell in cells}
        if len(starts) == 1:
            rows = tokens.unflatten(0, (end - first, -1))
            edited = plan.edit(rows, cells, *starts)
            if edited is not rows:
                tokens.copy_(edited.flatten(0, 1))
            return x

        def token_of(cell: Tensor, example: Tensor, pos: Tensor) -> Tensor:
            run = first + cell * n + example
            return pack.tokens(run, pos) - pack.ends[first]

        plan.edit_packed(tokens, cells, token_of)
        return x
