"""Convert: read, build and check every part of a Hugging Face causal LM, and say what was found."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN

from hookedlm.convert import hf
from hookedlm.convert.assembled import assemble
from hookedlm.convert.build import Block, build_read_block
from hookedlm.convert.check import Truth, check_block, compare, not_prepared, run_truth, within
from hookedlm.convert.config_keys import unread
from hookedlm.convert.guess import rows_of
from hookedlm.convert.hf import ConfigReads, Coverage, MissingPartError
from hookedlm.convert.interface import show_heads
from hookedlm.convert.placed import follow, is_away
from hookedlm.convert.prepare import BlockCall, Call, CallRecorder, HFPreparer
from hookedlm.convert.read import (
    AttentionReading,
    BlockReading,
    MoEReading,
    OpaqueReading,
    read_block,
    read_norm,
)
from hookedlm.convert.read_latent import LatentReading
from hookedlm.convert.report import Agreement, Fidelity, PartReport, worse
from hookedlm.convert.tail import OpaqueTail
from hookedlm.convert.temperature import Temperature
from hookedlm.convert.text_model import readable, text_config
from hookedlm.errors import ConversionError, HookedLMError
from hookedlm.families import Row
from hookedlm.layers.bert import BertMLMHead
from hookedlm.layers.context import Context
from hookedlm.layers.embed import Embed, Entrance, PosEmbed, TokenTypeEmbed, Unembed
from hookedlm.layers.norm import Norm
from hookedlm.layers.opaque import OpaqueBlock, OpaqueNorm
from hookedlm.spec import OpaqueSpec


class NotDrivenError(ConversionError):
    """Why a loop of ours can't stand in for Hugging Face's."""


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
    preparer: Any
    """An `HFPreparer`, or the `LentLoop` to which the blocks are lent."""
    fidelity: Fidelity
    type_embed: TokenTypeEmbed | None = None
    embed_ln: Norm | None = None
    mlm_head: BertMLMHead | None = None
    width: int | None = None
    """Width of the stream, where neither an embedding nor a norm of ours tells it."""


def convert(model: nn.Module, strict: bool = False, row: Row | None = None) -> Conversion:
    """Uniform layers on ``model``'s own tensors, each compared with the original. ``row`` says
    where they are, if the type's own or a guess is not to.

    A model that can't be driven block by block keeps Hugging Face's loop, and its blocks are lent
    to that. Raises ConversionError when that fails too, or when ``strict`` and a part had to be
    wrapped. ``model`` itself is neither changed nor kept.
    """
    try:
        return _converted(model, strict, row)
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        if isinstance(error, HookedLMError) and not isinstance(error, NotDrivenError):
            raise
        known = isinstance(error, NotDrivenError)
        why = str(error) if known else f"{type(error).__name__}: {error}"
        refusal = f"{type(model).__name__} could not be run block by block: {why}"
        if strict:
            raise ConversionError(f"strict=True, but {refusal}") from error
        from hookedlm.convert.lend import lend  # here, as that module imports this one

        try:
            return lend(model, why, row)
        except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as second:
            told = f"{refusal}\nNor in its own loop: {second}"
            raise ConversionError(told) from error


def _converted(model: nn.Module, strict: bool, given: Row | None) -> Conversion:
    own = hf.skeleton(readable(model)).eval()
    config = ConfigReads(text_config(own))
    rows, family = rows_of(own, given)
    row = rows[0]
    if row.more_blocks:
        raise NotDrivenError("its blocks stand in several lists")
    if hf.resolved(row.loop_stays, own, config):
        raise NotDrivenError("its loop edits the stream between blocks")
    d_vocab = hf.rows_of_tokens(own, row.embed)
    numbered: dict[str, Any] = {
        "first_position": hf.first_position(hf.find(own, row.pos_embed)),
        "codebooks": int(hf.resolved(row.codebooks, own, config) or 1),
    }
    whole = run_truth(own, [], d_vocab, **numbered) if row.assembled else None
    assemble(own, row)
    layers = list(hf.at(own, row.blocks))
    truth = run_truth(own, layers, d_vocab, **numbered)
    if whole is not None and compare(truth.logits, whole.logits, truth.real).error > 1e-5:
        raise ConversionError(f"{type(model).__name__}'s layers could not be made into blocks")
    if len(truth.calls) != len(layers):
        raise NotDrivenError(
            f"it loops over its blocks: {len(layers)} run {len(truth.calls)} times in one pass"
        )
    if truth.calls[0].hidden.ndim != 3:
        shape = tuple(truth.calls[0].hidden.shape)
        raise NotDrivenError(f"it keeps several streams side by side: {shape}")
    model_type = str(hf.find(own, "config.model_type") or "no config")
    fidelity = Fidelity(model_type, type(model).__name__, str(truth.logits.dtype)[6:], family)
    truths = [truth, run_truth(own, layers, d_vocab, False, **numbered)]
    row = _tried(rows, layers, config, truths)
    entrance = _embedding(own, row, config, truths, fidelity)
    blocks, calls = _blocks(layers, row, config, truths, fidelity)
    ln_final, unembed = reading_out(own, row, config)
    conversion = Conversion(
        own,
        row,
        entrance.embed,
        entrance.pos_embed,
        blocks,
        ln_final,
        unembed,
        None,
        _preparer(own, row, layers, calls, truth, keep_norm=unembed is None),
        fidelity,
        entrance.type_embed,
        entrance.embed_ln,
        _head(own, row, config),
        int(truth.calls[0].hidden.shape[-1]),
    )
    ends = [conversion.embed, conversion.pos_embed, conversion.embed_ln]
    follow([*ends, *blocks, ln_final, conversion.mlm_head, unembed])
    _check_logits(conversion, truth, config)
    _check_preparing(conversion, truth)
    if not fidelity.opaque_parts:  # what is wrapped read its options itself
        fidelity.unread = unread(config)
    if strict:
        fidelity.demand_uniform()
    return conversion


# The parts ----------------------------------------------------------------------------------------


def _tried(
    rows: list[Row], layers: list[nn.Module], config: ConfigReads, truths: list[Truth]
) -> Row:
    """The row that leaves least of the first block opaque; the first of those."""
    if len(rows) == 1:
        return rows[0]
    forms = [checked_block(layers[0], row, config, truths, 0)[2].form for row in rows]
    ranks = [
        2 * ("opaque block" in form) + form.count(" and ") + ("opaque" in form) for form in forms
    ]
    return rows[ranks.index(min(ranks))]


def _embedding(
    own: nn.Module, row: Row, config: ConfigReads, truths: list[Truth], fidelity: Fidelity
) -> Entrance:
    if not row.embed or is_away(hf.at(own, row.embed)):
        away = "its weights are fetched as it runs"
        reason = away if row.embed else "no table was asked for the tokens"
        opaque = PartReport("embed", "opaque embedding", Agreement(0.0, True), None, reason)
        fidelity.parts.append(opaque)
        return Entrance(None)
    table = hf.at(own, row.embed)
    proj = hf.find(own, row.embed_proj)
    position, types = hf.find(own, row.pos_embed), hf.find(own, row.type_embed)
    norm, sum_norm = (_norm_at(own, p, row, config) for p in (row.embed_norm, row.embed_sum_norm))
    scale = hf.resolved(row.embed_scale, own, config)
    if scale == "sqrt(width)":
        scale = table.weight.shape[1] ** 0.5
    W_proj = None if proj is None else hf.flat_weight(proj).t()
    told = "position_ids" in inspect.signature(own.forward).parameters
    entrance = Entrance(
        Embed(table.weight, scale, W_proj, norm),
        None if position is None else PosEmbed(hf.rows_of(position, row.pos_offset), told),
        None if types is None else TokenTypeEmbed(types.weight),
        sum_norm,
    )
    agreement = Agreement(0.0, True)
    if entrance.embed is not None and scale is not None:
        tokens = truths[0].tokens
        with torch.no_grad():
            rows = F.embedding(tokens, table.weight)
            entrance.embed.table_scales = not torch.equal(table(tokens), rows)
    for truth in truths:
        with torch.no_grad():
            stream = entrance(truth.tokens, truth.position_ids)
        agreement = worse(agreement, compare(stream, truth.calls[0].hidden, truth.real))
    if within(agreement, truths[0].calls[0].hidden.dtype):
        fidelity.parts.append(PartReport("embed", "uniform", agreement))
        return entrance
    reason = f"what enters block 0 is not the embedding ({agreement.error:.1e} away)"
    fidelity.parts.append(
        PartReport("embed", "opaque embedding", Agreement(0.0, True), None, reason)
    )
    return Entrance(None)


def _norm_at(own: nn.Module, place: Any, row: Row, config: ConfigReads) -> Norm | None:
    module = hf.find(own, place)
    if module is None:
        return None
    reading = read_norm(module, row, config, Coverage(module))
    return Norm(reading.spec, reading.w, reading.b)


def _blocks(
    layers: list[nn.Module],
    row: Row,
    config: ConfigReads,
    truths: list[Truth],
    fidelity: Fidelity,
) -> tuple[list[Block], list[BlockCall]]:
    blocks, calls = [], []
    for layer, module in enumerate(layers):
        block, call, part = checked_block(module, row, config, truths, layer)
        part = show_heads(part, block, call, truths, layer)
        blocks.append(block)
        calls.append(call)
        fidelity.parts.append(part)
    return blocks, calls


def checked_block(
    module: nn.Module, row: Row, config: ConfigReads, truths: list[Truth], layer: int
) -> tuple[Block, BlockCall, PartReport]:
    """One block: uniform if it can be read completely and computes the same both ways."""
    where = f"blocks.{layer}"
    if layer in truths[0].skipped:
        reason = "text alone does not pass through it"
        whole = OpaqueBlock(OpaqueSpec("block", reason), module)
        call = BlockCall(argument_names(module), opaque=True, may_skip=True)
        return whole, call, PartReport(where, "opaque block", Agreement(0.0, True), None, reason)
    given = BlockCall(argument_names(module), opaque=True).bound(truths[0].calls[layer])
    if given.get(row.rotary_given, row) is None:
        row = row.but(rotary=None)  # the loop gives this layer no tables
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
    call = BlockCall(argument_names(module), opaque=True)
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
            *reading.opaque_norms.items(),
        )
        if isinstance(part, OpaqueReading)
    ]
    if opaque:
        return f"opaque {' and '.join(opaque)} in uniform block"
    return f"uniform, {reading.spec.layout}"


def _opaque_reasons(reading: BlockReading) -> list[str]:
    parts = (reading.attn, reading.mlp, reading.mixer, *reading.opaque_norms.values())
    return [part.spec.reason for part in parts if isinstance(part, OpaqueReading)]


def argument_names(module: nn.Module) -> tuple[str, ...]:
    """What a block takes besides the stream, in order."""
    parameters = list(inspect.signature(module.forward).parameters.values())[1:]
    return tuple(p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD)


def _call_of(module: nn.Module, row: Row, reading: BlockReading) -> BlockCall:
    table = hf.find(module, row.mask_table)
    attn = reading.attn if isinstance(reading.attn, AttentionReading) else None
    opaque = any(isinstance(p, OpaqueReading) for p in (reading.attn, reading.mlp, reading.mixer))
    sparse = isinstance(attn, LatentReading) and attn.spec.sparse
    rotary = None if attn is None else attn.rotary_style
    return BlockCall(
        argument_names(module),
        opaque=opaque or sparse,
        picks=row.picks_given if sparse else None,
        mask_hides=row.mask_hides,
        bias=row.bias if isinstance(row.bias, str) else None,
        n_heads=0 if attn is None else attn.spec.n_heads,
        rotary=rotary,
        attn=attn.module if attn is not None and rotary == "pairs" else None,
        mask_table=None if table is None else table.bool(),
        table_is_causal=table is not None and bool((table == torch.ones_like(table).tril()).all()),
        tables_given=row.rotary_given,
        tables=None if rotary is None else hf.find(module, row.rotary_tables),
        temperature=None
        if attn is None or attn.spec.temperature is None
        else Temperature(attn.spec.temperature, attn.module),
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


def _head(own: nn.Module, row: Row, config: ConfigReads) -> BertMLMHead | None:
    """What some families compute between the stream and the unembedding."""
    dense, norm = hf.find(own, row.head_dense), _norm_at(own, row.head_norm, row, config)
    if dense is None or norm is None:
        return None
    act = hf.resolved(row.head_act, own, config)
    act = ACT2FN[act] if isinstance(act, str) else act
    return BertMLMHead(hf.flat_weight(dense).t(), hf.bias_of(dense), act, norm)


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
    return preparer


def _check_preparing(conversion: Conversion, truth: Truth) -> None:
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


def _check_logits(conversion: Conversion, truth: Truth, config: ConfigReads) -> None:
    """The last stream read out our way; if that is not Hugging Face's way, theirs is kept."""
    # Some heads answer in float32 whatever the model computes in.
    stream, dtype = truth.outputs[-1], truth.calls[0].hidden.dtype
    own, fidelity = conversion.own, conversion.fidelity
    reason = "the head is no plain matrix"
    if conversion.unembed is not None:
        agreement = _read_out(conversion, truth)
        if not within(agreement, dtype) and conversion.unembed.scaled:
            # A wrapper with a head of its own may leave out what the text model's head does.
            bare = conversion.row.but(logit_scale=None, logit_divisor=None, logit_softcap=None)
            _, conversion.unembed = reading_out(own, bare, config)
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
        raise NotDrivenError(
            "something between its blocks and its logits could not be reproduced "
            f"({agreement.error:.1e} away)"
        )
    conversion.tail, conversion.ln_final, conversion.unembed = tail, None, None
    conversion.mlm_head = None
    if conversion.embed is not None and hf.find(own, conversion.row.embed_proj) is not None:
        # The tail needs the base whole, and a base that projects takes no stream of ours.
        conversion.embed = conversion.pos_embed = None
        conversion.type_embed = conversion.embed_ln = None
        projects = "its projection stays with the head, which is opaque"
        fidelity.parts[0] = PartReport(
            "embed", "opaque embedding", Agreement(0.0, True), None, projects
        )
    fidelity.parts.append(PartReport("logits", "opaque head", agreement, None, reason))


def _read_out(conversion: Conversion, truth: Truth) -> Agreement:
    """Our norm and unembedding on the last stream; infinitely wrong where they don't even fit."""
    stream = truth.outputs[-1]
    if stream.shape[:2] != truth.tokens.shape:  # a prompt of its own before it, say
        return Agreement(float("inf"), False)
    try:
        with torch.no_grad():
            normed = stream if conversion.ln_final is None else conversion.ln_final(stream)
            normed = normed if conversion.mlm_head is None else conversion.mlm_head(normed)
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
    """Stands where a position embedding was: adds zero to whatever it is added to. Some bases ask
    their first parameter for its dtype: this one."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.weight = nn.Parameter(weight.detach().new_empty(0), requires_grad=False)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return torch.zeros(())


class _Words(nn.Module):
    """Stands where the token embedding was: asks ours, which owns the weights now."""

    def __init__(self, embed: Embed):
        super().__init__()
        self.embed = [embed]  # in a list, so that it is no sub-module

    def forward(self, x: Tensor) -> Tensor:
        return x if x.is_floating_point() else self.embed[0].words(x)


def _strip(conversion: Conversion) -> None:
    """Take out of our copy of the base what our own layers do, so that it holds no weights."""
    own, row = conversion.own, conversion.row
    norm = _Passes(getattr(hf.find(own, row.ln_final), "weight", None))
    gone: list[tuple[Any, Any]] = [(row.ln_final, norm), (row.unembed_proj, None)]
    gone += [(place, nn.Identity()) for place in (row.unembed, row.head_dense, row.head_norm)]
    if conversion.embed is not None:
        gone += [(row.embed_proj, None), (row.embed_norm, nn.Identity())]
        W_E = conversion.embed.W_E
        gone += [(row.pos_embed, _Nothing(W_E)), (row.embed, _Words(conversion.embed))]
        gone += [(row.type_embed, _Nothing(W_E)), (row.embed_sum_norm, nn.Identity())]
    for places, stand_in in gone:
        for place in (places,) if isinstance(places, str) else places or ():
            if isinstance(hf.find(own, place), nn.Module):
                hf.replace_at(own, place, stand_in)
