"""`HookedRootModule`: a module that knows its hook points by name, and runs with hooks in them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hookedlm.errors import HookNameError, HookNeverFiredError, InputError
from hookedlm.hooks import (
    HookFn,
    HookPoint,
    HookRequest,
    LensHandle,
    RunState,
    attached,
    compact,
)
from hookedlm.names import nearest
from hookedlm.parts import AtHand
from hookedlm.slices import Slice, SliceInput

NamesFilter = str | Iterable[str] | Callable[[str], bool] | None
"""None (everything) | a name or glob | several of them | a predicate on names."""

HookSpec = tuple[str | Callable[[str], bool], HookFn]
"""(where, function), as in ``fwd_hooks=[("blocks.0.attn.hook_z", fn)]``."""

Anywhere = Literal["fwd", "bwd", "both"]
DeviceType = torch.device | str | None


def names_given(names: NamesFilter) -> set[str]:
    """The names a filter spells out; globs, predicates and None spell out none."""
    if names is None or callable(names):
        return set()
    return {names} if isinstance(names, str) else set(names)


class Recorder:
    """A hook that writes what passes into a dictionary: sliced, cast and moved on the spot, so that
    peak memory is what was asked for."""

    def __init__(
        self,
        store: dict[str, Tensor],
        *,
        suffix: str = "",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        remove_batch_dim: bool = False,
        pos_slice: SliceInput | Slice = None,
        compacts: bool = False,
    ):
        self.store = store
        self.suffix = suffix
        self.device, self.dtype = device, dtype
        self.remove_batch_dim = remove_batch_dim
        self.pos_slice = Slice.unwrap(pos_slice)
        self.compacts = compacts

    def __call__(self, tensor: Tensor, hook: HookPoint) -> None:
        axes = hook.axes or ("batch", "pos")
        x = tensor.detach()
        if self.pos_slice.mode != "identity" and "pos" in axes:
            x = self.pos_slice.apply(x, dim=axes.index("pos"))
        if self.remove_batch_dim and axes[0] == "batch":
            if x.shape[0] != 1:
                raise InputError(
                    f"remove_batch_dim needs a batch of one; {hook.name} has {x.shape[0]}"
                )
            x = x[0]
        if self.device is not None or self.dtype is not None:
            x = x.to(device=self.device, dtype=self.dtype if x.is_floating_point() else None)
        self.store[f"{hook.name}{self.suffix}"] = compact(x) if self.compacts else x


class HookPoints(list[HookPoint]):
    """A list of hook points that prints as a table: names, ``L`` for a layer, and axes."""

    def __repr__(self) -> str:
        lines: dict[str, list[str]] = {}
        for point in self:
            parts = (point.name or "").split(".")
            in_block = len(parts) > 2 and parts[1].isdigit()
            name = ".".join([parts[0], "L", *parts[2:]]) if in_block else point.name
            lines.setdefault(f"{name:<34} {point.extra_repr()}", []).append(
                parts[1] if in_block else ""
            )
        n_layers = max((len(layers) for layers in lines.values()), default=0)
        return "\n".join(
            line + ("" if len(layers) in (1, n_layers) else f" (layers {', '.join(layers)})")
            for line, layers in lines.items()
        )


class HookedRootModule(AtHand):
    """Base of everything with hook points. Call `setup` at the end of ``__init__``."""

    mod_dict: dict[str, nn.Module]
    hook_dict: dict[str, HookPoint]

    def __init__(self, *args: Any):
        super().__init__()
        self.is_caching = False
        self.context_level = 0
        self.run_state = RunState()
        self.mod_dict, self.hook_dict = {}, {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.run_state.runs += 1
        return super().__call__(*args, **kwargs)

    def setup(self) -> None:
        """Give every sub-module its name and list the hook points; call again after adding one."""
        self.mod_dict, self.hook_dict = {}, {}
        for name, module in self.named_modules():
            if isinstance(module, AtHand):
                module.keep_at_hand()
            if name == "":
                continue
            self.mod_dict[name] = module
            if isinstance(module, HookPoint):
                module.name = name
                module.run_state = self.run_state
                self.hook_dict[name] = module

    def hook_points(self) -> HookPoints:
        """All hook points of this module, in firing order; print them for names and axes."""
        return HookPoints(self.hook_dict.values())

    # Which points ---------------------------------------------------------------------------------

    def is_in_full_cache(self, point: HookPoint) -> bool:
        """Whether "everything" includes this point: on-demand points only when switched on."""
        return not point.on_demand

    def why_missing(self, name: str) -> str:
        """One sentence on why this model has no such point; empty when nothing is known."""
        return ""

    def select(self, names: NamesFilter) -> list[HookPoint]:
        """The points a filter means, in firing order.

        Raises HookNameError when a name, a glob or a predicate matches nothing. On-demand points
        are selected by naming them, or by a pattern that fits nothing else.
        """
        points = list(self.hook_dict.values())
        if names is None:
            return [point for point in points if self.is_in_full_cache(point)]
        if isinstance(names, str):
            if names in self.hook_dict:
                return [self.hook_dict[names]]
            if any(char in names for char in "*?["):
                return self._matching(lambda name: fnmatchcase(name, names), f"glob {names!r}")
            raise self._unknown(names)
        if callable(names):
            return self._matching(names, "filter")
        wanted = {id(point) for name in names for point in self.select(name)}
        if not wanted:
            raise HookNameError("an empty list of hook names: name at least one point")
        return [point for point in points if id(point) in wanted]

    def _matching(self, accepts: Callable[[str], bool], what: str) -> list[HookPoint]:
        matches = [point for name, point in self.hook_dict.items() if accepts(name)]
        if not matches:
            raise HookNameError(
                f"the {what} matches none of this model's {len(self.hook_dict)} hook points. "
                f"Names look like: {', '.join(list(self.hook_dict)[:3])}. "
                "model.hook_dict lists them all."
            )
        return [point for point in matches if self.is_in_full_cache(point)] or matches

    def _unknown(self, name: str) -> HookNameError:
        why = self.why_missing(name)
        close = nearest(name, self.hook_dict)
        hint = f" Nearest: {', '.join(close)}." if close else ""
        return HookNameError(f"no hook point {name!r} in this model.{hint} {why}".rstrip())

    # Adding and removing --------------------------------------------------------------------------

    def check_hooks_to_add(
        self,
        hook_point: HookPoint,
        hook_point_name: str,
        hook: HookFn,
        dir: Anywhere = "fwd",
        is_permanent: bool = False,
        prepend: bool = False,
    ) -> None:
        """Called before each hook is added; override it to refuse some."""

    def check_and_add_hook(
        self,
        hook_point: HookPoint,
        hook_point_name: str,
        hook: HookFn,
        dir: Anywhere = "fwd",
        is_permanent: bool = False,
        level: int | None = None,
        prepend: bool = False,
    ) -> LensHandle:
        """`check_hooks_to_add`, then add the hook."""
        self.check_hooks_to_add(hook_point, hook_point_name, hook, dir, is_permanent, prepend)
        return hook_point.add_hook(hook, dir, is_permanent, level, prepend)

    def add_hook(
        self,
        name: NamesFilter,
        hook: HookFn,
        dir: Anywhere = "fwd",
        is_permanent: bool = False,
        level: int | None = None,
        prepend: bool = False,
    ) -> LensHandle | list[LensHandle]:
        """Attach ``hook`` at a name, glob, list of names or predicate; stays until removed.

        Returns the handle, or the list of handles when several points matched. Raises
        HookNameError when none did.
        """
        handles = [
            self.check_and_add_hook(
                point, point.name or "", hook, dir, is_permanent, level, prepend
            )
            for point in self.select(name)
        ]
        return handles[0] if len(handles) == 1 else handles

    def add_perma_hook(
        self, name: NamesFilter, hook: HookFn, dir: Anywhere = "fwd"
    ) -> LensHandle | list[LensHandle]:
        """`add_hook` that survives `reset_hooks`."""
        return self.add_hook(name, hook, dir, is_permanent=True)

    def remove_all_hook_fns(
        self,
        direction: Anywhere = "both",
        including_permanent: bool = False,
        level: int | None = None,
    ) -> None:
        """Take the hooks out of every point."""
        for point in self.hook_points():
            point.remove_hooks(direction, including_permanent, level)

    def clear_contexts(self) -> None:
        """Empty the ``ctx`` dictionary of every point."""
        for point in self.hook_points():
            point.clear_context()

    def reset_hooks(
        self,
        clear_contexts: bool = True,
        direction: Anywhere = "both",
        including_permanent: bool = False,
        level: int | None = None,
    ) -> None:
        """Back to silence: all hooks out (permanent ones only on request), contexts cleared."""
        if clear_contexts:
            self.clear_contexts()
        self.remove_all_hook_fns(direction, including_permanent, level)
        self.is_caching = False

    # Running --------------------------------------------------------------------------------------

    def _requests(self, specs: Sequence[HookSpec], direction: Literal["fwd", "bwd"]):
        for where, fn in specs:
            for point in self.select(where):
                self.check_hooks_to_add(point, point.name or "", fn, direction)
                yield HookRequest(point, fn, direction, isinstance(fn, Recorder))

    @contextmanager
    def hooks(
        self,
        fwd_hooks: Sequence[HookSpec] = (),
        bwd_hooks: Sequence[HookSpec] = (),
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
    ) -> Iterator[HookedRootModule]:
        """Within the context the hooks are in; on exit exactly these are out again.

        All names are looked up before anything is added. Nests. With ``reset_hooks_end=False`` the
        hooks stay (unless the body raised). A hook named exactly that did not fire although the
        model ran raises HookNeverFiredError.
        """
        requests = [*self._requests(fwd_hooks, "fwd"), *self._requests(bwd_hooks, "bwd")]
        named = {name for where, _ in (*fwd_hooks, *bwd_hooks) for name in names_given(where)}
        with self.listening(requests, named, reset_hooks_end, clear_contexts):
            yield self

    @contextmanager
    def listening(
        self,
        requests: Sequence[HookRequest],
        named: Collection[str] = (),
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
    ) -> Iterator[list[LensHandle]]:
        """The one way in: `hooks`, for points already looked up. Those in ``named`` must fire."""
        self.context_level += 1
        runs = self.run_state.runs
        try:
            with attached(requests, level=self.context_level) as handles:
                yield handles
                if self.run_state.runs > runs:
                    self._check_fired(handles, named)
            if not reset_hooks_end:
                for request in requests:
                    request.point.add_hook(request.fn, request.direction, observes=request.observes)
        finally:
            self.context_level -= 1
            if clear_contexts:
                self.clear_contexts()

    def _check_fired(self, handles: Sequence[LensHandle], named: Collection[str]) -> None:
        silent = [h.point.name or "" for h in handles if not h.fired and h.point.name in named]
        if handles and not any(handle.fired for handle in handles):
            silent = [handle.point.name or "" for handle in handles]
        if silent:
            raise HookNeverFiredError(
                f"the hook at {silent[0]!r} did not run"
                + (f" (nor {len(silent) - 1} others)" if len(silent) > 1 else "")
                + ": the forward pass never reached it. Look at stop_at_layer, start_at_layer and "
                "return_type, and at whether this layer was used."
            )

    def run_with_hooks(
        self,
        *model_args: Any,
        fwd_hooks: Sequence[HookSpec] = (),
        bwd_hooks: Sequence[HookSpec] = (),
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
        **model_kwargs: Any,
    ) -> Any:
        """One forward pass with hooks in: ``fwd_hooks=[(name, fn)]``, fn(tensor, hook=point).

        Names may be globs or predicates. Backward hooks act during a later ``backward()`` of what
        is returned. Everything else goes to `forward`; raises as `hooks` does.
        """
        with self.hooks(fwd_hooks, bwd_hooks, reset_hooks_end, clear_contexts):
            return self(*model_args, **model_kwargs)

    def get_caching_hooks(
        self,
        names_filter: NamesFilter = None,
        incl_bwd: bool = False,
        device: torch.device | str | None = None,
        remove_batch_dim: bool = False,
        cache: dict[str, Tensor] | None = None,
        pos_slice: SliceInput | Slice = None,
        dtype: torch.dtype | None = None,
    ) -> tuple[dict[str, Tensor], list[HookSpec], list[HookSpec]]:
        """(cache, forward hooks, backward hooks) that record into ``cache``, not yet installed."""
        store: dict[str, Tensor] = {} if cache is None else cache
        options: dict[str, Any] = {
            "device": device,
            "dtype": dtype,
            "remove_batch_dim": remove_batch_dim,
            "pos_slice": pos_slice,
            "compacts": names_filter is not None or pos_slice is not None,
        }
        names = [point.name or "" for point in self.select(names_filter)]
        forward: list[HookSpec] = [(name, Recorder(store, **options)) for name in names]
        backward: list[HookSpec] = []
        if incl_bwd:
            backward = [(name, Recorder(store, suffix="_grad", **options)) for name in names]
        return store, forward, backward

    def add_caching_hooks(
        self,
        names_filter: NamesFilter = None,
        incl_bwd: bool = False,
        device: torch.device | str | None = None,
        remove_batch_dim: bool = False,
        cache: dict[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """Install recorders that stay until `reset_hooks`; returns the dictionary they fill."""
        store, forward, backward = self.get_caching_hooks(
            names_filter, incl_bwd, device, remove_batch_dim, cache
        )
        for request in (*self._requests(forward, "fwd"), *self._requests(backward, "bwd")):
            request.point.add_hook(request.fn, request.direction, observes=True)
        self.is_caching = True
        return store

    def cache_all(
        self,
        cache: dict[str, Tensor] | None,
        incl_bwd: bool = False,
        device: torch.device | str | None = None,
        remove_batch_dim: bool = False,
    ) -> None:
        """`add_caching_hooks` on every point, into ``cache`` (old TransformerLens spelling)."""
        self.add_caching_hooks(None, incl_bwd, device, remove_batch_dim, cache)

    def cache_some(
        self,
        cache: dict[str, Tensor] | None,
        names: NamesFilter,
        incl_bwd: bool = False,
        device: torch.device | str | None = None,
        remove_batch_dim: bool = False,
    ) -> None:
        """`add_caching_hooks` on some points, into ``cache`` (old TransformerLens spelling)."""
        self.add_caching_hooks(names, incl_bwd, device, remove_batch_dim, cache)

    def run_with_cache(
        self,
        *model_args: Any,
        names_filter: NamesFilter = None,
        device: torch.device | str | None = None,
        remove_batch_dim: bool = False,
        incl_bwd: bool = False,
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
        pos_slice: SliceInput | Slice = None,
        dtype: torch.dtype | None = None,
        **model_kwargs: Any,
    ) -> tuple[Any, Any]:
        """(output, dictionary of detached activations) of one forward pass.

        ``names_filter`` selects points; ``pos_slice``, ``dtype`` and ``device`` apply as tensors
        are recorded; ``incl_bwd`` calls ``output.backward()`` and adds ``<name>_grad`` entries.
        """
        cache, forward, backward = self.get_caching_hooks(
            names_filter, incl_bwd, device, remove_batch_dim, None, pos_slice, dtype
        )
        requests = [*self._requests(forward, "fwd"), *self._requests(backward, "bwd")]
        named = names_given(names_filter)
        with self.listening(requests, named, reset_hooks_end, clear_contexts):
            output = self(*model_args, **model_kwargs)
            if incl_bwd:
                output.backward()
        return output, cache
