"""What a write to the stream is made of: heads, neurons, or the write itself.

Each kind says two things of its components: what they are (`outs`), and what a `Reading` finds in
them (`read`), the second without making the first.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from hookedlm.cache.reading import Reading
from hookedlm.layers.norm import Norm

Stack = Float[Tensor, "component *batch_pos d_model"]
Readings = Float[Tensor, "component *batch_pos out"]
Labels = list[str]


class Part(Protocol):
    """Components of one write, before the norm and multiplier that it passes."""

    @property
    def labels(self) -> Labels:
        """``L0H0`` or ``L0N0`` of each component."""

    def outs(self) -> Stack:
        """What each component writes."""

    def read(self, reading: Reading) -> Readings:
        """What a reading finds in each component."""


@dataclass(frozen=True)
class Heads:
    """``z W_O``, head by head: ``z`` is what each head gathered."""

    layer: int
    z: Float[Tensor, "*batch_pos head d_head"]
    W_O: Float[Tensor, "head d_head d_model"]

    @property
    def labels(self) -> Labels:
        return [f"L{self.layer}H{head}" for head in range(len(self.W_O))]

    def outs(self) -> Stack:
        return torch.einsum("...he,hed->h...d", self.z, self.W_O.to(self.z.device))

    def read(self, reading: Reading) -> Readings:
        n_heads, d_head, _ = self.W_O.shape
        seen = reading.through(self.W_O, n_heads * d_head).unflatten(-1, (n_heads, d_head))
        found = torch.einsum("...he,...ohe->h...o", self.z.float(), seen.to(self.z.device))
        return found * reading.factor_on(found.device)


@dataclass(frozen=True)
class HeadResults:
    """Heads whose results stand in the cache, perhaps edited in the run."""

    layer: int
    result: Float[Tensor, "*batch_pos head d_model"]

    @property
    def labels(self) -> Labels:
        return [f"L{self.layer}H{head}" for head in range(self.result.shape[-2])]

    def outs(self) -> Stack:
        return self.result.movedim(-2, 0)

    def read(self, reading: Reading) -> Readings:
        return reading.of(self.outs())


@dataclass(frozen=True)
class Neurons:
    """``post * W_out``, neuron by neuron."""

    layer: int
    index: Int[np.ndarray, "neuron"]
    post: Float[Tensor, "*batch_pos neuron"]
    W_out: Float[Tensor, "neuron d_model"]

    @property
    def labels(self) -> Labels:
        return [f"L{self.layer}N{neuron}" for neuron in self.index]

    def outs(self) -> Stack:
        post = self.post.movedim(-1, 0).unsqueeze(-1)
        return post * self.W_out.to(post.device).unflatten(0, (-1, *[1] * (post.ndim - 2)))

    def read(self, reading: Reading) -> Readings:
        seen = reading.through(self.W_out, len(self.W_out)).to(self.post.device)
        found = self.post.float().unsqueeze(-2) * seen
        factor = reading.factor_on(found.device)
        found = found * (factor.unsqueeze(-1) if isinstance(factor, Tensor) else factor)
        return found.movedim(-1, 0)


@dataclass(frozen=True)
class Passed:
    """A part behind the norm and the multiplier that its write passes before it is added."""

    part: Part
    bias: Float[Tensor, "d_model"] | None
    norm: Norm | None
    scale: Float[Tensor, "*batch_pos 1"] | None
    factor: float

    @property
    def labels(self) -> Labels:
        return self.part.labels

    def outs(self) -> Stack:
        return self._arriving(self.part.outs())

    def constant(self) -> Float[Tensor, "*batch_pos d_model"]:
        """What this write adds whatever its components say: its bias, and its post-norm's."""
        constant = torch.zeros(()) if self.bias is None else self._arriving(self.bias)
        b = None if self.norm is None else self.norm.live("b")
        return constant if b is None else constant + b * self.factor

    def _arriving(self, x: Tensor) -> Tensor:
        if self.norm is not None and self.scale is not None:
            x = self.norm.linearised(x, self.scale.to(x.device))
        return x if self.factor == 1.0 else x * self.factor

    def read(self, reading: Reading) -> Readings:
        reading = reading.times(self.factor)
        if self.norm is not None and self.scale is not None:
            reading = reading.before(self.norm, self.scale)
        return self.part.read(reading)
