"""TransformerLens' key-value cache over transformers' own."""

from __future__ import annotations

import copy
from functools import cache

import pytest
import torch
from conftest import hf, hooked
from hf_truth import logits_of, padded_batch
from tiny import VOCAB
from torch import Tensor
from transformers import Cache, DynamicCache

import hookedlm
from hookedlm import HookedTransformer
from hookedlm.errors import InputError
from hookedlm.past_key_values import (
    HookedTransformerKeyValueCache,
    HookedTransformerKeyValueCacheEntry,
)

NAMES = [
    "gpt2-base",
    "llama-grouped",
    "gemma2-base",
    "granite-multipliers",
    "gpt_neox-parallel",
    "bloom-base",
    "falcon-multi_query",
]
TOKENS, MASK = padded_batch(VOCAB, [12, 7, 9], "left", seed=1)
every = pytest.mark.parametrize("name", NAMES)


def empty(model: HookedTransformer, rows: int = 3) -> HookedTransformerKeyValueCache:
    return HookedTransformerKeyValueCache.init_cache(model.cfg, model.device, rows)


@cache
def bare(name: str) -> HookedTransformer:
    """Without a tokenizer."""
    return hookedlm.load(hf(name))


def close(got: Tensor, expected: Tensor) -> bool:
    return bool((got - expected).abs().max() < 1e-4)


@every
@torch.no_grad()
def test_in_pieces_as_in_one(name: str):
    model, past = bare(name), empty(bare(name))
    assert model.tokenizer is None
    assert (past.get_seq_length(), len(past.entries)) == (0, 3)
    truth = logits_of(hf(name), TOKENS)
    for start, end in ((0, 5), (5, 6), (6, 12)):
        got = model(TOKENS[:, start:end], past_kv_cache=past)
        assert close(got, truth[:, start:end])
        assert past.get_seq_length() == end
        assert torch.equal(past.previous_attention_mask, torch.ones(3, end, dtype=torch.long))


@every
@torch.no_grad()
def test_padding_is_remembered(name: str):
    """The first piece says what is padding; later pieces need not."""
    model, past = bare(name), empty(bare(name))
    truth, real = logits_of(hf(name), TOKENS, MASK), MASK.bool()
    model(TOKENS[:, :6], attention_mask=MASK[:, :6], past_kv_cache=past)
    assert torch.equal(past.previous_attention_mask, MASK[:, :6])
    assert close(model(TOKENS[:, 6:8], past_kv_cache=past), truth[:, 6:8])
    got = model(TOKENS[:, 8:], attention_mask=MASK, past_kv_cache=past)  # of all positions
    assert close(got[real[:, 8:]], truth[:, 8:][real[:, 8:]])
    assert torch.equal(past.previous_attention_mask, MASK)


@every
@torch.no_grad()
def test_frozen_is_read_and_not_written(name: str):
    model, past = bare(name), empty(bare(name))
    truth = logits_of(hf(name), TOKENS, MASK)
    model(TOKENS[:, :6], attention_mask=MASK[:, :6], past_kv_cache=past)
    past.freeze()
    assert past.frozen
    keys = past[1].past_keys.clone()
    for _ in range(2):
        assert close(model(TOKENS[:, 6:9], past_kv_cache=past), truth[:, 6:9])
    other = TOKENS.clone()
    other[:, 6:] = (TOKENS[:, 6:] + 1) % VOCAB
    got = model(other[:, 6:], past_kv_cache=past)
    assert close(got, logits_of(hf(name), other, MASK)[:, 6:])
    assert torch.equal(past[1].past_keys, keys)
    assert torch.equal(past.previous_attention_mask, MASK[:, :6])
    past.unfreeze()
    assert not past.frozen
    model(TOKENS[:, 6:9], past_kv_cache=past)
    assert past.get_seq_length() == 9
    assert close(model(TOKENS[:, 9:], past_kv_cache=past), truth[:, 9:])


@torch.no_grad()
def test_embedding_first_remembers_padding_once():
    """`input_to_embed` and then the blocks: the mask is longer than the keys in between."""
    model, past = bare("gpt2-base"), empty(bare("gpt2-base"))
    truth = logits_of(hf("gpt2-base"), TOKENS, MASK)
    model(TOKENS[:, :6], attention_mask=MASK[:, :6], past_kv_cache=past)
    stream, tokens, _, _ = model.input_to_embed(TOKENS[:, 6:], past_kv_cache=past)
    got = model(stream, start_at_layer=0, tokens=tokens, past_kv_cache=past)
    assert close(got, truth[:, 6:])
    assert torch.equal(past.previous_attention_mask, MASK)


@torch.no_grad()
def test_toy_models_and_text():
    cfg = dict(n_layers=2, d_model=16, n_ctx=12, d_head=4, d_vocab=VOCAB, act_fn="gelu", seed=1)
    toy = HookedTransformer(cfg)
    past = empty(toy)
    toy(TOKENS[:, :5], past_kv_cache=past)
    assert close(toy(TOKENS[:, 5:], past_kv_cache=past), toy(TOKENS)[:, 5:])
    model = hooked("gpt2-base")
    past = empty(model, 2)
    texts = ["the cat sat", "the"]
    tokens, mask = model.to_tokens_and_mask(texts, padding_side="left")
    model(texts, padding_side="left", past_kv_cache=past)
    assert torch.equal(past.previous_attention_mask, mask)
    assert past.get_seq_length() == tokens.shape[1]


@torch.no_grad()
def test_keys_are_what_hooks_see():
    model = bare("llama-grouped")
    past = empty(model)
    _, seen = model.run_with_cache(TOKENS, past_kv_cache=past)
    for layer in range(3):
        entry = past[layer]
        assert entry.past_keys.shape == (3, 12, 2, 8)  # batch, pos, kv_head, d_head
        assert torch.equal(entry.past_keys, seen["rot_k", layer])
        assert torch.equal(entry.past_values, seen["v", layer])


def test_generation_takes_it():
    model = bare("gpt2-base")
    past = empty(model, 1)
    options = dict(max_new_tokens=4, do_sample=False, stop_at_eos=False)
    expected = model.generate(TOKENS[:1], **options)
    assert torch.equal(model.generate(TOKENS[:1], past_key_values=past, **options), expected)
    assert past.get_seq_length() == 15


# --- By itself -----------------------------------------------------------------------------------


def test_entries():
    cfg = bare("llama-grouped").cfg
    entry = HookedTransformerKeyValueCacheEntry.init_cache_entry(cfg, "cpu", 2)
    assert entry.past_keys.shape == entry.past_values.shape == (2, 0, 2, 8)
    k, v = torch.randn(2, 3, 2, 8), torch.randn(2, 3, 2, 8)
    all_k, all_v = entry.append(k, v)
    assert torch.equal(all_k, k)
    more = torch.randn(2, 1, 2, 8)
    all_k, all_v = entry.append(more, -more)
    assert torch.equal(all_k, torch.cat([k, more], dim=1))
    assert torch.equal(all_v, torch.cat([v, -more], dim=1))
    assert torch.equal(entry.past_values, all_v)
    entry.frozen = True
    all_k, _ = entry.append(more, more)
    assert all_k.shape == (2, 5, 2, 8)
    assert entry.past_keys.shape == (2, 4, 2, 8)
    assert repr(entry).endswith("(past_keys=(2, 4, 2, 8), frozen)")
    given = HookedTransformerKeyValueCacheEntry(k, v)
    assert torch.equal(given.past_keys, k)
    assert given.get_seq_length() == 3


def test_masks_are_appended():
    cfg = bare("llama-grouped").cfg
    past = HookedTransformerKeyValueCache.init_cache(cfg, "cpu", 2)
    assert isinstance(past, Cache)
    assert past.previous_attention_mask.shape == (2, 0)
    mask = torch.tensor([[0, 1], [1, 1]])
    assert torch.equal(past.append_attention_mask(mask), mask)
    entries = [
        HookedTransformerKeyValueCacheEntry(torch.zeros(2, 2, 2, 8), torch.zeros(2, 2, 2, 8))
        for _ in range(3)
    ]
    past = HookedTransformerKeyValueCache(entries, mask, frozen=True)
    assert past.entries == entries
    longer = past.append_attention_mask(torch.ones(2, 1, dtype=torch.long))
    assert longer.tolist() == [[0, 1, 1], [1, 1, 1]]
    assert torch.equal(past.previous_attention_mask, mask)
    past.unfreeze()
    assert torch.equal(past.append_attention_mask(longer[:, 2:]), longer)
    assert torch.equal(past.previous_attention_mask, longer)
    assert "3 layers, 2 rows, 2 positions" in repr(past)
    with pytest.raises(InputError, match="1 rows and the key-value cache is for 2"):
        past.append_attention_mask(mask[:1])


@torch.no_grad()
def test_a_copy_is_its_own():
    model = bare("gpt2-base")
    past = empty(model)
    model(TOKENS[:, :5], past_kv_cache=past)
    twin = copy.deepcopy(past)
    model(TOKENS[:, 5:], past_kv_cache=twin)
    assert (past.get_seq_length(), twin.get_seq_length()) == (5, 12)


# --- Refused -------------------------------------------------------------------------------------


def test_other_rows():
    model = bare("gpt2-base")
    with pytest.raises(InputError, match=r"3 rows and the key-value cache is for 2.*batch_size=3"):
        model(TOKENS, past_kv_cache=empty(model, 2))
    past = empty(model)
    model(TOKENS[:, :5], past_kv_cache=past)
    with pytest.raises(InputError, match="1 rows"):
        model(TOKENS[:1, 5:], past_kv_cache=past)
    assert past.get_seq_length() == 5


def test_a_pass_that_did_not_run_all_layers():
    """Half the layers know more positions than the others: to go on would be wrong."""
    model = bare("gpt2-base")
    past = empty(model)
    model(TOKENS[:, :5], past_kv_cache=past)
    model(TOKENS[:, 5:8], past_kv_cache=past, stop_at_layer=1)
    with pytest.raises(InputError, match=r"hold \[5, 8\] positions"):
        model(TOKENS[:, 8:], past_kv_cache=past)


def test_no_cache_at_all():
    model = bare("gpt2-base")
    assert model.get_pos_offset(None, 3) == 0
    past = empty(model)
    model(TOKENS[:, :5], past_kv_cache=past)
    assert model.get_pos_offset(past, 3) == 5
    assert model.get_pos_offset(DynamicCache(), 3) == 0
    with pytest.raises(InputError, match="past_kv_cache is list"):
        model.get_pos_offset([], 3)
