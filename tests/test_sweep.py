"""Sweeps beside one run after the other, with hooks that index activations by hand."""

from __future__ import annotations

import builtins
import functools
import math
import types
from itertools import product

import pytest
import torch
from conftest import word_tokenizer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from measuring import model_of

import hookedlm
from hookedlm import patching
from hookedlm.errors import CacheFileError, HookNameError, InputError
from hookedlm.patching import (
    KL,
    AnswerRank,
    LogitDiff,
    LogProb,
    Metric,
    SweepResult,
    normalised,
    sweep,
)
from hookedlm.patching import base_run, engine

FAMILIES = {
    "gpt2": base_run.Reuse.POSITIONS,
    "llama": base_run.Reuse.POSITIONS,  # grouped keys
    "gptj": base_run.Reuse.POSITIONS,  # parallel
    "opt": base_run.Reuse.POSITIONS,
    "opt-after": base_run.Reuse.POSITIONS,  # norms behind the sums
    "gemma2": base_run.Reuse.POSITIONS,
    "mixtral": base_run.Reuse.POSITIONS,
    "deepseek_v3": base_run.Reuse.POSITIONS,  # latent attention
    "bamba": base_run.Reuse.LAYERS,  # Mamba and attention
    "hrm_text": base_run.Reuse.NOTHING,  # Hugging Face's own loop
}
INSIDE = {
    "resid_pre": ["pos", "dim"],
    "attn_out": ["pos"],
    "mlp_out": ["pos"],
    "z": ["pos", "head"],
    "k": ["pos", "head"],
    "v": ["pos", "head", "dim"],
    "pattern": ["head", "pos", "key_pos"],
    "post": ["pos", "neuron"],
}
MEANS = {"head": ("head", "kv_head"), "neuron": ("d_mlp",)}
LENGTH, FEW = 6, 3


@functools.cache
def model_for(kind):
    if kind == "opt-after":
        return hookedlm.load(model_of("opt", "flipped"))
    return hookedlm.load(model_of(kind))


@pytest.fixture(scope="module")
def gpt2():
    return model_for("gpt2")


def prompts(n, seed=0, length=LENGTH):
    return torch.randint(3, 96, (n, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", FAMILIES)
def test_the_families_here_are_of_all_kinds(kind):
    assert base_run.run_base(model_for(kind), prompts(2)).reuse == FAMILIES[kind]


def test_a_family_has_its_norms_behind_the_sums():
    assert not model_of("opt", "flipped").config.do_layer_norm_before
    assert model_of("opt").config.do_layer_norm_before


# The naive loop -----------------------------------------------------------------------------------


def index_of(point, at, example):
    """What indexes one example's activation; ``at``: axis of the grid -> place, or one for each."""
    found = []
    axes = point.axes[1:]
    for axis in axes:
        place = slice(None)
        for name, where in at.items():
            means = (axes[-1],) if name == "dim" else MEANS.get(name, (name,))
            if axis in means:
                place = int(where[example]) if isinstance(where, torch.Tensor) else where
        found.append(place)
    return (example, *found)


@torch.no_grad()
def one_run(model, tokens, mask, name, layer, at, put):
    """Logits of one run with ``put(part, index)`` in one place."""
    full = hookedlm.get_act_name(name, layer)

    def patch(x, hook):
        x = x.clone()
        for example in range(len(x)):
            index = index_of(hook, at, example)
            x[index] = put(x[index], full, index)
        return x

    return model.run_with_hooks(tokens, fwd_hooks=[(full, patch)], attention_mask=mask)


def by_hand(kind, logits, positions, answer, wrong, reference):
    """The metric of each example, written out."""
    found = []
    for i in range(len(logits)):
        row = logits[i, positions[i]].double()
        log_p = (row.exp() / row.exp().sum()).log()
        if kind == "diff":
            found.append(row[answer[i]] - row[wrong[i]])
        elif kind == "prob":
            found.append(log_p[answer[i]])
        elif kind == "rank":
            found.append(sum(float(x) > float(row[answer[i]]) for x in row) + 0.0 * row[0])
        else:
            ref = reference[i, positions[i]].double()
            ref_p = ref.exp() / ref.exp().sum()
            found.append((ref_p * (ref_p.log() - log_p)).sum())
    return torch.stack(found)


def masked(side, n):
    """The padding of a ragged batch."""
    if side is None or n == 1:
        return None
    mask = torch.ones(n, LENGTH, dtype=torch.long)
    for row in range(1, n):
        gone = slice(0, row) if side == "left" else slice(LENGTH - row, LENGTH)
        mask[row, gone] = 0
    return mask


@st.composite
def cases(draw):
    kind = draw(st.sampled_from(sorted(FAMILIES)))
    model = model_for(kind)
    n = draw(st.integers(1, 3))
    name = draw(st.sampled_from(sorted(INSIDE)))
    has = [
        layer
        for layer in range(model.cfg.n_layers)
        if hookedlm.get_act_name(name, layer) in model.hook_dict
    ]
    # Experts have other neurons than the dense layers among them: such layers are swept apart.
    axes = {layer: model.hook_dict[hookedlm.get_act_name(name, layer)].axes for layer in has}
    like = axes[draw(st.sampled_from(has))]
    has = [layer for layer in has if axes[layer] == like]
    layers = draw(st.lists(st.sampled_from(has), min_size=1, max_size=2, unique=True))
    mask = masked(draw(st.sampled_from([None, "left", "right"])), n)
    grid = {"name": name, "layer": layers}
    for axis in draw(st.lists(st.sampled_from(INSIDE[name]), unique=True)):
        few = st.lists(st.integers(-2, 1), min_size=1, max_size=2, unique_by=lambda i: i % 2)
        grid[axis] = draw(few | st.just(0))
    if "pos" in grid and draw(st.booleans()):
        each = st.lists(st.integers(0, LENGTH - 1), min_size=n, max_size=n)
        grid["pos"] = {"first": torch.tensor(draw(each)), "second": draw(st.integers(0, 5))}
    order = draw(st.permutations(list(grid)))
    grid = {axis: grid[axis] for axis in order}
    return dict(
        kind=kind,
        n=n,
        mask=mask,
        grid=grid,
        metric=draw(st.sampled_from(["diff", "prob", "rank", "kl", "function"])),
        what=draw(st.sampled_from([None, None, patching.Zero(), patching.Scale(2.0)])),
        batch_size=draw(st.sampled_from([None, 1, 3])),
        overhead=draw(st.sampled_from([-1, 48])),
        sources=draw(st.sampled_from([1, n])) if mask is None else n,
    )


def metric_for(kind, model, n, mask):
    last = [LENGTH - 1] * n if mask is None else [int(row.nonzero().max()) for row in mask]
    answer, wrong = torch.arange(5, 5 + n), torch.arange(20, 20 + n)
    with torch.no_grad():
        reference = model(prompts(n, seed=7), attention_mask=mask)
    made = {
        "diff": lambda: LogitDiff(answer, wrong, positions=last),
        "prob": lambda: LogProb(answer, positions=last),
        "rank": lambda: AnswerRank(answer, positions=last),
        "kl": lambda: KL(reference, positions=last),
        "function": lambda: lambda logits: by_hand("diff", logits, last, answer, wrong, None),
    }[kind]()
    of_each = functools.partial(
        by_hand, "diff" if kind == "function" else kind,
        positions=last, answer=answer, wrong=wrong, reference=reference,
    )  # fmt: skip
    return made, of_each


def places(choice, length):
    """What the axis of a grid goes through: labels and places."""
    if isinstance(choice, dict):
        return list(choice.items())
    return [(i % length, i % length) for i in ([choice] if isinstance(choice, int) else choice)]


@settings(
    derandomize=True, deadline=None, max_examples=120, database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)  # fmt: skip
@given(case=cases())
def test_a_sweep_is_the_naive_loop(case):
    model, n, mask, grid = model_for(case["kind"]), case["n"], case["mask"], case["grid"]
    base, source = prompts(n), prompts(case["sources"], seed=1)
    metric, of_each = metric_for(case["metric"], model, n, mask)
    overhead = dict(engine.OVERHEAD)
    engine.OVERHEAD["cpu"] = case["overhead"]
    try:
        found = sweep(
            model, base, grid | {"example": True}, metric,
            source if case["what"] is None else None, what=case["what"], attention_mask=mask,
            batch_size=case["batch_size"], progress=False,
        )  # fmt: skip
    finally:
        engine.OVERHEAD.update(overhead)

    names = [hookedlm.get_act_name(grid["name"], layer) for layer in grid["layer"]]
    with torch.no_grad():
        clean, cache = model.run_with_cache(source, names_filter=names, attention_mask=mask)

    def put(part, full, index):
        if case["what"] is None:
            row = index[0] if case["sources"] > 1 else 0
            return cache[full][(row, *index[1:])]
        return part * (0.0 if isinstance(case["what"], patching.Zero) else 2.0)

    inside = [axis for axis in grid if axis not in ("name", "layer")]
    for layer in grid["layer"]:
        shape = dict(
            zip(model.hook_dict[names[0]].axes, cache[names[0]].shape, strict=True)
        )
        shape |= {"head": shape.get("head", shape.get("kv_head")), "neuron": shape.get("d_mlp")}
        shape["dim"] = cache[names[0]].shape[-1]
        for chosen in product(*(places(grid[axis], shape[axis]) for axis in inside)):
            at = {axis: where for axis, (_, where) in zip(inside, chosen, strict=True)}
            labels = {axis: label for axis, (label, _) in zip(inside, chosen, strict=True)}
            labels = {a: label for a, label in labels.items() if a in found.axes}
            logits = one_run(model, base, mask, grid["name"], layer, at, put)
            expected = of_each(logits).float()
            ours = found.at(layer=layer, **labels).values
            room = dict(rtol=1e-5, atol=1e-5 * float(logits.abs().max()))
            torch.testing.assert_close(ours.float(), expected, **room)
    room = dict(rtol=1e-5, atol=1e-5 * float(clean.abs().max()))
    with torch.no_grad():
        plain = of_each(model(base, attention_mask=mask)).float()
    if case["what"] is None:
        clean = clean.expand(n, -1, -1)
        torch.testing.assert_close(found.clean.float(), of_each(clean).float(), **room)
        torch.testing.assert_close(found.corrupted.float(), plain, **room)
    else:
        torch.testing.assert_close(found.clean.float(), plain, **room)
        assert found.corrupted is None
