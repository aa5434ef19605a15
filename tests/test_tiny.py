"""The tiny models and the Hugging Face helpers that every parity test rests on."""

from __future__ import annotations

import functools
from collections import Counter

import pytest
import torch
from hf_truth import (
    block_list,
    block_outputs,
    greedy,
    logits_of,
    padded_batch,
    position_ids,
    zero_block_input,
)
from tiny import LAYERS, TINIES, VOCAB, Tiny, one_per_family, tinies
from transformers import PreTrainedModel

LENGTHS = [12, 7, 5]  # of the rows of a padded batch; all longer than any sliding window

# Variants for which a row in a padded batch does not get the logits it gets alone, and why.
# Right padding behaves the same. (Longrope variants belong here too once a batch mixes rows on
# both sides of the original maximum, which LENGTHS does not. And in every family the logits at
# padding itself are arbitrary: they differ between attention implementations.)
PADDING_MATTERS = {
    "llama-rope_dynamic": "frequencies follow the longest row of the batch",
}

every_tiny = pytest.mark.parametrize("tiny", TINIES, ids=lambda tiny: tiny.id)
each_family = pytest.mark.parametrize("tiny", one_per_family(), ids=lambda tiny: tiny.id)


@functools.cache
def built(tiny: Tiny) -> PreTrainedModel:
    """The model of a variant, for tests that leave it as it is."""
    return tiny.build()


def tokens(seed: int = 0, length: int = 12) -> torch.Tensor:
    return padded_batch(VOCAB, [length], "left", seed=seed)[0]


def test_table():
    ids = [tiny.id for tiny in TINIES]
    assert len(set(ids)) == len(ids)
    counts = Counter(tiny.model_type for tiny in TINIES)
    assert len(counts) == 28
    assert min(counts.values()) >= 3
    assert [tiny.model_type for tiny in one_per_family()] == list(counts)
    assert {tiny.model_type for tiny in tinies("llama", "gpt2")} == {"llama", "gpt2"}
    with pytest.raises(KeyError, match="lama"):
        tinies("lama")


@every_tiny
def test_build(tiny: Tiny):
    before = torch.get_rng_state()
    model = tiny.build()
    assert torch.equal(torch.get_rng_state(), before)
    assert not model.training
    assert model.config.model_type == tiny.model_type
    assert len(block_list(model)) == model.config.num_hidden_layers >= LAYERS

    # Every parameter varies: no norm is all ones, no bias all zeros.
    for name, parameter in model.named_parameters():
        assert parameter.std() > 0.05, name

    logits = logits_of(model, tokens())
    assert logits.shape == (1, 12, VOCAB)
    assert logits.isfinite().all()
    assert 0.05 < logits.std() < 50

    # The same seed gives the same model, another seed another one.
    again = tiny.build().state_dict()
    assert all(torch.equal(value, again[name]) for name, value in model.state_dict().items())
    assert not torch.allclose(logits, logits_of(tiny.build(seed=1), tokens()))


@each_family
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_build_dtype(tiny: Tiny, dtype: torch.dtype):
    model = tiny.build(dtype)
    exact = tiny.build().state_dict()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, exact[name].to(dtype)), name
    assert logits_of(model, tokens()).dtype == dtype


@pytest.mark.parametrize(
    "tiny", [tiny for tiny in TINIES if tiny not in one_per_family()], ids=lambda tiny: tiny.id
)
def test_variant_differs_from_first(tiny: Tiny):
    first, model = built(tinies(tiny.model_type)[0]), built(tiny)

    def shapes(m):
        return {name: value.shape for name, value in m.state_dict().items()}

    if shapes(model) == shapes(first):
        assert (logits_of(model, tokens()) - logits_of(first, tokens())).abs().max() > 1e-3


@every_tiny
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_match_rows_alone(tiny: Tiny, side: str):
    model = built(tiny)
    input_ids, mask = padded_batch(VOCAB, LENGTHS, side, seed=1)
    logits = logits_of(model, input_ids, mask)
    assert logits.isfinite().all()
    errors = []
    for row, row_mask, row_logits in zip(input_ids, mask.bool(), logits, strict=True):
        alone = logits_of(model, row[row_mask][None])[0]
        errors.append((row_logits[row_mask] - alone).abs().max().item())
    if tiny.id in PADDING_MATTERS:
        assert max(errors) > 1e-2
    else:
        assert max(errors) < 1e-4


@every_tiny
def test_block_outputs(tiny: Tiny):
    model = built(tiny)
    input_ids, mask = padded_batch(VOCAB, LENGTHS, "left", seed=1)
    entering, leaving, logits = block_outputs(model, input_ids, mask)
    blocks = len(block_list(model))
    assert len(entering) == len(leaving) == blocks
    for left, entered in zip(leaving[:-1], entering[1:], strict=True):
        assert torch.equal(left, entered)
    for before, after in zip(entering, leaving, strict=True):
        assert before.shape == after.shape == (3, 12, model.config.hidden_size)
        assert not torch.allclose(before, after)
    assert torch.equal(logits, logits_of(model, input_ids, mask))


@every_tiny
def test_zero_block_input(tiny: Tiny):
    model = built(tiny)
    for layer in range(len(block_list(model))):
        zeroed = zero_block_input(model, layer, tokens(seed=0))
        # With its input zeroed, a block cannot know which tokens the model was given.
        assert torch.equal(zeroed, zero_block_input(model, layer, tokens(seed=1)))
        assert not torch.allclose(zeroed, logits_of(model, tokens(seed=0)))


@every_tiny
def test_greedy(tiny: Tiny):
    model = built(tiny)
    input_ids, mask = padded_batch(VOCAB, LENGTHS, "left", seed=1)
    new = greedy(model, input_ids, mask, 4)
    assert new.shape == (3, 4)
    assert model.generation_config.eos_token_id == 2  # restored
    if tiny.id in PADDING_MATTERS:
        return  # cached keys keep the frequencies of an earlier length
    for step in range(4):
        logits = logits_of(model, input_ids, mask)
        chosen = logits[:, -1].argmax(-1, keepdim=True)
        assert torch.equal(new[:, step : step + 1], chosen)
        input_ids = torch.cat([input_ids, chosen], dim=1)
        mask = torch.cat([mask, torch.ones_like(chosen)], dim=1)


def test_greedy_goes_past_end_of_sequence():
    model = tinies("llama")[0].build()
    model.lm_head = torch.nn.Linear(model.config.hidden_size, VOCAB)
    with torch.no_grad():  # a head that always prefers the end-of-sequence token
        model.lm_head.weight.zero_()
        model.lm_head.bias.zero_()[2] = 1
    assert greedy(model, tokens(), None, 3).tolist() == [[2, 2, 2]]


def test_dynamic_rope_does_not_remember():
    (tiny,) = [tiny for tiny in TINIES if tiny.id == "llama-rope_dynamic"]
    model = tiny.build()
    first = logits_of(model, tokens(length=10))
    logits_of(model, tokens(length=40))
    assert torch.equal(logits_of(model, tokens(length=10)), first)


def test_padded_batch():
    input_ids, mask = padded_batch(8, [3, 1], "left", pad_id=5, seed=0)
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1]]
    assert torch.equal(input_ids == 5, mask == 0)
    assert input_ids.max() < 8
    right, right_mask = padded_batch(8, [3, 1], "right", pad_id=5, seed=0)
    assert right_mask.tolist() == [[1, 1, 1], [1, 0, 0]]
    assert torch.equal(right[right_mask == 1], input_ids[mask == 1])
    with pytest.raises(ValueError, match="side"):
        padded_batch(8, [1], "top")


def test_position_ids():
    assert position_ids(torch.tensor([[0, 0, 1, 1, 1]])).tolist() == [[0, 0, 0, 1, 2]]
    assert position_ids(torch.tensor([[1, 1, 1, 0, 0]])).tolist() == [[0, 1, 2, 0, 0]]
