"""What a sweep puts in an activation's place, when that is an intervention of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hookedlm.errors import HookReturnError, InputError
from hookedlm.interventions import Freeze, Intervention, Mean, Noise, Patch, Resample, What
from hookedlm.interventions.edit import Edit
from hookedlm.interventions.sources import Supply, check_fits, recorded, run_for, run_needed
from hookedlm.patching.choices import Axis
from hookedlm.patching.grid import Layout
from hookedlm.patching.plans import New

if TYPE_CHECKING:
    from hookedlm.model import HookedTransformer

FIELDS = {"pos": "position", "head": "head", "neuron": "neuron", "expert": "expert"}
"""Axis of a grid -> field of an intervention. Others go through the last axis of an activation."""


def own_source(what: What) -> bool:
    """Whether it brings its own source, if it needs one."""
    return isinstance(what, (Patch, Freeze, Mean, Resample, Noise))


def check_what(
    model: HookedTransformer, what: What | None, layout: Layout, n_examples: int, length: int
) -> None:
    """Raise InputError on vectors and directions that do not fit the parts that are swept."""
    if what is None:
        return
    if not isinstance(what, What):
        raise InputError(f"what={what!r}: expected an intervention's kind, for instance Zero()")
    if isinstance(what, Patch) and what.position is not None:
        raise InputError("what=Patch(position=...): positions are those of the grid")
    given: dict[str, Any] = {FIELDS.get(axis.name, "dims"): 0 for axis in layout.inside}
    for point in layout.all_points():
        name = point.name or ""
        one = Intervention(name, what, **given)
        edit = Edit(one, point, one.where(point), layout.sizes[name], Supply(what, point))
        edit.check(n_examples, 0, length, last=True, device=model.device)


def putting(what: What, axes: Sequence[str], picked: Mapping[str, Axis]) -> New:
    """``what`` for parts ``[cells, batch, ...]``, in which axes that cells point at have length 1:
    it gets them as `Intervention` would hand them over, where an index takes its axis away."""
    inner = list(axes[1:])
    gone = [2 + i for i, axis in enumerate(inner[:-1]) if axis in picked]

    def new(part: Tensor, source: Tensor | None) -> Tensor:
        x = part.squeeze(gone)
        made = what.of(x, None if source is None else source.squeeze(gone))
        if made.shape != x.shape:
            raise HookReturnError(
                f"{what!r} made {list(made.shape)} of {list(x.shape)}: What.of must keep the shape"
            )
        for dim in gone:
            made = made.unsqueeze(dim)
        return made

    return new


def own_activations(
    model: HookedTransformer,
    what: What | None,
    layout: Layout,
    tokens: Int[Tensor, "batch pos"],
    mask: Int[Tensor, "batch pos"] | None,
) -> dict[str, Float[Tensor, "batch ..."]] | None:
    """What ``what`` takes from runs of its own, by hook point; None if that is nothing.

    Raises InputError on what has not the shape of the base run's activations.
    """
    if what is None or not what.needs_source:
        return None
    points = layout.all_points()
    names = [point.name or "" for point in points]
    found: Mapping[str, Tensor] = {}
    if run_needed(what) is not None:
        found = run_for(model, what, names)
    elif not isinstance(what, Noise):  # of the base run itself
        found = recorded(model, names, tokens, attention_mask=mask)
    supplied = {}
    for point, name in zip(points, names, strict=True):
        supply = Supply(what, point, found.get(name))
        supply.now = found.get(name)
        like = torch.empty((), device=model.device).expand(layout.lengths(name))
        source = supply(like, 0)
        assert source is not None
        check_fits(list(source.x.shape), layout.lengths(name), point.axes or ())
        supplied[name] = source.x
    return supplied
