"""Mixtures of experts: somebody's router and experts, with hook points around and inside them."""

from __future__ import annotations

from typing import Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from hookedlm.axes import EXPERT_NEURONS, EXPERTS, ROUTING, STREAM
from hookedlm.hooks import HookPoint
from hookedlm.layers.mlp import MLP, GatedMLP
from hookedlm.spec import MoESpec

Picks = tuple[Float[Tensor, "token k"], Int[Tensor, "token k"]]
"""(weights, indices) of the experts that each token goes to."""


class Routing(Protocol):
    """The rule by which a router picks. ``bias`` is what some are given besides the stream."""

    def __call__(
        self, x: Float[Tensor, "batch pos d_model"], bias: Tensor | None
    ) -> tuple[Float[Tensor, "token expert"], Tensor, Tensor]:
        """(logits of all experts, weights of the picked, which were picked)."""

    def picked(self, logits: Float[Tensor, "token expert"], bias: Tensor | None) -> Picks:
        """What the rule makes of these logits."""


class ExpertNeurons(Protocol):
    """Single experts, taken apart at their neurons."""

    branches: tuple[str, ...]
    """What `pre` gives: "pre", and "pre_linear" beside a gate."""

    def pre(self, expert: int, x: Float[Tensor, "token d_model"]) -> tuple[Tensor, ...]:
        """What enters the activation ``[token, d_mlp]``, and the linear branch if gated."""

    def post(self, expert: int, pre: tuple[Tensor, ...]) -> Float[Tensor, "token d_mlp"]:
        """What the neurons say."""

    def out(
        self, expert: int, post: Float[Tensor, "token d_mlp"]
    ) -> Float[Tensor, "token d_model"]:
        """What they write."""


class MoE(nn.Module):
    """``sum over the picked experts of weight * expert(x)`` (arXiv 2101.03961), and shared experts
    that every token passes (arXiv 2401.06066), behind a sigmoid gate of their own in some.

    ``experts(x, indices, weights)`` returns the weighted sum. An edit of the router's logits picks
    anew by the router's own rule; an edit of the weights runs every expert with the weight it was
    given; ``hook_expert_out`` makes each expert's (weighted) output a tensor of its own, and
    ``hook_pre``, ``hook_post`` the neurons of every expert, also of those that were not picked.
    """

    def __init__(
        self,
        spec: MoESpec,
        router: nn.Module,
        experts: nn.Module,
        routing: Routing,
        neurons: ExpertNeurons | None = None,
        shared: MLP | GatedMLP | None = None,
        shared_gate: nn.Module | None = None,
        router_bias: Tensor | None = None,
    ):
        super().__init__()
        self.spec = spec
        self.router = router
        self.experts = experts
        self.routing = routing
        self.neurons = neurons
        if isinstance(router_bias, nn.Parameter):
            self.register_parameter("router_bias", router_bias)
        else:
            self.register_buffer("router_bias", router_bias)
        self.hook_router_logits = HookPoint(ROUTING)
        self.hook_expert_weights = HookPoint(ROUTING)
        self._inner: tuple[HookPoint, ...] = ()
        if neurons is not None:
            for branch in (*neurons.branches, "post"):
                point = HookPoint(EXPERT_NEURONS, on_demand=True)
                self.add_module(f"hook_{branch}", point)
                self._inner += (point,)
        self.hook_expert_out = HookPoint(EXPERTS, on_demand=True)
        self.shared = shared
        if shared is not None:
            self.shared_gate = shared_gate
            self.hook_shared_out = HookPoint(STREAM)

    def forward(self, x: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        bias = self._buffers.get("router_bias", self._parameters.get("router_bias"))
        logits, weights, indices = self.routing(x, bias)
        if self.hook_router_logits.wanted:
            logits = self.hook_router_logits(logits.unflatten(0, x.shape[:2])).flatten(0, 1)
            dtype = weights.dtype
            weights, indices = self.routing.picked(logits, bias)
            weights = weights.to(dtype)
        out = self._routed(x, weights, indices)
        if self.shared is None:
            return out
        shared = self.shared(x)
        if self.shared_gate is not None:
            shared = torch.sigmoid(self.shared_gate(x)) * shared
        return out + self.hook_shared_out(self._scaled(shared, 1.0))

    def _routed(self, x: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
        flat = x.flatten(0, 1)
        apart = self.hook_expert_out.wanted or any(point.wanted for point in self._inner)
        if self.hook_expert_weights.wanted or apart:
            dense = self.hook_expert_weights(
                self.dense(weights, indices).unflatten(0, x.shape[:2])
            ).flatten(0, 1)
            if apart:
                return self.hook_expert_out(self.expert_out(flat, dense, x.shape)).sum(dim=2)
            if self.hook_expert_weights.edited or self.hook_expert_weights.bwd_hooks:
                weights, indices = dense, self._every(dense)
        out = self.experts(flat, indices, weights).view(x.shape)
        return self._scaled(out, self.spec.scale)

    def _scaled(self, out: Tensor, scale: float) -> Tensor:
        out = out if scale == 1.0 else out * scale
        return out if self.spec.divisor == 1.0 else out / self.spec.divisor

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
        if any(point.wanted for point in self._inner):
            return self._scaled(self._neuron_by_neuron(flat, dense, shape), self.spec.scale)
        every = self._every(dense)
        each = [
            self.experts(flat, every[:, e : e + 1], dense[:, e : e + 1]).view(shape)
            for e in range(self.spec.n_experts)
        ]
        return self._scaled(torch.stack(each, dim=2), self.spec.scale)

    def _neuron_by_neuron(
        self, flat: Tensor, dense: Tensor, shape: torch.Size
    ) -> Float[Tensor, "batch pos expert d_model"]:
        """Each expert's output times its weight, whoever was picked, through hooks on neurons."""
        assert self.neurons is not None
        every, weighs_input = range(self.spec.n_experts), self.spec.weighted_input
        reads = [flat * dense[:, e, None] if weighs_input else flat for e in every]
        pres = zip(*(self.neurons.pre(e, reads[e]) for e in every), strict=True)
        stacked = [torch.stack(pre, dim=1).unflatten(0, shape[:2]) for pre in pres]
        *branches, hook_post = self._inner
        flats = [point(pre).flatten(0, 1) for point, pre in zip(branches, stacked, strict=True)]
        posts = [self.neurons.post(e, tuple(pre[:, e] for pre in flats)) for e in every]
        post = hook_post(torch.stack(posts, dim=1).unflatten(0, shape[:2])).flatten(0, 1)
        outs = torch.stack([self.neurons.out(e, post[:, e]) for e in every], dim=1)
        outs = outs if weighs_input else (outs * dense[..., None]).to(flat.dtype)
        return outs.unflatten(0, shape[:2])

    def _every(self, dense: Tensor) -> Int[Tensor, "token expert"]:
        indices = torch.arange(self.spec.n_experts, device=dense.device)
        return indices.expand(dense.shape[0], -1).contiguous()

    def extra_repr(self) -> str:
        return f"{self.spec.top_k} of {self.spec.n_experts} experts"
