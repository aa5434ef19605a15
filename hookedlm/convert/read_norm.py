"""Read norms: facts and weights from Hugging Face's modules."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from hookedlm.convert import hf
from hookedlm.convert.hf import ConfigReads, Coverage, MissingPartError
from hookedlm.convert.placed import is_away
from hookedlm.families.row import Row
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
    return NormReading(
        NormSpec(
            "LN" if kind == "LN" else "RMS",
            float(eps),
            row.norm_offset,
            row.norm_late_cast,
            native=native,
        ),
        w,
        b,
    )
