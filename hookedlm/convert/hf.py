"""The untyped border: how tensors and parts are fetched from Hugging Face's modules.

Everything outside this folder sees typed values. Inside, objects are looked up by name, because
that is all two hundred modelling files have in common.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import CacheLayerMixin, DynamicCache
from transformers.pytorch_utils import Conv1D

from hookedlm.convert.placed import is_away, share_weights
from hookedlm.families.row import Choice, Fact, Place


class MissingPartError(LookupError):
    """A row names a part this module does not have."""


def at(root: Any, path: str) -> Any:
    """The object at a dotted path ("" is the root); raises MissingPartError naming the path."""
    here = root
    for name in path.split(".") if path else ():
        try:
            here = getattr(here, name)
        except (AttributeError, RuntimeError) as error:  # a config whose layers differ in it
            raise MissingPartError(f"no {path!r} in {type(root).__name__}") from error
    return here


def find(root: Any, place: Place) -> Any | None:
    """The first object of a place that exists and is not None, else None."""
    for path in (place,) if isinstance(place, str) else place or ():
        try:
            found = at(root, path)
        except MissingPartError:
            continue
        if found is not None:
            return found
    return None


class ConfigReads:
    """A config that remembers which of its keys were read."""

    def __init__(self, config: Any):
        self.config = config
        self.read: set[str] = set()

    def __call__(self, key: str) -> Any:
        self.read.add(key)
        return getattr(self.config, key, None)


def resolved(fact: Fact, root: Any, config: ConfigReads) -> Any:
    """The value a fact of a row has for this module: constants as they are, places looked up."""
    while isinstance(fact, Choice):
        value = config(fact.key)
        fact = fact.options[bool(value) if isinstance(value, (int, float)) else value]
    if not isinstance(fact, str) or "." not in fact:
        return fact
    if fact.startswith("config."):
        return config(fact.removeprefix("config."))
    config.read.add(fact.rsplit(".", 1)[-1])  # the module was built with this key
    return at(root, fact.removeprefix("."))


# Tensors ------------------------------------------------------------------------------------------


def is_plain_linear(module: Any) -> bool:
    """Whether a module is a matrix (and bias) in ordinary tensors: quantised ones are not."""
    weight = getattr(module, "weight", None)
    return (
        isinstance(module, (nn.Linear, Conv1D))
        and isinstance(weight, Tensor)
        and weight.is_floating_point()
        and weight.ndim == 2
        and not is_away(module)
    )


def flat_weight(module: Any) -> Tensor:
    """The matrix of a linear module as ``[out, in]``, a view (Conv1D stores it transposed)."""
    if not is_plain_linear(module):
        why = "'s weights are fetched as it runs" if is_away(module) else " holds no plain matrix"
        raise MissingPartError(f"{type(module).__name__}{why}")
    weight = module.weight
    return weight.t() if isinstance(module, Conv1D) else weight


def bias_of(module: nn.Module) -> Tensor | None:
    """The bias of a linear module, or None."""
    return getattr(module, "bias", None)


# The copy we work with ----------------------------------------------------------------------------


def skeleton(model: nn.Module) -> Any:
    """A copy of the modules that shares every tensor: ours to take apart, theirs stays whole."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            shared = parameter
            if type(parameter) is nn.Parameter:
                shared = nn.Parameter(parameter.detach(), requires_grad=parameter.requires_grad)
            memo.setdefault(id(parameter), shared)
        for buffer in module.buffers(recurse=False):
            memo.setdefault(id(buffer), buffer)
    share_weights(model, memo)
    return _at_full_size(copy.deepcopy(model, memo))


def _at_full_size(model: Any) -> Any:
    """Models that halve the stream, and weights in place, when they first run (RWKV, against
    overflow) get full-size copies of these weights here, and no longer do: the tensors they share
    stay untouched. The eps of a norm counts as much as it did beside the smaller stream."""
    for base in model.modules():
        every = getattr(getattr(base, "config", None), "rescale_every", 0)
        if "layers_are_rescaled" not in vars(base) or not every:
            continue
        for layer, block in enumerate(base.blocks):
            for linear in (block.attention.output, block.feed_forward.value):
                size = 2 ** (layer // every) if base.layers_are_rescaled else 1
                train = linear.weight.requires_grad
                linear.weight = nn.Parameter(linear.weight.detach() * size, requires_grad=train)
            for norm in (block.ln1, block.ln2):
                norm.eps *= 4.0 ** (layer // every)
        base.ln_out.eps *= 4.0 ** (len(base.blocks) // every)
        base.config.rescale_every = 0
    return model


def rows_of_tokens(model: Any, place: str = "") -> int:
    """How many tokens an embedding knows, or the first of several."""
    told = find(model, f"{place}.weight" if place else None)
    if isinstance(told, Tensor):
        return int(told.shape[0])
    table: Any = model.get_input_embeddings()
    first: Any = next(table.children()) if isinstance(table, nn.ModuleList) else table
    return int(first.weight.shape[0])


def replace_at(root: nn.Module, path: str, new: Any) -> None:
    """Put ``new`` where ``path`` points."""
    *parents, name = path.split(".")
    setattr(at(root, ".".join(parents)) if parents else root, name, new)


def length_of(cache: Any) -> int:
    """How many positions a transformers ``Cache`` holds. Where its first layer holds a recurrent
    state in disguise, others know."""
    layers = [x for x in getattr(cache, "layers", ()) if isinstance(x, CacheLayerMixin)]
    if layers:
        return max(int(layer.get_seq_length()) for layer in layers)
    if getattr(cache, "layers", ()):  # recurrent states alone, which know no length
        return 0
    return int(cache.get_seq_length())


def keeps_keys(config: Any) -> bool:
    """Whether transformers' cache for this config holds keys in any layer: one of recurrent states
    alone knows no length, without which no text is continued."""
    try:
        layers = DynamicCache(config=config).layers
    except (AttributeError, TypeError, ValueError):  # a config it was not made for
        return True
    return not layers or any(isinstance(layer, CacheLayerMixin) for layer in layers)


# Positions ----------------------------------------------------------------------------------------


def rows_of(position: Any, offset: int) -> Tensor:
    """The rows of positions from 0 on, of a module or a tensor that the model indexes itself."""
    table = position if isinstance(position, Tensor) else find(position, ("weight", "weights"))
    return table[offset or first_position(position) :]


def first_position(position: Any) -> int:
    """The id of the first position: a table with a row for padding counts from behind it, as
    fairseq does (RoBERTa)."""
    padding = find(position, "padding_idx") if isinstance(position, nn.Embedding) else None
    return 0 if padding is None else int(padding) + 1


ROTATIONS = ("apply_rotary_pos_emb", "apply_rotary_emb")
"""What model files call their rotation of queries and keys."""

OF_CLASSES = ("apply_rotary_position_embeddings",)
"""What it is called where it is a static method of the attention."""

INTERLEAVED = ("apply_rotary_pos_emb_interleave",)
"""What they call one that pairs neighbours, beside one that pairs halves."""


def has_rotation(attn: nn.Module, style: str = "tables") -> bool:
    """Whether the file this module comes from has a rotation of a usual name."""
    return _rotation_of(attn, style) is not None


def _rotation_of(attn: nn.Module, style: str) -> Any:
    names = INTERLEAVED if style == "interleaved" else ROTATIONS
    file = vars(sys.modules[type(attn).__module__])
    found = next((file[name] for name in names if name in file), None)
    return found or find(type(attn), OF_CLASSES)


class Rotation:
    """Hugging Face's own rotation behind one signature (a class, so that models can be pickled).

    ``style``: "tables" turns all of q and k (or what the family's function turns), "partial" as
    many dimensions as the tables are wide, "pairs" neighbouring pairs as GPT-J does, "complex"
    pairs as complex numbers ("complex_heads": given heads before positions), "interleaved"
    neighbouring pairs by a function of that name, which leaves them apart, "sinusoid" pairs by one
    table of sines and cosines.
    """

    def __init__(self, attn: nn.Module, style: str):
        self.apply = _rotation_of(attn, style)
        styles = {"tables": self._whole, "partial": self._partial, "pairs": self._pairs}
        styles |= {"complex": self._complex, "complex_heads": self._complex_heads}
        styles |= {"single": self._single}
        self.turn = (styles | {"interleaved": self._whole, "sinusoid": self._sinusoid})[style]

    def __call__(self, q: Tensor, k: Tensor, tables: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        return self.turn(q, k, tables)

    def _whole(self, q: Tensor, k: Tensor, tables: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        return self.apply(q, k, tables[0], tables[1])

    def _single(self, q: Tensor, k: Tensor, tables: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        return self.apply(q, tables[0], tables[1]), self.apply(k, tables[0], tables[1])

    def _partial(self, q: Tensor, k: Tensor, tables: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        n = tables[0].shape[-1]
        q_turned, k_turned = self.apply(q[..., :n], k[..., :n], tables[0], tables[1])
        return torch.cat((q_turned, q[..., n:]), -1), torch.cat((k_turned, k[..., n:]), -1)

    def _pairs(self, q: Tensor, k: Tensor, tables: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        return self._turned_pairs(q, *tables), self._turned_pairs(k, *tables)

    def _sinusoid(self, q: Tensor, k: Tensor, tables: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        return self.apply(tables[0], q, k)

    def _complex(self, q: Tensor, k: Tensor, tables: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        q, k = self.apply(q.transpose(1, 2), k.transpose(1, 2), tables[0])
        return q.transpose(1, 2), k.transpose(1, 2)

    def _complex_heads(
        self, q: Tensor, k: Tensor, tables: tuple[Tensor, ...]
    ) -> tuple[Tensor, Tensor]:
        return self.apply(q, k, tables[0])

    def _turned_pairs(self, x: Tensor, sin: Tensor, cos: Tensor) -> Tensor:
        x, n = x.transpose(1, 2), 2 * sin.shape[-1]
        turned = torch.cat((self.apply(x[..., :n], sin, cos), x[..., n:]), dim=-1)
        return turned.transpose(1, 2)


def pair_tables(attn: Any, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """GPT-J's (sin, cos) for position ids ``[batch, pos]``, from the table its attention holds."""
    table = attn.embed_positions.to(positions.device)
    sin, cos = table[positions].to(dtype).chunk(2, dim=-1)
    return sin, cos


# Coverage -----------------------------------------------------------------------------------------


class Coverage:
    """Which parameters of a block have been accounted for."""

    def __init__(self, block: nn.Module):
        self.names = {id(p): name for name, p in block.named_parameters()}
        self.seen: set[int] = set()

    def take(self, *tensors: Tensor | None) -> None:
        """These parameters are understood."""
        self.seen.update(id(tensor) for tensor in tensors if tensor is not None)

    def take_module(self, module: nn.Module | None) -> None:
        """All parameters of a module that is kept as it is."""
        if module is not None:
            self.take(*module.parameters())

    def left(self, under: nn.Module | None = None) -> list[str]:
        """Names of the parameters nobody accounted for (below a module of the block)."""
        ids: Iterable[int] = self.names if under is None else map(id, under.parameters())
        return [self.names[i] for i in ids if i not in self.seen and i in self.names]
