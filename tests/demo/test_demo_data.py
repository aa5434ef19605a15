"""The shipped demo checkpoint does its tasks, and its held-out data are held out.

Runs on the files in `hookedlm/demo` with transformers alone, on CPU, in some seconds.
"""

from __future__ import annotations

import random
import re
import sys
import warnings
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "hookedlm" / "demo"
if str(ROOT / "scripts") not in sys.path:
    sys.path.insert(0, str(ROOT / "scripts"))

import demo_data as data  # noqa: E402
import train_demo  # noqa: E402

# Neither the seed of the figures in the model card nor that of the checks during training.
SEED = 1234
ALL_NAMES = data.NAMES + data.HELD_OUT_NAMES


@pytest.fixture(scope="module")
def tokenizer():
    return transformers.AutoTokenizer.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def model():
    return transformers.AutoModelForCausalLM.from_pretrained(FOLDER).eval()


# -- the folder -------------------------------------------------------------------------------


def test_folder_is_small_and_complete():
    sizes = {path.name: path.stat().st_size for path in FOLDER.iterdir() if path.is_file()}
    needed = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"}
    assert needed | {"tokenizer_config.json", "README.md"} <= set(sizes)
    assert sum(sizes.values()) <= 10_000_000


def test_folder_loads_without_warnings(caplog):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = transformers.AutoModelForCausalLM.from_pretrained(FOLDER)
        transformers.AutoTokenizer.from_pretrained(FOLDER)
    assert not [record for record in caplog.records if record.levelname == "WARNING"]
    assert loaded.config.model_type == "gpt2"
    assert loaded.config.tie_word_embeddings
    assert loaded.dtype == torch.float32


def test_model_card_has_the_figures():
    card = (FOLDER / "README.md").read_text(encoding="utf-8")
    for task in train_demo.held_out_prompts(1, SEED):
        assert re.search(re.escape(task) + r" \| [\d.]+% \| [\d.]+%", card), task


# -- the tokenizer ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "When John and Mary went to the shops, John gave the bag to",
        "Q: What is the capital of France?\nA: Paris\n",
        "  two  spaces, a\ttab and\n\na blank line ",
        "don't, it's 1,234.50 % of naïve 東京 \N{ROCKET}",
        "Words , like unforeseeable !",
        "",
    ],
)
def test_tokenizer_loses_nothing(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.bos_token_id not in tokenizer.encode(text)


def test_every_byte_is_a_token(tokenizer):
    assert set(data.byte_symbols()) <= set(tokenizer.get_vocab())


def test_end_of_text_is_the_special_token(tokenizer, model):
    end = tokenizer.encode(data.END_OF_TEXT)
    assert end == [tokenizer.bos_token_id] == [tokenizer.eos_token_id] == [tokenizer.unk_token_id]
    assert end == [model.config.vocab_size - 1] == [len(tokenizer) - 1]
    assert model.config.bos_token_id == model.config.eos_token_id == end[0]


def test_vocabulary_is_the_one_of_the_data(tokenizer):
    assert tokenizer.get_vocab() == data.vocabulary()


def test_task_words_are_single_tokens(tokenizer):
    words = [*ALL_NAMES, *data.CAPITALS, *data.CAPITALS.values(), *data.PLACES]
    words += [word for thing in data.OBJECTS for word in thing.split()]
    for word in words:
        assert len(tokenizer.encode(" " + word)) == 1, word
        assert len(tokenizer.encode(word)) == 1, word  # at the start of a text


# -- what the model has learned ---------------------------------------------------------------


@pytest.mark.parametrize("bos", [True, False], ids=["with BOS", "without BOS"])
def test_held_out_accuracies_reach_their_bars(model, tokenizer, bos):
    figures = train_demo.accuracies(model, tokenizer, 200, SEED, bos)
    assert train_demo.misses(figures) == []


@pytest.mark.parametrize("order", ["ABBA", "BABA"])
def test_both_orders_of_names(model, tokenizer, order):
    prompts = data.indirect_object_prompts("pairs", 200, SEED, order=order)
    accuracy, difference = train_demo.prompt_scores(model, tokenizer, prompts, bos=True)
    assert accuracy >= 0.95
    assert difference > 2


@pytest.mark.parametrize("bos", [True, False], ids=["with BOS", "without BOS"])
def test_known_prompts(model, tokenizer, bos):
    assert train_demo.known_prompt_misses(model, tokenizer, bos) == []


def test_corrupted_prompts_turn_the_answer_round(model, tokenizer):
    prompts = data.indirect_object_prompts("combinations", 200, SEED)
    prompts += data.capital_prompts("train", 100, SEED)
    logits = train_demo.last_logits(model, tokenizer, [p.corrupted for p in prompts], bos=True)
    wrong = torch.tensor([tokenizer.encode(p.wrong)[0] for p in prompts])
    assert (logits.argmax(-1) == wrong).double().mean() >= 0.95


# -- the data ---------------------------------------------------------------------------------


def training_texts(make, n=3000):
    """`n` training documents without their marks."""
    rng = random.Random(SEED)
    return [re.sub(r"[\[\]<>]", "", make(rng)) for _ in range(n)]


def names_in(text, names=ALL_NAMES):
    return set(re.findall("[A-Za-z]+", text)) & set(names)


@pytest.mark.parametrize("make", [data.indirect_object_document, data.third_person_document])
def test_training_has_no_held_out_names_or_pairs(make):
    for text in training_texts(make):
        names = sorted(names_in(text))
        assert len(names) in (0, 2, 3)  # none where other words stand in for names
        assert not names_in(text, data.HELD_OUT_NAMES)
        pairs = [(a, b) for a in names for b in names if a < b]
        assert not any(data.held_out_pair(*pair) for pair in pairs), text


def test_stories_have_one_name():
    texts = training_texts(data.story_document)
    assert all(len(names_in(text)) <= 1 for text in texts)
    seen = set().union(*map(names_in, texts))
    assert set(data.HELD_OUT_NAMES) <= seen  # so the model knows them as names


@pytest.mark.parametrize("split", ["pairs", "names", "combinations", "wordings"])
def test_held_out_prompts_never_occur_in_training(split):
    # Up to the mark of the answer, a training document is a prompt, perhaps after a filler.
    rng = random.Random(SEED)
    trained = [data.indirect_object_document(rng).split("[")[0] for _ in range(10_000)]
    held_out = {p.prompt for p in data.indirect_object_prompts(split, 1000, SEED)}
    assert not held_out & set(trained)
    last_sentences = {text.split(". ", 1)[-1] for text in trained}
    assert not held_out & last_sentences


def test_held_out_prompts_break_their_rule_and_no_other():
    for split in data.INDIRECT_OBJECT_SPLITS:
        for prompt in data.indirect_object_prompts(split, 300, SEED):
            d = prompt.details
            wording = d["opening"], d["action"]
            names = {d["first"], d["second"]}
            broken = {
                "pairs": names <= set(data.NAMES) and data.held_out_pair(*names),
                "names": names <= set(data.HELD_OUT_NAMES),
                "wordings": data.held_out_wording(*wording),
                "combinations": not data.held_out_wording(*wording)
                and data.held_out_combination(*wording, d["place"], d["object"]),
            }
            assert [name for name, is_broken in broken.items() if is_broken] == (
                [] if split == "train" else [split]
            )


def test_training_has_no_held_out_statement():
    text = "\n".join(training_texts(data.statement_document))
    held_out = data.capital_prompts("held_out", 10_000, SEED, form="statement")
    assert len(held_out) > 100
    facts = [p.prompt + p.answer for p in held_out]
    # "The capital of X is Y" is also the end of longer phrasings ("Everyone knows that ...").
    sentences = set(re.split(r"\.(?:\s|$)", text))
    assert not sentences & set(facts)
    trained = {p.prompt + p.answer for p in data.capital_prompts("train", 10_000, form="statement")}
    assert len(trained & sentences) > 0.9 * len(trained)  # the check above looks at the right thing


def test_training_has_no_held_out_question():
    question = re.escape(data.QUESTION).replace(r"\{country\}", r"(\w+)")
    for text in training_texts(data.question_document):
        asked = re.findall(question, text)
        pairs = [(a, b) for i, a in enumerate(asked) for b in asked[i + 1 :]]
        assert not any(data.held_out_question(*pair) for pair in pairs), text
    for prompt in data.capital_prompts("held_out", 10_000, SEED):
        assert data.held_out_question(prompt.details["example"], prompt.details["country"])


def test_corrupted_prompts_have_equal_length_and_differ_in_one_token(tokenizer):
    prompts = data.indirect_object_prompts("pairs", 200, SEED)
    for form in data.CAPITAL_FORMS:
        prompts += data.capital_prompts("held_out", 100, SEED, form=form)
    for prompt in prompts:
        clean, corrupted = tokenizer.encode(prompt.prompt), tokenizer.encode(prompt.corrupted)
        assert len(clean) == len(corrupted)
        assert sum(a != b for a, b in zip(clean, corrupted, strict=True)) == 1
        assert prompt.answer != prompt.wrong
        assert len(tokenizer.encode(prompt.answer)) == len(tokenizer.encode(prompt.wrong)) == 1


def test_repeated_tokens():
    plain = data.repeated_tokens(5, 12, seed=3)
    assert all(row[:12] == row[12:] and len(row) == 24 for row in plain)
    end = data.vocabulary()[data.END_OF_TEXT]
    assert data.repeated_tokens(5, 12, seed=3, bos=True) == [[end, *row] for row in plain]
    assert not any(end in row for row in plain)
    assert data.repeated_tokens(5, 12, seed=3) == plain != data.repeated_tokens(5, 12, seed=4)


def test_prompts_are_reproducible():
    assert data.indirect_object_prompts("names", 20, 7) == data.indirect_object_prompts(
        "names", 20, 7
    )
    assert data.capital_prompts("held_out", 20, 7) != data.capital_prompts("held_out", 20, 8)


def test_unknown_choices_are_refused():
    with pytest.raises(ValueError, match="split"):
        data.indirect_object_prompts("held_out", 1)
    with pytest.raises(ValueError, match="order"):
        data.indirect_object_prompts("train", 1, order="AABB")
    with pytest.raises(ValueError, match="form"):
        data.capital_prompts("train", 1, form="riddle")
