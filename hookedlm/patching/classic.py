"""Activation patching: run a corrupted prompt with one activation of a clean run put in its place.

For each index of a grid (layer, position, head, ...) a patched run, and of its logits a metric; the
runs share what they have in common (`hookedlm.patching.engine`). The answer is a tensor with the
grid's shape: where the metric recovers, the clean activation carried what the corruption had
destroyed. Signatures and results are TransformerLens'.
Source: "Locating and Editing Factual Associations in GPT" (arXiv 2202.05262); "Interpretability in
the Wild" (arXiv 2211.00593).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hookedlm.cache import ActivationCache
from hookedlm.errors import InputError
from hookedlm.hooks import HookPoint
from hookedlm.model import HookedTransformer
from hookedlm.names import get_act_name
from hookedlm.patching.base_run import run_base
from hookedlm.patching.engine import run_cells
from hookedlm.patching.metric import Function, Metric, reader
from hookedlm.patching.plans import Plan, SetterPlan, SitePlan, from_source
from hookedlm.patching.sites import Sites

if TYPE_CHECKING:
    import pandas as pd

Tokens = Int[Tensor, "batch pos"]
Index = Sequence[int]
PatchSetter = Callable[[Tensor, Index, Tensor], Tensor]
Grid = Float[Tensor, "..."]

AXES = {
    "layer": ("layer",),
    "pos": ("pos",),
    "head": ("head", "kv_head"),
    "head_index": ("head", "kv_head"),
    "dest_pos": ("pos",),
    "src_pos": ("key_pos",),
}
"""What an axis of the grid runs over: the axes of the activation that it may index."""


# Patch setters ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SliceSetter:
    """A setter whose index, less the layer, points at the axes ``skips`` behind the batch."""

    name: str
    what: str
    axes: str
    skips: int = 0

    @property
    def __name__(self) -> str:
        return f"{self.name}_patch_setter"

    def __call__(
        self, corrupted_activation: Tensor, index: Index, clean_activation: Tensor
    ) -> Tensor:
        """Patch in place."""
        here = (slice(None),) * (1 + self.skips) + tuple(index[1:])
        corrupted_activation[here] = clean_activation[here]
        return corrupted_activation

    def __repr__(self) -> str:
        return f"<{self.__name__}: {self.what}, in place; index ({self.axes})>"


layer_pos_patch_setter = SliceSetter("layer_pos", "one position", "layer, pos")
layer_pos_head_vector_patch_setter = SliceSetter(
    "layer_pos_head_vector", "one head at one position", "layer, pos, head"
)
layer_head_vector_patch_setter = SliceSetter(
    "layer_head_vector", "one head at all positions", "layer, head", skips=1
)
layer_head_pattern_patch_setter = SliceSetter("layer_head_pattern", "one pattern", "layer, head")
layer_head_pos_pattern_patch_setter = SliceSetter(
    "layer_head_pos_pattern", "one row of a pattern", "layer, head, dest_pos"
)
layer_head_dest_src_pos_pattern_patch_setter = SliceSetter(
    "layer_head_dest_src_pos_pattern", "one entry of a pattern", "layer, head, dest_pos, src_pos"
)


# The sweep ----------------------------------------------------------------------------------------


def make_df_from_ranges(
    column_max_ranges: Sequence[int], column_names: Sequence[str]
) -> pd.DataFrame:
    """Every combination of ``range(n)`` for each column, the last column running fastest.

    Raises ImportError without pandas.
    """
    rows = list(product(*(range(n) for n in column_max_ranges)))
    return _pandas().DataFrame(rows, columns=list(column_names))


def _pandas() -> Any:
    try:
        import pandas
    except ImportError as error:
        raise ImportError(
            "tables of indices need pandas: pip install hookedlm[plots]. Without it use "
            "index_axis_names and return_index_df=False."
        ) from error
    return pandas


def generic_activation_patch(
    model: HookedTransformer,
    corrupted_tokens: Tokens,
    clean_cache: ActivationCache,
    patching_metric: Metric | Function,
    patch_setter: PatchSetter,
    activation_name: str,
    index_axis_names: Sequence[str] | None = None,
    index_df: pd.DataFrame | None = None,
    return_index_df: bool = False,
) -> Grid | tuple[Grid, pd.DataFrame]:
    """The metric with each index of a grid patched: one forward pass of the corrupted prompt each.

    ``patch_setter(corrupted_activation, index, clean_activation)`` puts one slice of the clean
    activation into the corrupted one and returns it; ``index`` starts with the layer.
    ``activation_name`` is shorthand ("resid_pre", "z", "pattern"). The grid is either
    ``index_axis_names``, from "layer", "pos", "head" (or "head_index"), "dest_pos", "src_pos", and
    the answer has its shape; or the rows of ``index_df``, and the answer is a list of numbers. A
    head axis is as long as the activation has heads (keys and values: kv heads). Runs without
    gradients; hooks that are in the model stay in. Raises InputError before anything runs when an
    index, an axis, the cache or the prompt does not fit, HookNameError where a layer lacks the
    activation.
    """
    if (index_axis_names is None) == (index_df is None):
        raise InputError("give either index_axis_names or index_df, and not both")
    tokens = _checked_tokens(corrupted_tokens)
    if index_df is not None:
        names = [str(name) for name in index_df.columns]
        indices = [tuple(row) for row in index_df.itertuples(index=False, name=None)]
        shape: tuple[int, ...] = (len(indices),)
        layers = sorted({_layer(row[0], model) for row in indices}) if names else []
    else:
        assert index_axis_names is not None
        names = list(index_axis_names)
        layers = list(range(model.cfg.n_layers))
    points = _points(model, activation_name, layers, clean_cache, tokens)
    if index_df is None:
        shape = tuple(_length(name, points, model) for name in _checked_axes(names))
        indices = list(product(*(range(n) for n in shape)))
    _check_indices(indices, names, points)

    answers = _answers(model, tokens, patching_metric, patch_setter, indices, points)
    grid = torch.stack(answers) if answers else torch.zeros(0, device=model.device)
    grid = grid.reshape(shape)
    if not return_index_df:
        return grid
    return grid, make_df_from_ranges(shape, names) if index_df is None else index_df


def _answers(
    model: HookedTransformer,
    tokens: Tokens,
    metric: Metric | Function,
    setter: PatchSetter,
    indices: Sequence[Index],
    points: Points,
) -> list[Float[Tensor, ""]]:
    if not indices:
        return []
    base = run_base(model, tokens, None, [point for point, _ in points.values()])
    if isinstance(metric, Metric):
        metric.check(base.n_examples, base.length, model.cfg.d_vocab, base.mask)
    plan: Plan = SetterPlan(setter, indices, points, base.n_examples)
    if isinstance(setter, SliceSetter) and _sliceable(setter, indices, points):
        clean = {layer: x.to(model.device) for layer, (_, x) in points.items()}
        sites = _sites(setter, indices, points)
        plan = SitePlan(sites, from_source, clean, base.n_examples)

    read = reader(metric, model.device)
    found: dict[int, Tensor] = {}
    first = (points[int(indices[0][0])][0].name or "").rsplit(".", 1)[-1].removeprefix("hook_")
    for cells, numbers in run_cells(base, plan, read, progress=f"patching {first}"):
        found.update(zip(cells, numbers, strict=True))
    return [found[cell] for cell in range(len(indices))]


def _sliceable(setter: SliceSetter, indices: Sequence[Index], points: Points) -> bool:
    """Whether the setter means one and the same slice of every layer's activation."""
    reach = 1 + setter.skips + len(indices[0]) - 1
    return len({point.axes for point, _ in points.values()}) == 1 and all(
        len(point.axes or ()) >= reach for point, _ in points.values()
    )


def _sites(setter: SliceSetter, indices: Sequence[Index], points: Points) -> Sites:
    point, clean = points[int(indices[0][0])]
    axes = (point.axes or ())[1 + setter.skips :]
    device = clean.device
    index = {}
    for column, axis in enumerate(axes[: len(indices[0]) - 1], start=1):
        lengths = [points[int(row[0])][1].shape[1 + setter.skips + column - 1] for row in indices]
        places = [int(row[column]) % n for row, n in zip(indices, lengths, strict=True)]
        index[axis] = torch.tensor(places, device=device)
    where = {layer: place for layer, (place, _) in points.items()}
    return Sites(where, [int(row[0]) for row in indices], index)


# What is checked before anything runs -------------------------------------------------------------

Points = dict[int, tuple[HookPoint, Tensor]]
"""Layer -> (where the patch goes, the clean activation)."""


def _checked_tokens(tokens: Any) -> Tokens:
    if not isinstance(tokens, Tensor) or tokens.ndim not in (1, 2):
        raise InputError("corrupted_tokens must be tokens [batch, pos]: see model.to_tokens")
    return tokens if tokens.ndim == 2 else tokens[None]


def _checked_axes(names: Sequence[str]) -> Sequence[str]:
    unknown = [name for name in names if name not in AXES]
    if unknown or not names or names[0] != "layer":
        raise InputError(
            f"index_axis_names={list(names)}: the first is 'layer', the others are from "
            f"{', '.join(list(AXES)[1:])}"
        )
    return names


def _layer(value: Any, model: HookedTransformer) -> int:
    if int(value) != value or not 0 <= value < model.cfg.n_layers:
        raise InputError(
            f"layer {value} in an index: this model has layers 0 to {model.cfg.n_layers - 1}"
        )
    return int(value)


def _points(
    model: HookedTransformer,
    activation_name: str,
    layers: Sequence[int],
    cache: ActivationCache,
    tokens: Tokens,
) -> Points:
    points: Points = {}
    for layer in layers:
        name = get_act_name(activation_name, layer)
        (point,) = model.select([name])
        clean = cache[name]
        axes = point.axes or ()
        if clean.ndim != len(axes):
            raise InputError(
                f"the clean {name} has shape {tuple(clean.shape)}; expected the axes "
                f"{point.axes_text}. Keep the batch axis: run_with_cache without remove_batch_dim."
            )
        expected = {"batch": (1, tokens.shape[0]), "pos": (tokens.shape[1],)}
        for axis, length in zip(axes, clean.shape, strict=True):
            if axis in expected and length not in expected[axis]:
                raise InputError(
                    f"the clean {name} has {length} along {axis}, the corrupted prompt "
                    f"{expected[axis][-1]}: patching wants prompts of equal length"
                )
        points[layer] = (point, clean)
    return points


def _length(name: str, points: Points, model: HookedTransformer) -> int:
    """How long an axis of the grid is: the shortest among the layers' activations."""
    if name == "layer":
        return model.cfg.n_layers
    lengths = {_length_at(name, *points[layer]) for layer in points}
    if len(lengths) != 1:
        raise InputError(
            f"the layers differ in their number of {name} ({sorted(lengths)}): give the rows to "
            "patch as index_df"
        )
    return lengths.pop()


def _length_at(name: str, point: HookPoint, clean: Tensor) -> int:
    axes = point.axes or ()
    for axis in AXES[name]:
        if axis in axes:
            return clean.shape[axes.index(axis)]
    raise InputError(f"{point.name} has the axes {point.axes_text}: {name!r} indexes none of them")


def _check_indices(indices: Sequence[Index], names: Sequence[str], points: Points) -> None:
    """Columns with a name known here must be in range; others are the setter's own business."""
    known = [(column, name) for column, name in enumerate(names) if name in AXES and column > 0]
    lengths = {
        layer: {name: _length_at(name, *points[layer]) for _, name in known} for layer in points
    }
    for index in indices:
        for column, name in known:
            length = lengths[int(index[0])][name]
            if not -length <= index[column] < length:
                raise InputError(
                    f"{name} {index[column]} in the index {tuple(index)}: there are {length}"
                )
