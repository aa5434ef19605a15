"""Prepare: Hugging Face's own code makes masks, rotary tables and the rest, for blocks we drive.

A copy of the base model whose blocks are recorders is run on the embeddings; what each recorder was
called with becomes that layer's `Context`. Nothing about masks or positions is written twice.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from hookedlm.convert import hf
from hookedlm.convert.calling import first_argument, tokens_name
from hookedlm.convert.temperature import Temperature
from hookedlm.errors import InputError, UnknownInputError
from hookedlm.families.row import Row
from hookedlm.layers.context import Context


@dataclass
class Call:
    """How Hugging Face called one of its blocks: the stream, and everything else."""

    hidden: Tensor
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    layer: int = 0


class CallRecorder(nn.Module):
    """Stands in a block's place, writes down how it is called and passes the stream on.

    ``returns``: the length of the tuple the block returns, 0 if it returns the stream itself.
    """

    def __init__(self, block: nn.Module, calls: list[Call], returns: int, layer: int = 0):
        super().__init__()
        own = [
            vars(kind) for kind in reversed(type(block).__mro__) if kind not in nn.Module.__mro__
        ]
        for names in (*own, vars(block)):  # loops ask their blocks things like `attention_type`
            plain = {n: v for n, v in names.items() if not n.startswith("_") and _harmless(v)}
            self.__dict__.update(plain)
        self.calls = calls
        self.returns = returns
        self.layer = layer
        self.first = first_argument(block)
        self.substitute: Tensor | None = None

    def forward(self, *given: Any, **kwargs: Any) -> Any:
        hidden, *args = given if given else (kwargs.pop(self.first),)
        self.calls.append(Call(hidden, tuple(args), kwargs, self.layer))
        hidden = hidden if self.substitute is None else self.substitute
        return (hidden, *[None] * (self.returns - 1)) if self.returns else hidden

    def show(self, block: nn.Module, places: tuple[str, ...]) -> None:
        """Have these parts and values of the block, which the loop looks at."""
        for place in places:
            *parents, name = place.split(".")
            here: nn.Module = self
            for parent in parents:
                here.add_module(parent, nn.Module())
                here = here.get_submodule(parent)
            found = hf.at(block, place)
            if isinstance(found, nn.Module):
                here.add_module(name, found)
            else:
                setattr(here, name, found)


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
    table_is_causal: bool = False
    tables_given: str = "position_embeddings"
    tables: nn.Module | None = None
    """What computes this layer's rotary tables, where the model's loop does not."""
    temperature: Temperature | None = None
    picks: str | None = None
    """What the block calls the keys that an earlier one picked, where such picking is ours."""
    may_skip: bool = False
    """Whether a pass may go around the block."""

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
        tempered, kept = self.temperature, values.get("shared_kv_states")
        return Context(
            mask=mask,
            temperature=None if tempered is None else tempered(values, call.hidden, past),
            bias=self._bias(values, n_query + past if mask is None else mask.shape[-1]),
            rotary=self._rotary(values, call.hidden),
            layer_input=values.get("per_layer_input"),
            shared_keys=kept if isinstance(kept, MutableMapping) else None,
            handed=self._handed(values),
            kwargs=values if self.opaque else {},
        )

    def _handed(self, values: dict[str, Any]) -> dict[str, Tensor] | None:
        """What an earlier block handed on, taken out of the arguments."""
        if self.picks is None:
            return None
        picks = values.pop(self.picks, None)
        return {} if picks is None else {"picks": picks}

    def _mask(self, mask: Tensor | None, n_query: int, past: int) -> Tensor | None:
        if mask is not None and mask.dtype == torch.bool and self.mask_hides:
            mask = ~mask
        told = mask is None or mask.shape[-2] == n_query  # a mask of keys alone is not causal
        if self.mask_table is None or (self.table_is_causal and told):
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
        if self.tables is not None:
            return tuple(self.tables(hidden, values["position_ids"]))
        tables = values.get(self.tables_given)
        if self.rotary is None or tables is None:
            return None
        return (tables,) if isinstance(tables, Tensor) else tuple(tables)


@dataclass
class Prepared:
    """A pass made ready: the contexts, and the stream as Hugging Face's own embedding made it."""

    contexts: list[Context] = field(default_factory=list)
    stream: Float[Tensor, "batch pos d_model"] | None = None


def _handing(contexts: list[Context]) -> list[Context]:
    """Contexts of one pass: what one layer hands on, later ones find."""
    if all(context.handed is None for context in contexts):
        return contexts
    handed: dict[str, Tensor] = {}
    return [c if c.handed is None else replace(c, handed=handed) for c in contexts]


OURS = {
    "input_ids", "inputs_embeds", "attention_mask", "past_key_values", "use_cache", "labels",
    "kwargs", "return_dict", "output_attentions", "output_hidden_states", "logits_to_keep",
}  # fmt: skip
"""What a base may take that is given to it here, or that asks for another output."""


def grows(module: nn.Module) -> bool:
    """Whether a module's rotary tables follow the longest prompt seen."""
    return "original_inv_freq" in module._buffers and "original_max_seq_len" in vars(module)


class HFPreparer:
    """Runs the base model over recorders. Its module is ours, moved and cast with the weights."""

    def __init__(self, base: nn.Module, row: Row, calls: list[Call], blocks: Sequence[BlockCall]):
        self.module = base
        self.row = row
        self.calls = calls
        self.blocks = list(blocks)
        parameters = inspect.signature(base.forward).parameters
        self.accepts = set(parameters)
        self.tokens_name = tokens_name(base)
        self.masks = isinstance(base, PreTrainedModel) or "attention_mask" in parameters
        """Whether padding on the left can be hidden from the base, or is transformers' business."""
        self.anything = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        self.reads_tokens = bool(row.token_inputs)
        """Whether layers are told of the tokens, beside the stream."""
        self.reusable = not (row.token_inputs or any(block.opaque for block in self.blocks))
        self.remembers = "past_key_values" in self.accepts
        self.own_cache = own_cache(parameters.get("past_key_values"))
        self.no_start = ""
        """Why a pass can't start behind block 0; "" if it can."""
        self.first_position = 0
        """The id of the first position, where this family's own numbering starts behind padding."""
        self.growing = [m for m in base.modules() if grows(m)]

    def __call__(
        self,
        *,
        tokens: Int[Tensor, "batch pos"] | None = None,
        embeds: Float[Tensor, "batch pos d_model"] | None = None,
        attention_mask: Int[Tensor, "batch all_pos"] | None = None,
        position_ids: Int[Tensor, "batch pos"] | None = None,
        cache: Any = None,
        others: Mapping[str, Any] | None = None,
    ) -> Prepared:
        """Contexts for one pass over tokens, or over embeddings (or any stream) of that shape.

        ``others``: what else the base's forward takes, by its names (an image, where images are).
        """
        if cache is not None and not self.remembers:
            raise InputError(
                f"{type(self.module).__name__} keeps no past in a transformers Cache. Run without "
                "one (generate: use_past_kv_cache=False)."
            )
        if cache is not None and self.own_cache and not isinstance(cache, self.own_cache):
            raise InputError(
                f"{type(self.module).__name__} keeps its past in a {self.own_cache.__name__}, not "
                f"in a {type(cache).__name__}. Pass one of these."
            )
        self._check_padding(attention_mask)
        past = 0 if cache is None else hf.length_of(cache)
        position_ids = rows_of_positions(position_ids, tokens if embeds is None else embeds)
        position_ids = self._behind_images(position_ids, past, others)
        told = others or {}
        if self.row.token_inputs and embeds is not None:
            told = {**self._of_tokens(tokens, others), **told}
            tokens = None
        given = {
            self.tokens_name: self._some_tokens(tokens, embeds),
            "inputs_embeds": None if embeds is None else embeds.clone(),  # CTRL scales it in place
            "attention_mask": attention_mask,
            "position_ids": None if position_ids is None else position_ids + self.first_position,
            "past_key_values": cache,
            **told,
        }
        kwargs = {n: v for n, v in given.items() if v is not None and n in self.accepts}
        if "use_cache" in self.accepts:
            kwargs["use_cache"] = cache is not None
        self.calls.clear()
        forget_lengths(self.growing)
        try:
            self.module(**kwargs)
            if others:
                self._refuse_additions(others)
            called = {call.layer: call for call in self.calls}
            contexts = [
                block.context(called[layer], past, cache is not None)
                if layer in called
                else Context(skipped=True)
                for layer, block in enumerate(self.blocks)
            ]
            pairs = zip(contexts, self.blocks, strict=True)
            if any(ctx.skipped and not block.may_skip for ctx, block in pairs):
                raise RuntimeError(
                    f"{type(self.module).__name__} called {len(contexts)} of "
                    f"{len(self.blocks)} blocks"
                )
            return Prepared(_handing(contexts), self.calls[0].hidden)
        finally:
            self.calls.clear()

    def _of_tokens(self, tokens: Tensor | None, others: Mapping[str, Any] | None) -> dict[str, Any]:
        """What layers are told of the tokens, beside the stream."""
        wanted = [pair for pair in self.row.token_inputs if pair[0] not in (others or {})]
        if wanted and tokens is None:
            raise InputError(
                f"this model tells each layer which tokens it reads: give tokens, or "
                f"{', '.join(name for name, _ in wanted)}, beside a stream or embeddings"
            )
        places = {name: (method, f"language_model.{method}") for name, method in wanted}
        return {name: hf.find(self.module, place)(tokens, None) for name, place in places.items()}

    def _check_padding(self, attention_mask: Tensor | None) -> None:
        """A class that takes no mask sees padding on the left as text."""
        if attention_mask is None or self.masks:
            return
        if bool((attention_mask[:, 1:] > attention_mask[:, :-1]).any()):
            raise InputError(
                f"{type(self.module).__name__}'s forward takes no attention_mask, so that padding "
                "on the left counts as text: pad on the right, or give rows of one length"
            )

    def check(self, names: Iterable[str]) -> None:
        """Raise UnknownInputError on inputs that the base does not take, naming those it does."""
        known = sorted(self.accepts - OURS - {self.tokens_name})
        if unknown := sorted(set(names) - set(known)):
            raise UnknownInputError(
                f"{', '.join(unknown)}: {type(self.module).__name__} takes, besides tokens or "
                f"inputs_embeds, {', '.join(known) or 'nothing'}"
            )

    def _some_tokens(self, tokens: Tensor | None, embeds: Tensor | None) -> Tensor | None:
        """Where only tokens are taken: some, of that shape. Contexts hang on the shape alone."""
        if tokens is not None or embeds is None or "inputs_embeds" in self.accepts:
            return tokens
        return torch.zeros(embeds.shape[:2], dtype=torch.long, device=embeds.device)

    def _behind_images(
        self, position_ids: Tensor | None, past: int, others: Mapping[str, Any] | None
    ) -> Tensor | None:
        """Positions where an image counts in its rows and columns (M-RoPE, arXiv 2409.12191): the
        base numbers them itself, and remembers how far the text behind them is off."""
        if "rope_deltas" not in vars(self.module):
            return position_ids
        if past == 0:
            self.module.rope_deltas = None
            return None if others else position_ids
        deltas = vars(self.module)["rope_deltas"]
        return position_ids if position_ids is None or deltas is None else position_ids + deltas

    def _refuse_additions(self, others: Mapping[str, Any]) -> None:
        """Between recorders the stream stays what it was, unless the base's own loop adds to it."""
        for call in self.calls:
            if not torch.equal(call.hidden, self.calls[0].hidden):
                raise InputError(
                    f"{type(self.module).__name__} adds to the stream between its blocks (before "
                    f"block {call.layer}) when it is given {', '.join(others)}. Here everything "
                    "must enter at block 0, or be written by a block."
                )


def rows_of_positions(position_ids: Tensor | None, given: Tensor | None) -> Tensor | None:
    """One row of positions for each row given: some families look rows up by number."""
    if position_ids is None or given is None or position_ids.shape[0] != 1 != len(given):
        return position_ids
    return position_ids.expand(len(given), *position_ids.shape[1:])


def forget_lengths(growing: Iterable[Any]) -> None:
    """Rotary tables that grow with the longest prompt seen start afresh: what a prompt gives must
    not depend on the prompts before it."""
    for rotary in growing:
        rotary.inv_freq = rotary.original_inv_freq
        rotary.max_seq_len_cached = rotary.original_max_seq_len


def own_cache(parameter: inspect.Parameter | None) -> type[Cache] | None:
    """The family's own kind of cache, where its code says that it takes no other."""
    kinds = () if parameter is None else get_args(parameter.annotation) or (parameter.annotation,)
    for kind in kinds:
        is_cache = isinstance(kind, type) and issubclass(kind, Cache)
        if is_cache and kind.__module__ != Cache.__module__:
            return kind
    return None
