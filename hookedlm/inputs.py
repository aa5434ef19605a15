"""`InputMethods`: from text, tokens or a stream to what enters the first block."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import Cache

from hookedlm.convert.hf import length_of
from hookedlm.errors import InputError
from hookedlm.past_key_values import HookedTransformerKeyValueCache

if TYPE_CHECKING:
    from hookedlm.model import HookedTransformer

Tokens = Int[Tensor, "batch pos"]
Stream = Float[Tensor, "batch pos d_model"]
Mask = Int[Tensor, "batch pos"]
Side = Literal["left", "right"]
Input = str | Sequence[str] | Tokens | Int[Tensor, "pos"] | Stream


class InputMethods:
    """What the model is given, read and embedded."""

    def input_to_embed(
        self: HookedTransformer,
        input: Input,
        prepend_bos: bool | None = None,
        padding_side: Side | None = None,
        attention_mask: Mask | None = None,
        past_kv_cache: Any = None,
    ) -> tuple[Stream, Tokens, Stream | None, Int[Tensor, "batch all_pos"] | None]:
        """(stream entering block 0, tokens, position embedding kept apart, attention mask).

        All that `forward` does before its blocks: ``forward(stream, start_at_layer=0, tokens=...,
        shortformer_pos_embed=..., attention_mask=...)`` does the rest. The third is None but for
        shortformer models; the mask is None where every position is real, and includes those in
        ``past_kv_cache``. Raises InputError and TokenizerError as `forward` does.
        """
        tokens, mask, _ = self._read_input(
            input, prepend_bos, padding_side, None, None, attention_mask
        )
        assert tokens is not None
        past = self.get_pos_offset(past_kv_cache, tokens.shape[0])
        if self.embed is None:
            stream, _ = self._enter(tokens, None, mask, past, past_kv_cache, None)
            return stream, tokens, None, mask
        mask = self.driver.full_mask(mask, tokens.shape[1], past, past_kv_cache)
        stream, pos_embed = self._embedded(tokens, mask, past)
        return stream, tokens, pos_embed, mask

    def get_residual(
        self: HookedTransformer,
        embed: Stream,
        pos_offset: int,
        prepend_bos: bool | None = None,
        attention_mask: Int[Tensor, "batch all_pos"] | None = None,
        tokens: Tokens | None = None,
        return_shortformer_pos_embed: bool = True,
        device: torch.device | str | None = None,
    ) -> Stream | tuple[Stream, Stream | None]:
        """The stream entering block 0: token embeddings with positions added where those are added.

        ``pos_offset``: how many positions went before, in a key-value cache. ``attention_mask``
        covers them too (or the new ones only); without it every position is real. Also returns,
        unless ``return_shortformer_pos_embed=False``, the position embedding of shortformer models,
        else None. ``prepend_bos`` and ``tokens`` are there for TransformerLens' signature: the mask
        alone says what is padding. Raises InputError past the last position embedding.
        """
        self._check_stream(embed, 0)
        if self.embed is None:
            raise InputError(
                "the embedding runs as Hugging Face wrote it, positions included: "
                "input_to_embed gives the stream entering block 0"
            )
        n_new = embed.shape[1]
        mask = self._unless_full(_of_batch(attention_mask, embed.shape[0]))
        mask = self.driver.full_mask(mask, n_new, pos_offset, None)
        stream, pos_embed = self._positioned(embed.to(device or embed.device), mask, pos_offset)
        return (stream, pos_embed) if return_shortformer_pos_embed else stream

    def get_pos_offset(self: HookedTransformer, past_kv_cache: Any, batch_size: int) -> int:
        """How many positions a key-value cache holds already; 0 for None.

        Raises InputError for anything but a transformers ``Cache``, and for one of other rows.
        """
        if past_kv_cache is None:
            return 0
        if not isinstance(past_kv_cache, Cache):
            raise InputError(
                f"past_kv_cache is {type(past_kv_cache).__name__}: expected a transformers Cache, "
                "for instance DynamicCache() or HookedTransformerKeyValueCache.init_cache(...)"
            )
        if isinstance(past_kv_cache, HookedTransformerKeyValueCache):
            past_kv_cache.check_rows(batch_size)
        return length_of(past_kv_cache)

    # Reading --------------------------------------------------------------------------------------

    def _read_input(
        self: HookedTransformer,
        input: Input,
        prepend_bos: bool | None,
        padding_side: Side | None,
        start_at_layer: int | None,
        tokens: Tokens | None,
        attention_mask: Tensor | None,
    ) -> tuple[Tokens | None, Tensor | None, Stream | None]:
        """(tokens, mask of real positions or None if all are, stream if that is the input)."""
        if isinstance(input, (str, list, tuple)):
            if start_at_layer is not None:
                raise InputError("start_at_layer wants the residual stream as input, not text")
            tokens, known = self.to_tokens_and_mask(input, prepend_bos, padding_side)
            mask = known if attention_mask is None else _of_batch(attention_mask, len(known))
            return tokens.to(self.device), self._unless_full(mask), None
        if not isinstance(input, Tensor):
            raise InputError(f"input is {type(input).__name__}: expected text, tokens or a stream")
        if start_at_layer is not None or input.is_floating_point():
            self._check_stream(input, start_at_layer)
            return tokens, self._unless_full(_of_batch(attention_mask, input.shape[0])), input
        if input.ndim not in (1, 2) or input.dtype not in (torch.long, torch.int, torch.int16):
            raise InputError(
                f"input of shape {tuple(input.shape)} and dtype {input.dtype}: tokens are integers "
                "[batch, pos] or [pos]"
            )
        given = input if input.ndim == 2 else input[None]
        if given.shape[1] == 0:
            raise InputError(f"input of shape {tuple(given.shape)} has no positions")
        if self.embed is None:  # ours tells by itself
            self._check_ids(given)
        given = given.to(self.device, torch.long)
        if attention_mask is None and self._pads_left(padding_side) and given.shape[0] > 1:
            attention_mask = self.padding_mask(given, "left")
        return given, self._unless_full(_of_batch(attention_mask, given.shape[0])), None

    def _check_ids(self: HookedTransformer, tokens: Tensor) -> None:
        if tokens.device.type != "cpu":  # looking would make the CPU wait for the device
            return
        low, high = tokens.aminmax()
        if low < 0 or high >= self.cfg.d_vocab:
            raise InputError(
                f"token ids must be from 0 to {self.cfg.d_vocab - 1}, got {int(low)} to {int(high)}"
            )

    def _check_stream(self: HookedTransformer, stream: Tensor, start_at_layer: int | None) -> None:
        if start_at_layer is None:
            raise InputError(
                "the input is a float tensor. To run from a residual stream say at which layer it "
                "enters: start_at_layer=0 for the sum of embeddings."
            )
        if stream.ndim != 3 or stream.shape[-1] != self.cfg.d_model:
            raise InputError(
                f"start_at_layer wants a stream [batch, pos, {self.cfg.d_model}], got "
                f"{tuple(stream.shape)}"
            )

    def _pads_left(self: HookedTransformer, padding_side: str | None) -> bool:
        return self.tokenizer is not None and (padding_side or self.default_padding_side) == "left"

    def _unless_full(self: HookedTransformer, mask: Tensor | None) -> Tensor | None:
        if mask is None or bool((mask != 0).all()):
            return None
        return (mask != 0).long().to(self.device)

    # Entering -------------------------------------------------------------------------------------

    def _enter(
        self: HookedTransformer,
        tokens: Tokens | None,
        stream: Stream | None,
        mask: Tensor | None,
        past: int,
        cache: Any,
        shortformer_pos_embed: Stream | None,
        inputs_embeds: Stream | None = None,
        others: Mapping[str, Any] | None = None,
    ) -> tuple[Stream, Any]:
        """The stream entering the first block to run, and the contexts of all."""
        if inputs_embeds is not None or others:
            return self._enter_merged(
                tokens, stream, mask, past, cache, inputs_embeds, dict(others or {})
            )
        given = stream if stream is not None else tokens
        assert given is not None
        n_new = given.shape[1]
        mask = self.driver.full_mask(mask, n_new, past, cache)
        counted = mask is not None or cache is not None
        positions = self.driver.positions(mask, n_new, past, given.device) if counted else None
        pos_embed = shortformer_pos_embed
        if stream is None and self.embed is not None:
            stream, pos_embed = self._embedded(given, mask, past)
        try:
            prepared = self.driver.prepare(
                stream=stream,
                tokens=tokens,
                mask=mask,
                position_ids=positions,
                cache=cache,
                pos_embed=pos_embed,
            )
        except IndexError as error:  # a table of rotations that ends (GPT-J)
            if past + n_new <= self.cfg.n_ctx:
                raise
            raise InputError(
                f"{past + n_new} positions, but this model knows {self.cfg.n_ctx} (cfg.n_ctx)"
            ) from error
        if stream is None:  # only Hugging Face's own code knows how to embed
            stream = self.hook_embed(prepared.stream)
        return stream, prepared

    def _embedded(
        self: HookedTransformer, tokens: Tokens, mask: Tensor | None, past: int
    ) -> tuple[Stream, Stream | None]:
        if self.cfg.use_hook_tokens:
            tokens = self.hook_tokens(tokens)
        try:
            embedded = self.embed(tokens)
        except IndexError:
            self._check_ids(tokens)
            raise
        return self._positioned(self.hook_embed(embedded), mask, past)

    def _positioned(
        self: HookedTransformer,
        embedded: Stream,
        mask: Tensor | None,
        past: int,
        positions: Int[Tensor, "batch pos"] | None = None,
    ) -> tuple[Stream, Stream | None]:
        """(stream, position embedding if it stays apart from the stream)."""
        if "token_type_embed" in self._modules:  # a single sentence: all of type 0
            zeros = torch.zeros(embedded.shape[:2], dtype=torch.long, device=embedded.device)
            embedded = embedded + self.hook_token_type_embed(self.token_type_embed(zeros))
        if self.pos_embed is None:
            return self._summed(embedded), None
        n_new, n_known = embedded.shape[1], self.pos_embed.W_pos.shape[0]
        if past + n_new > n_known:
            raise InputError(
                f"{past + n_new} positions, but this model has position embeddings for "
                f"{n_known} (cfg.n_ctx)"
            )
        counted = mask if self.pos_embed.skips_padding else None
        if positions is None and counted is None and not self.hook_pos_embed.wanted:
            places = self.pos_embed.between(past, past + n_new).expand(embedded.shape)
        else:
            if positions is None:
                positions = self.driver.positions(counted, n_new, past, embedded.device)
            places = self.hook_pos_embed(self.pos_embed.at(positions).expand(embedded.shape))
        if self.cfg.positional_embedding_type == "shortformer":
            return embedded, places
        return self._summed(embedded + places), None

    def _summed(self: HookedTransformer, stream: Stream) -> Stream:
        """The sum of embeddings as block 0 reads it: some families norm it."""
        return self.embed_ln(stream) if "embed_ln" in self._modules else stream


def _of_batch(mask: Tensor | None, n_rows: int) -> Tensor | None:
    """A mask ``[batch, pos]``, or ``[pos]`` for a single row; raises InputError on others."""
    if mask is None:
        return None
    if mask.ndim == 1 and n_rows == 1:
        mask = mask[None]
    if mask.ndim != 2 or mask.shape[0] != n_rows:
        raise InputError(
            f"attention_mask of shape {tuple(mask.shape)}: expected [{n_rows}, pos], 1 at real "
            "tokens and 0 at padding"
        )
    return mask
