"""The front doors: `load` and `load_demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from hookedlm.convert.convert import convert
from hookedlm.families import Row
from hookedlm.model import HookedTransformer


def load(
    model: str | Path | nn.Module,
    tokenizer: Any = None,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    revision: str | None = None,
    strict: bool = False,
    row: Row | None = None,
    **kwargs: Any,
) -> HookedTransformer:
    """A hooked model with Hugging Face's exact numbers: nothing folded, every block checked.

    ``model``: a hub name (or a short one such as "pythia-70m"), a local checkpoint folder, or a
    module in memory, which stays usable and unchanged (weights are shared until either is edited).
    A module may be of any class with numbered layers whose forward turns token ids into logits;
    ``row`` says where its parts are if `guess_templates` guesses wrong.
    ``dtype`` and ``device`` default to what the checkpoint or module has (names go to CUDA if there
    is one). ``strict`` refuses models with parts that have no uniform form. Other keywords go to
    transformers' ``from_pretrained``. Raises LoadError and ConversionError.
    """
    if row is not None:
        kwargs["row"] = row
    return HookedTransformer.load(model, tokenizer, dtype, device, revision, strict, **kwargs)


def guess_templates(model: nn.Module) -> Row:
    """Where `load` finds the parts of a model, as a `Row` that prints as source.

    A known type has its family's row. Any other class is matched: its blocks are the shortest
    ``*.{number}`` path that occurs once per layer and holds attention, a mixer or an MLP
    ("Auto-matching hidden layers in PyTorch LLMs"); the rest is told by one pass over three tokens
    and by the order in which a block's modules run, and of the rows that fit the one is taken that
    leaves least opaque. Correct it with ``load(model, row=guess_templates(model).but(...))``.
    Raises ConversionError, naming the place that is missing, where the blocks can't be found.
    """
    return convert(model).row


def load_demo(device: str | torch.device | None = None) -> HookedTransformer:
    """The small trained model that ships with the library: indirect objects, capitals, induction.

    Needs no network. See docs/demo_model.md for what it can do.
    """
    return load("demo", device=device)
