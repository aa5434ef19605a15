"""`interchange`: parts of a base run swapped for a source run's, and what the model then says.

Sources: "Inducing Causal Structure for Interpretable Neural Networks" (arXiv 2112.00826), "Causal
Abstractions of Neural Networks" (arXiv 2106.02997); names of units: pyvene (arXiv 2403.07809).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hookedlm.errors import InputError
from hookedlm.interventions.sources import recorded
from hookedlm.model import HookedTransformer
from hookedlm.patching.base_run import BaseRun, Reuse, run_base
from hookedlm.patching.choices import Axis, chosen, is_all
from hookedlm.patching.ends import Prompt, Prompts
from hookedlm.patching.engine import run_cells
from hookedlm.patching.grid import Layout, laid_out
from hookedlm.patching.interchanged import InterchangeResult, Said
from hookedlm.patching.metric import wide
from hookedlm.patching.pairs import (
    Answers,
    Masks,
    Pair,
    Positions,
    answers_of,
    positions_of,
    read_pair,
    read_position,
)
from hookedlm.patching.plans import SitePlan, from_source
from hookedlm.patching.readout import ReadOut
from hookedlm.patching.units import Unit, full_name, layers_with, unit_of, why_not


def interchange(
    model: HookedTransformer,
    base: Prompts,
    source: Prompts,
    *,
    unit: str,
    layers: Any,
    heads: Any = None,
    positions: Any = "all",
    tokens: Any,
    read_at: Any = "last",
    attention_mask: Masks = None,
    prepend_bos: bool | None = None,
    batch_size: int | None = None,
    progress: bool = True,
) -> InterchangeResult:
    """Probability and logit of ``tokens`` with one unit after the other taken from ``source``:
    every layer x head x position of those that are given.

    ``base``, ``source``: a prompt, several, or tokens; one row serves all of the other. Their
    lengths may differ where ``positions`` says what belongs together. ``unit``: a name of
    `hookedlm.patching.UNITS`. ``layers``: "all" (that have it), an int, a slice or several.
    ``heads``: the same; key/value heads where the unit has these. None: each for units that are
    called ``head_...``, else all at once.

    ``positions``: "all" (one after the other), None (all at once), "last" (of each prompt, padding
    aside), columns of the batch (an int, a slice, several), for each example its own (``[batch]``
    or ``[batch, n]``), or several of these by name. A tuple of two: (of the base, of the source).

    ``tokens``: a token (text or id) or several; by name, each one or one for each example; or ids
    ``[batch, n]``. They are read at the position ``read_at`` of the base, the last by default.
    ``attention_mask``: of tokens that are padded. ``batch_size``: runs at once, by default what
    memory has room for. The source is run without hooks, permanent ones excepted; hooks in the
    model stay in otherwise. Ctrl-C returns what is done.

    Raises InputError and HookNameError, before anything is patched, on what the model or the
    prompts do not have.
    """
    if batch_size is not None and batch_size < 1:
        raise InputError(f"batch_size={batch_size}: expected at least 1")
    pair = read_pair(model, base, source, attention_mask, prepend_bos)
    places = positions_of(pair, positions)
    kind = unit_of(unit)
    grid: dict[str, Any] = {"name": kind.hook, "layer": chosen_layers(model, unit, layers)}
    if (picked := _heads(unit, kind, heads)) is not None:
        grid["head"] = picked
    if places is not None:
        grid["pos"] = places.named()
    layout = laid_out(model, grid, pair.base.tokens, pair.base.mask)
    answers = answers_of(model, tokens, len(pair))
    read = Reader(_read_at(pair.base, read_at), answers.ids.to(model.device))
    with torch.no_grad():
        swapping = Swapping(model, pair, layout, places, read, batch_size, progress * unit)
        found = swapping.run()
        ends = _said(model, pair.base, read), _said(model, pair.source, read.at_end(pair.source))
    return _result(model, unit, pair, layout, places, answers, (found, *ends))


def chosen_layers(model: HookedTransformer, unit: str, layers: Any) -> list[int]:
    """What ``layers=`` means; raises InputError or HookNameError where a layer lacks the unit."""
    kind = unit_of(unit)
    if is_all(layers):
        layers = layers_with(model, unit) or [0]  # where select says what is missing
    listed = [int(layer) for layer in chosen("layer", layers, len(model.blocks), 1).labels]
    for layer in listed:
        model.select([full_name(kind.hook, layer)])  # which says what is missing
        if why := why_not(model, unit, layer):
            raise InputError(why)
    return listed


def _heads(unit: str, kind: Unit, heads: Any) -> Any:
    if heads is None:
        return True if kind.each_head else None
    if not kind.has_heads:
        raise InputError(f"heads={heads!r}: {unit} has none ({kind.axes})")
    return heads


def _read_at(prompt: Prompt, choice: Any) -> int | Int[Tensor, "batch"]:
    """One number where it is the same in all examples."""
    at = read_position(prompt, choice)
    first = int(at[0])
    return first if bool((at == first).all()) else at.to(prompt.tokens.device)


@dataclass
class Reader:
    """Logits and log-probabilities of tokens at a position, for the engine."""

    at: int | Int[Tensor, "batch"]
    ids: Int[Tensor, "batch n"]

    def at_end(self, prompt: Prompt) -> Reader:
        """The same tokens at the end of other prompts."""
        return Reader(_read_at(prompt, "last"), self.ids)

    def __call__(self, out: ReadOut, cells: Sequence[int]) -> Float[Tensor, "cells batch n 2"]:
        """Computed for as many cells at a time as the vocabulary allows."""
        step = out.cells_at_once
        return torch.cat([self._of(out, slice(i, i + step)) for i in range(0, out.n_cells, step)])

    def _of(self, out: ReadOut, cells: slice) -> Float[Tensor, "cells batch n 2"]:
        logits = wide(out.logits_at(self.at, cells=cells))
        picked = logits.gather(-1, self.ids.expand(len(logits), -1, -1))
        return torch.stack([picked, picked - logits.logsumexp(-1, keepdim=True)], dim=-1)


@dataclass
class Swapping:
    """An interchange whose arguments were found good."""

    model: HookedTransformer
    pair: Pair
    layout: Layout
    places: Positions | None
    read: Reader
    batch_size: int | None
    told: str

    def run(self) -> Float[Tensor, "cells batch n 2"]:
        """Every cell; those that an interruption left out are NaN."""
        points = self.layout.all_points()
        base = run_base(self.model, self.pair.base.tokens, self.pair.base.mask, points)
        plan, done = self._plan(), []
        options: dict[str, Any] = {"batch_size": self.batch_size, "progress": self.told}
        try:
            for cells, numbers in run_cells(base, plan, self.read, **options):
                done.append((cells, numbers))
        except KeyboardInterrupt:
            if not done:
                raise
        shape = (len(plan.layers), *self.read.ids.shape, 2)
        flat = torch.full(shape, torch.nan, dtype=done[0][1].dtype)
        for cells, numbers in done:
            flat[cells] = numbers.cpu()
        return flat

    def _plan(self) -> SitePlan:
        layout, device = self.layout, self.pair.base.tokens.device
        points, source = layout.points[0], self.pair.source
        names = [point.name or "" for point in points.values()]
        found = recorded(self.model, names, source.tokens, attention_mask=source.mask)
        there = None
        if self.places is not None:
            axis = Axis("pos", self.places.labels, self.places.source)
            moved = replace(layout, axes=layout.axes | {"pos": axis})
            there = moved.sites(0, device)
        return SitePlan(
            layout.sites(0, device),
            from_source,
            {layer: found[point.name or ""] for layer, point in points.items()},
            len(self.pair),
            there,
        )


def _said(model: HookedTransformer, prompt: Prompt, read: Reader) -> Float[Tensor, "batch n 2"]:
    """What an unpatched run says."""
    run = run_base(model, prompt.tokens, prompt.mask)
    if run.reuse:
        return read(ReadOut(run, 1, stream=run.entering[-1]), [0])[0].cpu()
    run = BaseRun(model, prompt.tokens, prompt.mask, Reuse.NOTHING)
    logits = model(prompt.tokens, attention_mask=prompt.mask)
    return read(ReadOut(run, 1, logits=logits), [0])[0].cpu()


def _result(
    model: HookedTransformer,
    unit: str,
    pair: Pair,
    layout: Layout,
    places: Positions | None,
    answers: Answers,
    found: tuple[Tensor, Tensor, Tensor],
) -> InterchangeResult:
    head = layout.axes.get("head")
    shape = [len(layout.axes["layer"]), len(head or [0]), 1 if places is None else len(places.base)]
    cells, base, source = (x.cpu() for x in found)
    text = None
    if model.tokenizer is not None:
        text = [[str(piece) for piece in model.to_str_tokens(row)] for row in pair.base.tokens]
    told = [
        [model.to_single_str_token(int(i)) if text is not None else str(int(i)) for i in row]
        for row in answers.ids
    ]
    return InterchangeResult(
        unit=unit,
        layers=[int(layer) for layer in layout.axes["layer"].labels],
        heads=None if head is None else [int(label) for label in head.labels],
        positions=places,
        values=Said(cells.reshape(*shape, *cells.shape[1:])),
        base=Said(base),
        source=Said(source),
        tokens=told,
        names=answers.names,
        text=text,
        real=None if pair.base.mask is None else pair.base.mask.cpu() > 0,
    )
