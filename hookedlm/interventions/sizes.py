"""How long the axes of a hook point are, as far as the modules tell before anything runs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hookedlm.hooks import HookPoint
from hookedlm.layers.attention import Attention
from hookedlm.layers.mlp import MLP, GatedMLP
from hookedlm.layers.moe import MoE
from hookedlm.lent import loop_of

if TYPE_CHECKING:
    from hookedlm.model import HookedTransformer


def sizes_of(model: HookedTransformer, point: HookPoint) -> list[int | None]:
    """The length of each of the point's axes; None where only a run can tell."""
    known: dict[str, int] = {"1": 1}
    if loop_of(model) is None:
        known["d_model"] = model.cfg.d_model
    parts = (point.name or "").split(".")
    home: Any = model.mod_dict.get(".".join(parts[:-1]))
    if isinstance(home, (MLP, GatedMLP, MoE)):
        known["d_mlp"] = home.spec.d_mlp
    if isinstance(home, MoE):
        known["expert"] = home.spec.n_experts
    block = model.mod_dict.get(".".join(parts[:2])) if parts[0] == "blocks" else None
    attn = None if block is None else block._modules.get("attn")
    if isinstance(attn, Attention):
        known |= {"head": attn.spec.n_heads, "kv_head": attn.spec.n_kv_heads}
        known["d_head"] = attn.spec.d_head
    return [known.get(axis) for axis in point.axes or ()]
