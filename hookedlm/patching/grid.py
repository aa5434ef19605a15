"""Grids: the activations, layers, positions, heads, ... that a sweep goes through, laid out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Int
from torch import Tensor

from hookedlm.errors import InputError
from hookedlm.hooks import HookPoint, HookRequest
from hookedlm.interventions.sizes import sizes_of
from hookedlm.interventions.sources import source_run
from hookedlm.names import get_act_name
from hookedlm.patching.choices import CALLED, Axis, Choice, Label, chosen, is_all
from hookedlm.patching.sites import Sites

if TYPE_CHECKING:
    from hookedlm.model import HookedTransformer

INSIDE: dict[str, tuple[str, ...]] = {
    "pos": ("pos",),
    "key_pos": ("key_pos",),
    "head": ("head", "kv_head"),
    "neuron": ("d_mlp",),
    "expert": ("expert",),
    "dim": (),
}
"""What a grid may go through within an activation: the axes of the activation that it may mean, the
first that is there. ``dim``: the last one."""
ALIASES = {
    "activation": "name",
    "position": "pos",
    "dest_pos": "pos",
    "src_pos": "key_pos",
    "head_index": "head",
}
KNOWN = ("name", "layer", *INSIDE, "example")


@dataclass
class Layout:
    """A grid for one model and prompts of one shape. Cells of an activation are numbered over
    layers and then over ``inside``, the last axis running fastest."""

    axes: dict[str, Axis]
    """In the order of the grid, ``name`` and ``layer`` among them."""
    points: list[dict[int, HookPoint]]
    """Of each name: layer -> where it is."""
    sizes: dict[str, list[int | None]]
    """Of each hook point: the lengths of its axes."""

    @property
    def fixed(self) -> dict[str, Label]:
        """What one index or name was given for."""
        return {axis.name: axis.labels[0] for axis in self.axes.values() if axis.single}

    def lengths(self, name: str) -> list[int]:
        """The shape of the activation at a hook point."""
        return [size for size in self.sizes[name] if size is not None]

    @property
    def inside(self) -> list[Axis]:
        """The axes within an activation."""
        return [axis for axis in self.axes.values() if axis.name in INSIDE]

    def layers(self, name: int) -> list[int]:
        """The layers of the activation with this number."""
        return list(self.points[name])

    @property
    def shape(self) -> list[int]:
        """Names, layers, and the axes within an activation."""
        return [len(self.points), len(self.points[0]), *map(len, self.inside)]

    def all_points(self) -> list[HookPoint]:
        """Every hook point that is patched, once."""
        found = {point.name: point for points in self.points for point in points.values()}
        return list(found.values())

    def picked(self, name: int) -> dict[str, Axis]:
        """By axis of the activation with this number: what goes through it."""
        axes = next(iter(self.points[name].values())).axes or ()
        return {_axis_of(axis.name, axes): axis for axis in self.inside}

    def sites(self, name: int, device: torch.device) -> Sites:
        """The cells of an activation."""
        layers, inside = self.layers(name), self.inside
        numbers = torch.cartesian_prod(*map(torch.arange, (1, len(layers), *map(len, inside))))
        picked = self.picked(name)
        index = {
            axis: it.places[numbers[:, 2 + inside.index(it)]].to(device)
            for axis, it in picked.items()
        }
        return Sites(self.points[name], [layers[i] for i in numbers[:, 1].tolist()], index)


def laid_out(
    model: HookedTransformer,
    grid: Mapping[str, Choice],
    tokens: Int[Tensor, "batch pos"],
    mask: Int[Tensor, "batch pos"] | None,
) -> Layout:
    """The layout of a grid. Raises InputError on axes and indices that are not there, with those
    that are, and HookNameError on an activation that is not."""
    given = _checked(grid)
    names = _names(given["name"])
    axes = {"name": Axis("name", tuple(names), torch.arange(len(names)), given["name"] == names[0])}
    points, layer_axis = _points(model, names, given)
    if layer_axis is not None:
        axes["layer"] = layer_axis
    _check_alike(points)
    wanted = [name for name in given if name in INSIDE]
    sizes = _sizes(model, points, wanted, tokens, mask)
    n_examples = len(tokens)
    for name in wanted:
        axes[name] = chosen(name, given[name], _length(name, points, sizes), n_examples)
    if "example" in given:
        axes["example"] = chosen("example", given["example"], n_examples, n_examples)
    axes = {name: axes[name] for name in given if name in axes}
    return Layout(axes, points, sizes)


def _checked(grid: Mapping[str, Choice]) -> dict[str, Choice]:
    """With the names of axes as they are here."""
    if not isinstance(grid, Mapping):
        raise InputError(
            f"the grid is {type(grid).__name__}: expected a dictionary such as "
            '{"name": "resid_pre", "layer": True, "pos": True}'
        )
    given: dict[str, Choice] = {}
    for key, choice in grid.items():
        name = ALIASES.get(key, key)
        if name not in KNOWN:
            raise InputError(f"no axis {key!r}: a grid may have {', '.join(KNOWN)}")
        if name in given:
            raise InputError(f"{name!r} stands twice in the grid")
        if choice is not None:
            given[name] = choice
    if "name" not in given:
        raise InputError('the grid names no activation: {"name": "resid_pre", ...}')
    return given


def _names(given: Any) -> list[str]:
    names = [given] if isinstance(given, str) else list(given)
    if not names or not all(isinstance(name, str) for name in names):
        raise InputError(f"name={given!r}: expected an activation's name, or several")
    if len(set(names)) < len(names):
        raise InputError(f"name={names}: one stands there twice")
    if patterns := [name for name in names if any(char in name for char in "*?[")]:
        raise InputError(f"name={patterns[0]!r}: write the names out, a sweep takes no patterns")
    return names


def _points(
    model: HookedTransformer, names: Sequence[str], given: Mapping[str, Choice]
) -> tuple[list[dict[int, HookPoint]], Axis | None]:
    if "layer" not in given:
        return [_point_by_full_name(model, name) for name in names], None
    if full := [name for name in names if name.startswith("blocks.")]:
        raise InputError(f"{full[0]!r} is a full name: give no layer beside it")
    n, choice = model.cfg.n_layers, given["layer"]
    if is_all(choice):
        has = [
            layer
            for layer in range(n)
            if all(_full_name(name, layer) in model.hook_dict for name in names)
        ]
        choice = has or [0]  # where select says what is missing
    axis = chosen("layer", choice, n, 1)
    found: list[dict[int, HookPoint]] = []
    for name in names:
        layers = [int(layer) for layer in axis.labels]
        found.append({layer: model.select([_full_name(name, layer)])[0] for layer in layers})
    return found, axis


def _full_name(name: str, layer: int) -> str:
    return f"blocks.{layer}.{name}" if "." in name else get_act_name(name, layer)


def _point_by_full_name(model: HookedTransformer, name: str) -> dict[int, HookPoint]:
    full = get_act_name(name)
    if full not in model.hook_dict and full.rsplit(".", 1)[-1] in {
        other.rsplit(".", 1)[-1] for other in model.hook_dict
    }:
        raise InputError(
            f'{name!r} is there in several layers: add "layer": True (every layer), a layer, or '
            f"several of 0 to {model.cfg.n_layers - 1} to the grid"
        )
    [point] = model.select([full])
    if not full.startswith("blocks."):
        raise InputError(
            f"{full} stands outside the blocks, and a sweep patches within them. The sum of the "
            "embeddings is resid_pre of layer 0."
        )
    return {point.layer(): point}


def _check_alike(points: Sequence[Mapping[int, HookPoint]]) -> None:
    """A sweep means the same part of every layer's activation, so their axes must agree."""
    for here in points:
        kinds = {point.axes: point for point in here.values()}
        if len(kinds) > 1:
            told = [f"{point.name} [{point.axes_text}]" for point in kinds.values()]
            raise InputError(f"layers differ in their axes, sweep them apart: {', '.join(told)}")
        for axes, point in kinds.items():
            if not axes or axes[0] != "batch":
                raise InputError(f"{point.name} is [{point.axes_text}]: it has no axis of prompts")


def _axis_of(name: str, axes: Sequence[str]) -> str:
    """Which axis of an activation an axis of the grid goes through; "" if there is none."""
    if name == "dim":
        return axes[-1]
    return next((axis for axis in INSIDE[name] if axis in axes), "")


def _sizes(
    model: HookedTransformer,
    points: Sequence[Mapping[int, HookPoint]],
    wanted: Sequence[str],
    tokens: Tensor,
    mask: Tensor | None,
) -> dict[str, list[int | None]]:
    """Of each hook point: the lengths of its axes; if need be from a run of one prompt."""
    every = {point.name or "": point for here in points for point in here.values()}
    known = {"batch": tokens.shape[0], "pos": tokens.shape[1]}
    sizes = {
        name: [
            known.get(axis, size)
            for axis, size in zip(point.axes or (), sizes_of(model, point), strict=True)
        ]
        for name, point in every.items()
    }
    for name, point in every.items():
        axes = point.axes or ()
        for each in wanted:
            if not _axis_of(each, axes):
                raise InputError(f"{name} is [{point.axes_text}]: {each!r} goes through none")
        through = [_axis_of(each, axes) for each in wanted]
        if len(set(through)) < len(through):
            raise InputError(f"{name} is [{point.axes_text}]: {wanted} mean one axis twice")
    if any(None in lengths for lengths in sizes.values()):
        one = None if mask is None else mask[:1]
        for name, shape in shapes(model, list(every.values()), tokens[:1], one).items():
            sizes[name] = [tokens.shape[0], *shape[1:]]
    return sizes


def shapes(
    model: HookedTransformer,
    points: Sequence[HookPoint],
    tokens: Int[Tensor, "batch pos"],
    mask: Int[Tensor, "batch pos"] | None,
) -> dict[str, list[int]]:
    """The shapes of activations in a run."""
    found: dict[str, list[int]] = {}

    def look(x: Tensor, hook: HookPoint) -> None:
        found[hook.name or ""] = list(x.shape)

    requests = [HookRequest(point, look, observes=True) for point in points]
    names = {point.name or "" for point in points}
    with source_run(model), model.listening(requests, names):
        model(tokens, return_type=None, attention_mask=mask)
    return found


def _length(
    name: str, points: Sequence[Mapping[int, HookPoint]], sizes: Mapping[str, Sequence[int | None]]
) -> int:
    """How many there are to go through; the same everywhere."""
    lengths: dict[int, str] = {}
    for here in points:
        for point in here.values():
            axes = point.axes or ()
            length = sizes[point.name or ""][axes.index(_axis_of(name, axes))]
            assert length is not None
            lengths.setdefault(length, point.name or "")
    if len(lengths) > 1:
        told = ", ".join(f"{where} has {n}" for n, where in lengths.items())
        raise InputError(
            f"activations differ in their number of {CALLED.get(name, f'{name}s')}: {told}. Sweep "
            "them apart."
        )
    return next(iter(lengths))
