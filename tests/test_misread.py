"""Sabotage: wrong rows and changed modules are reported, never silently wrong."""

from __future__ import annotations

import hf_truth
import pytest
import torch
from tiny import VOCAB, Tiny, one_per_family, tinies
from torch import nn

import hookedlm
from hookedlm.convert import guess
from hookedlm.errors import ConversionError
from hookedlm.families import FAMILIES, Row

GPT2, LLAMA, GEMMA2, GRANITE = (tinies(name)[0] for name in ("gpt2", "llama", "gemma2", "granite"))
QWEN3, COHERE, NEOX = (tinies(name)[0] for name in ("qwen3", "cohere", "gpt_neox"))


def load_as(monkeypatch, tiny: Tiny, row: Row):
    """(model read with a row of our choice, Hugging Face's)."""
    monkeypatch.setitem(FAMILIES, tiny.model_type, row)
    theirs = tiny.build()
    return hookedlm.load(theirs), theirs


@torch.no_grad()
def assert_right(ours, theirs):
    tokens, mask = hf_truth.padded_batch(VOCAB, [11, 6, 9], "left", 0, seed=7)
    expected, got = hf_truth.logits_of(theirs, tokens, mask), ours(tokens, attention_mask=mask)
    error = (got - expected)[mask.bool()].abs().max() / expected[mask.bool()].abs().max()
    assert float(error) <= 1e-5


WRONG = {
    "norms swapped": (LLAMA, {"ln1": "post_attention_layernorm", "ln2": "input_layernorm"}),
    "norm offset": (GEMMA2, {"norm_offset": 0.0}),
    "norm kind": (LLAMA, {"norm": "LN"}),
    "a post-norm left out": (GEMMA2, {"ln1_post": None}),
    "q_norm left out": (QWEN3, {"q_norm": None, "k_norm": None}),
    "a projection misnamed": (LLAMA, {"o": "self_attn.out"}),
    "q and k swapped": (tinies("llama")[1], {"q": "self_attn.k_proj", "k": "self_attn.q_proj"}),
    "order of q, k, v": (NEOX, {"qkv_order": "blocks"}),
    "rotation left out": (LLAMA, {"rotary": None}),
    "scale": (GRANITE, {"scale": None}),
    "scores' softcap left out": (GEMMA2, {"softcap": None}),
    "parallel": (LLAMA, {"layout": "parallel"}),
    "sequential": (NEOX, {"layout": "sequential"}),
    "gate and linear branch swapped": (LLAMA, {"gate": "mlp.up_proj", "up": "mlp.gate_proj"}),
    "residual multiplier left out": (GRANITE, {"residual_scale": None}),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_row_wraps_the_block(monkeypatch, what: str):
    tiny, difference = WRONG[what]
    ours, theirs = load_as(monkeypatch, tiny, FAMILIES[tiny.model_type].but(**difference))
    blocks = [part for part in ours.fidelity().parts if part.where.startswith("blocks")]
    assert any(part.opaque and part.reason for part in blocks)
    assert_right(ours, theirs)


@pytest.mark.parametrize(
    "tiny, difference, part",
    [
        (GEMMA2, {"embed_scale": None}, "embed"),
        (GEMMA2, {"logit_softcap": None}, "logits"),
        (COHERE, {"logit_scale": None}, "logits"),
        (GRANITE, {"logit_divisor": None}, "logits"),
        (GPT2, {"pos_embed": None}, "embed"),
        (LLAMA, {"ln_final": None}, "logits"),
    ],
    ids=lambda x: str(x) if isinstance(x, (dict, str)) else x.id,
)
def test_a_wrong_end_is_wrapped(monkeypatch, tiny: Tiny, difference: dict, part: str):
    ours, theirs = load_as(monkeypatch, tiny, FAMILIES[tiny.model_type].but(**difference))
    assert ours.fidelity().part(part).opaque
    assert_right(ours, theirs)


def test_strict_refuses_what_is_wrapped(monkeypatch):
    monkeypatch.setitem(FAMILIES, "llama", FAMILIES["llama"].but(rotary=None))
    with pytest.raises(ConversionError, match="not uniform"):
        hookedlm.load(LLAMA.build(), strict=True)
    monkeypatch.undo()
    assert hookedlm.load(LLAMA.build(), strict=True).fidelity().opaque_parts == []


FOREIGN = [
    (tiny, other)
    for i, tiny in enumerate(one_per_family())
    for other in list(FAMILIES)[i % 3 :: 9]
    if other != tiny.model_type
]


@pytest.mark.parametrize("tiny, other", FOREIGN, ids=lambda x: x if isinstance(x, str) else x.id)
def test_another_familys_row_is_never_silently_wrong(monkeypatch, tiny: Tiny, other: str):
    """It loads and gives the right numbers, whatever had to be wrapped, or it says why not."""
    try:
        ours, theirs = load_as(monkeypatch, tiny, FAMILIES[other])
    except ConversionError:
        return
    assert_right(ours, theirs)


def test_models_edited_by_hand_are_read_as_they_are():
    theirs = GPT2.build()
    with torch.no_grad():
        for block in theirs.transformer.h:
            block.ln_1.eps = 1e12
            block.ln_1.weight.mul_(1e6)
            block.ln_2.weight.div_(1e6)
    ours = hookedlm.load(theirs)
    assert not ours.fidelity().opaque_parts
    assert ours.blocks[0].ln1.eps == 1e12
    assert_right(ours, theirs)


def test_a_parameter_nobody_knows_makes_the_block_opaque():
    theirs = LLAMA.build()
    theirs.model.layers[1].extra = nn.Parameter(torch.ones(3))
    part = hookedlm.load(theirs).fidelity().part("blocks.1")
    assert part.form == "opaque block"
    assert "extra" in part.reason


def test_a_linear_of_another_make_is_not_taken_apart():
    class Doubling(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    theirs = LLAMA.build()
    old = theirs.model.layers[1].self_attn.q_proj
    new = Doubling(old.in_features, old.out_features, bias=False)
    new.weight = old.weight
    theirs.model.layers[1].self_attn.q_proj = new
    ours = hookedlm.load(theirs)
    assert ours.fidelity().part("blocks.1").opaque
    assert_right(ours, theirs)


def test_guessing_names_what_it_needs():
    with pytest.raises(ConversionError, match="no numbered list of blocks"):
        guess.guess_blocks(nn.Sequential(nn.Linear(2, 2)))
