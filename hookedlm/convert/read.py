"""Read: a row and Hugging Face's block become a spec, tensors and parts; what a row can't account
for completely becomes opaque. Nothing is approximate: every parameter is claimed or wrapped."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import NoneType
from typing import Any

from torch import Tensor, nn

from hookedlm.convert import hf
from hookedlm.convert.hf import ConfigReads, Coverage, MissingPartError
from hookedlm.convert.read_attention import AttentionReading as AttentionReading
from hookedlm.convert.read_attention import read_attention
from hookedlm.convert.read_latent import is_latent, read_latent
from hookedlm.convert.read_mlp import MLPReading as MLPReading
from hookedlm.convert.read_mlp import MoEReading as MoEReading
from hookedlm.convert.read_mlp import read_linears, read_mlp, read_moe
from hookedlm.convert.read_norm import NormReading as NormReading
from hookedlm.convert.read_norm import read_norm as read_norm
from hookedlm.families.row import Row
from hookedlm.layers.linears import MLPLinears
from hookedlm.spec import BlockSpec, OpaqueSpec


@dataclass
class OpaqueReading:
    """A part kept whole."""

    spec: OpaqueSpec
    module: nn.Module
    arguments: Mapping[str, str] = field(default_factory=dict)
    """Its names of what its block calls otherwise."""
    linears: MLPLinears | None = None
    """The parts of an MLP to call, where neurons can be shown although weights can't."""


@dataclass
class PerLayerInputReading:
    """A third branch: what the token says to this layer."""

    W_gate: Tensor
    W_out: Tensor
    act: Any
    norm: NormReading | None


@dataclass
class BlockReading:
    """A block's spec and what its parts are made from."""

    spec: BlockSpec
    attn: AttentionReading | OpaqueReading | None = None
    mlp: MLPReading | MoEReading | OpaqueReading | None = None
    mixer: OpaqueReading | None = None
    norms: dict[str, NormReading] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    ple: PerLayerInputReading | None = None
    opaque_norms: dict[str, OpaqueReading] = field(default_factory=dict)
    keep: tuple[Tensor | None, ...] = (None, None)
    """What multiplies the stream dimension by dimension before each branch is added."""


# The block ----------------------------------------------------------------------------------------


def read_block(block: nn.Module, row: Row, config: ConfigReads) -> BlockReading:
    """The whole block, or MissingPartError telling what a row could not account for."""
    row = _alternative(block, row)
    seen = Coverage(block)
    for place in row.unused:
        seen.take_module(hf.find(block, place))
    layout = hf.resolved(row.layout, block, config)
    notes: list[str] = []
    read = {
        name: _norm_or_opaque(name, module, row, config, seen)
        for name in ("ln1", "ln2", "ln1_post", "ln2_post")
        if not isinstance(module := hf.find(block, getattr(row, name)), (nn.Identity, NoneType))
    }
    for name in ("ln1", "ln2", "ln1_post", "ln2_post"):
        place = getattr(row, name)
        missing = isinstance(place, str) and hf.find(block, place) is None
        if missing and layout != "parallel":
            raise MissingPartError(f"no norm at {place!r}")
    norms = {name: norm for name, norm in read.items() if isinstance(norm, NormReading)}
    whole = {name: norm for name, norm in read.items() if isinstance(norm, OpaqueReading)}
    shared = layout == "parallel" and "ln2" not in norms and "ln1" in norms
    if shared:
        norms["ln2"] = norms["ln1"]
    attn = mlp = mixer = None
    if row.mixer is not None:
        mixer = _opaque(block, row.mixer, "mixer", "a token mixer that is not attention", seen)
        mixer.arguments = row.mixer_args
    if row.attn is not None:
        attn = _attention_or_opaque(block, row, config, seen)
        notes += attn.notes if isinstance(attn, AttentionReading) else []
    if "ln1" in whole and isinstance(attn, AttentionReading):
        raise MissingPartError(f"heads read through {whole['ln1'].spec.reason}")
    if whole and layout != "sequential":
        raise MissingPartError("; ".join(norm.spec.reason for norm in whole.values()))
    if row.mlp is not None:
        mlp = _mlp_or_opaque(block, row, config, seen)
    if attn is None and mlp is None and mixer is None:
        raise MissingPartError("no attention, mixer or MLP")
    ple = _per_layer_input(block, row, config, seen)
    keep = tuple(x if isinstance(x, Tensor) else None for x in _kept(block, row, config))
    seen.take(*keep)
    if left := seen.left():
        raise MissingPartError(f"parameters nobody accounts for: {', '.join(left[:4])}")
    specs: dict[str, Any] = {name: norm.spec for name, norm in norms.items()}
    specs |= {name: norm.spec for name, norm in whole.items()}
    spec = BlockSpec(
        layout=layout,
        attn=None if attn is None else attn.spec,
        mlp=None if mlp is None else mlp.spec,
        mixer=None if mixer is None else mixer.spec,
        **_scales(block, row, config),
        branches_first=row.branches_first,
        shared_norm=shared,
        post_scale=float(hf.resolved(row.post_scale, block, config) or 1.0),
        per_layer_input=ple is not None,
        stream32=bool(hf.resolved(row.stream32, block, config)),
        **specs,
    )
    return BlockReading(spec, attn, mlp, mixer, norms, notes, ple, whole, keep)


def _per_layer_input(
    block: nn.Module, row: Row, config: ConfigReads, seen: Coverage
) -> PerLayerInputReading | None:
    gate, proj = hf.find(block, row.ple_gate), hf.find(block, row.ple_proj)
    if gate is None or proj is None:
        return None
    norm = hf.find(block, row.ple_norm)
    seen.take(gate.weight, proj.weight)
    return PerLayerInputReading(
        hf.flat_weight(gate).t(),
        hf.flat_weight(proj).t(),
        hf.find(block, row.ple_act),
        None if norm is None else read_norm(norm, row, config, seen),
    )


def _alternative(block: nn.Module, row: Row) -> Row:
    """The row as it holds for a block of this kind."""
    for place, differences in row.when.items():
        if hf.find(block, place) is not None:
            return row.but(**differences)
    return row


def _scales(block: nn.Module, row: Row, config: ConfigReads) -> dict[str, Any]:
    """What multiplies the branches, and the stream that they are added to."""
    if row.depth_scaled is not None:  # the n-th addition averages: 1/sqrt(n) against sqrt(1 - 1/n)
        attn, mlp = (float(hf.at(block, place)) for place in row.depth_scaled)
        keep = ((1 - 1 / attn) ** 0.5, (1 - 1 / mlp) ** 0.5)
        return {"residual_scale": attn**-0.5, "mlp_residual_scale": mlp**-0.5, "keep": keep}
    mlp, mixer = (
        hf.resolved(fact, block, config) for fact in (row.mlp_residual_scale, row.mixer_scale)
    )
    return {
        "residual_scale": float(hf.resolved(row.residual_scale, block, config) or 1.0),
        "mlp_residual_scale": None if mlp is None else float(mlp),
        "mixer_scale": None if mixer is None else float(mixer),
        "keep": tuple(
            1.0 if kept is None or isinstance(kept, Tensor) else float(kept)
            for kept in _kept(block, row, config)
        ),
    }


def _kept(block: nn.Module, row: Row, config: ConfigReads) -> tuple[Any, Any]:
    attn, mlp = (hf.resolved(fact, block, config) for fact in (row.keep_attn, row.keep_mlp))
    return attn, mlp


def _norm_or_opaque(
    name: str, module: nn.Module, row: Row, config: ConfigReads, seen: Coverage
) -> NormReading | OpaqueReading:
    """A norm; whole if it can't be read, where only a branch reads through it."""
    try:
        return read_norm(module, row, config, seen)
    except MissingPartError as error:
        if name not in ("ln1", "ln2"):
            raise
        seen.take_module(module)
        return OpaqueReading(OpaqueSpec(name, str(error)), module)


def _attention_or_opaque(
    block: nn.Module, row: Row, config: ConfigReads, seen: Coverage
) -> AttentionReading | OpaqueReading:
    module = hf.find(block, row.attn)
    try:
        reading = (read_latent if is_latent(block, row) else read_attention)(
            block, row, config, seen
        )
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
        whole = _opaque(block, row.mlp, "MLP", str(error), seen)
        whole.linears = None if is_moe else read_linears(block, row, config)
        return whole
    if module is not None and (left := seen.left(module)):
        reason = f"parameters without a place in a uniform MLP: {', '.join(left[:4])}"
        return _opaque(block, row.mlp, "MLP", reason, seen)
    return reading


def _opaque(block: nn.Module, place: Any, what: str, reason: str, seen: Coverage) -> OpaqueReading:
    module = hf.find(block, place)
    if not isinstance(module, nn.Module):
        raise MissingPartError(f"no {what} at {place!r}")
    if module is block:
        raise MissingPartError(f"{reason} (its {what} is no module that could run on its own)")
    seen.take_module(module)
    return OpaqueReading(OpaqueSpec(what, reason), module)
