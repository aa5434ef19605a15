"""The ledger: what was added to the residual stream, in order, and what rescaled all of it.

Every decomposition walks these steps forwards, collecting parts; every attribution walks them
backwards, pulling a direction back to where a part was written. No method asks what kind of block
it is looking at.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from torch import nn

from hookedlm.errors import InputError
from hookedlm.layers.bert import BertBlock
from hookedlm.layers.block import AttentionBranch, PostNormBlock
from hookedlm.layers.hybrid import NormedStreamBlock
from hookedlm.layers.norm import Times
from hookedlm.lent import why_no_sum

if TYPE_CHECKING:
    from hookedlm.model import HookedTransformer


@dataclass(frozen=True)
class Write:
    """A part of block ``layer`` adds its output to the stream; "block": the block as a whole."""

    layer: int
    kind: Literal["attn", "mixer", "mlp", "ple", "block"]

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
        norms = {"attn": "ln1_post", "mixer": "ln1_post", "ple": "ple_norm"}
        return f"blocks.{self.layer}.{norms.get(self.kind, 'ln2_post')}"


@dataclass(frozen=True)
class Renorm:
    """The stream itself passes the norm of this name (post-norm blocks), a multiplication, or a
    projection (of narrow embeddings)."""

    name: str


def ledger(model: HookedTransformer, end: int, mlp_input: bool) -> Iterator[Write | Renorm]:
    """The steps below layer ``end``, its attention included where ``mlp_input`` reads behind it.

    Raises InputError where the stream is no sum of such steps.
    """
    if why := why_no_sum(model):
        raise InputError(
            f"the stream of this model is no sum of an embedding and what its blocks add: {why}. "
            "accumulated_resid() gives it as it is before each block."
        )
    if is_encoder(model):
        yield Renorm("embed.ln")
        if "embed.project" in model.mod_dict:
            yield Renorm("embed.project")
    if "embed_ln" in model._modules:
        yield Renorm("embed_ln")
    for i in range(end + 1 if mlp_input and has_mid(model, end) else end):
        block = model.blocks[i]
        if not isinstance(block, AttentionBranch):
            yield Write(i, "block")
            continue
        parts = (
            (Write(i, "mixer"), "ln1"),
            (Write(i, "attn"), "ln1"),
            (Write(i, "mlp"), "ln2"),
            (Write(i, "ple"), ""),
        )
        for write, norm in parts if i < end else parts[:2]:
            if write.point not in model.hook_dict:
                continue
            if isinstance(block, NormedStreamBlock):
                yield Renorm(f"blocks.{i}.{norm}")
            keep = f"blocks.{i}.{write.kind}_keep"
            if isinstance(block._modules.get(f"{write.kind}_keep"), Times):
                yield Renorm(keep)
            yield write
            if norms_the_stream(block):
                yield Renorm(f"blocks.{i}.{norm}")
        if i < end and isinstance(block._modules.get("post_scale"), Times):
            yield Renorm(f"blocks.{i}.post_scale")


def norms_the_stream(block: nn.Module) -> bool:
    """Whether the stream itself passes the block's norms, and is read bare."""
    return isinstance(block, (PostNormBlock, BertBlock))


def is_encoder(model: HookedTransformer) -> bool:
    """Whether the stream begins with an encoder's embedding: a sum that a norm may follow."""
    return "embed.hook_embed" in model.hook_dict


def has_mid(model: HookedTransformer, layer: int) -> bool:
    """Whether the MLP of ``layer`` reads another stream than its attention."""
    if layer == model.cfg.n_layers:
        return False
    if f"blocks.{layer}.hook_mlp_out" not in model.hook_dict:
        raise InputError(f"mlp_input=True: layer {layer} has no MLP of its own")
    return f"blocks.{layer}.hook_resid_mid" in model.hook_dict


def embeddings(model: HookedTransformer) -> dict[str, str]:
    """What is in the stream before the first step: label -> hook name."""
    place = "embed.hook_" if is_encoder(model) else "hook_"
    names = {x: f"{place}{x}" for x in ("embed", "pos_embed", "token_type_embed")}
    found = {x: name for x, name in names.items() if name in model.hook_dict}
    if model.cfg.positional_embedding_type == "shortformer":  # never added to the stream
        found.pop("pos_embed", None)
    return found


def stream_before(model: HookedTransformer, layer: int, mlp_input: bool = False) -> str:
    """The hook that sees the stream entering a layer, its MLP, or what reads the last."""
    if layer == model.cfg.n_layers:
        normed = layer > 0 and isinstance(model.blocks[layer - 1], BertBlock)
        last = "hook_normalized_resid_post" if normed else "hook_resid_post"
        return f"blocks.{layer - 1}.{last}"
    if mlp_input and has_mid(model, layer):
        normed = isinstance(model.blocks[layer], BertBlock)
        return f"blocks.{layer}.{'ln1.hook_normalized' if normed else 'hook_resid_mid'}"
    return f"blocks.{layer}.hook_resid_pre"
