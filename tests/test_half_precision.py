"""Half precision: what is uniform in float32 is uniform in bfloat16 and float16 too, and what is
wrong there is not let pass as rounding."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from measuring import Result, model_of, other_forms, tokens_for
from tiny import tinies
from torch import Tensor, nn

import hookedlm
from hookedlm import HookedTransformer
from hookedlm.convert import blocks, check
from hookedlm.convert.check_rounding import AGREES
from hookedlm.convert.hf import ConfigReads, Coverage
from hookedlm.convert.read_norm import read_norm
from hookedlm.families import FAMILIES
from hookedlm.layers.moe import MoE
from hookedlm.layers.norm import Norm
from hookedlm.spec import NormSpec

HALVES = (torch.bfloat16, torch.float16)
ALL_HOOKS = {"names_filter": lambda name: True}


def name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# --- Uniform in float32, uniform in half precision -----------------------------------------------

ROUTED = [("granitemoe_swa", "flipped"), ("beam", "flipped")]
"""Types whose routers fall another way in the check: Hugging Face rounds elsewhere."""


@pytest.mark.parametrize(
    ("kind", "variant", "dtype"),
    [
        ("afmoe", "base", torch.bfloat16),
        ("nemotron", "changed", torch.bfloat16),
        ("mamba", "base", torch.float16),
        ("falcon_mamba", "base", torch.bfloat16),
        ("mamba2", "flipped", torch.bfloat16),
        *((*routed, torch.bfloat16) for routed in ROUTED),
    ],
)
def test_parts_have_the_form_they_have_in_float32(kind: str, variant: str, dtype: torch.dtype):
    half, whole = (hookedlm.load(model_of(kind, variant, d)) for d in (dtype, torch.float32))
    assert other_forms(half, whole) == []


@pytest.mark.parametrize(
    "kind", ["afmoe", "flint", "helium", "nemotron_h", "olmo_hybrid", "mamba2", "gemma2"]
)
@torch.no_grad()
def test_logits_are_equal_to_the_bit(kind: str):
    theirs = model_of(kind, dtype=torch.bfloat16)
    tokens = tokens_for(theirs)
    ours, logits = hookedlm.load(theirs)(tokens), theirs(tokens).logits
    assert ours.dtype is logits.dtype
    assert torch.equal(ours, logits)


@torch.no_grad()
def test_logits_are_as_far_from_float32_as_hugging_faces():
    """Where an attention of Hugging Face's rounds elsewhere than a fused kernel."""
    for kind in ("granite_swa", "mimo_v2_flash", "beam"):
        theirs = model_of(kind, dtype=torch.bfloat16)
        tokens = tokens_for(theirs)
        found = {"ours": hookedlm.load(theirs)(tokens), "theirs": theirs(tokens).logits}
        exact = copy.deepcopy(theirs).float()(tokens).logits
        away = {who: float((x - exact).abs().amax(-1).median()) for who, x in found.items()}
        assert away["ours"] <= 1.5 * away["theirs"], kind


@torch.no_grad()
def test_weights_kept_in_float32_are_no_reason_to_wrap(tmp_path):
    """Transformers keeps some in float32 when it loads in half precision."""
    theirs = model_of("afmoe")
    theirs.save_pretrained(tmp_path)
    half = type(theirs).from_pretrained(tmp_path, dtype=torch.float16).eval()
    assert {p.dtype for p in half.parameters()} == {torch.float16, torch.float32}
    ours, tokens = hookedlm.load(half), tokens_for(half)
    assert other_forms(ours, hookedlm.load(theirs)) == []
    assert torch.equal(ours(tokens), half(tokens).logits)


# --- A stream in float32 --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mamba() -> tuple[nn.Module, HookedTransformer]:
    theirs = model_of("mamba", dtype=torch.bfloat16)
    return theirs, hookedlm.load(theirs)


@torch.no_grad()
def test_the_stream_of_a_mamba_is_float32(mamba: tuple[nn.Module, HookedTransformer]):
    """``residual_in_fp32``: what the mixers add is bfloat16, their sum is not."""
    theirs, ours = mamba
    tokens = tokens_for(theirs)
    logits, cache = ours.run_with_cache(tokens, **ALL_HOOKS)
    streams = theirs(tokens, output_hidden_states=True).hidden_states
    assert cache["blocks.0.hook_resid_pre"].dtype is torch.bfloat16
    for layer in range(ours.cfg.n_layers):
        assert cache[f"blocks.{layer}.mixer.hook_out"].dtype is torch.bfloat16
        assert cache[f"blocks.{layer}.hook_resid_post"].dtype is torch.float32
    error = (logits - theirs(tokens).logits).abs().max() / logits.abs().max()
    assert error < 0.1  # longhand norms round once more
    quiet = hookedlm.load(theirs).run_with_cache(tokens, names_filter="blocks.1.hook_resid_pre")[1]
    assert torch.equal(quiet["blocks.1.hook_resid_pre"], streams[0])


@torch.no_grad()
def test_parts_of_a_float32_stream_add_up(mamba: tuple[nn.Module, HookedTransformer]):
    theirs, ours = mamba
    _, cache = ours.run_with_cache(tokens_for(theirs), **ALL_HOOKS)
    whole = cache[f"blocks.{ours.cfg.n_layers - 1}.hook_resid_post"]
    parts = cache.decompose_resid()
    assert (parts.float().sum(0) - whole).abs().max() <= 1e-5 * whole.abs().max()


@torch.no_grad()
def test_a_float32_stream_generates_what_hugging_face_does(
    mamba: tuple[nn.Module, HookedTransformer],
):
    theirs, ours = mamba
    tokens, how = tokens_for(theirs)[:1], {"max_new_tokens": 4, "do_sample": False}
    expected = theirs.generate(tokens, min_new_tokens=4, pad_token_id=0, **how)
    for cached in (True, False):
        told = ours.generate(tokens, use_past_kv_cache=cached, verbose=False, **how)
        assert torch.equal(told, expected)


def test_a_float32_stream_passes_gradients(mamba: tuple[nn.Module, HookedTransformer]):
    theirs, ours = mamba
    loss = ours(tokens_for(theirs), return_type="loss")
    loss.backward()
    gradient = ours.blocks[0].ln1.w.grad
    assert gradient is not None
    assert gradient.dtype is torch.bfloat16
    assert gradient.abs().max() > 0


# --- Where a norm rounds -------------------------------------------------------------------------


class RoundsEarly(nn.Module):
    """Llama's: the weight is applied in the model's dtype."""

    def __init__(self, width: int, dtype: torch.dtype):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(width, generator=generator).to(dtype))
        self.variance_epsilon = 1e-6

    def normed(self, x: Tensor) -> Tensor:
        return x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * self.normed(x).to(x.dtype)


class RoundsLate(RoundsEarly):
    """Gemma's: the weight is applied in float32."""

    def forward(self, x: Tensor) -> Tensor:
        return (self.weight.float() * self.normed(x)).to(x.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=name)
@pytest.mark.parametrize(("kind", "late"), [(RoundsEarly, False), (RoundsLate, True)])
def test_where_a_norm_rounds_is_found_out(kind: type[RoundsEarly], late: bool, dtype: torch.dtype):
    module = kind(32, dtype)
    before = torch.get_rng_state()
    reading = read_norm(module, FAMILIES["llama"], ConfigReads(None), Coverage(module))
    assert reading.spec.late_cast is late
    assert torch.equal(torch.get_rng_state(), before)
    ours = Norm(reading.spec, reading.w, reading.b)
    for stream in HALVES:
        x = torch.randn(3, 5, 32, generator=torch.Generator().manual_seed(1)).to(stream)
        assert torch.equal(ours(x), module(x))
        assert ours(x).dtype is module(x).dtype


def test_a_layer_norm_listened_to_rounds_once():
    """As torch's own does: then neither is farther from float32 than the last digit."""
    generator = torch.Generator().manual_seed(0)
    w, b, x = (torch.randn(*shape, generator=generator) for shape in ((64,), (64,), (8, 20, 64)))
    half = Norm(NormSpec("LN", 1e-5), w.bfloat16(), b.bfloat16())
    x = x.bfloat16()
    exact = nn.functional.layer_norm(x.float(), (64,), half.w.float(), half.b.float(), 1e-5)
    longhand = half._after_hook(half.normalized(x, half.scale_of(x)))
    assert longhand.dtype is torch.bfloat16
    assert torch.equal(longhand, exact.bfloat16())


# --- Scores in float32 ----------------------------------------------------------------------------


@torch.no_grad()
def test_scores_that_hugging_face_keeps_in_float32():
    theirs = model_of("flint", dtype=torch.bfloat16)
    ours = hookedlm.load(theirs)
    _, cache = ours.run_with_cache(tokens_for(theirs), **ALL_HOOKS)
    assert cache["blocks.0.attn.hook_attn_scores"].dtype is torch.float32
    assert cache["blocks.0.attn.hook_pattern"].dtype is torch.bfloat16


# --- What is rounding, and what is wrong ----------------------------------------------------------

NO_TOLERANCE = dict.fromkeys(check.TOLERANCES, 0.0) | {torch.float32: 1e-5}
SUBJECTS = {kind: tinies(kind)[0] for kind in ("llama", "gpt2", "mixtral", "qwen3_moe")}


@pytest.fixture
def strict(monkeypatch):
    """Half precision is given no tolerance: every block must be explained by rounding."""
    monkeypatch.setattr(check, "TOLERANCES", NO_TOLERANCE)


@pytest.mark.parametrize("kind", SUBJECTS)
def test_rounding_alone_is_accepted(kind: str, strict):
    ours = hookedlm.load(SUBJECTS[kind].build(dtype=torch.bfloat16))
    parts = [part for part in ours.fidelity().parts if part.where.startswith("blocks")]
    assert not any(part.opaque for part in parts)
    assert all(AGREES in part.reason for part in parts)


@pytest.mark.parametrize("kind", SUBJECTS)
def test_a_slightly_wrong_block_is_not_taken_for_rounding(kind: str, strict, monkeypatch):
    """Two percent on what attention adds: less than bfloat16 might round."""
    right = blocks.read_block

    def wrong(*args):
        reading = right(*args)
        return replace(reading, spec=replace(reading.spec, residual_scale=1.02))

    monkeypatch.setattr(blocks, "read_block", wrong)
    ours = hookedlm.load(SUBJECTS[kind].build(dtype=torch.bfloat16))
    assert ours.fidelity().part("blocks.0").form == "opaque block"


def test_experts_that_go_wrong_are_not_taken_for_near_ties(strict, monkeypatch):
    right = MoE.expert_out
    monkeypatch.setattr(MoE, "expert_out", lambda self, *args: 1.05 * right(self, *args))
    ours = hookedlm.load(SUBJECTS["mixtral"].build(dtype=torch.bfloat16))
    assert ours.fidelity().part("blocks.0").form == "opaque block"


# --- The survey -----------------------------------------------------------------------------------


def test_the_survey_tells_what_half_precision_wraps(monkeypatch):
    whole = hookedlm.load(SUBJECTS["llama"].build())
    monkeypatch.setattr(blocks, "only_rounds", lambda *args: False)
    monkeypatch.setattr(check, "TOLERANCES", NO_TOLERANCE)
    half = hookedlm.load(SUBJECTS["llama"].build(dtype=torch.bfloat16))
    result = Result("llama", "base", halved=other_forms(half, whole))
    assert len(result.halved) >= whole.cfg.n_layers
    assert any("in bfloat16 blocks.0 is opaque block" in text for text in result.troubles())
