"""Text to tokens and back: `TokenMethods`, and the one rule for the beginning-of-sequence token.

The tokenizer is read, never changed: whether BOS stands in front, how rows are padded and where
they are cut is decided here, on plain lists of ids.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, Literal, cast

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from hookedlm.errors import InputError, NotOneTokenError, TokenizerError

Side = Literal["left", "right"]
IntLike = (int, np.integer)
SPACES = ("Ġ", "▁")  # how vocabularies spell a leading space: byte-level, SentencePiece
TokensLike = int | Sequence[int] | Sequence[Sequence[int]] | np.ndarray | Int[Tensor, "..."]
"""Token ids of any rank, in whatever container."""


class TokenAbsentError(TokenizerError, AssertionError):
    """A token looked for in a prompt in which it does not occur."""


def encode(tokenizer: PreTrainedTokenizerBase, texts: list[str], special: bool) -> list[list[int]]:
    """The ids of each text, with (``special``) or without what the tokenizer adds by itself."""
    # verbose=False: no advice about model_max_length; the length is our business.
    return tokenizer(texts, add_special_tokens=special, padding=False, verbose=False)["input_ids"]


def affixes(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str] = ()
) -> tuple[list[int], list[int]]:
    """The ids the tokenizer puts before and after every text, found by watching it do so.

    It is watched at the shortest of ``texts`` that is any token at all; a text of our own might be
    one that it can't read. With nothing to tell before from after, only a leading BOS is "before".
    """
    for text in sorted(texts, key=len):
        [plain], [full] = encode(tokenizer, [text], False), encode(tokenizer, [text], True)
        for start in range(len(full) - len(plain) + 1):
            if plain and full[start : start + len(plain)] == plain:
                return full[:start], full[start + len(plain) :]
    [full] = encode(tokenizer, [""], True)
    n_prefix = int(tokenizer.bos_token_id is not None and full[:1] == [tokenizer.bos_token_id])
    return full[:n_prefix], full[n_prefix:]


def with_bos(
    tokenizer: PreTrainedTokenizerBase,
    ids: list[int],
    prepend: bool | None,
    prefix: Sequence[int] = (),
    suffix: Sequence[int] = (),
) -> list[int]:
    """``ids`` of a text as the model reads them: the one rule for BOS.

    ``prepend`` True gives exactly one BOS in front (none is added to a text that already begins
    with it), False none that the text does not contain, None what the tokenizer does by itself.
    ``prefix`` and ``suffix`` are what the tokenizer adds (`affixes`); all of it but BOS is kept.

    Raises TokenizerError when ``prepend`` is True and the tokenizer has no BOS token.
    """
    bos = tokenizer.bos_token_id
    if bos is None and prepend:
        raise TokenizerError(
            "prepend_bos=True, but this tokenizer has no beginning-of-sequence token. Leave "
            "prepend_bos out, or set `model.tokenizer.bos_token` to the token you want in front."
        )
    wanted = prepend if prepend is not None else bos in prefix
    if bos is None or not wanted:
        return [*(i for i in prefix if i != bos), *ids, *suffix]
    front = list(prefix) if bos in prefix else [bos, *prefix]
    return [*front, *(ids[1:] if ids[:1] == [bos] else ids), *suffix]


class TokenMethods:
    """The part of a model that speaks text. Expects ``cfg``, ``device`` and ``W_U`` beside it."""

    tokenizer: PreTrainedTokenizerBase | None = None
    default_padding_side: Side = "right"
    _side_when_set: str | None = None  # the tokenizer's own side when it came, to notice a change

    cfg: Any
    device: torch.device
    W_U: Float[Tensor, "d_model d_vocab"]

    def set_tokenizer(
        self,
        tokenizer: PreTrainedTokenizerBase | None,
        default_padding_side: Side | None = None,
    ) -> None:
        """Use this tokenizer from now on; it is not changed.

        Fills ``cfg.tokenizer_prepends_bos``, and ``cfg.d_vocab`` where that is -1. Rows are padded
        on ``default_padding_side`` ("right" unless ever set), or on ``tokenizer.padding_side`` once
        you assign another side to that after this call.

        Raises TokenizerError when it is not a transformers tokenizer.
        """
        if default_padding_side is not None:
            self.default_padding_side = checked_side(default_padding_side)
        self.tokenizer = tokenizer
        if tokenizer is None:
            return
        if not isinstance(tokenizer, PreTrainedTokenizerBase):
            raise TokenizerError(
                f"{type(tokenizer).__name__} is no transformers tokenizer: load one with "
                "AutoTokenizer.from_pretrained(name), or wrap a tokenizers.Tokenizer in "
                "PreTrainedTokenizerFast(tokenizer_object=...)"
            )
        self._side_when_set = tokenizer.padding_side
        prefix, _ = affixes(tokenizer)
        self.cfg.tokenizer_prepends_bos = tokenizer.bos_token_id in prefix
        if self.cfg.d_vocab == -1:
            self.cfg.d_vocab = max(tokenizer.get_vocab().values()) + 1

    @property
    def pad_token_id(self) -> int:
        """The id that fills up short rows: the tokenizer's pad, else eos, else bos, else 0."""
        tokenizer = self._the_tokenizer("padding")
        choices = (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id)
        # A pad token added to the tokenizer alone has no row in the embedding.
        n_vocab = self.cfg.d_vocab
        return next((i for i in choices if i is not None and (n_vocab < 0 or i < n_vocab)), 0)

    def to_tokens(
        self,
        input: str | Sequence[str],
        prepend_bos: bool | None = None,
        padding_side: Side | None = None,
        move_to_device: bool = True,
        truncate: bool = True,
    ) -> Int[Tensor, "batch pos"]:
        """The tokens of one or several texts, short rows padded.

        ``prepend_bos`` None follows ``cfg.default_prepend_bos`` (see `with_bos`). ``truncate`` cuts
        the end of texts longer than ``cfg.n_ctx``, with a warning that says how much.

        Raises TokenizerError without a tokenizer, or for prepend_bos=True when it has no BOS.
        """
        tokens, _ = self._encode_rows(input, prepend_bos, padding_side, truncate)
        return tokens.to(self.device) if move_to_device else tokens

    def to_tokens_and_mask(
        self,
        input: str | Sequence[str],
        prepend_bos: bool | None = None,
        padding_side: Side | None = None,
        truncate: bool = True,
    ) -> tuple[Int[Tensor, "batch pos"], Int[Tensor, "batch pos"]]:
        """`to_tokens` and the attention mask: 1 on each text's own tokens, 0 on padding.

        The mask comes from the lengths, so it is exact also where padding is a token of the text.
        """
        tokens, mask = self._encode_rows(input, prepend_bos, padding_side, truncate)
        return tokens.to(self.device), mask.to(self.device)

    def padding_mask(
        self, tokens: Int[Tensor, "*batch pos"], padding_side: Side | None = None
    ) -> Int[Tensor, "*batch pos"]:
        """The attention mask of tokens of which only the ids are known: 1 real, 0 padding.

        Pad ids at the padding side of a row are padding as far as they outnumber those of the row
        that has fewest, because the longest row of a batch has none. So a BOS or EOS that is also
        the pad token stays real, and a single row has no padding. Know better? Pass the mask
        yourself, or take it from `to_tokens_and_mask`.
        """
        if self.tokenizer is None or tokens.ndim < 2 or tokens.shape[0] < 2:
            return torch.ones_like(tokens, dtype=torch.long)
        left = self._side(padding_side) == "left"
        is_pad = (tokens == self.pad_token_id).long()
        run = (is_pad if left else is_pad.flip(-1)).cumprod(-1).sum(-1)
        n_padded = (run - run.min()).unsqueeze(-1)
        if self.pad_token_id == self.tokenizer.bos_token_id:
            n_padded = n_padded.clamp(max=tokens.shape[-1] - 1)  # an empty text has its BOS still
        pos = torch.arange(tokens.shape[-1], device=tokens.device)
        return (pos >= n_padded if left else pos < tokens.shape[-1] - n_padded).long()

    def to_string(self, tokens: TokensLike) -> str | list[str]:
        """The text of tokens: a str for one row (or one token), a list for [batch, pos]."""
        tokenizer = self._the_tokenizer("to_string")
        ids = as_ids(tokens)
        if ids.ndim > 2:
            raise InputError(f"to_string takes [pos] or [batch, pos], got {tuple(ids.shape)}")
        rows = ids.reshape(1, -1) if ids.ndim < 2 else ids
        texts = [tokenizer.decode(row, clean_up_tokenization_spaces=False) for row in rows.tolist()]
        return texts[0] if ids.ndim < 2 else texts

    def to_str_tokens(
        self,
        input: str | TokensLike | Sequence[str] | Sequence[Tensor],
        prepend_bos: bool | None = None,
        padding_side: Side | None = None,
    ) -> list[str] | list[list[str]]:
        """The text of each token: a list for one row, a list of lists for several.

        Text is tokenized first and follows ``prepend_bos``; several texts are not padded. Tokens
        are taken as they are. Every token is decoded alone, so half a character shows as "\ufffd"
        and some tokenizers drop a leading space.
        """
        if isinstance(input, str):
            ids = self.to_tokens(input, prepend_bos, padding_side, move_to_device=False)
        elif isinstance(input, Sequence) and not all(isinstance(i, IntLike) for i in input):
            rows = [self.to_str_tokens(item, prepend_bos, padding_side) for item in input]
            return cast("list[list[str]]", rows)
        else:
            ids = as_ids(input)
        if ids.ndim > 2:
            raise InputError(f"to_str_tokens takes [pos] or [batch, pos], got {tuple(ids.shape)}")
        if ids.ndim == 2 and ids.shape[0] > 1:
            return [self._pieces(row) for row in ids.tolist()]
        return self._pieces(ids.flatten().tolist())

    def to_single_token(self, string: str) -> int:
        """The id of a string that is one token; raises NotOneTokenError when it is not."""
        tokenizer = self._the_tokenizer("to_single_token")
        [ids] = encode(tokenizer, [string], special=False)
        if len(ids) == 1:
            return ids[0]
        message = f"{string!r} is {len(ids)} tokens, not one: {self._pieces(ids)}."
        # Looked up, not encoded: some vocabularies raise on a text they can't read.
        spaced = string.startswith(" ")
        entries = [string[1:]] if spaced else [f"{space}{string}" for space in SPACES]
        found = set(tokenizer.convert_tokens_to_ids(entries)) - {None, tokenizer.unk_token_id}
        if found and string:
            message += f" {string[1:] if spaced else f' {string}'!r} is one."
        elif string and " " not in string:
            message += " Try a leading space, with which most words begin in a text."
        raise NotOneTokenError(message)

    def to_single_str_token(self, int_token: int) -> str:
        """The text of one token id."""
        return self._pieces([int(int_token)])[0]

    def get_token_position(
        self,
        single_token: str | int | Tensor,
        input: str | TokensLike,
        mode: Literal["first", "last"] = "first",
        prepend_bos: bool | None = None,
        padding_side: Side | None = None,
    ) -> int:
        """Where a token stands in a prompt (text, [pos] or [1, pos]), BOS counted.

        Raises TokenAbsentError when it does not occur, NotOneTokenError when the string is not one
        token, InputError for several rows or another ``mode``.
        """
        if mode not in ("first", "last"):
            raise InputError(f"mode is 'first' or 'last', not {mode!r}")
        if isinstance(input, str):
            ids = self.to_tokens(input, prepend_bos, padding_side, move_to_device=False)
        else:
            ids = as_ids(input)
        if ids.ndim > 1 and ids.shape[0] != 1:
            raise InputError(f"one prompt at a time: got tokens of shape {tuple(ids.shape)}")
        if isinstance(single_token, str):
            token = self.to_single_token(single_token)
        else:
            token = int(single_token)
        found = (ids.flatten() == token).nonzero().flatten().tolist()
        if not found:
            shown = self.to_str_tokens(ids) if self.tokenizer is not None else ids.tolist()
            raise TokenAbsentError(f"token {single_token!r} (id {token}) is not in {shown}")
        return found[0 if mode == "first" else -1]

    def tokens_to_residual_directions(
        self, tokens: str | Sequence[str] | TokensLike
    ) -> Float[Tensor, "*tokens d_model"]:
        """The directions of the residual stream that raise these tokens' logits: columns of W_U.

        Shape [*tokens.shape, d_model]; a single token, in whatever shape, gives [d_model]. A string
        must be one token. The final norm's weight is not applied: fold it first if there is one.

        Raises NotOneTokenError, or InputError for an id outside the vocabulary.
        """
        if isinstance(tokens, str):
            ids = as_ids(self.to_single_token(tokens))
        elif isinstance(tokens, Sequence) and any(isinstance(token, str) for token in tokens):
            ids = as_ids([self.to_single_token(str(token)) for token in tokens])
        else:
            ids = as_ids(tokens)
        ids = ids.to(self.W_U.device)
        n_vocab = self.W_U.shape[-1]
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < n_vocab:
            raise InputError(f"token ids must be from 0 to {n_vocab - 1}, got {ids.tolist()}")
        directions = self.W_U.T[ids]
        return directions.reshape(-1) if ids.numel() == 1 else directions

    def _pieces(self, ids: list[int]) -> list[str]:
        """Each id decoded alone."""
        tokenizer = self._the_tokenizer("decoding")
        return [tokenizer.decode([i], clean_up_tokenization_spaces=False) for i in ids]

    def _encode_rows(
        self,
        input: str | Sequence[str],
        prepend_bos: bool | None,
        padding_side: Side | None,
        truncate: bool,
    ) -> tuple[Int[Tensor, "batch pos"], Int[Tensor, "batch pos"]]:
        """Tokens and mask on the CPU."""
        rows = self._encode_ragged(input, prepend_bos, truncate)
        return padded(rows, self.pad_token_id, self._side(padding_side))

    def _encode_ragged(
        self, input: str | Sequence[str], prepend_bos: bool | None, truncate: bool
    ) -> list[list[int]]:
        """The ids of each text."""
        tokenizer = self._the_tokenizer("text input")
        texts = [input] if isinstance(input, str) else list(input)
        if not texts or not all(isinstance(text, str) for text in texts):
            raise InputError(f"a text or a list of texts is needed, got {input!r}")
        prepend = prepend_bos
        if prepend is None and tokenizer.bos_token_id is not None:
            prepend = self.cfg.default_prepend_bos
        prefix, suffix = affixes(tokenizer, texts)

        bodies = encode(tokenizer, texts, special=False)
        rows = [with_bos(tokenizer, body, prepend, prefix, suffix) for body in bodies]
        n_ctx = self.cfg.n_ctx
        if truncate and n_ctx is not None and max(map(len, rows)) > n_ctx:
            excess = [max(0, len(row) - n_ctx) for row in rows]
            warnings.warn(
                f"{sum(excess)} tokens cut off the end of {sum(map(bool, excess))} of {len(rows)} "
                f"texts: the model reads {n_ctx} (truncate=False keeps them)",
                stacklevel=4,
            )
            # What the tokenizer adds at the end stays: the text is what gets shorter.
            kept = [
                body[: max(0, len(body) - cut)] for body, cut in zip(bodies, excess, strict=True)
            ]
            rows = [with_bos(tokenizer, body, prepend, prefix, suffix)[:n_ctx] for body in kept]
        self._check_known(rows)
        return rows

    def _check_known(self, rows: list[list[int]]) -> None:
        """Raise TokenizerError for an id that the model has no embedding for."""
        largest = max((max(row, default=0) for row in rows), default=0)
        if 0 <= self.cfg.d_vocab <= largest:
            raise TokenizerError(
                f"the tokenizer gives id {largest} ({self.to_single_str_token(largest)!r}), but "
                f"the model's vocabulary has {self.cfg.d_vocab} entries: this tokenizer belongs to "
                "another model, or has tokens added that this model never learned"
            )

    def _side(self, padding_side: Side | None) -> Side:
        """The side to pad on: the argument, else one assigned to the tokenizer since, else ours."""
        if padding_side is not None:
            return checked_side(padding_side)
        if self.tokenizer is None or self._side_when_set in (None, self.tokenizer.padding_side):
            return self.default_padding_side
        return checked_side(self.tokenizer.padding_side)

    def _the_tokenizer(self, purpose: str) -> PreTrainedTokenizerBase:
        if self.tokenizer is None:
            raise TokenizerError(
                f"{purpose} needs a tokenizer and this model has none: pass `tokenizer=` when you "
                "make it, call `model.set_tokenizer(...)`, or work with token tensors"
            )
        return self.tokenizer


def padded(
    rows: list[list[int]], pad: int, side: Side
) -> tuple[Int[Tensor, "batch pos"], Int[Tensor, "batch pos"]]:
    """Rows of ids as one tensor, filled up on ``side``, and the mask of what was there before."""
    width = max(map(len, rows))
    tokens = torch.full((len(rows), width), pad, dtype=torch.long)
    mask = torch.zeros_like(tokens)
    for i, row in enumerate(rows):
        start = width - len(row) if side == "left" else 0
        tokens[i, start : start + len(row)] = torch.tensor(row, dtype=torch.long)
        mask[i, start : start + len(row)] = 1
    return tokens, mask


def as_ids(tokens: Any) -> Int[Tensor, "..."]:
    """Token ids as a long tensor of the same rank; raises InputError for anything but integers."""
    ids = torch.as_tensor(tokens)
    if ids.numel() and (ids.is_floating_point() or ids.dtype == torch.bool):
        raise InputError(f"token ids are integers, got {ids.dtype}")
    return ids.long()


def checked_side(side: str) -> Side:
    """``side`` if it is one; raises InputError for anything but "left" and "right"."""
    if side not in ("left", "right"):
        raise InputError(f"padding_side is 'left' or 'right', not {side!r}")
    return "left" if side == "left" else "right"
