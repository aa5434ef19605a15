"""Hook points: the identity until somebody listens, and one context manager that puts hooks in.

A `HookPoint` stands wherever a researcher has a name for a tensor. While nobody listens, calling it
costs one attribute test. Everything that listens (`run_with_hooks`, `run_with_cache`, `hooks()`,
generation) goes through `attached`, which removes on exit exactly what it put in on entry.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NoReturn

import torch
from torch import Tensor, nn

from hookedlm.axes import split_axes
from hookedlm.errors import HookReturnError, NoGradientError

HookFn = Callable[..., Any]
"""``fn(tensor, hook=point)``: returns None to observe (or edit in place), a tensor to replace."""

Direction = Literal["fwd", "bwd"]


@dataclass(eq=False, slots=True)
class LensHandle:
    """One hook in one point. ``handle.remove()`` takes it out again, from wherever it is."""

    point: HookPoint
    fn: HookFn
    direction: Direction
    is_permanent: bool = False
    context_level: int | None = None
    observes: bool = False
    """True for the library's own recorders: they never edit, so their presence changes nothing."""
    fired: int = 0

    def remove(self) -> None:
        """Take this hook out; doing it twice is harmless."""
        self.point.discard(self)


@dataclass(slots=True)
class RunState:
    """What a hook may want to know of the run it is called in; shared by all points of a model."""

    pos_offset: int = 0
    runs: int = 0
    watched: list[Tensor] | None = None
    """Collects the tensors at points with backward hooks, for whoever asks for their gradients;
    a tensor that no weight gives a gradient begins one there."""


class HookPoint(nn.Module):
    """The identity with a name, to which functions can be attached.

    ``axes`` declares the dimensions of its tensor in the words of `hookedlm.axes`. ``on_demand``
    points cost something and exist only while somebody names them. ``shares`` says that the tensor
    is also another point's, so that in-place edits here must work on a copy.
    """

    def __init__(self, axes: str | None = None, *, on_demand: bool = False, shares: bool = False):
        super().__init__()
        self.axes = None if axes is None else split_axes(axes)
        self.on_demand = on_demand
        self.shares = shares
        self.wanted = False
        self.fwd_hooks: list[LensHandle] = []
        self.bwd_hooks: list[LensHandle] = []
        self.ctx: dict[Any, Any] = {}
        self.name: str | None = None
        self.run_state = RunState()

    # The identity ---------------------------------------------------------------------------------

    def __call__(self, x: Tensor) -> Tensor:
        return self._fire(x) if self.wanted else x

    forward = __call__

    def _fire(self, x: Tensor) -> Tensor:
        if self.shares and any(not handle.observes for handle in self.fwd_hooks):
            x = x.clone()
        for handle in tuple(self.fwd_hooks):
            handle.fired += 1
            out = handle.fn(x, hook=self)
            x = x if out is None else self._checked(out, x)
        return self._watch_gradient(x) if self.bwd_hooks else x

    def _watch_gradient(self, x: Tensor) -> Tensor:
        watched = self.run_state.watched
        if not (x.requires_grad and torch.is_grad_enabled()):
            if watched is not None and torch.is_grad_enabled() and x.is_floating_point():
                return self._watch_gradient(x.detach().requires_grad_())
            if all(handle.observes for handle in self.bwd_hooks):
                return x
            raise NoGradientError(
                f"a backward hook stands at {self.name!r}, but no gradient will flow through it. "
                "Run outside torch.no_grad() and inference_mode, with grad mode on, and "
                "with parameters that require gradients."
            )
        handles = tuple(self.bwd_hooks)
        for handle in handles:
            handle.fired += 1
        # A node of its own: neighbouring points may share the tensor, and each must see the
        # gradient as it is at its own place in the chain.
        x = x.view_as(x)
        x.register_hook(lambda grad: self._backward(grad, handles))
        if watched is not None:
            watched.append(x)
        return x

    def _backward(self, grad: Tensor, handles: Sequence[LensHandle]) -> Tensor:
        for handle in handles:
            out = handle.fn(grad, hook=self)
            if isinstance(out, tuple) and len(out) == 1:  # TransformerLens 2.x wanted a 1-tuple
                out = out[0]
            grad = grad if out is None else self._checked(out, grad)
        return grad

    def _checked(self, out: Any, like: Tensor) -> Tensor:
        if not isinstance(out, Tensor):
            raise HookReturnError(
                f"the hook at {self.name!r} returned {type(out).__name__}; return None to observe "
                "(or edit in place) or a tensor to replace the activation."
            )
        if out is like:
            return out
        for what, got, expected in (
            ("shape", tuple(out.shape), tuple(like.shape)),
            ("dtype", out.dtype, like.dtype),
            ("device", out.device, like.device),
        ):
            if got != expected:
                raise HookReturnError(
                    f"the hook at {self.name!r} returned a tensor of {what} {got}; the activation "
                    f"it replaces has {what} {expected} (axes: {self.axes_text}). Return a tensor "
                    "that can stand in its place."
                )
        return out

    # Hooks ----------------------------------------------------------------------------------------

    def add_hook(
        self,
        hook: HookFn,
        dir: Literal["fwd", "bwd", "both"] = "fwd",
        is_permanent: bool = False,
        level: int | None = None,
        prepend: bool = False,
        *,
        observes: bool = False,
    ) -> LensHandle:
        """Attach ``hook(tensor, hook=point)`` and return its handle (the forward one for "both").

        ``dir``: "fwd", "bwd" or "both". Permanent hooks survive ``reset_hooks``. ``level`` is the
        context level it is removed with; ``prepend`` puts it before the hooks that are there.
        """
        if dir not in ("fwd", "bwd", "both"):
            raise ValueError(f"dir={dir!r}: expected 'fwd', 'bwd' or 'both'")
        if not callable(hook):
            raise TypeError(f"a hook must be callable, got {type(hook).__name__}")
        directions: tuple[Direction, ...] = ("fwd", "bwd") if dir == "both" else (dir,)
        handles = []
        for direction in directions:
            handle = LensHandle(self, hook, direction, is_permanent, level, observes)
            hooks = self.fwd_hooks if direction == "fwd" else self.bwd_hooks
            hooks.insert(0 if prepend else len(hooks), handle)
            handles.append(handle)
        self.wanted = True
        return handles[0]

    def add_perma_hook(
        self, hook: HookFn, dir: Literal["fwd", "bwd", "both"] = "fwd"
    ) -> LensHandle:
        """`add_hook` with ``is_permanent=True``."""
        return self.add_hook(hook, dir, is_permanent=True)

    def remove_hooks(
        self,
        dir: Literal["fwd", "bwd", "both"] = "fwd",
        including_permanent: bool = False,
        level: int | None = None,
    ) -> None:
        """Take out the hooks of a direction: those of context ``level`` if given, permanent ones
        only when ``including_permanent``."""
        if dir not in ("fwd", "bwd", "both"):
            raise ValueError(f"dir={dir!r}: expected 'fwd', 'bwd' or 'both'")
        for direction, hooks in (("fwd", self.fwd_hooks), ("bwd", self.bwd_hooks)):
            if dir in (direction, "both"):
                hooks[:] = [
                    handle
                    for handle in hooks
                    if (handle.is_permanent and not including_permanent)
                    or (level is not None and handle.context_level != level)
                ]
        self.wanted = bool(self.fwd_hooks or self.bwd_hooks)

    def discard(self, handle: LensHandle) -> None:
        """Take out one hook if it is still here."""
        for hooks in (self.fwd_hooks, self.bwd_hooks):
            hooks[:] = [other for other in hooks if other is not handle]
        self.wanted = bool(self.fwd_hooks or self.bwd_hooks)

    @property
    def edited(self) -> bool:
        """Whether a hook stands here that may change the tensor (recorders never do)."""
        return any(not handle.observes for handle in (*self.fwd_hooks, *self.bwd_hooks))

    # What a hook may ask --------------------------------------------------------------------------

    def clear_context(self) -> None:
        """Empty ``ctx``, the dictionary in which hooks may keep things between runs."""
        self.ctx = {}

    def layer(self) -> int:
        """The block this point belongs to; raises ValueError outside the blocks."""
        parts = (self.name or "").split(".")
        if len(parts) < 2 or not parts[1].isdigit():
            raise ValueError(f"{self.name!r} belongs to no block")
        return int(parts[1])

    @property
    def pos_offset(self) -> int:
        """Absolute position of index 0 of the pos axis: non-zero while generating with a cache."""
        return self.run_state.pos_offset

    @property
    def axes_text(self) -> str:
        """The declared axes as one string, for messages."""
        return "unknown" if self.axes is None else " ".join(self.axes)

    def register_forward_hook(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused: a hook point does not go through torch's call path. Use `add_hook`."""
        raise TypeError(f"use add_hook(fn) on the hook point {self.name!r}, not torch's own hooks")

    def register_forward_pre_hook(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused, as `register_forward_hook`."""
        self.register_forward_hook()

    def register_full_backward_hook(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused, as `register_forward_hook`."""
        self.register_forward_hook()

    def extra_repr(self) -> str:
        """Axes, and whether the point costs something."""
        return self.axes_text + (", on demand" if self.on_demand else "")


@dataclass(frozen=True, slots=True)
class HookRequest:
    """One hook to attach: where, what, and whether it must fire."""

    point: HookPoint
    fn: HookFn
    direction: Direction = "fwd"
    observes: bool = False


@contextmanager
def attached(
    requests: Iterable[HookRequest], level: int | None = None
) -> Iterator[list[LensHandle]]:
    """Attach hooks on entry; on exit, whatever happened, remove exactly those."""
    handles: list[LensHandle] = []
    try:
        for request in requests:
            handles.append(
                request.point.add_hook(
                    request.fn, request.direction, level=level, observes=request.observes
                )
            )
        yield handles
    finally:
        for handle in reversed(handles):
            handle.remove()


def compact(x: Tensor) -> Tensor:
    """``x``, copied when it would keep a much larger storage alive."""
    # An axis along which x was expanded is there once, and stays so.
    once = x[tuple(slice(0, 1) if not stride else slice(None) for stride in x.stride())]
    if x.untyped_storage().nbytes() > 2 * max(1, once.numel() * x.element_size()):
        return once.clone(memory_format=torch.contiguous_format).expand_as(x)
    return x
