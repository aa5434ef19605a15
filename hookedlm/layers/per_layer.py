"""A third branch that lets each layer see the token again (Gemma 4: per-layer embeddings)."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from hookedlm.axes import LAYER_INPUT, STREAM
from hookedlm.hooks import HookPoint
from hookedlm.layers.block import Parts, SequentialBlock, Stream
from hookedlm.layers.context import Context
from hookedlm.layers.norm import Norm, Same
from hookedlm.layers.weights import Weights
from hookedlm.spec import BlockSpec


class PerLayerInput(Weights):
    """``(act(x W_gate) * input) W_out``: ``input`` is what the token says to this layer."""

    def __init__(
        self,
        W_gate: Float[Tensor, "d_model d_layer_input"],
        W_out: Float[Tensor, "d_layer_input d_model"],
        act: Callable[[Tensor], Tensor],
    ):
        super().__init__()
        self.put("W_gate", W_gate, None, "")
        self.put("W_out", W_out, None, "")
        self.act_fn = act
        self.hook_input = HookPoint(LAYER_INPUT, shares=True)
        self.hook_pre = HookPoint(LAYER_INPUT)
        self.hook_post = HookPoint(LAYER_INPUT)

    def forward(self, x: Stream, given: Float[Tensor, "batch pos d_layer_input"]) -> Stream:
        pre = self.hook_pre(F.linear(x, self.W_gate.t()))
        return self.out(self.hook_post(self.act_fn(pre) * self.hook_input(given)))

    def out(self, post: Float[Tensor, "*batch d_layer_input"]) -> Float[Tensor, "*batch d_model"]:
        """What is written, before the norm."""
        return F.linear(post, self.W_out.t())


class PerLayerInputBlock(SequentialBlock):
    """A sequential block with this branch behind the MLP. ``hook_resid_mid_ple`` is the stream that
    it reads."""

    def __init__(self, spec: BlockSpec, parts: Parts, ple: PerLayerInput, ple_norm: Norm | None):
        super().__init__(spec, parts)
        scale, post = self._modules.pop("post_scale"), self._modules.pop("hook_resid_post")
        self.hook_resid_mid_ple = HookPoint(STREAM, shares=True)
        self.ple = ple
        self.ple_norm: nn.Module = ple_norm or Same()
        self.hook_ple_out = HookPoint(STREAM, shares=ple_norm is not None)
        self.add_module("post_scale", scale)
        self.add_module("hook_resid_post", post)

    def forward(self, resid: Stream, ctx: Context) -> Stream:
        mid = self.hook_resid_mid_ple(self._behind_mlp(resid, ctx))
        assert ctx.layer_input is not None, "this layer was given no input of its own"
        ple_out = self.hook_ple_out(self.ple_norm(self.ple(mid, ctx.layer_input)))
        return self.hook_resid_post(self.post_scale(mid + ple_out))
