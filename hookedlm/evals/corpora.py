"""The loss on samples of well-known corpora, which the ``datasets`` library downloads."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from hookedlm.data import tokenize_and_concatenate
from hookedlm.errors import InputError, LoadError
from hookedlm.model import HookedTransformer


def load_dataset(*args: Any, **kwargs: Any) -> Any:
    """``datasets.load_dataset``; raises ImportError without that library, LoadError offline."""
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            "data sets of the hub need the datasets library: pip install datasets"
        ) from error
    try:
        return datasets.load_dataset(*args, **kwargs)
    except OSError as error:
        raise LoadError(f"{args[0]} is neither cached nor reachable: {error}") from error


def _loader(
    path: Sequence[str], column: str, tokenizer: Any, batch_size: int, n: int
) -> DataLoader:
    rows = tokenize_and_concatenate(
        load_dataset(*path, split="train"), tokenizer, max_length=n, column_name=column
    )
    shuffled = torch.Generator().manual_seed(0)
    return DataLoader(rows, batch_size, shuffle=True, drop_last=True, generator=shuffled)


def make_wiki_data_loader(
    tokenizer: Any, batch_size: int = 8, max_length: int = 1024
) -> DataLoader:
    """Batches {"tokens": [batch, max_length]} of WikiText-2's training split, in a fixed order."""
    path = ("Salesforce/wikitext", "wikitext-2-v1")
    return _loader(path, "text", tokenizer, batch_size, max_length)


def make_owt_data_loader(tokenizer: Any, batch_size: int = 8, max_length: int = 1024) -> DataLoader:
    """Batches of ten thousand documents of OpenWebText."""
    return _loader(("stas/openwebtext-10k",), "text", tokenizer, batch_size, max_length)


def make_pile_data_loader(
    tokenizer: Any, batch_size: int = 8, max_length: int = 1024
) -> DataLoader:
    """Batches of the first ten thousand documents of the Pile."""
    return _loader(("NeelNanda/pile-10k",), "text", tokenizer, batch_size, max_length)


def make_code_data_loader(
    tokenizer: Any, batch_size: int = 8, max_length: int = 1024
) -> DataLoader:
    """Batches of Python files that CodeParrot was validated on."""
    path = ("codeparrot/codeparrot-valid-v2-near-dedup",)
    return _loader(path, "content", tokenizer, batch_size, max_length)


DATA_LOADERS: dict[str, Callable[..., DataLoader]] = {
    "wiki": make_wiki_data_loader,
    "owt": make_owt_data_loader,
    "pile": make_pile_data_loader,
    "code": make_code_data_loader,
}


@torch.no_grad()
def evaluate_on_dataset(
    model: HookedTransformer,
    data_loader: Iterable[Mapping[str, Int[Tensor, "batch pos"]]],
    truncate: int | None = 100,
    device: str | torch.device | None = None,
) -> float:
    """The mean loss, in nats per token, on the first ``truncate`` batches {"tokens"} (None: all).

    All tokens are real. ``device`` is where they are put, the model's by default. Raises InputError
    when there is no batch.
    """
    losses = []
    for batch in tqdm(islice(data_loader, truncate), total=truncate, leave=False):
        tokens = batch["tokens"].to(model.device if device is None else device)
        mask = torch.ones_like(tokens)
        losses.append(float(model(tokens, return_type="loss", attention_mask=mask)))
    if not losses:
        raise InputError("no batch to evaluate on: the loader is empty, or truncate is 0")
    return sum(losses) / len(losses)


def evaluate(
    model: HookedTransformer, truncate: int = 100, batch_size: int = 8, tokenizer: Any = None
) -> dict[str, float]:
    """{"wiki_loss", "owt_loss", "pile_loss", "code_loss"} in nats per token.

    Rows have 1024 tokens, or ``cfg.n_ctx`` if that is less. Raises as `make_mmlu_data_loader`.
    """
    tokenizer = model.tokenizer if tokenizer is None else tokenizer
    n = min(1024, model.cfg.n_ctx)
    return {
        f"{name}_loss": evaluate_on_dataset(model, make(tokenizer, batch_size, n), truncate)
        for name, make in DATA_LOADERS.items()
    }
