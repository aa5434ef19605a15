"""Prepare: Hugging Face's own code makes masks, rotary tables and the rest, for blocks we drive.

A copy of the base model whose blocks are recorders is run on the embeddings; what each recorder was
called with becomes that layer's `Context`. Nothing about masks or positions is written twice.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import Cache

from hookedlm.convert import hf
from hookedlm.errors import InputError
from hookedlm.families.row import Row
from hookedlm.layers.context import Context


@dataclass
class Call:
    """How Hugging Face called one of its blocks: the stream, and everything else."""

    hidden: Tensor
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class CallRecorder(nn.Module):
    """Stands in a block's place, writes down how it is called and passes the stream on.

    ``returns``: the length of the tuple the block returns, 0 if it returns the stream itself.
    """

    def __init__(self, block: nn.Module, calls: list[Call], returns: int):
        super().__init__()
        own = [
            vars(kind) for kind in reversed(type(block).__mro__) if kind not in nn.Module.__mro__
        ]
        for names in (*own, vars(block)):  # loops ask their blocks things like `attention_type`
            plain = {n: v for n, v in names.items() if not n.startswith("_") and _harmless(v)}
            self.__dict__.update(plain)
        self.calls = calls
        self.returns = returns
        self.substitute: Tensor | None = None

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        self.calls.append(Call(hidden, args, kwargs))
        hidden = hidden if self.substitute is None else self.substitute
        return (hidden, *[None] * (self.returns - 1)) if self.returns else hidden


def _harmless(value: Any) -> bool:
    return value is None or isinstance(value, (bool, int, float, str, tuple))


@dataclass
class BlockCall:
    """What must be known of one block to read its calls."""

    names: tuple[str, ...]
    """Names of the block's parameters after the stream, in order."""
    opaque: bool
    """Whether a part of it needs Hugging Face's arguments."""
    mask_hides: bool = False
    bias: str | None = None
    n_heads: int = 0
    rotary: str | None = None
    attn: nn.Module | None = None
    mask_table: Tensor | None = None

    def bound(self, call: Call) -> dict[str, Any]:
        """All arguments by name."""
        return {**dict(zip(self.names, call.args, strict=False)), **call.kwargs}

    def context(self, call: Call, past: int, cached: bool = False) -> Context:
        """The uniform layer's view of a call. ``past`` is the number of cached positions; a cache
        that nobody gave (some families make one unasked) is not kept between runs."""
        values = self.bound(call)
        if not cached:
            values = {n: None if isinstance(v, Cache) else v for n, v in values.items()}
        n_query = call.hidden.shape[1]
        given = values.get("attention_mask")  # some families hand on a mask for every kind of layer
        mask = self._mask(given if isinstance(given, Tensor) else None, n_query, past)
        return Context(
            mask=mask,
            bias=self._bias(values, n_query + past if mask is None else mask.shape[-1]),
            rotary=self._rotary(values, call.hidden),
            kwargs=values if self.opaque else {},
        )

    def _mask(self, mask: Tensor | None, n_query: int, past: int) -> Tensor | None:
        if mask is not None and mask.dtype == torch.bool and self.mask_hides:
            mask = ~mask
        if self.mask_table is None:
            return mask
        n_key = n_query + past if mask is None else mask.shape[-1]
        table = self.mask_table[:, :, n_key - n_query : n_key, :n_key]
        if mask is None:
            return table
        if mask.dtype == torch.bool:
            return mask & table
        return mask.masked_fill(~table, torch.finfo(mask.dtype).min)

    def _bias(self, values: dict[str, Any], n_key: int) -> Tensor | None:
        if self.bias is None or values.get(self.bias) is None:
            return None
        bias = values[self.bias]
        return bias.reshape(-1, self.n_heads, bias.shape[-2], bias.shape[-1])[..., -n_key:]

    def _rotary(self, values: dict[str, Any], hidden: Tensor) -> tuple[Tensor, ...] | None:
        if self.rotary == "pairs":
            assert self.attn is not None
            return hf.pair_tables(self.attn, values["position_ids"], hidden.dtype)
        tables = values.get("position_embeddings")
        return None if self.rotary is None or tables is None else tuple(tables)


@dataclass
class Prepared:
    """A pass made ready: the contexts, and the stream as Hugging Face's own embedding made it."""

    contexts: list[Context] = field(default_factory=list)
    stream: Float[Tensor, "batch pos d_model"] | None = None


class HFPreparer:
    """Runs the base model over recorders. Its module is ours, moved and cast with the weights."""

    def __init__(self, base: nn.Module, row: Row, calls: list[Call], blocks: Sequence[BlockCall]):
        self.module = base
        self.row = row
        self.calls = calls
        self.blocks = list(blocks)
        parameters = inspect.signature(base.forward).parameters
        self.accepts = set(parameters)
        self.anything = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        self.reusable = not any(block.opaque for block in self.blocks)
        self.remembers = "past_key_values" in self.accepts
        self.growing = [m for m in base.modules() if "original_inv_freq" in m._buffers]

    def __call__(
        self,
        *,
        tokens: Int[Tensor, "batch pos"] | None = None,
        embeds: Float[Tensor, "batch pos d_model"] | None = None,
        attention_mask: Int[Tensor, "batch all_pos"] | None = None,
        position_ids: Int[Tensor, "batch pos"] | None = None,
        cache: Any = None,
    ) -> Prepared:
        """Contexts for one pass over tokens, or over embeddings (or any stream) of that shape."""
        if cache is not None and not self.remembers:
            raise InputError(
                f"{type(self.module).__name__} keeps no past in a transformers Cache. Run without "
                "one (generate: use_past_kv_cache=False)."
            )
        past = 0 if cache is None else int(cache.get_seq_length())
        given = {
            "input_ids": tokens,
            "inputs_embeds": embeds,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "past_key_values": cache,
        }
        kwargs = {n: v for n, v in given.items() if v is not None and n in self.accepts}
        if "use_cache" in self.accepts:
            kwargs["use_cache"] = cache is not None
        self.calls.clear()
        self._forget_lengths()
        try:
            self.module(**kwargs)
            contexts = [
                block.context(call, past, cache is not None)
                for block, call in zip(self.blocks, self.calls, strict=False)
            ]
            if len(contexts) != len(self.blocks):
                raise RuntimeError(
                    f"{type(self.module).__name__} called {len(contexts)} of "
                    f"{len(self.blocks)} blocks"
                )
            return Prepared(contexts, self.calls[0].hidden)
        finally:
            self.calls.clear()

    def _forget_lengths(self) -> None:
        """Rotary tables that grow with the longest prompt seen start afresh: what a prompt gives
        must not depend on the prompts before it."""
        for rotary in self.growing:
            rotary.inv_freq = rotary.original_inv_freq
            rotary.max_seq_len_cached = rotary.original_max_seq_len
