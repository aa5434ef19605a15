"""`sweep`: a grid of patches, and of every patched run a metric.

The base prompts run once; patched runs start where their patch does and share what they have in
common (`hookedlm.patching.engine`). The numbers are those of one run after the other.
Source: "Locating and Editing Factual Associations in GPT" (arXiv 2202.05262); for denoising and
noising "How to use and interpret activation patching" (arXiv 2404.15255).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hookedlm.errors import InputError
from hookedlm.interventions import What
from hookedlm.interventions.from_runs import Run
from hookedlm.interventions.sources import check_fits, of_run
from hookedlm.lent import loop_of
from hookedlm.model import HookedTransformer
from hookedlm.patching.base_run import BaseRun, Reuse, listened, run_base
from hookedlm.patching.choices import Choice, Label
from hookedlm.patching.ends import Ends, Prompt, Prompts, check_source, read_ends
from hookedlm.patching.engine import run_cells
from hookedlm.patching.grid import Layout, laid_out
from hookedlm.patching.metric import Function, Metric, name_of, reader
from hookedlm.patching.plans import New, SitePlan, from_source
from hookedlm.patching.readout import ReadOut
from hookedlm.patching.result import SweepResult
from hookedlm.patching.supplied import check_what, own_activations, putting

Direction: TypeAlias = Literal["denoise", "noise", "both"]
Activations: TypeAlias = Mapping[str, Float[Tensor, "batch ..."]]

DIRECTIONS: dict[str, tuple[str, ...]] = {
    "denoise": ("denoise",),
    "noise": ("noise",),
    "both": ("denoise", "noise"),
}


def sweep(
    model: HookedTransformer,
    base: Prompts,
    grid: Mapping[str, Choice],
    metric: Metric | Function,
    source: Run | None = None,
    *,
    what: What | None = None,
    direction: Direction = "denoise",
    attention_mask: Int[Tensor, "batch pos"] | None = None,
    prepend_bos: bool | None = None,
    batch_size: int | None = None,
    progress: bool = True,
) -> SweepResult:
    """The metric with each cell of a grid patched: activation patching from ``source`` into
    ``base``, or (``what``) any intervention.

    ``base``: a prompt, several, or tokens. ``source``: the same of equal length, whose activations
    are put in; one row serves all. Or an `ActivationCache` (or dictionary) of such a run.
    ``direction``: "denoise" patches source (the clean run) into base (the corrupted one), "noise"
    base into source, "both" does both, as a first axis. ``what``, in place of a source: ``Zero()``,
    ``Mean(dataset)``, ... of the base run. ``attention_mask``: of tokens that are padded.

    ``grid``: axis -> what to go through. What no axis goes through is patched all at once.

    | axis | is |
    | --- | --- |
    | name | activations in shorthand ("resid_pre", "z", "ln1.hook_scale"), or full names |
    | layer | block; ``True``: every one that has the activations |
    | pos, key_pos | column of the batch, padding included; ``key_pos`` in patterns and scores |
    | head, neuron, expert | head (key/value head where the activation has these), ... |
    | dim | dimension of the last axis |
    | example | the metric of each example, not of the batch |

    Each is ``True`` (all), one index (the result then has no such axis), a slice or several.
    ``pos`` may be for each example its own, ``[batch]`` or ``[batch, n]``, or a dictionary of such.

    ``metric``: a `Metric`, or a function of one run's logits ``[batch, pos, d_vocab]``.
    ``batch_size``: runs at once, by default what memory has room for; out of memory, fewer are.
    Ctrl-C returns what is done. Hooks in the model stay in; each cell then has a run of its own.
    Without gradients.

    Raises InputError and HookNameError before anything is patched on what does not fit the model or
    the prompts, with what would.
    """
    if direction not in DIRECTIONS:
        raise InputError(f"direction={direction!r}: expected one of {', '.join(DIRECTIONS)}")
    if batch_size is not None and batch_size < 1:
        raise InputError(f"batch_size={batch_size}: expected at least 1")
    ends = read_ends(model, base, source, attention_mask, prepend_bos)
    check_source(ends, what, direction)
    layout = laid_out(model, grid, ends.base.tokens, ends.base.mask)
    n_examples, length = ends.base.tokens.shape
    check_what(model, what, layout, n_examples, length)
    if isinstance(metric, Metric):
        metric.check(n_examples, length, model.cfg.d_vocab, ends.base.mask)
    with torch.no_grad():
        return Sweeping(model, ends, layout, metric, what, batch_size, progress).run(direction)


@dataclass
class Sweeping:
    """A sweep whose arguments were found good."""

    model: HookedTransformer
    ends: Ends
    layout: Layout
    metric: Metric | Function
    what: What | None
    batch_size: int | None
    progress: bool
    found: list[tuple[int, int, list[int], Tensor]] = field(default_factory=list)
    """(direction, name, cells, their numbers), in the order in which they were done."""

    def run(self, direction: Direction) -> SweepResult:
        """All of it, or what was done when somebody interrupted."""
        values: dict[str, Tensor | None] = {"clean": None, "corrupted": None}
        complete = True
        directions = DIRECTIONS[direction] if self.ends.source is not None else ("noise",)
        try:
            for number, each in enumerate(directions):
                base, source = self._sides(each)
                points = self.layout.all_points()
                run = run_base(self.model, base.tokens, base.mask, points)
                here, there = ("clean", "corrupted") if each == "noise" else ("corrupted", "clean")
                values[here] = self._unpatched(run)
                activations, values[there] = self._source(source, values[there])
                self._patch(number, run, activations)
        except KeyboardInterrupt:
            if not self.found:
                raise
            complete = False
        return self._result(directions, values, complete)

    def _sides(self, direction: str) -> tuple[Prompt, Any]:
        """The run that is patched, and what with."""
        base, source = self.ends.base, self.ends.source
        if direction == "denoise" or source is None:
            return base, source
        assert isinstance(source, Prompt)
        return source.rows(len(base.tokens)), base

    def _patch(self, direction: int, base: BaseRun, activations: Activations | None) -> None:
        """Every cell of one direction."""
        read = reader(self.metric, self.model.device, self._each_example)
        for number, points in enumerate(self.layout.points):
            source = None
            if activations is not None:
                source = {layer: activations[point.name or ""] for layer, point in points.items()}
            new: New = from_source
            if self.what is not None:
                axes = next(iter(points.values())).axes or ()
                new = putting(self.what, axes, self.layout.picked(number))
            sites = self.layout.sites(number, base.tokens.device)
            plan = SitePlan(sites, new, source, base.n_examples)
            named = next(iter(points.values())).name or ""
            told = f"patching {named.rsplit('.', 1)[-1].removeprefix('hook_')}"
            for cells, numbers in run_cells(
                base, plan, read, batch_size=self.batch_size, progress=told * self.progress
            ):
                self.found.append((direction, number, cells, numbers))

    # Unpatched runs -------------------------------------------------------------------------------

    @property
    def _each_example(self) -> bool:
        return "example" in self.layout.axes

    def _unpatched(self, run: BaseRun) -> Tensor:
        """The metric of the base run."""
        if run.reuse:
            return self._read(run, stream=run.entering[-1])
        logits = self.model(run.tokens, attention_mask=run.mask)
        return self._read(run, logits=logits)

    def _read(self, run: BaseRun, **found: Any) -> Tensor:
        read = reader(self.metric, self.model.device, self._each_example)
        return read(ReadOut(run, 1, **found), [0])[0]

    def _source(
        self, source: Any, known: Tensor | None
    ) -> tuple[dict[str, Tensor] | None, Tensor | None]:
        """What patches take their values from, and the metric of that run, if there is one."""
        model, base, points = self.model, self.ends.base, self.layout.all_points()
        if source is None:
            return own_activations(model, self.what, self.layout, base.tokens, base.mask), known
        names = [point.name or "" for point in points]
        value: Tensor | None
        if isinstance(source, Prompt):
            found, value = self._source_run(source, names)
        else:
            found, value = of_run(model, source, names), self._told_by(source)
        for point, name in zip(points, names, strict=True):
            sizes = self.layout.sizes[name]
            found[name] = x = found[name].to(model.device)
            check_fits(list(x.shape), sizes, point.axes or (), f"the source's {name}")
            found[name] = x.expand(-1, *self.layout.lengths(name)[1:])
        return found, value

    def _source_run(self, source: Prompt, names: Sequence[str]) -> tuple[dict[str, Tensor], Tensor]:
        """One run: the activations that are needed, and the metric."""
        model = self.model
        options: dict[str, Any] = {"names_filter": names, "return_cache_object": False}
        options["attention_mask"] = source.mask
        whole = source.rows(len(self.ends.base.tokens))
        run = BaseRun(model, whole.tokens, whole.mask, Reuse.NOTHING)
        if listened(model) or loop_of(model) is not None or model.unembed is None:
            logits, found = model.run_with_cache(source.tokens, **options)
            return found, self._read(run, logits=logits.expand(run.n_examples, -1, -1))
        n = len(model.blocks)
        stream, found = model.run_with_cache(source.tokens, stop_at_layer=n, **options)
        run.entering = [stream.expand(run.n_examples, *stream.shape[1:])]
        return found, self._read(run, stream=run.entering[-1])

    def _told_by(self, cache: Any) -> Tensor | None:
        """The metric of a recorded run, if the stream it ended with is there."""
        model, base = self.model, self.ends.base
        name = f"blocks.{len(model.blocks) - 1}.hook_resid_post"
        if name not in cache or loop_of(model) is not None or model.unembed is None:
            return None
        stream = of_run(model, cache, [name])[name].to(model.device)
        run = BaseRun(model, base.tokens, base.mask, Reuse.NOTHING)
        if stream.shape[1:2] != base.tokens.shape[1:] or len(stream) not in (1, run.n_examples):
            return None
        run.entering = [stream.expand(run.n_examples, *stream.shape[1:])]
        return self._read(run, stream=run.entering[-1])

    # What came of it ------------------------------------------------------------------------------

    def _result(
        self, directions: Sequence[str], ends: Mapping[str, Tensor | None], complete: bool
    ) -> SweepResult:
        layout, n_examples = self.layout, len(self.ends.base.tokens)
        shape = [len(directions), *layout.shape]
        each = [n_examples] if self._each_example else []
        dtype = self.found[0][-1].dtype if self.found else torch.float32
        flat = torch.full([*shape[:2], math.prod(shape[2:]), *each], math.nan, dtype=dtype)
        for direction, name, cells, numbers in self.found:
            flat[direction, name, cells] = numbers.cpu()
        values = flat.reshape([*shape, *each])
        # As they are laid out, and as the grid has them.
        inside = [axis.name for axis in layout.inside]
        order = ["direction", "name", "layer", *inside, *(["example"] if each else [])]
        known = {name: value.cpu() for name, value in ends.items() if value is not None}
        if each:
            chosen = layout.axes["example"].places
            values = values.index_select(-1, chosen)
            known = {name: value[chosen] for name, value in known.items()}
            if layout.axes["example"].single:
                known = {name: value[0] for name, value in known.items()}
        kept = [axis for axis in layout.axes.values() if not axis.single]
        named = [axis.name for axis in kept]
        axes: dict[str, list[Label]] = {axis.name: list(axis.labels) for axis in kept}
        fixed = layout.fixed
        if self.ends.source is not None:
            if len(directions) > 1:
                named, axes = ["direction", *named], {"direction": [*directions], **axes}
            else:
                fixed = fixed | {"direction": directions[0]}
        dims = [order.index(name) for name in named]
        gone = [dim for dim in range(values.ndim) if dim not in dims]
        values = values.permute(*dims, *gone).reshape([len(labels) for labels in axes.values()])
        return SweepResult(
            values=values.contiguous(),
            axes=axes,
            metric=name_of(self.metric),
            clean=known.get("clean"),
            corrupted=known.get("corrupted"),
            fixed=fixed,
            tokens=self.ends.text,
            complete=complete,
        )
