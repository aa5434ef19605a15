"""A second opinion on a block in half precision: the same block in float32, where nothing rounds.

Longhand code rounds elsewhere than fused code, and a router near a tie then picks another expert.
What tells this from a wrong block: in float32 both compute the same, and in half precision ours is
about as far from that as Hugging Face's own.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from hookedlm.convert.build import Block
from hookedlm.convert.check import HALVES, Truth, check_block, compare, outputs_of, within
from hookedlm.convert.prepare import BlockCall, Call
from hookedlm.layers.opaque import first

Reader = Callable[[nn.Module], tuple[Block, BlockCall]]
"""Our block for one of Hugging Face's, and how it is called."""

ROUNDS = 3.0
"""How many times as far from float32 as Hugging Face's block ours may be: it rounds after every
hook point."""

AGREES = "in float32 it is the same: only rounding makes a difference"


@torch.no_grad()
def only_rounds(
    module: nn.Module, read: Reader, truths: Sequence[Truth], layer: int, routed: bool
) -> bool:
    """Whether nothing but rounding tells our block from Hugging Face's ``module``, with nobody and
    with everybody listening. ``routed``: the median position judges how far rounding goes.

    Needs room for one block in float32, and only where half precision leaves a doubt.
    """
    exact = copy.deepcopy(module).float()
    exact_truths = [_in_float32(exact, truth, layer) for truth in truths]
    if not all(within(x, torch.float32) for x in check_block(*read(exact), exact_truths, 0)):
        return False
    ours, call = read(module)
    for truth, exact_truth in zip(truths, exact_truths, strict=True):
        target, real = exact_truth.outputs[0], truth.real
        theirs = compare(truth.outputs[layer], target, real)
        for out in outputs_of(ours, call, truth, layer):
            away = compare(out, target, real)
            if away.typical > ROUNDS * theirs.typical:
                return False
            if not routed and away.error > ROUNDS * theirs.error:
                return False
    return True


def _in_float32(module: nn.Module, truth: Truth, layer: int) -> Truth:
    """The truth about one block, with what a copy in float32 answers to the same call."""
    given = truth.calls[layer]
    call = Call(_float32(given.hidden), _float32(given.args), _float32(given.kwargs))
    out = first(module(call.hidden, *call.args, **call.kwargs))
    return replace(truth, calls=[call], outputs=[out])


def _float32(value: Any) -> Any:
    """The same with every tensor in half precision made float32; a cache that some families make
    unasked remembers the call that was, and is left out."""
    if isinstance(value, Cache):
        return None
    if isinstance(value, Tensor):
        return value.float() if value.dtype in HALVES else value
    if isinstance(value, (list, tuple)):
        return type(value)(_float32(x) for x in value)
    return {k: _float32(x) for k, x in value.items()} if isinstance(value, dict) else value
