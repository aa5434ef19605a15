"""`PlacingMethods`: devices, dtypes, copies and state dicts of a model whose weights share storage.

Many parameters are views of one tensor, and Hugging Face's modules beside them of the same. Moving
parameters one by one would tear them apart and double the memory; here storages move, once each,
and the views are laid out on them again.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hookedlm.convert.placed import device_of, is_placed
from hookedlm.errors import InputError
from hookedlm.layers.attention import Attention

if TYPE_CHECKING:
    from hookedlm.model import HookedTransformer

IGNORED_KEYS = (".mask", ".IGNORE", ".rotary_sin", ".rotary_cos")
"""Buffers of TransformerLens state dicts that have no counterpart here."""


def canonical_names(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """A state dict by this library's names: ``_W_K`` (grouped queries in TransformerLens) is
    ``W_K``, and TransformerLens' buffers are left out."""
    return {
        name.replace("attn._", "attn."): value
        for name, value in state_dict.items()
        if not name.endswith(IGNORED_KEYS)
    }


class StorageMap:
    """Applies a function to whole storages and hands out the views on the results."""

    def __init__(self, fn: Callable[[Tensor], Tensor]):
        self.fn = fn
        self.moved: dict[tuple[int, torch.dtype], tuple[Tensor, Tensor]] = {}

    def __call__(self, x: Tensor) -> Tensor:
        if type(x) not in (Tensor, nn.Parameter) or x.device.type == "meta" or x.numel() == 0:
            return self.fn(x)
        key = (x.untyped_storage().data_ptr(), x.dtype)
        if key not in self.moved:
            whole = torch.empty(0, dtype=x.dtype, device=x.device).set_(x.untyped_storage())
            self.moved[key] = (whole, self.fn(whole))
        whole, new = self.moved[key]
        if new is whole:
            return x.detach() if isinstance(x, nn.Parameter) else x
        return new.as_strided(x.size(), x.stride(), x.storage_offset())


class PlacingMethods(nn.Module):
    """`to`, `cuda`, `cpu`, `state_dict`, `copy.deepcopy`."""

    @property
    def device(self: HookedTransformer) -> torch.device:
        """Where the weights are."""
        return device_of(self)

    @property
    def dtype(self: HookedTransformer) -> torch.dtype:
        """What the weights are stored in."""
        return next(self.parameters()).dtype

    def _outside_modules(self: HookedTransformer) -> list[nn.Module]:
        """Modules that belong to the model without being part of its tree."""
        return [module for module in self._outside if isinstance(module, nn.Module)]

    def _apply(
        self: HookedTransformer, fn: Callable[[Tensor], Tensor], recurse: bool = True
    ) -> Any:
        if any(map(is_placed, (self, *self._outside_modules()))):
            raise InputError(
                "accelerate placed this model's weights (device_map): load it again to have them "
                "elsewhere or in another dtype"
            )
        move = StorageMap(fn)
        for module in self._outside_modules():
            module._apply(move)
        result = nn.Module._apply(self, move, recurse)
        self.driver.forget()
        for part in self.modules():
            if isinstance(part, Attention) and part.fused is not None:
                part.fused.forget()
        self.cfg.device, self.cfg.dtype = str(self.device), self.dtype
        return result

    def to(
        self: HookedTransformer,
        *args: Any,
        device_or_dtype: torch.device | str | torch.dtype | None = None,
        print_details: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Move to a device and/or cast to a dtype, as ``nn.Module.to``; cfg follows.

        ``device_or_dtype`` is TransformerLens' name of the first argument. Nothing is printed.
        """
        first = () if device_or_dtype is None else (device_or_dtype,)
        return nn.Module.to(self, *first, *args, **kwargs)

    def cuda(self: HookedTransformer, device: int | torch.device | None = None) -> Any:
        """Move to a CUDA device."""
        return self.to("cuda" if device is None else device)

    def cpu(self: HookedTransformer) -> Any:
        """Move to the CPU."""
        return self.to("cpu")

    def mps(self: HookedTransformer) -> Any:
        """Move to Apple's GPU."""
        return self.to("mps")

    def move_model_modules_to_device(self: HookedTransformer) -> None:
        """Move everything to ``cfg.device``. Raises NotImplementedError for several devices."""
        if self.cfg.n_devices != 1:
            raise NotImplementedError(
                f"cfg.n_devices={self.cfg.n_devices}: a model stands on one device here"
            )
        self.to(self.cfg.device)

    def train(self: HookedTransformer, mode: bool = True) -> Any:
        """Training mode. There is no dropout here; opaque parts may have some."""
        return nn.Module.train(self, mode)

    def state_dict(self: HookedTransformer, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """All weights under TransformerLens' names, absent biases as zeros."""
        return nn.Module.state_dict(self, *args, **kwargs)

    def load_state_dict(
        self: HookedTransformer,
        state_dict: Mapping[str, Any],
        strict: bool = True,
        assign: bool = False,
    ) -> Any:
        """Load weights by TransformerLens' names; the caller's dictionary is left alone.

        ``_W_K`` and ``_W_V`` (grouped queries in TransformerLens) are understood, its mask and
        rotary buffers ignored. ``strict`` refuses missing and unknown names. Weights that are one
        here (a tied embedding) and two in the dictionary become two.
        """
        renamed = canonical_names(state_dict)
        self._untie(renamed)
        return nn.Module.load_state_dict(self, renamed, strict=strict, assign=assign)

    @torch.no_grad()
    def _untie(self: HookedTransformer, given: Mapping[str, Any]) -> None:
        """A storage of its own for every weight that would overwrite another with other values."""
        first: dict[int, tuple[str, Tensor]] = {}
        for name, x in self.named_parameters():
            if name not in given:
                continue
            tied_to, y = first.setdefault(x.data_ptr(), (name, x))
            if tied_to == name or x.numel() != y.numel() or given[name].shape != x.shape:
                continue
            theirs = given[tied_to] if x.shape == y.shape else given[tied_to].t()
            if theirs.shape != x.shape or not torch.equal(given[name], theirs):
                module, _, leaf = name.rpartition(".")
                copied = nn.Parameter(x.detach().clone(), requires_grad=x.requires_grad)
                self.get_submodule(module)._parameters[leaf] = copied

    def __deepcopy__(self: HookedTransformer, memo: dict[int, Any]) -> Any:
        clone = StorageMap(torch.clone)
        for root in (self, *self._outside_modules()):
            for x in (*root.parameters(), *root.buffers()):
                if id(x) in memo:
                    continue
                new = clone(x.detach())
                if isinstance(x, nn.Parameter):
                    new = nn.Parameter(new, requires_grad=x.requires_grad)
                memo[id(x)] = new
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return twin
