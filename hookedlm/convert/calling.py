"""How a language model of any class is called: what it names its tokens, where its logits are."""

from __future__ import annotations

import inspect
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from hookedlm.errors import ConversionError


def first_argument(module: nn.Module) -> str:
    """The name of the first parameter of a module's forward."""
    return next(iter(inspect.signature(module.forward).parameters), "")


def tokens_name(model: nn.Module) -> str:
    """What a model's forward calls its token ids: ``input_ids``, or whatever it takes first."""
    names = inspect.signature(model.forward).parameters
    return "input_ids" if "input_ids" in names else first_argument(model)


def logits_of(output: Any) -> Float[Tensor, "batch pos d_vocab"]:
    """The logits in what a model returned: its ``logits``, or the first tensor that has their rank.

    Raises ConversionError if there is none.
    """
    found = getattr(output, "logits", None)
    if found is None:
        values = output.values() if isinstance(output, dict) else output
        several = [output] if isinstance(output, Tensor) else values
        found = next((x for x in several if isinstance(x, Tensor) and x.ndim == 3), None)
    if found is None:
        raise ConversionError(
            f"forward returned {type(output).__name__}: expected logits [batch, pos, d_vocab], "
            "alone, first in a tuple, or as .logits"
        )
    return found
