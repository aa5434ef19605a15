"""Blocks lent to somebody else's loop: it calls them, and hands them on what it likes."""

from __future__ import annotations

from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from hookedlm.axes import split_axes
from hookedlm.layers.context import Context
from hookedlm.layers.opaque import OpaqueBlock, first
from hookedlm.spec import OpaqueSpec


class LentBlock(OpaqueBlock):
    """A whole block as Hugging Face wrote it, in the loop that Hugging Face wrote.

    ``hook_resid_pre`` and ``hook_resid_post`` see what enters and leaves it, in the shape the model
    keeps its stream in: ``axes`` says which. What else the block returns goes on untouched.
    """

    def __init__(self, spec: OpaqueSpec, module: nn.Module, axes: str):
        super().__init__(spec, module)
        self.hook_resid_pre.axes = self.hook_resid_post.axes = split_axes(axes)

    def whole(self, resid: Float[Tensor, "..."], ctx: Context) -> Any:
        """Everything the block returns."""
        out = self.module(self.hook_resid_pre(resid), **ctx.kwargs)
        return with_first(out, self.hook_resid_post(first(out)))

    def forward(self, resid: Float[Tensor, "..."], ctx: Context) -> Float[Tensor, "..."]:
        return first(self.whole(resid, ctx))


def with_first(output: Any, stream: Float[Tensor, "..."]) -> Any:
    """What a module returned, with another stream in its first place."""
    if isinstance(output, (tuple, list)):
        return type(output)((stream, *output[1:]))
    return stream
