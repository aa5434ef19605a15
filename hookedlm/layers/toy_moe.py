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
        self, x: Float[Tensor, "token d_model"]
    ) -> tuple[Float[Tensor, "token expert"], Float[Tensor, "token k"], Int[Tensor, "token k"]]:
        """(logits of all experts, weights of the picked, which were picked)."""
        logits = x @ self.W_router
        probs = torch.softmax(logits, dim=-1, dtype=torch.promote_types(x.dtype, torch.float32))
        top, indices = torch.topk(probs, self.top_k, dim=-1)
        return logits, (top / top.sum(dim=-1, keepdim=True)).to(x.dtype), indices


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
        p = self._parameters
        pre = x @ p["W_in"][e]
        if p["b_in"] is not None:
            pre = pre + p["b_in"][e]
        post = self.act_fn(pre) if p["W_gate"] is None else self.act_fn(x @ p["W_gate"][e]) * pre
        y = post @ p["W_out"][e]
        return y if p["b_out"] is None else y + p["b_out"][e]
