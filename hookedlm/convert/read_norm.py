"""Read norms: facts and weights from Hugging Face's modules."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from hookedlm.convert import hf
from hookedlm.convert.hf import ConfigReads, Coverage, MissingPartError
from hookedlm.convert.placed import is_away
from hookedlm.families.row import Row
from hookedlm.layers.norm import Norm
from hookedlm.layers.opaque import first
from hookedlm.spec import NormSpec


@dataclass
class NormReading:
    """One norm: its facts and weights."""

    spec: NormSpec
    w: Tensor | None
    b: Tensor | None


def read_norm(module: nn.Module, row: Row, config: ConfigReads, seen: Coverage) -> NormReading:
    """The facts of a norm, from the module itself: eps is read where it is used, never guessed."""
    if is_away(module):
        raise MissingPartError(f"{type(module).__name__}'s weights are fetched as it runs")
    w, b = getattr(module, "weight", None), getattr(module, "bias", None)
    seen.take(w, b)
    if isinstance(module, nn.LayerNorm):
        return NormReading(NormSpec("LN", module.eps, row.norm_offset), w, b)
    eps = hf.find(module, ("variance_epsilon", "eps", "epsilon", "norm_eps"))
    if eps is None:
        eps = hf.resolved(row.norm_eps, module, config)
    if eps is None:
        raise MissingPartError(f"{type(module).__name__} tells no eps")
    kind = hf.resolved(row.norm, module, config)
    native = kind == "LN" and w is None and b is None
    spec = NormSpec("LN" if kind == "LN" else "RMS", float(eps), row.norm_offset, native=native)
    late = replace(spec, late_cast=True)
    return NormReading(late if _rounds_as(late, spec, module, w, b) else spec, w, b)


@torch.no_grad()
def _rounds_as(
    spec: NormSpec, other: NormSpec, module: nn.Module, w: Tensor | None, b: Tensor | None
) -> bool:
    """Whether a half-precision stream comes out of a module as one spec rounds it, to the bit, and
    not as the other does: nothing but running it tells where a module's code rounds."""
    if w is None or w.is_meta:
        return False
    waves = torch.arange(4 * w.numel(), dtype=torch.float32, device=w.device).sin()
    x = waves.view(4, *w.shape).to(torch.bfloat16)
    try:
        theirs = first(module(x))
    except (RuntimeError, TypeError, ValueError):
        return False
    ours, others = (Norm(each, w, b)(x) for each in (spec, other))
    return _same_bits(ours, theirs) and not _same_bits(others, theirs)


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a, b)
