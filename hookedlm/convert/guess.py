"""Which row: the given one, the model type's, a relative's on trial, or one made by matching."""

from __future__ import annotations

from typing import Any

from torch import nn

from hookedlm.convert import hf
from hookedlm.convert.match import guess_blocks as guess_blocks
from hookedlm.convert.match import matched_rows, runs
from hookedlm.convert.text_model import placed, text_config
from hookedlm.errors import ConversionError
from hookedlm.families import FAMILIES, GUESSES, Row

TRIED = (AttributeError, LookupError, RuntimeError, TypeError, ValueError)
"""What running or searching a class that nobody described may end in."""


def row_of(model: nn.Module) -> tuple[Row, str]:
    """(the row, what to call it) for a model, by its type or by trial."""
    rows, name = rows_of(model)
    return rows[0], name


def rows_of(model: nn.Module, given: Row | None = None) -> tuple[list[Row], str]:
    """(rows to try, best guesses first, what to call them). More than one differ in blocks only."""
    model_type = str(hf.find(text_config(model), "model_type") or "")
    if given is not None:
        return [placed(given, model)], "the given row"
    if model_type in FAMILIES:
        return [placed(FAMILIES[model_type], model)], model_type
    lacks = f"{model_type!r} has no row" if model_type else "a class without a model type"
    for row, name in zip((placed(row, model) for row in GUESSES), ("llama", "gpt2"), strict=True):
        if all(hf.find(model, place) is not None for place in (row.base, row.blocks, row.embed)):
            row = row.but(base=row.base if runs(hf.at(model, row.base)) else "")
            return [row, *_with_blocks_of(row, model)], f"{name} (a guess: {lacks})"
    return matched_rows(model), f"its modules' names and order ({lacks})"


def _with_blocks_of(row: Row, model: nn.Module) -> list[Row]:
    """A relative's row with what matching finds in the blocks."""
    try:
        matched = matched_rows(model)
    except (*TRIED, ConversionError):
        return []
    model_places: dict[str, Any] = {
        name: vars(row)[name]
        for name in ("base", "blocks", "embed", "embed_scale", "pos_embed", "ln_final", "unembed")
    }
    return [one.but(**model_places) for one in matched]
