"""Reading out: the logits of many patched runs, computed where a metric reads them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hookedlm.patching.base_run import BaseRun
from hookedlm.patching.lazy_logits import LazyLogits
from hookedlm.patching.packing import on_device

Logits = Float[Tensor, "batch pos d_vocab"]

LOGITS_AT_ONCE = 2**25
"""How many logits are computed at a time where all of the vocabulary is read."""


class Runs(Protocol):
    """Runs whose last block waits to be told what is read of it (`hookedlm.patching.packed`)."""

    def at(self, positions: int | Int[Tensor, "batch"]) -> Float[Tensor, "cells batch d_model"]:
        """The last stream of every cell at a position, or at each example's own."""
        ...

    def whole(self) -> Float[Tensor, "rows pos d_model"]:
        """The last stream of every cell at all positions."""
        ...


class ReadOut:
    """What a batch of cells came to: their last stream, runs that still have to end, or logits."""

    def __init__(
        self,
        base: BaseRun,
        n_cells: int,
        *,
        stream: Float[Tensor, "rows pos d_model"] | None = None,
        logits: Float[Tensor, "rows pos d_vocab"] | None = None,
        runs: Runs | None = None,
    ):
        self.base, self.n_cells = base, n_cells
        self._stream, self._logits, self._runs = stream, logits, runs
        self._ends: dict[int, Float[Tensor, "cells batch d_model"]] = {}
        self._columns: dict[Any, Sequence[Float[Tensor, "batch *n"]]] = {}
        self._read: dict[int, tuple[int, Float[Tensor, "cells batch d_vocab"]]] = {}

    @property
    def cells_at_once(self) -> int:
        """Of how many cells all logits of a position are to be held at a time."""
        return max(1, LOGITS_AT_ONCE // (self.base.n_examples * self.base.model.cfg.d_vocab))

    # One cell after the other, for a user's own metric --------------------------------------------

    def of_cell(self, cell: int) -> Logits:
        """Logits as one run of that cell gives them; they are computed where they are looked at."""
        if self._logits is not None:
            n = self.base.n_examples
            return self._logits[cell * n : (cell + 1) * n]
        return LazyLogits(self, cell)

    def columns_of_cell(
        self, cell: int, pos: int, tokens: int | tuple[int, ...]
    ) -> Float[Tensor, "batch *n"]:
        """The logits of a token, or several, at a position; all cells' are computed at once."""
        key = pos, tokens
        if key not in self._columns:
            few = [tokens] if isinstance(tokens, int) else tokens
            ids = on_device(few, self.base.tokens.device)
            at = self.logits_at(pos, ids.expand(self.base.n_examples, -1))
            self._columns[key] = (at[..., 0] if isinstance(tokens, int) else at).unbind()
        return self._columns[key][cell]

    def row_of_cell(self, cell: int, pos: int) -> Float[Tensor, "batch d_vocab"]:
        """The logits of a cell at a position, computed with its neighbours': whoever reads one will
        read the others."""
        size = self.cells_at_once
        first = cell - cell % size
        if self._read.get(pos, (-1,))[0] != first:
            stream = self.stream_at(pos)[first : first + size]
            self._read[pos] = (first, self._logits_of(stream))
        return self._read[pos][1][cell - first]

    # All cells at once ----------------------------------------------------------------------------

    def stream_at(
        self, positions: int | Int[Tensor, "batch"]
    ) -> Float[Tensor, "cells batch d_model"]:
        """The last stream of every cell at a position, counted from 0; for every example at its own
        if there are several."""
        if self._runs is not None and self._stream is None:
            if not isinstance(positions, int):
                return self._runs.at(positions)
            if positions in self._ends or not self._ends:
                if positions not in self._ends:
                    self._ends[positions] = self._runs.at(positions)
                return self._ends[positions]
            self._stream = self._runs.whole()  # who reads a second position may read all of them
        assert self._stream is not None
        stream = self._stream.unflatten(0, (self.n_cells, self.base.n_examples))
        if isinstance(positions, int):
            return stream[:, :, positions]
        return stream[:, torch.arange(self.base.n_examples, device=stream.device), positions]

    def logits_at(
        self,
        positions: int | Int[Tensor, "batch"],
        tokens: Int[Tensor, "batch n"] | None = None,
        cells: slice = slice(None),
    ) -> Float[Tensor, "cells batch n_or_vocab"]:
        """Logits of every cell (or some) at a position (see `stream_at`): all, or of these tokens
        for every example."""
        base = self.base
        if self._logits is None:
            return self._logits_of(self.stream_at(positions)[cells], tokens)
        logits = self._logits.unflatten(0, (self.n_cells, base.n_examples))[cells]
        examples = torch.arange(base.n_examples, device=logits.device)
        at = logits[:, examples, positions]
        if tokens is None:
            return at
        return at.gather(-1, tokens[None].expand(len(at), -1, -1))

    def _logits_of(
        self, stream: Float[Tensor, "cells batch d_model"], tokens: Tensor | None = None
    ) -> Float[Tensor, "cells batch n_or_vocab"]:
        model = self.base.model
        x = stream if model.ln_final is None else model.ln_final(stream)
        x = model.mlm_head(x) if model._head_points else x
        assert model.unembed is not None
        return model.unembed(x) if tokens is None else model.unembed.of_tokens(x, tokens)
