"""The ledger: what was added to the residual stream, in order, and what rescaled all of it.

Every decomposition walks these steps forwards, collecting parts; every attribution walks them
backwards, pulling a direction back to where a part was written. No method asks what kind of block
it is looking at.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from hookedlm.errors import InputError
from hookedlm.layers.block import AttentionBranch, PostNormBlock

if TYPE_CHECKING:
    from hookedlm.model import HookedTransformer


@dataclass(frozen=True)
class Write:
    """A part of block ``layer`` adds its output to the stream; "block": the block as a whole."""

    layer: int
    kind: Literal["attn", "mlp", "block"]

    @property
    def label(self) -> str:
        """The name of this part in a decomposition."""
        return f"{self.layer}_{self.kind}_out"

    @property
    def point(self) -> str:
        """The hook that sees it, where the block shows its parts."""
        return f"blocks.{self.layer}.hook_{self.kind}_out"

    @property
    def inner_norm(self) -> str:
        """The norm this part passes before it is added."""
        return f"blocks.{self.layer}.{'ln1' if self.kind == 'attn' else 'ln2'}_post"


@dataclass(frozen=True)
class Renorm:
    """The stream itself passes the norm of this name (post-norm blocks)."""

    name: str


def ledger(model: HookedTransformer, end: int, mlp_input: bool) -> Iterator[Write | Renorm]:
    """The steps below layer ``end``, its attention included where ``mlp_input`` reads behind it."""
    for i in range(end + 1 if mlp_input and has_mid(model, end) else end):
        block = model.blocks[i]
        if not isinstance(block, AttentionBranch):
            yield Write(i, "block")
            continue
        parts = (Write(i, "attn"), "ln1"), (Write(i, "mlp"), "ln2")
        for write, norm in parts if i < end else parts[:1]:
            if write.point not in model.hook_dict:
                continue
            yield write
            if isinstance(block, PostNormBlock):
                yield Renorm(f"blocks.{i}.{norm}")


def has_mid(model: HookedTransformer, layer: int) -> bool:
    """Whether the MLP of ``layer`` reads another stream than its attention."""
    if layer == model.cfg.n_layers:
        return False
    if f"blocks.{layer}.hook_mlp_out" not in model.hook_dict:
        raise InputError(f"mlp_input=True: layer {layer} has no MLP of its own")
    return f"blocks.{layer}.hook_resid_mid" in model.hook_dict
