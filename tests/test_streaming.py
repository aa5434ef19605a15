"""`model.cache` and `model.stream`: just what was asked for, of one input or of a data set."""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
import warnings
import weakref
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from conftest import hf, hooked, word_tokenizer
from tiny import TINIES
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler

import hookedlm
from hookedlm import shards, streaming
from hookedlm.errors import (
    CacheFileError,
    HookNameError,
    InputError,
    TokenizerError,
)

TEXTS = [
    "the cat sat on a mat",
    "Mary",
    "John went to the store and Mary ran home with the red dog",
    "a blue mat",
    "the dog ran",
    "the cat sat on the blue mat and Mary went home to a red dog with John",
    "cat and dog",
]
RESID = "blocks.1.hook_resid_post"
Z = "blocks.0.attn.hook_z"


def documents(lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 90, (n,), generator=generator) for n in lengths]


def quiet(model, *args, **kwargs):
    return model.stream(*args, progress=False, **kwargs)


def rows(batches, name):
    """(document, position) -> (token, activation), every row once."""
    found = {}
    for batch in batches:
        assert len(batch[name]) == len(batch) == len(batch.documents) == len(batch.positions)
        places = zip(batch.documents.tolist(), batch.positions.tolist(), strict=True)
        for place, token, x in zip(places, batch.tokens.tolist(), batch[name], strict=True):
            assert place not in found, f"{place} is there twice"
            found[place] = (token, x)
    return found


def alone(model, docs, name):
    """The same from each document's own run."""
    found = {}
    for number, doc in enumerate(docs):
        ids = model.to_tokens(doc) if isinstance(doc, str) else torch.as_tensor(doc)[None]
        if ids.shape[1]:
            x = model.cache(ids, name)[name][0]
            for at in range(len(x)):
                found[number, at] = (int(ids[0, at]), x[at])
    return found


def assert_same(got, expected, rtol=1e-5):
    assert sorted(got) == sorted(expected)
    largest = max(float(x.abs().max()) for _, x in expected.values())
    for place, (token, x) in expected.items():
        assert got[place][0] == token
        assert (got[place][1] - x).abs().max() <= rtol * largest, place


def fires(model):
    """How often each block, and the unembedding, is called."""
    counts = Counter()
    handles = [
        block.register_forward_pre_hook(lambda *_, i=i: counts.update([i]))
        for i, block in enumerate(model.blocks)
    ]
    handles.append(model.unembed.register_forward_pre_hook(lambda *_: counts.update(["unembed"])))
    return counts, handles


@pytest.fixture
def small():
    """A model of this test's own."""
    [tiny] = [tiny for tiny in TINIES if tiny.id == "gpt2-base"]
    return hookedlm.load(tiny.build(), tokenizer=word_tokenizer())


# One input ----------------------------------------------------------------------------------------


def test_cache_holds_what_was_asked_for_and_nothing_else(model):
    cache = model.cache(TEXTS[0], [Z, "blocks.0.hook_resid_*"])
    assert set(cache) == {Z, "blocks.0.hook_resid_pre", "blocks.0.hook_resid_mid",
                          "blocks.0.hook_resid_post"}  # fmt: skip
    _, whole = model.run_with_cache(TEXTS[0])
    for name in cache:
        torch.testing.assert_close(cache[name], whole[name])
        assert not cache[name].requires_grad
    with torch.no_grad():
        truth = hf("gpt2-base")(model.to_tokens(TEXTS[0]), output_hidden_states=True)
    torch.testing.assert_close(cache["resid_post", 0], truth.hidden_states[1])


@pytest.mark.parametrize(
    ("names", "ran"),
    [
        ("hook_embed", 0),
        ("blocks.0.attn.hook_pattern", 1),
        (RESID, 2),
        ("ln_final.hook_normalized", "all"),
    ],
)
def test_cache_stops_behind_the_last_block_anybody_listens_to(small, names, ran):
    counts, _ = fires(small)
    small.cache(TEXTS, names)
    n = len(small.blocks) if ran == "all" else ran
    assert counts == Counter(range(n))  # each once, and no unembedding
    list(quiet(small, TEXTS[:1], names)) if "pattern" not in names else None
    assert set(counts) == set(range(n))


def test_cache_takes_the_options_of_a_run(model):
    tokens, mask = model.to_tokens_and_mask(TEXTS[:2])
    cache = model.cache(tokens, RESID, attention_mask=mask, pos_slice=-1, dtype=torch.float16)
    assert cache[RESID].shape == (2, 1, model.cfg.d_model)
    assert cache[RESID].dtype == torch.float16
    with pytest.raises(HookNameError, match="resid_post"):
        model.cache(tokens, "blocks.1.hook_resid_pots")


# Streams equal single runs ------------------------------------------------------------------------

FAMILIES = [tiny for tiny in TINIES if tiny.variant == "base"]


@pytest.mark.parametrize("tiny", FAMILIES, ids=lambda tiny: tiny.id)
def test_ragged_documents_give_what_each_gives_alone(tiny):
    model = hooked(tiny.id)
    name = list(model.select("blocks.*"))[-1].name
    docs = documents([5, 1, 9, 9, 2, 7, 3])
    batches = list(quiet(model, docs, name, 3))
    assert [len(batch) for batch in batches] == [25, 10, 1]  # longest first, no padding
    assert_same(rows(batches, name), alone(model, docs, name))


def test_padding_is_hidden_from_a_model_that_looks_ahead():
    sizes = dict(n_layers=2, d_model=8, n_ctx=12, d_head=4, d_vocab=96, act_fn="relu", seed=0)
    model = hookedlm.HookedTransformer(
        hookedlm.HookedTransformerConfig(attention_dir="bidirectional", **sizes)
    )
    docs = documents([5, 1, 9, 2], seed=3)
    assert_same(rows(quiet(model, docs, RESID, 3), RESID), alone(model, docs, RESID))


def test_texts_are_tokenized_as_everywhere():
    bos = hookedlm.load(hf("mistral-base"), tokenizer=word_tokenizer(adds_bos=True))
    got = rows(quiet(bos, TEXTS, Z, 3), Z)
    assert got[1, 0][0] == bos.tokenizer.bos_token_id
    assert_same(got, alone(bos, TEXTS, Z))
    without = rows(quiet(bos, TEXTS, Z, 3, prepend_bos=False), Z)
    assert len(without) == len(got) - len(TEXTS)


def test_padding_tokens_of_the_data_set_are_tokens(model):
    """Ids equal to the pad id in front are no padding: what is real is known from the lengths."""
    small = hookedlm.load(hf("gpt2-base"), tokenizer=word_tokenizer(), default_padding_side="left")
    docs = [torch.tensor([0, 0, 5, 6]), torch.tensor([7, 8, 9, 10])]
    for m in (small, model):
        expected = {}
        for i, doc in enumerate(docs):
            x = m.cache(doc[None], RESID)[RESID][0]
            expected |= {(i, at): (int(doc[at]), x[at]) for at in range(4)}
        assert_same(rows(quiet(m, docs, RESID, 2), RESID), expected)


class MapStyle(Dataset):
    """Without __iter__ and without an end of its own."""

    def __init__(self, items):
        self.given = items

    def __len__(self):
        return len(self.given)

    def __getitem__(self, i):
        return self.given[i % len(self.given)]


def test_every_kind_of_data_set(model):
    ids = [model.to_tokens(text)[0].tolist() for text in TEXTS]
    width = max(map(len, ids))
    masked = [
        {"input_ids": row + [0] * (width - len(row)), "attention_mask": [1] * len(row)
         + [0] * (width - len(row))} for row in ids
    ]  # fmt: skip
    table = datasets.Dataset.from_dict({"text": TEXTS, "label": list(range(len(TEXTS)))})
    kinds = {
        "tokens": ids,
        "arrays": [np.array(row, dtype=np.int32) for row in ids],
        "tensors": [torch.tensor(row) for row in ids],
        "generator": (text for text in TEXTS),
        "mixed": [*TEXTS[:3], *ids[3:]],
        "rows": [{"text": text} for text in TEXTS],
        "masked": masked,
        "datasets, text": table,
        "datasets, streamed": table.to_iterable_dataset(),
        "datasets, tokens": datasets.Dataset.from_dict({"tokens": ids}).with_format("torch"),
        "datasets, both": datasets.Dataset.from_dict({"tokens": ids, "text": ["a"] * len(ids)}),
        "torch": MapStyle(TEXTS),
    }
    expected = rows(quiet(model, TEXTS, RESID, 3), RESID)
    for kind, dataset in kinds.items():
        got = rows(quiet(model, dataset, RESID, 3), RESID)
        assert sorted(got) == sorted(expected), kind
        for place, (token, x) in expected.items():
            assert got[place][0] == token
            assert torch.equal(got[place][1], x), kind
    square = torch.stack(documents([6, 6, 6]))
    assert_same(rows(quiet(model, square, RESID, 2), RESID), alone(model, square, RESID))


def test_documents_without_tokens_have_no_rows_but_a_number(model):
    docs = [torch.tensor([], dtype=torch.long), *documents([3]), [], *documents([2])]
    got = rows(quiet(model, docs, RESID, 2), RESID)
    assert sorted(got) == [(1, 0), (1, 1), (1, 2), (3, 0), (3, 1)]
    assert list(quiet(model, [], RESID)) == []
    assert list(quiet(model, [[]], RESID)) == []


def test_a_generator_may_fill_the_same_tensor_again(model):
    docs = documents([6, 6, 6])

    def reusing():
        buffer = torch.empty(6, dtype=torch.long)
        for doc in docs:
            yield buffer.copy_(doc)

    assert_same(rows(quiet(model, reusing(), RESID, 3), RESID), alone(model, docs, RESID))


def test_documents_are_sorted_within_a_window_only(model, monkeypatch):
    monkeypatch.setattr(streaming, "BATCHES_SORTED", 2)
    lengths = [1, 5, 2, 4, 9, 3, 8, 7, 6]
    batches = list(quiet(model, documents(lengths), RESID, 2))
    assert [batch.documents.unique().tolist() for batch in batches] == [
        [1, 3], [0, 2], [4, 6], [5, 7], [8]
    ]  # fmt: skip


@pytest.mark.parametrize(
    "pos_slice", [-1, 0, 2, (1, None), (-2, None), slice(None, None, 2), [4, 0, 0, -1], (0, 0)],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("pack", [False, True])
def test_positions_count_within_each_document(model, pos_slice, pack):
    docs = documents([5, 1, 3, 8])
    whole = alone(model, docs, RESID)
    expected = {}
    for i, doc in enumerate(docs):
        at = list(range(len(doc)))
        if isinstance(pos_slice, tuple):
            at = at[slice(*pos_slice)]
        elif isinstance(pos_slice, slice):
            at = at[pos_slice]
        else:
            picked = pos_slice if isinstance(pos_slice, list) else [pos_slice]
            at = {j + len(doc) * (j < 0) for j in picked} & set(at)
        expected |= {(i, j): whole[i, j] for j in at}
    got = rows(quiet(model, docs, RESID, 3, pos_slice=pos_slice, pack=pack), RESID)
    assert sorted(got) == sorted(expected)
    if expected:
        assert_same(got, expected)


def test_dtype_and_several_names(model):
    names = ["blocks.0.*_pre", Z]
    [batch] = quiet(model, TEXTS, names, 8, dtype=torch.bfloat16)
    [same] = quiet(model, TEXTS, names, 8)
    assert list(batch.activations) == [point.name for point in model.select(names)]
    for name, x in same.activations.items():
        assert torch.equal(batch[name], x.bfloat16())
    assert batch[Z].shape[1:] == (model.cfg.n_heads, model.cfg.d_head)


def test_longer_documents_are_cut_with_one_warning(model):
    docs = documents([3, 9, 8, 2])
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        got = rows(quiet(model, docs, RESID, 2, max_length=5), RESID)
    assert len(told) == 1
    assert "document 1 has 9 tokens and is cut to 5" in str(told[0].message)
    assert_same(got, alone(model, [doc[:5] for doc in docs], RESID))
    n_ctx = model.cfg.n_ctx
    with pytest.warns(UserWarning, match=f"cut to {n_ctx}"):
        assert len(rows(quiet(model, documents([n_ctx + 3]), RESID), RESID)) == n_ctx


# Packing ------------------------------------------------------------------------------------------

PACKS = "gpt2 gptj mistral qwen3 gemma2 gemma3_text phi olmo2 cohere mixtral".split()


@pytest.mark.parametrize("name", PACKS)
def test_packed_documents_give_what_each_gives_alone(name):
    model = hooked(f"{name}-base")
    docs = documents([5, 1, 9, 9, 2, 7, 3, 1, 1])
    name = list(model.select("blocks.*"))[-1].name
    counts, handles = fires(model)
    got = rows(quiet(model, docs, name, 2, pack=True, max_length=10), name)
    for handle in handles:
        handle.remove()
    assert_same(got, alone(model, docs, name))
    assert counts[0] == 2 + 3  # 38 tokens in 4 rows of 10; three passes tried packing out


def test_packing_fills_rows_and_splits_no_document(model):
    docs = [
        streaming.Document(i, doc.numpy(), np.arange(len(doc)))
        for i, doc in enumerate(documents([7, 6, 4, 3, 2, 1, 12]))
    ]
    ordered = sorted(docs, key=lambda d: -len(d.ids))
    packed = streaming.packed(ordered, 10)
    assert [[len(d.ids) for d in row] for row in packed] == [[12], [7, 3], [6, 4], [2, 1]]


@pytest.mark.parametrize("name", ["bloom-base", "mpt-base", "gpt_oss-base"])
def test_packing_is_refused_where_documents_would_see_one_another(name):
    model = hooked(name)
    with pytest.raises(InputError, match=r"pack=True.*rows of their own"):
        model.stream(TEXTS, RESID, pack=True)
    assert_same(rows(quiet(model, TEXTS, RESID, 3), RESID), alone(model, TEXTS, RESID))


# Refusals, and what is left behind ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("dataset", "options", "message"),
    [
        (TEXTS, {"batch_size": 0}, "at least 1"),
        (TEXTS, {"names": "blocks.0.attn.hook_pattern"}, "batch head pos key_pos"),
        (TEXTS, {"dtype": torch.int8}, "floating"),
        (TEXTS, {"max_length": 10**6}, "n_ctx"),
        (TEXTS, {"max_length": 0}, "n_ctx"),
        (TEXTS[0], {}, "one text"),
        ({"train": TEXTS}, {}, "dataset\\['train'\\]"),
        (5, {}, "is int"),
        (torch.zeros(3, dtype=torch.long), {}, r"\[document, pos\]"),
        (TEXTS, {"to": "x", "shard_bytes": 0}, "shard_bytes"),
    ],
)
def test_bad_arguments_are_refused_before_anything_runs(
    small, dataset, options, message, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    counts, _ = fires(small)
    with pytest.raises(InputError, match=message):
        small.stream(dataset, **{"names": RESID, **options})
    assert not counts
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ([1.5, 2.0], "float"),
        ({"words": "a"}, "document 1 has words"),
        (torch.zeros(2, 2, dtype=torch.long), "document 1 has shape"),
        ([1, 96], "document 1 has token ids from 1 to 96"),
        ([-1], "document 1 has token ids"),
        (None, "document 1 is NoneType"),
    ],
)
def test_an_item_that_is_no_document_is_told_by_its_number(small, item, message):
    with pytest.raises(InputError, match=message):
        list(quiet(small, [TEXTS[0], item], RESID))
    assert not any(point.wanted for point in small.hook_points())


def test_texts_need_a_tokenizer_and_tokens_do_not():
    model = hookedlm.load(hf("gpt2-base"))
    with pytest.raises(TokenizerError, match="no"):
        list(quiet(model, TEXTS, RESID))
    docs = documents([2, 3])
    assert_same(rows(quiet(model, docs, RESID), RESID), alone(model, docs, RESID))


def test_no_hooks_stay_between_batches_nor_after_an_exception(small):
    stream = quiet(small, TEXTS, RESID, 2)
    before = torch.is_grad_enabled()
    next(stream)
    assert not any(point.wanted for point in small.hook_points())
    assert torch.is_grad_enabled() is before
    stream.close()

    def fails(tensor, hook):
        raise ZeroDivisionError

    with small.hooks([("blocks.0.hook_resid_pre", fails)]), pytest.raises(ZeroDivisionError):
        list(quiet(small, TEXTS, RESID, 2))
    assert not any(point.wanted for point in small.hook_points())


@pytest.mark.parametrize("options", [{}, {"pack": True}, {"to": "folder"}], ids=str)
def test_edits_by_others_count_and_their_hooks_see_the_data_only(small, options, tmp_path):
    if "to" in options:
        options = {"to": tmp_path / "folder"}
    seen = []

    def zero(tensor, hook):
        assert not torch.is_grad_enabled()  # nor are graphs built
        seen.append(tensor.shape[0] * tensor.shape[1])
        return torch.zeros_like(tensor)

    docs = documents([4, 4])
    with small.hooks([("blocks.0.hook_mlp_out", zero)]):
        got = rows(quiet(small, docs, RESID, 2, **options), RESID)
        assert seen == [8]
        assert_same(got, alone(small, docs, RESID))
    plain = alone(small, docs, RESID)
    assert not torch.allclose(got[0, 0][1], plain[0, 0][1])


def test_activations_can_be_trained_on(small):
    probe = torch.nn.Linear(small.cfg.d_model, 1)
    for batch in quiet(small, TEXTS, RESID, 4):
        probe(batch[RESID]).sum().backward()
    assert probe.weight.grad is not None


def test_tokens_per_second_are_shown(model, capsys):
    docs = documents([4, 6])
    list(model.stream(docs, RESID))
    assert "10.0tok" in capsys.readouterr().err
    list(quiet(model, docs, RESID))
    assert capsys.readouterr().err == ""


# Memory -------------------------------------------------------------------------------------------


def test_generators_are_read_as_needed_and_nothing_is_kept(model, monkeypatch):
    monkeypatch.setattr(streaming, "BATCHES_SORTED", 2)
    items = weakref.WeakSet()
    made = []

    def generate():
        for _ in range(60):
            item = torch.randint(3, 90, (7,))
            items.add(item)
            made.append(len(list(items)))
            yield item
            del item

    outputs = weakref.WeakSet()
    alive = []
    stream = quiet(model, generate(), RESID, 3)
    assert made == []  # nothing is read before the first batch is asked for
    for number, batch in enumerate(stream):
        alive.append(len(outputs))
        outputs.add(batch[RESID])
        assert len(made) == min(60, 6 * (number // 2 + 1))
        del batch
    assert number == 19
    assert max(alive) == 0  # the stream itself holds none while it makes the next
    assert max(made) <= 3 + 1  # nor items beyond the batch that is being read


def test_writing_holds_one_shard(small, tmp_path, monkeypatch):
    sizes = []
    row = small.cfg.d_model * 4
    write = shards.ShardWriter.write
    monkeypatch.setattr(
        shards.ShardWriter,
        "write",
        lambda self, source: (sizes.append(self.rows), write(self, source)),
    )
    source = (torch.randint(3, 90, (10,)) for _ in range(200))
    stored = quiet(small, source, RESID, 4, to=tmp_path, shard_bytes=100 * row)
    assert sizes[:-1] == [120] * (len(sizes) - 1)  # what reaches 100 rows in batches of 4 x 10
    assert len(stored) == 2000
    assert stored.complete


# On disk ------------------------------------------------------------------------------------------

NAMES = [RESID, Z]
LENGTHS = [5, 1, 9, 9, 2, 7, 3, 4, 4, 4, 8, 1, 1, 6, 2, 9, 3, 3, 7, 5]
SHARD = dict(batch_size=3, shard_bytes=4000, progress=False)


def stored(folder):
    """File -> bytes, and the index without its whitespace."""
    return {p.name: p.read_bytes() for p in sorted(Path(folder).iterdir())}


@pytest.fixture
def written(model, tmp_path):
    docs = documents(LENGTHS)
    return docs, model.stream(docs, NAMES, to=tmp_path / "s", **SHARD), tmp_path / "s"


def test_shards_hold_what_a_stream_yields_in_order(model, written):
    docs, stream, folder = written
    assert len(stream.index["shards"]) > 3
    assert stream.complete
    assert len(stream) == sum(LENGTHS)
    assert stream.n_documents == len(LENGTHS)
    for name in NAMES:
        assert_same(rows(stream, name), alone(model, docs, name))
    order = [pair for i, n in enumerate(LENGTHS) for pair in ((i, at) for at in range(n))]
    every = stream[:]
    pairs = list(zip(every.documents.tolist(), every.positions.tolist(), strict=True))
    assert pairs == order
    index = json.loads((folder / "index.json").read_text())
    assert index["hookedlm"]
    assert index["stream"]["names"] == [p.name for p in model.select(NAMES)]
    assert index["stream"]["model"]["n_layers"] == len(model.blocks)
    ends = [shard["documents"] for shard in index["shards"]]
    assert ends[0][0] == 0
    assert ends[-1][1] == len(LENGTHS)
    assert all(before[1] == after[0] for before, after in itertools.pairwise(ends))
    for shard in index["shards"]:
        assert shard["rows"] == sum(LENGTHS[slice(*shard["documents"])])


def test_rows_and_documents_are_found(written):
    docs, stream, _ = written
    every = stream[:]
    picked = [3, 70, 0, -1, 41, 3]
    for rows in (picked, torch.tensor(picked), np.array(picked)):
        some = stream[rows]
        assert torch.equal(some[RESID], every[RESID][picked])
        assert torch.equal(some.documents, every.documents[picked])
    assert torch.equal(stream[10:60:3][Z], every[Z][10:60:3])
    assert torch.equal(stream[-2][Z], every[Z][-2:-1])
    assert len(stream[5:5]) == 0
    for number in range(len(docs)):
        mine = stream.document(number)
        assert torch.equal(mine.tokens, docs[number])
        assert torch.equal(mine[RESID], every[RESID][every.documents == number])
    assert [len(batch) for batch in stream.batches(50)] == [50, 43]
    with pytest.raises(IndexError, match="93"):
        stream[93]
    with pytest.raises(InputError, match="0 to 19"):
        stream.document(20)
    assert "93 rows of 20 documents" in repr(stream)


def test_a_data_loader_shuffles_rows(written):
    _, stream, _ = written
    sampler = BatchSampler(RandomSampler(stream), 40, drop_last=False)
    loader = DataLoader(stream, batch_size=None, sampler=sampler)
    batches = list(loader)
    assert [len(batch) for batch in batches] == [40, 40, 13]
    assert len(rows(batches, RESID)) == len(stream)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="asks Linux what is mapped")
def test_shards_are_mapped_not_read(written):
    _, stream, folder = written
    batch = hookedlm.open_stream(folder).shard(2)
    assert stream.index["shards"][2]["file"] in Path("/proc/self/maps").read_text()
    del batch


def test_a_finished_stream_is_not_run_again_and_may_grow(small, tmp_path):
    docs = documents(LENGTHS)
    small.stream(docs[:12], NAMES, to=tmp_path / "s", **SHARD)
    before = stored(tmp_path / "s")
    counts, _handles = fires(small)
    again = small.stream(docs[:12], NAMES, to=tmp_path / "s", **SHARD)
    assert counts[0] == 1
    assert again.complete
    assert stored(tmp_path / "s") == before
    longer = small.stream(docs, NAMES, to=tmp_path / "s", **SHARD)
    assert_same(rows(longer, RESID), alone(small, docs, RESID))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"names": RESID}, "names was"),
        ({"dtype": torch.float16}, "dtype was None and is 'float16'"),
        ({"pos_slice": (1, None)}, r"pos_slice was None and is \[1, None, None\]"),
        ({"max_length": 8}, "max_length was"),
        ({"pack": True}, "pack was False"),
        ({"prepend_bos": False}, "prepend_bos was None"),
    ],
)
def test_going_on_with_other_arguments_is_refused(model, written, options, told):
    docs, _, folder = written
    before = stored(folder)
    with pytest.raises(CacheFileError, match=told):
        model.stream(docs, **{"names": NAMES, "to": folder, **SHARD, **options})
    assert stored(folder) == before


def test_going_on_with_another_model_or_data_set_is_refused(small, written):
    docs, _, folder = written
    before = stored(folder)
    other = documents(LENGTHS, seed=1)
    for dataset in (other, docs[:3], docs[::-1], TEXTS):
        with pytest.raises(CacheFileError, match="those of this data set are others"):
            hooked("gpt2-base").stream(dataset, NAMES, to=folder, **SHARD)
    with pytest.raises(CacheFileError, match=r"names was|model\.\w+ was"):
        hooked("mistral-base").stream(docs, NAMES, to=folder, **SHARD)
    with torch.no_grad():
        small.blocks[1].mlp.W_in.mul_(1.1)
    with pytest.raises(CacheFileError, match="weights was"):
        small.stream(docs, NAMES, to=folder, **SHARD)
    small.set_tokenizer(None)
    assert stored(folder) == before


def test_a_batch_size_may_change_on_the_way(model, tmp_path):
    docs = documents(LENGTHS)

    def dies():
        yield from docs[:14]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        model.stream(dies(), NAMES, to=tmp_path, **SHARD)
    half = hookedlm.open_stream(tmp_path)
    assert not half.complete
    assert 0 < len(half) < sum(LENGTHS)
    assert "not complete" in repr(half)
    whole = model.stream(docs, NAMES, to=tmp_path, **{**SHARD, "batch_size": 2})
    assert_same(rows(whole, RESID), alone(model, docs, RESID))


def test_damaged_folders_are_told(model, written, tmp_path):
    docs, stream, folder = written
    with pytest.raises(CacheFileError, match="no index"):
        hookedlm.open_stream(tmp_path)
    lost = folder / stream.index["shards"][1]["file"]
    content = lost.read_bytes()
    lost.write_bytes(content[:100])
    with pytest.raises(CacheFileError, match="damaged"):
        list(stream)
    lost.unlink()
    for go in (lambda: hookedlm.open_stream(folder),
               lambda: model.stream(docs, NAMES, to=folder, **SHARD)):  # fmt: skip
        with pytest.raises(CacheFileError, match=r"shard-000001\.safetensors missing"):
            go()
    (folder / "index.json").write_text("{}")
    with pytest.raises(CacheFileError, match="no index"):
        hookedlm.open_stream(folder)


class Killed(BaseException):
    pass


def test_a_stop_at_any_step_loses_and_repeats_nothing(model, tmp_path, monkeypatch):
    """Every call that touches the disk is the last one once; what then goes on ends up with the
    same bytes as what was never stopped."""
    docs = documents(LENGTHS)
    model.stream(docs, NAMES, to=tmp_path / "whole", **SHARD)
    expected = stored(tmp_path / "whole")
    real = {"save_file": shards.save_file, "replace": os.replace, "fsync": os.fsync}
    steps = 0

    def stopping(name, at):
        def step(*args, **kwargs):
            nonlocal steps
            steps += 1
            if steps == at:
                raise Killed
            return real[name](*args, **kwargs)

        return step

    for at in range(1, 200):
        steps, folder = 0, tmp_path / str(at)
        with monkeypatch.context() as patch:
            patch.setattr(shards, "save_file", stopping("save_file", at))
            patch.setattr(shards.os, "replace", stopping("replace", at))
            patch.setattr(shards.os, "fsync", stopping("fsync", at))
            try:
                model.stream(docs, NAMES, to=folder, **SHARD)
            except Killed:
                assert not list(folder.glob("*.part"))
                leave_litter(folder, expected)
                if (folder / "index.json").exists():
                    assert_prefix(hookedlm.open_stream(folder), expected)
            else:
                break
        model.stream(iter(docs), NAMES, to=folder, **SHARD)
        assert stored(folder) == expected, f"stopped at step {at}"
    assert at > 20


def leave_litter(folder, expected):
    """What a kill leaves, which no exception handler sees: half a file, one not in the index."""
    has_index = (folder / "index.json").exists()
    n = len(hookedlm.open_stream(folder).shards) if has_index else 0
    if (due := f"shard-{n:06d}.safetensors") in expected:
        (folder / f"{due}.part").write_bytes(b"half")
        (folder / due).write_bytes(b"not in the index")
    (folder / "index.json.part").write_text("{")


def assert_prefix(stream, expected):
    for shard in stream.shards:
        assert (stream.folder / shard["file"]).read_bytes() == expected[shard["file"]]


KILLED = """
import sys, time, torch
sys.path.insert(0, {tests!r})
from test_streaming import NAMES, SHARD, documents, LENGTHS
from conftest import hooked

def slowly():
    for number, doc in enumerate(documents(LENGTHS * 20)):
        time.sleep(0.004)
        yield doc

model = hooked("gpt2-base")
print("ready", flush=True)
model.stream(slowly(), NAMES, to={folder!r}, **SHARD)
print("end", flush=True)
"""


def test_killed_at_random_and_resumed(model, tmp_path):
    """SIGKILL while shards are written, in another process; then the rest is done here."""
    folder = tmp_path / "s"
    seed = time.time_ns() % 10**6
    wait = 0.1 + random.Random(seed).random()
    code = KILLED.format(tests=str(Path(__file__).parent), folder=str(folder))
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=tmp_path
    ) as process:
        assert process.stdout.readline() == "ready\n"
        time.sleep(wait)
        process.send_signal(signal.SIGKILL)
        assert "end" not in process.stdout.read(), f"too fast to be killed (seed {seed})"
    docs = documents(LENGTHS * 20)
    before = len(hookedlm.open_stream(folder)) if (folder / "index.json").exists() else 0
    resumed = model.stream(iter(docs), NAMES, to=folder, **SHARD)
    assert before < len(resumed) == sum(LENGTHS) * 20, f"seed {seed}"
    whole = model.stream(docs, NAMES, to=tmp_path / "whole", **SHARD)
    assert stored(folder) == stored(tmp_path / "whole"), f"seed {seed}"
    for name in NAMES:
        assert_same(rows(resumed, name), rows(quiet(model, docs, name, 5), name))
    assert whole.complete
    assert not list(folder.glob("*.part"))


def test_texts_go_to_disk_and_are_resumed(tmp_path):
    model = hookedlm.load_demo()
    name = "blocks.2.mlp.hook_post"
    texts = [f"The capital of {place} is" for place in ("Spain", "France", "Poland", "Italy")] * 3

    def dies():
        yield from texts[:9]
        raise Killed

    options = dict(to=tmp_path, progress=False, shard_bytes=1, pos_slice=-1)
    with pytest.raises(Killed):
        model.stream(dies(), name, 2, **options)
    assert len(hookedlm.open_stream(tmp_path)) in range(2, 9)
    done = model.stream(texts, name, 2, **options)
    assert done[:].positions.tolist() == [model.to_tokens(t).shape[1] - 1 for t in texts]
    for i, text in enumerate(texts):
        torch.testing.assert_close(done.document(i)[name], model.cache(text, name)[name][0, -1:])
