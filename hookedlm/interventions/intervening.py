"""`InterveneMethods`: a model run with interventions in."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor

from hookedlm.errors import HookNeverFiredError, InputError
from hookedlm.hooks import HookRequest
from hookedlm.interventions.edit import Edit
from hookedlm.interventions.intervention import Intervention
from hookedlm.interventions.sizes import sizes_of
from hookedlm.interventions.sources import (
    IN_SOURCE_RUN,
    Supply,
    recorded,
    run_for,
    run_needed,
)
from hookedlm.interventions.what import short

if TYPE_CHECKING:
    from hookedlm.model import HookedTransformer


class InterveneMethods:
    """`intervene` and `intervening`."""

    def intervene(
        self: HookedTransformer,
        input: Any,
        interventions: Intervention | Sequence[Intervention],
        **kwargs: Any,
    ) -> Any:
        """What `forward` returns of ``input`` and ``kwargs``, with interventions made.

        Everything is checked before the run: raises HookNameError on an unknown hook; InputError on
        a layer, head, neuron, dimension or position that is not there (with those that are), on one
        that an activation has no axis for, and on sources and vectors of another shape.
        """
        reading = {name: kwargs[name] for name in ("prepend_bos", "padding_side") if name in kwargs}
        with _installed(self, interventions, True, **reading):
            return self(input, **kwargs)

    @contextmanager
    def intervening(
        self: HookedTransformer, interventions: Intervention | Sequence[Intervention]
    ) -> Iterator[HookedTransformer]:
        """Within the context every run has the interventions in: `forward`, `run_with_cache` (which
        records what they made), `generate`. Nests; on exit exactly these are out again.

        Runs of other prompts that interventions need are made on entry, without other hooks than
        permanent ones. Raises as `intervene` does, on entry or before a run; and on exit
        HookNeverFiredError for positions that no run had.
        """
        with _installed(self, interventions, False):
            yield self


@contextmanager
def _installed(
    model: HookedTransformer,
    interventions: Intervention | Sequence[Intervention],
    last: bool,
    **reading: Any,
) -> Iterator[None]:
    listed = [interventions] if isinstance(interventions, Intervention) else list(interventions)
    for each in listed:
        if not isinstance(each, Intervention):
            raise InputError(f"{short(each)}: expected an Intervention, or a list of them")
    running = Running(model, edits_of(model, listed, **reading), last)
    requests = [HookRequest(edit.point, edit) for edit in running.edits]
    names = {edit.point.name or "" for edit in running.edits}
    handles = [model.register_forward_pre_hook(running.before, with_kwargs=True)]
    if running.clean:
        handles.append(model.register_forward_hook(running.after))
    try:
        with model.listening(requests, names):
            yield
            running.check_reached()
    finally:
        for handle in handles:
            handle.remove()


def edits_of(
    model: HookedTransformer, interventions: Sequence[Intervention], **reading: Any
) -> list[Edit]:
    """Interventions at their hook points, checked as far as is possible without a run, with all
    that they need of other runs (each run made once; ``reading``: how texts become tokens).

    Raises HookNameError and InputError as `intervene` does.
    """
    placed = [(each, point) for each in interventions for point in each.points(model)]
    edits = [
        Edit(each, point, each.where(point), sizes_of(model, point), Supply(each.what, point))
        for each, point in placed
    ]
    for edit in edits:
        edit.check(None, 0, None, last=False)
    runs: dict[Hashable, list[Edit]] = {}
    for edit in edits:
        if (key := run_needed(edit.intervention.what)) is not None:
            runs.setdefault(key, []).append(edit)
    for same in runs.values():
        names = list(dict.fromkeys(edit.point.name or "" for edit in same))
        found = run_for(model, same[0].intervention.what, names, **reading)
        for edit in same:
            edit.supply.found = found[edit.point.name or ""]
    return edits


class Running:
    """What interventions must know of each run: checked, and run without them first if need be."""

    def __init__(self, model: HookedTransformer, edits: Sequence[Edit], last: bool):
        self.model, self.edits, self.last = model, edits, last
        self.signature = inspect.signature(model.forward)
        self.longest = 0
        self.clean = [edit for edit in edits if edit.supply.of_same_run]
        self.cache: Any = None
        self.own_cache: Any = None
        self.kept: list[Tensor | None] = []

    def before(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Called before each forward pass with its arguments."""
        if IN_SOURCE_RUN.get():
            return
        call = self.signature.bind(*args, **kwargs)
        given = call.arguments | call.arguments.get("others", {})
        rows, n = self._shape(given)
        past = given.get("past_kv_cache")
        offset = self.model.get_pos_offset(past, rows)
        for edit in self.edits:
            edit.check(rows, offset, n, self.last, self.model.device)
        self.longest = max(self.longest, offset + n)
        if self.clean:
            call.arguments["past_kv_cache"] = self._beside(past, offset)
            names = {edit.point.name or "" for edit in self.clean}
            found = recorded(self.model, names, *call.args, **call.kwargs)
            for edit in self.clean:
                edit.supply.start, edit.supply.now = offset, found[edit.point.name or ""]

    def after(self, *_: Any) -> None:
        """Called after each forward pass."""
        if not IN_SOURCE_RUN.get():
            self.kept = _keys(self.cache)

    def _shape(self, given: dict[str, Any]) -> tuple[int, int]:
        x = given.get("inputs_embeds")
        x = given.get("input") if x is None else x
        if not isinstance(x, Tensor):
            options = (given.get("prepend_bos"), given.get("padding_side"))
            x, _, _ = self.model._read_input(x, *options, None, None, None)
            assert x is not None
        return (1, len(x)) if x.ndim == 1 else (x.shape[0], x.shape[1])

    def check_reached(self) -> None:
        """Raise HookNeverFiredError if a position was behind the end of every run."""
        if not self.longest:
            return
        for edit in self.edits:
            for a in edit.where.alongs:
                if a.dim != edit.where.grows or isinstance(a.index, slice):
                    continue
                if (far := int(a.index.max())) >= self.longest:
                    raise HookNeverFiredError(
                        f"{edit.intervention!r}: no run reached position {far}; the longest had "
                        f"positions 0 to {self.longest - 1}"
                    )

    def _beside(self, past: Any, offset: int) -> Any:
        """The key-value cache of the run without interventions that goes beside this one."""
        if past is None:
            return None
        if self.cache is not past or not offset:
            self.cache, self.own_cache = past, copy.deepcopy(past, _detached(past))
        elif [id(x) for x in self.kept] != [id(x) for x in _keys(past)]:
            raise InputError(
                "the key-value cache was changed between two runs (beam search does so): what "
                "is the same run without interventions is then unknown; use_past_kv_cache=False"
            )
        return self.own_cache


def _layers(cache: Any) -> list[dict[str, Any]]:
    """What each layer of a transformers ``Cache`` holds."""
    return [] if cache is None else [vars(layer) for layer in vars(cache).get("layers", ())]


def _keys(cache: Any) -> list[Tensor | None]:
    """The keys of each layer: a cache replaces them whenever they change."""
    return [held.get("keys") for held in _layers(cache)]


def _detached(cache: Any) -> dict[int, Any]:
    """Copies of a cache's tensors, for deepcopy, which refuses those that gradients lead to."""
    tensors = [x for held in _layers(cache) for x in held.values() if isinstance(x, Tensor)]
    return {id(x): x.detach().clone() for x in tensors}
