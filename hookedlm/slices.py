"""`Slice`: how positions, batch rows and neurons are selected throughout the library."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

SliceInput = (
    int
    | slice
    | tuple[int, ...]
    | tuple[int | None, ...]
    | Sequence[int]
    | np.ndarray
    | Tensor
    | None
)
"""int | (stop,) | (start, stop[, step]) | slice | indices (list, array, tensor) | None: all."""


class Slice:
    """A selection along one axis.

    An int selects one index and drops the axis; a tuple reads like the arguments of ``slice``; a
    list, array or tensor selects these indices; None selects everything. Raises TypeError else.
    """

    slice: Any
    mode: str

    def __init__(self, input_slice: SliceInput | Slice = None):
        if isinstance(input_slice, Slice):
            self.slice, self.mode = input_slice.slice, input_slice.mode
        elif input_slice is None:
            self.slice, self.mode = slice(None), "identity"
        elif isinstance(input_slice, slice):
            self.slice, self.mode = input_slice, "slice"
        elif isinstance(input_slice, tuple):
            self.slice, self.mode = slice(*input_slice), "slice"
        elif isinstance(input_slice, (int, np.integer)) and not isinstance(input_slice, bool):
            self.slice, self.mode = int(input_slice), "int"
        elif isinstance(input_slice, Tensor):
            self.slice, self.mode = input_slice.cpu().numpy(), "array"
        elif isinstance(input_slice, (list, np.ndarray, range)):
            self.slice, self.mode = np.asarray(input_slice), "array"
        else:
            raise TypeError(
                f"{input_slice!r} is no slice: use an int, (stop,), (start, stop[, step]), a "
                "slice, a list, array or tensor of indices, or None"
            )

    @classmethod
    def unwrap(cls, slice_input: SliceInput | Slice) -> Slice:
        """``slice_input`` as a Slice that keeps the axis: an int becomes a list of one."""
        selection = cls(slice_input)
        return cls([selection.slice]) if selection.mode == "int" else selection

    def apply(self, tensor: Tensor, dim: int = 0) -> Tensor:
        """The selection of ``tensor`` along ``dim`` (a view where torch can give one)."""
        if self.mode == "identity":
            return tensor
        if self.mode == "array":
            index = torch.as_tensor(self.slice, device=tensor.device)
            if index.dtype == torch.bool:
                index = index.nonzero().flatten()
            return tensor.index_select(dim, index % tensor.shape[dim])
        selection: list[slice | int] = [slice(None)] * tensor.ndim
        selection[dim] = self.slice
        return tensor[tuple(selection)]

    def indices(self, max_ctx: int | None = None) -> np.ndarray:
        """The indices selected; ``max_ctx`` is the length of the axis, needed for slices."""
        if self.mode == "int":
            return np.array([self.slice], dtype=np.int64)
        if self.mode == "array":
            return np.asarray(self.slice)
        if max_ctx is None:
            raise ValueError("max_ctx (the length of the axis) is needed to list a slice's indices")
        return np.arange(max_ctx, dtype=np.int64)[self.slice]

    def __repr__(self) -> str:
        return f"Slice({self.slice!r}, mode={self.mode!r})"
