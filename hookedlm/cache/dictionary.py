"""`CacheDictionary`: activations by name, shorthand or tuple, and what concerns all of them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import Self

from hookedlm.axes import STREAMS, split_axes
from hookedlm.cache.ledger import stream_before
from hookedlm.derive import Activations, Deferred
from hookedlm.errors import CacheKeyError, InputError
from hookedlm.names import get_act_name, nearest
from hookedlm.slices import Slice, SliceInput

if TYPE_CHECKING:
    from hookedlm.model import HookedTransformer


class CacheDictionary:
    """Activations by name; what was not recorded but follows from it is computed when read."""

    def __init__(
        self,
        cache_dict: dict[str, Tensor],
        model: HookedTransformer,
        has_batch_dim: bool = True,
    ):
        self.cache_dict = (
            cache_dict if isinstance(cache_dict, Activations) else Activations(cache_dict)
        )
        self.model = model
        self.has_batch_dim = has_batch_dim
        self.has_embed = "hook_embed" in self.cache_dict
        self.has_pos_embed = "hook_pos_embed" in self.cache_dict

    # Reading --------------------------------------------------------------------------------------

    def __getitem__(self, key: str | tuple[Any, ...]) -> Tensor:
        name = self.name_of(key)
        if name in self.cache_dict:
            return self.cache_dict[name]
        if name.endswith("attn.hook_result") and name in self.model.hook_dict:
            self.cache_dict[name] = self.compute_head_result(name)
            return self.cache_dict[name]
        why = (
            self.model.why_missing(name)
            if name not in self.model.hook_dict
            else (
                "The model has it, but it was not recorded: see names_filter, stop_at_layer and "
                "return_type."
            )
        )
        close = nearest(name, self.cache_dict)
        raise CacheKeyError(
            f"no activation {name!r} in this cache of {len(self.cache_dict)}. "
            + (f"Nearest: {', '.join(close)}. " if close else "")
            + why
        )

    def compute_head_result(self, name: str) -> Tensor:
        """``hook_result``, which a full cache leaves out for its size; see `ComponentMethods`."""
        raise CacheKeyError(f"no activation {name!r}")

    def name_of(self, key: str | tuple[Any, ...]) -> str:
        """The full hook name a key stands for."""
        if isinstance(key, str):
            return key if key in self.cache_dict else get_act_name(key)
        if not isinstance(key, tuple) or not 1 <= len(key) <= 3:
            raise CacheKeyError(f"{key!r}: a key is a name or (name[, layer[, layer_type]])")
        name, layer, *kind = (*key, None) if len(key) == 1 else key
        if isinstance(layer, int) and layer < 0:
            layer += self.model.cfg.n_layers
        return get_act_name(name, layer, *kind)

    def __len__(self) -> int:
        return len(self.cache_dict)

    def __contains__(self, key: Any) -> bool:
        try:
            return self.name_of(key) in self.cache_dict
        except KeyError:  # no way to write a name
            return False

    def __iter__(self) -> Iterator[str]:
        return iter(self.cache_dict)

    def keys(self) -> Any:
        """Hook names, in firing order."""
        return self.cache_dict.keys()

    def values(self) -> Any:
        """All tensors; what was not recorded is computed."""
        return self.cache_dict.values()

    def items(self) -> Any:
        """All (name, tensor) pairs; what was not recorded is computed."""
        return self.cache_dict.items()

    def __repr__(self) -> str:
        recorded = len(self.cache_dict.recorded())
        return (
            f"ActivationCache of {len(self)} activations ({recorded} recorded, the others computed "
            f"when asked for): {', '.join(list(self.keys())[:4])}, ..."
        )

    def stack_activation(
        self, activation_name: str, layer: int = -1, sublayer_type: str | None = None
    ) -> Float[Tensor, "layer ..."]:
        """One activation of all layers below ``layer``, stacked along a new first axis."""
        end = self._layer(layer)
        if end == 0:
            first = self[(activation_name, 0, sublayer_type)]
            return first.new_zeros((0, *first.shape))
        return torch.stack([self[(activation_name, i, sublayer_type)] for i in range(end)])

    # All of it ------------------------------------------------------------------------------------

    @property
    def nbytes(self) -> int:
        """Bytes held: what was recorded; a tensor that goes by two names is counted once."""
        recorded = [x for _, x in self.cache_dict.raw() if isinstance(x, Tensor)]
        return sum({place(x): held(x) for x in recorded}.values())

    def to(self, device: str | torch.device, move_model: bool = False) -> Self:
        """Move every tensor, in place (and the model with ``move_model``)."""
        self.cache_dict = self.cache_dict.map(lambda x: x.to(device))
        if move_model:
            self.model.to(device)
        return self

    def toggle_autodiff(self, mode: bool = False) -> None:
        """Switch torch's gradients on or off for the whole process: ``torch.set_grad_enabled``."""
        torch.set_grad_enabled(mode)

    def remove_batch_dim(self) -> Self:
        """Drop the batch axis of one, in place; a second call does nothing.

        Raises InputError if the batch is larger.
        """
        if not self.has_batch_dim:
            return self
        for name in self.cache_dict.recorded():
            rows = self.cache_dict[name].shape[0]
            if rows != 1:
                raise InputError(f"remove_batch_dim needs a batch of one; {name} has {rows}")
        self.cache_dict = self.cache_dict.map(lambda x: x[0])
        self.has_batch_dim = False
        return self

    def apply_slice_to_batch_dim(self, batch_slice: SliceInput | Slice) -> Self:
        """A new cache of some rows: an int selects one and drops the batch axis.

        Tensors are views of this cache's. Raises InputError without a batch axis.
        """
        if not self.has_batch_dim:
            raise InputError("this cache has no batch axis to slice (has_batch_dim=False)")
        rows = Slice(batch_slice)
        picked = self.cache_dict.map(lambda x: rows.apply(x, dim=0))
        return type(self)(picked, self.model, has_batch_dim=rows.mode != "int")

    @classmethod
    def cat(cls, caches: Sequence[Self]) -> Self:
        """Several caches of one model as one: rows behind each other along the batch axis.

        A cache without a batch axis is one row. Raises InputError if models, names or lengths
        differ.
        """
        if not caches:
            raise InputError("cat needs at least one cache")
        first = caches[0]
        for i, cache in enumerate(caches):
            if cache.model is not first.model:
                raise InputError(f"cache {i} is of another model than cache 0")
            if odd := set(cache.cache_dict) ^ set(first.cache_dict):
                raise InputError(f"caches 0 and {i} hold different activations: {sorted(odd)[:5]}")
        for name in first.cache_dict.recorded():
            shapes = {cache._batched(cache.cache_dict[name]).shape[1:] for cache in caches}
            if len(shapes) > 1:
                raise InputError(
                    f"{name} has shapes {sorted(map(tuple, shapes))} besides its batch axis: run "
                    "prompts of equal length, or one padded batch"
                )
        joined = Activations()
        for name, x in first.cache_dict.raw():
            rows = _Rows(caches, name)
            joined[name] = rows() if isinstance(x, Tensor) else Deferred(rows)
        return cls(joined, first.model)

    # What the algebra selects ---------------------------------------------------------------------

    def _batched(self, x: Tensor) -> Tensor:
        return x if self.has_batch_dim else x[None]

    def _stream(self, name: str, pos: Slice) -> Tensor:
        """One recorded stream ``[batch?, pos?, d_model]``, positions selected."""
        several = self.model.hook_dict[name].axes == split_axes(STREAMS)
        return pos.apply(self[name], dim=-3 if several else -2)

    def _resid(self, end: int, mlp_input: bool, pos: Slice) -> Tensor:
        """The stream entering layer ``end``, its MLP, or the final norm."""
        return self._stream(stream_before(self.model, end, mlp_input), pos)

    def _layer(self, layer: int | None) -> int:
        n = self.model.cfg.n_layers
        if layer is None or layer == -1:
            return n
        if not 0 <= layer <= n:
            raise InputError(f"layer={layer}: this model has layers 0 to {n - 1}; {n} is the end")
        return layer


def place(x: Tensor) -> tuple[Any, ...]:
    """Where a tensor lies: the same for two names of one tensor."""
    return x.device, x.data_ptr(), tuple(x.shape), x.stride()


def held(x: Tensor) -> int:
    """Bytes of the elements a tensor really has: one expanded along an axis has them once."""
    pairs = zip(x.shape, x.stride(), strict=True)
    return x.element_size() * math.prod(size for size, stride in pairs if stride or size == 0)


class _Rows:
    """One activation of several caches, when asked for."""

    def __init__(self, caches: Sequence[CacheDictionary], name: str):
        self.caches, self.name = list(caches), name

    def __call__(self) -> Tensor:
        return torch.cat([cache._batched(cache.cache_dict[self.name]) for cache in self.caches])
