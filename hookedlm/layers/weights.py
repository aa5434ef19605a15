"""`Weights`: a module whose absent biases come into being when somebody looks at them.

TransformerLens' code expects every bias to exist. Most families have none, and adding zeros costs
time in every forward pass. So an absent bias is None inside, and becomes a real, trainable-off
zero `nn.Parameter` (used from then on) the moment it is read, or loaded with another value. It is
saved as zeros.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hookedlm.parts import AtHand


class Weights(AtHand):
    """Base of layers with TransformerLens-named parameters."""

    def __init__(self) -> None:
        super().__init__()
        self._zeros: dict[str, tuple[tuple[int, ...], str]] = {}

    def put(
        self, name: str, value: Tensor | None, zeros: tuple[int, ...] | None, like: str
    ) -> None:
        """Register weight ``name``: ``value`` as a Parameter on the same storage, or (None) a bias
        of shape ``zeros`` that exists once somebody asks, beside parameter ``like``."""
        if value is None:
            self.register_parameter(name, None)
            if zeros is not None:
                self._zeros[name] = (zeros, like)
            return
        trainable = value.requires_grad and value.is_floating_point()
        self.register_parameter(name, nn.Parameter(value.detach(), requires_grad=trainable))

    def live(self, name: str) -> Tensor | None:
        """The parameter as the forward pass uses it: None when absent."""
        return self._parameters[name]

    def __getattr__(self, name: str) -> Any:
        try:
            value = super().__getattr__(name)
        except AttributeError:
            kinds = (vars(kind) for kind in type(self).__mro__)
            found = next((own[name] for own in kinds if name in own), None)
            if isinstance(found, property):
                return found.fget(self)  # a refusal of its own: torch would say "no attribute"
            raise
        if value is None and name in self._parameters and name in self._zeros:
            return self._materialise(name)
        return value

    def _materialise(self, name: str) -> nn.Parameter:
        shape, like = self._zeros[name]
        beside = self._parameters[like]
        assert beside is not None, f"{like} must exist beside {name}"
        zeros = torch.zeros(shape, dtype=beside.dtype, device=beside.device)
        parameter = nn.Parameter(zeros, requires_grad=False)
        self._parameters[name] = parameter
        return parameter

    def materialise_biases(self) -> None:
        """Make every absent bias a zero parameter, as saving and processing need it."""
        for name in self._zeros:
            if self._parameters[name] is None:
                self._materialise(name)

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, (shape, like) in self._zeros.items():
            beside = self._parameters[like]
            if self._parameters[name] is None and beside is not None:
                zeros = torch.zeros(shape, dtype=beside.dtype, device=beside.device)
                destination[prefix + name] = zeros

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        for name, (shape, _) in self._zeros.items():
            value = state_dict.get(prefix + name)
            if self._parameters[name] is not None or value is None:
                continue
            if tuple(value.shape) == shape and not value.any():
                del state_dict[prefix + name]  # torch made this dictionary for this module
            else:
                self._materialise(name)
        super()._load_from_state_dict(state_dict, prefix, *rest)
