"""Parts that run as somebody else wrote them, under the same hook names."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hookedlm.axes import CROSS_KEY, QUERY, SCORES, STREAM
from hookedlm.hooks import HookPoint
from hookedlm.layers import attention_math as math
from hookedlm.layers.context import Context
from hookedlm.spec import OpaqueSpec


def first(output: Any) -> Tensor:
    """The hidden states among what a Hugging Face module returned."""
    return output[0] if isinstance(output, (tuple, list)) else output


def _numbered(calls: Sequence[SharedHeads]) -> Mapping[str, nn.Module]:
    return {str(i): call for i, call in enumerate(calls)}


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


class SharedHeads(nn.Module):
    """Hook points on the arguments and the result of one call of a kernel that somebody else's
    attention makes, and that kernel longhand.

    Keys and values are all that the scores read, those that a cache remembers included. With
    ``rotated`` queries and keys arrive rotated and are named so.
    """

    def __init__(self, rotated: bool):
        super().__init__()
        rot = "rot_" if rotated else ""
        self._q, self._k = f"hook_{rot}q", f"hook_{rot}k"
        self.add_module(self._q, HookPoint(QUERY))
        self.add_module(self._k, HookPoint(CROSS_KEY))
        self.hook_v = HookPoint(CROSS_KEY)
        self.hook_attn_scores, self.hook_pattern = HookPoint(SCORES), HookPoint(SCORES)
        self.hook_z = HookPoint(QUERY)
        self.points: dict[str, HookPoint] = {
            name: point for name, point in self.named_children() if isinstance(point, HookPoint)
        }

    @property
    def wanted(self) -> bool:
        """Whether anybody listens."""
        return any(point.wanted for point in self.points.values())

    def forward(
        self,
        q: Float[Tensor, "batch head pos d_head"],
        k: Float[Tensor, "batch kv_head key_pos d_head"],
        v: Float[Tensor, "batch kv_head key_pos d_value"],
        mask: Tensor | None,
        scale: float,
        bias: Tensor | None = None,
        softcap: float | None = None,
        sinks: Float[Tensor, "head"] | None = None,
        causal: bool = True,
    ) -> tuple[Float[Tensor, "batch pos head d_value"], Float[Tensor, "batch head pos key_pos"]]:
        """(weighted values, pattern); ``mask`` is boolean (True: attend), additive, or None."""
        q = self.points[self._q](q.transpose(1, 2)).transpose(1, 2)
        k = self.points[self._k](k.transpose(1, 2)).transpose(1, 2)
        v = self.hook_v(v.transpose(1, 2)).transpose(1, 2)
        n_query, n_key = q.shape[2], k.shape[2]
        ctx = Context(mask=mask)
        allowed = ctx.allowed(n_query, n_key)
        if mask is not None and mask.dtype != torch.bool:
            additive = mask[..., -n_query:, :n_key]
            bias = additive if bias is None else bias + additive
        if allowed is None and causal and n_query > 1:
            allowed = math.causal_mask(n_query, n_key, q.device)
        scores = math.attention_scores(q, k, scale, bias, softcap).to(q.dtype)
        scores = self.hook_attn_scores(math.masked(scores, allowed))
        pattern = self.hook_pattern(math.attention_pattern(scores, sinks))
        return self.hook_z(math.weighted_values(pattern, v)), pattern


class OpaqueAttention(nn.Module):
    """Attention of a kind that has no uniform form, called as its own block would call it.

    Where its kernel is reached through an interface, `show` gives it that kernel's hook points.
    """

    def __init__(self, spec: OpaqueSpec, module: nn.Module):
        super().__init__()
        self.spec, self.module = spec, module
        self._accepts = _Accepts(module)

    def show(self, calls: Sequence[SharedHeads]) -> None:
        """Name the points of each call: ``hook_q``, or ``0.hook_q`` where there are several."""
        named = calls[0].points if len(calls) == 1 else dict(_numbered(calls))
        for name, part in named.items():
            self.add_module(name, part)

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

    def __init__(
        self, spec: OpaqueSpec, module: nn.Module, arguments: Mapping[str, str] | None = None
    ):
        super().__init__()
        self.spec, self.module = spec, module
        self._accepts = _Accepts(module)
        self._arguments = dict(arguments or {})
        self.hook_in, self.hook_out = HookPoint(STREAM, shares=True), HookPoint(STREAM)

    def forward(
        self, x: Float[Tensor, "batch pos d_model"], ctx: Context
    ) -> Float[Tensor, "batch pos d_model"]:
        kwargs = self._accepts.of(ctx.kwargs)
        for name, given in self._arguments.items():
            kwargs[name] = ctx.kwargs.get(given)
        return self.hook_out(first(self.module(self.hook_in(x), **kwargs)))


class OpaqueNorm(nn.Module):
    """A norm of unknown make: its output is hooked, its scale is not."""

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

    def show(self, calls: Sequence[SharedHeads]) -> None:
        """Name the points of each call as `OpaqueAttention` does, below ``attn``."""
        last = self._modules.pop("hook_resid_post")
        self.attn = calls[0] if len(calls) == 1 else nn.ModuleDict(_numbered(calls))
        self._modules["hook_resid_post"] = last  # hooks are listed in the order they fire

    def forward(
        self, resid: Float[Tensor, "batch pos d_model"], ctx: Context
    ) -> Float[Tensor, "batch pos d_model"]:
        resid = self.hook_resid_pre(resid)
        if ctx.skipped:
            return self.hook_resid_post(resid)
        return self.hook_resid_post(first(self.module(resid, **ctx.kwargs)))
