"""The survey's measurements on a choice of types that has every option of a row in it."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
from measuring import Result, measure
from sizes import NOT_BUILT
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL

from hookedlm.families import FAMILIES, Row

ROOT = Path(__file__).resolve().parent.parent
NAMES = {"base", "blocks", "embed", "ln_final", "unembed"}
"""Fields that every file of modules names in its own way."""


def options_of(row: Row) -> set[str]:
    """Which fields a row sets away from Llama's, and for facts in words: to what."""
    plain = Row()
    found = set()
    for field in dataclasses.fields(Row):
        value = getattr(row, field.name)
        if field.name not in NAMES and value != getattr(plain, field.name):
            worded = isinstance(value, str) and "." not in value
            found.add(f"{field.name}={value}" if worded else field.name)
    return found


def chosen() -> list[str]:
    """Types, few of them, that together have every option of any row."""
    left = {
        kind: options_of(row)
        for kind, row in FAMILIES.items()
        if kind in CAUSAL and kind not in NOT_BUILT
    }
    missing = set().union(*left.values())
    found = []
    while missing:
        best = max(sorted(left), key=lambda kind: len(left[kind] & missing))
        found.append(best)
        missing -= left.pop(best)
    return found


@pytest.mark.parametrize("kind", chosen())
def test_a_type_with_an_option_of_its_own(kind: str):
    assert measure(kind).troubles() == []


def test_the_measurements_see_what_is_wrong():
    result = Result("x", "base", numbers={"float32": 1e-4, "padded": "ValueError: no"})
    result.generation["generation with cache"] = False
    result.dead = ["hook_embed (no effect)"]
    assert result.troubles() == [
        "float32 1e-04",
        "padded: ValueError: no",
        "generation with cache: False",
        "1 hooks: hook_embed (no effect)",
    ]
    assert Result("x", "base", crash="ValueError: no").troubles() == ["ValueError: no"]
    assert not Result("x", "base", numbers={"float32": 1e-6}).troubles()


def test_the_page_lists_every_row():
    script = [sys.executable, str(ROOT / "scripts" / "survey.py"), "--check"]
    done = subprocess.run(script, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
