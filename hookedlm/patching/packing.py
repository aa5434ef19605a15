"""Packing: runs that begin at positions of their own, one behind the other along one row.

A patched run computes the positions from its first patched one on. Norms, projections and MLPs look
at one position at a time, so that runs of all lengths pass them as one long row; only attention is
called with a row for each run, whose earlier keys and values are the base run's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from hookedlm.layers import attention_math as math
from hookedlm.layers.context import Context

if TYPE_CHECKING:
    from hookedlm.patching.base_run import BaseRun

Row = Float[Tensor, "1 token ..."]
"""Positions of runs, one run behind the other: "tokens"."""
Attend = Callable[[Tensor, Tensor, Tensor, Context], Float[Tensor, "batch pos head d_head"]]


def on_device(numbers: Any, device: torch.device) -> Int[Tensor, "..."]:
    """Integers; from pinned memory, so that nobody waits for a CUDA device."""
    made = torch.as_tensor(np.asarray(numbers, dtype=np.int64))
    return made if device.type != "cuda" else made.pin_memory().to(device, non_blocking=True)


class Pack:
    """The runs of some cells, each with all examples: where their tokens lie.

    ``ends[run]``: where the tokens of the runs before it end. By token: ``home``, its place among
    the base run's tokens ``[batch * pos]``; ``place``, its place in a rectangle ``[run, pos]``, and
    ``query_place`` in one of the positions from ``first`` on, at which the earliest run begins.
    """

    def __init__(self, base: BaseRun, starts: Sequence[int]):
        n, length = base.n_examples, base.length
        device = base.entering[0].device
        self.base, self.first = base, min(starts)
        self.even = max(starts) == self.first
        start, example = np.repeat(starts, n), np.tile(np.arange(n), len(starts))
        ends = np.concatenate([[0], np.cumsum(length - start)])
        run = np.repeat(np.arange(len(start)), length - start)
        pos = np.arange(ends[-1]) - (ends[:-1] - start)[run]
        self.ends: list[int] = ends.tolist()
        self.home = on_device(example[run] * length + pos, device)
        self.place = on_device(run * length + pos, device)
        self.query_place = on_device(run * (length - self.first) + pos - self.first, device)
        self.starts, self.examples = on_device(start, device), on_device(example, device)
        self.lead = on_device(ends[:-1] - start, device)
        """By run: where its position 0 would be."""
        self._tables: dict[int, Tensor] = {}

    def tokens(self, runs: int | Tensor, positions: Tensor) -> Int[Tensor, "..."]:
        """Where positions of runs are; those before a run's first are taken for its first."""
        return self.lead[runs] + torch.maximum(positions, self.starts[runs])

    def entering(self, x: Float[Tensor, "batch pos ..."], first: int, end: int) -> Row:
        """Of a tensor of the base run, the tokens of these runs."""
        home = self.home[self.ends[first] : self.ends[end]]
        return x.flatten(0, 1).index_select(0, home)[None]

    def table(self, x: Float[Tensor, "#batch pos ..."], n_tokens: int) -> Row:
        """Of what a block is given by position, the first tokens'."""
        if id(x) not in self._tables:
            self._tables[id(x)] = self.entering(
                x.expand(self.base.n_examples, *x.shape[1:]), 0, len(self.ends) - 1
            )
        return self._tables[id(x)][:, :n_tokens]

    def rows(self, x: Float[Tensor, "#batch ..."], first: int, end: int) -> Tensor:
        """Of a tensor of the base prompts, each run's."""
        if len(x) == 1:
            return x.expand(end - first, *x.shape[1:])
        return x.index_select(0, self.examples[first:end])


@dataclass
class Step:
    """One block's call: ``n_in`` runs go in; up to ``n_out`` join them behind attention, at which
    they are the base run still. With ``reads`` (a position, or each example's own), of the first
    ``n_read`` runs only this position goes on from attention."""

    pack: Pack
    layer: int
    n_in: int
    n_out: int
    reads: int | Int[Tensor, "batch"] | None = None
    n_read: int = 0

    def __post_init__(self) -> None:
        pack, device = self.pack, self.pack.home.device
        self.kept_tokens: Tensor | None = None
        if self.reads is None:
            return
        runs = torch.arange(self.n_read, device=device)
        read = pack.tokens(runs, self.positions_read())
        others = torch.arange(pack.ends[self.n_read], pack.ends[self.n_in], device=device)
        self.kept_tokens = torch.cat([read, others])

    def positions_read(self) -> Int[Tensor, "run"]:
        """Of each of the first runs."""
        starts, reads = self.pack.starts[: self.n_read], self.reads
        if isinstance(reads, Tensor):
            return reads[self.pack.examples[: self.n_read]]
        assert reads is not None
        return torch.full_like(starts, reads)

    def context(self, ctx: Context) -> Context:
        """What the block is called with, from what it had in the base run."""
        pack, n_tokens = self.pack, self.pack.ends[self.n_in]
        rotary, given = ctx.rotary, ctx.layer_input
        if rotary is not None:
            rotary = tuple(pack.table(x, n_tokens) for x in rotary)
        if given is not None:
            end = pack.ends[self.n_out]
            given = pack.table(given, end)
            if self.kept_tokens is not None:
                others = torch.arange(n_tokens, end, device=given.device)
                given = given.index_select(1, torch.cat([self.kept_tokens, others]))
        changes: dict[str, Any] = {"rotary": rotary, "layer_input": given, "remember": None}
        return replace(ctx, packed=self, **changes)

    # What blocks ask (`hookedlm.layers.context.Packed`) ----------------------------------------

    def kept(self, x: Row) -> Row:
        """What goes on from attention, of what went into it."""
        return x if self.kept_tokens is None else x.index_select(1, self.kept_tokens)

    def onward(self, stream: Row) -> Row:
        """The stream that attention is added to."""
        return self._joined(self.kept(stream), self.pack.base.entering[self.layer])

    def joined(self, z: Row) -> Row:
        """What attention hands on, with that of the runs which join behind it."""
        if self.n_out == self.n_in:
            return z
        return self._joined(z, self.pack.base.seen[f"blocks.{self.layer}.attn.hook_z"])

    def _joined(self, x: Row, of_base: Float[Tensor, "batch pos ..."]) -> Row:
        if self.n_out == self.n_in:
            return x
        return torch.cat([x, self.pack.entering(of_base, self.n_in, self.n_out)], dim=1)

    def attend(self, attend: Attend, q: Tensor, k: Tensor, v: Tensor, ctx: Context) -> Row:
        """Attention of queries, keys and values ``[1, head, token, d]``, a row for each run."""
        q, k, v = (x.transpose(1, 2)[0] for x in (q, k, v))
        whole = self.n_read if self.reads is not None else 0
        parts = []
        if whole:
            parts.append(self._attended(attend, q, k, v, ctx, 0, whole, self.reads))
        if whole < self.n_in:
            parts.append(self._attended(attend, q, k, v, ctx, whole, self.n_in))
        return (parts[0] if len(parts) == 1 else torch.cat(parts))[None]

    # A row for each run ------------------------------------------------------------------------

    def _attended(
        self, attend: Attend, q: Tensor, k: Tensor, v: Tensor, ctx: Context,
        first: int, end: int, reads: int | Tensor | None = None,
    ) -> Float[Tensor, "token head d_head"]:  # fmt: skip
        """Of the runs from ``first`` on, all tokens or the one that is read."""
        pack, n_runs, length = self.pack, end - first, self.pack.base.length
        tokens = slice(pack.ends[first], pack.ends[end])
        known_k, known_v = pack.base.keys[self.layer]
        k = self._rows(k[tokens], known_k, first, end)
        v = self._rows(v[tokens], known_v, first, end)
        begin = max(pack.first, reads) if isinstance(reads, int) else pack.first
        if reads is not None and begin == length - 1:
            assert self.kept_tokens is not None
            q = q.index_select(0, self.kept_tokens[:n_runs])[:, None]
        else:
            q = self._queries(q[tokens], first, end)[:, begin - pack.first :]
        ctx = self._for_rows(ctx, q, first, end)
        z = attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), ctx)
        if reads is None:
            z = z.flatten(0, 1)
            return z if pack.even else z.index_select(0, self._query_places(first, end))
        if z.shape[1] == 1:
            return z[:, 0]
        at = (self.positions_read() - begin).clamp(min=0)
        return z[torch.arange(n_runs, device=z.device), at]

    def _query_places(self, first: int, end: int) -> Int[Tensor, "token"]:
        pack = self.pack
        here = pack.query_place[pack.ends[first] : pack.ends[end]]
        return here - first * (pack.base.length - pack.first)

    def _queries(
        self, x: Float[Tensor, "token head d"], first: int, end: int
    ) -> Float[Tensor, "run pos head d"]:
        """Each run's, at the positions from the pack's first on."""
        n_runs, n_pos = end - first, self.pack.base.length - self.pack.first
        if self.pack.even:
            return x.unflatten(0, (n_runs, n_pos))
        rows = x.new_zeros(n_runs * n_pos, *x.shape[1:])
        rows.index_copy_(0, self._query_places(first, end), x)
        return rows.unflatten(0, (n_runs, n_pos))

    def _rows(
        self, x: Float[Tensor, "token head d"], known: Tensor, first: int, end: int
    ) -> Float[Tensor, "run pos head d"]:
        """Each run's keys or values at all positions; earlier ones are the base run's."""
        pack, length = self.pack, self.pack.base.length
        n_runs, start = end - first, self.pack.first
        if pack.even:
            x = x.unflatten(0, (n_runs, length - start))
            return torch.cat([pack.rows(known[:, :start], first, end), x], dim=1) if start else x
        rows = pack.rows(known, first, end).contiguous()
        place = pack.place[pack.ends[first] : pack.ends[end]] - first * length
        rows.view(-1, *x.shape[1:]).index_copy_(0, place, x)
        return rows

    def _for_rows(self, ctx: Context, q: Tensor, first: int, end: int) -> Context:
        """Masks and biases of these runs, for queries ``[run, pos, head, d_head]``."""
        n_query, length = q.shape[1], self.pack.base.length
        changes: dict[str, Any] = {"packed": None}
        for name, dim in (("mask", -2), ("bias", -2), ("temperature", 2)):
            x = vars(ctx)[name]
            if x is not None:
                if x.shape[dim] > n_query:
                    x = x.narrow(dim, x.shape[dim] - n_query, n_query)
                changes[name] = x if len(x) == 1 else self.pack.rows(x, first, end)
        if ctx.mask is None and 1 < n_query < length:
            changes["mask"] = math.causal_mask(n_query, length, q.device)
        return replace(ctx, **changes)


def packs(context: Context, n_examples: int, length: int) -> bool:
    """Whether a block's context is known by position and example, as packing needs it."""
    by_position = [*(context.rotary or ()), context.layer_input]
    by_example = [context.mask, context.bias, context.temperature, *by_position]
    sized = all(x.shape[0] in (1, n_examples) for x in by_example if x is not None)
    return sized and all(x.ndim > 2 and x.shape[1] == length for x in by_position if x is not None)
