"""Read attention: heads as views of Hugging Face's matrices, and the facts of the layer."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
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
    v_norm: NormReading | None = None
    z_norm: NormReading | None = None
    gate: tuple[Tensor, Tensor | None, str] | None = None
    """(weights, biases, activation) of an output gate."""
    notes: list[str] = field(default_factory=list)


def read_attention(
    block: nn.Module, row: Row, config: ConfigReads, seen: Coverage
) -> AttentionReading:
    """Weights by head, as views of Hugging Face's matrices, and the facts of the layer."""
    module = hf.find(block, row.attn)
    out = hf.find(block, row.o)
    if not isinstance(module, nn.Module) or out is None:
        raise MissingPartError(f"no attention at {row.attn!r} with an output at {row.o!r}")
    W_o = hf.flat_weight(out)
    d_head = _d_head(block, row, W_o.shape[1])
    n_heads = W_o.shape[1] // d_head  # of a fused projection, where values are as wide as queries
    notes: list[str] = []
    fused_module = hf.find(block, row.qkv)
    order: Any = "split" if fused_module is None else hf.resolved(row.qkv_order, block, config)
    name = hf.resolved(row.keys_name, block, config)
    reuses = name if hf.resolved(row.reuses_keys, block, config) else None
    parts: tuple[Tensor | None, ...]
    if reuses is not None:
        parts, biases, whole = *_only_queries(block, row, d_head, seen), None
    elif fused_module is None:
        parts, biases = _split_qkv(block, row, d_head, seen)
        whole = None
    else:
        seen.take(fused_module.weight, hf.bias_of(fused_module))
        parts, biases, whole = _fused_qkv(fused_module, order, n_heads, d_head, notes)
    W_Q, W_K, W_V = (None if part is None else part.transpose(1, 2) for part in parts)
    b_Q, b_K, b_V = biases
    n_heads = W_Q.shape[0]
    fused = None
    if whole is not None:
        fused = FusedQKV(order, *whole, (W_Q, W_K, W_V), (b_Q, b_K, b_V))
    sinks = hf.find(block, row.sinks)
    b_O = hf.bias_of(out) if row.o_bias is None else hf.find(block, row.o_bias)
    seen.take(out.weight, b_O, sinks)
    tensors = AttentionTensors(
        W_Q=W_Q,
        W_K=W_K,
        W_V=W_V,
        W_O=W_o.t().unflatten(0, (n_heads, -1)),
        b_Q=b_Q,
        b_K=b_K,
        b_V=b_V,
        b_O=b_O,
        sinks=sinks,
        fused=fused,
    )
    q_norm, k_norm, qk_norm = _qk_norms(block, row, config, seen)
    style = hf.resolved(row.rotary, block, config)
    conditions = row.rotary_if if isinstance(row.rotary_if, tuple) else (row.rotary_if,)
    rotates = style is not None and any(hf.resolved(x, block, config) for x in conditions)
    if rotates and not hf.has_rotation(module):
        raise MissingPartError(f"{type(module).__name__}'s module has no apply_rotary_pos_emb")
    scale = hf.resolved(row.scale, block, config)
    factor, key_factor = (
        float(hf.resolved(fact, block, config) or 1.0)
        for fact in (row.attn_in_scale, row.key_scale)
    )
    if factor != 1.0 and any(b is not None for b in biases):
        raise MissingPartError("a multiplier on attention's input beside biases of its projections")
    gate = read_gate(block, row, n_heads, seen)
    v_norm = _norm_at(block, row.v_norm, row, config, seen)
    z_norm = _norm_at(block, row.z_norm, row, config, seen)
    spec = AttentionSpec(
        n_heads=n_heads,
        n_kv_heads=n_heads // int(hf.at(module, "num_key_value_groups"))
        if W_K is None
        else W_K.shape[0],
        d_head=d_head,
        scale=(d_head**-0.5 if scale is None else float(scale)) * factor**2 * key_factor,
        rotary=rotates,
        scale_query=row.scale_query,
        softcap=hf.resolved(row.softcap, block, config),
        clip=hf.resolved(row.clip, block, config) or None,
        sinks=sinks is not None,
        qk_norm=qk_norm,
        qkv=order,
        window=hf.resolved(row.window, block, config),
        causal=bool(hf.resolved(row.causal, block, config)),
        late_qk_norm=qk_norm is not None and bool(hf.resolved(row.qk_late, block, config)),
        value_scale=float(hf.resolved(row.value_scale, block, config) or 1.0) * factor,
        z_norm=z_norm is not None,
        gate=None if gate is None else row.attn_gate_act,
        stores_keys=name if hf.resolved(row.stores_keys, block, config) else None,
        reuses_keys=reuses,
        temperature=hf.resolved(row.temperature, block, config),
        scores32=row.scores32,
    )
    if spec.late_qk_norm and not (rotates and qk_norm in ("head", "module")):
        raise MissingPartError("norms behind a rotation that this layer does not have")
    styles = style if rotates else None
    norms = {"q_norm": q_norm, "k_norm": k_norm, "v_norm": v_norm, "z_norm": z_norm}
    return AttentionReading(spec, tensors, module, styles, **norms, gate=gate, notes=notes)


def _d_head(block: nn.Module, row: Row, width: int) -> int:
    d_head, n_heads = hf.find(block, row.d_head), hf.find(block, row.n_heads)
    if d_head is None and n_heads is None:
        raise MissingPartError(f"no width of heads at {row.d_head!r}")
    return int(width // n_heads if d_head is None else d_head)


def _norm_at(
    block: nn.Module, place: Any, row: Row, config: ConfigReads, seen: Coverage
) -> NormReading | None:
    module = hf.find(block, place)
    return None if module is None else read_norm(module, row, config, seen)


def read_gate(
    block: nn.Module, row: Row, n_heads: int, seen: Coverage
) -> tuple[Tensor, Tensor | None, str] | None:
    """(weights by head, biases, activation) of an output gate, if the row says where one is."""
    module = hf.find(block, row.attn_gate)
    if module is None:
        return None
    bias = hf.find(block, row.attn_gate_bias)
    seen.take(module.weight, hf.bias_of(module), bias)
    W, b = hf.flat_weight(module), hf.bias_of(module)
    if bias is not None:  # one for each head
        b = bias.repeat_interleave(W.shape[0] // n_heads)
    W, b = W.unflatten(0, (n_heads, -1)), None if b is None else b.unflatten(0, (n_heads, -1))
    if row.attn_gate == row.q:  # head by head, behind the query
        half = W.shape[1] // 2
        W, b = W[:, half:], None if b is None else b[:, half:]
    return W.transpose(1, 2), b, row.attn_gate_act


Three = tuple[Tensor | None, Tensor | None, Tensor | None]
"""Something of q, k and v each, by head: ``[head, d_head, d_model]``, biases ``[head, d_head]``."""


def _only_queries(
    block: nn.Module, row: Row, d_head: int, seen: Coverage
) -> tuple[tuple[Tensor | None, ...], Three]:
    module = hf.find(block, row.q)
    if module is None:
        raise MissingPartError(f"no queries at {row.q!r}")
    seen.take(module.weight, hf.bias_of(module))
    W, b = _by_head(hf.flat_weight(module), d_head), _by_head(hf.bias_of(module), d_head)
    return (W, None, None), (b, None, None)


def _split_qkv(
    block: nn.Module, row: Row, d_head: int, seen: Coverage
) -> tuple[tuple[Tensor, ...], Three]:
    modules = [hf.find(block, place) for place in (row.q, row.k, row.v)]
    if any(module is None for module in modules):
        raise MissingPartError(f"no projections at {row.q!r}, {row.k!r}, {row.v!r}")
    for module in modules:
        seen.take(module.weight, hf.bias_of(module))
    n_kv = hf.flat_weight(modules[1]).shape[0] // d_head
    gated = row.attn_gate is not None and row.attn_gate == row.q  # head by head behind the query
    d_value = hf.flat_weight(modules[2]).shape[0] // n_kv
    widths = (2 * d_head if gated else d_head, d_head, d_value)  # of a head of each
    sized = list(zip(modules, widths, strict=True))
    q, k, v = (_by_head(hf.flat_weight(module), width) for module, width in sized)
    b_q, b_k, b_v = (_by_head(hf.bias_of(module), width) for module, width in sized)
    b_q = None if b_q is None else b_q[:, :d_head]
    return (q[:, :d_head], k, v), (b_q, b_k, b_v)


def _fused_qkv(
    module: nn.Module, order: Any, n_heads: int, d_head: int, notes: list[str]
) -> tuple[tuple[Tensor, ...], Three, tuple[Tensor, Tensor | None] | None]:
    """q, k and v cut out of one matrix, and that matrix while they are views of it."""
    W, b = hf.flat_weight(module), hf.bias_of(module)
    n_kv = (W.shape[0] // d_head - n_heads) // 2
    cuts: Any = {"blocks": _blocks, "groups": _groups}.get(order) or partial(_chunks, *order)
    parts = cuts(W, n_heads, n_kv, d_head)
    biases: Three = (None, None, None) if b is None else cuts(b, n_heads, n_kv, d_head)
    if _same_storage(parts[0], W):
        return parts, biases, (W, b)
    notes.append("queries interleave with keys: no view describes them, so they are copied")
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


def _chunks(
    n_chunks: int, order: str, x: Tensor, n_heads: int, n_kv: int, d_head: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Chunk by chunk: some heads' queries, keys and values, in the order named."""
    counts = {"q": n_heads // n_chunks, "k": n_kv // n_chunks, "v": n_kv // n_chunks}
    chunks = x.unflatten(0, (n_chunks, -1, d_head)).split([counts[part] for part in order], dim=1)
    found = {part: chunk.flatten(0, 1) for part, chunk in zip(order, chunks, strict=True)}
    return found["q"], found["k"], found["v"]


def _copied(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.detach().clone().requires_grad_(x.requires_grad)


def _same_storage(a: Tensor, b: Tensor) -> bool:
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


def _by_head(x: Tensor | None, d_head: int) -> Tensor | None:
    return None if x is None else x.unflatten(0, (-1, d_head))


def _qk_norms(block: nn.Module, row: Row, config: ConfigReads, seen: Coverage):
    q_norm, k_norm = hf.find(block, row.q_norm), hf.find(block, row.k_norm)
    if q_norm is not None and k_norm is None and hf.resolved(row.reuses_keys, block, config):
        return read_norm(q_norm, row, config, seen), None, "head"
    if q_norm is None or k_norm is None:
        return None, None, None
    kind = hf.resolved(row.qk_norm, block, config)
    if kind == "module":
        seen.take_module(q_norm)
        seen.take_module(k_norm)
        return q_norm, k_norm, kind
    return read_norm(q_norm, row, config, seen), read_norm(k_norm, row, config, seen), kind
