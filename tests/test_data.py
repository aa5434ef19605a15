"""Rows of tokens against texts tokenized by hand; the hub and its cache without a network."""

from __future__ import annotations

import json
import random
import sys

import datasets
import pytest
import torch
from conftest import WORDS, word_tokenizer
from tokenizers import processors
from torch.utils.data import DataLoader

import hookedlm
from hookedlm import data, hub
from hookedlm.errors import InputError, LoadError, TokenizerError

datasets.disable_progress_bars()


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Lock files and the like go where nobody else looks."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")


def make_texts(n: int, shortest: int = 0, longest: int = 12) -> list[str]:
    draw = random.Random(0)
    return [" ".join(draw.choices(WORDS, k=draw.randint(shortest, longest))) for _ in range(n)]


def dataset_of(texts: list[str], column: str = "text") -> datasets.Dataset:
    return datasets.Dataset.from_dict({column: texts, "other": list(range(len(texts)))})


def stream_of(texts: list[str]) -> datasets.IterableDataset:
    return dataset_of(texts).to_iterable_dataset()


def rows_by_hand(texts, tokenizer, length, bos=True):
    """One long list, a token at a time."""
    joined = []
    for i, text in enumerate(texts):
        joined += [tokenizer.eos_token_id] if i else []
        joined += tokenizer(text, add_special_tokens=False)["input_ids"]
    room = length - bos
    rows = [joined[i : i + room] for i in range(0, len(joined), room)]
    return [[tokenizer.bos_token_id] * bos + row for row in rows if len(row) == room]


def as_lists(rows) -> list[list[int]]:
    return [row["tokens"].tolist() for row in rows]


# Rows of tokens -----------------------------------------------------------------------------------


@pytest.mark.parametrize("bos", [True, False])
def test_rows_are_the_texts_tokenized_one_by_one(bos):
    tokenizer = hookedlm.load_demo().tokenizer
    # Long words without spaces: cutting the joined text anywhere would change its tokens.
    texts = ["The capital of Spain is Madrid." * 7, "", "antidisestablishmentarianism" * 30, "a\nb"]
    made = data.tokenize_and_concatenate(
        dataset_of(texts), tokenizer, max_length=16, add_bos_token=bos
    )
    by_hand = rows_by_hand(texts, tokenizer, 16, bos)
    assert as_lists(made) == by_hand
    assert len(by_hand) > 10
    assert made.column_names == ["tokens"]


@pytest.mark.parametrize("adds_bos", [True, False])
def test_what_the_tokenizer_adds_by_itself_stays_out_of_the_rows(adds_bos):
    texts = make_texts(20, shortest=3)
    tokenizer = word_tokenizer(adds_bos=adds_bos)
    made = data.tokenize_and_concatenate(dataset_of(texts), tokenizer, max_length=10)
    assert as_lists(made) == rows_by_hand(texts, word_tokenizer(), 10)
    assert all(row.count(tokenizer.bos_token_id) == 1 for row in as_lists(made))


def test_rows_do_not_depend_on_how_many_texts_or_processes_work_at_once(word_tokenizer):
    texts = make_texts(2300)
    made = {
        n: data.tokenize_and_concatenate(
            dataset_of(texts), word_tokenizer, max_length=300, num_proc=n
        )
        for n in (1, 2)
    }
    by_hand = rows_by_hand(texts, word_tokenizer, 300)
    assert as_lists(made[1]) == as_lists(made[2]) == by_hand


def test_many_short_texts_fill_a_row_together(word_tokenizer):
    texts = ["cat"] * 2500  # a thousand of them are less than a row
    made = data.tokenize_and_concatenate(dataset_of(texts), word_tokenizer, max_length=2400)
    assert as_lists(made) == rows_by_hand(texts, word_tokenizer, 2400)
    assert len(made) == 2


def test_rows_come_as_torch_tensors_that_a_loader_batches(word_tokenizer):
    made = data.tokenize_and_concatenate(
        dataset_of(make_texts(30), "story"), word_tokenizer, max_length=9, column_name="story"
    )
    batch = next(iter(DataLoader(made, batch_size=4)))["tokens"]
    assert batch.shape == (4, 9)
    assert batch.dtype == torch.int64


def test_the_tokenizer_is_left_alone_and_nothing_is_padded():
    tokenizer = word_tokenizer()
    tokenizer.pad_token = None  # the classic adds one outside the vocabulary
    before = (len(tokenizer), tokenizer.pad_token, tokenizer.padding_side)
    made = data.tokenize_and_concatenate(dataset_of(make_texts(40)), tokenizer, max_length=9)
    assert (len(tokenizer), tokenizer.pad_token, tokenizer.padding_side) == before
    assert all(0 < i < 96 for row in as_lists(made) for i in row)


def test_a_streamed_data_set_gives_the_rows_of_each_thousand_texts(word_tokenizer):
    texts = make_texts(1500)
    made = data.tokenize_and_concatenate(
        stream_of(texts), word_tokenizer, streaming=True, max_length=50
    )
    parts = (texts[:1000], texts[1000:])
    by_hand = [row for part in parts for row in rows_by_hand(part, word_tokenizer, 50)]
    assert as_lists(made) == by_hand
    assert as_lists(made) == by_hand  # and again
    assert isinstance(made, datasets.IterableDataset)
    assert next(iter(made))["tokens"].dtype == torch.int64


def test_a_stream_whose_features_are_unknown(word_tokenizer):
    texts = make_texts(30)
    stream = datasets.IterableDataset.from_generator(lambda: ({"text": text} for text in texts))
    made = data.tokenize_and_concatenate(stream, word_tokenizer, streaming=True, max_length=12)
    assert as_lists(made) == rows_by_hand(texts, word_tokenizer, 12)


@pytest.mark.parametrize("make", [dataset_of, stream_of])
def test_less_than_a_row_is_refused(make, word_tokenizer):
    with pytest.raises(InputError, match="too few tokens for a single row of max_length=50"):
        data.tokenize_and_concatenate(make(["the cat"] * 3), word_tokenizer, max_length=50)


def test_a_stream_that_never_fills_a_row_is_refused_and_not_read_for_ever(word_tokenizer):
    read = []

    def texts():
        while True:
            read.append("cat")
            yield {"text": "cat"}

    stream = datasets.IterableDataset.from_generator(texts)
    with pytest.raises(InputError, match="max_length=4000"):
        data.tokenize_and_concatenate(stream, word_tokenizer, streaming=True, max_length=4000)
    assert len(read) < 5000


def test_wrong_arguments_are_refused(word_tokenizer):
    made = dataset_of(make_texts(5))
    with pytest.raises(InputError, match="no column 'story': the data set has text, other"):
        data.tokenize_and_concatenate(made, word_tokenizer, column_name="story")
    with pytest.raises(InputError, match="splits train: choose one"):
        data.tokenize_and_concatenate(datasets.DatasetDict(train=made), word_tokenizer)
    with pytest.raises(InputError, match="max_length=1"):
        data.tokenize_and_concatenate(made, word_tokenizer, max_length=1)
    with pytest.raises(TokenizerError, match="NoneType"):
        data.tokenize_and_concatenate(made, None)


@pytest.mark.parametrize("missing", ["eos_token", "bos_token"])
def test_a_tokenizer_without_the_token_is_refused(missing):
    tokenizer = word_tokenizer()
    setattr(tokenizer, missing, None)
    with pytest.raises(TokenizerError, match=missing):
        data.tokenize_and_concatenate(dataset_of(make_texts(5)), tokenizer, max_length=8)
    if missing == "bos_token":
        made = data.tokenize_and_concatenate(
            dataset_of(make_texts(5)), tokenizer, max_length=8, add_bos_token=False
        )
        assert as_lists(made) == rows_by_hand(make_texts(5), tokenizer, 8, bos=False)


def test_keep_single_column():
    kept = data.keep_single_column(dataset_of(["a", "b"]), "text")
    assert kept.column_names == ["text"]
    assert kept["text"][:] == ["a", "b"]
    assert list(data.keep_single_column(stream_of(["a", "b"]), "text")) == [
        {"text": "a"},
        {"text": "b"},
    ]


# Data sets of the hub -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, path",
    [
        ("openwebtext", "stas/openwebtext-10k"),
        ("owt", "stas/openwebtext-10k"),
        ("pile", "NeelNanda/pile-10k"),
        ("c4", "NeelNanda/c4-10k"),
        ("code", "NeelNanda/code-10k"),
        ("python", "NeelNanda/code-10k"),
        ("c4_code", "NeelNanda/c4-code-20k"),
        ("c4-code", "NeelNanda/c4-code-20k"),
        ("wiki", "NeelNanda/wiki-10k"),
    ],
)
def test_get_dataset_asks_for_the_classic_samples(name, path, monkeypatch):
    calls = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: calls.append((a, k)))
    data.get_dataset(name)
    data.get_dataset(name, split="test", streaming=True)
    assert calls == [
        ((path,), {"split": "train"}),
        ((path,), {"split": "test", "streaming": True}),
    ]


def test_a_data_set_without_a_network(tmp_path):
    with pytest.raises(LoadError, match="pile-10k' is neither cached nor reachable"):
        data.get_dataset("pile", cache_dir=str(tmp_path))
    with pytest.raises(InputError, match="expected one of openwebtext"):
        data.get_dataset("pyle")


def test_without_the_datasets_library(monkeypatch, word_tokenizer):
    made = dataset_of(["the cat"])
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"hookedlm\[data\]"):
        data.get_dataset("pile")
    with pytest.raises(ImportError, match=r"hookedlm\[data\]"):
        data.tokenize_and_concatenate(made, word_tokenizer)


# Files of the hub ---------------------------------------------------------------------------------

COMMIT = "0123456789012345678901234567890123456789"


@pytest.fixture
def cache(tmp_path):
    """A cache of the hub as its client lays it out, with one repository and somebody's notes."""
    repo = tmp_path / "models--some--model"
    files = repo / "snapshots" / COMMIT
    (files / "inner").mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(COMMIT)
    (files / "facts.json").write_text(json.dumps({"layers": 4}))
    (files / "notes.txt").write_text("hello")
    torch.save({"w": torch.arange(3)}, files / "inner" / "weights.pth")
    torch.save({"w": torch.arange(3)}, files / "weights.bin")
    torch.save({"w": random.Random(0)}, files / "objects.pth")
    (tmp_path / "mine.txt").write_text("not the hub's")
    return tmp_path


def test_a_file_of_the_hub_is_read_by_what_it_is(cache):
    def get(name, **kwargs):
        return hub.download_file_from_hf("some/model", name, cache_dir=cache, **kwargs)

    assert get("facts.json") == {"layers": 4}
    assert get("weights.pth", subfolder="inner")["w"].tolist() == [0, 1, 2]
    assert get("weights.bin", force_is_torch=True)["w"].tolist() == [0, 1, 2]
    assert get("weights.bin").endswith("weights.bin")
    with open(get("notes.txt", revision="main")) as file:
        assert file.read() == "hello"


def test_a_file_that_cannot_be_had_or_trusted(cache):
    with pytest.raises(LoadError, match="neither cached nor reachable"):
        hub.download_file_from_hf("some/model", "absent.json", cache_dir=cache)
    with pytest.raises(LoadError, match="neither cached nor reachable"):
        hub.download_file_from_hf("some/bad/name", "absent.json", cache_dir=cache)
    with pytest.raises(LoadError, match="more than tensors"):
        hub.download_file_from_hf("some/model", "objects.pth", cache_dir=cache)
    with pytest.raises(TypeError, match="revison"):
        hub.download_file_from_hf("some/model", "facts.json", cache_dir=cache, revison="main")


def test_clearing_the_cache_takes_only_what_the_hub_put_there(cache, monkeypatch):
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(cache))
    assert hub.clear_huggingface_cache() > 0
    assert [path.name for path in cache.iterdir() if not path.name.startswith(".")] == ["mine.txt"]
    assert hub.clear_huggingface_cache() == 0
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(cache / "absent"))
    assert hub.clear_huggingface_cache() == 0


# What a tokenizer says ----------------------------------------------------------------------------


def test_a_tokenizer_with_bos_is_a_copy_that_adds_it(word_tokenizer, bos_tokenizer):
    changed = data.get_tokenizer_with_bos(word_tokenizer)
    assert changed(["the cat", "dog"])["input_ids"] == [[1, 4, 5], [1, 16]]
    assert changed("the cat", add_special_tokens=False)["input_ids"] == [4, 5]
    assert word_tokenizer("the cat")["input_ids"] == [4, 5]
    assert data.get_tokenizer_with_bos(bos_tokenizer) is bos_tokenizer


def test_what_the_tokenizer_adds_besides_stays(word_tokenizer):
    word_tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 2)]
    )
    changed = data.get_tokenizer_with_bos(word_tokenizer)
    assert changed("the cat")["input_ids"] == [1, 4, 5, 2]
    assert word_tokenizer("the cat")["input_ids"] == [4, 5, 2]


def test_a_byte_level_tokenizer_with_bos():
    tokenizer = hookedlm.load_demo().tokenizer
    changed = data.get_tokenizer_with_bos(tokenizer)
    plain = tokenizer("The capital of Spain")["input_ids"]
    assert changed("The capital of Spain")["input_ids"] == [tokenizer.bos_token_id, *plain]


def test_no_bos_token_to_add(word_tokenizer):
    word_tokenizer.bos_token = None
    with pytest.raises(TokenizerError, match="no BOS token"):
        data.get_tokenizer_with_bos(word_tokenizer)
    with pytest.raises(TokenizerError, match="no BOS token"):
        data.get_input_with_manually_prepended_bos(word_tokenizer, "the cat")


def test_bos_written_in_front(word_tokenizer):
    put = data.get_input_with_manually_prepended_bos
    assert put(word_tokenizer, "the cat") == "<s>the cat"
    assert put(word_tokenizer, ["the", ""]) == ["<s>the", "<s>"]


@pytest.mark.parametrize("pad", ["<pad>", "<s>", "</s>"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("prepend_bos", [True, False])
def test_mask_and_bos_removal_of_padded_batches(pad, side, prepend_bos):
    """Against the lengths that the rows were made from."""
    tokenizer = word_tokenizer(side=side)
    tokenizer.pad_token = pad
    texts = [[4, 5, 6], [7], [4, 5, 6, 7, 8]]
    rows = [[1, *text] if prepend_bos else text for text in texts]
    width = max(map(len, rows))
    gaps = [[tokenizer.pad_token_id] * (width - len(row)) for row in rows]
    left = side == "left"
    tokens = torch.tensor([g + r if left else r + g for g, r in zip(gaps, rows, strict=True)])
    real = [
        [0] * len(g) + [1] * len(r) if left else [1] * len(r) + [0] * len(g)
        for g, r in zip(gaps, rows, strict=True)
    ]
    mask = data.get_attention_mask(tokenizer, tokens, prepend_bos)
    assert mask.tolist() == real
    assert mask.dtype == tokens.dtype
    assert data.get_attention_mask(tokenizer, tokens[0], prepend_bos).tolist() == real[0]

    if prepend_bos:
        removed = data.get_tokens_with_bos_removed(tokenizer, tokens)
        short = [g + t if left else t + g for g, t in zip(gaps, texts, strict=True)]
        assert removed.tolist() == short
        assert data.get_tokens_with_bos_removed(tokenizer, tokens[0]).tolist() == short[0]
    elif pad != "<s>":
        with pytest.raises(InputError, match="begins with BOS"):
            data.get_tokens_with_bos_removed(tokenizer, tokens)


def test_a_bos_alone_that_is_the_pad_token_is_real():
    for side in ("left", "right"):
        tokenizer = word_tokenizer(side=side)
        tokenizer.pad_token = "<s>"
        mask = data.get_attention_mask(tokenizer, torch.tensor([[1, 1, 1]]), True)
        assert mask.tolist() == ([[0, 0, 1]] if side == "left" else [[1, 0, 0]])


def test_without_padding_everything_is_real(word_tokenizer):
    tokens = torch.tensor([[0, 4, 0]])
    assert data.get_attention_mask(None, tokens, True).tolist() == [[1, 1, 1]]
    word_tokenizer.pad_token = None
    assert data.get_attention_mask(word_tokenizer, tokens, True).tolist() == [[1, 1, 1]]
