"""A router and experts for models built from a config, called like Hugging Face's."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hookedlm.layers.weights import Weights


class Router(Weights):
    """Softmax over all experts, the best ``top_k`` picked, their weights made to sum to one."""

    def __init__(self, W_router: Float[Tensor, "d_model expert"], top_k: int):
        super().__init__()
        self.top_k = top_k
        self.put("W_router", W_router, None, "")

    def forward(
        self, x: Float[Tensor, "batch pos d_model"], bias: Tensor | None = None
    ) -> tuple[Float[Tensor, "token expert"], Float[Tensor, "token k"], Int[Tensor, "token k"]]:
        """(logits of all experts, weights of the picked, which were picked)."""
        logits = x.flatten(0, 1) @ self.W_router
        return logits, *self.picked(logits)

    def picked(
        self, logits: Float[Tensor, "token expert"], bias: Tensor | None = None
    ) -> tuple[Float[Tensor, "token k"], Int[Tensor, "token k"]]:
        """(weights of the picked, which were picked)."""
        wide = torch.promote_types(logits.dtype, torch.float32)
        top, indices = torch.topk(torch.softmax(logits, dim=-1, dtype=wide), self.top_k, dim=-1)
        return (top / top.sum(dim=-1, keepdim=True)).to(logits.dtype), indices


class Experts(Weights):
    """Plain or gated MLPs side by side; gated ones have no biases, as in Mixtral."""

    def __init__(
        self,
        act: Callable[[Tensor], Tensor],
        W_in: Float[Tensor, "expert d_model d_mlp"],
        W_out: Float[Tensor, "expert d_mlp d_model"],
        W_gate: Float[Tensor, "expert d_model d_mlp"] | None = None,
        b_in: Float[Tensor, "expert d_mlp"] | None = None,
        b_out: Float[Tensor, "expert d_model"] | None = None,
    ):
        super().__init__()
        self.act_fn = act
        self.gated = W_gate is not None
        self.branches: tuple[str, ...] = ("pre", "pre_linear") if self.gated else ("pre",)
        self.put("W_gate", W_gate, None, "")
        self.put("W_in", W_in, None, "")
        self.put("W_out", W_out, None, "")
        self.put("b_in", b_in, (W_in.shape[0], W_in.shape[2]), "W_in")
        self.put("b_out", b_out, (W_in.shape[0], W_in.shape[1]), "W_out")

    def forward(
        self,
        x: Float[Tensor, "token d_model"],
        indices: Int[Tensor, "token k"],
        weights: Float[Tensor, "token k"],
    ) -> Float[Tensor, "token d_model"]:
        """Every token's weighted sum over the experts that were picked for it."""
        out = torch.zeros_like(x)
        for e in range(self.W_in.shape[0]):
            token, place = torch.where(indices == e)
            y = self._expert(e, x[token]) * weights[token, place, None]
            out = out.index_add(0, token, y)
        return out

    def _expert(self, e: int, x: Float[Tensor, "n d_model"]) -> Float[Tensor, "n d_model"]:
        return self.out(e, self.post(e, self.pre(e, x)))

    def pre(self, expert: int, x: Float[Tensor, "n d_model"]) -> tuple[Tensor, ...]:
        """What enters the activation ``[n, d_mlp]``, and the linear branch if gated."""
        p = self._parameters
        pre = x @ p["W_in"][expert]
        if p["b_in"] is not None:
            pre = pre + p["b_in"][expert]
        return (x @ p["W_gate"][expert], pre) if self.gated else (pre,)

    def post(self, expert: int, pre: tuple[Tensor, ...]) -> Float[Tensor, "n d_mlp"]:
        """What the neurons of an expert say."""
        return self.act_fn(pre[0]) * pre[1] if self.gated else self.act_fn(pre[0])

    def out(self, expert: int, post: Float[Tensor, "n d_mlp"]) -> Float[Tensor, "n d_model"]:
        """What the neurons of an expert write."""
        y = post @ self._parameters["W_out"][expert]
        b_out = self._parameters["b_out"]
        return y if b_out is None else y + b_out[expert]
