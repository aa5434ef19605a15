"""Convert: read, build and check every part of a Hugging Face causal LM, and say what was found."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hookedlm.convert import hf
from hookedlm.convert.build import Block, build_read_block
from hookedlm.convert.check import Truth, check_block, compare, not_prepared, run_truth, within
from hookedlm.convert.config_keys import unread
from hookedlm.convert.guess import row_of
from hookedlm.convert.hf import ConfigReads, Coverage, MissingPartError
from hookedlm.convert.prepare import BlockCall, Call, CallRecorder, HFPreparer
from hookedlm.convert.read import (
    AttentionReading,
    BlockReading,
    MoEReading,
    OpaqueReading,
    read_block,
    read_norm,
)
from hookedlm.convert.report import Agreement, Fidelity, PartReport
from hookedlm.convert.tail import OpaqueTail
from hookedlm.errors import ConversionError, HookedLMError
from hookedlm.families import Row
from hookedlm.layers.embed import Embed, PosEmbed, Unembed
from hookedlm.layers.norm import Norm
from hookedlm.layers.opaque import OpaqueBlock, OpaqueNorm
from hookedlm.spec import OpaqueSpec


@dataclass
class Conversion:
    """The layers of a converted model, and everything needed to run them."""

    own: Any
    """Our copy of Hugging Face's modules: positions, masks and opaque parts live here."""
    row: Row
    embed: Embed | None
    pos_embed: PosEmbed | None
    blocks: list[Block]
    ln_final: nn.Module | None
    unembed: Unembed | None
    tail: OpaqueTail | None
    preparer: HFPreparer
    fidelity: Fidelity


def convert(model: nn.Module, strict: bool = False) -> Conversion:
    """Uniform layers on ``model``'s own tensors, each compared with the original.

    Raises ConversionError when the model can't be run block by block, or when ``strict`` and a part
    had to be wrapped. ``model`` itself is neither changed nor kept.
    """
    try:
        return _converted(model, strict)
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        if isinstance(error, HookedLMError):
            raise
        raise ConversionError(
            f"{type(model).__name__} could not be run block by block: "
            f"{type(error).__name__}: {error}"
        ) from error


def _converted(model: nn.Module, strict: bool) -> Conversion:
    own = hf.skeleton(model).eval()
    config = ConfigReads(own.config)
    row, family = row_of(own)
    layers = list(hf.at(own, row.blocks))
    d_vocab = own.get_input_embeddings().weight.shape[0]
    truth = run_truth(own, layers, d_vocab)
    if len(truth.calls) != len(layers):
        raise ConversionError(
            f"{type(model).__name__} runs its {len(layers)} blocks {len(truth.calls)} times in one "
            "pass; a model that loops over its blocks has no uniform form yet."
        )
    if truth.calls[0].hidden.ndim != 3:
        raise ConversionError(
            f"{type(model).__name__} keeps several streams {tuple(truth.calls[0].hidden.shape)}; "
            "only one residual stream [batch, pos, d_model] has a uniform form yet."
        )
    fidelity = Fidelity(
        own.config.model_type, type(model).__name__, str(truth.logits.dtype)[6:], family
    )
    embed, pos_embed = _embedding(own, row, config, truth, fidelity)
    truths = [truth, run_truth(own, layers, d_vocab, padded=False)]
    blocks, calls = _blocks(layers, row, config, truths, fidelity)
    ln_final, unembed = reading_out(own, row, config)
    conversion = Conversion(
        own,
        row,
        embed,
        pos_embed,
        blocks,
        ln_final,
        unembed,
        None,
        _preparer(own, row, layers, calls, truth, keep_norm=unembed is None),
        fidelity,
    )
    _check_logits(conversion, truth, config)
    _check_preparing(conversion, truth)
    if not fidelity.opaque_parts:  # what is wrapped read its options itself
        fidelity.unread = unread(config)
    if strict:
        fidelity.demand_uniform()
    return conversion


# The parts ----------------------------------------------------------------------------------------


def _embedding(
    own: nn.Module, row: Row, config: ConfigReads, truth: Truth, fidelity: Fidelity
) -> tuple[Embed | None, PosEmbed | None]:
    table = hf.at(own, row.embed)
    proj, ln = hf.find(own, row.embed_proj), hf.find(own, row.embed_norm)
    position = hf.find(own, row.pos_embed)
    norm = None
    if ln is not None:
        reading = read_norm(ln, row, config, Coverage(ln))
        norm = Norm(reading.spec, reading.w, reading.b)
    scale = hf.resolved(row.embed_scale, own, config)
    W_proj = None if proj is None else hf.flat_weight(proj).t()
    embed = Embed(table.weight, scale, W_proj, norm)
    pos_embed = None if position is None else PosEmbed(position.weight[row.pos_offset :])
    with torch.no_grad():
        stream = embed(truth.tokens)
        if pos_embed is not None:
            stream = stream + pos_embed.at(truth.position_ids)
    agreement = compare(stream, truth.calls[0].hidden, truth.real)
    if within(agreement, stream.dtype):
        fidelity.parts.append(PartReport("embed", "uniform", agreement))
        return embed, pos_embed
    reason = f"what enters block 0 is not the embedding ({agreement.error:.1e} away)"
    fidelity.parts.append(
        PartReport("embed", "opaque embedding", Agreement(0.0, True), None, reason)
    )
    return None, None


def _blocks(
    layers: list[nn.Module],
    row: Row,
    config: ConfigReads,
    truths: list[Truth],
    fidelity: Fidelity,
) -> tuple[list[Block], list[BlockCall]]:
    blocks, calls = [], []
    for layer, module in enumerate(layers):
        block, call, part = _block(module, row, config, truths, layer)
        blocks.append(block)
        calls.append(call)
        fidelity.parts.append(part)
    return blocks, calls


def _block(
    module: nn.Module, row: Row, config: ConfigReads, truths: list[Truth], layer: int
) -> tuple[Block, BlockCall, PartReport]:
    """One block: uniform if it can be read completely and computes the same both ways."""
    where = f"blocks.{layer}"
    try:
        reading = read_block(module, row, config)
        block, call = build_read_block(reading), _call_of(module, row, reading)
        quiet, listening = check_block(block, call, truths, layer)
        dtype = truths[0].calls[layer].hidden.dtype
        routed = isinstance(reading.mlp, MoEReading)
        if within(quiet, dtype) and within(listening, dtype, reroutes=routed):
            reason = "; ".join([*reading.notes, *_opaque_reasons(reading)])
            return block, call, PartReport(where, form_of(reading), quiet, listening, reason)
        reason = f"read as a uniform block, but {max(quiet.error, listening.error):.1e} away"
    except (
        AssertionError,
        AttributeError,
        LookupError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:
        reason = f"not read: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
    opaque = OpaqueBlock(OpaqueSpec("block", reason), module)
    call = BlockCall(_argument_names(module), opaque=True)
    quiet, listening = check_block(opaque, call, truths, layer)
    return opaque, call, PartReport(where, "opaque block", quiet, listening, reason)


def form_of(reading: BlockReading) -> str:
    """How a block is told of in a report: uniform with its layout, or with which opaque parts."""
    opaque = [
        what
        for what, part in (
            ("attention", reading.attn),
            ("MLP", reading.mlp),
            ("mixer", reading.mixer),
        )
        if isinstance(part, OpaqueReading)
    ]
    if opaque:
        return f"opaque {' and '.join(opaque)} in uniform block"
    return f"uniform, {reading.spec.layout}"


def _opaque_reasons(reading: BlockReading) -> list[str]:
    parts = (reading.attn, reading.mlp, reading.mixer)
    return [part.spec.reason for part in parts if isinstance(part, OpaqueReading)]


def _argument_names(module: nn.Module) -> tuple[str, ...]:
    parameters = list(inspect.signature(module.forward).parameters.values())[1:]
    return tuple(p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD)


def _call_of(module: nn.Module, row: Row, reading: BlockReading) -> BlockCall:
    table = hf.find(module, row.mask_table)
    if table is not None and bool((table == torch.ones_like(table).tril()).all()):
        table = None  # plainly causal: the prepared mask says it already
    attn = reading.attn if isinstance(reading.attn, AttentionReading) else None
    opaque = any(isinstance(p, OpaqueReading) for p in (reading.attn, reading.mlp, reading.mixer))
    rotary = None if attn is None else attn.rotary_style
    return BlockCall(
        _argument_names(module),
        opaque=opaque,
        mask_hides=row.mask_hides,
        bias=row.bias if isinstance(row.bias, str) else None,
        n_heads=0 if attn is None else attn.spec.n_heads,
        rotary=rotary,
        attn=attn.module if attn is not None and rotary == "pairs" else None,
        mask_table=table,
    )


def reading_out(
    own: nn.Module, row: Row, config: ConfigReads
) -> tuple[nn.Module | None, Unembed | None]:
    """The final norm and the unembedding, or (None, None) when they are not plain."""
    head, norm = hf.find(own, row.unembed), hf.find(own, row.ln_final)
    ln_final: nn.Module | None = None
    if norm is not None:
        try:
            reading = read_norm(norm, row, config, coverage := Coverage(norm))
            if coverage.left():
                raise MissingPartError("unknown parameters in the final norm")
            ln_final = Norm(reading.spec, reading.w, reading.b)
        except MissingPartError as error:
            ln_final = OpaqueNorm(OpaqueSpec("final norm", str(error)), norm)
    if not hf.is_plain_linear(head):
        return None, None
    proj = hf.find(own, row.unembed_proj)
    unembed = Unembed(
        hf.flat_weight(head).t(),
        hf.bias_of(head),
        None if proj is None else hf.flat_weight(proj).t(),
        scale=float(hf.resolved(row.logit_scale, own, config) or 1.0),
        divisor=float(hf.resolved(row.logit_divisor, own, config) or 1.0),
        softcap=hf.resolved(row.logit_softcap, own, config),
    )
    return ln_final, unembed


# Running ------------------------------------------------------------------------------------------


def _preparer(
    own: nn.Module,
    row: Row,
    layers: list[nn.Module],
    block_calls: list[BlockCall],
    truth: Truth,
    keep_norm: bool,
) -> HFPreparer:
    """Recorders in the blocks' places; what the tail does itself is taken out of the base."""
    calls: list[Call] = []
    recorders = [CallRecorder(layer, calls, truth.returned) for layer in layers]
    hf.replace_at(own, row.blocks, nn.ModuleList(recorders))
    return HFPreparer(hf.at(own, row.base), row, calls, block_calls)


def _check_preparing(conversion: Conversion, truth: Truth) -> None:
    """What is prepared for each block is what Hugging Face called it with; else ConversionError."""
    embeds = None if conversion.embed is None else truth.calls[0].hidden
    with torch.no_grad():
        prepared = conversion.preparer(
            tokens=truth.tokens if embeds is None else None,
            embeds=embeds,
            attention_mask=truth.real.long(),
            position_ids=truth.position_ids,
        )
    for layer, context in enumerate(prepared.contexts):
        theirs = conversion.preparer.blocks[layer].context(truth.calls[layer], past=0)
        if missing := not_prepared(theirs, context):
            raise ConversionError(
                f"{type(conversion.own).__name__} calls block {layer} with {', '.join(missing)}, "
                "which other blocks compute besides the stream; such a model has no uniform form "
                "yet."
            )


def _check_logits(conversion: Conversion, truth: Truth, config: ConfigReads) -> None:
    """The last stream read out our way; if that is not Hugging Face's way, theirs is kept."""
    stream, dtype = truth.outputs[-1], truth.logits.dtype
    own, fidelity = conversion.own, conversion.fidelity
    reason = "the head is no plain matrix"
    if conversion.unembed is not None:
        agreement = _read_out(conversion, truth)
        if within(agreement, dtype):
            _strip(conversion)
            fidelity.parts.append(PartReport("logits", "uniform", agreement))
            return
        reason = f"norm and unembedding give logits {agreement.error:.1e} away"
    tail = OpaqueTail(own, conversion.preparer)
    with torch.no_grad():
        logits = tail(stream, truth.tokens, truth.real.long(), truth.position_ids)
    agreement = compare(logits, truth.logits, truth.real)
    if not within(agreement, dtype):
        raise ConversionError(
            f"{type(own).__name__} does something between its blocks and its logits that could "
            f"not be reproduced ({agreement.error:.1e} away)."
        )
    conversion.tail, conversion.ln_final, conversion.unembed = tail, None, None
    if conversion.embed is not None and hf.find(own, conversion.row.embed_proj) is not None:
        # The tail needs the base whole, and a base that projects takes no stream of ours.
        conversion.embed, conversion.pos_embed = None, None
        projects = "its projection stays with the head, which is opaque"
        fidelity.parts[0] = PartReport(
            "embed", "opaque embedding", Agreement(0.0, True), None, projects
        )
    fidelity.parts.append(PartReport("logits", "opaque head", agreement, None, reason))


def _read_out(conversion: Conversion, truth: Truth) -> Agreement:
    """Our norm and unembedding on the last stream; infinitely wrong where they don't even fit."""
    stream = truth.outputs[-1]
    try:
        with torch.no_grad():
            normed = stream if conversion.ln_final is None else conversion.ln_final(stream)
            return compare(conversion.unembed(normed), truth.logits, truth.real)
    except RuntimeError:  # something between them changes the width
        return Agreement(float("inf"), False)


class _Passes(nn.Identity):
    """Stands where a final norm was. Some bases ask that for its weight's dtype."""

    def __init__(self, weight: Tensor | None):
        super().__init__()
        empty = None if weight is None else weight.detach().new_empty(0)
        self.register_buffer("weight", empty, persistent=False)


class _Nothing(nn.Module):
    """Stands where a position embedding was: adds zero to whatever it is added to."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return torch.zeros(())


def _strip(conversion: Conversion) -> None:
    """Take out of our copy of the base what our own layers do, so that it holds no weights."""
    own, row = conversion.own, conversion.row
    norm = _Passes(getattr(hf.find(own, row.ln_final), "weight", None))
    gone: list[tuple[Any, Any]] = [(row.ln_final, norm), (row.unembed_proj, None)]
    gone.append((row.unembed, nn.Identity()))
    if conversion.embed is not None:
        gone += [(row.embed_proj, None), (row.embed_norm, nn.Identity())]
        gone += [(row.pos_embed, _Nothing()), (row.embed, nn.Identity())]
    for places, stand_in in gone:
        for place in (places,) if isinstance(places, str) else places or ():
            if hf.find(own, place) is not None:
                hf.replace_at(own, place, stand_in)
