"""Build: readings become layers. After this no option is left to test."""

from __future__ import annotations

from typing import Any

from torch import nn

from hookedlm.axes import KEY, LATENT, NEURONS, QUERY, SCALE
from hookedlm.convert import hf
from hookedlm.convert.read import (
    AttentionReading,
    BlockReading,
    MLPReading,
    MoEReading,
    NormReading,
    OpaqueReading,
)
from hookedlm.convert.read_latent import LatentReading
from hookedlm.layers.attention import Attention
from hookedlm.layers.block import (
    AttentionOnlyBlock,
    MixerBlock,
    ParallelBlock,
    Parts,
    PostNormBlock,
    SequentialBlock,
)
from hookedlm.layers.gate import OutputGate
from hookedlm.layers.hybrid import Float32StreamBlock, HybridBlock, MLPBlock, NormedStreamBlock
from hookedlm.layers.latent import LatentAttention, SparseLatentAttention
from hookedlm.layers.linears import LinearsMLP
from hookedlm.layers.mlp import MLP, ClampedMLP, GatedMLP
from hookedlm.layers.moe import MoE
from hookedlm.layers.norm import Norm
from hookedlm.layers.opaque import (
    OpaqueAttention,
    OpaqueBlock,
    OpaqueMixer,
    OpaqueMLP,
    OpaqueNorm,
)
from hookedlm.layers.per_layer import PerLayerInput, PerLayerInputBlock
from hookedlm.layers.reusing import ReusingAttention
from hookedlm.spec import BlockSpec, OpaqueSpec

UniformBlock = (
    SequentialBlock
    | AttentionOnlyBlock
    | ParallelBlock
    | PostNormBlock
    | HybridBlock
    | NormedStreamBlock
    | MLPBlock
    | MixerBlock
)
Block = UniformBlock | OpaqueBlock

LAYOUTS: dict[str, Any] = {
    "sequential": SequentialBlock,
    "parallel": ParallelBlock,
    "post_norm": PostNormBlock,
    "normed_stream": NormedStreamBlock,
    "mixer": MixerBlock,
}


def build_block(spec: BlockSpec, parts: Parts) -> UniformBlock:
    """The block a spec describes, around finished parts."""
    if parts.mlp is None:
        mixer = Float32StreamBlock if spec.stream32 else MixerBlock
        return (AttentionOnlyBlock if parts.mixer is None else mixer)(spec, parts)
    if parts.attn is None and parts.mixer is None:
        return MLPBlock(spec, parts)
    if spec.layout == "sequential" and parts.mixer is not None:
        return HybridBlock(spec, parts)
    return LAYOUTS[spec.layout](spec, parts)


def build_read_block(reading: BlockReading) -> UniformBlock:
    """The block a reading describes, on Hugging Face's tensors."""
    norms: dict[str, Any] = {
        name: Norm(norm.spec, norm.w, norm.b) for name, norm in reading.norms.items()
    }
    norms |= {name: OpaqueNorm(*_opaque(norm)) for name, norm in reading.opaque_norms.items()}
    parts = Parts(
        attn=None if reading.attn is None else build_attention(reading.attn),
        mlp=None if reading.mlp is None else build_mlp(reading.mlp),
        mixer=None if reading.mixer is None else _mixer(reading.mixer),
        keep=(reading.keep[0], reading.keep[1]),
        **norms,
    )
    if reading.ple is not None:
        norm = reading.ple.norm
        ple_norm = None if norm is None else Norm(norm.spec, norm.w, norm.b)
        ple = PerLayerInput(reading.ple.W_gate, reading.ple.W_out, reading.ple.act)
        return PerLayerInputBlock(reading.spec, parts, ple, ple_norm)
    return build_block(reading.spec, parts)


def build_attention(
    reading: AttentionReading | OpaqueReading,
) -> Attention | OpaqueAttention:
    """Uniform attention with Hugging Face's rotation, or the wrapped module."""
    if isinstance(reading, OpaqueReading):
        return OpaqueAttention(*_opaque(reading))
    style = reading.rotary_style
    rotate = None if style is None else hf.Rotation(reading.module, style)
    gate = None if reading.gate is None else OutputGate(*reading.gate)
    if isinstance(reading, LatentReading):
        kv_norm, q_norm = _latent_norm(reading.kv_latent_norm), _latent_norm(reading.q_latent_norm)
        assert kv_norm is not None
        parts = (reading.spec, reading.tensors, rotate, kv_norm, q_norm, gate)
        if reading.spec.sparse:
            return SparseLatentAttention(*parts, reading.select)
        return LatentAttention(*parts)
    kind = Attention if reading.spec.reuses_keys is None else ReusingAttention
    return kind(
        reading.spec,
        reading.tensors,
        rotate,
        _qk_norm(reading.q_norm, reading.spec.qk_norm, QUERY),
        _qk_norm(reading.k_norm, reading.spec.qk_norm, KEY),
        _qk_norm(reading.v_norm, "head", KEY),
        _qk_norm(reading.z_norm, "full", QUERY),
        gate,
    )


def _latent_norm(reading: NormReading | None) -> Norm | None:
    if reading is None:
        return None
    return Norm(reading.spec, reading.w, reading.b, axes=LATENT, on_demand=True)


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
        if reading.linears is not None:
            return LinearsMLP(*_opaque(reading), reading.linears)
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
    kind = kind if reading.spec.limit is None else ClampedMLP
    ln = None
    if reading.norm is not None:
        ln = Norm(reading.norm.spec, reading.norm.w, reading.norm.b, SCALE, NEURONS)
    return kind(reading.spec, reading.tensors, reading.act, ln)


def _mixer(reading: OpaqueReading) -> OpaqueMixer:
    return OpaqueMixer(*_opaque(reading), reading.arguments)


def _opaque(reading: OpaqueReading) -> tuple[OpaqueSpec, nn.Module]:
    return reading.spec, reading.module
