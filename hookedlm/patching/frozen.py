"""`frozen`: a model held still while something beside it is trained."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from hookedlm.model import HookedTransformer


@contextmanager
def frozen(model: HookedTransformer) -> Iterator[None]:
    """Within it no parameter wants gradients, and all modules are in eval mode; then as before."""
    wanted = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]
    try:
        for parameter, _ in wanted:
            parameter.requires_grad_(False)
        model.eval()
        yield
    finally:
        for parameter, wants in wanted:
            parameter.requires_grad_(wants)
        for module, mode in modes:
            module.training = mode
