"""The mathematics of attention, as pure functions that the layer, the cache and the tests share.

Shapes follow the kernels: ``[batch, head, pos, d_head]``. Keys and values may have fewer heads
(grouped queries); each serves ``head / kv_head`` neighbouring query heads.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

Queries = Float[Tensor, "batch head pos d_head"]
Keys = Float[Tensor, "batch kv_head key_pos d_head"]
Values = Float[Tensor, "batch kv_head key_pos d_value"]
Scores = Float[Tensor, "batch head pos key_pos"]
Allowed = Bool[Tensor, "#batch #head pos key_pos"]


def repeat_heads(x: Tensor, n_heads: int, dim: int = 1) -> Tensor:
    """Key/value heads repeated so that there is one for every query head; a view (to read, not to
    edit) if none is, or if all queries share one: Transformers multiplies by such a view too."""
    repeats = n_heads // x.shape[dim]
    if x.shape[dim] == 1:
        return x.expand(*x.shape[:dim], n_heads, *x.shape[dim + 1 :])
    return x if repeats == 1 else x.repeat_interleave(repeats, dim=dim)


def causal_mask(n_query: int, n_key: int, device: torch.device) -> Bool[Tensor, "1 1 pos key_pos"]:
    """Lower-triangular permission; the last query is the last key."""
    ones = torch.ones(n_query, n_key, dtype=torch.bool, device=device)
    return ones.tril(n_key - n_query)[None, None]


def fused(
    q: Queries,
    k: Keys,
    v: Values,
    mask: Tensor | None,
    bias: Tensor | None,
    scale: float,
    causal: bool,
) -> Float[Tensor, "batch pos head d_value"]:
    """Attention in one kernel, without ever holding the pattern.

    ``mask`` is boolean (True: attend) or additive; None means causal. The choices between grouped
    and repeated keys are those transformers makes, so that results agree to the bit.
    """
    n_query, n_key = q.shape[2], k.shape[2]
    is_causal = causal and mask is None and n_query > 1 and bias is None
    if mask is not None:
        mask = mask[..., -n_query:, :n_key]
    if bias is not None:
        if mask is None:
            mask = causal_mask(n_query, n_key, q.device) if causal else None
        if mask is not None and mask.dtype == torch.bool:
            lowest = torch.finfo(q.dtype).min
            bias = bias.to(q.dtype).masked_fill(~mask, lowest)
            mask = None
        mask = bias.to(q.dtype) if mask is None else (bias + mask).to(q.dtype)
    grouped = k.shape[1] != q.shape[1]
    if grouped and (mask is not None or not k.shape[-1] == v.shape[-1] <= 256):
        k, v = repeat_heads(k, q.shape[1]), repeat_heads(v, q.shape[1])
        grouped = False
    z = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=is_causal, scale=scale, enable_gqa=grouped
    )
    return z.transpose(1, 2)


def attention_scores(
    q: Queries,
    k: Keys,
    scale: float,
    bias: Tensor | None = None,
    softcap: float | None = None,
) -> Scores:
    """q·k times scale, capped, plus bias; nothing is masked yet."""
    scores = torch.matmul(q, repeat_heads(k, q.shape[1]).transpose(-1, -2)) * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    return scores if bias is None else scores + bias


def masked(scores: Scores, allowed: Allowed | None) -> Scores:
    """Scores with -inf where attention is forbidden."""
    return scores if allowed is None else scores.masked_fill(~allowed, -torch.inf)


def attention_pattern(
    scores: Scores,
    sinks: Float[Tensor, "head"] | None = None,
) -> Scores:
    """Softmax over keys, in float32 (with sinks in the scores' own dtype).

    A sink is one more key without a value: it takes its share and is dropped. Queries that may
    attend to nothing (padding, or a hook's doing) get a row of zeros.
    """
    if sinks is not None:
        column = sinks.reshape(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
        extended = torch.cat([scores, column.to(scores.dtype)], dim=-1)
        extended = extended - extended.max(dim=-1, keepdim=True).values  # as gpt_oss rounds it
        return torch.softmax(extended, dim=-1)[..., :-1]
    nothing = torch.isneginf(scores).all(dim=-1, keepdim=True)
    safe = scores.masked_fill(nothing, 0.0)  # a softmax of nothing but -inf has NaN gradients
    pattern = torch.softmax(safe, dim=-1, dtype=torch.float32).to(scores.dtype)
    return pattern.masked_fill(nothing, 0.0)


def weighted_values(pattern: Scores, v: Values) -> Float[Tensor, "batch pos head d_value"]:
    """Each head's mix of values."""
    return torch.matmul(pattern, repeat_heads(v, pattern.shape[1])).transpose(1, 2)
