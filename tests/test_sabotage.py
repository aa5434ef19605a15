"""Sabotage, systematically: every entry of every family's row made wrong, and the check itself.

`test_misread.py` gives telling mistakes one by one. Here each row is changed one entry at a time:
whatever loads must give Hugging Face's numbers, unpadded, padded and listened to, or say what it
wrapped; and what is wrapped must run.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from typing import Any

import hf_truth
import pytest
import torch
from tiny import VOCAB, Tiny, one_per_family, tinies

import hookedlm
from hookedlm.errors import ConversionError
from hookedlm.families import FAMILIES, Row
from hookedlm.layers.moe import MoE

# What an entry may be besides absent. Where the model's parts lie is only ever taken away.
OTHERS: dict[str, tuple[Any, ...]] = {
    "layout": ("sequential", "parallel", "post_norm"),
    "residual_scale": (0.5,),
    "norm": ("RMS", "LN"),
    "norm_eps": (0.5,),
    "norm_offset": (0.0, 1.0),
    "qkv_order": ("blocks", "groups"),
    "qk_norm": ("head", "full", "module"),
    "scale": (1.0, 0.3),
    "scale_query": (True, False),
    "softcap": (2.0,),
    "clip": (0.1,),
    "causal": (False,),
    "rotary": ("tables", "partial", "pairs"),
    "rotary_if": (False,),
    "bias": ("alibi",),
    "mask_hides": (True, False),
    "routing": ("softmax_topk", "topk_softmax"),
    "routing_normalised": (True, False),
    "embed_scale": (2.0,),
    "logit_scale": (2.0,),
    "logit_divisor": (2.0,),
    "logit_softcap": (1.0,),
    "pos_offset": (0, 1, 2),
}
NEVER_ABSENT = {"base", "blocks", "embed", "unembed", "norm", "layout", "pos_offset", "routing"}
SWAPS = [("ln1", "ln2"), ("ln1_post", "ln2_post"), ("q", "k"), ("k", "v"), ("gate", "up")]

# One configuration per family, and those whose options the first one leaves off.
SUBJECTS = {tiny.id: tiny for tiny in one_per_family()} | {
    tiny.id: tiny
    for tiny in tinies("opt", "falcon", "mpt", "olmo", "granite", "gemma2", "phi", "stablelm")
    if tiny.variant
    in ("post_norm_projected", "alibi_new", "clip_qkv", "multipliers", "qk_layernorm", "parallel")
}


def mistakes(row: Row) -> Iterator[dict[str, Any]]:
    """Every way to be wrong in one entry of a row, and a few pairs mistaken for each other."""
    for entry in fields(Row):
        value = getattr(row, entry.name)
        wrong = [x for x in OTHERS.get(entry.name, ()) if x != value]
        if value is not None and entry.name not in NEVER_ABSENT:
            wrong.append(None)
        yield from ({entry.name: x} for x in wrong)
    for a, b in SWAPS:
        if getattr(row, a) != getattr(row, b):
            yield {a: getattr(row, b), b: getattr(row, a)}


@torch.no_grad()
def errors(ours, theirs) -> dict[str, float]:
    """Largest difference of a logit over the largest logit, on inputs of several kinds."""
    found = {}
    for side in ("unpadded", "left"):
        tokens, mask = hf_truth.padded_batch(VOCAB, [18, 6, 9], "left", 0, seed=7)
        mask = None if side == "unpadded" else mask
        real = ... if mask is None else mask.bool()
        expected = hf_truth.logits_of(theirs, tokens, mask)[real]
        look = [(name, lambda x, hook: None) for name in ours.hook_dict]
        runs = {
            "quiet": ours(tokens, attention_mask=mask),
            "listening": ours.run_with_hooks(tokens, attention_mask=mask, fwd_hooks=look),
        }
        for kind, got in runs.items():
            error = (got[real] - expected).abs().max() / expected.abs().max()
            found[f"{side}, {kind}"] = float(error)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("tiny", SUBJECTS.values(), ids=SUBJECTS)
def test_every_entry_of_every_row(tiny: Tiny, monkeypatch):
    row, theirs = FAMILIES[tiny.model_type], tiny.build()
    wrapped = 0
    for mistake in mistakes(row):
        monkeypatch.setitem(FAMILIES, tiny.model_type, row.but(**mistake))
        try:
            ours = hookedlm.load(theirs)
        except ConversionError:
            continue
        wrapped += bool(ours.fidelity().opaque_parts)
        assert all(error <= 1e-5 for error in errors(ours, theirs).values()), (
            mistake,
            errors(ours, theirs),
            ours.fidelity(),
        )
    assert wrapped >= 10  # the mistakes were mistakes


# --- One mistake, one report ---------------------------------------------------------------------

TELLING = {
    "not causal": ("llama", {"causal": False}),
    "eps of the norms": ("olmo", {"norm_eps": 0.5}),
    "rotation of another style": ("gptj", {"rotary": "tables"}),
    "rotation where there is none": ("gpt2", {"rotary": "tables"}),
    "sinks left out": ("gpt_oss", {"sinks": None}),
    "local mask left out": ("gpt_neo", {"mask_table": None}),
    "ALiBi left out": ("bloom", {"bias": None}),
    "mask read the wrong way": ("mpt", {"mask_hides": False}),
}


@pytest.mark.parametrize("what", TELLING)
def test_a_telling_mistake(what: str, monkeypatch):
    model_type, mistake = TELLING[what]
    theirs = tinies(model_type)[0].build()
    monkeypatch.setitem(FAMILIES, model_type, FAMILIES[model_type].but(**mistake))
    parts = [p for p in hookedlm.load(theirs).fidelity().parts if p.where.startswith("blocks")]
    assert any(part.opaque and part.reason for part in parts)
    with pytest.raises(ConversionError, match="not uniform"):
        hookedlm.load(theirs, strict=True)


def test_a_projected_embedding_beside_a_wrapped_head_runs(monkeypatch):
    """The head's own code needs the base whole, which then takes no stream of ours."""
    monkeypatch.setitem(
        FAMILIES, "opt", FAMILIES["opt"].but(ln_final="model.decoder.layers.0.final_layer_norm")
    )
    [tiny] = [tiny for tiny in tinies("opt") if tiny.variant == "post_norm_projected"]
    theirs = tiny.build()
    ours = hookedlm.load(theirs)
    assert ours.fidelity().part("embed").opaque
    assert ours.fidelity().part("logits").opaque
    assert max(errors(ours, theirs).values()) <= 1e-5


# --- The check ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda dtype: str(dtype)[6:])
def test_experts_that_go_wrong_when_listened_to_are_wrapped(dtype: torch.dtype, monkeypatch):
    """In half precision too, where single positions may fall to another expert."""
    right = MoE.expert_out
    monkeypatch.setattr(MoE, "expert_out", lambda self, *args: 3 * right(self, *args))
    ours = hookedlm.load(tinies("mixtral")[0].build(dtype=dtype))
    assert ours.fidelity().part("blocks.0").opaque


def test_a_block_that_errs_only_without_a_mask_is_wrapped():
    """The check runs an unpadded batch too: there, no mask is handed to the blocks."""
    theirs = tinies("llama")[0].build()

    class Different(type(theirs.model.layers[1])):
        def forward(self, hidden_states, attention_mask=None, **kwargs):
            out = super().forward(hidden_states, attention_mask=attention_mask, **kwargs)
            return 2 * out if attention_mask is None else out

    theirs.model.layers[1].__class__ = Different
    ours = hookedlm.load(theirs)
    forms = [ours.fidelity().part(f"blocks.{layer}").form for layer in range(3)]
    assert forms == ["uniform, sequential", "opaque block", "uniform, sequential"]
    assert max(errors(ours, theirs).values()) <= 1e-5


def test_norms_edited_by_hand_are_read_as_they_are():
    """GPT-2 without LayerNorm is made like this; the same for norms that only scale."""
    theirs = tinies("llama")[0].build()
    with torch.no_grad():
        for layer in theirs.model.layers:
            layer.input_layernorm.variance_epsilon = 1e12
            layer.input_layernorm.weight.mul_(1e6)
            layer.post_attention_layernorm.weight.div_(1e6)
    ours = hookedlm.load(theirs, strict=True)
    assert ours.blocks[0].ln1.eps == 1e12
    assert max(errors(ours, theirs).values()) <= 1e-5


def test_a_hook_left_on_a_module_does_not_vanish():
    """A part hooked with torch computes something else: it is wrapped, hook and all."""
    theirs = tinies("llama")[0].build()
    theirs.model.layers[1].mlp.register_forward_hook(lambda module, args, output: 2 * output)
    ours = hookedlm.load(theirs)
    assert ours.fidelity().part("blocks.1").opaque
    assert max(errors(ours, theirs).values()) <= 1e-5
