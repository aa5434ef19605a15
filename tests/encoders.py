"""What the tests of encoders of texts and of sound share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn


def drawn(build: Callable[[], nn.Module]) -> nn.Module:
    """A random model in which no weight is a one or a zero."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = build().eval()
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape)
    return model


def close(parts: torch.Tensor, whole: torch.Tensor) -> None:
    """The parts, summed, are the whole: 1e-5 of its norm."""
    error = (parts.double() - whole.double()).norm() / whole.double().norm()
    assert error <= 1e-5, f"{error:.1e}"


def edited(x: torch.Tensor) -> torch.Tensor:
    """Another value everywhere, except where scores are masked."""
    return torch.where(torch.isfinite(x), x * 1.7 + 0.3 * torch.sign(x), x)


def check_edit(model: Any, name: str, shape: tuple[int, ...], run: Callable[..., Any]) -> None:
    """The hook fires once with this shape, its edit changes what ``run`` says, and nothing stays.

    ``run(fwd_hooks)`` runs the model and returns its answer."""
    seen = []

    def edit(x, hook):
        seen.append(tuple(x.shape))
        return edited(x)

    with torch.no_grad():
        before = run([])
        after = run([(name, edit)])
        assert seen == [shape]
        assert not torch.allclose(before, after), name
        assert torch.equal(run([]), before)


def check_stream_is_a_sum(model: Any, cache: Any, final: str, pre_norm: bool = False) -> None:
    """All decompositions of the cache add up, at each layer and inside, ``final`` being what the
    last layer hands on; heads and neurons do as well."""
    mid = "hook_resid_mid" if pre_norm else "ln1.hook_normalized"
    n_layers = model.cfg.n_layers
    for layer in range(n_layers + 1):
        for mlp_input in (False, True)[: 1 if layer == n_layers else 2]:
            whole = final if layer == n_layers else f"blocks.{layer}.hook_resid_pre"
            if mlp_input:
                whole = f"blocks.{layer}.{mid}"
            close(cache.decompose_resid(layer, mlp_input).sum(0), cache[whole])
            close(cache.get_full_resid_decomposition(layer, mlp_input).sum(0), cache[whole])
            close(cache.accumulated_resid(layer, mlp_input=mlp_input)[-1], cache[whole])
        if layer:
            heads = cache.stack_head_results(layer, incl_remainder=True).sum(0)
            close(heads, cache.accumulated_resid(layer)[-1])
    for layer, block in enumerate(model.blocks):
        heads = cache["result", layer].sum(-2) + block.attn.b_O
        close(heads.detach(), cache["attn_out", layer])
        neurons = cache.get_neuron_results(layer).sum(-2) + block.mlp.b_out
        close(neurons.detach(), cache["mlp_out", layer])


def without(folder: Path, word: str) -> None:
    """Take the weights with ``word`` in their name out of a checkpoint."""
    file = folder / "model.safetensors"
    kept = {name: x for name, x in load_file(file).items() if word not in name}
    save_file(kept, file, {"format": "pt"})
