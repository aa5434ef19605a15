"""`sample_logits`: one token drawn from the logits of a position."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import TopKLogitsWarper, TopPLogitsWarper

from hookedlm.errors import InputError
from hookedlm.generation import FrequencyPenalty


def sample_logits(
    final_logits: Float[Tensor, "*batch d_vocab"],
    top_k: int | None = None,
    top_p: float | None = None,
    temperature: float = 1.0,
    freq_penalty: float = 0.0,
    tokens: Int[Tensor, "*batch pos"] | None = None,
) -> Int[Tensor, "*batch"]:
    """A token for every row of logits, drawn with torch's global generator.

    In this order: divided by ``temperature``; less ``freq_penalty`` for each time a token occurs in
    ``tokens``; only the ``top_k`` likeliest kept; only the likeliest that together reach ``top_p``
    kept (arXiv 1904.09751). Temperature 0 gives the likeliest token. The last two are transformers'
    logits warpers.

    Raises InputError for values out of range, and for a penalty without ``tokens``.
    """
    _check(top_k, top_p, temperature, freq_penalty, tokens)
    if temperature == 0:
        return final_logits.argmax(-1)
    leading = final_logits.shape[:-1]
    scores = final_logits.reshape(-1, final_logits.shape[-1]).float() / temperature
    past = torch.zeros(len(scores), 0, dtype=torch.long, device=scores.device)
    if freq_penalty and tokens is not None:
        if tokens.shape[:-1] != leading:
            raise InputError(
                f"logits {tuple(final_logits.shape)} need tokens of shape {(*leading, 'pos')}, got "
                f"{tuple(tokens.shape)}"
            )
        past = tokens.reshape(len(scores), -1).to(scores.device)
        scores = FrequencyPenalty(freq_penalty)(past, scores)
    if top_k is not None:
        scores = TopKLogitsWarper(top_k)(past, scores)
    if top_p is not None:
        scores = TopPLogitsWarper(float(top_p))(past, scores)
    return torch.multinomial(scores.softmax(-1), 1).reshape(leading)


def _check(
    top_k: int | None,
    top_p: float | None,
    temperature: float,
    freq_penalty: float,
    tokens: Tensor | None,
) -> None:
    if top_k is not None and (isinstance(top_k, bool) or top_k < 1):
        raise InputError(f"top_k={top_k}: expected how many tokens to choose from, 1 or more")
    if top_p is not None and not 0 < top_p <= 1:
        raise InputError(f"top_p={top_p}: expected a probability, above 0 and at most 1")
    if not temperature >= 0:
        raise InputError(f"temperature={temperature}: expected 0 (the likeliest token) or more")
    if freq_penalty and tokens is None:
        raise InputError(f"freq_penalty={freq_penalty} counts tokens: pass them as tokens=")
