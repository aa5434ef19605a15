"""`Counterfactuals`: pairs of prompts, and what a model should say once a part was interchanged."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hookedlm.errors import InputError
from hookedlm.lent import loop_of
from hookedlm.model import HookedTransformer
from hookedlm.patching.base_run import BaseRun, Reuse
from hookedlm.patching.ends import Prompts
from hookedlm.patching.pairs import (
    Masks,
    Pair,
    Positions,
    positions_of,
    read_pair,
    read_position,
    token_ids,
)
from hookedlm.patching.readout import ReadOut


@dataclass(frozen=True, eq=False)
class Counterfactuals:
    """Examples for training an interchange. ``labels``: the token that the base should be followed
    by when ``positions`` are interchanged; it is read at ``read_at``."""

    pair: Pair
    labels: Int[Tensor, "example"]
    positions: Positions
    read_at: Int[Tensor, "example"]

    @classmethod
    def of(
        cls,
        model: HookedTransformer,
        base: Prompts,
        source: Prompts,
        labels: Any,
        *,
        positions: Any = "last",
        read_at: Any = "last",
        attention_mask: Masks = None,
        prepend_bos: bool | None = None,
    ) -> Counterfactuals:
        """From texts or tokens, and a label (text or id) for each example. ``positions`` (of all of
        which the swap is made at once) and ``attention_mask`` are as in `interchange`; ``read_at``
        is one of the base's positions. Raises InputError on what does not fit together."""
        pair = read_pair(model, base, source, attention_mask, prepend_bos)
        places = positions_of(pair, "all" if positions is None else positions)
        assert places is not None
        read = read_position(pair.base, read_at)
        ids = token_ids(model, labels)
        if len(ids) != len(pair):
            raise InputError(f"{len(ids)} labels for {len(pair)} examples")
        return cls(pair, ids, places, read)

    def __len__(self) -> int:
        return len(self.pair)

    def rows(self, index: Int[Tensor, "rows"]) -> Counterfactuals:
        """Some of the examples."""
        at = self.positions
        places = Positions(at.labels, at.base[:, index], at.source[:, index])
        return Counterfactuals(
            self.pair.rows(index), self.labels[index], places, self.read_at[index]
        )

    def split(
        self, held_out: float = 0.25, seed: int = 0
    ) -> tuple[Counterfactuals, Counterfactuals]:
        """(examples to train on, examples held out), drawn by a generator of its own. Raises
        InputError if one of them would be empty."""
        n = round(len(self) * held_out)
        if not 0 < n < len(self):
            raise InputError(f"held_out={held_out} of {len(self)} examples leaves one side empty")
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        return self.rows(order[n:]), self.rows(order[:n])

    def shuffled(self, seed: int) -> Counterfactuals:
        """With labels that belong to other examples, drawn at random."""
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        return replace(self, labels=self.labels[order])


def logits_at(model: HookedTransformer, data: Counterfactuals) -> Float[Tensor, "example d_vocab"]:
    """The logits of a run of the base prompts where they are read; others are not computed."""
    tokens, mask = data.pair.base.tokens, data.pair.base.mask
    run = BaseRun(model, tokens, mask, Reuse.NOTHING)
    at = data.read_at.to(tokens.device)
    if loop_of(model) is not None or model.unembed is None:
        logits = model(tokens, attention_mask=mask)
        return ReadOut(run, 1, logits=logits).logits_at(at)[0]
    stream = model(tokens, attention_mask=mask, stop_at_layer=len(model.blocks))
    run.entering = [stream]
    return ReadOut(run, 1, stream=stream).logits_at(at)[0]
