"""Encoders: Hugging Face's modules become uniform layers on their own tensors, and are compared."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import create_bidirectional_mask

from hookedlm.convert import hf
from hookedlm.convert.build import build_attention, build_mlp
from hookedlm.convert.hf import ConfigReads, Coverage, MissingPartError
from hookedlm.convert.read import OpaqueReading, read_block, read_norm
from hookedlm.errors import ConversionError
from hookedlm.families.bert import ENCODERS, EncoderRow
from hookedlm.layers.bert import (
    BertBlock,
    BertEmbed,
    BertMLMHead,
    BertNSPHead,
    BertPooler,
    TokenTypeEmbed,
)
from hookedlm.layers.block import Parts
from hookedlm.layers.embed import Embed, PosEmbed, Unembed
from hookedlm.layers.norm import Norm


@dataclass
class EncoderLayers:
    """Everything a `HookedEncoder` is made of; heads that the model lacks are None."""

    config: Any
    embed: BertEmbed
    blocks: list[BertBlock]
    mlm_head: BertMLMHead | None
    unembed: Unembed | None
    pooler: BertPooler | None
    nsp_head: BertNSPHead | None


def convert_encoder(model: Any, without: frozenset[str] = frozenset()) -> EncoderLayers:
    """The layers of an encoder, on Hugging Face's tensors; its modules are left as they are.

    ``without`` names heads ("mlm", "pooler", "nsp") to leave out. Raises ConversionError on a type
    that is no known encoder, on one built as a decoder, and on parameters nobody accounts for.
    """
    kind = model.config.model_type
    row = ENCODERS.get(kind)
    if row is None:
        raise ConversionError(
            f"{kind!r} is no encoder this library knows ({', '.join(ENCODERS)}). Decoders, and "
            "encoders as opaque blocks, load with hookedlm.load."
        )
    if model.config.is_decoder:
        raise ConversionError(
            f"this {kind} is configured as a decoder (is_decoder=True): use hookedlm.load"
        )
    ours = hf.skeleton(model)
    config = ConfigReads(ours.config)
    seen = Coverage(ours)
    try:
        embed = _embed(ours, row, config, seen)
        blocks = [_block(block, row, config, seen) for block in hf.at(ours, row.block.blocks)]
        heads = _heads(ours, row, config, seen, without)
    except (MissingPartError, RuntimeError, AttributeError) as error:
        raise ConversionError(f"this {kind} is not built as expected: {error}") from error
    left = [name for name in seen.left() if not (without and name.startswith(("cls.", "bert.po")))]
    if left:
        raise ConversionError(f"parameters nobody accounts for: {', '.join(left[:4])}")
    # The mask must be one that fused attention takes, whatever kernel Hugging Face was to use.
    mask_config = copy.deepcopy(model.config)
    mask_config._attn_implementation = "sdpa"
    return EncoderLayers(mask_config, embed, blocks, **heads)


def bidirectional_mask(
    config: Any, embedded: Tensor, attention_mask: Tensor | None
) -> Tensor | None:
    """Which positions may be attended to, by Hugging Face's own code; None if all."""
    return create_bidirectional_mask(config, embedded, attention_mask)


def _norm(module: nn.Module, row: EncoderRow, config: ConfigReads, seen: Coverage) -> Norm:
    reading = read_norm(module, row.block, config, seen)
    return Norm(reading.spec, reading.w, reading.b)


def _embed(model: Any, row: EncoderRow, config: ConfigReads, seen: Coverage) -> BertEmbed:
    tables = []
    for place in (row.embed, row.pos_embed, row.token_type_embed):
        table = hf.at(model, place).weight
        seen.take(table)
        tables.append(table)
    W_E, W_pos, W_token_type = tables
    norm = _norm(hf.at(model, row.embed_norm), row, config, seen)
    return BertEmbed(Embed(W_E), PosEmbed(W_pos), TokenTypeEmbed(W_token_type), norm)


def _block(block: nn.Module, row: EncoderRow, config: ConfigReads, seen: Coverage) -> BertBlock:
    reading = read_block(block, row.block, config)
    for part in (reading.attn, reading.mlp):
        if part is None or isinstance(part, OpaqueReading):
            raise MissingPartError("no part" if part is None else part.spec.reason)
    seen.take_module(block)
    norms = {name: Norm(norm.spec, norm.w, norm.b) for name, norm in reading.norms.items()}
    attn, mlp = build_attention(reading.attn), build_mlp(reading.mlp)
    parts = Parts(attn=attn, mlp=mlp, ln1=norms["ln1"], ln2=norms["ln2"])
    return BertBlock(reading.spec, parts)


def _heads(
    model: Any, row: EncoderRow, config: ConfigReads, seen: Coverage, without: frozenset[str]
) -> dict[str, Any]:
    heads: dict[str, Any] = dict.fromkeys(("mlm_head", "unembed", "pooler", "nsp_head"))
    dense, decoder = hf.find(model, row.mlm_dense), hf.find(model, row.unembed)
    if dense is not None and "mlm" not in without:
        act = hf.at(model, row.mlm_act)
        norm = _norm(hf.at(model, row.mlm_norm), row, config, seen)
        seen.take(dense.weight, dense.bias, decoder.weight, decoder.bias)
        seen.take(hf.find(model, "cls.predictions.bias"))  # the decoder's, by another name
        heads["mlm_head"] = BertMLMHead(dense.weight.t(), dense.bias, act, norm)
        heads["unembed"] = Unembed(decoder.weight.t(), decoder.bias)
    for name, place, kind in (
        ("pooler", row.pooler, BertPooler),
        ("nsp_head", row.nsp, BertNSPHead),
    ):
        dense = hf.find(model, place)
        if dense is not None and name.removesuffix("_head") not in without:
            seen.take(dense.weight, dense.bias)
            heads[name] = kind(dense.weight.t(), dense.bias)
    return heads


@torch.no_grad()
def truth_of(model: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """What Hugging Face's model says on ``inputs``: its stream, and what its heads make of it."""
    stream = model.base_model(**inputs).last_hidden_state
    found = {"stream": stream}
    heads = hf.find(model, "cls")
    if hf.find(heads, "predictions") is not None:
        found["logits"] = heads.predictions(stream)
    pooler = hf.find(model.base_model, "pooler")
    if hf.find(heads, "seq_relationship") is not None and pooler is not None:
        found["next_sentence"] = heads.seq_relationship(pooler(stream))
    return found
