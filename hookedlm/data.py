"""Texts as rows of tokens to train and measure on, and what is asked of a tokenizer alone.

The ``datasets`` library is imported where it is used: ``pip install "hookedlm[data]"``.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from tokenizers.processors import Sequence as InSequence
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from hookedlm.errors import InputError, LoadError, TokenizerError
from hookedlm.tensors import get_cumsum_along_dim
from hookedlm.tokens import affixes, encode

DATASETS = {
    **dict.fromkeys(("openwebtext", "owt"), "stas/openwebtext-10k"),
    "pile": "NeelNanda/pile-10k",
    "c4": "NeelNanda/c4-10k",
    **dict.fromkeys(("code", "python"), "NeelNanda/code-10k"),
    **dict.fromkeys(("c4_code", "c4-code"), "NeelNanda/c4-code-20k"),
    "wiki": "NeelNanda/wiki-10k",
}
"""Short name -> data set of the hub: ten or twenty thousand documents of a well-known corpus."""

TEXTS_AT_ONCE = 1000


# Data sets ----------------------------------------------------------------------------------------


def the_datasets_library() -> ModuleType:
    """The ``datasets`` module; raises ImportError with what to install."""
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            'this needs the datasets library: pip install "hookedlm[data]"'
        ) from error
    return datasets


def load_dataset(*args: Any, **kwargs: Any) -> Any:
    """``datasets.load_dataset``; raises ImportError without that library, LoadError offline."""
    try:
        return the_datasets_library().load_dataset(*args, **kwargs)
    except OSError as error:
        raise LoadError(f"{args[0]!r} is neither cached nor reachable: {error}") from error


def get_dataset(dataset_name: str, **kwargs: Any) -> Any:
    """A sample of a corpus (`DATASETS`), its training split unless ``split`` says otherwise.

    Other keywords go to ``datasets.load_dataset``. Raises InputError for an unknown name, and as
    `load_dataset` does.
    """
    if dataset_name not in DATASETS:
        raise InputError(
            f"no data set {dataset_name!r}: expected one of {', '.join(DATASETS)}. Others: "
            "datasets.load_dataset"
        )
    return load_dataset(DATASETS[dataset_name], **{"split": "train", **kwargs})


def keep_single_column(dataset: Any, col_name: str) -> Any:
    """The data set with this column only; raises InputError when it lacks it."""
    names = dataset.column_names
    if isinstance(names, dict):
        raise InputError(f"this holds the splits {', '.join(names)}: choose one, dataset['train']")
    if names is not None and col_name not in names:
        raise InputError(f"no column {col_name!r}: the data set has {', '.join(names)}")
    return dataset.select_columns([col_name])


def tokenize_and_concatenate(
    dataset: Any,
    tokenizer: PreTrainedTokenizerBase,
    streaming: bool = False,
    max_length: int = 1024,
    column_name: str = "text",
    add_bos_token: bool = True,
    num_proc: int = 10,
) -> Any:
    """Texts as a data set of ``{"tokens": [max_length]}``, ready for a torch ``DataLoader``.

    Every text is tokenized whole, eos is put between two of them, and the result is cut into rows,
    with BOS in front of each if ``add_bos_token``. Rows are full: what is left at the end is
    dropped (of a streamed data set, at the end of every thousand texts). The tokenizer is left
    alone, and no token is used that it does not have. ``num_proc`` processes tokenize, if there is
    enough for them to do; the rows do not depend on it.

    Raises InputError when there is less than one row, and for a missing column; TokenizerError
    when there is no eos, or no BOS where it is wanted.
    """
    datasets = the_datasets_library()
    rows = _rows_for(tokenizer, max_length, add_bos_token)
    texts = keep_single_column(dataset, column_name)
    options = {
        "batched": True,
        "batch_size": TEXTS_AT_ONCE,
        "input_columns": [column_name],
        "remove_columns": [column_name],
    }
    number = datasets.Value("int64")
    as_tokens = datasets.Features({"tokens": datasets.Sequence(number)})
    if isinstance(dataset, datasets.IterableDataset):
        parts = {"tokenizer": tokenizer, "rows": rows}
        stream = texts.map(rows_of_texts, features=as_tokens, fn_kwargs=parts, **options)
        stream = stream.with_format("torch")
        if next(iter(stream), None) is None:
            raise _too_short(max_length)
        return stream
    n_processes = 1 if streaming else min(num_proc or 1, -(-len(texts) // TEXTS_AT_ONCE))
    encoded = texts.map(
        ids_of_texts,
        features=datasets.Features({"ids": datasets.Sequence(number)}),
        fn_kwargs={"tokenizer": tokenizer},
        num_proc=n_processes if n_processes > 1 else None,
        **options,
    )
    options |= {"input_columns": ["ids"], "remove_columns": ["ids"]}
    result = encoded.map(rows, features=as_tokens, **options)
    if not len(result):
        raise _too_short(max_length)
    return result.with_format("torch")


@dataclass
class Rows:
    """Called with the ids of texts, over and over: the full rows they make with what was left."""

    length: int
    """Without the BOS."""
    eos: int
    bos: int | None
    left: list[int] | None = None

    def __call__(self, texts: Sequence[Sequence[int]]) -> dict[str, Int[np.ndarray, "row pos"]]:
        joined = [] if self.left is None else [*self.left, self.eos]
        for i, ids in enumerate(texts):
            joined += [self.eos, *ids] if i else ids
        n_rows = len(joined) // self.length
        self.left = joined[n_rows * self.length :]
        tokens = np.array(joined[: n_rows * self.length], dtype=np.int64)
        tokens = tokens.reshape(n_rows, self.length)
        if self.bos is not None:
            tokens = np.pad(tokens, ((0, 0), (1, 0)), constant_values=self.bos)
        return {"tokens": tokens}


def ids_of_texts(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """{"ids"}: the tokens of each text, without any that the tokenizer adds."""
    return {"ids": encode(tokenizer, texts, special=False)}


def rows_of_texts(
    texts: list[str], tokenizer: PreTrainedTokenizerBase, rows: Rows
) -> dict[str, Int[np.ndarray, "row pos"]]:
    """{"tokens"}: the rows that these texts make by themselves.

    Raises InputError if a thousand of them make none: a stream of such might never end.
    """
    made = Rows(rows.length, rows.eos, rows.bos)(encode(tokenizer, texts, special=False))
    if len(texts) == TEXTS_AT_ONCE and not len(made["tokens"]):
        raise _too_short(rows.length + (rows.bos is not None))
    return made


def _rows_for(tokenizer: Any, max_length: int, add_bos_token: bool) -> Rows:
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise TokenizerError(f"a transformers tokenizer is needed, got {type(tokenizer).__name__}")
    eos, bos = tokenizer.eos_token_id, tokenizer.bos_token_id if add_bos_token else None
    if eos is None:
        raise TokenizerError(
            "texts are separated by the end-of-sequence token and this tokenizer has none: set "
            "tokenizer.eos_token to the token you want between them"
        )
    if add_bos_token and bos is None:
        raise TokenizerError(
            "this tokenizer has no beginning-of-sequence token: pass add_bos_token=False, or set "
            "tokenizer.bos_token"
        )
    length = max_length - (bos is not None)
    if length < 1:
        raise InputError(f"max_length={max_length}: expected room for one token of text at least")
    return Rows(length, eos, bos)


def _too_short(max_length: int) -> InputError:
    return InputError(
        f"these texts have too few tokens for a single row of max_length={max_length}: give more "
        "text, or a smaller max_length"
    )


# What a tokenizer says ----------------------------------------------------------------------------


def get_tokenizer_with_bos(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """A tokenizer that puts BOS in front of every text by itself: a copy, unless it did already.

    Models here need none, they take care of BOS. Raises TokenizerError when there is no BOS token,
    or for one of the tokenizers written in Python, which have no such setting.
    """
    bos, bos_id = tokenizer.bos_token, tokenizer.bos_token_id
    if bos is None or bos_id is None:
        raise TokenizerError("this tokenizer has no BOS token: set tokenizer.bos_token first")
    if bos_id in affixes(tokenizer)[0]:
        return tokenizer
    if not tokenizer.is_fast:
        raise TokenizerError(
            f"{type(tokenizer).__name__} can't be told to add BOS: put tokenizer.bos_token in "
            "front of the texts (get_input_with_manually_prepended_bos)"
        )
    changed = copy.deepcopy(tokenizer)
    backend = changed.backend_tokenizer
    template = TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A $B:1", special_tokens=[(bos, bos_id)]
    )
    before = backend.post_processor
    backend.post_processor = template if before is None else InSequence([before, template])
    return changed


def get_input_with_manually_prepended_bos(
    tokenizer: PreTrainedTokenizerBase, input: str | list[str]
) -> str | list[str]:
    """The text, or each of them, with the BOS token written in front.

    Raises TokenizerError when there is none.
    """
    bos = tokenizer.bos_token
    if bos is None:
        raise TokenizerError("this tokenizer has no BOS token to put in front")
    return bos + input if isinstance(input, str) else [bos + text for text in input]


def get_attention_mask(
    tokenizer: PreTrainedTokenizerBase | None, tokens: Int[Tensor, "*batch pos"], prepend_bos: bool
) -> Int[Tensor, "*batch pos"]:
    """1 at real tokens, 0 at the pad tokens on ``tokenizer.padding_side``.

    ``prepend_bos`` says that a BOS stands first in each text, which counts as real also when it is
    the pad token. A text that ends in its own eos loses it when that is the pad token:
    ``model.to_tokens_and_mask`` knows better. Without tokenizer or pad token everything is real.
    """
    if tokenizer is None or tokenizer.pad_token_id is None:
        return torch.ones_like(tokens)
    on_the_left = tokenizer.padding_side == "left"
    is_text = tokens != tokenizer.pad_token_id
    mask = get_cumsum_along_dim(is_text.long(), -1, reverse=not on_the_left) > 0
    if prepend_bos and tokenizer.bos_token_id == tokenizer.pad_token_id:
        padding = (~mask).sum(-1, keepdim=True)
        at = padding - 1 if on_the_left else torch.zeros_like(padding)
        mask = mask.scatter(-1, at.clamp(min=0), True)
    return mask.to(tokens.dtype)


def get_tokens_with_bos_removed(
    tokenizer: PreTrainedTokenizerBase, tokens: Int[Tensor, "*batch pos"]
) -> Int[Tensor, "*batch pos_less_1"]:
    """Without the first BOS of each row, which with left padding stands behind the padding.

    Raises InputError for a row that has none there.
    """
    bos = tokenizer.bos_token_id
    if tokenizer.padding_side == "right":
        at = torch.zeros_like(tokens[..., :1])
    elif bos == tokenizer.pad_token_id:  # the last of them before the text
        before_text = (tokens == bos).long().cumprod(-1)
        at = (before_text.sum(-1, keepdim=True) - 1).clamp(min=0)
    else:
        at = (tokens == bos).long().argmax(-1, keepdim=True)
    if bos is None or not bool((tokens.gather(-1, at) == bos).all()):
        raise InputError(
            f"not every row of {tokens.tolist()} begins with BOS (id {bos}); padding is expected "
            f"on the {tokenizer.padding_side}, as tokenizer.padding_side says"
        )
    kept = torch.ones_like(tokens, dtype=torch.bool).scatter(-1, at, False)
    return tokens[kept].reshape(*tokens.shape[:-1], tokens.shape[-1] - 1)
