"""Initial weights."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from hookedlm.config import HookedTransformerConfig
from hookedlm.layers.activations import XIELU
from hookedlm.layers.norm import Norm

if TYPE_CHECKING:
    from hookedlm.toy.build import Layers


@torch.no_grad()
def init_weights(layers: Layers | nn.Module, cfg: HookedTransformerConfig) -> None:
    """Draw all weights anew, in place, as ``cfg.init_mode`` says; biases zero, norms one.

    With a seed the same weights come out on every device, and no global generator is touched.
    """
    generator = None if cfg.seed is None else torch.Generator().manual_seed(cfg.seed)
    root = layers if isinstance(layers, nn.Module) else layers.tree()
    W_E = None
    for module in root.modules():
        if isinstance(module, XIELU):
            module.reset()
        for name, parameter in module.named_parameters(recurse=False):
            if isinstance(module, Norm):
                parameter.fill_(1 - module.spec.offset if name == "w" else 0)
            elif name.startswith("b_"):
                parameter.zero_()
            elif name == "W_U" and cfg.tie_word_embeddings and W_E is not None:
                parameter.copy_(W_E.t())
            elif name.startswith("W_"):
                parameter.copy_(_draw(name, parameter.shape, cfg, generator))
            if name == "W_E":
                W_E = parameter


def _draw(
    name: str,
    shape: torch.Size,
    cfg: HookedTransformerConfig,
    generator: torch.Generator | None,
) -> Tensor:
    std = initial_std(name, tuple(shape), cfg)
    if cfg.init_mode.endswith("uniform"):
        x = torch.rand(shape, generator=generator, dtype=torch.float32) * 2 - 1
        return x * (math.sqrt(3) * std)  # the bound of a uniform distribution with this spread
    return torch.randn(shape, generator=generator, dtype=torch.float32) * std


def initial_std(name: str, shape: tuple[int, ...], cfg: HookedTransformerConfig) -> float:
    """The standard deviation that weight ``name`` starts with.

    ``initializer_range`` is it (gpt2), or the gain of the other modes: Xavier (Glorot and Bengio
    2010), Kaiming for ReLU (arXiv 1502.01852), muP (arXiv 2203.03466, table 3). Embeddings count
    as matrices ``[d_vocab, d_model]``, as in TransformerLens.
    """
    gain, mode = cfg.initializer_range, cfg.init_mode
    if mode == "gpt2":
        return gain
    fan_in, fan_out = shape[-2:]
    if name in ("W_Q", "W_K", "W_V"):
        fan_out *= shape[0]
    elif name == "W_O":
        fan_in *= shape[0]
    if mode.startswith("xavier"):
        return gain * math.sqrt(2 / (fan_in + fan_out))
    if mode.startswith("kaiming"):
        return gain * math.sqrt(2 / fan_in)
    if name in ("W_E", "W_pos"):
        return gain
    return gain / fan_in if name == "W_U" else gain / math.sqrt(fan_in)
