"""Units: what interchange interventions call the activations of a block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from hookedlm.axes import KEY, NEURONS, QUERY, STREAM, VALUE, Z
from hookedlm.errors import InputError
from hookedlm.layers.block import AttentionOnlyBlock, ParallelBlock, SequentialBlock
from hookedlm.layers.hybrid import HybridBlock
from hookedlm.names import get_act_name

if TYPE_CHECKING:
    from hookedlm.model import HookedTransformer


NORM = "ln1.hook_normalized"
READS_NORM = (SequentialBlock, AttentionOnlyBlock, ParallelBlock)
"""Blocks in which attention, and nothing else, reads ``ln1``."""


@dataclass(frozen=True)
class Unit:
    """An activation of a block: ``hook`` as `get_act_name` and grids take it. ``axes``: as uniform
    blocks have them. ``each_head``: heads are swapped one by one unless some are chosen."""

    hook: str
    axes: str
    each_head: bool = False

    @property
    def has_heads(self) -> bool:
        """Whether heads can be chosen."""
        return not {"head", "kv_head"}.isdisjoint(self.axes.split())


UNITS = {
    "block_input": Unit("resid_pre", STREAM),
    "block_output": Unit("resid_post", STREAM),
    "attention_input": Unit(NORM, STREAM),
    "mha_input": Unit(NORM, STREAM),
    "attention_output": Unit("attn_out", STREAM),
    "query_output": Unit("q", QUERY),
    "head_query_output": Unit("q", QUERY, each_head=True),
    "key_output": Unit("k", KEY),
    "head_key_output": Unit("k", KEY, each_head=True),
    "value_output": Unit("v", VALUE),
    "head_value_output": Unit("v", VALUE, each_head=True),
    "attention_value_output": Unit("z", Z),
    "head_attention_value_output": Unit("z", Z, each_head=True),
    "mlp_activation": Unit("post", NEURONS),
    "mlp_output": Unit("mlp_out", STREAM),
}
"""The names are pyvene's (arXiv 2403.07809). Queries and keys are those before rotation; a
mixture's ``mlp_activation`` has experts too. ``attention_input`` is the norm's output, for RMSNorm
before its weight, where a swap means the same."""


def unit_of(name: str) -> Unit:
    """Raises InputError for a name that is not in the table."""
    if name not in UNITS:
        raise InputError(f"unit={name!r}: expected one of {', '.join(UNITS)}")
    return UNITS[name]


def layers_with(model: HookedTransformer, name: str) -> list[int]:
    """The layers that have a unit."""
    hook = UNITS[name].hook
    return [
        layer
        for layer in range(len(model.blocks))
        if full_name(hook, layer) in model.hook_dict and not why_not(model, name, layer)
    ]


def full_name(hook: str, layer: int) -> str:
    """Of the hook point of a unit."""
    return f"blocks.{layer}.{hook}" if "." in hook else get_act_name(hook, layer)


def why_not(model: HookedTransformer, name: str, layer: int) -> str:
    """Why a unit's hook point stands for something else in a layer, a norm that attention does not
    read, or that others read besides; "" if it does not."""
    block = model.blocks[layer]
    if UNITS[name].hook != NORM or isinstance(block, READS_NORM):
        return ""
    if "attn" not in block._modules:
        return f"{name} of layer {layer}: this block has no attention"
    if isinstance(block, HybridBlock) and "mixer" not in block._modules:
        return ""
    return (
        f"{name} of layer {layer}: attention reads no norm of its own in a "
        f"{type(block).__name__}. Take block_input, or with patching.sweep the stream as each head "
        "reads it: q_input, k_input, v_input"
    )
