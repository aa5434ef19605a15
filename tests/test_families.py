"""Every family, every tiny configuration, beside plain Hugging Face: the definition of support."""

from __future__ import annotations

import warnings

import hf_truth
import pytest
import torch
from side_by_side import batch, both, error, real
from tiny import TINIES, Tiny, one_per_family, tinies
from transformers import DynamicCache

import hookedlm

# Types, or configurations, not every padded run of which is bit-identical; test_parity.py has the
# exact table.
NOT_EXACT = {
    "gpt2": "its GELU is eight operations; in float32 here it is one kernel",
    "gpt_neox-default_rotary": "its GELU is eight operations; in float32 here it is one kernel",
    "phi": "its GELU is eight operations; in float32 here it is one kernel",
    "gpt_neo": "Hugging Face attends longhand, in float32; here the kernel is fused",
    "gptj": "Hugging Face attends longhand, in float32; here the kernel is fused",
    "bloom": "Hugging Face adds ALiBi inside baddbmm; here the kernel is fused",
    "mpt": "Hugging Face attends longhand; here the kernel is fused",
    "falcon": "its linear layers multiply, then add the bias; here that is one operation, and "
    "shared keys are not repeated before the kernel",
    "phi3": "gate and linear branch are one multiplication there and two here",
    "gemma2": "without a softcap the kernel is fused here; Hugging Face stays longhand",
    "gpt_oss": "experts multiply padding and real tokens in one batch, and padding differs",
    "qwen3_moe": "experts multiply padding and real tokens in one batch, and padding differs",
}
TOLERANCE = 1e-5


def is_exact(tiny: Tiny) -> bool:
    return not {tiny.model_type, tiny.id} & set(NOT_EXACT)


# A rope that stretches with the longest row of a batch is not a function of one row alone.
ROWS_INTERACT = {"llama-rope_dynamic"}

every = pytest.mark.parametrize("tiny", TINIES, ids=lambda tiny: tiny.id)
each_family = pytest.mark.parametrize("tiny", one_per_family(), ids=lambda tiny: tiny.id)


@every
@pytest.mark.parametrize("side", [None, "left", "right"])
@torch.no_grad()
def test_logits_and_every_stream(tiny: Tiny, side: str | None):
    theirs, ours = both(tiny)
    tokens, mask = batch(side)
    inputs, outputs, logits = hf_truth.block_outputs(theirs, tokens, mask)
    got, cache = ours.run_with_cache(tokens, attention_mask=mask)
    if not is_exact(tiny):
        assert error(real(got, mask), real(logits, mask)) <= TOLERANCE
    else:
        assert torch.equal(real(got, mask), real(logits, mask))
    for layer, (before, after) in enumerate(zip(inputs, outputs, strict=True)):
        for point, expected in (("pre", before), ("post", after)):
            x = real(cache[f"resid_{point}", layer], mask)
            assert error(x, real(expected, mask)) <= TOLERANCE, (layer, point)


@every
@torch.no_grad()
def test_with_everything_listened_to(tiny: Tiny):
    theirs, ours = both(tiny)
    tokens, mask = batch("left")
    expected = hf_truth.logits_of(theirs, tokens, mask)
    names = list(ours.hook_dict)
    got, live = ours.run_with_cache(tokens, attention_mask=mask, names_filter=names)
    assert set(live) == set(names)
    assert error(real(got, mask), real(expected, mask)) <= TOLERANCE


@every
@torch.no_grad()
def test_embeddings_sum_to_the_stream(tiny: Tiny):
    _, ours = both(tiny)
    tokens, _ = batch(None)
    _, cache = ours.run_with_cache(tokens)
    stream = cache["hook_embed"]
    if "hook_pos_embed" in cache:
        stream = stream + cache["hook_pos_embed"]
    assert torch.equal(stream, cache["resid_pre", 0])


@every
@torch.no_grad()
def test_zeroing_a_stream_is_the_same_edit(tiny: Tiny):
    theirs, ours = both(tiny)
    tokens, mask = batch("left")
    expected = hf_truth.zero_block_input(theirs, 1, tokens, mask)

    def zero(resid_pre, hook):
        resid_pre[:] = 0.0

    got = ours.run_with_hooks(
        tokens, attention_mask=mask, fwd_hooks=[("blocks.1.hook_resid_pre", zero)]
    )
    assert error(real(got, mask), real(expected, mask)) <= TOLERANCE
    assert error(real(got, mask), real(ours(tokens, attention_mask=mask), mask)) > 1e-3


@every
def test_generation_token_by_token(tiny: Tiny):
    theirs, ours = both(tiny)
    tokens = batch(None)[0][:, -6:]  # padded prompts: test_parity.py
    expected = hf_truth.greedy(theirs, tokens, torch.ones_like(tokens), 6)
    for cached in (True, False):
        if not cached and tiny.id in ROWS_INTERACT:
            continue  # cached keys keep the frequencies they were rotated with
        got = ours.generate(
            tokens,
            max_new_tokens=6,
            do_sample=False,
            stop_at_eos=False,
            use_past_kv_cache=cached,
        )
        assert torch.equal(got[:, -6:], expected[:, -6:]), f"cached={cached}"


@each_family
@torch.no_grad()
def test_steps_with_a_cache_are_the_whole(tiny: Tiny):
    theirs, ours = both(tiny)
    tokens, mask = batch("left")
    whole = ours(tokens, attention_mask=mask)
    cache = DynamicCache(config=theirs.config)
    pieces = [
        ours(tokens[:, a:b], attention_mask=mask[:, :b], past_kv_cache=cache)
        for a, b in ((0, 6), (6, 7), (7, 11))
    ]
    assert error(real(torch.cat(pieces, 1), mask), real(whole, mask)) <= TOLERANCE


@every
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_a_padded_row_is_the_row_alone(tiny: Tiny, side: str):
    if tiny.id in ROWS_INTERACT:
        return
    _, ours = both(tiny)
    tokens, mask = batch(side)
    together = ours(tokens, attention_mask=mask)
    losses = ours(tokens, attention_mask=mask, return_type="loss", loss_per_token=True)
    for row in range(tokens.shape[0]):
        there = mask[row].bool()
        alone = tokens[row, there][None]
        assert error(together[row, there], ours(alone)[0]) <= 2e-5
        expected = ours(alone, return_type="loss", loss_per_token=True)[0]
        counted = (mask[row, 1:] * mask[row, :-1]).bool()
        torch.testing.assert_close(losses[row, counted], expected, rtol=1e-4, atol=1e-4)


@each_family
@torch.no_grad()
def test_bfloat16(tiny: Tiny):
    theirs, ours = both(tiny, torch.bfloat16)
    tokens, mask = batch("left")
    expected = hf_truth.logits_of(theirs, tokens, mask)
    got = ours(tokens, attention_mask=mask)
    assert got.dtype is expected.dtype
    assert error(real(got, mask).float(), real(expected, mask).float()) < 3e-2
    if is_exact(tiny):
        assert torch.equal(real(got, mask), real(expected, mask))


@pytest.mark.parametrize(
    "tiny",
    tinies("mixtral", "qwen3_moe", "olmoe", "gpt_oss", "llama", "gemma2"),
    ids=lambda tiny: tiny.id,
)
def test_rounding_wraps_nothing(tiny: Tiny):
    """A router's near ties fall either way in half precision; its block is uniform all the same."""
    _, ours = both(tiny, torch.bfloat16)
    assert ours.fidelity().opaque_parts == []


@each_family
@torch.no_grad()
def test_the_module_handed_in_stays_as_it_was(tiny: Tiny):
    theirs = tiny.build()
    tokens, mask = batch("right")
    before = {name: x.clone() for name, x in theirs.state_dict().items()}
    logits = hf_truth.logits_of(theirs, tokens, mask)
    modules = {name: type(module) for name, module in theirs.named_modules()}
    ours = hookedlm.load(theirs)

    def fail(x, hook):
        raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        ours.run_with_hooks(tokens, fwd_hooks=[("blocks.1.hook_resid_pre", fail)])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what does not apply to a family
        ours.process_weights_()
    assert {name: type(module) for name, module in theirs.named_modules()} == modules
    assert all(torch.equal(x, before[name]) for name, x in theirs.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in theirs.modules())
    assert torch.equal(hf_truth.logits_of(theirs, tokens, mask), logits)
