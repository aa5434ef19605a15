"""Read: a row and Hugging Face's block become a spec, tensors and parts; what a row can't account
for completely becomes opaque. Nothing is approximate: every parameter is claimed or wrapped."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from hookedlm.convert import hf
from hookedlm.convert.hf import ConfigReads, Coverage, MissingPartError
from hookedlm.families.row import Row
from hookedlm.layers.attention import AttentionTensors
from hookedlm.layers.mlp import MLPTensors
from hookedlm.layers.qkv import FusedQKV
from hookedlm.spec import AttentionSpec, BlockSpec, MLPSpec, MoESpec, NormSpec, OpaqueSpec


@dataclass
class NormReading:
    """One norm: its facts and weights."""

    spec: NormSpec
    w: Tensor | None
    b: Tensor | None


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


@dataclass
class MLPReading:
    """One dense MLP."""

    spec: MLPSpec
    tensors: MLPTensors
    act: Any


@dataclass
class MoEReading:
    """One mixture of experts: Hugging Face's router and experts."""

    spec: MoESpec
    router: nn.Module
    experts: nn.Module


@dataclass
class OpaqueReading:
    """A part kept whole."""

    spec: OpaqueSpec
    module: nn.Module


@dataclass
class BlockReading:
    """A block's spec and what its parts are made from."""

    spec: BlockSpec
    attn: AttentionReading | OpaqueReading | None = None
    mlp: MLPReading | MoEReading | OpaqueReading | None = None
    mixer: OpaqueReading | None = None
    norms: dict[str, NormReading] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def read_norm(module: nn.Module, row: Row, config: ConfigReads, seen: Coverage) -> NormReading:
    """The facts of a norm, from the module itself: eps is read where it is used, never guessed."""
    w, b = getattr(module, "weight", None), getattr(module, "bias", None)
    seen.take(w, b)
    if isinstance(module, nn.LayerNorm):
        return NormReading(NormSpec("LN", module.eps), w, b)
    eps = hf.find(module, ("variance_epsilon", "eps", "epsilon", "norm_eps"))
    if eps is None:
        eps = hf.resolved(row.norm_eps, module, config)
    if eps is None:
        raise MissingPartError(f"{type(module).__name__} tells no eps")
    native = row.norm == "LN" and w is None and b is None
    return NormReading(
        NormSpec(
            "LN" if row.norm == "LN" else "RMS",
            float(eps),
            row.norm_offset,
            row.norm_late_cast,
            native=native,
        ),
        w,
        b,
    )


# Attention ----------------------------------------------------------------------------------------


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


# MLP ----------------------------------------------------------------------------------------------


def read_mlp(block: nn.Module, row: Row, config: ConfigReads, seen: Coverage) -> MLPReading:
    """A dense MLP, gate and linear branch cut apart where they are stored as one."""
    act = hf.find(block, row.act)
    down = hf.find(block, row.down)
    gate, up = hf.find(block, row.gate), hf.find(block, row.up)
    both = hf.find(block, row.gate_up)
    if act is None or down is None or (up is None and both is None):
        raise MissingPartError(f"no MLP at {row.up!r}, {row.down!r} with activation {row.act!r}")
    b_gate = W_gate = None
    if both is not None:
        seen.take(both.weight, hf.bias_of(both))
        W_gate, W_up = hf.flat_weight(both).chunk(2)
        b_both = hf.bias_of(both)
        b_gate, b_up = (None, None) if b_both is None else b_both.chunk(2)
    else:
        seen.take(up.weight, hf.bias_of(up))
        W_up, b_up = hf.flat_weight(up), hf.bias_of(up)
        if gate is not None:
            seen.take(gate.weight, hf.bias_of(gate))
            W_gate, b_gate = hf.flat_weight(gate), hf.bias_of(gate)
        elif row.gate is not None:
            raise MissingPartError(f"no gate at {row.gate!r}")
    seen.take(down.weight, hf.bias_of(down))
    tensors = MLPTensors(
        W_in=W_up.t(),
        W_out=hf.flat_weight(down).t(),
        b_in=b_up,
        b_out=hf.bias_of(down),
        W_gate=None if W_gate is None else W_gate.t(),
        b_gate=b_gate,
    )
    name = type(act).__name__ if isinstance(act, nn.Module) else act.__name__
    return MLPReading(MLPSpec(W_up.shape[0], W_gate is not None, name), tensors, act)


def read_moe(block: nn.Module, row: Row, config: ConfigReads, seen: Coverage) -> MoEReading:
    """A mixture whose router and experts follow transformers' common signature."""
    router, experts = hf.find(block, row.router), hf.find(block, row.experts)
    if router is None or experts is None:
        raise MissingPartError(f"no router at {row.router!r} or experts at {row.experts!r}")
    seen.take_module(router)
    seen.take_module(experts)
    down = next(p for name, p in experts.named_parameters() if "down" in name)
    spec = MoESpec(
        n_experts=int(router.weight.shape[0]),
        top_k=int(router.top_k),
        order="topk_softmax" if row.routing == "topk_softmax" else "softmax_topk",
        normalise=bool(hf.resolved(row.routing_normalised, block, config)),
        d_mlp=next(n for n in down.shape[1:] if n != router.weight.shape[1])
        if len(set(down.shape[1:])) > 1
        else int(down.shape[-1]),
        act=type(hf.find(experts, "act_fn")).__name__,
    )
    return MoEReading(spec, router, experts)


# The block ----------------------------------------------------------------------------------------


def read_block(block: nn.Module, row: Row, config: ConfigReads) -> BlockReading:
    """The whole block, or MissingPartError telling what a row could not account for."""
    seen = Coverage(block)
    layout = hf.resolved(row.layout, block, config)
    notes: list[str] = []
    norms = {
        name: read_norm(module, row, config, seen)
        for name in ("ln1", "ln2", "ln1_post", "ln2_post")
        if (module := hf.find(block, getattr(row, name))) is not None
    }
    for name in ("ln1", "ln2", "ln1_post", "ln2_post"):
        if name not in norms and isinstance(getattr(row, name), str) and layout != "parallel":
            raise MissingPartError(f"no norm at {getattr(row, name)!r}")
    shared = layout == "parallel" and "ln2" not in norms and "ln1" in norms
    if shared:
        norms["ln2"] = norms["ln1"]
    attn = mlp = mixer = None
    if layout == "mixer":
        mixer = _opaque(block, row.mixer, "mixer", "a token mixer that is not attention", seen)
    else:
        attn = _attention_or_opaque(block, row, config, seen)
        mlp = _mlp_or_opaque(block, row, config, seen)
        notes += attn.notes if isinstance(attn, AttentionReading) else []
    if left := seen.left():
        raise MissingPartError(f"parameters nobody accounts for: {', '.join(left[:4])}")
    spec = BlockSpec(
        layout=layout,
        attn=None if attn is None else attn.spec,
        mlp=None if mlp is None else mlp.spec,
        residual_scale=float(hf.resolved(row.residual_scale, block, config) or 1.0),
        branches_first=row.branches_first,
        shared_norm=shared,
        **{name: norm.spec for name, norm in norms.items()},
    )
    return BlockReading(spec, attn, mlp, mixer, norms, notes)


def _attention_or_opaque(
    block: nn.Module, row: Row, config: ConfigReads, seen: Coverage
) -> AttentionReading | OpaqueReading:
    module = hf.find(block, row.attn)
    try:
        reading = read_attention(block, row, config, seen)
    except (MissingPartError, RuntimeError, AttributeError) as error:
        return _opaque(block, row.attn, "attention", str(error), seen)
    if left := seen.left(module):
        reason = f"parameters without a place in uniform attention: {', '.join(left[:4])}"
        return _opaque(block, row.attn, "attention", reason, seen)
    return reading


def _mlp_or_opaque(
    block: nn.Module, row: Row, config: ConfigReads, seen: Coverage
) -> MLPReading | MoEReading | OpaqueReading:
    is_moe = hf.find(block, row.router) is not None
    module = hf.find(block, row.mlp)
    try:
        reading = (read_moe if is_moe else read_mlp)(block, row, config, seen)
    except (MissingPartError, RuntimeError, AttributeError, StopIteration) as error:
        return _opaque(block, row.mlp, "MLP", str(error), seen)
    if module is not None and (left := seen.left(module)):
        reason = f"parameters without a place in a uniform MLP: {', '.join(left[:4])}"
        return _opaque(block, row.mlp, "MLP", reason, seen)
    return reading


def _opaque(block: nn.Module, place: Any, what: str, reason: str, seen: Coverage) -> OpaqueReading:
    module = hf.find(block, place)
    if not isinstance(module, nn.Module):
        raise MissingPartError(f"no {what} at {place!r}")
    seen.take_module(module)
    return OpaqueReading(OpaqueSpec(what, reason), module)
