"""Streams of activations on disk: safetensors shards, an index that is never ahead of them, and a
reader that maps them into memory.

A shard is written under another name, flushed to the disk and renamed; then the index is, in the
same way. So after a kill at any moment the index lists whole shards only. A shard holds all rows of
the documents from one to another, in order: a stream that goes on behind it neither repeats nor
loses any.
"""

from __future__ import annotations

import json
import os
import zlib
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import version
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int, Shaped
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from hookedlm.cache.files import describe, fingerprint
from hookedlm.errors import CacheFileError, InputError
from hookedlm.slices import Slice
from hookedlm.streaming import ActivationBatch, Source

FORMAT = "hookedlm activation stream 1"
INDEX = "index.json"
PLACES = ("tokens", "documents", "positions")
UNFINISHED = ".part"

Rows = int | slice | Sequence[int] | Int[np.ndarray, "row"] | Int[Tensor, "row"]


def describe_stream(
    model: Any,
    sample: Mapping[str, Shaped[Tensor, "row ..."]],
    *,
    pos_slice: Slice,
    dtype: torch.dtype | None,
    **arguments: Any,
) -> dict[str, Any]:
    """What decides which numbers stand in a stream, as JSON: all of it must agree to go on with
    one. Batch and shard sizes do not decide that."""
    chosen = pos_slice.slice
    if isinstance(chosen, slice):
        chosen = [chosen.start, chosen.stop, chosen.step]
    described = {
        "model": describe(model),
        "weights": fingerprint(model),
        "tokenizer": fingerprint_of_tokenizer(model.tokenizer),
        "names": list(sample),
        "axes": {name: list(model.hook_dict[name].axes[2:]) for name in sample},
        "dtype": None if dtype is None else str(dtype).removeprefix("torch."),
        "pos_slice": None if pos_slice.mode == "identity" else np.asarray(chosen).tolist(),
        **arguments,
    }
    return json.loads(json.dumps(described, default=int))


def flat(described: Mapping[str, Any]) -> dict[str, Any]:
    """Without nesting: ``model.d_head`` and so on."""
    nested = {key: x if isinstance(x, dict) else {"": x} for key, x in described.items()}
    return {f"{key}.{k}".rstrip("."): x for key, part in nested.items() for k, x in part.items()}


def fingerprint_of_tokenizer(tokenizer: PreTrainedTokenizerBase | None) -> str | None:
    """A checksum of the vocabulary."""
    if tokenizer is None:
        return None
    return f"{zlib.crc32(repr(sorted(tokenizer.get_vocab().items())).encode()):08x}"


# Writing ------------------------------------------------------------------------------------------


class ShardWriter:
    """Collects batches and writes them; begins behind what the folder holds already.

    Raises CacheFileError when the folder holds a stream that differs in anything but its end.
    """

    def __init__(self, folder: str | os.PathLike[str], described: dict[str, Any]):
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.index: dict[str, Any] = {
            "format": FORMAT,
            "hookedlm": version("hookedlm"),
            "stream": described,
            "complete": False,
            "shards": [],
        }
        if (self.folder / INDEX).exists():
            self.index = read_index(self.folder)
            self._check(described)
        self.rows = 0
        self.batches: list[ActivationBatch] = []

    def _check(self, described: dict[str, Any]) -> None:
        before, now = flat(self.index["stream"]), flat(described)
        wrong = [
            f"{key} was {before.get(key)!r} and is {now.get(key)!r}"
            for key in {**before, **now}
            if before.get(key) != now.get(key)
        ]
        if wrong:
            raise CacheFileError(
                f"{self.folder} holds a stream of something else: {'; '.join(wrong)}. Go on with "
                "what it was, or write to another folder."
            )

    @property
    def done(self) -> int:
        """How many documents are in the shards there are."""
        return self.index["shards"][-1]["documents"][1] if self.index["shards"] else 0

    def catch_up(self, source: Source) -> None:
        """Skip what is written; raises CacheFileError when that is not what the source gives."""
        source.skip(self.done)
        if not self.index["shards"]:
            return
        if source.given < self.done or self.index["shards"][-1]["checksum"] != _hex(source):
            raise CacheFileError(
                f"{self.folder} begins with {self.done} documents, and those of this data set are "
                "others: go on with the same data set in the same order, or write to another folder"
            )

    def add(self, batch: ActivationBatch) -> None:
        """Keep a batch for the shard to come."""
        self.batches.append(batch)
        self.rows += len(batch)

    def write(self, source: Source) -> None:
        """Write what was kept, which are the rows of all documents that the source gave since."""
        shards = self.index["shards"]
        name = f"shard-{len(shards):06d}.safetensors"
        tensors = self._sorted()
        replaced(self.folder / name, lambda path: save_file(tensors, path))
        entry = {
            "file": name,
            "rows": self.rows,
            "documents": [self.done, source.given],
            "checksum": _hex(source),
        }
        self.rows = 0
        shards.append(entry)
        self.write_index()

    def finish(self, source: Source) -> None:
        """Write what is left, and that nothing is missing."""
        if self.rows:
            self.write(source)
        self.index["complete"] = True
        self.write_index()

    def write_index(self) -> None:
        """Put the index on disk in one step."""
        text = json.dumps(self.index, indent=1)
        replaced(self.folder / INDEX, lambda path: Path(path).write_text(text, "utf-8"))

    def _sorted(self) -> dict[str, Shaped[Tensor, "row ..."]]:
        """What was kept, by document and position; each batch is let go once it is copied."""
        batches, self.batches = self.batches, []
        places = {key: torch.cat([vars(batch)[key] for batch in batches]) for key in PLACES}
        order = np.lexsort((places["positions"].numpy(), places["documents"].numpy()))
        to = torch.from_numpy(np.argsort(order)).split([len(batch) for batch in batches])
        tensors = {key: x[torch.from_numpy(order)] for key, x in places.items()}
        for name in self.index["stream"]["names"]:
            like = batches[0][name]
            tensors[name] = torch.empty((self.rows, *like.shape[1:]), dtype=like.dtype)
            for at, batch in zip(to, batches, strict=True):
                tensors[name][at] = batch.activations.pop(name).cpu()
        return tensors


def _hex(source: Source) -> str:
    return f"{source.crc:08x}"


def replaced(path: Path, write: Callable[[str], Any]) -> None:
    """A new file in one step: ``write`` makes it under another name, and only what has reached the
    disk gets the right one. What fails leaves the old file."""
    unfinished = path.with_name(path.name + UNFINISHED)
    try:
        write(str(unfinished))
        with open(unfinished, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
    if os.name == "posix":  # elsewhere a folder can't be opened
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


# Reading ------------------------------------------------------------------------------------------


def read_index(folder: Path) -> dict[str, Any]:
    """The index of a stream; raises CacheFileError when there is none, or shards are missing."""
    path = folder / INDEX
    try:
        index = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise CacheFileError(f"{path} is no index of a stream: {error}") from error
    if not isinstance(index, dict) or index.get("format") != FORMAT:
        raise CacheFileError(f"{path} is no index of a stream (expected format {FORMAT!r})")
    missing = [s["file"] for s in index["shards"] if not (folder / s["file"]).is_file()]
    if missing:
        raise CacheFileError(
            f"{folder}: {', '.join(missing[:3])} missing ({len(missing)} of "
            f"{len(index['shards'])} shards). Write the stream anew, in another folder."
        )
    return index


class ActivationShards:
    """A stream on disk, mapped into memory: only what is looked at is read.

    ``stream[rows]`` (a number, slice, list, array or tensor) is an `ActivationBatch`, as is each of
    its shards when it is iterated over; rows stand in order of documents and positions. ``names``
    are the hook points, ``complete`` tells whether the stream came to its end, ``index`` is what
    the index file says. Raises CacheFileError for a folder without a stream.
    """

    def __init__(self, folder: str | os.PathLike[str]):
        self.folder = Path(folder)
        self.index = read_index(self.folder)
        self.names: list[str] = self.index["stream"]["names"]
        self.complete: bool = self.index["complete"]
        self.shards: list[dict[str, Any]] = self.index["shards"]
        self.ends = list(accumulate(shard["rows"] for shard in self.shards))
        """The row behind the last of each shard."""

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    @property
    def n_documents(self) -> int:
        """How many documents there are, those without rows included."""
        return self.shards[-1]["documents"][1] if self.shards else 0

    def __iter__(self) -> Iterator[ActivationBatch]:
        for i in range(len(self.shards)):
            yield self.shard(i)

    def shard(self, i: int) -> ActivationBatch:
        """All rows of a shard."""
        path = self.folder / self.shards[i]["file"]
        try:
            with safe_open(path, framework="pt") as file:
                places = {key: file.get_tensor(key) for key in PLACES}
                activations = {name: file.get_tensor(name) for name in self.names}
        except (SafetensorError, OSError) as error:
            raise CacheFileError(f"{path} is damaged: {error}") from error
        return ActivationBatch(activations=activations, **places)

    def __getitem__(self, rows: Rows) -> ActivationBatch:
        """These rows, in this order; raises IndexError for one that is not there."""
        if isinstance(rows, slice):
            picked = np.arange(*rows.indices(len(self)))
        else:
            picked = np.atleast_1d(np.asarray(rows)).astype(np.int64)
        picked = np.where(picked < 0, picked + len(self), picked)
        if len(picked) and not (picked.min() >= 0 and picked.max() < len(self)):
            raise IndexError(f"rows {rows!r} of a stream of {len(self)}")
        if not self.shards:
            raise IndexError(f"{self.folder} holds no rows")
        of = np.searchsorted(self.ends, picked, side="right")
        order, parts = [], []
        for i in np.unique(of) if len(of) else [0]:
            mine = (of == i).nonzero()[0]
            start = self.ends[i] - self.shards[i]["rows"]
            order.append(mine)
            parts.append(_taken(self.shard(int(i)), torch.from_numpy(picked[mine] - start)))
        back = torch.from_numpy(np.argsort(np.concatenate(order)))
        return parts[0] if len(parts) == 1 else _taken(_joined(parts), back)

    def document(self, number: int) -> ActivationBatch:
        """The rows of a document; raises InputError for one that the stream did not come to."""
        if not 0 <= number < self.n_documents:
            raise InputError(f"document {number}: this stream holds 0 to {self.n_documents - 1}")
        i = bisect_right([shard["documents"][1] for shard in self.shards], number)
        shard = self.shard(i)
        low, high = np.searchsorted(shard.documents.numpy(), [number, number + 1])
        return _taken(shard, slice(int(low), int(high)))

    def batches(self, batch_size: int) -> Iterator[ActivationBatch]:
        """All rows in order, so many at a time."""
        for start in range(0, len(self), batch_size):
            yield self[start : start + batch_size]

    def __repr__(self) -> str:
        state = "" if self.complete else ", not complete"
        return (
            f"ActivationShards({len(self)} rows of {self.n_documents} documents in "
            f"{len(self.shards)} shards{state}: {', '.join(self.names)})"
        )


def open_stream(folder: str | os.PathLike[str]) -> ActivationShards:
    """What `model.stream(..., to=folder)` wrote, complete or not; raises CacheFileError."""
    return ActivationShards(folder)


def _taken(batch: ActivationBatch, rows: Any) -> ActivationBatch:
    activations = {name: x[rows] for name, x in batch.activations.items()}
    return ActivationBatch(activations, *(vars(batch)[key][rows] for key in PLACES))


def _joined(parts: Sequence[ActivationBatch]) -> ActivationBatch:
    names = parts[0].activations
    activations = {name: torch.cat([part[name] for part in parts]) for name in names}
    return ActivationBatch(
        activations, *(torch.cat([vars(part)[key] for part in parts]) for key in PLACES)
    )
