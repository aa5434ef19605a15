"""Blocks lent to somebody else's loop: it calls them, and hands them on what it likes."""

from __future__ import annotations

from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from hookedlm.axes import split_axes
from hookedlm.hooks import HookPoint
from hookedlm.layers.context import Context
from hookedlm.layers.opaque import OpaqueBlock, first
from hookedlm.spec import OpaqueSpec


class LentBlock(OpaqueBlock):
    """A whole block as Hugging Face wrote it, in the loop that Hugging Face wrote.

    ``hook_resid_pre`` and ``hook_resid_post`` see what enters and leaves it, the batch first:
    ``axes`` says what is behind that. Where the model keeps another axis first, ``moved`` is (its
    place there, its place in the hooks). What else the block returns goes on untouched.
    """

    def __init__(
        self, spec: OpaqueSpec, module: nn.Module, axes: str, moved: tuple[int, int] | None = None
    ):
        super().__init__(spec, module)
        self.hook_resid_pre.axes = self.hook_resid_post.axes = split_axes(axes)
        self.moved = moved

    def whole(self, resid: Float[Tensor, "..."], ctx: Context) -> Any:
        """Everything the block returns."""
        out = self.module(self._hooked(self.hook_resid_pre, resid), **ctx.kwargs)
        return with_first(out, self._hooked(self.hook_resid_post, first(out)))

    def shown(self, stream: Float[Tensor, "..."]) -> Float[Tensor, "batch ..."]:
        """A stream of the model as hooks see it."""
        return stream if self.moved is None else stream.movedim(*self.moved)

    def _hooked(self, point: HookPoint, stream: Tensor) -> Tensor:
        if self.moved is None or not point.wanted:
            return point(stream)
        return point(self.shown(stream)).movedim(*reversed(self.moved)).contiguous()

    def forward(self, resid: Float[Tensor, "..."], ctx: Context) -> Float[Tensor, "..."]:
        return first(self.whole(resid, ctx))


def with_first(output: Any, stream: Float[Tensor, "..."]) -> Any:
    """What a module returned, with another stream in its first place."""
    if isinstance(output, (tuple, list)):
        return type(output)((stream, *output[1:]))
    return stream
