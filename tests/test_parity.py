"""Which runs equal Hugging Face's in every bit, and why the others do not.

`test_families.py` holds every configuration to a tolerance. Here stands what is exact: per
configuration, dtype and side of padding, logits and every stream; and generation and key-value
caches on batches that are really padded.
"""

from __future__ import annotations

import hf_truth
import pytest
import torch
import torch.nn.functional as F
from side_by_side import batch, both, error, real
from tiny import TINIES, VOCAB, Tiny
from transformers import DynamicCache
from transformers.activations import NewGELUActivation
from transformers.models.falcon.modeling_falcon import FalconLinear
from transformers.models.phi3.modeling_phi3 import Phi3MLP

import hookedlm
from hookedlm.convert.check import positions_of
from hookedlm.layers import attention_math

# Configurations (or whole types) that differ in the last digits, by dtype, and why. Everything
# else is exact. `test_the_reasons_are_true` removes each reason and sees the difference go.
NO_REPEAT = "one key head goes into the kernel as it is there; here it is repeated first"
BIAS_LATER = "its linear layers round, then add the bias; here both are one operation"
LONGHAND = "Hugging Face attends longhand; here the kernel is fused"
BOTH_DTYPES = {
    "gpt_neo": LONGHAND,
    "gptj": f"{LONGHAND}, and scores are multiplied by the scale, not divided",
    "mpt": LONGHAND,
    "bloom-base": f"{LONGHAND}; ALiBi is added inside its baddbmm",
    "bloom-six_heads": f"{LONGHAND}; ALiBi is added inside its baddbmm",
    "bloom-untied": f"{LONGHAND}; ALiBi is added inside its baddbmm",
    "falcon-multi_query": NO_REPEAT,
    "falcon-alibi_six_heads": NO_REPEAT,
    "falcon-rope_linear": NO_REPEAT,
    "falcon-sequential": NO_REPEAT,
    "gemma2-no_softcaps": LONGHAND,
}
ONE_GELU = "its GELU is eight operations; in float32 here it is one kernel"
WITH_GELU_NEW = (
    "gpt2-base",
    "gpt2-unscaled",
    "gpt2-inverse_layer",
    "gpt2-upcast",
    "phi",
    "gpt_neox-default_rotary",
)
NOT_EXACT = {
    torch.float32: BOTH_DTYPES
    | dict.fromkeys(WITH_GELU_NEW, ONE_GELU)
    | {"phi3": "gate and linear branch are one multiplication there and two here"},
    torch.bfloat16: BOTH_DTYPES
    | dict.fromkeys(("falcon-full_heads", "falcon-new_biased"), BIAS_LATER)
    | {"falcon-alibi_sequential": BIAS_LATER},
}
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 3e-2}

# A rope that stretches with the longest prompt: cached keys keep the frequencies of their time.
STRETCHES = {"llama-rope_dynamic"}

every = pytest.mark.parametrize("tiny", TINIES, ids=lambda tiny: tiny.id)


def why_not_exact(tiny: Tiny, dtype: torch.dtype) -> str | None:
    reasons = NOT_EXACT[dtype]
    return reasons.get(tiny.id) or reasons.get(tiny.model_type)


# --- Bits ----------------------------------------------------------------------------------------


@every
@pytest.mark.parametrize("dtype", NOT_EXACT, ids=lambda dtype: str(dtype)[6:])
@torch.no_grad()
def test_logits_and_streams_to_the_bit(tiny: Tiny, dtype: torch.dtype, monkeypatch):
    # What stands at padding is arbitrary, but experts multiply padding and real tokens in one
    # batch, whose size rounds: so let Hugging Face's padding have the positions that ours has.
    monkeypatch.setattr(hf_truth, "position_ids", positions_of)
    theirs, ours = both(tiny, dtype)
    names = [f"blocks.{layer}.hook_resid_post" for layer in range(len(ours.blocks))]
    for side in (None, "left", "right"):
        tokens, mask = batch(side)
        _, outputs, logits = hf_truth.block_outputs(theirs, tokens, mask)
        got, cache = ours.run_with_cache(tokens, attention_mask=mask, names_filter=names)
        expected = dict(zip(names, outputs, strict=True)) | {"logits": logits}
        for name, x in ({name: cache[name] for name in names} | {"logits": got}).items():
            a, b = real(x, mask), real(expected[name], mask)
            if why_not_exact(tiny, dtype):
                assert error(a, b) < TOLERANCES[dtype], (side, name)
            else:
                assert torch.equal(a, b), (side, name, error(a, b))


@pytest.mark.parametrize("dtype", NOT_EXACT, ids=lambda dtype: str(dtype)[6:])
def test_the_table_names_what_exists(dtype: torch.dtype):
    known = {tiny.id for tiny in TINIES} | {tiny.model_type for tiny in TINIES}
    assert set(NOT_EXACT[dtype]) <= known


def divided(q, k, scale, bias=None, softcap=None):
    """Scores as GPT-J rounds them."""
    width = torch.tensor(q.shape[-1], dtype=torch.float32)
    return torch.matmul(q, k.transpose(-1, -2)) / width.sqrt()


def bias_inside(q, k, scale, bias=None, softcap=None):
    """Scores as BLOOM rounds them."""
    batch, heads, n_key = q.shape[0], q.shape[1], k.shape[2]
    bias = bias.expand(batch, heads, -1, n_key).flatten(0, 1)
    scores = torch.baddbmm(bias, q.flatten(0, 1), k.flatten(0, 1).mT, beta=1.0, alpha=scale)
    return scores.view(batch, heads, -1, n_key)


def one_key_head(q, k, v, mask, bias, scale, causal):
    """The kernel as Falcon calls it."""
    causal = causal and mask is None and q.shape[2] > 1
    mask = None if mask is None else mask[..., -q.shape[2] :, : k.shape[2]]
    z = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=scale)
    return z.transpose(1, 2)


def bias_at_once(self, x):
    return F.linear(x, self.weight, self.bias)


def two_multiplications(self, x):
    gate, up = self.gate_up_proj.weight.chunk(2)
    return self.down_proj(F.linear(x, up) * self.activation_fn(F.linear(x, gate)))


def one_kernel(self, x):
    """NewGELUActivation as we compute it."""
    return F.gelu(x, approximate="tanh")


def use_sdpa(theirs):
    """Let a type that says no to fused attention have it."""
    theirs.config._attn_implementation_internal = "sdpa"


# (configuration, dtype, whether we attend longhand, what is replaced where)
REMOVED = {
    "gpt2": ("gpt2-base", torch.float32, False, None),
    "phi": ("phi-base", torch.float32, False, None),
    "gpt_neo": ("gpt_neo-alternating", torch.float32, True, None),
    "mpt": ("mpt-base", torch.float32, True, None),
    "gptj": ("gptj-base", torch.float32, True, (attention_math, "attention_scores", divided)),
    "bloom": ("bloom-base", torch.float32, True, (attention_math, "attention_scores", bias_inside)),
    "gemma2": ("gemma2-no_softcaps", torch.float32, False, use_sdpa),
    "phi3": ("phi3-base", torch.float32, False, (Phi3MLP, "forward", two_multiplications)),
    "falcon, heads": (
        "falcon-multi_query",
        torch.bfloat16,
        False,
        (attention_math, "fused", one_key_head),
    ),
    "falcon, bias": (
        "falcon-full_heads",
        torch.bfloat16,
        False,
        (FalconLinear, "forward", bias_at_once),
    ),
}


@pytest.mark.parametrize("what", REMOVED)
@torch.no_grad()
def test_the_reasons_are_true(what: str, monkeypatch):
    """With its reason taken away, a configuration that is not exact is."""
    name, dtype, longhand, change = REMOVED[what]
    [tiny] = [tiny for tiny in TINIES if tiny.id == name]
    assert why_not_exact(tiny, dtype)
    theirs = tiny.build(dtype=dtype)
    ours = hookedlm.load(theirs)
    monkeypatch.setattr(NewGELUActivation, "forward", one_kernel)  # GPT-J's second reason
    if isinstance(change, tuple):
        monkeypatch.setattr(*change)
    elif change is not None:
        change(theirs)
    look = [("blocks.*.attn.hook_pattern", lambda x, hook: None)] if longhand else []
    for side in (None, "left", "right"):
        tokens, mask = batch(side)
        got = ours.run_with_hooks(tokens, attention_mask=mask, fwd_hooks=look)
        expected = hf_truth.logits_of(theirs, tokens, mask)
        assert torch.equal(real(got, mask), real(expected, mask)), side


# --- Keys and values remembered ------------------------------------------------------------------


@every
def test_generation_from_padded_prompts(tiny: Tiny):
    theirs, ours = both(tiny)
    tokens, mask = hf_truth.padded_batch(VOCAB, [6, 3, 5], "left", 0, seed=7)
    assert not bool(mask.all())
    expected = hf_truth.greedy(theirs, tokens, mask, 7)
    options = {"max_new_tokens": 7, "do_sample": False, "stop_at_eos": False}
    for cached in (True, False):
        if not cached and tiny.id in STRETCHES:
            continue
        got = ours.generate(tokens, attention_mask=mask, use_past_kv_cache=cached, **options)
        assert torch.equal(got[:, -7:], expected), f"cached={cached}"


@every
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@torch.no_grad()
def test_pieces_with_a_cache_are_the_whole(tiny: Tiny, padded: bool):
    """In pieces shorter and longer than the windows of local layers, and one token at a time."""
    if tiny.id in STRETCHES:
        return
    theirs, ours = both(tiny)
    tokens, mask = hf_truth.padded_batch(VOCAB, [14, 6, 9], "left", 0, seed=8)
    mask = mask if padded else None
    whole = ours(tokens, attention_mask=mask)
    cache = DynamicCache(config=theirs.config)
    pieces = []
    for start, end in ((0, 3), (3, 4), (4, 9), (9, 10), (10, 14)):
        seen = None if mask is None else mask[:, :end]
        pieces.append(ours(tokens[:, start:end], attention_mask=seen, past_kv_cache=cache))
    assert error(real(torch.cat(pieces, 1), mask), real(whole, mask)) < 1e-5
