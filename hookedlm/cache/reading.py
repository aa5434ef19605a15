"""`Reading`: linear functions of the stream, pulled back through norms instead of pushing parts
forward, so that attributing to many components never makes a ``d_model`` vector of each."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from hookedlm.layers.norm import Norm


@dataclass(frozen=True)
class Reading:
    """``x -> factor * (directions @ x)``: ``out`` numbers for every row and position.

    ``directions [*rows, out, d_model]`` broadcasts against ``[batch, pos]``: one set for all, one a
    row, or one a position. ``factor [*batch_pos, 1]`` holds the cached scales apart, which keeps
    the directions as few as they were. In float32.
    """

    directions: Float[Tensor, "*rows out d_model"]
    factor: Float[Tensor, "*batch_pos 1"] | float = 1.0

    def of(self, x: Float[Tensor, "*parts d_model"]) -> Float[Tensor, "*parts out"]:
        """The reading of streams, or of parts stacked in front."""
        directions = self.directions.to(x.device)
        return torch.einsum("...d,...od->...o", x.float(), directions) * self.factor_on(x.device)

    def before(self, norm: Norm, scale: Float[Tensor, "*batch_pos 1"]) -> Reading:
        """What to read before a norm so as to read this behind it, its scale held fixed.

        Centring is its own transpose, a weight too: ``d·(w (x - mean x) / s)`` is
        ``(w d - mean(w d))·x / s``.
        """
        directions = norm.centred(self.directions * norm.weight.to(self.directions.device))
        return Reading(directions, self.factor / scale.float())

    def times(self, factor: float | Float[Tensor, "d_model"]) -> Reading:
        """What to read before a multiplication."""
        if isinstance(factor, Tensor):
            return Reading(self.directions * factor.to(self.directions.device), self.factor)
        return self if factor == 1.0 else Reading(self.directions, self.factor * factor)

    def through(
        self, weights: Float[Tensor, "*mid d_model"], flat: int
    ) -> Float[Tensor, "*rows out mid"]:
        """The directions seen through an output matrix ``[mid, d_model]``, ``flat`` wide."""
        W = weights.reshape(flat, weights.shape[-1]).float()
        return self.directions.to(W.device) @ W.t()

    def factor_on(self, device: torch.device) -> Float[Tensor, "*batch_pos 1"] | float:
        """The factor where it is needed."""
        return self.factor.to(device) if isinstance(self.factor, Tensor) else self.factor
