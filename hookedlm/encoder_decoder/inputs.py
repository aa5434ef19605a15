"""`InputMethods`: text and tokens made ready for both stacks, or refused."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Int
from torch import Tensor

from hookedlm.errors import InputError, TokenizerError

if TYPE_CHECKING:
    from hookedlm.encoder_decoder.model import HookedEncoderDecoder

Tokens = Int[Tensor, "batch pos"]
DecoderTokens = Int[Tensor, "batch decoder_pos"]
Input = str | Sequence[str] | Tokens | Int[Tensor, "pos"]


class InputMethods:
    """`to_tokens`."""

    def to_tokens(
        self: HookedEncoderDecoder,
        input: str | Sequence[str],
        move_to_device: bool = True,
        truncate: bool = True,
    ) -> tuple[Tokens, Tokens]:
        """(tokens, mask of real positions), both ``[batch, pos]``, for the encoder.

        Padded as the tokenizer pads, cut at ``cfg.n_ctx``. Raises TokenizerError without a
        tokenizer.
        """
        if self.tokenizer is None:
            raise TokenizerError("this model has no tokenizer: pass tokens, or tokenizer=...")
        found = self.tokenizer(
            [input] if isinstance(input, str) else list(input),
            return_tensors="pt",
            padding=True,
            truncation=truncate,
            max_length=self.cfg.n_ctx if truncate else None,
        )
        tokens, mask = found["input_ids"], found["attention_mask"]
        return (tokens.to(self.device), mask.to(self.device)) if move_to_device else (tokens, mask)

    def _read(
        self: HookedEncoderDecoder, input: Input, mask: Tokens | None
    ) -> tuple[Tokens, Tokens | None]:
        """Checked tokens and mask of the encoder."""
        if not isinstance(input, Tensor):
            input, own_mask = self.to_tokens(input)
            mask = own_mask if mask is None else mask
        tokens = self._checked(input if input.ndim == 2 else input[None], "input")
        return tokens, self._fitting(mask, tokens, "one_zero_attention_mask")

    def _start(self: HookedEncoderDecoder, n_rows: int) -> DecoderTokens:
        """What decoding begins with: the decoder's start token, in every row."""
        start = self.cfg.decoder_start_token_id
        if start is None and self.pos_embed is None and self.tokenizer is not None:
            start = self.tokenizer.pad_token_id  # as every T5 does; an mBART starts by language
        if start is None:
            raise InputError(
                "this model names no token that decoding starts with: set "
                "cfg.decoder_start_token_id, or pass decoder_input"
            )
        return torch.full((n_rows, 1), start, device=self.device)

    def _checked(self: HookedEncoderDecoder, tokens: Any, what: str) -> Tokens:
        if not isinstance(tokens, Tensor) or tokens.is_floating_point() or tokens.ndim != 2:
            given = type(tokens).__name__ if not isinstance(tokens, Tensor) else tokens.dtype
            raise InputError(f"{what}: expected token ids [batch, pos] in a tensor, got {given}")
        if not tokens.numel():
            raise InputError(f"{what} of shape {tuple(tokens.shape)}: there is nothing in it")
        if self.pos_embed is not None and tokens.shape[1] > self.cfg.n_ctx:
            raise InputError(
                f"{what} has {tokens.shape[1]} positions: this model has {self.cfg.n_ctx}"
            )
        if tokens.device.type == "cpu":  # looking would make the CPU wait for a device
            low, high = tokens.aminmax()
            if low < 0 or high >= self.cfg.d_vocab:
                raise InputError(
                    f"token ids of {what} must be from 0 to {self.cfg.d_vocab - 1}, got {int(low)} "
                    f"to {int(high)}"
                )
        return tokens.to(self.device, torch.long)

    def _fitting(
        self: HookedEncoderDecoder, mask: Tokens | None, tokens: Tokens, what: str
    ) -> Tokens | None:
        if mask is not None and mask.shape != tokens.shape:
            raise InputError(
                f"{what} of shape {tuple(mask.shape)}: expected {tuple(tokens.shape)}, 1 at real "
                "tokens and 0 at padding"
            )
        return None if mask is None else mask.to(tokens.device)
