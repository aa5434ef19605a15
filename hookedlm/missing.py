"""Why a model lacks a hook point that others have: one sentence for the error message."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hookedlm.layers.attention import Attention
from hookedlm.layers.block import AttentionBranch, ParallelBlock, PostNormBlock
from hookedlm.layers.moe import MoE
from hookedlm.layers.reusing import ReusingAttention

if TYPE_CHECKING:
    from hookedlm.model import HookedTransformer


def why_missing(model: HookedTransformer, name: str) -> str:
    """A sentence on why ``name`` is absent from this model, or "" if there is none."""
    parts = name.split(".")
    if name == "hook_pos_embed":
        return f"Positions here are {model.cfg.positional_embedding_type}: nothing is added."
    if parts[0] != "blocks" or len(parts) < 3:
        return ""
    if not parts[1].isdigit() or int(parts[1]) >= len(model.blocks):
        return f"This model has layers 0 to {len(model.blocks) - 1}."
    block = model.blocks[int(parts[1])]
    rest = ".".join(parts[2:])
    if not isinstance(block, AttentionBranch):
        reason = vars(block.spec).get("reason", "its mixer is not attention")
        return f"This block runs as Hugging Face wrote it ({reason})."
    if rest.startswith(("attn.", "hook_attn", "mlp.", "hook_mlp", "hook_resid_mid")):
        branch = "mlp" if "mlp" in rest else "attn"
        if branch not in block._modules:
            return "This block has no attention." if branch == "attn" else "This block has no MLP."
    if rest.startswith("attn.") and not isinstance(block.attn, Attention):
        return f"Attention runs as Hugging Face wrote it here ({block.attn.spec.reason})."
    if rest == "hook_resid_mid" and isinstance(block, ParallelBlock):
        return "A parallel block has no stream between attention and MLP."
    if rest.startswith(("ln1.", "ln2.")):
        return "No norm stands there in this family."
    if rest.startswith("ln") and "_post" in rest and isinstance(block, PostNormBlock):
        return "This family normalises the stream itself: see ln1 and ln2."
    if "rot_" in rest:
        return "This layer does not rotate queries and keys."
    if "_latent" in rest:
        return "Only latent attention reads queries, keys and values from a bottleneck."
    if rest == "attn.hook_k" and isinstance(block.attn, ReusingAttention):
        return "This layer takes its keys from an earlier one: see hook_rot_k, and that layer."
    if rest == "hook_attn_in":
        return "Its queries are grouped: use hook_q_input, hook_k_input and hook_v_input."
    if rest.startswith("mlp.") and isinstance(block._modules.get("mlp"), MoE):
        return (
            "Its MLP is a mixture of experts: see hook_router_logits, hook_expert_weights and "
            "hook_expert_out."
        )
    if rest in ("mlp.hook_pre_linear", "mlp.hook_mid"):
        return "Only gated MLPs have hook_pre_linear, only SoLU models hook_mid."
    return ""
