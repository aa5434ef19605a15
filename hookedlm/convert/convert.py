"""Convert: read, build and check every part of a Hugging Face causal LM, and say what was found."""

from __future__ import annotations

from typing import Any

from torch import nn

from hookedlm.convert import hf
from hookedlm.convert.assembled import assemble
from hookedlm.convert.blocks import best_row, checked_blocks
from hookedlm.convert.check import Truth, compare, run_truth
from hookedlm.convert.config_keys import unread
from hookedlm.convert.conversion import Conversion, NotDrivenError
from hookedlm.convert.driving import check_preparing, preparer_of
from hookedlm.convert.ends import (
    check_logits,
    checked_entrance,
    read_head,
    reading_out,
    stream_axes,
)
from hookedlm.convert.guess import rows_of
from hookedlm.convert.hf import ConfigReads
from hookedlm.convert.lend import lend
from hookedlm.convert.placed import follow
from hookedlm.convert.report import Fidelity
from hookedlm.convert.text_model import readable, text_config
from hookedlm.errors import ConversionError, HookedLMError
from hookedlm.families import Row


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
    _demand_known(own, row, config)
    if row.more_blocks:
        raise NotDrivenError("its blocks stand in several lists")
    if hf.resolved(row.loop_stays, own, config):
        raise NotDrivenError("its loop edits the stream between blocks")
    layers, truths = _observed(own, row, config)
    truth = truths[0]
    model_type = str(hf.find(own, "config.model_type") or "no config")
    fidelity = Fidelity(model_type, type(model).__name__, str(truth.logits.dtype)[6:], family)
    row = best_row(rows, layers, config, truths)
    entrance = checked_entrance(own, row, config, truths, fidelity)
    blocks, calls = checked_blocks(layers, row, config, truths, fidelity)
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
        preparer_of(own, row, layers, calls, truth, keep_norm=unembed is None),
        fidelity,
        entrance.type_embed,
        entrance.embed_ln,
        read_head(own, row, config),
        int(truth.calls[0].hidden.shape[-1]),
        stream_axes(blocks, truth),
    )
    ends = [conversion.embed, conversion.pos_embed, conversion.embed_ln]
    follow([*ends, *blocks, ln_final, conversion.mlm_head, unembed])
    check_logits(conversion, truth, config)
    check_preparing(conversion, truth)
    if not fidelity.opaque_parts:  # what is wrapped read its options itself
        fidelity.unread = unread(config)
    if strict:
        fidelity.demand_uniform()
    return conversion


def _demand_known(own: nn.Module, row: Row, config: ConfigReads) -> None:
    """Raise ConversionError where the check's short texts can't show that blocks go wrong."""
    if row.refused is None:
        return
    fact, value, what_to_do = row.refused
    if hf.resolved(fact, own, config) == value:
        raise ConversionError(f"{type(own).__name__}: {what_to_do}")


def _observed(own: Any, row: Row, config: ConfigReads) -> tuple[list[nn.Module], list[Truth]]:
    """The blocks, and what they did in two passes of Hugging Face's: padded, and not. Raises
    NotDrivenError where they do not each pass the one stream on once."""
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
        raise ConversionError(f"{type(own).__name__}'s layers could not be made into blocks")
    if len(truth.calls) != len(layers):
        raise NotDrivenError(
            f"it loops over its blocks: {len(layers)} run {len(truth.calls)} times in one pass"
        )
    if truth.calls[0].hidden.ndim != 3:
        shape = tuple(truth.calls[0].hidden.shape)
        raise NotDrivenError(f"it keeps several streams side by side: {shape}")
    if truth.calls[0].hidden.shape[:2] == truth.real.shape[::-1]:
        raise NotDrivenError("its stream is [pos, batch, d_model]")
    return layers, [truth, run_truth(own, layers, d_vocab, False, **numbered)]
