"""What is put in an activation's place, as a function of the activation alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from hookedlm.errors import InputError

Part = Float[Tensor, "..."]
"""The selected part of an activation. Its last axis is the activation's last one; an axis of which
one index was selected by an int is gone, the last axis excepted."""


@dataclass(frozen=True, eq=False, repr=False)
class What:
    """What stands in an activation's place. Equal only to itself; holds no state."""

    @property
    def needs_source(self) -> bool:
        """Whether `of` wants the same part of something that comes from a run."""
        return False

    @property
    def value(self) -> Part | None:
        """A tensor that must broadcast over the selected part; None without one."""
        return None

    @property
    def width(self) -> int | None:
        """How long the last axis of the selected part must be; None: any length."""
        return None

    def of(self, x: Part, source: Part | None = None) -> Part:
        """What stands in the place of ``x``: same shape, dtype and device, never in place.

        ``source``: the same part of what `needs_source` asks for. Elementwise over leading axes.
        """
        raise NotImplementedError

    def __repr__(self) -> str:
        given = [
            short(value) if i == 0 else f"{name}={short(value)}"
            for i, (name, value, default) in enumerate(options(self))
            if i == 0 or value is not default
        ]
        return f"{type(self).__name__}({', '.join(x for x in given if x != 'None')})"


def options(x: Any) -> list[tuple[str, Any, Any]]:
    """(name, value, default) of a dataclass' fields."""
    return [(field.name, vars(x)[field.name], field.default) for field in fields(x)]


def short(value: Any) -> str:
    """A value as it is printed: tensors by dtype and shape, long texts by their beginning."""
    if isinstance(value, Tensor):
        if value.numel() == 1 or (value.ndim == 1 and not value.is_floating_point()):
            return str(value.tolist()) if value.numel() <= 8 else f"{list(value.shape)} integers"
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    if isinstance(value, str):
        return repr(value if len(value) <= 48 else f"{value[:45]}...")
    if isinstance(value, slice):
        parts = ["" if x is None else str(x) for x in (value.start, value.stop)]
        return ":".join([*parts, *([] if value.step is None else [str(value.step)])])
    if isinstance(value, (int, float, range)) or value is None:
        return repr(value)
    if isinstance(value, Mapping):
        return f"{{{len(value)} activations}}"
    if isinstance(value, Sequence):
        few = ", ".join(short(x) for x in value[:4])
        return f"[{few}{f', ... {len(value)} in all' if len(value) > 4 else ''}]"
    return type(value).__name__


@dataclass(frozen=True, eq=False, repr=False)
class Zero(What):
    """Zeros: zero ablation."""

    def of(self, x: Part, source: Part | None = None) -> Part:
        """Zeros."""
        return torch.zeros_like(x)


@dataclass(frozen=True, eq=False, repr=False)
class Scale(What):
    """The activation times ``factor``."""

    factor: float

    def of(self, x: Part, source: Part | None = None) -> Part:
        """``factor * x``."""
        return x * self.factor


@dataclass(frozen=True, eq=False, repr=False)
class Add(What):
    """The activation plus ``coefficient * vector``: steering (arXiv 2308.10248).

    ``vector``: anything that broadcasts over the selected part, most often ``[d_model]``. Raises
    InputError unless it is a float tensor.
    """

    vector: Float[Tensor, "..."]
    coefficient: float = 1.0

    def __post_init__(self) -> None:
        if not isinstance(self.vector, Tensor) or not self.vector.is_floating_point():
            raise InputError(f"Add({short(self.vector)}): expected a float tensor to add")

    @property
    def value(self) -> Part:
        """``vector``."""
        return self.vector

    def of(self, x: Part, source: Part | None = None) -> Part:
        """``x + coefficient * vector``."""
        return x + (self.coefficient * self.vector).to(x)


@dataclass(frozen=True, eq=False, repr=False)
class ProjectOut(What):
    """The activation without its component in a subspace: ``x - B^T B x`` with ``B`` an orthonormal
    basis of what ``directions`` span (directional ablation, arXiv 2406.11717).

    ``directions``: ``[width]`` or ``[n, width]``, of any length, dependent ones allowed; ``width``
    is that of the selected part's last axis. Raises InputError if they span nothing.
    """

    directions: Float[Tensor, "width"] | Float[Tensor, "n width"]

    def __post_init__(self) -> None:
        _ = self.basis

    @cached_property
    def basis(self) -> Float[Tensor, "rank width"]:
        """Orthonormal, float32."""
        return orthonormal(self.directions, "ProjectOut")

    @property
    def width(self) -> int:
        """The width of a direction."""
        return self.basis.shape[-1]

    def of(self, x: Part, source: Part | None = None) -> Part:
        """``x`` less its component in the subspace, computed in float32 at least."""
        return x - component(x, self.basis)


def orthonormal(directions: Any, whose: str) -> Float[Tensor, "rank width"]:
    """An orthonormal basis of what ``directions [n, width]`` or ``[width]`` span, in float32.

    Raises InputError on anything else, and if they span nothing.
    """
    if (
        not isinstance(directions, Tensor)
        or directions.ndim not in (1, 2)
        or not directions.is_floating_point()
    ):
        raise InputError(
            f"{whose}({short(directions)}): expected directions as a float tensor [width] or "
            "[n, width]"
        )
    rows = directions.detach().reshape(-1, directions.shape[-1]).float()
    _, lengths, basis = torch.linalg.svd(rows, full_matrices=False)
    basis = basis[lengths > 1e-5 * lengths[:1]]  # the longest comes first
    if not len(basis) or not bool(torch.isfinite(basis).all()):
        raise InputError(f"{whose}({short(directions)}): these directions span nothing")
    return basis


def component(x: Part, basis: Float[Tensor, "rank width"]) -> Part:
    """The part of ``x`` in the span of an orthonormal basis."""
    wide = x if x.dtype in (torch.float32, torch.float64) else x.float()
    basis = basis.to(wide)
    return ((wide @ basis.t()) @ basis).to(x.dtype)
