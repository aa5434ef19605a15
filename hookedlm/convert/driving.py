"""The preparer: Hugging Face's loop with recorders in its blocks' places, and its check."""

from __future__ import annotations

import inspect

import torch
from torch import nn

from hookedlm.convert import hf
from hookedlm.convert.check import Truth, not_prepared
from hookedlm.convert.conversion import Conversion, NotDrivenError
from hookedlm.convert.prepare import BlockCall, Call, CallRecorder, HFPreparer
from hookedlm.convert.text_model import text_config
from hookedlm.families import Row
from hookedlm.layers.context import Context


def preparer_of(
    own: nn.Module,
    row: Row,
    layers: list[nn.Module],
    block_calls: list[BlockCall],
    truth: Truth,
    keep_norm: bool,
) -> HFPreparer:
    """Recorders in the blocks' places; what the tail does itself is taken out of the base."""
    calls: list[Call] = []
    recorders = [CallRecorder(m, calls, truth.returned, i) for i, m in enumerate(layers)]
    for recorder, layer in zip(recorders, layers, strict=True):
        recorder.show(layer, row.asked)
    in_turn = isinstance(hf.at(own, row.blocks), nn.Sequential)
    stand_ins = nn.Sequential(*recorders) if in_turn else nn.ModuleList(recorders)
    hf.replace_at(own, row.blocks, stand_ins)
    preparer = HFPreparer(hf.at(own, row.base), row, calls, block_calls)
    if "position_ids" not in inspect.signature(own.forward).parameters:
        preparer.accepts.discard("position_ids")  # some bases take what their model does not
    preparer.first_position = hf.first_position(hf.find(own, row.pos_embed))
    if truth.calls[0].hidden.shape[:2] != truth.tokens.shape:
        preparer.remembers = False  # a cache of more, or other, positions than tokens have
    if preparer.own_cache is None and not hf.keeps_keys(text_config(own)):
        preparer.remembers = False
    return preparer


def check_preparing(conversion: Conversion, truth: Truth) -> None:
    """What is prepared for each block is what Hugging Face called it with; else NotDrivenError."""
    embeds = None if conversion.embed is None else truth.calls[0].hidden
    with torch.no_grad():
        prepared = conversion.preparer(
            tokens=truth.tokens if embeds is None or conversion.row.token_inputs else None,
            embeds=embeds,
            attention_mask=truth.real.long() if conversion.preparer.masks else None,
            position_ids=truth.position_ids,
        )
    for layer, context in enumerate(prepared.contexts):
        if context.skipped:
            continue
        theirs = conversion.preparer.blocks[layer].context(truth.calls[layer], past=0)
        if missing := not_prepared(theirs, context):
            raise NotDrivenError(
                f"block {layer} is called with {', '.join(missing)}, which other blocks compute "
                "besides the stream"
            )
    conversion.preparer.no_start = _why_no_start(conversion, truth, prepared.contexts)


@torch.no_grad()
def _why_no_start(conversion: Conversion, truth: Truth, contexts: list[Context]) -> str:
    """Why a pass can't start at a later layer: what blocks are told comes from the embedding, and
    other things come from another stream; "" if it can."""
    streams = truth.outputs[:1]
    if conversion.embed is None:
        streams.append(truth.calls[0].hidden)
    for stream in streams:
        try:
            others = conversion.preparer(
                tokens=truth.tokens if conversion.row.token_inputs else None,
                embeds=stream,
                attention_mask=truth.real.long() if conversion.preparer.masks else None,
                position_ids=truth.position_ids,
            ).contexts
        except (LookupError, RuntimeError, TypeError, ValueError) as error:
            return f"its loop can't be entered with a stream ({type(error).__name__})"
        for layer, (here, there) in enumerate(zip(contexts, others, strict=True)):
            if missing := not_prepared(here, there):
                return f"block {layer} reads {', '.join(missing)}, which come from the embedding"
    return ""
