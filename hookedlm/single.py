"""`SingleRunMethods`: just the activations asked for, of one input or of a whole data set."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypedDict, overload

import torch
from jaxtyping import Shaped
from torch import Tensor
from tqdm import tqdm
from typing_extensions import Unpack

from hookedlm.cache import ActivationCache
from hookedlm.convert.check import LENGTHS
from hookedlm.errors import InputError, UnknownInputError
from hookedlm.hooks import HookPoint, HookRequest
from hookedlm.root import NamesFilter, names_given
from hookedlm.shards import ActivationShards, ShardWriter, describe_stream
from hookedlm.slices import Slice, SliceInput
from hookedlm.streaming import (
    PACKED_LENGTH,
    ActivationBatch,
    Document,
    Pass,
    Reader,
    RowRecorder,
    Source,
    laid_out,
    passes,
    windows,
)

if TYPE_CHECKING:
    from hookedlm.model import HookedTransformer

SHARD_BYTES = 2**27
SAME = {torch.float64: 1e-6, torch.float32: 1e-4}
"""Largest relative difference between a document alone and packed; other dtypes: 3e-2."""


class StreamOptions(TypedDict, total=False):
    """What `SingleRunMethods.stream` takes besides, for the type checker."""

    pack: bool
    pos_slice: SliceInput
    dtype: torch.dtype | None
    max_length: int | None
    prepend_bos: bool | None
    shard_bytes: int
    progress: bool


class SingleRunMethods:
    """`cache` and `stream`."""

    def cache(
        self: HookedTransformer, input: Any, names: NamesFilter, **options: Any
    ) -> ActivationCache:
        """The activations ``names`` (name, glob, list or predicate) of one pass, and no more.

        Blocks behind the last one that anybody listens to do not run, nor does the unembedding,
        and no gradients are kept. ``options`` are those of `run_with_cache` and `forward`:
        ``pos_slice``, ``dtype``, ``device``, ``attention_mask``, ... Raises as these do.
        """
        with torch.no_grad():
            _, cache = self.run_with_cache(input, return_type=None, names_filter=names, **options)
        return cache

    @overload
    def stream(
        self,
        dataset: Any,
        names: NamesFilter,
        batch_size: int = ...,
        *,
        to: None = ...,
        **options: Unpack[StreamOptions],
    ) -> Iterator[ActivationBatch]: ...

    @overload
    def stream(
        self,
        dataset: Any,
        names: NamesFilter,
        batch_size: int = ...,
        *,
        to: str | os.PathLike[str],
        **options: Unpack[StreamOptions],
    ) -> ActivationShards: ...

    def stream(
        self: HookedTransformer,
        dataset: Any,
        names: NamesFilter,
        batch_size: int = 16,
        *,
        pack: bool = False,
        pos_slice: SliceInput = None,
        dtype: torch.dtype | None = None,
        max_length: int | None = None,
        prepend_bos: bool | None = None,
        to: str | os.PathLike[str] | None = None,
        shard_bytes: int = SHARD_BYTES,
        progress: bool = True,
    ) -> Iterator[ActivationBatch] | ActivationShards:
        """Activations of a whole data set, as `ActivationBatch`es; with ``to``, on disk.

        ``dataset``: an iterable (a generator will do, and is read as needed) of texts, or of token
        ids in lists or tensors; a tensor ``[document, pos]``; a data set whose items have "tokens",
        "input_ids" or "text". ``batch_size`` documents run at once, sorted by length over a window
        of some batches, padded on the right; padding is not in the output. A window's batches come
        longest first; each row tells of its document and position.

        ``pack=True`` puts several documents in a row, where transformers can keep them from seeing
        one another. ``pos_slice`` counts within each document, from its end if negative; positions
        it lacks are left out. ``max_length`` (at most, and by default, ``cfg.n_ctx``) cuts longer
        documents, with one warning.

        ``to=folder`` runs to the end, writes shards of about ``shard_bytes`` and returns their
        `ActivationShards`. The same call after an interruption goes on behind the last whole shard.

        Raises HookNameError; InputError for points without batch and pos, for an item that is no
        document, and for ``pack`` where documents would see one another; CacheFileError when
        ``folder`` holds a stream of something else.
        """
        plan = self._plan(
            names, batch_size, pack, pos_slice, dtype, max_length, prepend_bos, progress
        )
        source = Source(dataset)
        if to is None:
            return plan.batches(source)
        if shard_bytes < 1:
            raise InputError(f"shard_bytes={shard_bytes}: expected a positive number")
        shape = plan.sample()
        described = describe_stream(
            self, shape, pack=pack, pos_slice=plan.read.pos_slice, dtype=dtype,
            max_length=plan.read.max_length, prepend_bos=prepend_bos,
        )  # fmt: skip
        writer = ShardWriter(to, described)
        writer.catch_up(source)
        row_bytes = sum(x.element_size() * x[:1].numel() for x in shape.values())
        rows = math.ceil(shard_bytes / max(1, row_bytes))
        with plan.bar() as bar:
            for window in windows(source, plan.read, batch_size, rows):
                for batch in plan.run_all(window, bar):
                    writer.add(batch)
                if writer.rows >= rows:
                    writer.write(source)
            writer.finish(source)
        return ActivationShards(to)

    def _plan(
        self: HookedTransformer,
        names: NamesFilter,
        batch_size: int,
        pack: bool,
        pos_slice: SliceInput,
        dtype: torch.dtype | None,
        max_length: int | None,
        prepend_bos: bool | None,
        progress: bool,
    ) -> Plan:
        points = self.select(names)
        for point in points:
            axes = point.axes or ()
            if axes[:2] != ("batch", "pos") or "key_pos" in axes:
                raise InputError(
                    f"{point.name} is [{point.axes_text}]: a stream takes what belongs to one "
                    "position, [batch pos ...]. model.cache takes all, batch by batch."
                )
        if batch_size < 1:
            raise InputError(f"batch_size={batch_size}: expected at least 1")
        if dtype is not None and not dtype.is_floating_point:
            raise InputError(f"dtype={dtype}: expected a floating-point one")
        n_ctx = self.cfg.n_ctx
        if max_length is not None and not 1 <= max_length <= n_ctx:
            raise InputError(f"max_length={max_length}: expected 1 to {n_ctx} (cfg.n_ctx)")
        read = Reader(
            encode=lambda texts: self._encode_ragged(texts, prepend_bos, truncate=False),
            d_vocab=self.cfg.d_vocab,
            max_length=n_ctx if max_length is None else max_length,
            pos_slice=Slice.unwrap(pos_slice),
            told=lambda message: warnings.warn(message, stacklevel=2),
        )
        length = min(read.max_length, PACKED_LENGTH) if pack else None
        pad = 0 if self.tokenizer is None else self.pad_token_id
        plan = Plan(
            self, points, names_given(names), batch_size, length, pad, dtype, read, progress
        )
        if pack:
            plan.check_packing()
        return plan


@dataclass
class Plan:
    """A stream whose arguments were found good."""

    model: HookedTransformer
    points: list[HookPoint]
    named: set[str]
    batch_size: int
    pack_length: int | None
    pad: int
    dtype: torch.dtype | None
    read: Reader
    progress: bool

    def batches(self, source: Source) -> Iterator[ActivationBatch]:
        """All batches. Hooks are in the model only while a pass runs."""
        with self.bar() as bar:
            for window in windows(source, self.read, self.batch_size, math.inf):
                yield from self.run_all(window, bar)

    def run_all(self, window: Sequence[Document], bar: tqdm[Any]) -> Iterator[ActivationBatch]:
        """The batches of a window."""
        for made in passes(window, self.batch_size, self.pack_length, self.pad):
            yield self.run(made, bar)  # without a name: it must not outlive the next one's making

    def run(self, made: Pass, bar: tqdm[Any] | None = None) -> ActivationBatch:
        """The rows of one pass."""
        recorder = RowRecorder(made.index, self.dtype)
        requests = [HookRequest(point, recorder, observes=True) for point in self.points]
        places = made.position_ids
        others: dict[str, Any] = {}
        if places is not None:
            others["position_ids"] = places.to(self.model.device)
        with torch.no_grad(), self.model.listening(requests, self.named):
            self.model(
                made.tokens,
                return_type=None,
                attention_mask=made.mask,
                padding_side="right",  # where a mask is missing, all is real
                **others,
            )
        if bar is not None:
            bar.update(made.n_tokens)
        tokens = made.tokens.flatten()
        return ActivationBatch(
            activations={p.name or "": recorder.store[p.name or ""] for p in self.points},
            tokens=tokens if made.index is None else tokens[made.index],
            documents=made.documents,
            positions=made.positions,
        )

    def bar(self) -> tqdm[Any]:
        """Shows tokens per second."""
        return tqdm(unit="tok", unit_scale=True, desc="stream", disable=not self.progress)

    # Trying out -----------------------------------------------------------------------------------

    def sample(self, lengths: Sequence[int] = (1,), packs: bool = False) -> dict[str, Tensor]:
        """What made-up documents give, with nobody else listening: the shapes, to begin with."""
        ids = torch.arange(sum(lengths)).numpy() % self.model.cfg.d_vocab
        documents, at = [], 0
        for number, n in enumerate(lengths):
            documents.append(Document(number, ids[at : at + n], torch.arange(n).numpy()))
            at += n
        rows = [documents] if packs else [[document] for document in documents]
        with silent(self.model.hook_points()):
            found = [self.run(laid_out([row], self.pad, restarts=packs)) for row in rows]
        return {
            p.name or "": torch.cat([batch[p.name or ""] for batch in found]) for p in self.points
        }

    def check_packing(self) -> None:
        """Raise InputError unless packed documents give what each gives alone."""
        lengths = [min(n, self.read.max_length) for n in LENGTHS]
        try:
            whole = replace(self, dtype=None)
            together = whole.sample(lengths, packs=True)
        except UnknownInputError as error:
            raise InputError(f"pack=True: {error}. {HOW_ELSE}") from error
        for name, x in whole.sample(lengths).items():
            wrong = relative_difference(together[name], x)
            if not wrong <= SAME.get(x.dtype, 3e-2):
                raise InputError(
                    f"pack=True: in this model packed documents see one another ({name} differs "
                    f"by {wrong:.1e} of its largest value). {HOW_ELSE}"
                )


HOW_ELSE = "Leave pack out: documents then have rows of their own, sorted by length."


def relative_difference(x: Shaped[Tensor, "*any"], y: Shaped[Tensor, "*any"]) -> float:
    """The largest difference, in units of the largest value."""
    x, y = x.double(), y.double()
    return float((x - y).abs().max() / y.abs().max().clamp(min=1e-30))


@contextmanager
def silent(points: Sequence[HookPoint]) -> Iterator[None]:
    """Within the context nobody's hooks are in these points; afterwards they are again."""
    before = [(point, point.fwd_hooks, point.bwd_hooks, point.wanted) for point in points]
    try:
        for point in points:
            point.fwd_hooks, point.bwd_hooks, point.wanted = [], [], False
        yield
    finally:
        for point, forward, backward, wanted in before:
            point.fwd_hooks, point.bwd_hooks, point.wanted = forward, backward, wanted
