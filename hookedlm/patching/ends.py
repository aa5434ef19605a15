"""The two runs of a sweep: what is patched, and what with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from jaxtyping import Int
from torch import Tensor

from hookedlm.cache import ActivationCache
from hookedlm.errors import InputError
from hookedlm.interventions import What
from hookedlm.interventions.from_runs import Run
from hookedlm.patching.supplied import own_source

if TYPE_CHECKING:
    from hookedlm.model import HookedTransformer

Prompts: TypeAlias = str | Sequence[str] | Int[Tensor, "batch pos"] | Int[Tensor, "pos"]


@dataclass
class Prompt:
    """Tokens, and which are real (None: all)."""

    tokens: Int[Tensor, "batch pos"]
    mask: Int[Tensor, "batch pos"] | None

    def rows(self, n: int) -> Prompt:
        """The same for ``n`` rows, if it has one."""
        mask = None if self.mask is None else self.mask.expand(n, -1)
        return Prompt(self.tokens.expand(n, -1), mask)


@dataclass
class Ends:
    """The two runs between which is patched: ``source`` a prompt, or recorded activations."""

    base: Prompt
    source: Prompt | Run | None
    text: list[str] | None


def read_ends(
    model: HookedTransformer,
    base: Prompts,
    source: Run | None,
    mask: Tensor | None,
    prepend_bos: bool | None,
) -> Ends:
    """Both runs' prompts, tokenized. Raises InputError unless they are of equal length."""
    here = _prompt(model, "base", base, mask, prepend_bos)
    text = None
    if len(here.tokens) == 1 and model.tokenizer is not None:
        text = [str(piece) for piece in model.to_str_tokens(here.tokens[0])]
    if source is None or isinstance(source, Mapping | ActivationCache):
        return Ends(here, source, text)
    there = _prompt(model, "source", source, mask, prepend_bos)
    n = max(len(here.tokens), len(there.tokens))
    for what, prompt in (("base", here), ("source", there)):
        if len(prompt.tokens) not in (1, n):
            raise InputError(f"{what} has {len(prompt.tokens)} prompts for {n} of the other run")
    _check_alike(here, there)
    return Ends(here.rows(n), there, text)


def _prompt(
    model: HookedTransformer, what: str, given: Any, mask: Tensor | None, bos: bool | None
) -> Prompt:
    if isinstance(given, Tensor) and given.is_floating_point():
        raise InputError(f"{what} is a float tensor: expected text, texts or tokens [batch, pos]")
    one = isinstance(given, str) or (isinstance(given, Tensor) and given.ndim == 1)
    if mask is not None and mask.ndim == 2 and (one or len(given) == 1):
        mask = mask[:1]  # one row here, and several in the other run
    tokens, known, _ = model._read_input(given, bos, None, None, None, mask)
    assert tokens is not None
    return Prompt(tokens, known)


def _check_alike(base: Prompt, source: Prompt) -> None:
    n, m = base.tokens.shape[1], source.tokens.shape[1]
    lengths = [
        torch.full((len(p.tokens),), p.tokens.shape[1]) if p.mask is None else p.mask.sum(1).cpu()
        for p in (base, source)
    ]
    first, second = torch.broadcast_tensors(*lengths)
    if n == m and bool((first == second).all()):
        return
    example = int((first != second).nonzero()[0]) if bool((first != second).any()) else 0
    raise InputError(
        f"base has {int(first[example])} tokens and source {int(second[example])}"
        + (f" in example {example}" if len(first) > 1 else "")
        + ": patching wants prompts of equal length, position by position"
    )


def check_source(ends: Ends, what: What | None, direction: str) -> None:
    """Raise InputError unless there is a source where one is wanted, and none elsewhere."""
    source = ends.source
    wanted = what is None or (what.needs_source and not own_source(what))
    if wanted and source is None:
        raise InputError(
            "there is nothing to patch with: give source= (a prompt like the base, or a cache of "
            "one), or what= (for instance Zero())"
        )
    if not wanted and source is not None:
        raise InputError(f"{what!r} takes nothing from a source: leave source= out")
    if direction == "denoise":
        return
    if not isinstance(source, Prompt):
        raise InputError(
            f"direction={direction!r} patches base into source, which must then be a prompt"
        )
