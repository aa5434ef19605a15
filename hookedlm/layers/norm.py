"""Norms: LayerNorm and RMSNorm, fused until somebody listens to the scale or the result."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hookedlm.axes import SCALE, STREAM
from hookedlm.errors import NoGradientError
from hookedlm.hooks import HookPoint
from hookedlm.layers.weights import Weights
from hookedlm.spec import NormSpec


class Same(nn.Module):
    """The identity, at the price of one function call: what stands where a part is absent."""

    def __call__(self, x: Tensor) -> Tensor:
        return x

    forward = __call__


class Times(nn.Module):
    """Multiplication by a constant (residual multipliers), or by one for each dimension."""

    def __init__(self, factor: float | Float[Tensor, "d_model"]):
        super().__init__()
        if isinstance(factor, Tensor):
            factor = nn.Parameter(factor.detach(), requires_grad=factor.requires_grad)
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor

    def extra_repr(self) -> str:
        return "one a dimension" if isinstance(self.factor, Tensor) else str(self.factor)


class Norm(Weights):
    """``(x - mean) / scale * w + b`` (LayerNorm) or ``x / scale * w`` (RMSNorm).

    ``hook_scale`` sees ``sqrt(var + eps)``, in float32. ``hook_normalized`` sees LayerNorm's output
    after weight and bias, RMSNorm's before the weight: the convention of TransformerLens 2.x, on
    which published sparse autoencoders were trained. Without weights (folded away, or a family
    that has none) the two coincide. Sources: arXiv 1607.06450, 1910.07467.
    """

    def __init__(
        self,
        spec: NormSpec,
        w: Tensor | None,
        b: Tensor | None = None,
        scale_axes: str = SCALE,
        axes: str = STREAM,
        on_demand: bool = False,
    ):
        super().__init__()
        self.spec = spec
        self.eps = spec.eps
        self.put("w", w, None, "")
        self.put("b", b, None, "")
        self.hook_scale = HookPoint(scale_axes, on_demand=on_demand)
        self.hook_normalized = HookPoint(axes, on_demand=on_demand)

    def forward(self, x: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch width"]:
        if self.hook_scale.wanted or self.hook_normalized.wanted:
            scale = self.hook_scale(self.scale_of(x))
            return self._after_hook(self.hook_normalized(self.normalized(x, scale)))
        return self.fast(x)

    # Nobody listens: Hugging Face's operations in Hugging Face's order ----------------------------

    def fast(self, x: Tensor) -> Tensor:
        """The norm in as few operations as its family spends on it."""
        if self.spec.native:
            return self._layer_norm(x)
        x32 = x.float()
        if self.spec.centres:
            x32 = x32 - x32.mean(-1, keepdim=True)
        x32 = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + self.eps)
        return self._weighted(x32, x.dtype)

    def _layer_norm(self, x: Tensor) -> Tensor:
        b = self._parameters["b"]
        w: Tensor | None = self._parameters["w"]
        if w is not None and self.spec.offset:
            w = w + self.spec.offset
        if not self.spec.late_cast:
            return torch.layer_norm(x, x.shape[-1:], w, b, self.eps)
        return torch.layer_norm(x.float(), x.shape[-1:], w, b, self.eps).to(x.dtype)

    def _weighted(self, x32: Tensor, dtype: torch.dtype) -> Tensor:
        w, b = self._parameters["w"], self._parameters["b"]
        if self.spec.native and w is not None:  # as torch rounds: once
            x32 = x32 * self.weight.float()
            return (x32 if b is None else x32 + b.float()).to(dtype)
        if w is None:
            x = x32.to(dtype)
        elif self.spec.late_cast:
            x = (x32 * (self.spec.offset + w.float())).to(dtype)
        else:
            x = self.weight * x32.to(dtype)
        return x if b is None else x + b

    # Somebody listens: the same, longhand ---------------------------------------------------------

    @property
    def weight(self) -> Tensor:
        """What the normalized stream is multiplied by: ``w`` plus the family's offset, or 1."""
        w = self._parameters["w"]
        if w is None:
            return torch.ones((), dtype=torch.float32, device=self._device)
        return w + self.spec.offset if self.spec.offset else w

    @property
    def _device(self) -> torch.device:
        b = self._parameters["b"]
        return torch.device("cpu") if b is None else b.device

    def centred(self, x: Tensor) -> Float[Tensor, "*batch width"]:
        """``x`` in float32, less its mean if this norm subtracts it."""
        x32 = x.float()
        return x32 - x32.mean(-1, keepdim=True) if self.spec.centres else x32

    def scale_of(self, x: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch 1"]:
        """What ``x`` is divided by: ``sqrt(mean(x²) + eps)`` after centring, float32."""
        return (self.centred(x).pow(2).mean(-1, keepdim=True) + self.eps).sqrt()

    def normalized(
        self, x: Float[Tensor, "*batch width"], scale: Float[Tensor, "*batch 1"]
    ) -> Float[Tensor, "*batch width"]:
        """What ``hook_normalized`` sees, for an input and a scale."""
        normalized = self.centred(x) / scale
        if self.spec.centres:
            return self._weighted(normalized, x.dtype)
        return normalized.to(x.dtype)

    def _after_hook(self, normalized: Tensor) -> Tensor:
        if self.spec.centres:
            return normalized
        return self._weighted(normalized.float(), normalized.dtype)

    def linearised(
        self, parts: Float[Tensor, "*parts width"], scale: Float[Tensor, "*batch 1"]
    ) -> Float[Tensor, "*parts width"]:
        """The norm as a linear map, its scale held fixed: what each part of the input becomes.

        The bias belongs to no part and is left out: ``sum of parts + b`` is the norm's output.
        """
        x = self.centred(parts) / scale
        return (x * self.weight).to(parts.dtype)

    def of_copies(self, stream: Tensor, copies: Sequence[Tensor]) -> list[Tensor]:
        """The norm of per-head copies ``[batch, pos, head, d_model]`` of the stream.

        Hooks on this norm still see it once, on the stream itself; if they edit, every head gets
        the edited scale or result.
        """
        if not (self.hook_scale.wanted or self.hook_normalized.wanted):
            return [self.fast(copy) for copy in copies]
        scale, scale_edited = observed(self.hook_scale, self.scale_of(stream))
        seen, edited = observed(self.hook_normalized, self.normalized(stream, scale))
        if edited:
            return [self._after_hook(seen).unsqueeze(2).expand_as(copy) for copy in copies]
        scales = [scale.unsqueeze(2) if scale_edited else self.scale_of(c) for c in copies]
        return [
            self._after_hook(self.normalized(c, s)) for c, s in zip(copies, scales, strict=True)
        ]

    def extra_repr(self) -> str:
        weights = "no weights" if self._parameters["w"] is None else f"+{self.spec.offset:g}"
        return f"{self.spec.kind}, eps={self.eps:g}" + (
            f", {weights}" if self._parameters["w"] is None or self.spec.offset else ""
        )


def observed(point: HookPoint, x: Tensor) -> tuple[Tensor, bool]:
    """The tensor after a point's hooks, and whether they changed it."""
    if any(not handle.observes for handle in point.bwd_hooks):
        raise NoGradientError(
            f"a backward hook at {point.name!r} can't run while hook_q_input, hook_k_input, "
            "hook_v_input or hook_attn_in is in use: the gradient flows through the per-head "
            "copies. Hook one or the other."
        )
    if not point.edited:
        return point(x), False
    before = x.clone()
    after = point(x)
    return after, not torch.equal(after, before)
