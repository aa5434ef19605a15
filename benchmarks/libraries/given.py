"""What a library is given for a task, and what it hands back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

BATCH = 16
"""Rows of a batch where activations are streamed."""
NEW_TOKENS = 32


@dataclass(frozen=True)
class Given:
    """The same for every library: tokens by seed, and which layer, answers and cells are meant."""

    n_layers: int
    n_heads: int
    d_vocab: int
    shape: tuple[int, int]
    device: str
    every: int = 1
    room: float = 8e9
    """Bytes that a task may take; what needs more says so instead of running."""

    answers = (7, 9)
    """The tokens whose logits are compared."""

    def tokens_of(self, seed: int) -> Tensor:
        """Random tokens ``[batch, pos]``; the last of the vocabulary, which ends texts, is out."""
        made = np.random.default_rng(seed).integers(0, self.d_vocab - 1, self.shape)
        return torch.from_numpy(made).to(self.device)

    @cached_property
    def tokens(self) -> Tensor:
        """The prompts; of a sweep, the corrupted one."""
        return self.tokens_of(0)

    @cached_property
    def clean(self) -> Tensor:
        """The prompt that is patched from."""
        return self.tokens_of(1)

    @property
    def layer(self) -> int:
        """A middle one."""
        return self.n_layers // 2

    def metric(self, logits: Tensor) -> Tensor:
        """The difference of two logits at the last position, its mean over the batch."""
        a, b = self.answers
        return (logits[:, -1, a] - logits[:, -1, b]).mean()

    def differences(self, logits: Tensor) -> Tensor:
        """The same of every row, from logits ``[row, d_vocab]`` of the last position."""
        a, b = self.answers
        return logits[:, a] - logits[:, b]

    def cells(self, *lengths: int) -> list[tuple[int, ...]]:
        """The cells of a grid that a library runs that takes them one by one."""
        return list(np.ndindex(self.n_layers, *lengths))[:: self.every]


class Run(NamedTuple):
    """A task, made ready."""

    call: Callable[[], Any]
    """What is timed."""
    result: Callable[[Any], Tensor] = lambda x: x
    """What it came to, for comparison with other libraries: not timed."""
    before: Callable[[], Any] = lambda: None
    """What each call needs anew: not timed."""
    every: int = 1
    """It did each ``every``-th cell only."""


class TooLargeError(Exception):
    """The task needs more memory than is given."""


class Library(Protocol):
    """What a file of this folder defines."""

    PACKAGE: str
    TASKS: Mapping[str, Callable[[Any, Given], Run]]

    def load(self, folder: str, device: str) -> Any:
        """The model of a checkpoint's folder, in float32."""

    def convert(self, model: Any, folder: str) -> Any:
        """The library's model, of transformers' model."""


def last(logits: Tensor) -> Tensor:
    """Of ``[batch, pos, d_vocab]`` what is compared."""
    return logits[:, -1]
