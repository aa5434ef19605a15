"""Read: a row and Hugging Face's block become a spec, tensors and parts; what a row can't account
for completely becomes opaque. Nothing is approximate: every parameter is claimed or wrapped."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn

from hookedlm.convert import hf
from hookedlm.convert.hf import ConfigReads, Coverage, MissingPartError
from hookedlm.convert.read_attention import AttentionReading as AttentionReading
from hookedlm.convert.read_attention import read_attention
from hookedlm.convert.read_mlp import MLPReading as MLPReading
from hookedlm.convert.read_mlp import MoEReading as MoEReading
from hookedlm.convert.read_mlp import read_mlp, read_moe
from hookedlm.convert.read_norm import NormReading as NormReading
from hookedlm.convert.read_norm import read_norm as read_norm
from hookedlm.families.row import Row
from hookedlm.spec import BlockSpec, OpaqueSpec


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
