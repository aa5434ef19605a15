"""`Metric`: what is read off the logits of a run, one number for each example.

Every metric says which position it reads and, if it reads few, which tokens: patched runs then
unembed no more than that. It is also a function of whole logits, ``metric(logits)``, the mean over
the batch, so that it does wherever a user's own function of logits would.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import FunctionType
from typing import Any, ClassVar, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor
from typing_extensions import Self

from hookedlm.errors import InputError
from hookedlm.patching.readout import ReadOut

Logits: TypeAlias = Float[Tensor, "batch pos d_vocab"]
Function: TypeAlias = Callable[[Logits], Any]
"""A user's own metric: of the logits of one run, one number for the batch."""
Positions: TypeAlias = int | Sequence[int] | Int[Tensor, "batch"]


@dataclass(frozen=True, eq=False)
class Metric(ABC):
    """One number for each example, read at one position.

    ``positions``: a column of the batch for all examples (negative: from the end), or one for each
    (as ragged prompts need).
    """

    NAME: ClassVar[str] = ""
    positions: Positions = field(default=-1, kw_only=True)

    def __post_init__(self) -> None:
        if not isinstance(self.positions, int):
            object.__setattr__(self, "positions", integers("positions", self.positions))

    @property
    def label(self) -> str:
        """What it is called in results and figures."""
        return self.NAME or type(self).__name__

    def tokens(self) -> Int[Tensor, "batch n"] | None:
        """The columns of the vocabulary that are read (one row if all examples have the same);
        None: all."""
        return None

    @abstractmethod
    def per_example(
        self, logits: Float[Tensor, "rows batch n_or_vocab"]
    ) -> Float[Tensor, "rows batch"]:
        """The metric of logits at the position, those of `tokens` alone. Must not wait for the
        device: no ``.item()``, no branch on a tensor's values."""

    def __call__(self, logits: Logits) -> Float[Tensor, ""]:
        """The mean over the batch. Raises InputError on logits that do not fit."""
        return self.of_each(logits).mean()

    def of_each(self, logits: Logits) -> Float[Tensor, "batch"]:
        """Each example's. Raises InputError on logits that do not fit."""
        if logits.ndim != 3:
            raise InputError(f"logits of shape {tuple(logits.shape)}: expected [batch, pos, vocab]")
        n, length, d_vocab = logits.shape
        self.check(n, length, d_vocab)
        here = self.to(logits.device)
        at = here._columns(length)
        examples = slice(None) if isinstance(at, int) else torch.arange(n, device=logits.device)
        read, tokens = logits[examples, at], here.tokens()
        if tokens is not None:
            read = read.gather(-1, tokens.expand(n, -1))
        return here.per_example(wide(read)[None])[0]

    def read(self, out: ReadOut) -> Float[Tensor, "cells batch"]:
        """Of patched runs; the metric must be on their device. Only what it reads is unembedded."""
        base = out.base
        positions, tokens = self._columns(base.length), self.tokens()
        if tokens is not None:
            tokens = tokens.expand(base.n_examples, -1)
            return self.per_example(wide(out.logits_at(positions, tokens)))
        step = out.cells_at_once
        found = [
            self.per_example(wide(out.logits_at(positions, cells=slice(i, i + step))))
            for i in range(0, out.n_cells, step)
        ]
        return torch.cat(found)

    def _columns(self, length: int) -> Any:
        """Positions counted from 0."""
        at: Any = self.positions
        return at % length  # -1 is the last

    def to(self, device: torch.device) -> Self:
        """The metric with its tensors on a device."""
        moved = copy.copy(self)
        for name, value in vars(self).items():
            if isinstance(value, (Tensor, Metric)):
                object.__setattr__(moved, name, value.to(device))
        return moved

    def check(
        self,
        n_examples: int,
        length: int,
        d_vocab: int,
        mask: Int[Tensor, "batch pos"] | None = None,
    ) -> None:
        """Raise InputError unless the metric can be read off runs of this shape: positions and
        tokens must be there, and be no padding."""
        at, tokens = torch.as_tensor(self.positions).cpu(), self.tokens()
        check_range("positions", at, -length, length)
        check_rows(self, "positions", at.numel(), n_examples)
        if tokens is not None:
            check_range("tokens", tokens.cpu(), 0, d_vocab)
            check_rows(self, "answers", len(tokens), n_examples)
        if mask is None:
            return
        read = mask.cpu().gather(1, (at % length).expand(n_examples)[:, None])
        if not bool(read.all()):
            example = int((read[:, 0] == 0).nonzero()[0])
            raise InputError(
                f"{self.label} is read at position {int(at.expand(n_examples)[example])}, which is "
                f"padding in example {example}: give positions, one for each example (for prompts "
                "padded on the right, attention_mask.sum(1) - 1)"
            )


# How sweeps read them -----------------------------------------------------------------------------


def name_of(metric: Metric | Function) -> str:
    """What a metric is called."""
    if isinstance(metric, Metric):
        return metric.label
    return metric.__name__ if isinstance(metric, FunctionType) else type(metric).__name__


def reader(
    metric: Metric | Function, device: torch.device, each_example: bool = False
) -> Callable[[ReadOut, Sequence[int]], Float[Tensor, "cells *batch"]]:
    """What reads a metric off many patched runs: one number for each, the mean over the batch, or
    (``each_example``) each example's.

    A user's function is called once for each run. Raises InputError if it returns other than one
    number (one for each example).
    """
    if isinstance(metric, Metric):
        here = metric.to(device)
        if each_example:
            return lambda out, cells: here.read(out)
        return lambda out, cells: here.read(out).mean(1)

    def read(out: ReadOut, cells: Sequence[int]) -> Tensor:
        n = out.base.n_examples if each_example else None
        return torch.stack([_numbers(metric(out.of_cell(i)), n, device) for i in range(len(cells))])

    return read


def _numbers(answer: Any, n: int | None, device: torch.device) -> Float[Tensor, "*batch"]:
    """What a user's metric returned: one number (``n`` None), or ``n``."""
    found = torch.as_tensor(answer, device=device).detach()
    found = found if found.dtype == torch.float64 and n is not None else found.float()
    if n is None:
        if found.numel() != 1:
            raise InputError(
                f"the patching metric returned {found.numel()} values; expected one number for the "
                "whole batch (take the mean over prompts)"
            )
        return found.reshape(())
    if found.shape != (n,):
        raise InputError(
            f"the metric returned shape {tuple(found.shape)}; with an axis of examples it must "
            f"return one number for each, [{n}]"
        )
    return found


def wide(x: Float[Tensor, "*any"]) -> Float[Tensor, "*any"]:
    """In float32 at least."""
    return x if x.dtype == torch.float64 else x.float()


def integers(what: str, given: Any) -> Int[Tensor, "n"]:
    """One integer for each example; raises InputError on anything else."""
    ids = torch.as_tensor(given)
    if ids.ndim != 1 or ids.is_floating_point() or ids.dtype == torch.bool or not ids.numel():
        raise InputError(f"{what}={given!r}: expected one integer, or one for each example [batch]")
    return ids.long()


def check_range(what: str, given: Int[Tensor, "*any"], low: int, end: int) -> None:
    """Raise InputError unless all are from ``low`` to ``end - 1``."""
    first, last = int(given.min()), int(given.max())
    if first < low or last >= end:
        bad = first if first < low else last
        raise InputError(f"{what}: {bad} is out of range; there are {low} to {end - 1}")


def check_rows(metric: Metric, what: str, n: int, n_examples: int) -> None:
    """Raise InputError unless there is one for all examples, or one for each."""
    if n not in (1, n_examples):
        raise InputError(f"{metric.label}: {n} {what} for a batch of {n_examples}")
