"""Build: readings become layers. After this no option is left to test."""

from __future__ import annotations

from typing import Any

from torch import nn

from hookedlm.axes import KEY, QUERY
from hookedlm.convert import hf
from hookedlm.convert.read import (
    AttentionReading,
    BlockReading,
    MLPReading,
    MoEReading,
    NormReading,
    OpaqueReading,
)
from hookedlm.layers.attention import Attention
from hookedlm.layers.block import (
    AttentionOnlyBlock,
    MixerBlock,
    ParallelBlock,
    Parts,
    PostNormBlock,
    SequentialBlock,
)
from hookedlm.layers.mlp import MLP, GatedMLP
from hookedlm.layers.moe import MoE
from hookedlm.layers.norm import Norm
from hookedlm.layers.opaque import OpaqueAttention, OpaqueBlock, OpaqueMixer, OpaqueMLP
from hookedlm.spec import BlockSpec, OpaqueSpec

UniformBlock = SequentialBlock | AttentionOnlyBlock | ParallelBlock | PostNormBlock | MixerBlock
Block = UniformBlock | OpaqueBlock

LAYOUTS: dict[str, Any] = {
    "sequential": SequentialBlock,
    "parallel": ParallelBlock,
    "post_norm": PostNormBlock,
    "mixer": MixerBlock,
}


def build_block(spec: BlockSpec, parts: Parts) -> UniformBlock:
    """The block a spec describes, around finished parts."""
    if parts.mlp is None and parts.mixer is None:
        return AttentionOnlyBlock(spec, parts)
    return LAYOUTS[spec.layout](spec, parts)


def build_read_block(reading: BlockReading) -> UniformBlock:
    """The block a reading describes, on Hugging Face's tensors."""
    norms = {name: Norm(norm.spec, norm.w, norm.b) for name, norm in reading.norms.items()}
    parts = Parts(
        attn=None if reading.attn is None else build_attention(reading.attn),
        mlp=None if reading.mlp is None else build_mlp(reading.mlp),
        mixer=None if reading.mixer is None else OpaqueMixer(*_opaque(reading.mixer)),
        **norms,
    )
    return build_block(reading.spec, parts)


def build_attention(
    reading: AttentionReading | OpaqueReading,
) -> Attention | OpaqueAttention:
    """Uniform attention with Hugging Face's rotation, or the wrapped module."""
    if isinstance(reading, OpaqueReading):
        return OpaqueAttention(*_opaque(reading))
    style = reading.rotary_style
    return Attention(
        reading.spec,
        reading.tensors,
        None if style is None else hf.Rotation(reading.module, style),
        _qk_norm(reading.q_norm, reading.spec.qk_norm, QUERY),
        _qk_norm(reading.k_norm, reading.spec.qk_norm, KEY),
    )


def _qk_norm(
    reading: NormReading | nn.Module | None, kind: str | None, axes: str
) -> nn.Module | None:
    if reading is None or isinstance(reading, nn.Module):
        return reading
    if kind == "full":
        return Norm(reading.spec, reading.w, reading.b, axes="batch pos d_all", on_demand=True)
    scale_axes = axes.replace("d_head", "1")
    return Norm(reading.spec, reading.w, reading.b, scale_axes, axes, on_demand=True)


def build_mlp(
    reading: MLPReading | MoEReading | OpaqueReading,
) -> MLP | GatedMLP | MoE | OpaqueMLP:
    """A dense MLP, a mixture, or the wrapped module."""
    if isinstance(reading, OpaqueReading):
        return OpaqueMLP(*_opaque(reading))
    if isinstance(reading, MoEReading):
        shared = None if reading.shared is None else _dense(reading.shared)
        return MoE(
            reading.spec, reading.router, reading.experts, reading.routing, reading.neurons,
            shared, reading.shared_gate, reading.router_bias,
        )  # fmt: skip
    return _dense(reading)


def _dense(reading: MLPReading) -> MLP | GatedMLP:
    kind = GatedMLP if reading.spec.gated else MLP
    return kind(reading.spec, reading.tensors, reading.act)


def _opaque(reading: OpaqueReading) -> tuple[OpaqueSpec, nn.Module]:
    return reading.spec, reading.module
