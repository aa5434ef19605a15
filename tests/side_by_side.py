"""Hugging Face's model and ours on the same batch: what the tests of parity share."""

from __future__ import annotations

from functools import lru_cache

import hf_truth
import torch
from tiny import VOCAB, Tiny
from torch import Tensor

import hookedlm


@lru_cache(maxsize=4)
def both(tiny: Tiny, dtype: torch.dtype = torch.float32):
    """(Hugging Face's model, ours), shared by the tests that follow each other on one variant."""
    theirs = tiny.build(dtype=dtype)
    return theirs, hookedlm.load(theirs)


def batch(side: str | None):
    """(tokens, mask), padded on a side; without one, no mask."""
    if side is None:
        tokens = torch.randint(3, VOCAB, (2, 11), generator=torch.Generator().manual_seed(5))
        return tokens, None
    return hf_truth.padded_batch(VOCAB, [11, 6, 9], side, 0, seed=7)


def real(x: Tensor, mask: Tensor | None) -> Tensor:
    """The real positions of a batch."""
    return x if mask is None else x[mask.bool()]


def error(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference over the largest value."""
    return float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-30))
