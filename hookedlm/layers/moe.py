"""Mixtures of experts: Hugging Face's router and experts, with hook points around them."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from hookedlm.axes import EXPERTS, ROUTING
from hookedlm.hooks import HookPoint
from hookedlm.spec import MoESpec


class MoE(nn.Module):
    """``sum over the picked experts of weight * expert(x)`` (arXiv 2101.03961).

    ``router(x [token, d_model])`` returns logits, picked weights and picked indices;
    ``experts(x, indices, weights)`` returns the weighted sum. An edit of the logits re-picks; an
    edit of the weights runs every expert with the weight it was given; ``hook_expert_out`` makes
    each expert's (weighted) output a tensor of its own.
    """

    def __init__(self, spec: MoESpec, router: nn.Module, experts: nn.Module):
        super().__init__()
        self.spec = spec
        self.router = router
        self.experts = experts
        self.hook_router_logits = HookPoint(ROUTING)
        self.hook_expert_weights = HookPoint(ROUTING)
        self.hook_expert_out = HookPoint(EXPERTS, on_demand=True)

    def forward(self, x: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        shape = x.shape
        flat = x.reshape(-1, shape[-1])
        logits, weights, indices = self.router(flat)
        if self.hook_router_logits.wanted:
            logits = self.hook_router_logits(logits.unflatten(0, shape[:2])).flatten(0, 1)
            weights, indices = self.picked(logits, weights.dtype)
        if self.hook_expert_weights.wanted or self.hook_expert_out.wanted:
            dense = self.hook_expert_weights(
                self.dense(weights, indices).unflatten(0, shape[:2])
            ).flatten(0, 1)
            if self.hook_expert_out.wanted:
                return self.hook_expert_out(self.expert_out(flat, dense, shape)).sum(dim=2)
            if self.hook_expert_weights.edited or self.hook_expert_weights.bwd_hooks:
                weights, indices = dense, self._every(dense)
        return self.experts(flat, indices, weights).view(shape)

    def picked(
        self, logits: Float[Tensor, "token expert"], dtype: torch.dtype
    ) -> tuple[Float[Tensor, "token k"], Int[Tensor, "token k"]]:
        """(weights, indices) of the experts the router's logits pick."""
        if self.spec.order == "topk_softmax":
            top, indices = torch.topk(logits, self.spec.top_k, dim=-1)
            return torch.softmax(top, dim=-1, dtype=top.dtype), indices
        probs = torch.softmax(logits, dim=-1, dtype=torch.float32)
        top, indices = torch.topk(probs, self.spec.top_k, dim=-1)
        if self.spec.normalise:
            top = top / top.sum(dim=-1, keepdim=True)
        return top.to(dtype), indices

    def dense(self, weights: Tensor, indices: Tensor) -> Float[Tensor, "token expert"]:
        """Weights of all experts, zero where not routed."""
        zeros = torch.zeros(
            weights.shape[0], self.spec.n_experts, dtype=weights.dtype, device=weights.device
        )
        return zeros.scatter(1, indices, weights)

    def expert_out(
        self, flat: Tensor, dense: Tensor, shape: torch.Size
    ) -> Float[Tensor, "batch pos expert d_model"]:
        """Each expert's output times its weight."""
        every = self._every(dense)
        outs = [
            self.experts(flat, every[:, e : e + 1], dense[:, e : e + 1]).view(shape)
            for e in range(self.spec.n_experts)
        ]
        return torch.stack(outs, dim=2)

    def _every(self, dense: Tensor) -> Int[Tensor, "token expert"]:
        indices = torch.arange(self.spec.n_experts, device=dense.device)
        return indices.expand(dense.shape[0], -1).contiguous()

    def extra_repr(self) -> str:
        return f"{self.spec.top_k} of {self.spec.n_experts} experts"
