"""Scores beside loops over heads, queries and keys; heads of the demo model that are known."""

from __future__ import annotations

import pytest
import torch
from conftest import hf, hooked, word_tokenizer
from transformers import MambaConfig, MambaForCausalLM

import hookedlm
from hookedlm import head_detector
from hookedlm.errors import HookNameError, InputError
from hookedlm.head_detector import (
    HEAD_NAMES,
    compute_head_attention_similarity_score,
    detect_head,
    get_supported_heads,
)

TEXT = "the cat sat on the cat sat on a a mat"
ROW = [7, 8, 9, 7, 8, 8]


def looked_for(name, ids, query, key):
    """The definition of each head, for one query and key."""
    if name == "previous_token_head":
        return key == query - 1
    if name == "duplicate_token_head":
        return key < query and ids[key] == ids[query]
    return 1 <= key <= query and ids[key - 1] == ids[query]


def by_hand(pattern, ids, name, measure, exclude_bos, exclude_current_token):
    """The score of one head, an entry at a time; ``pattern`` is [pos, key_pos]."""
    on_pattern = everything = difference = 0.0
    for query in range(len(ids)):
        for key in range(query + 1):
            if (exclude_bos and key == 0) or (exclude_current_token and key == query):
                continue
            attention, wanted = float(pattern[query, key]), looked_for(name, ids, query, key)
            everything += attention
            on_pattern += attention * wanted
            difference += abs(attention - wanted)
    return on_pattern / everything if measure == "mul" else 1 - difference / len(ids)


@pytest.fixture(scope="module")
def demo():
    return hookedlm.load_demo()


def hf_patterns(name, ids):
    """[layer][head, query, key] from Hugging Face."""
    model = hf(name)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        out = model(torch.tensor([ids]), output_attentions=True)
    model.set_attn_implementation("sdpa")
    return [layer[0] for layer in out.attentions]


# The patterns -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", HEAD_NAMES)
@pytest.mark.parametrize("one_row", [False, True])
def test_detection_patterns_are_their_definitions(name, one_row):
    make = vars(head_detector)[f"get_{name}_detection_pattern"]
    pattern = make(torch.tensor([ROW] if one_row else ROW))
    n = len(ROW)
    assert pattern.shape == (n, n)
    for query in range(n):
        for key in range(n):
            wanted = key <= query and looked_for(name, ROW, query, key)
            assert pattern[query, key] == wanted, (query, key)
    with pytest.raises(InputError, match="one sequence at a time"):
        make(torch.tensor([ROW, ROW]))


def test_supported_heads_are_returned():
    assert get_supported_heads() == HEAD_NAMES


# Scores -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("measure", ["mul", "abs"])
@pytest.mark.parametrize("excluded", [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize("name", HEAD_NAMES)
@pytest.mark.parametrize("family", ["gpt2-base", "llama-grouped"])
def test_every_head_of_every_layer(family, name, excluded, measure):
    model = hooked(family)
    ids = model.to_tokens(TEXT)[0].tolist()
    options = {"exclude_bos": excluded[0], "exclude_current_token": excluded[1]}
    scores = detect_head(model, TEXT, name, error_measure=measure, **options)
    patterns = hf_patterns(family, ids)
    expected = [[by_hand(p, ids, name, measure, *excluded) for p in layer] for layer in patterns]
    torch.testing.assert_close(scores, torch.tensor(expected), rtol=1e-4, atol=1e-5)


def test_several_sequences_of_different_length_are_averaged():
    texts = [TEXT, "the cat the cat", "Mary went to Mary went"]
    options = {"exclude_bos": True, "error_measure": "abs", "heads": {1: [0, 2]}}
    for side in ("right", "left"):
        model = hookedlm.load(hf("llama-grouped"), tokenizer=word_tokenizer())
        model.set_tokenizer(word_tokenizer(), side)
        each = [detect_head(model, text, "induction_head", **options) for text in texts]
        together = detect_head(model, texts, "induction_head", **options)
        torch.testing.assert_close(together, torch.stack(each).mean(0), rtol=1e-4, atol=1e-5)
        _, cache = model.run_with_cache(texts)
        cached = detect_head(model, texts, "induction_head", cache=cache, **options)
        torch.testing.assert_close(cached, together, rtol=1e-4, atol=1e-5)


def test_tokens_and_a_pattern_of_ones_own(model):
    tokens = torch.tensor([ROW, ROW[::-1]])
    own = torch.eye(len(ROW))
    scores = detect_head(model, tokens, own)
    _, cache = model.run_with_cache(tokens)
    for layer in range(3):
        diagonal = cache["pattern", layer].diagonal(dim1=-2, dim2=-1).sum(-1) / len(ROW)
        torch.testing.assert_close(scores[layer], diagonal.mean(0))


def test_heads_that_were_not_asked_for_are_minus_one(model):
    every = detect_head(model, TEXT, "previous_token_head")
    for heads in ([(0, 1), (2, 3), (2, 0)], {0: [1], 2: [3, 0]}):
        some = detect_head(model, TEXT, "previous_token_head", heads=heads)
        asked = torch.zeros(3, 4, dtype=torch.bool)
        asked[[0, 2, 2], [1, 3, 0]] = True
        torch.testing.assert_close(some[asked], every[asked])
        assert (some[~asked] == -1).all()


def test_only_patterns_that_are_needed_are_recorded(model, monkeypatch):
    names = []
    run = type(model).run_with_cache

    def watched(self, *args, **kwargs):
        result = run(self, *args, **kwargs)
        names.append(list(result[1].keys()))
        return result

    monkeypatch.setattr(type(model), "run_with_cache", watched)
    detect_head(model, TEXT, "induction_head", heads=[(1, 0)])
    assert names == [["blocks.1.attn.hook_pattern"]]


# The caller's cache -------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_dim", [True, False])
@pytest.mark.parametrize("cache_object", [True, False])
def test_a_given_cache_is_used_and_left_alone(model, batch_dim, cache_object):
    _, cache = model.run_with_cache(
        TEXT, remove_batch_dim=not batch_dim, return_cache_object=cache_object
    )
    before = {name: x.clone() for name, x in cache.items()}
    options = {"exclude_bos": True, "exclude_current_token": True}
    for measure in ("mul", "abs"):
        given = detect_head(
            model, TEXT, "induction_head", cache=cache, error_measure=measure, **options
        )
        own = detect_head(model, TEXT, "induction_head", error_measure=measure, **options)
        torch.testing.assert_close(given, own)
    assert list(cache.keys()) == list(before)
    assert all(torch.equal(cache[name], x) for name, x in before.items())


def test_patterns_given_to_the_score_are_left_alone():
    attention, detection = torch.rand(4, 4).softmax(-1), torch.eye(4)
    before = attention.clone(), detection.clone()
    for measure in ("mul", "abs"):
        compute_head_attention_similarity_score(
            attention, detection, exclude_bos=True, exclude_current_token=True,
            error_measure=measure,
        )  # fmt: skip
    assert torch.equal(attention, before[0])
    assert torch.equal(detection, before[1])


def test_no_attention_left_scores_zero():
    to_bos = torch.zeros(4, 4)
    to_bos[:, 0] = 1.0
    options = {"exclude_current_token": False, "error_measure": "mul"}
    pattern = torch.eye(4)
    score = compute_head_attention_similarity_score(to_bos, pattern, exclude_bos=True, **options)
    assert score == 0.0
    assert (
        compute_head_attention_similarity_score(to_bos, pattern, exclude_bos=False, **options)
        == 0.25
    )


def test_another_inputs_cache_is_refused(model):
    _, cache = model.run_with_cache("the cat sat")
    with pytest.raises(InputError, match="made of another input"):
        detect_head(model, TEXT, "induction_head", cache=cache)
    _, some = model.run_with_cache(TEXT, names_filter="blocks.0.attn.hook_pattern")
    with pytest.raises(InputError, match=r"no 'blocks\.1\.attn\.hook_pattern'"):
        detect_head(model, TEXT, "induction_head", cache=some)


# What is refused ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"detection_pattern": "induction"}, "'previous_token_head', 'duplicate_token_head'"),
        ({"detection_pattern": torch.eye(3)}, r"expected \[6, 6\]"),
        ({"detection_pattern": torch.ones(6, 5)}, r"expected \[6, 6\]"),
        ({"detection_pattern": torch.ones(6, 6)}, "lower triangular"),
        ({"detection_pattern": -torch.eye(6)}, "from 0"),
        ({"detection_pattern": torch.eye(6) / 0.0}, "from 0"),
        ({"error_measure": "max"}, r"\('abs', 'mul'\)"),
        ({"heads": [(3, 0)]}, "layers are 0 to 2 and heads 0 to 3"),
        ({"heads": {0: [4]}}, "layers are 0 to 2 and heads 0 to 3"),
        ({"heads": [(-1, 0)]}, "layers are 0 to 2"),
        ({"seq": torch.tensor([5])}, "at least two"),
    ],
)
def test_bad_arguments_are_refused_before_the_model_runs(model, change, message, monkeypatch):
    monkeypatch.setattr(type(model), "forward", lambda *_, **__: pytest.fail("it ran"))
    given = {"seq": torch.tensor(ROW), "detection_pattern": "induction_head"} | change
    with pytest.raises(InputError, match=message):
        detect_head(model, **given)


def test_layers_without_patterns_stay_unmeasured_unless_named(model, monkeypatch):
    every = detect_head(model, TEXT, "induction_head")
    monkeypatch.delitem(model.hook_dict, "blocks.1.attn.hook_pattern")
    some = detect_head(model, TEXT, "induction_head")
    torch.testing.assert_close(some[[0, 2]], every[[0, 2]])
    assert (some[1] == -1).all()
    with pytest.raises(HookNameError, match=r"blocks\.1\.attn\.hook_pattern"):
        detect_head(model, TEXT, "induction_head", heads=[(1, 0)])


def test_a_model_without_attention_says_so():
    config = MambaConfig(vocab_size=96, hidden_size=16, state_size=4, num_hidden_layers=2)
    mamba = hookedlm.load(MambaForCausalLM(config).eval())
    with pytest.raises(HookNameError, match="as Hugging Face wrote it"):
        detect_head(mamba, torch.tensor(ROW), "induction_head")


# Heads of a trained model -------------------------------------------------------------------------


def repeated(model, n=8, length=20):
    ids = torch.randint(0, model.cfg.d_vocab - 1, (n, length))
    bos = torch.full((n, 1), model.tokenizer.bos_token_id)
    return torch.cat([bos, ids, ids], dim=1)


def test_the_demo_model_has_an_induction_head_that_matters(demo):
    """The head found is the one without which repeated tokens are no longer predicted."""
    tokens = repeated(demo)
    scores = detect_head(demo, tokens, "induction_head", exclude_bos=True)
    best = scores.argmax()
    assert scores.max() > 0.4

    def loss_without(layer, head):
        def ablate(z, hook):
            z = z.clone()
            z[:, :, head] = 0.0
            return z

        with torch.no_grad():
            losses = demo.run_with_hooks(
                tokens,
                return_type="loss",
                loss_per_token=True,
                fwd_hooks=[(f"blocks.{layer}.attn.hook_z", ablate)],
            )
        return losses[:, 21:].mean()

    later = {(i, h): float(loss_without(i, h)) for i in range(1, 4) for h in range(4)}
    by_damage = sorted(later, key=lambda place: -later[place])
    assert divmod(int(best), 4) in by_damage[:3], (scores, later)


def test_the_demo_model_has_a_previous_token_head_before_it(demo):
    tokens = repeated(demo)
    previous = detect_head(demo, tokens, "previous_token_head")
    induction = detect_head(demo, tokens, "induction_head", exclude_bos=True)
    assert previous.max() > 0.4
    assert int(previous.argmax()) // 4 < int(induction.argmax()) // 4
