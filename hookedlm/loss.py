"""How well logits predict the next token: cross entropy and accuracy."""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float, Int, Num
from torch import Tensor
from torch.nn.functional import cross_entropy

from hookedlm.errors import InputError


def lm_cross_entropy_loss(
    logits: Float[Tensor, "*batch pos d_vocab"],
    tokens: Int[Tensor, "*batch pos_"],
    attention_mask: Num[Tensor, "*batch pos_"] | Bool[Tensor, "*batch pos_"] | None = None,
    per_token: bool = False,
) -> Float[Tensor, "*out"]:
    """Next-token cross entropy in nats: the mean, or [*batch, pos-1] with ``per_token``.

    Entry ``i`` is minus the log-probability that position ``i`` gives to token ``i + 1``. With a
    mask an entry counts when both its position and its target are real; the others are 0 and are
    left out of the mean. Logits in half precision are scored in float32. A mask that leaves nothing
    to count gives nan.

    Raises InputError when shapes disagree, or when the mean of a single position is asked for.
    """
    same_positions(logits, tokens)
    targets = tokens[..., 1:].to(logits.device)
    n_rows = math.prod(tokens.shape[:-1])
    # One row at a time: the log-softmax of the whole batch would double the peak memory.
    each = [
        row_loss(row[:-1], target)
        for row, target in zip(
            logits.reshape(n_rows, *logits.shape[-2:]),
            targets.reshape(n_rows, targets.shape[-1]),
            strict=True,
        )
    ]
    losses = (torch.stack(each) if each else logits.new_zeros(0)).reshape(targets.shape)

    if attention_mask is None:
        return losses if per_token else mean(losses)
    if attention_mask.shape != tokens.shape:
        raise InputError(
            f"attention_mask {tuple(attention_mask.shape)} and tokens {tuple(tokens.shape)} must "
            "have the same shape"
        )
    real = attention_mask.to(logits.device) != 0
    counted = real[..., :-1] & real[..., 1:]
    losses = losses.masked_fill(~counted, 0.0)
    return losses if per_token else mean(losses, counted)


def lm_accuracy(
    logits: Float[Tensor, "*batch pos d_vocab"],
    tokens: Int[Tensor, "*batch pos_"],
    per_token: bool = False,
) -> Float[Tensor, ""] | Bool[Tensor, "*batch _"]:
    """How often the likeliest next token is right: the fraction, or bools with ``per_token``.

    Raises InputError as `lm_cross_entropy_loss` does.
    """
    same_positions(logits, tokens)
    right = logits[..., :-1, :].argmax(-1) == tokens[..., 1:].to(logits.device)
    return right if per_token else mean(right.float())


def row_loss(
    logits: Float[Tensor, "pos d_vocab"], targets: Int[Tensor, " pos"]
) -> Float[Tensor, " pos"]:
    """Minus the log-probability of each target, in float32 at least."""
    wide = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
    return cross_entropy(wide, targets.long(), reduction="none")


def mean(
    values: Float[Tensor, "*shape"], counted: Bool[Tensor, "*shape"] | None = None
) -> Float[Tensor, ""]:
    """The mean of ``values``, of which only the ``counted`` ones are not 0."""
    if values.numel() == 0:
        raise InputError(
            "there is no next token to predict: give at least two positions (per_token=True "
            "returns the empty tensor)"
        )
    return values.mean() if counted is None else values.sum() / counted.sum()


def same_positions(logits: Tensor, tokens: Tensor) -> None:
    """Raise InputError unless there is one token for each position of the logits."""
    if logits.shape[:-1] != tokens.shape:
        raise InputError(
            f"logits {tuple(logits.shape)} need tokens of shape {tuple(logits.shape[:-1])}, got "
            f"{tuple(tokens.shape)}"
        )
