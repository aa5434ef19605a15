"""Loops that are no list of blocks on one stream, made into one: in our copy of the modules only.

Some families keep the parts of their layers in parallel lists; some pass two streams from layer to
layer. Here each layer becomes one block on one stream, which Hugging Face's own loop runs in the
place of what it ran before; `check_assembled` compares the logits with the original's.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from hookedlm.convert import hf
from hookedlm.families.row import Row

Stream = Float[Tensor, "batch pos d_model"]


def assemble(own: Any, row: Row) -> None:
    """Give ``own`` the list of blocks that ``row`` names, if its class has none."""
    if row.parallel_lists:
        _join_lists(own, row)
    if row.two_streams:
        _join_streams(own, row)
    if row.entry_norm:
        norm, table = hf.at(own, str(row.entry_norm)), hf.at(own, row.embed)
        hf.replace_at(own, row.embed, NormedTable(table, norm))
        hf.replace_at(own, str(row.entry_norm), nn.Identity())


class NormedTable(nn.Module):
    """A table of tokens and the norm behind it."""

    def __init__(self, table: nn.Embedding, norm: nn.Module):
        super().__init__()
        self.weight = table.weight
        self.norm = norm

    def forward(self, tokens: Int[Tensor, "batch pos"]) -> Stream:
        return self.norm(F.embedding(tokens, self.weight))


# Parts in parallel lists --------------------------------------------------------------------------


class JoinedBlock(nn.Module):
    """One of each list: attention, a norm of the stream, an MLP, a norm of the stream."""

    def __init__(self, parts: Mapping[str, nn.Module]):
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(
        self, hidden_states: Stream, attention_mask: Tensor, given_mask: Tensor | None = None
    ) -> Stream:
        parts: dict[str, Any] = dict(self.named_children())
        attn_out = parts["attn"](hidden_states, given_mask)[0]
        mid = parts["ln1"](hidden_states + attn_out)
        return parts["ln2"](mid + parts["mlp"](mid))


class _Runs(nn.Module):
    """Where attention was: runs the whole block, keeps its stream for `_Yields`, adds nothing."""

    def __init__(self, home: nn.Module, layer: int):
        super().__init__()
        self.home = (home,)  # in a tuple, so that it is no sub-module
        self.layer = layer
        self.stream: Tensor | None = None

    def forward(self, hidden: Stream, mask: Tensor, *args: Any, **kwargs: Any) -> tuple[Stream]:
        allowed = mask.bool()[:, None, None] if mask.ndim == 2 else mask.bool()[:, None]
        block = self.home[0].get_submodule(f"blocks.{self.layer}")
        self.stream = block(hidden, allowed, mask)
        return (torch.zeros_like(hidden),)


class _Yields(nn.Module):
    """Where the last norm was: the stream that the block made (its own: loops write into it)."""

    def __init__(self, runs: _Runs):
        super().__init__()
        self.runs = (runs,)

    def forward(self, hidden: Stream) -> Stream:
        stream, self.runs[0].stream = self.runs[0].stream, None
        assert stream is not None, "a norm was asked for the stream of a block that did not run"
        return stream.clone()


class _Zero(nn.Module):
    """Where an MLP was: it adds nothing."""

    def forward(self, hidden: Stream) -> Stream:
        return torch.zeros_like(hidden)


def _join_lists(own: Any, row: Row) -> None:
    base = hf.at(own, row.base)
    lists = {name: hf.at(own, place) for name, place in row.parallel_lists.items()}
    layers = range(len(lists["attn"]))
    base.blocks = nn.ModuleList(
        JoinedBlock({name: parts[layer] for name, parts in lists.items()}) for layer in layers
    )
    runs = [_Runs(base, layer) for layer in layers]
    stand_ins: dict[str, list[Any]] = {
        "attn": runs,
        "ln1": [nn.Identity() for _ in layers],
        "mlp": [_Zero() for _ in layers],
        "ln2": [_Yields(run) for run in runs],
    }
    for name, modules in stand_ins.items():
        hf.replace_at(own, row.parallel_lists[name], nn.ModuleList(modules))


# Two streams --------------------------------------------------------------------------------------


class PairBlock(nn.Module):
    """A layer of a reversible network (arXiv 2001.04451), its two streams side by side in one."""

    def __init__(self, layer: nn.Module, names: tuple[str, str]):
        super().__init__()
        self.layer = layer
        self.names = names

    def forward(self, hidden_states: Stream, **kwargs: Any) -> Stream:
        streams = dict(zip(self.names, hidden_states.chunk(2, dim=-1), strict=True))
        out = self.layer(**streams, **kwargs)
        return torch.cat([out.attn_output, out.hidden_states], dim=-1)


class _Splits(nn.Module):
    """In the loop: joins the streams for the block, and parts what comes back."""

    def __init__(self, home: nn.Module, layer: int, names: tuple[str, str]):
        super().__init__()
        self.home = (home,)
        self.layer = layer
        self.names = names

    def forward(self, **kwargs: Any) -> SimpleNamespace:
        streams = [kwargs.pop(name) for name in self.names]
        block = self.home[0].get_submodule(f"blocks.{self.layer}")
        first, second = block(torch.cat(streams, dim=-1), **kwargs).chunk(2, dim=-1)
        nothing = {"buckets": None, "attention_probs": None}
        return SimpleNamespace(attn_output=first, hidden_states=second, **nothing)


def _join_streams(own: Any, row: Row) -> None:
    place, *names = row.two_streams
    pair = (names[0], names[1])
    base, layers = hf.at(own, row.base), hf.at(own, place)
    base.blocks = nn.ModuleList(PairBlock(layer, pair) for layer in layers)
    splits = nn.ModuleList(_Splits(base, i, pair) for i in range(len(layers)))
    hf.replace_at(own, place, splits)
