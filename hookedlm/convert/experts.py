"""Hugging Face's routers and experts behind the signatures of `hookedlm.layers.moe`."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call

from hookedlm.layers.moe import Picks

WIDTHS = ("hidden_dim", "hidden_size", "in_features")
"""What modules call the width of their input."""

ONCE = ("router_logit_softcapping",)
"""What a router does to its logits before it returns them: not to be done to them twice."""


def matrix_name(router: nn.Module, n_experts: int | None = None) -> str:
    """The name of the matrix ``[expert, d_model]`` that logits come from."""
    for name, parameter in router.named_parameters():
        if parameter.ndim == 2 and parameter.shape[0] == (n_experts or parameter.shape[0]):
            return name
    raise AttributeError(f"{type(router).__name__} has no matrix that makes logits")


class HFRouting:
    """Hugging Face's router: ``router(x)`` or ``router(x, bias)`` gives logits, weights, indices;
    or logits alone, of which ``picks`` makes the other two; or, with ``top_k_of_scores``, the
    weights of all experts, 0 where not picked, and logits.

    Logits that were edited pass through the router's own rule: its matrix is replaced by the
    identity, so that its input is its logits.
    """

    def __init__(
        self,
        router: nn.Module,
        batched: bool = False,
        picks: Callable[[Tensor], Picks] | None = None,
        top_k_of_scores: int | None = None,
    ):
        self.router = router
        self.top_k_of_scores = top_k_of_scores
        self.batched = batched
        self.picks = picks

    def __call__(
        self, x: Float[Tensor, "batch pos d_model"], bias: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        x = x if self.batched else x.flatten(0, 1)
        out = self.router(x) if bias is None else self.router(x, bias)
        if self.top_k_of_scores is not None:
            scores, logits = out
            return logits, *scores.topk(self.top_k_of_scores, dim=-1)
        return out if self.picks is None else (out, *self.picks(out))

    def picked(self, logits: Float[Tensor, "token expert"], bias: Tensor | None) -> Picks:
        """The router's own rule, applied to logits."""
        if self.picks is not None:
            return self.picks(logits)
        router, weights = self._of_logits(logits)
        rows = (logits[None] if self.batched else logits,)
        out = functional_call(router, weights, rows if bias is None else (*rows, bias))
        if self.top_k_of_scores is not None:
            return tuple(out[0].topk(self.top_k_of_scores, dim=-1))
        return out[1], out[2]

    def _of_logits(self, logits: Tensor) -> tuple[nn.Module, dict[str, Tensor]]:
        """The router for inputs that are logits already, and the weights that make it so."""
        n = logits.shape[-1]
        shared = (*self.router.parameters(), *self.router.buffers())
        router = copy.deepcopy(self.router, {id(x): x for x in shared})
        for module in router.modules():
            for name in vars(module):
                if name in WIDTHS:
                    setattr(module, name, n)
                elif name in ONCE:
                    setattr(module, name, 0.0)
        name = matrix_name(router, n)
        weights = {name: torch.eye(n, dtype=logits.dtype, device=logits.device)}
        bias = f"{name.rpartition('.')[0]}.bias".lstrip(".")
        if bias in dict(router.named_parameters()):
            weights[bias] = torch.zeros_like(logits[0])
        return router, weights


class ScaledInputExperts(nn.Module):
    """Experts whose inputs, not outputs, are weighted, each seeing every token (Llama 4)."""

    def __init__(self, experts: nn.Module, n_experts: int):
        super().__init__()
        self.experts = experts
        self.n_experts = n_experts

    def forward(
        self, x: Tensor, indices: Tensor, weights: Tensor
    ) -> Float[Tensor, "token d_model"]:
        dense = torch.zeros(len(x), self.n_experts, dtype=weights.dtype, device=x.device)
        dense = dense.scatter(1, indices, weights)
        scaled = x.repeat(self.n_experts, 1) * dense.t().reshape(-1, 1)
        return self.experts(scaled).view(self.n_experts, *x.shape).sum(0)
