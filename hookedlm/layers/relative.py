"""Positions as a bias on the scores, learned by distance (arXiv 1910.10683)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from hookedlm.axes import SCORES
from hookedlm.hooks import HookPoint
from hookedlm.layers.attention import Attention, AttentionTensors
from hookedlm.layers.weights import Weights
from hookedlm.spec import AttentionSpec


def bucket_of(
    ahead: Int[Tensor, "pos key_pos"], n_buckets: int, max_distance: int, causal: bool
) -> Int[Tensor, "pos key_pos"]:
    """The bucket of each distance: ``ahead`` is the key's position less the query's.

    Half of the buckets hold one distance each, the others ever more, in equal steps of its
    logarithm, up to ``max_distance``. Unless ``causal``, half of all are for keys ahead; if it is,
    keys ahead share the bucket of distance 0.
    """
    first: Tensor | int = 0
    if causal:
        steps = (-ahead).clamp(min=0)
    else:
        n_buckets //= 2
        first, steps = (ahead > 0).long() * n_buckets, ahead.abs()
    exact = n_buckets // 2
    ratio = torch.log(steps.clamp(min=exact).float() / exact) / math.log(max_distance / exact)
    coarse = (exact + (ratio * (n_buckets - exact)).long()).clamp(max=n_buckets - 1)
    return first + torch.where(steps < exact, steps, coarse)


class RelativePositions(Weights):
    """What a distance adds to a head's scores: rows of ``weight [bucket, head]``."""

    def __init__(self, weight: Float[Tensor, "bucket head"], max_distance: int, causal: bool):
        super().__init__()
        self.put("weight", weight, None, "")
        self.max_distance, self.causal = max_distance, causal

    def forward(self, n_query: int, n_key: int) -> Float[Tensor, "1 head pos key_pos"]:
        """The bias of all distances; the last query stands where the last key does."""
        keys = torch.arange(n_key, device=self.weight.device)
        ahead = keys - keys[n_key - n_query :, None]
        bucket = bucket_of(ahead, self.weight.shape[0], self.max_distance, self.causal)
        return F.embedding(bucket, self.weight).permute(2, 0, 1)[None]

    def extra_repr(self) -> str:
        kind = "causal" if self.causal else "both ways"
        return f"{self.weight.shape[0]} buckets, up to {self.max_distance}, {kind}"


class RelativeAttention(Attention):
    """Attention whose scores may have a bias by distance.

    The layer with ``rel_pos_bias`` computes it (`position_bias`); all layers behind it that have
    none of their own get the same, in their context. ``rel_pos_hook`` sees it there.
    """

    def __init__(
        self,
        spec: AttentionSpec,
        tensors: AttentionTensors,
        positions: RelativePositions | None = None,
    ):
        super().__init__(spec, tensors)
        self.has_relative_attention_bias = positions is not None
        if positions is not None:
            later = dict(self._modules)
            self._modules.clear()  # hook points are listed in the order in which they fire
            self.rel_pos_bias = positions
            self.rel_pos_hook = HookPoint(SCORES, shares=True)
            self._modules.update(later)

    def position_bias(self, n_rows: int, n: int) -> Float[Tensor, "#batch head pos key_pos"]:
        """The bias for a text of ``n`` positions; for every row apart where somebody listens."""
        bias = self.rel_pos_bias(n, n)
        if not self.rel_pos_hook.wanted:
            return bias
        return self.rel_pos_hook(bias.expand(n_rows, -1, -1, -1))
