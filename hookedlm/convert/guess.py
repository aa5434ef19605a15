"""Which row: the model type's, a relative's on trial, or one made from the modules' names."""

from __future__ import annotations

import inspect
import re
from collections import Counter
from typing import Any

from torch import nn

from hookedlm.convert import hf
from hookedlm.errors import ConversionError
from hookedlm.families import FAMILIES, GUESSES, Row


def row_of(model: Any) -> tuple[Row, str]:
    """(the row, what to call it) for a model, by its type or by trial."""
    model_type = getattr(model.config, "model_type", "")
    if model_type in FAMILIES:
        return FAMILIES[model_type], model_type
    for row, name in zip(GUESSES, ("llama", "gpt2"), strict=True):
        if all(hf.find(model, place) is not None for place in (row.base, row.blocks, row.embed)):
            return row, f"{name} (a guess: {model_type!r} has no row)"
    return matched_row(model), f"nothing known (matched by module names: {model_type!r} has no row)"


def guess_blocks(model: nn.Module) -> str:
    """The path of the list of blocks: the shortest ``*.<number>`` pattern whose modules contain a
    token mixer, occurring at least as often as any other. Raises ConversionError if none does."""
    words = re.compile(r"attn|attention|mixer|mamba|mlp|ffn|feed_forward|moe", re.I)
    found: Counter[str] = Counter()
    for name, module in model.named_modules():
        parts = name.rsplit(".", 1)
        if (
            len(parts) == 2
            and parts[1].isdigit()
            and any(words.search(child) for child, _ in module.named_modules())
        ):
            found[parts[0]] += 1
    outermost = {p: n for p, n in found.items() if not any(p.startswith(q + ".") for q in found)}
    if not outermost:
        raise ConversionError(
            f"{type(model).__name__} has no numbered list of blocks with attention or a mixer in "
            "them; hookedlm can't tell where its residual stream runs."
        )
    return max(outermost, key=lambda path: (outermost[path], -len(path)))


def matched_row(model: Any) -> Row:
    """A row that knows only where the blocks, the embedding and the head are."""
    blocks = guess_blocks(model)
    parent = blocks.rsplit(".", 1)[0] if "." in blocks else ""
    names = {id(module): name for name, module in model.named_modules()}
    children = list(hf.at(model, parent).named_children() if parent else model.named_children())
    base = parent
    while (
        "." in base and "input_ids" not in inspect.signature(hf.at(model, base).forward).parameters
    ):
        base = base.rsplit(".", 1)[0]
    after = children[[name for name, _ in children].index(blocks.rsplit(".", 1)[-1]) + 1 :]
    norms = [
        name for name, child in after if re.search(r"norm|ln", name) and not list(child.children())
    ]
    embed = names.get(id(model.get_input_embeddings()))
    head = names.get(id(model.get_output_embeddings()))
    if embed is None or head is None or not parent:
        raise ConversionError(f"{type(model).__name__} does not tell its embedding or its head")
    return Row(
        base=base,
        blocks=blocks,
        embed=embed,
        unembed=head,
        attn=None,
        mlp=None,
        ln1=None,
        ln2=None,
        ln_final=f"{parent}.{norms[0]}" if norms else None,
    )
