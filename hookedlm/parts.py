"""`AtHand`: a module that finds its parts as plain attributes."""

from __future__ import annotations

from typing import Any

from torch import nn


class AtHand(nn.Module):
    """A module whose parts are plain attributes besides, once it is whole.

    torch keeps parts in a table of their own, which Python comes to only after it has looked
    everywhere else, through a function call. That is a seventh of a small model's forward pass.
    Assigning, deleting or registering a part keeps both in step.
    """

    def keep_at_hand(self) -> None:
        """Find the parts that are here now as attributes: after all are built, or exchanged in
        torch's own table."""
        for name in vars(self).get("_at_hand", ()):
            vars(self).pop(name, None)
        parts = {name: part for name, part in self._modules.items() if part is not None}
        vars(self).update(parts, _at_hand=tuple(parts))

    def __setattr__(self, name: str, value: Any) -> None:
        if name in vars(self).get("_modules", ()):
            vars(self).pop(name, None)
        super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        if name in vars(self).get("_modules", ()):
            vars(self).pop(name, None)
        super().__delattr__(name)

    def add_module(self, name: str, module: nn.Module | None) -> None:
        """As torch does."""
        if name in self._modules:
            vars(self).pop(name, None)
        super().add_module(name, module)
