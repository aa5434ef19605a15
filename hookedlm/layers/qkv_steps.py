"""Norms, clipping and scaling of queries, keys and values ``[batch, pos, head, d_head]``.

A layer takes the steps that its spec asks for when it is built; most take none.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hookedlm.spec import AttentionSpec

if TYPE_CHECKING:
    from hookedlm.layers.attention import Attention

Three = tuple[Tensor, Tensor, Tensor]
"""Queries, keys and values; values may be of another width."""

Step = Callable[["Attention", Tensor, Tensor, Tensor], Three]


def steps_of(spec: AttentionSpec, norms_values: bool) -> tuple[Step, ...]:
    """What follows the projection, in order."""
    norm = None if spec.late_qk_norm else spec.qk_norm
    steps = (
        (normed_in_full, norm == "full"),
        (clipped, spec.clip is not None),
        (normed_by_head, norm == "head"),
        (normed_by_module, norm == "module"),
        (with_normed_values, norms_values),
        (with_scaled_values, spec.value_scale != 1.0),
    )
    return tuple(step for step, wanted in steps if wanted)


def late_steps_of(spec: AttentionSpec) -> tuple[Step, ...]:
    """What follows the rotation."""
    if not spec.late_qk_norm:
        return ()
    return (normed_by_head if spec.qk_norm == "head" else normed_by_module,)


def normed_by_head(attn: Attention, q: Tensor, k: Tensor, v: Tensor) -> Three:
    """Queries and keys, each head on its own."""
    return attn.q_norm(q), attn.k_norm(k), v


def normed_in_full(attn: Attention, q: Tensor, k: Tensor, v: Tensor) -> Three:
    """Queries and keys, all heads together."""

    def normed(k: Tensor) -> Tensor:
        return attn.k_norm(k.flatten(2)).view(k.shape)

    return attn.q_norm(q.flatten(2)).view(q.shape), _each_group(attn, k, normed), v


def normed_by_module(attn: Attention, q: Tensor, k: Tensor, v: Tensor) -> Three:
    """Queries and keys, by Hugging Face's module, which takes ``[batch, head, pos, d_head]``."""

    def normed(k: Tensor) -> Tensor:
        return attn.k_norm(k.transpose(1, 2)).transpose(1, 2)

    return attn.q_norm(q.transpose(1, 2)).transpose(1, 2), _each_group(attn, k, normed), v


def _each_group(attn: Attention, k: Tensor, norm: Callable[[Tensor], Tensor]) -> Tensor:
    """A norm over all key heads together, when there is a key for every query head: the first key
    of each group is normed with the first of the others, and so on."""
    n = k.shape[2] // attn.spec.n_kv_heads
    if n == 1:
        return norm(k)
    return torch.stack([norm(k[:, :, i::n]) for i in range(n)], dim=3).flatten(2, 3)


def clipped(attn: Attention, q: Tensor, k: Tensor, v: Tensor) -> Three:
    """All three, to ``[-clip, clip]``."""
    clip = attn.spec.clip
    assert clip is not None
    return q.clamp(-clip, clip), k.clamp(-clip, clip), v.clamp(-clip, clip)


def with_normed_values(attn: Attention, q: Tensor, k: Tensor, v: Tensor) -> Three:
    """Values, each head on its own."""
    return q, k, attn.v_norm(v)


def with_scaled_values(attn: Attention, q: Tensor, k: Tensor, v: Tensor) -> Three:
    """Values times ``value_scale``."""
    return q, k, v * attn.spec.value_scale
