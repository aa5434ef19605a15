"""Lending: Hugging Face's own forward owns the loop, and our blocks stand in it.

For models that go over their blocks several times, keep several streams, or hand more from block to
block than a stream. In our copy of the modules a `Slot` stands in the place of every block and
passes each call on to ours; the model it was copied from stays whole. Every *visit* of a block is a
layer of its own here, numbered in the order in which they run: visits share their weights and have
hook points of their own, so that nothing is recorded over.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NoReturn

from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import Cache

from hookedlm.convert import hf
from hookedlm.convert.calling import logits_of, tokens_name
from hookedlm.convert.prepare import (
    OURS,
    BlockCall,
    Call,
    CallRecorder,
    forget_lengths,
    grows,
    own_cache,
    rows_of_positions,
)
from hookedlm.errors import InputError
from hookedlm.layers.context import Context
from hookedlm.layers.lent import LentBlock
from hookedlm.layers.opaque import first


class Slot(CallRecorder):
    """Stands in a block's place in Hugging Face's loop and passes its calls on to ours.

    What the loop asks a block for besides is looked up in the block: while that is opaque, in
    itself.
    """

    def __init__(self, block: nn.Module, loop: LentLoop, returns: int, number: int, opaque: bool):
        super().__init__(block, [], returns, number)
        self.loop = loop
        self.stands_for = [block] if opaque else []  # in a list, so that it is no sub-module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not args:
            args = (kwargs.pop("hidden_states"),)
        return self.loop.visit(self, Call(args[0], args[1:], kwargs))

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            for block in vars(self).get("stands_for", ()):
                return getattr(block, name)
            raise


class Reached(Exception):
    """Everything that was asked for has been computed; carries the stream."""

    def __init__(self, stream: Tensor):
        self.stream = stream


@dataclass
class Pass:
    """One run of the loop."""

    blocks: Sequence[nn.Module]
    cache: Any = None
    past: int = 0
    stop: int | None = None
    embed: Callable[[Tensor], Tensor] | None = None
    visits: Counter[int] = field(default_factory=Counter)
    contexts: dict[int, Context] = field(default_factory=dict)


class LentLoop:
    """Runs Hugging Face's forward over the blocks it is given: a `Preparer` that runs the model.

    ``paths`` are the places of the blocks in Hugging Face's model, ``order`` which of them each
    layer is a visit of.
    """

    reusable = False
    reads_tokens = False
    no_start = ""

    def __init__(self, own: Any, row: Any, paths: Sequence[str], order: Sequence[int]):
        self.module = own
        self.row = row
        self.paths = list(paths)
        self.order = list(order)
        self.layers_of = [[i for i, n in enumerate(order) if n == k] for k in range(len(paths))]
        self.calls: list[BlockCall] = []
        parameters = inspect.signature(own.forward).parameters
        self.accepts = set(parameters)
        self.own_cache = own_cache(parameters.get("past_key_values"))
        self.growing = [m for m in own.modules() if grows(m)]
        self.tokens_name = tokens_name(own)
        self.first_position = 0
        self.remembers = "past_key_values" in self.accepts
        self.no_cache = "its forward takes no past_key_values"
        self.shows_embed = True
        """Whether the input embedding is asked once a pass, so that it can be hooked."""
        self.positions_first = False
        """Whether what the embedding gives is ``[pos, batch, d_model]``."""
        self.no_sum = ""
        """Why the stream is no sum of an embedding and what blocks add; "" if it is."""
        self.now: Pass | None = None
        table = hf.find(own, row.embed) if row.embed else None
        table = table if isinstance(table, nn.Module) else own.get_input_embeddings()
        table.register_forward_hook(self._embedded)

    # Running --------------------------------------------------------------------------------------

    def run(
        self,
        blocks: Sequence[nn.Module],
        *,
        tokens: Int[Tensor, "batch pos"] | None = None,
        embeds: Float[Tensor, "batch pos d_embed"] | None = None,
        attention_mask: Int[Tensor, "batch all_pos"] | None = None,
        position_ids: Int[Tensor, "batch pos"] | None = None,
        cache: Any = None,
        others: Mapping[str, Any] | None = None,
        stop: int | None = None,
        embed: Callable[[Tensor], Tensor] | None = None,
    ) -> tuple[Float[Tensor, "..."], list[Context]]:
        """(logits ``[batch, pos, d_vocab]``, the blocks' contexts); with ``stop`` the stream that
        enters that layer (that leaves the last, for their number) instead of logits.

        ``embed`` is shown the embeddings, and may replace them. Raises InputError on a cache or
        embeddings that this model has no use for.
        """
        self._refuse(embeds, cache)
        position_ids = rows_of_positions(position_ids, tokens if embeds is None else embeds)
        past = 0 if cache is None else hf.length_of(cache)
        if embeds is not None and embed is not None and self.shows_embed:
            embeds = embed(embeds)
        given = {
            self.tokens_name: tokens if embeds is None else None,
            "inputs_embeds": embeds,
            "attention_mask": attention_mask,
            "position_ids": None if position_ids is None else position_ids + self.first_position,
            "past_key_values": cache,
            **(others or {}),
        }
        kwargs = {n: v for n, v in given.items() if v is not None and n in self.accepts}
        if "use_cache" in self.accepts:
            kwargs["use_cache"] = cache is not None
        before, this = self.now, Pass(blocks, cache, past, stop, embed if embeds is None else None)
        self.now = this  # a hook may run the model again
        forget_lengths(self.growing)
        try:
            found = logits_of(self.module(**kwargs))
        except Reached as reached:
            found = reached.stream
        finally:
            self.now = before
        none = Context(skipped=True)
        return found, [this.contexts.get(layer, none) for layer in range(len(self.order))]

    def visit(self, slot: Slot, call: Call) -> Any:
        """One call of a block by the loop."""
        assert self.now is not None, "Hugging Face's loop was run without blocks"
        this, layers = self.now, self.layers_of[slot.layer]
        n = this.visits[slot.layer]
        this.visits[slot.layer] += 1
        if n >= len(layers):
            raise InputError(
                f"{self.paths[slot.layer]} runs {n + 1} times in this pass, but ran {len(layers)} "
                "times when the model was loaded: its hook points are that many"
            )
        layer = layers[n]
        block = this.blocks[layer]
        if layer == this.stop:
            raise Reached(shown(block, call.hidden))
        ctx = this.contexts[layer] = self._context(layer, call, this)
        if isinstance(block, LentBlock):
            out = block.whole(call.hidden, ctx)
        else:
            stream = block(call.hidden, ctx)
            out = (stream, *[None] * (slot.returns - 1)) if slot.returns else stream
        if this.stop == len(self.order) == layer + 1:
            raise Reached(shown(block, first(out)))
        return out

    def _context(self, layer: int, call: Call, this: Pass) -> Context:
        known = self.calls[layer]
        if isinstance(this.blocks[layer], LentBlock):
            return Context(kwargs=known.bound(call))
        ctx = known.context(call, this.past, cached=True)
        kept = [v for v in known.bound(call).values() if isinstance(v, Cache)]
        if this.cache is None or not kept:
            return ctx
        return replace(ctx, remember=partial(_remember, kept[0], layer))

    def _embedded(self, module: nn.Module, args: Any, out: Any) -> Any:
        if self.now is None or self.now.embed is None or not self.shows_embed:
            return None
        if not self.positions_first:
            return self.now.embed(out)
        return self.now.embed(out.transpose(0, 1)).transpose(0, 1).contiguous()

    # What is refused ------------------------------------------------------------------------------

    def _refuse(self, embeds: Tensor | None, cache: Any) -> None:
        name = type(self.module).__name__
        if cache is not None and not self.remembers:
            raise InputError(
                f"{name} can't be continued from a key-value cache here: {self.no_cache}. Run "
                "without one (generate: use_past_kv_cache=False)."
            )
        if cache is not None and self.own_cache and not isinstance(cache, self.own_cache):
            raise InputError(
                f"{name} keeps its past in a {self.own_cache.__name__}, not in a "
                f"{type(cache).__name__}. Pass one of these."
            )
        if embeds is not None and "inputs_embeds" not in self.accepts:
            raise InputError(f"{name} takes no inputs_embeds: give tokens")

    def check(self, names: Iterable[str]) -> None:
        """Raise InputError on inputs that the model does not take, naming those it does."""
        known = sorted(self.accepts - OURS)
        if unknown := sorted(set(names) - set(known)):
            raise InputError(
                f"{', '.join(unknown)}: {type(self.module).__name__} takes, besides tokens or "
                f"inputs_embeds, {', '.join(known) or 'nothing'}"
            )

    def __call__(self, **kwargs: Any) -> NoReturn:
        """Refused: contexts can't be had without running the blocks."""
        raise InputError(
            f"{type(self.module).__name__} runs in Hugging Face's own loop, which embeds and calls "
            "the blocks in one go: use forward, with stop_at_layer or hooks"
        )


def shown(block: nn.Module, stream: Float[Tensor, "..."]) -> Float[Tensor, "batch ..."]:
    """A stream of Hugging Face's as the hooks of a block see it."""
    return block.shown(stream) if isinstance(block, LentBlock) else stream


def _remember(cache: Cache, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return cache.update(k, v, layer)
