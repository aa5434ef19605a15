"""The front doors: `load` and `load_demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from hookedlm.model import HookedTransformer


def load(
    model: str | Path | nn.Module,
    tokenizer: Any = None,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    revision: str | None = None,
    strict: bool = False,
    **kwargs: Any,
) -> HookedTransformer:
    """A hooked model with Hugging Face's exact numbers: nothing folded, every block checked.

    ``model``: a hub name (or a short one such as "pythia-70m"), a local checkpoint folder, or a
    module in memory, which stays usable and unchanged (weights are shared until either is edited).
    ``dtype`` and ``device`` default to what the checkpoint or module has (names go to CUDA if there
    is one). ``strict`` refuses models with parts that have no uniform form. Other keywords go to
    transformers' ``from_pretrained``. Raises LoadError and ConversionError.
    """
    return HookedTransformer.load(model, tokenizer, dtype, device, revision, strict, **kwargs)


def load_demo(device: str | torch.device | None = None) -> HookedTransformer:
    """The small trained model that ships with the library: indirect objects, capitals, induction.

    Needs no network. See docs/demo_model.md for what it can do.
    """
    return load("demo", device=device)
