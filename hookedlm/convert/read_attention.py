"""Read attention: heads as views of Hugging Face's matrices, and the facts of the layer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from hookedlm.convert import hf
from hookedlm.convert.hf import ConfigReads, Coverage, MissingPartError
from hookedlm.convert.read_norm import NormReading, read_norm
from hookedlm.families.row import Row
from hookedlm.layers.attention import AttentionTensors
from hookedlm.layers.qkv import FusedQKV
from hookedlm.spec import AttentionSpec


@dataclass
class AttentionReading:
    """One attention layer: facts, weights, and the parts that stay Hugging Face's."""

    spec: AttentionSpec
    tensors: AttentionTensors
    module: nn.Module
    rotary_style: str | None = None
    q_norm: NormReading | nn.Module | None = None
    k_norm: NormReading | nn.Module | None = None
    notes: list[str] = field(default_factory=list)


def read_attention(
    block: nn.Module, row: Row, config: ConfigReads, seen: Coverage
) -> AttentionReading:
    """Weights by head, as views of Hugging Face's matrices, and the facts of the layer."""
    module = hf.find(block, row.attn)
    d_head = hf.find(block, row.d_head)
    out = hf.find(block, row.o)
    if not isinstance(module, nn.Module) or out is None or d_head is None:
        raise MissingPartError(f"no attention at {row.attn!r} with an output at {row.o!r}")
    W_o = hf.flat_weight(out)
    n_heads = W_o.shape[1] // d_head
    notes: list[str] = []
    fused_module = hf.find(block, row.qkv)
    order: Any = "split" if fused_module is None else hf.resolved(row.qkv_order, block, config)
    if fused_module is None:
        parts, biases = _split_qkv(block, row, d_head, seen)
        whole = None
    else:
        seen.take(fused_module.weight, hf.bias_of(fused_module))
        parts, biases, whole = _fused_qkv(fused_module, order, n_heads, d_head, notes)
    W_Q, W_K, W_V = (part.transpose(1, 2) for part in parts)
    b_Q, b_K, b_V = biases
    fused = None
    if whole is not None:
        fused = FusedQKV(order, *whole, (W_Q, W_K, W_V), (b_Q, b_K, b_V))
    sinks = hf.find(block, row.sinks)
    seen.take(out.weight, hf.bias_of(out), sinks)
    tensors = AttentionTensors(
        W_Q=W_Q,
        W_K=W_K,
        W_V=W_V,
        W_O=W_o.t().unflatten(0, (n_heads, d_head)),
        b_Q=b_Q,
        b_K=b_K,
        b_V=b_V,
        b_O=hf.bias_of(out),
        sinks=sinks,
        fused=fused,
    )
    q_norm, k_norm, qk_norm = _qk_norms(block, row, config, seen)
    style = hf.resolved(row.rotary, block, config)
    rotates = style is not None and bool(hf.resolved(row.rotary_if, block, config))
    if rotates and not hf.has_rotation(module):
        raise MissingPartError(f"{type(module).__name__}'s module has no apply_rotary_pos_emb")
    scale = hf.resolved(row.scale, block, config)
    spec = AttentionSpec(
        n_heads=n_heads,
        n_kv_heads=W_K.shape[0],
        d_head=d_head,
        scale=d_head**-0.5 if scale is None else float(scale),
        rotary=rotates,
        scale_query=row.scale_query,
        softcap=hf.resolved(row.softcap, block, config),
        clip=hf.resolved(row.clip, block, config) or None,
        sinks=sinks is not None,
        qk_norm=qk_norm,
        qkv=order,
        window=hf.resolved(row.window, block, config),
        causal=bool(hf.resolved(row.causal, block, config)),
    )
    return AttentionReading(
        spec, tensors, module, style if rotates else None, q_norm, k_norm, notes
    )


Three = tuple[Tensor | None, Tensor | None, Tensor | None]
"""Something of q, k and v each, by head: ``[head, d_head, d_model]``, biases ``[head, d_head]``."""


def _split_qkv(
    block: nn.Module, row: Row, d_head: int, seen: Coverage
) -> tuple[tuple[Tensor, ...], Three]:
    modules = [hf.find(block, place) for place in (row.q, row.k, row.v)]
    if any(module is None for module in modules):
        raise MissingPartError(f"no projections at {row.q!r}, {row.k!r}, {row.v!r}")
    for module in modules:
        seen.take(module.weight, hf.bias_of(module))
    q, k, v = (_by_head(hf.flat_weight(module), d_head) for module in modules)
    b_q, b_k, b_v = (_by_head(hf.bias_of(module), d_head) for module in modules)
    return (q, k, v), (b_q, b_k, b_v)


def _fused_qkv(
    module: nn.Module, order: str, n_heads: int, d_head: int, notes: list[str]
) -> tuple[tuple[Tensor, ...], Three, tuple[Tensor, Tensor | None] | None]:
    """q, k and v cut out of one matrix, and that matrix while they are views of it."""
    W, b = hf.flat_weight(module), hf.bias_of(module)
    n_kv = (W.shape[0] // d_head - n_heads) // 2
    cuts = _blocks if order == "blocks" else _groups
    parts = cuts(W, n_heads, n_kv, d_head)
    biases: Three = (None, None, None) if b is None else cuts(b, n_heads, n_kv, d_head)
    if _same_storage(parts[0], W):
        return parts, biases, (W, b)
    notes.append(
        "queries interleave with keys in groups: no view describes them, so they are copied"
    )
    q, k, v = (_copied(part) for part in parts)
    b_q, b_k, b_v = (_copied(bias) for bias in biases)
    return (q, k, v), (b_q, b_k, b_v), None


def _blocks(x: Tensor, n_heads: int, n_kv: int, d_head: int) -> tuple[Tensor, Tensor, Tensor]:
    """Three blocks of rows: all queries, all keys, all values."""
    q, k, v = x.split([n_heads * d_head, n_kv * d_head, n_kv * d_head])
    return _by_head(q, d_head), _by_head(k, d_head), _by_head(v, d_head)


def _groups(x: Tensor, n_heads: int, n_kv: int, d_head: int) -> tuple[Tensor, Tensor, Tensor]:
    """Group by group: its queries, their key, their value. A view if there is one group, or one
    query in each."""
    grouped = x.unflatten(0, (n_kv, n_heads // n_kv + 2, d_head))
    if n_heads == n_kv:
        queries = grouped[:, 0]
    else:
        queries = grouped[0, :-2] if n_kv == 1 else grouped[:, :-2].flatten(0, 1)
    return queries, grouped[:, -2], grouped[:, -1]


def _copied(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.detach().clone().requires_grad_(x.requires_grad)


def _same_storage(a: Tensor, b: Tensor) -> bool:
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


def _by_head(x: Tensor | None, d_head: int) -> Tensor | None:
    return None if x is None else x.unflatten(0, (-1, d_head))


def _qk_norms(block: nn.Module, row: Row, config: ConfigReads, seen: Coverage):
    q_norm, k_norm = hf.find(block, row.q_norm), hf.find(block, row.k_norm)
    if q_norm is None or k_norm is None:
        return None, None, None
    kind = hf.resolved(row.qk_norm, block, config)
    if kind == "module":
        seen.take_module(q_norm)
        seen.take_module(k_norm)
        return q_norm, k_norm, kind
    return read_norm(q_norm, row, config, seen), read_norm(k_norm, row, config, seen), kind
