"""The engine: many patched runs as one growing batch that starts where the patches do.

The base prompts run once. A cell's run enters at the block that it patches, beside those that came
in earlier; it computes the positions from the first patched one on, for what went before is in the
base run's keys and values; in the last block only the positions that the metric reads go on from
attention, and of the last stream only what it reads is unembedded. The numbers are those of one run
for each cell, up to rounding. Here is what all families have in common; where runs can be packed,
they are (`hookedlm.patching.packed`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from hookedlm.hooks import HookPoint, HookRequest, attached
from hookedlm.patching.base_run import BaseRun, Reuse, RowContexts, listened
from hookedlm.patching.memory import is_out_of_memory, most_tokens
from hookedlm.patching.packed import PackedRuns, demand_fired, entered_by
from hookedlm.patching.plans import Plan
from hookedlm.patching.readout import ReadOut

Rows = Float[Tensor, "rows ..."]
Stream = Float[Tensor, "rows pos d_model"]
Read = Callable[[ReadOut, Sequence[int]], Float[Tensor, "cells *batch"]]
"""(what a batch of cells came to, which cells) -> their numbers."""

OVERHEAD = {"cpu": 48, "cuda": 4096}
"""Positions that could be computed in the time that a call of a block costs by itself."""


@torch.no_grad()
def run_cells(
    base: BaseRun, plan: Plan, read: Read, *, batch_size: int | None = None, progress: str = ""
) -> Iterator[tuple[list[int], Tensor]]:
    """(cells, numbers) of one batch after the other. ``batch_size`` is in cells; by default as many
    as memory allows. Out of memory, it is halved. Cells that change nothing are not run. Where
    somebody's hooks are in the model, each cell has a run of its own."""
    idle = plan.settle(base.seen)
    groups, alone = grouped(base, plan, idle), listened(base.model)
    with tqdm(total=len(plan.layers), desc=progress, leave=False, disable=not progress) as bar:
        if idle:
            unpatched = read(ReadOut(base, 1, stream=base.entering[-1]), idle[:1])
            bar.update(len(idle))
            yield idle, unpatched.expand(len(idle), *unpatched.shape[1:])
        for cells in groups:
            room = most_tokens(base.model, read_all=base.reuse == Reuse.NOTHING)
            contexts = RowContexts(base)
            done, most = 0, 1 if alone else batch_size
            while done < len(cells):
                size = fitting(base, plan, cells[done:], room) if most is None else most
                some = cells[done : done + size]
                try:
                    numbers = read(_run(base, plan, some, contexts), some)
                except (torch.OutOfMemoryError, RuntimeError) as error:
                    if len(some) == 1 or not is_out_of_memory(error):
                        raise
                    most = len(some) // 2
                    continue
                done += len(some)
                bar.update(len(some))
                yield some, numbers


def fitting(base: BaseRun, plan: Plan, cells: Sequence[int], room: int) -> int:
    """How many of these cells, from the first on, have room for so many positions; one at least."""
    fits = 0
    for cell in cells:
        length = base.length
        if base.reuse == Reuse.POSITIONS:  # attention has a place for every position
            length = max(length - plan.starts[cell], length // 4)
        room -= base.n_examples * length
        if room < 0:
            break
        fits += 1
    return max(1, fits)


def _run(base: BaseRun, plan: Plan, cells: Sequence[int], contexts: RowContexts) -> ReadOut:
    if base.reuse == Reuse.POSITIONS:
        return ReadOut(base, len(cells), runs=PackedRuns(base, plan, cells))
    if base.reuse == Reuse.LAYERS:
        return ReadOut(base, len(cells), stream=_growing(base, plan, cells, contexts))
    return ReadOut(base, len(cells), logits=_whole_run(base, plan, cells))


def _growing(base: BaseRun, plan: Plan, cells: Sequence[int], contexts: RowContexts) -> Stream:
    """The last stream of cells (in the order of their layers): each enters at its own block."""
    model, n_examples = base.model, base.n_examples
    stream = base.entering[0][:0]
    entered = 0
    for layer in range(plan.layers[cells[0]], len(model.blocks)):
        before, entered = entered, entered_by(plan, cells, entered, layer)
        here = cells[before:entered]
        if here:
            new = base.rows(base.entering[layer], len(here))
            stream = torch.cat([stream, new]) if before else new
        hook = Editor(plan, here, slice(before * n_examples, entered * n_examples))
        with attached([HookRequest(plan.point(layer), hook)] if here else []) as handles:
            stream = model.blocks[layer](stream, contexts.at(layer, entered))
        demand_fired(handles)
    return stream


def _whole_run(base: BaseRun, plan: Plan, cells: Sequence[int]) -> Float[Tensor, "rows pos v"]:
    """Logits of whole runs from tokens, each cell with its patch."""
    requests, n_examples = [], base.n_examples
    for layer in sorted({plan.layers[cell] for cell in cells}):
        places = [i for i, cell in enumerate(cells) if plan.layers[cell] == layer]
        here = [cells[i] for i in places]  # neighbours: cells are sorted by layer
        rows = slice(places[0] * n_examples, (places[-1] + 1) * n_examples)
        hook = Editor(plan, here, rows)
        requests.append(HookRequest(plan.point(layer), hook))
    mask = None if base.mask is None else base.rows(base.mask, len(cells))
    with attached(requests) as handles:
        logits = base.model(base.rows(base.tokens, len(cells)), attention_mask=mask)
    demand_fired(handles)
    return logits


class Editor:
    """A hook that edits the rows of some cells, which begin at position ``start``."""

    def __init__(self, plan: Plan, cells: Sequence[int], rows: slice, start: int = 0):
        self.plan, self.cells, self.rows, self.start = plan, cells, rows, start

    def __call__(self, x: Rows, hook: HookPoint) -> Rows:
        edited = self.plan.edit(x[self.rows], self.cells, self.start)
        if edited.shape[0] == x.shape[0]:
            return edited
        x[self.rows] = edited
        return x


# Which cells are run together ---------------------------------------------------------------------


def grouped(base: BaseRun, plan: Plan, idle: Sequence[int] = ()) -> list[list[int]]:
    """Cells, in the order of their layers, that are run together; all but the idle ones.

    Attention of a group has a place for all positions from the group's first on; splitting it costs
    calls of blocks.
    """
    running = set(range(len(plan.layers))) - set(idle)
    cells = sorted(running, key=lambda cell: (plan.layers[cell], cell))
    if base.reuse < Reuse.POSITIONS:
        return [cells] if cells else []
    n_layers, length = len(base.model.blocks), base.length
    work = [0] * length
    for cell in cells:
        work[plan.starts[cell]] += (n_layers - plan.layers[cell]) * base.n_examples
    share = 0.05 + length / (6 * base.model.cfg.d_model)  # of attention in a position's work
    overhead = OVERHEAD.get(base.tokens.device.type, OVERHEAD["cuda"]) * n_layers
    bounds = [*_splits(work, 0, length, overhead / share), length]
    groups = []
    for first, end in pairwise(bounds):
        inside = [cell for cell in cells if first <= plan.starts[cell] < end]
        if inside:
            groups.append(inside)
    return groups


def _splits(work: Sequence[int], first: int, end: int, overhead: float) -> list[int]:
    """First positions of groups of the cells that start in ``[first, end)``."""
    behind = sum(work[first:end])
    best, where = overhead, None
    for middle in range(first + 1, end):
        behind -= work[middle - 1]
        saved = behind * (middle - first)
        if saved > best:
            best, where = saved, middle
    if where is None:
        return [first]
    return _splits(work, first, where, overhead) + _splits(work, where, end, overhead)
