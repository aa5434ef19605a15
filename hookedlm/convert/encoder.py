"""Encoders: Hugging Face's modules become uniform layers on their own tensors, and are compared."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.masking_utils import create_bidirectional_mask

from hookedlm.convert import hf
from hookedlm.convert.build import build_attention, build_mlp
from hookedlm.convert.hf import ConfigReads, Coverage, MissingPartError
from hookedlm.convert.read import OpaqueReading, read_block, read_norm
from hookedlm.errors import ConversionError
from hookedlm.families.bert import ENCODERS, EncoderRow
from hookedlm.families.row import Row
from hookedlm.layers.bert import (
    BertBlock,
    BertEmbed,
    BertMLMHead,
    BertNSPHead,
    BertPooler,
    BertRTDHead,
    CountedPosEmbed,
    Project,
    TokenTypeEmbed,
)
from hookedlm.layers.block import Parts
from hookedlm.layers.embed import Embed, PosEmbed, Unembed
from hookedlm.layers.norm import Norm
from hookedlm.spec import BlockSpec


@dataclass
class EncoderLayers:
    """Everything a `HookedEncoder` is made of; heads that the model lacks are None."""

    config: Any
    embed: BertEmbed
    blocks: list[BertBlock]
    mlm_head: BertMLMHead | None = None
    unembed: Unembed | None = None
    rtd_head: BertRTDHead | None = None
    pooler: BertPooler | None = None
    nsp_head: BertNSPHead | None = None


def convert_encoder(model: Any, without: frozenset[str] = frozenset()) -> EncoderLayers:
    """The layers of an encoder, on Hugging Face's tensors; its modules are left as they are.

    ``without`` names heads ("mlm", "rtd", "pooler", "nsp") to leave out. Raises ConversionError on
    a type that is no known encoder, on one built as a decoder, and on parameters nobody accounts
    for.
    """
    kind = model.config.model_type
    row = ENCODERS.get(kind)
    if row is None:
        raise ConversionError(
            f"{kind!r} is no encoder this library knows ({', '.join(ENCODERS)}). Decoders, and "
            "other encoders, load with hookedlm.load."
        )
    if hf.find(model.config, "is_decoder"):
        raise ConversionError(
            f"this {kind} is configured as a decoder (is_decoder=True): use hookedlm.load"
        )
    ours = hf.skeleton(model)
    config = ConfigReads(ours.config)
    seen = Coverage(ours)
    for place in (place for head in without for place in row.heads[head]):
        seen.take_module(hf.find(ours, (place, f"base_model.{place}")))
    try:
        embed = _embed(ours.base_model, row, config, seen)
        blocks = [
            BertBlock(*uniform_block(block, row.block, config, seen))
            for block in hf.at(ours.base_model, row.block.blocks)
        ]
        heads = _heads(ours, row, config, seen, without)
    except (MissingPartError, RuntimeError, AttributeError) as error:
        raise ConversionError(f"this {kind} is not built as expected: {error}") from error
    if left := seen.left():
        raise ConversionError(
            f"parameters nobody accounts for: {', '.join(left[:4])}. To have the encoder without "
            "its head, give hf_model=model.base_model."
        )
    # The mask must be one that fused attention takes, whatever kernel Hugging Face was to use.
    mask_config = copy.deepcopy(model.config)
    mask_config._attn_implementation = "sdpa"
    return EncoderLayers(mask_config, embed, blocks, **heads)


def bidirectional_mask(
    config: Any, embedded: Tensor, attention_mask: Tensor | None
) -> Tensor | None:
    """Which positions may be attended to, by Hugging Face's own code; None if all."""
    return create_bidirectional_mask(config, embedded, attention_mask)


def _norm(module: Any, row: EncoderRow, config: ConfigReads, seen: Coverage) -> Norm:
    reading = read_norm(module, row.block, config, seen)
    return Norm(reading.spec, reading.w, reading.b)


def _embed(base: Any, row: EncoderRow, config: ConfigReads, seen: Coverage) -> BertEmbed:
    W_E, positions = hf.at(base, row.embed).weight, hf.at(base, row.pos_embed)
    types, project = hf.find(base, row.token_type_embed), hf.find(base, row.embed_project)
    seen.take(W_E, positions.weight)
    for module in (types, project):
        seen.take_module(module)
    return BertEmbed(
        Embed(W_E),
        _pos_embed(positions),
        None if types is None else TokenTypeEmbed(types.weight),
        _norm(hf.at(base, row.embed_norm), row, config, seen),
        None if project is None else Project(hf.flat_weight(project).t(), project.bias),
    )


def _pos_embed(table: Any) -> PosEmbed:
    """Positions; they count from behind padding's where the table knows of padding."""
    first = hf.first_position(table)
    if not first:
        return PosEmbed(table.weight)
    return CountedPosEmbed(table.weight[first:], first - 1, table.weight[first - 1 : first])


def uniform_block(
    block: nn.Module, row: Row, config: ConfigReads, seen: Coverage
) -> tuple[BlockSpec, Parts]:
    """What an encoder's block is made from; raises MissingPartError if a part is not uniform."""
    reading = read_block(block, row, config)
    for part in (reading.attn, reading.mlp):
        if part is None or isinstance(part, OpaqueReading):
            raise MissingPartError("no part" if part is None else part.spec.reason)
    seen.take_module(block)
    norms = {name: Norm(norm.spec, norm.w, norm.b) for name, norm in reading.norms.items()}
    attn, mlp = build_attention(reading.attn), build_mlp(reading.mlp)
    return reading.spec, Parts(attn=attn, mlp=mlp, ln1=norms["ln1"], ln2=norms["ln2"])


def _heads(
    model: Any, row: EncoderRow, config: ConfigReads, seen: Coverage, without: frozenset[str]
) -> dict[str, Any]:
    """The heads that this model has, by their names in `EncoderLayers`."""
    heads: dict[str, Any] = {}
    for name, head in (("mlm", row.mlm), ("rtd", row.rtd)):
        dense = None if head is None else hf.find(model, head.dense)
        if head is None or dense is None or name in without:
            continue
        out, act = hf.at(model, head.out), hf.resolved(head.act, model, config)
        act = ACT2FN[act] if isinstance(act, str) else act
        seen.take(dense.weight, dense.bias, out.weight, out.bias, hf.find(model, head.unused))
        inside, outside = hf.flat_weight(dense).t(), hf.flat_weight(out).t()
        if name == "rtd":
            heads["rtd_head"] = BertRTDHead(inside, dense.bias, act, outside, out.bias)
            continue
        norm = _norm(hf.find(model, head.norm), row, config, seen)
        heads["mlm_head"] = BertMLMHead(inside, dense.bias, act, norm)
        heads["unembed"] = Unembed(outside, out.bias)
    for name, root, place, kind in (
        ("pooler", model.base_model, row.pooler, BertPooler),
        ("nsp_head", model, row.nsp, BertNSPHead),
    ):
        dense = hf.find(root, place)
        if dense is not None and name.removesuffix("_head") not in without:
            seen.take(dense.weight, dense.bias)
            heads[name] = kind(dense.weight.t(), dense.bias)
    return heads


@torch.no_grad()
def truth_of(model: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """What Hugging Face's model says on ``inputs``, its dropout off: its stream, what a pooler that
    nothing reads makes of it, and "logits" of its head, or these and "next_sentence" of both."""
    twin = hf.skeleton(model).eval()
    out, base = twin(**inputs), twin.base_model(**inputs)
    said = {
        "stream": base.last_hidden_state,
        "pooled": base.get("pooler_output"),
        "logits": out.get("logits", out.get("prediction_logits")),
        "next_sentence": out.get("seq_relationship_logits"),
    }
    return {name: x for name, x in said.items() if x is not None}
