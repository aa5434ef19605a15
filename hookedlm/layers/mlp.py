"""MLPs: plain, gated, and SoLU followed by a LayerNorm."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from hookedlm.axes import NEURONS
from hookedlm.hooks import HookPoint
from hookedlm.layers.norm import Norm, Same
from hookedlm.layers.weights import Weights
from hookedlm.spec import MLPSpec

Activation = Callable[[Tensor], Tensor]


@dataclass
class MLPTensors:
    """The weights of one MLP, as views of whatever holds them."""

    W_in: Float[Tensor, "d_model d_mlp"]
    W_out: Float[Tensor, "d_mlp d_model"]
    b_in: Float[Tensor, "d_mlp"] | None = None
    b_out: Float[Tensor, "d_model"] | None = None
    W_gate: Float[Tensor, "d_model d_mlp"] | None = None
    b_gate: Float[Tensor, "d_mlp"] | None = None


class MLP(Weights):
    """``act(x W_in + b_in) W_out + b_out``; ``ln`` stands behind the activation (SoLU, BitNet)."""

    def __init__(self, spec: MLPSpec, tensors: MLPTensors, act: Activation, ln: Norm | None = None):
        super().__init__()
        self.spec = spec
        self.act_fn = act
        d_model, d_mlp = tensors.W_in.shape
        self.put("W_in", tensors.W_in, None, "")
        self.put("W_out", tensors.W_out, None, "")
        self.put("b_in", tensors.b_in, (d_mlp,), "W_in")
        self.put("b_out", tensors.b_out, (d_model,), "W_out")
        self.hook_pre = HookPoint(NEURONS)
        self.hook_mid = HookPoint(NEURONS) if ln is not None else Same()
        self.ln: nn.Module = Same() if ln is None else ln
        self.hook_post = HookPoint(NEURONS, shares=ln is not None)

    def forward(self, x: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        p = self._parameters
        pre = self.hook_pre(F.linear(x, p["W_in"].t(), p["b_in"]))
        post = self.hook_post(self.ln(self.hook_mid(self.act_fn(pre))))
        return self.out(post)

    def out(self, post: Float[Tensor, "*batch d_mlp"]) -> Float[Tensor, "*batch d_model"]:
        """What the neurons write, bias included."""
        return F.linear(post, self._parameters["W_out"].t(), self._parameters["b_out"])


class GatedMLP(Weights):
    """``(act(x W_gate) * (x W_in)) W_out`` (arXiv 2002.05202): ``hook_pre`` is the gate branch,
    ``hook_pre_linear`` the other, ``hook_post`` their product."""

    def __init__(self, spec: MLPSpec, tensors: MLPTensors, act: Activation, ln: Norm | None = None):
        super().__init__()
        assert tensors.W_gate is not None
        self.spec = spec
        self.act_fn = act
        d_model, d_mlp = tensors.W_in.shape
        self.put("W_gate", tensors.W_gate, None, "")
        self.put("W_in", tensors.W_in, None, "")
        self.put("W_out", tensors.W_out, None, "")
        self.put("b_gate", tensors.b_gate, (d_mlp,), "W_gate")
        self.put("b_in", tensors.b_in, (d_mlp,), "W_in")
        self.put("b_out", tensors.b_out, (d_model,), "W_out")
        self.hook_pre = HookPoint(NEURONS)
        self.hook_pre_linear = HookPoint(NEURONS)
        self.hook_mid = HookPoint(NEURONS) if ln is not None else Same()
        self.ln: nn.Module = Same() if ln is None else ln
        self.hook_post = HookPoint(NEURONS, shares=ln is not None)

    def forward(self, x: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        p = self._parameters
        pre = self.hook_pre(F.linear(x, p["W_gate"].t(), p["b_gate"]))
        linear = self.hook_pre_linear(F.linear(x, p["W_in"].t(), p["b_in"]))
        return self.out(self.hook_post(self.ln(self.hook_mid(self.combine(pre, linear)))))

    def combine(
        self, pre: Float[Tensor, "*batch d_mlp"], linear: Float[Tensor, "*batch d_mlp"]
    ) -> Float[Tensor, "*batch d_mlp"]:
        """What the neurons make of both branches."""
        return self.act_fn(pre) * linear

    def out(self, post: Float[Tensor, "*batch d_mlp"]) -> Float[Tensor, "*batch d_model"]:
        """What the neurons write, bias included."""
        return F.linear(post, self._parameters["W_out"].t(), self._parameters["b_out"])


class ClampedMLP(GatedMLP):
    """A gated MLP whose neurons say ``act(min(gate, limit)) * (clamp(linear, -limit, limit) + 1)``
    (arXiv 2508.10925, the reference implementation of gpt-oss)."""

    def combine(
        self, pre: Float[Tensor, "*batch d_mlp"], linear: Float[Tensor, "*batch d_mlp"]
    ) -> Float[Tensor, "*batch d_mlp"]:
        """What the neurons make of both branches."""
        limit = self.spec.limit
        assert limit is not None
        return self.act_fn(pre.clamp(max=limit)) * (linear.clamp(-limit, limit) + 1)
