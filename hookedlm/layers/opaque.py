"""Parts that run as somebody else wrote them, under the same hook names."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from hookedlm.axes import STREAM
from hookedlm.hooks import HookPoint
from hookedlm.layers.context import Context
from hookedlm.spec import OpaqueSpec


def first(output: Any) -> Tensor:
    """The hidden states among what a Hugging Face module returned."""
    return output[0] if isinstance(output, (tuple, list)) else output


class _Accepts:
    """The keyword arguments a module's forward can take."""

    def __init__(self, module: nn.Module):
        parameters = inspect.signature(module.forward).parameters.values()
        self.anything = any(p.kind is p.VAR_KEYWORD for p in parameters)
        self.names = {p.name for p in parameters}
        self.first = next(iter(p.name for p in parameters if p.name != "self"))

    def of(self, kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Those of ``kwargs`` that the module takes besides its input."""
        return {
            name: value
            for name, value in kwargs.items()
            if name != self.first and (self.anything or name in self.names)
        }


class OpaqueAttention(nn.Module):
    """Attention of a kind that has no uniform form, called as its own block would call it."""

    def __init__(self, spec: OpaqueSpec, module: nn.Module):
        super().__init__()
        self.spec, self.module = spec, module
        self._accepts = _Accepts(module)

    def forward(
        self, x: Float[Tensor, "batch pos d_model"], x_k: Tensor, x_v: Tensor, ctx: Context
    ) -> Float[Tensor, "batch pos d_model"]:
        """``x_k`` and ``x_v`` are ``x`` itself: nothing splits the inputs of an opaque part."""
        return first(self.module(x, **self._accepts.of(ctx.kwargs)))


class OpaqueMLP(nn.Module):
    """An MLP (a mixture of experts, say) that has no uniform form."""

    def __init__(self, spec: OpaqueSpec, module: nn.Module):
        super().__init__()
        self.spec, self.module = spec, module

    def forward(self, x: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        return first(self.module(x)).view(x.shape)


class OpaqueMixer(nn.Module):
    """A token mixer that is not attention (a state-space layer, say): hooks on both its ends."""

    def __init__(self, spec: OpaqueSpec, module: nn.Module):
        super().__init__()
        self.spec, self.module = spec, module
        self._accepts = _Accepts(module)
        self.hook_in, self.hook_out = HookPoint(STREAM, shares=True), HookPoint(STREAM)

    def forward(
        self, x: Float[Tensor, "batch pos d_model"], ctx: Context
    ) -> Float[Tensor, "batch pos d_model"]:
        return self.hook_out(first(self.module(self.hook_in(x), **self._accepts.of(ctx.kwargs))))


class OpaqueNorm(nn.Module):
    """A final norm of unknown make: its output is hooked, its scale is not."""

    def __init__(self, spec: OpaqueSpec, module: nn.Module):
        super().__init__()
        self.spec, self.module = spec, module
        self.hook_normalized = HookPoint(STREAM)

    def forward(self, x: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        return self.hook_normalized(self.module(x))


class OpaqueBlock(nn.Module):
    """A whole block that runs as Hugging Face wrote it: only the stream around it has names."""

    def __init__(self, spec: OpaqueSpec, module: nn.Module):
        super().__init__()
        self.spec = spec
        self.hook_resid_pre = HookPoint(STREAM, shares=True)
        self.module = module
        self.hook_resid_post = HookPoint(STREAM, shares=True)

    def forward(
        self, resid: Float[Tensor, "batch pos d_model"], ctx: Context
    ) -> Float[Tensor, "batch pos d_model"]:
        resid = self.hook_resid_pre(resid)
        return self.hook_resid_post(first(self.module(resid, **ctx.kwargs)))
