"""`HookedTransformerKeyValueCache`: transformers' key-value cache under TransformerLens' names.

It is a transformers ``Cache`` like any other, so that everything that takes one takes it. Besides,
it knows which of its positions are padding, and can be frozen: read from, not written to.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from hookedlm.config import HookedTransformerConfig
from hookedlm.errors import InputError

Keys = Float[Tensor, "batch pos kv_head d_head"]


class HookedTransformerKeyValueCacheEntry(DynamicLayer):
    """Keys and values of one layer; ``past_keys`` and ``past_values`` ``[batch, pos, kv_head,
    d_head]``, after rotation."""

    def __init__(self, past_keys: Keys, past_values: Keys, frozen: bool = False):
        super().__init__()
        self.frozen = frozen
        keys, values = past_keys.transpose(1, 2), past_values.transpose(1, 2)
        self.lazy_initialization(keys, values)
        self.keys, self.values = keys, values
        self.picking_keys: Tensor | None = None

    @classmethod
    def init_cache_entry(
        cls,
        cfg: HookedTransformerConfig,
        device: torch.device | str | None,
        batch_size: int = 1,
    ) -> HookedTransformerKeyValueCacheEntry:
        """An entry without positions."""
        shape = (batch_size, 0, cfg.n_key_value_heads or cfg.n_heads, cfg.d_head)
        keys, values = (torch.empty(shape, device=device, dtype=cfg.dtype) for _ in "kv")
        return cls(keys, values)

    @property
    def past_keys(self) -> Keys:
        """Keys of all positions so far."""
        return self.keys.transpose(1, 2)

    @property
    def past_values(self) -> Keys:
        """Values of all positions so far."""
        return self.values.transpose(1, 2)

    def append(self, new_keys: Keys, new_values: Keys) -> tuple[Keys, Keys]:
        """All keys and values, the new ones last; kept, unless the entry is frozen."""
        keys, values = self.update(new_keys.transpose(1, 2), new_values.transpose(1, 2))
        return keys.transpose(1, 2), values.transpose(1, 2)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """The same in transformers' layout, ``[batch, kv_head, pos, d_head]``."""
        keys, values = key_states, value_states
        if self.get_seq_length():  # an empty one may know other sizes than this layer has
            if self.keys.shape[1] != keys.shape[1]:
                raise InputError(
                    f"this key-value cache holds {self.keys.shape[1]} heads a layer and the pass "
                    f"gives {keys.shape[1]}: it was filled before "
                    "cfg.ungroup_grouped_query_attention changed, or by another model"
                )
            keys = torch.cat([self.keys, key_states], dim=-2)
            values = torch.cat([self.values, value_states], dim=-2)
        if not self.frozen:
            self.keys, self.values = keys, values
            self.dtype, self.device = keys.dtype, keys.device
        return keys, values

    def update_indexer(
        self, indexer_key_states: Float[Tensor, "batch pos d_index"]
    ) -> Float[Tensor, "batch all_pos d_index"]:
        """What a selector of keys picks by (sparse attention): all of it, the new ones last."""
        known = self.picking_keys
        keys = indexer_key_states if known is None else torch.cat([known, indexer_key_states], 1)
        if not self.frozen:
            self.picking_keys = keys
        return keys

    def __repr__(self) -> str:
        state = ", frozen" if self.frozen else ""
        return f"{type(self).__name__}(past_keys={tuple(self.past_keys.shape)}{state})"


class HookedTransformerKeyValueCache(DynamicCache):
    """Keys and values of the tokens so far, for ``forward(..., past_kv_cache=)``.

    ``previous_attention_mask [batch, pos]`` is 1 at those that are real. While it is frozen, the
    new tokens of a pass attend to what is in it, and leave nothing in it.
    """

    def __init__(
        self,
        entries: Sequence[HookedTransformerKeyValueCacheEntry],
        previous_attention_mask: Int[Tensor, "batch pos"],
        frozen: bool = False,
    ):
        super().__init__()
        self.layers = list(entries)
        self.layer_class_to_replicate = None
        self.previous_attention_mask = previous_attention_mask
        self._frozen = frozen
        if frozen:
            self.freeze()

    @classmethod
    def init_cache(
        cls,
        cfg: HookedTransformerConfig,
        device: torch.device | str | None,
        batch_size: int = 1,
    ) -> HookedTransformerKeyValueCache:
        """An empty cache for prompts in ``batch_size`` rows."""
        entry = HookedTransformerKeyValueCacheEntry.init_cache_entry
        return cls(
            [entry(cfg, device, batch_size) for _ in range(cfg.n_layers)],
            torch.empty((batch_size, 0), device=device, dtype=torch.long),
        )

    @property
    def entries(self) -> list[HookedTransformerKeyValueCacheEntry]:
        """One per layer."""
        return self.layers

    def __getitem__(self, idx: int) -> HookedTransformerKeyValueCacheEntry:
        """The entry of a layer."""
        return self.entries[idx]

    # Freezing -------------------------------------------------------------------------------------

    @property
    def frozen(self) -> bool:
        """Whether passes leave nothing in it."""
        return self._frozen

    def freeze(self) -> None:
        """From now on it is read from only."""
        self._set_frozen(True)

    def unfreeze(self) -> None:
        """From now on passes append to it again."""
        self._set_frozen(False)

    def _set_frozen(self, frozen: bool) -> None:
        self._frozen = frozen
        for entry in self.entries:
            entry.frozen = frozen

    # Padding --------------------------------------------------------------------------------------

    def append_attention_mask(
        self, attention_mask: Int[Tensor, "batch new_pos"]
    ) -> Int[Tensor, "batch all_pos"]:
        """The mask of all positions, the new ones last; kept, unless the cache is frozen.

        Raises InputError for a mask of other rows.
        """
        self.check_rows(attention_mask.shape[0])
        before = self.previous_attention_mask
        # Positions whose pass failed left a mask, but no keys.
        before = before[:, : self.get_seq_length()].to(attention_mask.device)
        mask = torch.cat([before, attention_mask.to(before.dtype)], dim=1)
        self.remember_mask(mask)
        return mask

    def remember_mask(self, mask: Int[Tensor, "batch all_pos"]) -> None:
        """Keep the mask of all positions, unless the cache is frozen."""
        if not self.frozen:
            self.previous_attention_mask = mask

    def check_rows(self, n_rows: int) -> None:
        """Raise InputError unless the next pass may have this many rows, and every layer holds the
        same positions."""
        lengths = {entry.get_seq_length() for entry in self.entries}
        if len(lengths) > 1:
            raise InputError(
                f"the layers of this key-value cache hold {sorted(lengths)} positions: a pass that "
                "failed, or did not run all layers, wrote to some only. Start with a new cache."
            )
        known = self.previous_attention_mask.shape[0]
        if known != n_rows:
            raise InputError(
                f"the input has {n_rows} rows and the key-value cache is for {known}: make it with "
                f"init_cache(cfg, device, batch_size={n_rows})"
            )

    def __repr__(self) -> str:
        rows, state = self.previous_attention_mask.shape[0], ", frozen" if self.frozen else ""
        return (
            f"{type(self).__name__}({len(self.entries)} layers, {rows} rows, "
            f"{self.get_seq_length()} positions{state})"
        )
