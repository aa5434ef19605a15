"""Projections into heads: weights indexed by head, computed as the flat matrices they lie in.

``W_Q [head, d_model, d_head]`` is a permuted view of the matrix a linear layer multiplies with;
the forward pass goes back to that layout (again a view) and calls one ``linear``. Where a family
stores q, k and v in one matrix and nobody needs their gradients apart, it stays one multiplication.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def into_heads(
    x: Float[Tensor, "batch pos d_model"],
    W: Float[Tensor, "head d_model d_head"],
    b: Float[Tensor, "head d_head"] | None,
) -> Float[Tensor, "batch pos head d_head"]:
    """``x @ W`` for every head, as one multiplication with the flat matrix."""
    flat = W.transpose(1, 2).flatten(0, 1)
    y = F.linear(x, flat, None if b is None else b.flatten())
    return y.unflatten(-1, (W.shape[0], W.shape[2]))


def per_head_into_heads(
    x: Float[Tensor, "batch pos head d_model"],
    W: Float[Tensor, "head d_model d_head"],
    b: Float[Tensor, "head d_head"] | None,
) -> Float[Tensor, "batch pos head d_head"]:
    """The same when every head reads a stream of its own."""
    y = torch.einsum("bphd,hde->bphe", x, W)
    return y if b is None else y + b


def from_heads(
    z: Float[Tensor, "batch pos head d_head"],
    W: Float[Tensor, "head d_head d_model"],
    b: Float[Tensor, "d_model"] | None,
) -> Float[Tensor, "batch pos d_model"]:
    """Sum over heads of ``z @ W`` plus ``b``, as one multiplication."""
    return F.linear(z.flatten(2), W.flatten(0, 1).t(), b)


@dataclass(frozen=True)
class Strided:
    """Where a matrix lies in a storage."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    @classmethod
    def of(cls, x: Tensor) -> Strided:
        """The place of ``x``."""
        return cls(tuple(x.shape), x.stride(), int(x.storage_offset()))


class FusedQKV:
    """One matrix that holds q, k and v, used as long as ``W_Q``, ``W_K``, ``W_V`` are views of it.

    Editing them in place edits the matrix. Assigning another tensor to one of them makes `matrix`
    return None, and the three are multiplied one by one.
    """

    def __init__(
        self,
        order: str | tuple[int, str],
        weight: Float[Tensor, "all_heads_d_head d_model"],
        bias: Float[Tensor, "all_heads_d_head"] | None,
        parts: tuple[Tensor, ...],
        part_biases: tuple[Tensor | None, ...],
    ):
        self.order = order
        self.weight = Strided.of(weight)
        self.bias = None if bias is None else Strided.of(bias)
        self.places = tuple(Strided.of(part) for part in parts)
        self.bias_places = tuple(None if b is None else Strided.of(b) for b in part_biases)
        self.forget()

    def forget(self) -> None:
        """The parts moved: look the matrix up again, and keep no hold on the old one."""
        self._pointers: tuple[int, ...] = ()
        self._current: tuple[Tensor, Tensor | None] | None = None

    def __getstate__(self) -> dict[str, object]:
        return vars(self) | {"_pointers": (), "_current": None}  # addresses mean nothing elsewhere

    def matrix(
        self, parts: tuple[Tensor, ...], biases: tuple[Tensor | None, ...]
    ) -> tuple[Tensor, Tensor | None] | None:
        """(weight, bias) if the parts are still views of one matrix, else None."""
        pointers = tuple(part.data_ptr() for part in parts) + tuple(
            0 if b is None else b.data_ptr() for b in biases
        )
        if pointers != self._pointers:  # moved, replaced, or the first time
            self._pointers = pointers
            self._current = self._looked_up(parts, biases)
        return self._current

    def _looked_up(
        self, parts: tuple[Tensor, ...], biases: tuple[Tensor | None, ...]
    ) -> tuple[Tensor, Tensor | None] | None:
        storages = {part.untyped_storage().data_ptr() for part in parts}
        if len(storages) > 1 or tuple(map(Strided.of, parts)) != self.places:
            return None
        if tuple(None if b is None else Strided.of(b) for b in biases) != self.bias_places:
            return None
        present = [b for b in biases if b is not None]
        if len({b.untyped_storage().data_ptr() for b in present}) > 1:
            return None
        w = parts[0].detach()
        weight = w.as_strided(self.weight.size, self.weight.stride, self.weight.offset)
        if self.bias is None:
            return weight, None
        b = present[0].detach()
        return weight, b.as_strided(self.bias.size, self.bias.stride, self.bias.offset)

    def split(
        self, y: Float[Tensor, "batch pos all_heads_d_head"], n_heads: int, n_kv: int, d_head: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v ``[batch, pos, head, d_head]`` out of the product."""
        # Not y.split or unbind: autograd forbids editing their views in place, which hooks may do.
        if self.order == "blocks" and n_heads == n_kv:
            parts = y.unflatten(-1, (3, n_heads, d_head))
            return parts.select(2, 0), parts.select(2, 1), parts.select(2, 2)
        if self.order == "blocks":
            n_q, n_k = n_heads * d_head, n_kv * d_head
            q, k, v = y[..., :n_q], y[..., n_q : n_q + n_k], y[..., n_q + n_k :]
            return (
                q.unflatten(-1, (n_heads, d_head)),
                k.unflatten(-1, (n_kv, d_head)),
                v.unflatten(-1, (n_kv, d_head)),
            )
        n_chunks, order = (n_kv, "qkv") if isinstance(self.order, str) else self.order
        chunks = y.unflatten(-1, (n_chunks, -1, d_head))
        counts = {"q": n_heads // n_chunks, "k": n_kv // n_chunks, "v": n_kv // n_chunks}
        found, start = {}, 0
        for part in order:
            found[part] = chunks[..., start : start + counts[part], :].flatten(2, 3)
            start += counts[part]
        return found["q"], found["k"], found["v"]
