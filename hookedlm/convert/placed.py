"""Placed models: weights that accelerate keeps on several devices, in memory or on disk.

Accelerate wraps the forward of a module in a hook, which fetches its weights (they stand on the
meta device meanwhile) and moves its inputs to where it runs. A module whose weights are away stays
what it is, and its hook keeps working.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from hookedlm.layers.context import Context

SHARED = ("weights_map", "tied_params_map", "state_dict", "dataset", "tied_params_names")
"""What hooks of one model have in common: the weights themselves, which no copy doubles."""


def hooks_of(module: nn.Module) -> Iterator[Any]:
    """Accelerate's hooks on a module, those in a sequence one by one."""
    hook = vars(module).get("_hf_hook")
    if hook is None:
        return
    yield from vars(hook).get("hooks", (hook,))


def share_weights(model: nn.Module, memo: dict[int, Any]) -> None:
    """Mark what offloaded weights are fetched from as shared in a deep copy."""
    for module in model.modules():
        for hook in hooks_of(module):
            for name in SHARED:
                kept = vars(hook).get(name)
                if kept is not None:
                    memo.setdefault(id(kept), kept)


def is_away(module: Any) -> bool:
    """Whether a module's own weights are fetched only while it runs."""
    if not isinstance(module, nn.Module) or "_hf_hook" not in vars(module):
        return False
    return any(p.is_meta for p in module.parameters(recurse=False))


def device_of(model: nn.Module) -> torch.device:
    """Where a model takes its tokens: where its first weights are, or are fetched to."""
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None and not parameter.is_meta:
                return parameter.device
        for hook in hooks_of(module):
            runs_on = vars(hook).get("execution_device")
            if runs_on is not None and list(module.parameters(recurse=False)):
                return torch.device(f"cuda:{runs_on}" if isinstance(runs_on, int) else runs_on)
    return next(model.parameters()).device


def is_placed(model: nn.Module) -> bool:
    """Whether accelerate keeps some of the weights elsewhere, or on several devices."""
    hooks = (hook for module in model.modules() for hook in hooks_of(module))
    if any(vars(hook).get("offload") for hook in hooks):
        return True
    return len({p.device for p in model.parameters()}) > 1


def brought(x: Any, device: torch.device) -> Any:
    """The tensors in plain containers, on a device."""
    if isinstance(x, Tensor):
        return x.to(device)
    if type(x) in (tuple, list):
        return type(x)(brought(item, device) for item in x)
    if isinstance(x, Mapping):
        return {name: brought(item, device) for name, item in x.items()}
    return x


class Mover:
    """A forward pre-hook: what a part is called with goes where its weights are."""

    def __init__(self, device: torch.device):
        self.device = device

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(self._moved(arg) for arg in args)

    def _moved(self, arg: Any) -> Any:
        if not isinstance(arg, Context):
            return brought(arg, self.device)
        fields = ("mask", "temperature", "bias", "rotary", "positions", "kwargs")
        return replace(arg, **{name: brought(getattr(arg, name), self.device) for name in fields})


def follow(parts: list[nn.Module | None]) -> None:
    """Make each of the parts fetch its input, if they are on more than one device."""
    held = [part for part in parts if part is not None and list(part.parameters())]
    devices = [device_of(part) for part in held]
    if len(set(devices)) > 1:
        for part, device in zip(held, devices, strict=True):
            part.register_forward_pre_hook(Mover(device))
