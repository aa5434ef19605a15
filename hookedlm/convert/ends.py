"""What stands before the blocks and after them: embeddings, the final norm, the logits."""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import ACT2FN

from hookedlm.axes import PATCHES, STREAM, split_axes
from hookedlm.convert import hf
from hookedlm.convert.build import Block
from hookedlm.convert.check import HALVES, Truth, compare, within
from hookedlm.convert.conversion import Conversion, NotDrivenError
from hookedlm.convert.hf import ConfigReads, Coverage, MissingPartError
from hookedlm.convert.placed import is_away
from hookedlm.convert.read import read_norm
from hookedlm.convert.report import Agreement, Fidelity, PartReport, worse
from hookedlm.convert.strip import strip
from hookedlm.convert.tail import OpaqueTail
from hookedlm.families import Row
from hookedlm.layers.bert import BertMLMHead
from hookedlm.layers.embed import Embed, Entrance, PosEmbed, TokenTypeEmbed, Unembed
from hookedlm.layers.norm import Norm
from hookedlm.layers.opaque import OpaqueBlock, OpaqueNorm
from hookedlm.spec import OpaqueSpec


def checked_entrance(
    own: nn.Module, row: Row, config: ConfigReads, truths: list[Truth], fidelity: Fidelity
) -> Entrance:
    """What embeds the tokens; empty where Hugging Face's is to be asked instead. What became of it
    is added to ``fidelity``."""
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


def read_head(own: nn.Module, row: Row, config: ConfigReads) -> BertMLMHead | None:
    """What some families compute between the stream and the unembedding."""
    dense, norm = hf.find(own, row.head_dense), _norm_at(own, row.head_norm, row, config)
    if dense is None or norm is None:
        return None
    act = hf.resolved(row.head_act, own, config)
    act = ACT2FN[act] if isinstance(act, str) else act
    return BertMLMHead(hf.flat_weight(dense).t(), hf.bias_of(dense), act, norm)


def stream_axes(blocks: list[Block], truth: Truth) -> str:
    """The axes of the stream, which blocks that are opaque are told too: where it has other
    positions than the tokens (a prompt of the model's own before them, say), they are no tokens."""
    if truth.calls[0].hidden.shape[:2] == truth.real.shape:
        return STREAM
    for block in blocks:
        if isinstance(block, OpaqueBlock):
            block.hook_resid_pre.axes = block.hook_resid_post.axes = split_axes(PATCHES)
    return PATCHES


def check_logits(conversion: Conversion, truth: Truth, config: ConfigReads) -> None:
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
            strip(conversion)
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
            half = conversion.unembed.W_U.dtype in HALVES
            conversion.unembed.upcasts = half and truth.logits.dtype == torch.float32
            return compare(conversion.unembed(normed), truth.logits, truth.real)
    except RuntimeError:  # something between them changes the width
        return Agreement(float("inf"), False)
