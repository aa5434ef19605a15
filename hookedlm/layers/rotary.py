"""Rotary position embedding (arXiv 2104.09864): pairs of dimensions turn with the position."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

Heads = Float[Tensor, "batch head pos d_head"]
Tables = tuple[Float[Tensor, "batch 1 pos pair"], Float[Tensor, "batch 1 pos pair"]]


@dataclass(frozen=True)
class NTKByParts:
    """Context extension by wavelength (arXiv 2309.00071, section 3.2, as Llama 3.1 uses it).

    Frequencies that turn at least ``high`` times within ``n_original`` positions stay, those that
    turn at most ``low`` times are divided by ``factor``, those between are interpolated.
    """

    factor: float
    low: float
    high: float
    n_original: int

    def __call__(self, frequencies: Float[Tensor, "pair"]) -> Float[Tensor, "pair"]:
        """The scaled frequencies, in radians per position."""
        turns = self.n_original * frequencies / (2 * math.pi)
        kept = ((turns - self.low) / (self.high - self.low)).clamp(0, 1)
        return frequencies * (kept + (1 - kept) / self.factor)


def tables(
    positions: Int[Tensor, "batch pos"],
    dim: int,
    base: float,
    parts: NTKByParts | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tables:
    """(cos, sin) of every position's angles, one per pair of the first ``dim`` dimensions."""
    pairs = torch.arange(0, dim, 2, dtype=dtype, device=positions.device)
    frequencies = base ** -(pairs / dim)
    if parts is not None:
        frequencies = parts(frequencies)
    angles = (positions.to(dtype)[..., None] * frequencies)[:, None]
    return angles.cos(), angles.sin()


def rotate_halves(q: Heads, k: Heads, tables: tuple[Tensor, ...]) -> tuple[Heads, Heads]:
    """Both rotated, dimension i paired with i + dim/2 (GPT-NeoX, Llama); the rest passes."""
    return _halves(q, *tables), _halves(k, *tables)


def rotate_pairs(q: Heads, k: Heads, tables: tuple[Tensor, ...]) -> tuple[Heads, Heads]:
    """Both rotated, dimension 2i paired with 2i + 1 (GPT-J); the rest passes."""
    return _pairs(q, *tables), _pairs(k, *tables)


def _halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = cos.shape[-1]
    a, b, rest = x.split([half, half, x.shape[-1] - 2 * half], dim=-1)
    turned = [(a * cos - b * sin).to(x.dtype), (b * cos + a * sin).to(x.dtype)]
    return torch.cat([*turned, rest], dim=-1)


def _pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    dim = 2 * cos.shape[-1]
    a, b = x[..., 0:dim:2], x[..., 1:dim:2]
    turned = torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2)
    return torch.cat([turned.to(x.dtype), x[..., dim:]], dim=-1)
