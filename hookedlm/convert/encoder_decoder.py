"""Encoder-decoders: Hugging Face's modules become uniform layers on their own tensors."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers.masking_utils import create_bidirectional_mask, create_causal_mask

from hookedlm.convert import hf
from hookedlm.convert.build import build_mlp
from hookedlm.convert.hf import ConfigReads, Coverage, MissingPartError
from hookedlm.convert.read_attention import read_attention
from hookedlm.convert.read_mlp import read_mlp
from hookedlm.convert.read_norm import read_norm
from hookedlm.errors import ConversionError
from hookedlm.families.row import Row
from hookedlm.families.t5 import ENCODER_DECODERS, EncoderDecoderRow, StackRow
from hookedlm.layers.attention import Attention
from hookedlm.layers.block import Parts, PostNormBlock, SequentialBlock
from hookedlm.layers.context import Context
from hookedlm.layers.cross import CrossBlock, CrossContext, CrossParts, PostNormCrossBlock
from hookedlm.layers.embed import Embed, PosEmbed, Unembed
from hookedlm.layers.norm import Norm
from hookedlm.layers.relative import RelativeAttention, RelativePositions
from hookedlm.spec import BlockSpec, CrossBlockSpec

Block = SequentialBlock | PostNormBlock | CrossBlock | PostNormCrossBlock
Mask = Int[Tensor, "batch pos"] | None


@dataclass
class StackLayers:
    """One of the two stacks; parts that the family has not are None."""

    pos_embed: PosEmbed | None
    embed_ln: Norm | None
    blocks: list[Block]
    final_ln: Norm | None


@dataclass
class EncoderDecoderLayers:
    """Everything a `HookedEncoderDecoder` is made of; ``config`` is a copy of Hugging Face's."""

    config: Any
    embed: Embed
    encoder: StackLayers
    decoder: StackLayers
    unembed: Unembed


def convert_encoder_decoder(model: Any) -> EncoderDecoderLayers:
    """The layers of an encoder-decoder, on Hugging Face's tensors; its modules are left as they
    are.

    Raises ConversionError on a type that is no known encoder-decoder, on a class without both
    stacks and a head, on weights of several dtypes, and on parameters nobody accounts for.
    """
    kind = model.config.model_type
    row = ENCODER_DECODERS.get(kind)
    if row is None:
        raise ConversionError(
            f"{kind!r} is no encoder-decoder this library knows ({', '.join(ENCODER_DECODERS)}). "
            "Decoders load with hookedlm.load, BERT with HookedEncoder."
        )
    if len(dtypes := {str(parameter.dtype) for parameter in model.parameters()}) > 1:
        raise ConversionError(
            f"this {kind} has weights of several dtypes ({', '.join(sorted(dtypes))}): give it one "
            "first, model.to(torch.float32) or torch.bfloat16"
        )
    ours = hf.skeleton(model)
    config = ConfigReads(ours.config)
    seen = Coverage(ours)
    try:
        layers = _layers(ours, row, config, seen)
    except (MissingPartError, RuntimeError, AttributeError) as error:
        raise ConversionError(
            f"this {kind} ({type(model).__name__}) is not built as expected of one "
            f"ForConditionalGeneration: {error}"
        ) from error
    if left := seen.left():
        raise ConversionError(f"parameters nobody accounts for: {', '.join(left[:4])}")
    return layers


def _layers(
    ours: Any, row: EncoderDecoderRow, config: ConfigReads, seen: Coverage
) -> EncoderDecoderLayers:
    W_E = hf.at(ours, row.embed).weight
    for stack in (row.encoder, row.decoder):
        if hf.at(ours, f"{stack.stack}.{stack.embed}").weight.data_ptr() != W_E.data_ptr():
            raise MissingPartError(f"{stack.stack} embeds tokens with a matrix of its own")
    scale = hf.resolved(row.embed_scale, ours, config)
    head, bias = hf.at(ours, row.unembed), hf.find(ours, row.unembed_bias)
    seen.take(W_E, head.weight, hf.bias_of(head))
    if hf.bias_of(head) is not None:
        raise MissingPartError(f"{row.unembed} has a bias")
    scales = bool(hf.resolved(row.scales_output, ours, config))
    unembed = Unembed(
        hf.flat_weight(head).t(),
        None if bias is None else bias[0],
        scale=W_E.shape[1] ** -0.5 if scales else 1.0,
    )
    encoder = _stack(hf.at(ours, row.encoder.stack), row.encoder, config, seen)
    decoder = _stack(hf.at(ours, row.decoder.stack), row.decoder, config, seen)
    # The mask must be one that fused attention takes, whatever kernel Hugging Face was to use.
    mask_config = copy.deepcopy(ours.config)
    mask_config._attn_implementation = "sdpa"
    embed = Embed(W_E, None if scale in (None, 1.0) else float(scale))
    return EncoderDecoderLayers(mask_config, embed, encoder, decoder, unembed)


def _stack(stack: Any, row: StackRow, config: ConfigReads, seen: Coverage) -> StackLayers:
    pos_embed = None
    table = hf.find(stack, row.pos_embed)
    if table is not None:
        seen.take(table.weight)
        pos_embed = PosEmbed(table.weight[hf.resolved(row.pos_offset, stack, config) :])
    return StackLayers(
        pos_embed,
        _norm(stack, row.embed_norm, row.block, config, seen),
        [_block(block, row, config, seen) for block in hf.at(stack, row.blocks)],
        _norm(stack, row.ln_final, row.block, config, seen),
    )


def _norm(root: Any, place: Any, row: Row, config: ConfigReads, seen: Coverage) -> Norm | None:
    if place is None:
        return None
    reading = read_norm(hf.at(root, place), row, config, seen)
    return Norm(reading.spec, reading.w, reading.b)


def _block(block: Any, row: StackRow, config: ConfigReads, seen: Coverage) -> Block:
    own = row.block if hf.find(block, row.block.gate) is not None else row.block.but(gate=None)
    ln1, last = (_norm(block, place, own, config, seen) for place in (own.ln1, own.ln2))
    attn = _attention(block, row, own, config, seen)
    mlp = read_mlp(block, own, config, seen)
    facts: dict[str, Any] = {
        "layout": own.layout,
        "attn": attn.spec,
        "mlp": mlp.spec,
        "ln1": ln1.spec,
    }
    post_norm = own.layout == "post_norm"
    if row.cross is None:
        parts = Parts(attn=attn, mlp=build_mlp(mlp), ln1=ln1, ln2=last)
        spec = BlockSpec(ln2=last.spec, **facts)
        return (PostNormBlock if post_norm else SequentialBlock)(spec, parts)
    cross_attn = _attention(block, row, row.cross, config, seen)
    ln2 = _norm(block, row.cross.ln1, row.cross, config, seen)
    crossing = CrossParts(
        attn=attn, mlp=build_mlp(mlp), ln1=ln1, ln2=ln2, cross_attn=cross_attn, ln3=last
    )
    spec = CrossBlockSpec(ln2=ln2.spec, ln3=last.spec, cross_attn=cross_attn.spec, **facts)
    return (PostNormCrossBlock if post_norm else CrossBlock)(spec, crossing)


def _attention(
    block: Any, stack: StackRow, row: Row, config: ConfigReads, seen: Coverage
) -> Attention:
    """The attention of a stack's block that ``row`` tells of: to the stack, or to the encoder."""
    reading = read_attention(block, row, config, seen)
    if stack.positions is None:
        return Attention(reading.spec, reading.tensors)
    table = None if row is stack.cross else hf.find(block, stack.positions)
    if table is None:
        return RelativeAttention(reading.spec, reading.tensors)
    seen.take(table.weight)
    max_distance = int(hf.resolved(stack.max_distance, block, config))
    positions = RelativePositions(table.weight, max_distance, reading.spec.causal)
    return RelativeAttention(reading.spec, reading.tensors, positions)


# Running ------------------------------------------------------------------------------------------


def encoder_context(config: Any, embedded: Tensor, mask: Mask) -> Context:
    """What the encoder's blocks need besides the stream, masks by Hugging Face's own code."""
    return Context(mask=create_bidirectional_mask(config, embedded.detach(), mask))


def decoder_context(
    config: Any, embedded: Tensor, mask: Mask, encoded: Tensor, encoder_mask: Mask
) -> CrossContext:
    """What the decoder's blocks need besides the stream, masks by Hugging Face's own code."""
    embedded, output = embedded.detach(), encoded.detach()
    to_encoder = create_bidirectional_mask(config, embedded, encoder_mask, output)
    return CrossContext(
        mask=create_causal_mask(config, embedded, mask, past_key_values=None),
        encoded=encoded,
        cross=Context(mask=to_encoder),
    )


@torch.no_grad()
def truth_of(model: Any, inputs: dict[str, Tensor]) -> dict[str, Float[Tensor, "batch pos width"]]:
    """What Hugging Face's model says on ``inputs``, its dropout off: stream of the encoder, and
    logits."""
    out = hf.skeleton(model).eval()(**inputs, use_cache=False)
    return {"encoder output": out.encoder_last_hidden_state, "logits": out.logits}
