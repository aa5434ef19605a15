"""What `model.stream` is made of: documents of a data set, windows of them, and passes.

A window is some documents that follow one another. It is sorted by length and cut into passes, so
that little is padded; a window is finished before the next document is asked for.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
import torch
from jaxtyping import Int, Shaped
from torch import Tensor

from hookedlm.errors import InputError
from hookedlm.hooks import HookPoint, compact
from hookedlm.slices import Slice
from hookedlm.tokens import as_ids

COLUMNS = ("tokens", "input_ids", "text")
"""Where the documents of a data set with columns are; the first of these that it has."""

BATCHES_SORTED = 16
"""Documents that are sorted by length together, in batches: more pad less and hold more tokens."""

PACKED_LENGTH = 1024
"""Longest row into which documents are packed; a longer document has a row for itself."""

Ids = Int[np.ndarray, "pos"]


@dataclass(frozen=True)
class ActivationBatch:
    """Activations at some positions of some documents, one row each; padding has no rows.

    ``batch[name]`` is ``[row, ...]``: the axes of the hook point behind batch and pos.
    ``documents`` numbers the data set's items from 0, ``positions`` counts within a document, and
    ``tokens`` are the ids there.
    """

    activations: dict[str, Shaped[Tensor, "row ..."]]
    tokens: Int[Tensor, "row"]
    documents: Int[Tensor, "row"]
    positions: Int[Tensor, "row"]

    def __getitem__(self, name: str) -> Shaped[Tensor, "row ..."]:
        """The activations of a hook point, by its full name."""
        return self.activations[name]

    def __len__(self) -> int:
        return len(self.tokens)


# Documents ----------------------------------------------------------------------------------------


class Source:
    """The items of a data set, taken one by one: text, or ids. Counts and sums up what it gave."""

    def __init__(self, dataset: Any):
        self.items = items_of(dataset)
        self.given = 0
        self.crc = 0

    def __iter__(self) -> Iterator[tuple[int, str | Ids]]:
        for item in self.items:
            number, content = self.given, content_of(item, self.given)
            del item  # what a generator made is not kept while it makes the next
            if isinstance(content, str):
                kind, raw = "text", content.encode("utf-8", "surrogatepass")
            else:
                kind, raw = "ids", content.tobytes()
            self.crc = zlib.crc32(raw, zlib.crc32(f"{kind}{len(raw)}".encode(), self.crc))
            self.given += 1
            yield number, content

    def skip(self, n: int) -> None:
        """Take ``n`` items, or as many as there are."""
        for _ in islice(self, n):
            pass


def items_of(dataset: Any) -> Iterator[Any]:
    """The items of whatever holds documents; raises InputError for what does not."""
    if isinstance(dataset, (str, bytes)):
        raise InputError("the data set is one text: put it in a list to stream it as one document")
    if isinstance(dataset, Mapping):
        raise InputError(
            f"the data set is a mapping with {', '.join(map(str, list(dataset)[:5]))}: choose one "
            "split or column of it, as in dataset['train']"
        )
    if isinstance(dataset, Tensor) and dataset.ndim != 2:
        raise InputError(f"tokens of shape {tuple(dataset.shape)}: expected [document, pos]")
    if isinstance(dataset, Iterable):
        return iter(dataset)
    if isinstance(dataset, Sized) and isinstance(dataset, torch.utils.data.Dataset):
        return (dataset[i] for i in range(len(dataset)))
    raise InputError(
        f"the data set is {type(dataset).__name__}: expected an iterable of texts or of token ids, "
        f"or a data set whose items have one of {', '.join(COLUMNS)}"
    )


def content_of(item: Any, number: int) -> str | Ids:
    """The text or the token ids of an item (without padding, where it tells of an attention mask).

    Raises InputError, with its number, for an item that is neither.
    """
    real = None
    if isinstance(item, Mapping):
        column = next((name for name in COLUMNS if item.get(name) is not None), None)
        if column is None:
            raise InputError(
                f"document {number} has {', '.join(map(str, item)) or 'no columns'}: expected one "
                f"of {', '.join(COLUMNS)}"
            )
        real = item.get("attention_mask") if column != "text" else None
        item = item[column]
    if isinstance(item, str):
        return item
    try:
        ids = as_ids(item)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(
            f"document {number} is {type(item).__name__}: expected text or token ids ({error})"
        ) from error
    if ids.ndim != 1:
        raise InputError(
            f"document {number} has shape {tuple(ids.shape)}: expected the token ids of one "
            "document, [pos]"
        )
    if real is not None:
        ids = ids[torch.as_tensor(real).to(ids.device, torch.bool)]
    return ids.cpu().numpy().copy()  # whoever gives items may fill the same tensor again


@dataclass(frozen=True)
class Document:
    """The ids the model reads of an item, and which positions are wanted."""

    number: int
    ids: Ids
    kept: Ids


@dataclass
class Reader:
    """From items to documents: tokenizes, cuts to ``max_length`` and picks positions."""

    encode: Callable[[list[str]], list[list[int]]]
    d_vocab: int
    max_length: int
    pos_slice: Slice
    told: Callable[[str], None]
    cut: int = field(default=0, init=False)

    def __call__(self, items: Sequence[tuple[int, str | Ids]]) -> list[Document]:
        """Raises InputError for ids outside the vocabulary, and what tokenizing raises."""
        texts = {number: item for number, item in items if isinstance(item, str)}
        encoded = dict(zip(texts, self.encode(list(texts.values())) if texts else [], strict=True))
        return [self._document(number, encoded.get(number, item)) for number, item in items]

    def _document(self, number: int, given: Any) -> Document:
        ids = np.asarray(given, dtype=np.int64)
        if len(ids) and not (ids.min() >= 0 and ids.max() < self.d_vocab):
            raise InputError(
                f"document {number} has token ids from {ids.min()} to {ids.max()}; this model "
                f"knows 0 to {self.d_vocab - 1}"
            )
        if len(ids) > self.max_length:
            if not self.cut:
                self.told(
                    f"document {number} has {len(ids)} tokens and is cut to {self.max_length}, as "
                    "are all longer ones (max_length)"
                )
            self.cut += 1
            ids = ids[: self.max_length]
        return Document(number, ids, positions_in(self.pos_slice, len(ids)))


def positions_in(pos_slice: Slice, length: int) -> Ids:
    """The positions of a document that are selected, ascending; those it lacks are left out."""
    if pos_slice.mode != "array":
        return np.unique(np.arange(length)[pos_slice.slice])
    picked = pos_slice.indices()
    picked = picked.nonzero()[0] if picked.dtype == np.bool_ else picked.astype(np.int64)
    picked = np.where(picked < 0, picked + length, picked)
    return np.unique(picked[(picked >= 0) & (picked < length)])


def windows(
    source: Source, read: Reader, batch_size: int, max_rows: float
) -> Iterator[list[Document]]:
    """Documents in lots of `BATCHES_SORTED` batches, or what goes beyond ``max_rows`` positions.

    A document is taken from the source only when its window is due.
    """
    items = iter(source)
    window: list[Document] = []
    while batch := list(islice(items, batch_size)):
        window += read(batch)
        del batch
        full = len(window) >= BATCHES_SORTED * batch_size
        if full or sum(len(document.kept) for document in window) >= max_rows:
            yield window
            window = []
    if window:
        yield window


# Passes -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pass:
    """One forward pass, and where the rows that are wanted are in it."""

    tokens: Int[Tensor, "batch pos"]
    mask: Int[Tensor, "batch pos"] | None
    position_ids: Int[Tensor, "batch pos"] | None
    index: Int[Tensor, "row"] | None
    """Into batch and pos together; None: all of them."""
    documents: Int[Tensor, "row"]
    positions: Int[Tensor, "row"]
    n_tokens: int
    """Without padding."""


def passes(
    window: Iterable[Document], batch_size: int, pack_length: int | None, pad: int
) -> Iterator[Pass]:
    """The passes of a window, longest rows first: a batch that is too large fails at once."""
    wanted = sorted((d for d in window if len(d.kept)), key=lambda d: -len(d.ids))
    rows = [[d] for d in wanted] if pack_length is None else packed(wanted, pack_length)
    for start in range(0, len(rows), batch_size):
        yield laid_out(rows[start : start + batch_size], pad, pack_length is not None)


def packed(documents: Iterable[Document], length: int) -> list[list[Document]]:
    """Documents (longest first) in as few rows of ``length`` as first-fit decreasing finds."""
    rows: list[list[Document]] = []
    room: list[int] = []
    for document in documents:
        n = len(document.ids)
        place = next((i for i, left in enumerate(room) if left >= n), None)
        if place is None:
            place = len(rows)
            rows.append([])
            room.append(length)
        rows[place].append(document)
        room[place] -= n
    return sorted(rows, key=lambda row: -sum(len(d.ids) for d in row))


def laid_out(rows: Sequence[Sequence[Document]], pad: int, restarts: bool) -> Pass:
    """Rows of documents as tensors, padded on the right.

    With ``restarts`` every document (and the padding) begins at position 0 again, from which
    transformers knows that none may attend to another.
    """
    width = max(sum(len(d.ids) for d in row) for row in rows)
    tokens = np.full((len(rows), width), pad, dtype=np.int64)
    places, real = np.zeros_like(tokens), np.zeros_like(tokens)
    index = []
    for i, row in enumerate(rows):
        at = 0
        for d in row:
            n = len(d.ids)
            tokens[i, at : at + n], places[i, at : at + n] = d.ids, np.arange(n)
            index.append(i * width + at + d.kept)
            at += n
        places[i, at:], real[i, :at] = np.arange(width - at), 1
    documents = [d for row in rows for d in row]
    taken = np.concatenate(index)
    mask = None if restarts or real.all() else torch.from_numpy(real)
    return Pass(
        tokens=torch.from_numpy(tokens),
        mask=mask,
        position_ids=torch.from_numpy(places) if restarts else None,
        index=None if len(taken) == tokens.size else torch.from_numpy(taken),
        documents=torch.from_numpy(
            np.repeat([d.number for d in documents], [*map(kept, documents)])
        ),
        positions=torch.from_numpy(np.concatenate([d.kept for d in documents])),
        n_tokens=int(real.sum()),
    )


def kept(document: Document) -> int:
    """How many rows a document has in the output."""
    return len(document.kept)


@dataclass
class RowRecorder:
    """A hook that keeps the wanted rows of what passes: picked and cast on the spot, so that peak
    memory is what was asked for."""

    index: Int[Tensor, "row"] | None
    dtype: torch.dtype | None
    store: dict[str, Tensor] = field(default_factory=dict)

    def __call__(self, tensor: Tensor, hook: HookPoint) -> None:
        x = tensor.detach().flatten(0, 1)
        if self.index is not None:
            x = x.index_select(0, self.index.to(x.device))
        if self.dtype is not None and x.is_floating_point():
            x = x.to(self.dtype)
        self.store[hook.name or ""] = compact(x)
