"""The text decoder of a checkpoint, whatever wraps it, and where its row's places are in there.

A row is written for a text model alone (``model.layers``). In a model that also sees or hears, the
same modules stand below another path (``model.language_model.layers``), often with the head
elsewhere: places are looked up where the decoder is.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    PreTrainedModel,
)

from hookedlm.convert import hf
from hookedlm.convert.placed import device_of
from hookedlm.families import Row
from hookedlm.families.row import Place

PLACES = (
    "base",
    "blocks",
    "more_blocks",
    "embed",
    "embed_norm",
    "embed_proj",
    "embed_sum_norm",
    "pos_embed",
    "type_embed",
    "ln_final",
    "head_dense",
    "head_norm",
    "unembed",
    "unembed_proj",
)
"""Entries of a row that are places in the model."""

FACTS = ("embed_scale", "logit_scale", "logit_divisor", "logit_softcap")
"""Entries of a row that may be read off the model."""

AUTO_CLASSES = (AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM)
"""Who turns a config into a model with logits, those of text alone first."""

BESIDES_TEXT = ("pixel", "image", "video", "audio", "speech", "input_features", "input_values")
"""What inputs that are not text have in their names."""


def text_config(model: Any) -> Any:
    """The config of a model's text decoder; None where a class has no config."""
    config = vars(model).get("config")
    find = getattr(config, "get_text_config", None)
    return config if find is None else find()


def decoder_path(model: nn.Module) -> str | None:
    """Where transformers says the text decoder is, as a path; None if it does not say."""
    if not isinstance(model, PreTrainedModel):
        return None
    decoder: Any
    try:
        decoder = model.get_decoder()
    except (AttributeError, NotImplementedError):
        return None
    return next((name for name, module in model.named_modules() if module is decoder), None)


def auto_class(config: Any) -> Any:
    """Which of transformers' Auto classes reads a checkpoint: the one whose class of this config is
    what the checkpoint was saved from, else the first that knows the config."""
    knowing = [auto for auto in AUTO_CLASSES if type(config) in auto._model_mapping]
    saved_from = set(hf.find(config, "architectures") or ())
    for auto in knowing:
        if auto._model_mapping[type(config)].__name__ in saved_from:
            return auto
    return knowing[0] if knowing else AutoModelForCausalLM  # which says what it knows


def readable(model: nn.Module) -> nn.Module:
    """The outermost model that turns tokens into logits by itself.

    That is ``model``, unless it can't run on text alone (BLIP-2 wants an image): then the language
    model inside it.
    """
    path = decoder_path(model)
    if path is None or not _takes_more(model) or _runs_on_text(model):
        return model
    for place in _ancestors(path)[1:]:
        inner = hf.at(model, place)
        head = inner.get_output_embeddings() if isinstance(inner, PreTrainedModel) else None
        if head is not None and _runs_on_text(inner):
            return inner
    return model


def _takes_more(model: nn.Module) -> bool:
    """Whether a forward has inputs that are not text."""
    names = inspect.signature(model.forward).parameters
    return any(word in name for name in names for word in BESIDES_TEXT)


@torch.no_grad()
def _runs_on_text(model: nn.Module) -> bool:
    """Tried on two tokens: whether an image may be absent is written in no signature."""
    device = device_of(model)
    tokens = torch.ones((1, 2), dtype=torch.long, device=device)
    try:
        return isinstance(model(input_ids=tokens).logits, torch.Tensor)
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError):
        return False


def placed(row: Row, model: Any) -> Row:
    """``row`` with its places where the text decoder of ``model`` is: the same row if all are where
    it says, else below the decoder's path. What can't be found at all stays as it was."""
    if all(hf.find(model, place) is not None for place in (row.base, row.blocks, row.embed)):
        return row
    path = decoder_path(model)
    if path is None:
        return row
    if hf.find(hf.at(model, path), row.blocks) is not None:  # a whole language model is in there
        old, new = "", f"{path}."
    else:
        old, new = f"{row.base}.", f"{path}." if path else ""
    moved: dict[str, Any] = {name: _moved(getattr(row, name), old, new) for name in PLACES}
    moved["base"] = _base(model, path if old else f"{path}.{row.base}")
    for name in FACTS:
        fact = getattr(row, name)
        if isinstance(fact, str) and "." in fact and not fact.startswith("config."):
            fact = _moved(fact, old, new)
            moved[name] = fact if hf.find(model, str(fact).removeprefix(".")) is not None else None
    for name, module in (
        ("embed", model.get_input_embeddings()),
        ("unembed", model.get_output_embeddings()),
    ):
        if hf.find(model, moved[name]) is None and module is not None:
            moved[name] = next(path for path, m in model.named_modules() if m is module)
    return row.but(**moved)


def _moved(place: Place, old: str, new: str) -> Place:
    if place is None:
        return None
    if isinstance(place, tuple):
        return tuple(str(_moved(one, old, new)) for one in place)
    return new + place.removeprefix(old) if place.startswith(old) else place


def _ancestors(path: str) -> list[str]:
    """Paths of the modules around and including the one at ``path``, from outside in."""
    parts = path.split(".") if path else []
    return ["", *(".".join(parts[: i + 1]) for i in range(len(parts)))]


def _base(model: nn.Module, path: str) -> str:
    """The module whose run makes masks and positions: the outermost that merges what is not text
    into the embeddings (it may mask by what is an image), else the decoder itself."""
    _, *around, _ = _ancestors(path) if path else ["", ""]
    for place in (*around, ""):
        module = hf.at(model, place)
        accepts = inspect.signature(module.forward).parameters
        if "inputs_embeds" in accepts and _takes_more(module):
            return place
    return path
