"""`CachingMethods`: run a model and keep its activations."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hookedlm.cache import ActivationCache
from hookedlm.cache.dictionary import held, place
from hookedlm.derive import (
    Activations,
    Deferred,
    Derivation,
    derivations,
    named_blocks,
    points_of,
)
from hookedlm.errors import InputError, StaleCacheError
from hookedlm.hooks import HookRequest
from hookedlm.layers.context import Context
from hookedlm.root import HookedRootModule, NamesFilter, Recorder, names_given
from hookedlm.slices import Slice, SliceInput

if TYPE_CHECKING:
    from hookedlm.model import HookedTransformer


class CachingMethods(HookedRootModule):
    """`run_with_cache` for models whose full cache need not disturb the fused kernels."""

    def run_with_cache(
        self: HookedTransformer,
        *model_args: Any,
        return_cache_object: bool = True,
        remove_batch_dim: bool = False,
        names_filter: NamesFilter = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        incl_bwd: bool = False,
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
        pos_slice: SliceInput = None,
        **model_kwargs: Any,
    ) -> tuple[Any, Any]:
        """(output, `ActivationCache`) of one forward pass; arguments of `forward` are passed on.

        Everything by default: the kernels stay fused, and scores, patterns, norms and neurons'
        ``hook_post`` are computed when the cache is asked for them. ``names_filter`` (name, glob,
        list or predicate) listens to just these. ``device``, ``dtype`` and ``pos_slice`` apply as
        tensors are recorded.
        ``incl_bwd`` adds ``<name>_grad``: the gradient of the output, one number (as with
        ``return_type="loss"``), with respect to each activation. It goes back as far as the first
        of these, and the weights' own gradients are neither computed nor touched. With
        ``return_cache_object=False`` a plain dictionary is returned.

        Raises InputError with ``incl_bwd`` where gradients are off or the output is not one number.
        """
        options: dict[str, Any] = {
            "device": device,
            "dtype": dtype,
            "remove_batch_dim": remove_batch_dim,
            "pos_slice": pos_slice,
        }
        if incl_bwd and not torch.is_grad_enabled():
            raise InputError("incl_bwd needs gradients, and they are switched off here")
        deferred = (
            names_filter is None
            and pos_slice is None
            and dtype is None
            and not incl_bwd
            and model_kwargs.get("past_kv_cache") is None
        )
        points = self.select(names_filter)
        if names_filter is None:  # what somebody edits exists in this run, on demand or not
            points = [p for p in self.hook_points() if p.edited or self.is_in_full_cache(p)]
        quiet = self._quiet_points() if deferred else {}
        store: dict[str, Tensor] = {}
        compacts = names_filter is not None or pos_slice is not None
        recorder = Recorder(store, compacts=compacts, **options)
        requests = [HookRequest(p, recorder, observes=True) for p in points if p.name not in quiet]
        if incl_bwd:
            grads = Recorder(store, suffix="_grad", compacts=compacts, **options)
            requests += [HookRequest(p, grads, "bwd", observes=True) for p in points]
        named = names_given(names_filter)
        with self.listening(requests, named, reset_hooks_end, clear_contexts):
            with self._gradients_wanted() if incl_bwd else nullcontext() as watched:
                output = self(*model_args, **model_kwargs)
            contexts = self.driver.latest
            if watched is not None:
                if not isinstance(output, Tensor) or output.numel() != 1:
                    raise InputError('incl_bwd needs an output of one number: return_type="loss"')
                if watched:
                    torch.autograd.grad(output, watched, allow_unused=True)
        cache = self._ordered(store, quiet, contexts, remove_batch_dim)
        if not return_cache_object:
            return output, cache
        return output, ActivationCache(cache, self, has_batch_dim=not remove_batch_dim)

    @contextmanager
    def _gradients_wanted(self) -> Iterator[list[Tensor]]:
        """Within it, tensors at points with backward hooks are collected."""
        self.run_state.watched = []
        try:
            yield self.run_state.watched
        finally:
            self.run_state.watched = None

    def cache_size(
        self: HookedTransformer,
        tokens: Any,
        names_filter: NamesFilter = None,
        dtype: torch.dtype | None = None,
        pos_slice: SliceInput = None,
        prepend_bos: bool | None = None,
    ) -> int:
        """Bytes that `run_with_cache` with these arguments will record: its ``nbytes``.

        ``tokens``: text, texts or tokens, of which only the shape (and padding) matters. Two short
        rows are run to see what each hook point receives, and scaled up.
        """
        tokens, mask, _ = self._read_input(tokens, prepend_bos, None, None, None, None)
        rows, length = tokens.shape
        picked = Slice.unwrap(pos_slice)
        kept = len(picked.indices(length))
        few_picked = {"identity": None, "slice": (0, 2), "array": [0, 1]}[picked.mode]
        # A slice of less than half is recorded as a copy: so it must be here.
        n_few = 5 if 2 * kept < length else 3
        if any("patch" in (point.axes or ()) for point in self.hook_dict.values()):
            n_few = length  # how many of these a text has, the model knows
        few = torch.ones((2, n_few), dtype=torch.long, device=self.device)
        if mask is not None:
            few[1, 0] = 0
        with torch.no_grad():
            _, cache = self.run_with_cache(
                torch.zeros_like(few),
                attention_mask=few,
                names_filter=names_filter,
                dtype=dtype,
                pos_slice=few_picked,
            )
        sizes = {"batch": rows, "pos": kept, "key_pos": length}
        sized: dict[Any, int] = {}
        for name in cache.cache_dict.recorded():
            x, axes = cache[name], self.hook_dict[name].axes or ("batch", "pos")
            n = held(x)
            for axis, size, stride in zip(axes, x.shape, x.stride(), strict=False):
                if axis in sizes and stride:
                    n = n // size * sizes[axis]
            sized[place(x)] = n
        return sum(sized.values())

    def _quiet_points(self: HookedTransformer) -> dict[str, Any]:
        """Points to derive afterwards: where nobody else has a hook in the same part."""
        table = derivations(self)
        busy = tuple(
            prefix
            for prefix, part in (
                *((f"{name}.", block) for name, block in named_blocks(self).items()),
                ("ln_final.", self._modules.get("ln_final")),
            )
            if part is not None and any(point.edited for point in points_of(part))
        )
        return {name: how for name, how in table.items() if not name.startswith(busy or ("\0",))}

    def _ordered(
        self: HookedTransformer,
        store: dict[str, Tensor],
        quiet: dict[str, Any],
        contexts: Sequence[Context],
        remove_batch_dim: bool,
    ) -> Activations:
        """What was recorded and what follows from it, in firing order."""
        batched = {name: x[None] for name, x in store.items()} if remove_batch_dim else dict(store)
        recorded = Recorded(batched, self) if quiet else None
        cache = Activations()
        context_of = dict(zip(named_blocks(self), contexts, strict=False)) | {"": Context()}
        for name in self.hook_dict:
            if name in store:
                cache[name] = store[name]
            elif recorded is not None and name in quiet and self._reached(name, store):
                context = context_of["" if name.startswith("ln_final.") else _block_of(name)]
                entry = _deferred(quiet[name], name, recorded, context)
                cache[name] = entry.map(lambda x: x[0]) if remove_batch_dim else entry
        cache.update({name: x for name, x in store.items() if name not in cache})
        return cache

    def _reached(self, name: str, store: dict[str, Tensor]) -> bool:
        """Whether the part a derived entry belongs to ran in this pass."""
        if name.startswith("ln_final."):
            return "hook_logits" in store
        return f"{_block_of(name)}.hook_resid_post" in store


def _block_of(name: str) -> str:
    return ".".join(name.split(".")[:2])


class Recorded(Mapping[str, Tensor]):
    """The tensors of one run, for deriving others from them, where the weights are.

    Raises StaleCacheError once a tensor or weight it is asked about is not what it was in the run:
    what would be derived then never existed.
    """

    def __init__(self, tensors: dict[str, Tensor], model: HookedTransformer):
        self.tensors, self.model = tensors, model
        self.versions = {name: _version(x) for name, x in tensors.items()}
        self.weights = {name: self._weights_of(name) for name in (*named_blocks(model), "ln_final")}

    def __getitem__(self, name: str) -> Tensor:
        x = self.tensors[name]
        if _version(x) != self.versions[name]:
            raise StaleCacheError(f"{name!r} was edited in place after the run. {HOW_TO_KEEP}")
        return x.to(self.model.device)

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    def check_weights(self, name: str) -> None:
        """Refuse to compute a norm from weights that changed since the run."""
        part = name.split(".hook")[0].rsplit(".", 1)[0]  # of a block's norm, the block
        if self._weights_of(part) != self.weights[part]:
            raise StaleCacheError(
                f"{name!r} was not read yet, and weights of {part!r} changed since. {HOW_TO_KEEP}"
            )

    def _weights_of(self, part: str) -> list[tuple[int, int | None]]:
        module = self.model.mod_dict.get(part)
        parameters = () if module is None else module.parameters()
        return [(id(parameter), _version(parameter)) for parameter in parameters]


HOW_TO_KEEP = (
    "Patterns, scores, norms and hook_post are computed when first read: read them before, or name "
    "them in names_filter to have them recorded."
)


def _version(x: Tensor) -> int | None:
    """How often a tensor was edited in place; inference mode does not count."""
    return None if x.is_inference() else x._version


def _deferred(how: Derivation, name: str, recorded: Recorded, context: Context) -> Deferred:
    def compute() -> Tensor:
        if name.endswith(("hook_scale", "hook_normalized")):
            recorded.check_weights(name)
        return how(recorded, context).to(next(iter(recorded.tensors.values())).device)

    return Deferred(compute)
