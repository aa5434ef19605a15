"""Every family this library knows: one row each, in the file of its oldest relative."""

from __future__ import annotations

from hookedlm.families import (
    bart,
    bert_like,
    bloom,
    deepseek,
    gemma,
    gpt2,
    gptj,
    hybrids,
    llama,
    loops,
    mamba,
    mixtral,
    multimodal,
    olmo,
)
from hookedlm.families.row import Choice as Choice
from hookedlm.families.row import Row as Row

FAMILIES: dict[str, Row] = {
    **gpt2.ROWS,
    **gptj.ROWS,
    **bloom.ROWS,
    **llama.ROWS,
    **loops.ROWS,
    **olmo.ROWS,
    **gemma.ROWS,
    **mixtral.ROWS,
    **deepseek.ROWS,
    **mamba.ROWS,
    **hybrids.ROWS,
    **bart.ROWS,
    **bert_like.ROWS,
    **multimodal.ROWS,
}
"""``config.model_type`` -> row."""

GUESSES: tuple[Row, ...] = (llama.LLAMA, gpt2.GPT2)
"""Rows tried, in this order, on a type that has none; the check decides."""
