"""Every family this library knows: one row each, in the file of its oldest relative."""

from __future__ import annotations

from hookedlm.families import bloom, gemma, gpt2, gptj, llama, mamba, mixtral, olmo
from hookedlm.families.row import Choice as Choice
from hookedlm.families.row import Row as Row

FAMILIES: dict[str, Row] = {
    **gpt2.ROWS,
    **gptj.ROWS,
    **bloom.ROWS,
    **llama.ROWS,
    **olmo.ROWS,
    **gemma.ROWS,
    **mixtral.ROWS,
    **mamba.ROWS,
}
"""``config.model_type`` -> row."""

GUESSES: tuple[Row, ...] = (llama.LLAMA, gpt2.GPT2)
"""Rows tried, in this order, on a type that has none; the check decides."""
