"""An MLP whose linear maps are modules with a forward of their own: quantised, or fetched."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor, nn

from hookedlm.axes import NEURONS
from hookedlm.hooks import HookPoint
from hookedlm.layers.opaque import OpaqueMLP
from hookedlm.spec import OpaqueSpec

Run = Callable[[Tensor], Tensor]


@dataclass
class MLPLinears:
    """Parts of an MLP to call. ``both`` gives the gate branch and the other in one."""

    down: Run
    act: Run
    up: Run | None = None
    gate: Run | None = None
    both: Run | None = None
    norm: Run | None = None

    @property
    def gated(self) -> bool:
        """Whether the activation multiplies a branch without one."""
        return self.gate is not None or self.both is not None


class LinearsMLP(OpaqueMLP):
    """Neurons under the names of `MLP` and `GatedMLP`, by the modules of the original; no weight of
    it can be shown."""

    def __init__(self, spec: OpaqueSpec, module: nn.Module, linears: MLPLinears):
        super().__init__(spec, module)
        self.linears = linears  # modules of `module`, which registers them
        self.hook_pre = HookPoint(NEURONS)
        if linears.gated:
            self.hook_pre_linear = HookPoint(NEURONS)
        self.hook_post = HookPoint(NEURONS)

    def forward(self, x: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        parts = self.linears
        if parts.both is not None:
            pre, linear = parts.both(x).chunk(2, dim=-1)
        else:
            assert parts.up is not None
            linear = parts.up(x)
            pre = linear if parts.gate is None else parts.gate(x)
        post = parts.act(self.hook_pre(pre))
        if parts.gated:
            post = post * self.hook_pre_linear(linear)
        return parts.down(self.hook_post(post if parts.norm is None else parts.norm(post)))
