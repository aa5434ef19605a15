"""Logits of one patched run that are computed where a user's metric looks at them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils._pytree import tree_map

if TYPE_CHECKING:
    from hookedlm.patching.readout import ReadOut

FEW_TOKENS = 64
"""Up to how many columns of the vocabulary are computed by themselves."""

ONE_COLUMN = [slice, int, int]
"""The types of an index such as ``[:, -1, 5]``."""

METADATA = {
    "__len__", "dim", "ndimension", "size", "numel", "nelement", "is_floating_point",
    "is_complex", "element_size", "get_device",
}  # fmt: skip
"""Methods of a tensor that read none of its elements."""


class LazyLogits(torch.Tensor):
    """Logits ``[batch, pos, d_vocab]`` that are computed where somebody looks: ``logits[:, -1]``
    unembeds one position, ``logits[:, -1, [5, 7]]`` two columns of it, for all cells of a sweep at
    once. Whatever else is done with them computes them all."""

    out: ReadOut
    cell: int

    @staticmethod
    def __new__(cls, out: ReadOut, cell: int) -> LazyLogits:
        """Of the run with this number."""
        base = out.base
        shape = (base.n_examples, base.length, base.model.cfg.d_vocab)
        made = torch.Tensor._make_wrapper_subclass(
            cls, shape, dtype=base.logits_dtype, device=base.tokens.device
        )
        made.out, made.cell = out, cell
        return made

    def __init__(self, out: ReadOut, cell: int):
        pass

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.Tensor.__getitem__ and isinstance(args[0], LazyLogits):
            return args[0]._picked(args[1])
        name = func.__name__
        if name in METADATA or name == "__get__":
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        args, named = tree_map(_computed, (tuple(args), kwargs or {}))
        return func(*args, **named)

    @classmethod
    def __torch_dispatch__(cls, *given: Any, **named: Any) -> Any:
        """Reached by code that goes around ``__torch_function__``."""
        func, _, args, kwargs = (*given, {})[:4]
        args, kwargs = tree_map(_computed, (args, kwargs or {}))
        return func(*args, **kwargs)

    def computed(self) -> Float[Tensor, "batch pos d_vocab"]:
        """All of them."""
        return self._at_all(range(self.out.base.length))

    def _at_all(self, positions: Sequence[int]) -> Float[Tensor, "batch pos d_vocab"]:
        return torch.stack([self.out.row_of_cell(self.cell, pos) for pos in positions], dim=1)

    def _picked(self, index: Any) -> Tensor:
        """``logits[index]``: where positions are a number or a slice, only these are computed."""
        parts = index if isinstance(index, tuple) else (index,)
        if list(map(type, parts)) == ONE_COLUMN:  # what most metrics are made of
            rows, where, token = parts
            length, d_vocab = self.out.base.length, self.out.base.model.cfg.d_vocab
            if -length <= where < length and -d_vocab <= token < d_vocab:
                return self.out.columns_of_cell(self.cell, where % length, token % d_vocab)[rows]
        if len(parts) == 3 and parts[0] is Ellipsis:
            parts = (slice(None), *parts[1:])
        if not 2 <= len(parts) <= 3 or not _picks_rows(parts[0]) or parts[-1] is None:
            return self.computed()[index]
        rows, where, *rest = parts
        length = self.out.base.length
        if type(where) is int:
            if not -length <= where < length:
                raise IndexError(f"position {where} of {length}")
            tokens = _few_tokens(rest[0], self.out.base.model.cfg.d_vocab) if rest else None
            if tokens is not None and isinstance(rows, int | slice):
                return self.out.columns_of_cell(self.cell, where % length, tokens)[rows]
            return self.out.row_of_cell(self.cell, where % length)[(rows, *rest)]
        picked = range(*where.indices(length)) if isinstance(where, slice) else ()
        if not picked or not isinstance(rows, int | slice):
            return self.computed()[index]
        return self._at_all(picked)[(rows, slice(None), *rest)]


def _picks_rows(part: Any) -> bool:
    """Whether the first part of an index means the first axis alone."""
    if isinstance(part, Tensor):
        return part.ndim == 1
    return isinstance(part, int | slice | list | range) and not isinstance(part, bool)


def _few_tokens(part: Any, d_vocab: int) -> int | tuple[int, ...] | None:
    """Columns of the vocabulary as numbers from 0; None where that is not what the index means, or
    where it would have to be fetched from another device."""
    if isinstance(part, Tensor) and part.device.type == "cpu" and part.ndim < 2:
        whole = not (part.is_floating_point() or part.dtype == torch.bool)
        part = part.tolist() if whole and part.numel() <= FEW_TOKENS else None
    if type(part) is int:
        return part % d_vocab if -d_vocab <= part < d_vocab else None
    if not isinstance(part, list) or not 0 < len(part) <= FEW_TOKENS:
        return None
    plain = all(type(each) is int and -d_vocab <= each < d_vocab for each in part)
    return tuple(each % d_vocab for each in part) if plain else None


def _computed(x: Any) -> Any:
    return x.computed() if isinstance(x, LazyLogits) else x
