"""Measures beside the same numbers from Hugging Face's models, one prompt at a time."""

from __future__ import annotations

import builtins
import math
import random
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from conftest import hf, hooked, word_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import hookedlm
from hookedlm import evals
from hookedlm.errors import InputError, LoadError, TokenizerError
from hookedlm.evals import IOIDataset, induction_loss, ioi_eval, mmlu_eval, sanity_check

# Names, places and sentences that the demo model has met (scripts/demo_data.py).
DEMO_TEMPLATES = [
    "When [A] and [B] went to the [LOCATION], [B] gave the [OBJECT] to [A]",
    "After [B] and [A] went to the [LOCATION], [B] handed the [OBJECT] to [A]",
    "While [A] and [B] were at the [LOCATION], [B] gave the [OBJECT] back to [A]",
]
DEMO_NAMES = ["John", "Mary", "Tom", "Anna", "Robert", "Kate", "Paul", "Laura"]


@pytest.fixture(scope="module")
def demo():
    return hookedlm.load_demo()


@pytest.fixture(scope="module")
def demo_hf():
    return AutoModelForCausalLM.from_pretrained(hookedlm.__path__[0] + "/demo").eval()


@pytest.fixture
def forward_inputs(monkeypatch):
    """The tokens that every forward pass is given."""
    seen = []
    forward = hookedlm.HookedTransformer.forward

    def watched(self, tokens, *args, **kwargs):
        seen.append(tokens)
        return forward(self, tokens, *args, **kwargs)

    monkeypatch.setattr(hookedlm.HookedTransformer, "forward", watched)
    return seen


@torch.no_grad()
def hf_losses(model, row):
    """Minus the log-probability of every token but the first."""
    logits = model(torch.as_tensor(row)[None]).logits[0]
    return F.cross_entropy(logits[:-1], torch.as_tensor(row)[1:], reduction="none")


# Without data -------------------------------------------------------------------------------------


def test_sanity_check_is_the_loss_on_a_paragraph(demo, demo_hf, forward_inputs):
    loss = sanity_check(demo)
    [tokens] = forward_inputs
    assert 50 < tokens.shape[1] <= 256
    assert tokens[0, 0] == demo.tokenizer.bos_token_id
    assert demo.to_string(tokens[0, 1:12]).startswith("Water")
    torch.testing.assert_close(loss, hf_losses(demo_hf, tokens[0]).mean())
    assert not loss.requires_grad


@pytest.mark.parametrize("prepend_bos", [True, False, None])
def test_induction_loss_is_that_of_the_repeat(demo, demo_hf, forward_inputs, prepend_bos):
    loss = induction_loss(demo, batch_size=3, subseq_len=30, prepend_bos=prepend_bos)
    [tokens] = forward_inputs
    bos, n_bos = demo.tokenizer.bos_token_id, int(prepend_bos is not False)
    assert tokens.shape == (3, n_bos + 60)
    assert (tokens[:, :n_bos] == bos).all()
    first, second = tokens[:, n_bos:].chunk(2, dim=1)
    assert torch.equal(first, second)
    assert not (first == bos).any()
    assert len(first.unique()) > 80
    # Entry i is token i + 1; the first token of the repeat can't be foreseen.
    expected = torch.stack([hf_losses(demo_hf, row)[n_bos + 30 :] for row in tokens])
    assert expected.shape == (3, 29)
    torch.testing.assert_close(loss, expected.mean(), rtol=1e-4, atol=1e-5)


def test_induction_loss_tells_a_model_that_copies_from_one_that_does_not(demo):
    assert induction_loss(demo, subseq_len=60) < 2.0
    assert induction_loss(hooked("gpt2-base"), subseq_len=20) > 0.8 * math.log(96)


def test_induction_loss_has_random_tokens_of_its_own(demo):
    before = torch.get_rng_state()
    loss = induction_loss(demo, subseq_len=20)
    assert torch.equal(torch.get_rng_state(), before)
    assert induction_loss(demo, subseq_len=20) == loss
    assert induction_loss(demo, subseq_len=20, seed=1) != loss


def test_induction_loss_refuses_rows_that_do_not_fit(demo):
    with pytest.raises(InputError, match="2 to 127"):
        induction_loss(demo)  # 384 tokens twice, in 256 positions
    with pytest.raises(InputError, match="2 to 128"):
        induction_loss(demo, subseq_len=129, prepend_bos=False)
    toy = hookedlm.load(hf("gpt2-base"))
    assert induction_loss(toy, subseq_len=8, prepend_bos=False).isfinite()  # needs no tokenizer
    with pytest.raises(TokenizerError, match="prepend_bos=False"):
        induction_loss(toy, subseq_len=8)


# Indirect objects ---------------------------------------------------------------------------------


def test_samples_are_different_sentences_with_their_answer_at_the_end(demo):
    state = random.getstate()
    dataset = IOIDataset(demo.tokenizer, num_samples=300)
    assert random.getstate() == state
    texts = [sample["text"] for sample in dataset.samples]
    assert len(dataset) == 300 == len(set(texts))
    for sample in dataset.samples:
        assert sample["text"].endswith(sample["IO"])
        assert sample["text"].count(sample["IO"].strip()) == 2
        assert sample["text"].count(sample["S"].strip()) == 2
        assert "[" not in sample["text"]
    again = IOIDataset(demo.tokenizer, num_samples=300)
    assert again.samples == dataset.samples
    assert IOIDataset(demo.tokenizer, num_samples=300, seed=1).samples != dataset.samples


def test_no_sample_comes_again_before_all_were_used(demo):
    arguments = dict(templates=["[A], [B], [N], [B],"], names=["a", "b", "c"], nouns={"N": "xy"})
    dataset = IOIDataset(demo.tokenizer, **arguments, num_samples=24)
    texts = [sample["text"] for sample in dataset.samples]
    assert len(set(texts[:12])) == len(set(texts[12:])) == 12
    assert all(text[-1] == text[0] for text in texts)  # [A] was put at the end
    pairs = IOIDataset(demo.tokenizer, **arguments, num_samples=12, symmetric=True)
    for one, other in zip(pairs.samples[::2], pairs.samples[1::2], strict=True):
        assert (one["IO"], one["S"]) == (other["S"], other["IO"])
        io, s = one["IO"].strip(), one["S"].strip()
        assert other["text"] == one["text"].translate(str.maketrans(io + s, s + io))
    assert len({sample["text"] for sample in pairs.samples}) == 12


def metaspace_tokenizer():
    """Spells a leading space as SentencePiece does, so that " Mary" alone is other tokens."""
    words = [f"▁{word}" for word in ["Mary", "John", "and", "met.", "to"]]
    backend = Tokenizer(
        models.WordLevel({w: i for i, w in enumerate(["<s>", "?", "▁", *words])}, unk_token="?")
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="?", bos_token="<s>")


@pytest.mark.parametrize("make", [metaspace_tokenizer, lambda: word_tokenizer(adds_bos=True)])
@pytest.mark.parametrize("prepend_bos", [True, False])
def test_the_prompt_ends_with_the_tokens_of_the_answer(make, prepend_bos):
    tokenizer = make()
    dataset = IOIDataset(
        tokenizer, ["[A] and [B] went to [B] and [A]"], ["Mary", "John"],
        num_samples=2, prepend_bos=prepend_bos,
    )  # fmt: skip
    for item, sample in zip(dataset, dataset.samples, strict=False):
        prompt = item["prompt"].tolist()
        assert (prompt[0] == tokenizer.bos_token_id) == prepend_bos
        assert prompt.count(tokenizer.bos_token_id) == prepend_bos
        assert len(prompt) == 8 + prepend_bos
        assert prompt[-1:] == item["IO"].tolist()
        assert prompt[-3:-2] == item["S"].tolist()
        assert tokenizer.convert_ids_to_tokens(item["IO"])[0].endswith(sample["IO"].strip())


def test_the_demo_model_knows_indirect_objects(demo):
    dataset = IOIDataset(demo.tokenizer, DEMO_TEMPLATES, DEMO_NAMES, num_samples=100)
    scores = ioi_eval(demo, dataset)
    assert scores["Accuracy"] > 0.95
    assert scores["Logit Difference"] > 3.0
    names = ["Mary", "John", "cat", "dog", "mat", "store"]
    untrained = IOIDataset(word_tokenizer(), DEMO_TEMPLATES, names, num_samples=50)
    assert 0.2 < ioi_eval(hooked("gpt2-base"), untrained)["Accuracy"] < 0.8


def test_the_default_dataset_is_made_from_the_arguments(demo):
    scores = ioi_eval(demo, num_samples=40, symmetric=True)
    dataset = IOIDataset(demo.tokenizer, num_samples=40, symmetric=True)
    assert ioi_eval(demo, dataset) == scores
    assert scores["Accuracy"] > 0.9


def test_scores_are_those_of_every_prompt_alone(demo, demo_hf):
    """Names of several tokens, some with the same beginning, in prompts of different length."""
    dataset = IOIDataset(
        demo.tokenizer, DEMO_TEMPLATES, ["Xavier", "Xaver", "Jo", "Mary"],
        {"LOCATION": ["school", "big old school"], "OBJECT": ["ring", "cup of tea"]},
        num_samples=40,
    )  # fmt: skip
    differences = []
    for sample in dataset.samples:
        before = sample["text"].removesuffix(sample["IO"])
        io, s = ([2159, *demo.tokenizer.encode(before + sample[x])] for x in ("IO", "S"))
        split = next(i for i, (a, b) in enumerate(zip(io, s, strict=False)) if a != b)
        with torch.no_grad():
            logits = demo_hf(torch.tensor([io[:split]])).logits[0, -1]
        differences.append(float(logits[io[split]] - logits[s[split]]))
    scores = ioi_eval(demo, dataset, batch_size=7)
    assert scores["Logit Difference"] == pytest.approx(sum(differences) / 40, abs=1e-4)
    assert scores["Accuracy"] == sum(d > 0 for d in differences) / 40
    # The same items without the answer at the end of the prompt.
    tokens = [demo.tokenizer.encode(f" {name}") for name in ("John", "Mary")]
    prompt = [2159, *demo.tokenizer.encode("When John and Mary went to the school, John said to")]
    item = {"IO": torch.tensor(tokens[1]), "S": torch.tensor(tokens[0])}
    with_answer = ioi_eval(demo, [item | {"prompt": torch.tensor(prompt + tokens[1])}])
    assert ioi_eval(demo, [item | {"prompt": torch.tensor(prompt)}]) == with_answer


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"templates": ["[A] met [B]"]}, None),
        ({"templates": ["[A] met nobody"]}, r"needs \[A\] and \[B\]"),
        ({"templates": ["[A] met [B]. [B] gave it to [A]."]}, "at the very end"),
        ({"templates": ["[A] met [B] at the [PLACE], [B] saw"]}, r"no nouns for \['PLACE'\]"),
        ({"templates": []}, "are needed"),
        ({"names": ["Mary", "Mary"]}, "two names"),
        ({"nouns": {"OBJECT": []}}, "are needed"),
        ({"num_samples": 0}, "1 or more"),
        ({"num_samples": 3, "symmetric": True}, "even"),
    ],
)
def test_what_makes_no_samples_is_refused(demo, options, message):
    if message is None:
        IOIDataset(demo.tokenizer, **options)
        return
    with pytest.raises(InputError, match=message):
        IOIDataset(demo.tokenizer, **options)


@pytest.mark.parametrize(
    ("prompt", "io", "s", "message"),
    [
        ([1, 5], [5], [5, 6], "one is the beginning of the other"),
        ([1, 2], [5, 6], [5, 7], "must end with IO"),
    ],
)
def test_items_that_leave_unclear_where_to_read_are_refused(model, prompt, io, s, message):
    item = {"prompt": prompt, "IO": io, "S": s}
    with pytest.raises(InputError, match=message):
        ioi_eval(model, [{name: torch.tensor(ids) for name, ids in item.items()}])
    with pytest.raises(InputError, match="empty"):
        ioi_eval(model, [])


# Multiple choice ----------------------------------------------------------------------------------


def questions_of(n=8):
    rng = random.Random(0)
    words = "dog cat book ring tea milk".split()
    return [
        {
            "question": f"Which of these is a {rng.choice(words)}?",
            "choices": rng.sample(words, 2 + i % 3),
            "answer": 0,
            "subject": ["high_school_pets", "drinks"][i % 2],
        }
        for i in range(n)
    ]


@pytest.mark.parametrize("batch_size", [1, 3])
def test_mmlu_picks_the_letter_with_the_largest_logit(demo, demo_hf, batch_size):
    questions, guesses = questions_of(), []
    for question in questions:
        text = "The following are multiple choice questions (with answers) about "
        text += question["subject"].replace("_", " ") + ".\n\n" + question["question"] + "\n"
        text += "".join(f"{x}. {c}\n" for x, c in zip("ABCD", question["choices"], strict=False))
        row = [2159, *demo.tokenizer.encode(text + "Answer:")]
        letters = [demo.tokenizer.encode(f" {x}")[0] for x in "ABCD"[: len(question["choices"])]]
        with torch.no_grad():
            guesses.append(int(demo_hf(torch.tensor([row])).logits[0, -1, letters].argmax()))
    for i, question in enumerate(questions):
        question["answer"] = guesses[i] if i < 5 else (guesses[i] + 1) % len(question["choices"])
    scores = mmlu_eval(demo, questions=questions, batch_size=batch_size)
    assert scores == {
        "accuracy": 5 / 8,
        "num_correct": 5,
        "num_total": 8,
        "subject_scores": {"high_school_pets": 3 / 4, "drinks": 2 / 4},
    }


def test_malformed_questions_are_refused_before_the_model_runs(demo, forward_inputs):
    good = questions_of(1)[0]
    for change, message in [
        ({"answer": 2}, "index of one of"),
        ({"answer": "A"}, "index of one of"),
        ({"choices": ["dog"]}, "index of one of"),
        ({"question": "word " * 300}, "longer than the 256 tokens"),
    ]:
        with pytest.raises(InputError, match=message):
            mmlu_eval(demo, questions=[good, good | change])
    with pytest.raises(InputError, match=r"needs \['answer'\]"):
        mmlu_eval(demo, questions=[{"question": "?", "choices": ["a", "b"]}])
    with pytest.raises(InputError, match="no questions"):
        mmlu_eval(demo, questions=[])
    with pytest.raises(TokenizerError, match="tokenizer"):
        mmlu_eval(hookedlm.load(hf("gpt2-base")), questions=[good])
    assert forward_inputs == []


# From the hub -------------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch):
    """A stand-in for the datasets library; what it was asked for, and what it answers."""
    asked: list = []
    answers: dict = {}

    def load_dataset(*path, split):
        asked.append((*path, split))
        if path not in answers:
            raise ConnectionError("no route to the hub")
        return answers[path]

    fake = types.ModuleType("datasets")
    monkeypatch.setattr(fake, "load_dataset", load_dataset, raising=False)
    monkeypatch.setitem(sys.modules, "datasets", fake)
    return asked, answers


def test_mmlu_questions_are_chosen_by_subject(demo, hub):
    asked, answers = hub
    answers["cais/mmlu", "all"] = questions_of(8)
    assert len(evals.make_mmlu_data_loader()) == 8
    drinks = evals.make_mmlu_data_loader("drinks", split="dev", num_samples=3)
    assert drinks == questions_of(8)[1:6:2]
    assert asked == [("cais/mmlu", "all", "test"), ("cais/mmlu", "all", "dev")]
    with pytest.raises(InputError, match=r"no subjects \['law'\]; it has \['drinks'"):
        evals.make_mmlu_data_loader(["drinks", "law"])
    assert mmlu_eval(demo, subjects=["drinks"], num_samples=2)["num_total"] == 2


def test_offline_and_without_the_library_the_reason_is_said(hub, monkeypatch):
    with pytest.raises(LoadError, match="cais/mmlu is neither cached nor reachable"):
        evals.make_mmlu_data_loader()
    imported = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "datasets":
            raise ImportError(name)
        return imported(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    for make in evals.DATA_LOADERS.values():
        with pytest.raises(ImportError, match="pip install datasets"):
            make(word_tokenizer())


CORPORA = {
    "wiki": (("Salesforce/wikitext", "wikitext-2-v1"), "text"),
    "owt": (("stas/openwebtext-10k",), "text"),
    "pile": (("NeelNanda/pile-10k",), "text"),
    "code": (("codeparrot/codeparrot-valid-v2-near-dedup",), "content"),
}


def test_evaluate_is_the_loss_on_each_corpus(model, hub, monkeypatch):
    asked, answers = hub
    generator = torch.Generator().manual_seed(0)
    for path, column in CORPORA.values():
        answers[path] = (column, torch.randint(3, 96, (9, 16), generator=generator))

    def tokenized(dataset, tokenizer, max_length, column_name):
        assert tokenizer is model.tokenizer
        assert max_length == 64  # the model's context
        column, rows = dataset
        assert column == column_name
        return [{"tokens": row} for row in rows]

    monkeypatch.setattr(evals.corpora, "tokenize_and_concatenate", tokenized)
    before = torch.get_rng_state()
    losses = evals.evaluate(model, batch_size=3)
    assert torch.equal(torch.get_rng_state(), before)
    assert list(losses) == ["wiki_loss", "owt_loss", "pile_loss", "code_loss"]
    for name, (path, _) in CORPORA.items():
        rows = answers[path][1]
        expected = torch.stack([hf_losses(hf("gpt2-base"), row) for row in rows]).mean()
        assert losses[f"{name}_loss"] == pytest.approx(float(expected), rel=1e-5)
    assert asked == [(*path, "train") for path, _ in CORPORA.values()]


def test_truncate_counts_batches_and_every_token_is_real(model):
    # 0 is the pad token: a row that ends with it has no padding nevertheless.
    batches = [{"tokens": torch.tensor([[5, 6, 7 + i, 0, 0], [9, 8, 7, 6, 5]])} for i in range(4)]
    each = [
        torch.stack([hf_losses(hf("gpt2-base"), row) for row in batch["tokens"]]).mean()
        for batch in batches
    ]
    for truncate, n in [(3, 3), (None, 4), (100, 4)]:
        loss = evals.evaluate_on_dataset(model, batches, truncate=truncate, device="cpu")
        assert loss == pytest.approx(float(sum(each[:n]) / n), rel=1e-5)
    with pytest.raises(InputError, match="no batch"):
        evals.evaluate_on_dataset(model, batches, truncate=0)
