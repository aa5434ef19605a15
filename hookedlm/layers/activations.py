"""Activation functions, by TransformerLens' names."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

Neurons = Float[Tensor, "*batch d_mlp"]


def solu(x: Neurons) -> Neurons:
    """``x * softmax(x)`` over the neurons (Elhage et al. 2022, Softmax Linear Units,
    transformer-circuits.pub/2022/solu)."""
    return x * torch.softmax(x, dim=-1)


def gelu_tanh(x: Neurons) -> Neurons:
    """The tanh approximation of ``x * Phi(x)`` (arXiv 1606.08415)."""
    return F.gelu(x, approximate="tanh")


def inverse_softplus(y: float) -> float:
    """The x at which ``log(1 + exp(x)) = y``."""
    return math.log(math.expm1(y))


class XIELU(nn.Module):
    """``a_p x² + b x`` above zero, ``a_n (exp(x) - 1 - x) + b x`` below (arXiv 2411.13010).

    ``a_p = softplus(alpha_p)`` and ``a_n = b + softplus(alpha_n)`` are learned, one each per layer.
    """

    BETA, EPS, A_P, A_N = 0.5, -1e-6, 0.8, 0.8

    def __init__(self) -> None:
        super().__init__()
        self.alpha_p = nn.Parameter(torch.empty(1))
        self.alpha_n = nn.Parameter(torch.empty(1))
        self.reset()

    @torch.no_grad()
    def reset(self) -> None:
        """Back to the initial shape."""
        self.alpha_p.fill_(inverse_softplus(self.A_P))
        self.alpha_n.fill_(inverse_softplus(self.A_N - self.BETA))

    def forward(self, x: Neurons) -> Neurons:
        return xielu(x, F.softplus(self.alpha_p), self.BETA + F.softplus(self.alpha_n))


def xielu(x: Neurons, a_p: Tensor | float = XIELU.A_P, a_n: Tensor | float = XIELU.A_N) -> Neurons:
    """`XIELU` with these coefficients, by default the ones it starts from."""
    below = torch.expm1(x.clamp(max=XIELU.EPS)) - x
    return torch.where(x > 0, a_p * x * x, a_n * below) + XIELU.BETA * x


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "solu": solu,
    "solu_ln": solu,  # the LayerNorm behind it is a module of the MLP
    "gelu": F.gelu,
    "gelu_new": gelu_tanh,
    "gelu_fast": gelu_tanh,
    "gelu_pytorch_tanh": gelu_tanh,
    "silu": F.silu,
    "relu": F.relu,
}
"""Those without parameters."""

ACTIVATION_FN_DICT = {**ACTIVATIONS, "xielu": xielu}
"""All as plain functions, as `transformer_lens.utils` has them."""


def activation(name: str) -> Callable[[Tensor], Tensor]:
    """The activation of that name, for one layer."""
    return XIELU() if name == "xielu" else ACTIVATIONS[name]


class GeluTanh(nn.Module):
    """`gelu_tanh` in place of ``longhand``, which computes the same in eight operations; those are
    kept in half precision, where each of them rounds."""

    def __init__(self, longhand: nn.Module):
        super().__init__()
        self.longhand = longhand

    def forward(self, x: Neurons) -> Neurons:
        return gelu_tanh(x) if x.dtype == torch.float32 else self.longhand(x)


class ScaledInput(nn.Module):
    """An activation function of its input times a constant."""

    def __init__(self, act: Callable[[Tensor], Tensor], factor: float):
        super().__init__()
        self.act, self.factor = act, factor

    def forward(self, x: Float[Tensor, "*any"]) -> Float[Tensor, "*any"]:
        return self.act(x * self.factor)


class Swish(nn.Module):
    """``x sigmoid(beta x)`` (arXiv 1710.05941)."""

    def __init__(self, beta: float):
        super().__init__()
        self.beta = beta

    def forward(self, x: Float[Tensor, "*any"]) -> Float[Tensor, "*any"]:
        return x * torch.sigmoid(x * self.beta)
