"""`SweepResult`: what a sweep found, a tensor whose axes have names and labels."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hookedlm.errors import CacheFileError, InputError
from hookedlm.writing import write_tensors

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

Label: TypeAlias = int | str
FORMAT = "hookedlm sweep 1"


@dataclass(eq=False)
class SweepResult:
    """The metric of every patched run: ``values``, whose axes are ``axes`` in this order.

    ``axes``: name -> labels. ``fixed``: what one index or name was given for. ``clean`` and
    ``corrupted``: the metric of these runs unpatched, one number or (with an axis of examples) one
    for each; None where no such run was made. ``tokens``: the base prompt's as text, if it was one.
    ``complete``: False after an interruption; cells that were not reached are NaN.
    """

    values: Float[Tensor, "..."]
    axes: dict[str, list[Label]]
    metric: str
    clean: Float[Tensor, "*example"] | None = None
    corrupted: Float[Tensor, "*example"] | None = None
    fixed: dict[str, Label] = field(default_factory=dict)
    tokens: list[str] | None = None
    complete: bool = True

    def __post_init__(self) -> None:
        if tuple(self.values.shape) != tuple(map(len, self.axes.values())):
            raise InputError(
                f"values of shape {tuple(self.values.shape)} for the axes "
                f"{ {name: len(labels) for name, labels in self.axes.items()} }"
            )

    def __repr__(self) -> str:
        sizes = " x ".join(f"{name} {len(labels)}" for name, labels in self.axes.items())
        rest = ", ".join(f"{name}={label!r}" for name, label in self.fixed.items())
        told = [self.metric, sizes or "one number", *([rest] if rest else [])]
        for name, value in (("clean", self.clean), ("corrupted", self.corrupted)):
            told += [] if value is None else [f"{name} {float(value.mean()):.4g}"]
        if not self.complete:
            n = int((~self.values.isnan()).sum())
            told.append(f"INCOMPLETE: {n} of {self.values.numel()}")
        return f"SweepResult({'; '.join(told)})"

    # Parts of it ----------------------------------------------------------------------------------

    def at(self, **labels: Label | Sequence[Label]) -> SweepResult:
        """The part with these labels: ``at(name="z", layer=3)``; the axis goes if one is given.

        Raises InputError on axes and labels that are not there.
        """
        values, axes, fixed = self.values, dict(self.axes), dict(self.fixed)
        ends: dict[str, Any] = {"clean": self.clean, "corrupted": self.corrupted}
        for name, wanted in labels.items():
            if name not in axes:
                raise InputError(f"no axis {name!r}: the axes are {', '.join(self.axes)}")
            single = isinstance(wanted, (int, str))
            chosen: list[Label] = [wanted] if isinstance(wanted, (int, str)) else list(wanted)
            if missing := [label for label in chosen if label not in axes[name]]:
                raise InputError(f"{name} has no {missing[0]!r}: it has {axes[name]}")
            index = torch.tensor([axes[name].index(label) for label in chosen])
            values = values.index_select(list(axes).index(name), index)
            if name == "example":
                ends = {k: x if x is None else x.index_select(0, index) for k, x in ends.items()}
            if single:
                values = values.squeeze(list(axes).index(name))
                if name == "example":
                    ends = {k: x if x is None else x[0] for k, x in ends.items()}
                fixed[name] = chosen[0]
                del axes[name]
            else:
                axes[name] = chosen
        return replace(self, values=values, axes=axes, fixed=fixed, **ends)

    def normalised(self) -> SweepResult:
        """On a scale where the corrupted run is 0 and the clean run is 1 (with an axis of examples,
        each example's own). Raises InputError without both, or if they are equal."""
        if self.clean is None or self.corrupted is None:
            raise InputError("normalising wants a clean run and a corrupted one: give a source")
        if bool((self.clean == self.corrupted).any()):
            raise InputError(f"{self.metric} is the same in the clean run and the corrupted one")
        bottom, top = self._along(self.corrupted), self._along(self.clean)
        return replace(
            self,
            values=(self.values - bottom) / (top - bottom),
            metric=f"normalised {self.metric}",
            clean=torch.ones_like(self.clean),
            corrupted=torch.zeros_like(self.corrupted),
        )

    def changes(self) -> Float[Tensor, "..."]:
        """How far patching moved the metric: ``values`` less that of the same run unpatched (the
        corrupted one where that was patched, denoising; the clean one elsewhere)."""
        directions = self.axes.get("direction", [self.fixed.get("direction", "noise")])
        parts = []
        for direction in directions:
            end = self.corrupted if direction == "denoise" else self.clean
            parts.append(self.values.new_full((), float("nan")) if end is None else end)
        if "direction" not in self.axes:
            return self.values - self._along(parts[0])
        # Directions come first.
        return torch.stack([self.values[i] - self._along(part)[0] for i, part in enumerate(parts)])

    def top(self, k: int = 10) -> list[dict[str, Any]]:
        """The ``k`` cells that move the metric furthest, either way: their labels, ``value`` and
        ``change`` (see `changes`). Where it is not known what the metric was unpatched, those with
        the largest values."""
        changes = self.changes()
        measure = self.values if bool(changes.isnan().all()) else changes.abs()
        order = measure.flatten().nan_to_num(-torch.inf).argsort(descending=True, stable=True)
        cells = list(product(*self.axes.values()))
        values, moved = self.values.flatten().tolist(), changes.flatten().tolist()
        done = [i for i in order.tolist() if values[i] == values[i]]
        return [
            dict(zip(self.axes, cells[i], strict=True)) | {"value": values[i], "change": moved[i]}
            for i in done[:k]
        ]

    def _along(self, end: Float[Tensor, "*example"]) -> Tensor:
        """A number, or one for each example, so that it broadcasts with ``values``."""
        shape = [1] * self.values.ndim
        if end.ndim:
            shape[list(self.axes).index("example")] = len(end)
        return end.reshape(shape)

    # Tables and figures ---------------------------------------------------------------------------

    @property
    def df(self) -> pd.DataFrame:
        """One row for each cell: its labels (and, of positions, the token), and ``value``.

        Raises ImportError without pandas.
        """
        try:
            import pandas
        except ImportError as error:
            raise ImportError(
                "tables need pandas: pip install hookedlm[plots]. Without it, result.values has "
                "the numbers and result.axes the labels."
            ) from error
        cells = list(product(*self.axes.values()))
        table = pandas.DataFrame(cells, columns=list(self.axes))
        if self._shows_tokens("pos"):
            assert self.tokens is not None
            told = [self.tokens[int(i)] for i in table["pos"]]
            table.insert(list(self.axes).index("pos") + 1, "token", told)
        table["value"] = self.values.flatten().tolist()
        return table

    def plot(self, **layout: Any) -> go.Figure:
        """A line over one axis, a heatmap of two, or several heatmaps side by side where a third
        (the first of them) is short. ``layout``: as plotly's ``update_layout``.

        Raises InputError for other numbers of axes, ImportError without plotly.
        """
        from hookedlm import plots

        names = [name for name, labels in self.axes.items() if len(labels) > 1]
        rest = {name: labels[0] for name, labels in self.axes.items() if name not in names}
        if len(names) not in (1, 2, 3):
            raise InputError(
                f"a figure shows one to three axes, and there are {len(names)}: choose with "
                f"result.at(...), for instance {next(iter(self.axes), 'layer')}=..."
            )
        values = self.values.reshape([len(self.axes[name]) for name in names])
        fixed = ", ".join(f"{name} {label}" for name, label in (self.fixed | rest).items())
        options: dict[str, Any] = {"title": f"{self.metric} ({fixed})" if fixed else self.metric}
        options["xaxis"] = names[-1]
        if len(names) == 1:
            options = options | {"yaxis": self.metric} | layout
            return plots.line(values, x=self._told(names[0]), **options)
        told = {"yaxis": names[-2], "zmid": self._middle(), "colorbar": self.metric}
        options = options | told | layout
        x, y = self._told(names[-1]), self._told(names[-2])
        if len(names) == 2:
            return plots.heatmap(values, x=x, y=y, **options)
        panels = [
            f"{names[0]} {text}" if isinstance(label, int) and text == str(label) else text
            for label, text in zip(self.axes[names[0]], self._told(names[0]), strict=True)
        ]
        return plots.heatmaps(values, panels, x=x, y=y, **options)

    def _middle(self) -> float:
        """The metric of the run that was patched: where nothing changed."""
        directions = self.axes.get("direction", [self.fixed.get("direction", "noise")])
        end = self.corrupted if "denoise" in directions else self.clean
        return 0.0 if end is None else float(end.mean())

    def _shows_tokens(self, name: str) -> bool:
        return (
            name in self.axes
            and self.tokens is not None
            and all(isinstance(label, int) for label in self.axes[name])
        )

    def _told(self, name: str) -> list[str]:
        """Labels as a figure shows them: positions with their tokens."""
        labels = self.axes[name]
        if name in ("pos", "key_pos") and self._shows_tokens(name):
            assert self.tokens is not None
            return [f"{i}: {self.tokens[int(i)]}" for i in labels]
        return [str(label) for label in labels]

    # Files ----------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write to a safetensors file, labels and all as JSON in its header. What was there before
        is replaced only when the new file is complete."""
        ends = {"clean": self.clean, "corrupted": self.corrupted}
        tensors = {"values": self.values} | {k: x for k, x in ends.items() if x is not None}
        tensors = {k: x.detach().cpu().clone().contiguous() for k, x in tensors.items()}
        told = {name: vars(self)[name] for name in TOLD} | {
            "format": FORMAT,
            "axes": list(self.axes.items()),
        }
        write_tensors(path, tensors, told)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> SweepResult:
        """What `save` wrote. Raises CacheFileError on another file, or a damaged one."""
        if not Path(path).is_file():
            raise CacheFileError(f"{path}: no such file")
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            told = json.loads(metadata.get("hookedlm", "{}"))
            if told.get("format") != FORMAT:
                raise CacheFileError(f"{path} was not written by SweepResult.save")
            return cls(
                values=tensors["values"],
                axes=dict(told["axes"]),
                clean=tensors.get("clean"),
                corrupted=tensors.get("corrupted"),
                **{name: told[name] for name in TOLD},
            )
        except (SafetensorError, KeyError, ValueError) as error:
            raise CacheFileError(f"{path} is damaged: {error}") from error


TOLD = ("metric", "fixed", "tokens", "complete")
"""Fields that are JSON as they are."""
