"""Rotated subspaces in which interchange is made, to be trained.

A rotation turns an activation; some of its coordinates are swapped for those of another run, and it
is turned back: ``x + R^T m R (source - x)``, with rows of ``R`` orthonormal and ``m`` from 0 to 1.
Sources: distributed alignment search (arXiv 2303.02536), its boundless variant (arXiv 2305.08809).
Orthonormal rows are torch's own parametrisation, `torch.nn.utils.parametrizations.orthogonal`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils.parametrizations import orthogonal
from typing_extensions import Self

from hookedlm.errors import InputError

Part = Float[Tensor, "*batch width"]


class _Matrix(nn.Module):
    """Holds what is parametrised."""

    def __init__(self, weight: Float[Tensor, "n width"]):
        super().__init__()
        self.weight = nn.Parameter(weight)


class Space(nn.Module, ABC):
    """A subspace of activations of one ``width``: ``n`` orthonormal rows, and how far the
    coordinate along each is swapped.

    In training mode that may be soft; else a coordinate is swapped or not. ``seed`` is that of the
    generator of the first rotation, drawn evenly among all.
    """

    def __init__(self, width: int, n: int, seed: int, dtype: torch.dtype):
        super().__init__()
        check_rank(n, width)
        if dtype not in (torch.float32, torch.float64):
            raise InputError(f"dtype={dtype}: rotations are kept in float32 or float64")
        self.width, self.seed = width, seed
        square = n == width
        # The Householder form needs no completion to a square, which torch would draw at random.
        self.rotation = orthogonal(
            _Matrix(random_rows(n, width, seed).to(dtype)),
            orthogonal_map="matrix_exp" if square else "householder",
            use_trivialization=square,
        )
        self.eval()

    @property
    def rows(self) -> Float[Tensor, "n width"]:
        """The orthonormal rows."""
        rows = self.rotation.weight
        assert isinstance(rows, Tensor)
        return rows

    @abstractmethod
    def mask(self) -> Float[Tensor, "n"]:
        """How far each coordinate is swapped, 0 to 1."""

    @property
    @abstractmethod
    def rank(self) -> int:
        """How many coordinates are swapped."""

    @property
    def directions(self) -> Float[Tensor, "rank width"]:
        """An orthonormal basis of what is swapped."""
        return self.rows[: self.rank].detach()

    @abstractmethod
    def options(self) -> dict[str, Any]:
        """What it was made with, besides ``seed`` and ``dtype``."""

    def fresh(self, seed: int) -> Self:
        """One of the same kind that has not been trained."""
        made = type(self)(**self.options(), seed=seed, dtype=self.rows.dtype)
        return made.to(self.rows.device)

    def swapped(self, x: Part, source: Part) -> Part:
        """``x`` with its coordinates in the subspace taken from ``source``, computed in the space's
        own dtype. Raises InputError on another width."""
        if x.shape[-1] != self.width:
            raise InputError(f"a space of width {self.width} for activations of {x.shape[-1]}")
        rows = self.rows
        wide = x.to(rows.dtype)
        change = (source.to(rows.dtype) - wide) @ rows.t()
        return (wide + (change * self.mask()) @ rows).to(x.dtype)

    def penalty(self) -> Float[Tensor, ""]:
        """What is added to the loss in training."""
        return self.rows.new_zeros(())

    def anneal(self, done: float) -> None:
        """Told how much of training is done, 0 to 1."""

    def extra_repr(self) -> str:
        """Sizes."""
        return f"{self.rank} of {self.width} dimensions"


def check_rank(rank: int, width: int) -> None:
    """Raise InputError unless an activation of this width has subspaces of this rank."""
    if not 1 <= rank <= width:
        raise InputError(
            f"rank={rank}: an activation of width {width} has subspaces of 1 to {width}"
        )


def random_rows(n: int, width: int, seed: int) -> Float[Tensor, "n width"]:
    """Orthonormal rows, each choice of them as likely as any (arXiv math-ph/0609050)."""
    generator = torch.Generator().manual_seed(seed)
    gaussian = torch.randn(width, n, generator=generator, dtype=torch.float64)
    q, r = torch.linalg.qr(gaussian)
    return (q * r.diagonal().sign()).t().contiguous()


class RotatedSpace(Space):
    """The first ``rank`` of all ``width`` coordinates of a rotation (arXiv 2303.02536). Its
    parameters grow with the square of the width: see `LowRankRotatedSpace`."""

    def __init__(self, width: int, rank: int, *, seed: int = 0, dtype: torch.dtype = torch.float32):
        """Raises InputError unless ``rank`` is 1 to ``width``."""
        check_rank(rank, width)
        super().__init__(width, width, seed, dtype)
        self._rank = rank
        self.register_buffer("_mask", (torch.arange(width) < rank).to(dtype), persistent=False)

    def mask(self) -> Float[Tensor, "width"]:
        """1 for the first ``rank``."""
        return self.get_buffer("_mask")

    @property
    def rank(self) -> int:
        """As it was given."""
        return self._rank

    def options(self) -> dict[str, Any]:
        """``width`` and ``rank``."""
        return {"width": self.width, "rank": self.rank}


class LowRankRotatedSpace(Space):
    """``rank`` orthonormal directions, with parameters for these alone."""

    def __init__(self, width: int, rank: int, *, seed: int = 0, dtype: torch.dtype = torch.float32):
        """Raises InputError unless ``rank`` is 1 to ``width``."""
        super().__init__(width, rank, seed, dtype)
        self._rank = rank
        self.register_buffer("_mask", torch.ones(rank, dtype=dtype), persistent=False)

    def mask(self) -> Float[Tensor, "rank"]:
        """1 for each."""
        return self.get_buffer("_mask")

    @property
    def rank(self) -> int:
        """As it was given."""
        return self._rank

    def options(self) -> dict[str, Any]:
        """``width`` and ``rank``."""
        return {"width": self.width, "rank": self.rank}


class BoundlessRotatedSpace(Space):
    """As many of all coordinates as training finds to be needed (arXiv 2305.08809).

    ``boundary``, a share of the width, is learned: coordinate ``i`` is swapped by
    ``sigmoid((boundary * width - i - 1/2) / temperature)``. The temperature falls along
    ``temperatures`` in training, where ``cost * boundary`` is added to the loss. Outside training
    the boundary is sharp. At least one coordinate is swapped.
    """

    def __init__(
        self,
        width: int,
        *,
        boundary: float = 0.5,
        temperatures: tuple[float, float] = (50.0, 0.1),
        cost: float = 1.0,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
    ):
        """Raises InputError unless ``boundary`` is in (0, 1] and temperatures are above 0."""
        if not 0 < boundary <= 1 or min(temperatures) <= 0:
            raise InputError(
                f"boundary={boundary}, temperatures={temperatures}: expected a share of the width "
                "up to 1, and temperatures above 0"
            )
        super().__init__(width, width, seed, dtype)
        self.first_boundary, self.cost = boundary, cost
        first, last = map(float, temperatures)
        self.temperatures = first, last
        self.temperature = first
        self.boundary = nn.Parameter(torch.tensor(boundary, dtype=dtype))

    def mask(self) -> Float[Tensor, "width"]:
        """Soft in training mode."""
        boundary = self.boundary
        coordinates = torch.arange(self.width, device=boundary.device, dtype=boundary.dtype) + 0.5
        if not self.training:
            return (coordinates < self.rank).to(boundary.dtype)
        return torch.sigmoid((boundary * self.width - coordinates) / self.temperature)

    @property
    def rank(self) -> int:
        """The boundary in coordinates, rounded."""
        return min(self.width, max(1, round(float(self.boundary.detach()) * self.width)))

    def penalty(self) -> Float[Tensor, ""]:
        """``cost * boundary``, nothing below one coordinate."""
        return self.cost * self.boundary.clamp(min=1 / self.width)

    def anneal(self, done: float) -> None:
        """The temperature on its way."""
        first, last = self.temperatures
        self.temperature = first + (last - first) * done

    def options(self) -> dict[str, Any]:
        """As they were given."""
        return {
            "width": self.width,
            "boundary": self.first_boundary,
            "temperatures": self.temperatures,
            "cost": self.cost,
        }


SPACES: dict[str, type[Space]] = {
    kind.__name__: kind for kind in (RotatedSpace, LowRankRotatedSpace, BoundlessRotatedSpace)
}


def random_space(like: Space, draw: int) -> Space:
    """A random subspace of the same rank."""
    # Behind any seed that a space is likely to have been begun with.
    seed = 1_000_003 + draw
    space = LowRankRotatedSpace(like.width, like.rank, seed=seed, dtype=like.rows.dtype)
    return space.to(like.rows.device)
