"""Read latent attention: up-projections by head, as views, and the matrices that lead down."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor, nn

from hookedlm.convert import hf
from hookedlm.convert.hf import ConfigReads, Coverage, MissingPartError
from hookedlm.convert.read_attention import AttentionReading, read_gate
from hookedlm.convert.read_norm import NormReading, read_norm
from hookedlm.families.row import Row
from hookedlm.layers.context import Context
from hookedlm.layers.latent import LatentTensors
from hookedlm.layers.qkv import FusedQKV
from hookedlm.spec import LatentAttentionSpec


@dataclass(kw_only=True)
class LatentReading(AttentionReading):
    """One latent attention layer."""

    spec: LatentAttentionSpec
    tensors: LatentTensors
    kv_latent_norm: NormReading
    q_latent_norm: NormReading | None = None
    select: HFSelector | None = None


class HFSelector(nn.Module):
    """Hugging Face's indexer behind the signature of `SparseLatentAttention`."""

    def __init__(self, indexer: nn.Module):
        super().__init__()
        self.indexer = indexer

    def forward(
        self,
        x: Float[Tensor, "batch pos d_model"],
        source: Float[Tensor, "batch pos d_latent"],
        ctx: Context,
    ) -> Int[Tensor, "batch pos k"]:
        """Positions of the keys that each query attends to."""
        assert ctx.mask is not None
        mask, given = ctx.mask[:, 0], ctx.kwargs
        positions, past = given.get("position_ids"), given.get("past_key_values")
        return self.indexer(x, source, ctx.rotary, mask, positions, past_key_values=past)


def is_latent(block: nn.Module, row: Row) -> bool:
    """Whether the row says where keys and values go down, and this block has it."""
    return hf.find(block, row.kv_down) is not None


def read_latent(block: nn.Module, row: Row, config: ConfigReads, seen: Coverage) -> LatentReading:
    """Weights by head, as views of Hugging Face's matrices, and the facts of the layer."""
    places = (row.kv_down, row.kv_latent_norm, row.kv_up, row.q, row.o)
    found = [hf.find(block, place) for place in places]
    d_head = hf.find(block, row.d_head)
    if d_head is None or any(module is None for module in found):
        raise MissingPartError(f"not all parts of latent attention at {places}, {row.d_head!r}")
    down, norm, up, q, out = found
    module = hf.at(block, str(row.attn))
    for linear in (down, up, q, out):
        seen.take(linear.weight, hf.bias_of(linear))
    W_q, W_up, W_o = (hf.flat_weight(linear) for linear in (q, up, out))
    n_heads, d_latent = W_q.shape[0] // d_head, W_up.shape[1]
    d_rotary = hf.flat_weight(down).shape[0] - d_latent
    W_UKV = W_up.unflatten(0, (n_heads, -1))
    d_nope = d_head - d_rotary
    W_K, W_V = W_UKV[:, :d_nope].transpose(1, 2), W_UKV[:, d_nope:].transpose(1, 2)
    b_Q, b_K, b_V = _biases(q, up, n_heads, d_nope)
    q_down, q_norm = _query_latent(block, row, config, seen)
    tensors = LatentTensors(
        W_Q=W_q.unflatten(0, (n_heads, d_head)).transpose(1, 2),
        W_K=W_K,
        W_V=W_V,
        W_O=W_o.t().unflatten(0, (n_heads, -1)),
        b_Q=b_Q,
        b_K=b_K,
        b_V=b_V,
        b_O=hf.bias_of(out),
        fused=FusedQKV("latent", W_up, hf.bias_of(up), (W_K, W_V), (b_K, b_V)),
        W_DKV=hf.flat_weight(down).t(),
        b_DKV=hf.bias_of(down),
        W_DQ=None if q_down is None else hf.flat_weight(q_down).t(),
        b_DQ=None if q_down is None else hf.bias_of(q_down),
    )
    gate, indexer = read_gate(block, row, n_heads, seen), hf.find(block, row.selector)
    seen.take_module(indexer)
    facts = _facts(block, row, config, module)
    spec = LatentAttentionSpec(
        n_heads=n_heads,
        n_kv_heads=n_heads,
        d_head=d_head,
        d_rotary=d_rotary,
        d_value=W_V.shape[2],
        d_kv_latent=d_latent,
        d_q_latent=None if q_down is None else W_q.shape[1],
        gate=None if gate is None else row.attn_gate_act,
        sparse=indexer is not None or bool(hf.find(block, row.selected_before)),
        **facts,
    )
    style = hf.resolved(row.rotary, block, config) if spec.rotary else None
    return LatentReading(
        spec=spec,
        tensors=tensors,
        module=module,
        rotary_style=style,
        gate=gate,
        kv_latent_norm=read_norm(norm, row, config, seen),
        q_latent_norm=q_norm,
        select=None if indexer is None else HFSelector(indexer),
    )


def _facts(block: nn.Module, row: Row, config: ConfigReads, module: nn.Module) -> dict[str, Any]:
    """What is read as for any attention."""
    style = hf.resolved(row.rotary, block, config)
    rotates = style is not None and bool(hf.resolved(row.rotary_if, block, config))
    if rotates and not hf.has_rotation(module, style):
        raise MissingPartError(f"{type(module).__name__}'s module has no such rotation: {style}")
    return {
        "scale": float(hf.resolved(row.scale, block, config)),
        "rotary": rotates,
        "window": hf.resolved(row.window, block, config),
        "temperature": hf.resolved(row.temperature, block, config),
    }


def _query_latent(
    block: nn.Module, row: Row, config: ConfigReads, seen: Coverage
) -> tuple[Any, NormReading | None]:
    """(what leads down to the queries' latent, its norm); (None, None) where there is none."""
    down, norm = hf.find(block, row.q_down), hf.find(block, row.q_latent_norm)
    if down is None or norm is None:
        return None, None
    seen.take(down.weight, hf.bias_of(down))
    return down, read_norm(norm, row, config, seen)


def _biases(q: Any, up: Any, n_heads: int, d_nope: int) -> list[Tensor | None]:
    b_q, b_up = (hf.bias_of(linear) for linear in (q, up))
    b_Q = None if b_q is None else b_q.unflatten(0, (n_heads, -1))
    if b_up is None:
        return [b_Q, None, None]
    by_head = b_up.unflatten(0, (n_heads, -1))
    return [b_Q, by_head[:, :d_nope], by_head[:, d_nope:]]
