"""An output gate: each head's result times a function of the stream that attention reads."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from hookedlm.axes import GATE
from hookedlm.hooks import HookPoint
from hookedlm.layers.qkv import into_heads, per_head_into_heads
from hookedlm.layers.weights import Weights

GATES: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": torch.sigmoid,
    "softplus": F.softplus,
}


class OutputGate(Weights):
    """``act(x W_gate + b_gate)``, one number for each head, or for each of its dimensions
    (arXiv 2505.06708)."""

    def __init__(
        self,
        W_gate: Float[Tensor, "head d_model d_gate"],
        b_gate: Float[Tensor, "head d_gate"] | None,
        act: str,
    ):
        super().__init__()
        self.act = GATES[act]
        self.put("W_gate", W_gate, None, "")
        self.put("b_gate", b_gate, (W_gate.shape[0], W_gate.shape[2]), "W_gate")
        self.hook_gate = HookPoint(GATE)

    def forward(
        self, x: Float[Tensor, "batch pos *head d_model"]
    ) -> Float[Tensor, "batch pos head d_gate"]:
        project = per_head_into_heads if x.ndim == 4 else into_heads
        pre = project(x, self.W_gate, self._parameters["b_gate"])
        return self.hook_gate(self.act(pre.float()).to(x.dtype))
