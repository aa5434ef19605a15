"""Sweeps beside one run after the other, with hooks that index activations by hand."""

from __future__ import annotations

import builtins
import functools
import gc
import importlib
import weakref
from itertools import product

import pytest
import torch
from conftest import word_tokenizer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from measuring import model_of
from torch.utils._python_dispatch import TorchDispatchMode

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
    base_run,
    engine,
    normalised,
    sweep,
)

MODULE = importlib.import_module("hookedlm.patching.sweep")  # the package has the function
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
        early=draw(st.booleans()),
        metric=draw(st.sampled_from(["diff", "prob", "rank", "kl", "function"])),
        what=draw(st.sampled_from([None, None, patching.Zero(), patching.Scale(2.0)])),
        batch_size=draw(st.sampled_from([None, 1, 3])),
        overhead=draw(st.sampled_from([-1, 48])),
        sources=draw(st.sampled_from([1, n])) if mask is None else n,
        shared=draw(st.sampled_from([0, 0, 2, LENGTH - 1, LENGTH])),
    )


def metric_for(kind, model, n, mask, early):
    real = torch.ones(n, LENGTH) if mask is None else mask
    last = [int(row.nonzero().max()) for row in real]
    if early:  # where most patches change nothing
        last = [int(row.nonzero().min()) + 1 + i % 2 for i, row in enumerate(real)]
    if mask is None and len(set(last)) == 1:  # one position for all
        each, last = last, last[0]
    else:
        each = last
    answer, wrong = torch.arange(5, 5 + n), torch.arange(20, 20 + n)
    with torch.no_grad():
        reference = model(prompts(n, seed=7), attention_mask=mask)
    made = {
        "diff": lambda: LogitDiff(answer, wrong, positions=last),
        "prob": lambda: LogProb(answer, positions=last),
        "rank": lambda: AnswerRank(answer, positions=last),
        "kl": lambda: KL(reference, positions=last),
        "function": lambda: lambda logits: by_hand("diff", logits, each, answer, wrong, None),
    }[kind]()
    of_each = functools.partial(
        by_hand, "diff" if kind == "function" else kind,
        positions=each, answer=answer, wrong=wrong, reference=reference,
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
    source[:, : case["shared"]] = base[: len(source), : case["shared"]]
    metric, of_each = metric_for(case["metric"], model, n, mask, case["early"])
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
        shape = dict(zip(model.hook_dict[names[0]].axes, cache[names[0]].shape, strict=True))
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


class LooksBack(torch.nn.Module):
    """An MLP that hands each position half of the one before."""

    def __init__(self, mlp):
        super().__init__()
        self.mlp = mlp

    def forward(self, x):
        out = self.mlp(x)
        return out + 0.5 * torch.cat([torch.zeros_like(out[:, :1]), out[:, :-1]], dim=1)


def test_a_part_that_looks_back_is_found_out():
    """Whenever it comes: what was tried of other modules does not count."""
    model = hookedlm.load(model_of("gpt2"))
    grid = {"name": "resid_pre", "layer": True, "pos": [1, 4]}
    assert base_run.run_base(model, prompts(2)).reuse == base_run.Reuse.POSITIONS
    assert base_run.run_base(model, prompts(2)).reuse == base_run.Reuse.POSITIONS
    model.blocks[1].mlp = LooksBack(model.blocks[1].mlp)
    assert base_run.run_base(model, prompts(2)).reuse == base_run.Reuse.LAYERS
    found = run(model, LogitDiff(5, 20), grid)
    clean = model.cache(prompts(2, seed=1), "blocks.*.hook_resid_pre")
    for layer, pos in product(range(4), [1, 4]):
        logits = one_run(
            model, prompts(2), None, "resid_pre", layer, {"pos": pos},
            lambda part, full, index: clean[full][index],
        )  # fmt: skip
        expected = LogitDiff(5, 20)(logits)
        torch.testing.assert_close(found.at(layer=layer, pos=pos).values, expected)


def test_a_model_that_was_swept_can_be_freed():
    model = hookedlm.load(model_of("gpt2"))
    run(model)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("kind", ["gpt2", "llama", "gemma2"])
def test_what_both_prompts_begin_with_is_not_run(kind, n, monkeypatch):
    """Patches there change nothing, and those of all positions begin behind it."""
    model, shared, ran = model_for(kind), 4, []
    base, source = prompts(n), prompts(n, seed=1)
    source[:, :shared] = base[:, :shared]
    source[0, shared] = (base[0, shared] + 1) % 90 + 3
    packed_runs = engine.PackedRuns

    def packed(*args):
        ran.extend((cell, args[1].starts[cell]) for cell in args[2])
        return packed_runs(*args)

    monkeypatch.setattr(engine, "PackedRuns", packed)
    metric = LogitDiff(5, 20)
    _, cache = model.run_with_cache(source)
    for grid in (
        {"name": "resid_pre", "layer": True, "pos": True},
        {"name": "z", "layer": True, "head": True},
    ):
        ran.clear()
        found = sweep(model, base, grid, metric, source, progress=False)
        n_layers, width = found.values.shape
        starts = range(shared, LENGTH) if "pos" in grid else [shared] * width
        assert [start for _, start in sorted(ran)] == [*starts] * n_layers
        again = sweep(model, base, grid, metric, cache, progress=False)
        torch.testing.assert_close(again.values, found.values)
        if "pos" in grid:
            assert (found.values[:, :shared] == found.corrupted).all()
    ran.clear()
    same = sweep(model, base, grid, metric, base, progress=False)
    assert (same.values == same.corrupted).all()
    assert not ran


# Metrics ------------------------------------------------------------------------------------------

ANSWERS, WRONG = [5, 6], [20, 21]
LAST = [3, 5]


@pytest.fixture
def logits():
    return 3 * torch.randn(2, LENGTH, 96)


@pytest.fixture
def reference():
    return 3 * torch.randn(2, LENGTH, 96)


def test_metrics_are_what_they_say(logits, reference):
    for kind, metric in {
        "diff": LogitDiff(ANSWERS, WRONG, positions=LAST),
        "prob": LogProb(torch.tensor(ANSWERS), positions=LAST),
        "rank": AnswerRank(ANSWERS, positions=torch.tensor(LAST)),
        "kl": KL(reference, positions=LAST),
    }.items():
        expected = by_hand(kind, logits, LAST, ANSWERS, WRONG, reference)
        torch.testing.assert_close(metric.of_each(logits).double(), expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(metric(logits), metric.of_each(logits).mean())


def test_one_answer_and_position_serve_all(logits, reference):
    one = LogitDiff(5, 20, positions=-2)(logits)
    torch.testing.assert_close(one, (logits[:, -2, 5] - logits[:, -2, 20]).mean())
    torch.testing.assert_close(LogitDiff(5, WRONG)(logits), LogitDiff([5, 5], WRONG)(logits))
    same = KL(reference[:1, -1])(logits)
    torch.testing.assert_close(same, KL(reference[:1].expand(2, -1, -1))(logits))


def test_divergence_is_from_the_reference(logits, reference):
    assert KL(logits)(logits).abs() < 1e-6
    there, back = KL(reference)(logits), KL(logits)(reference)
    expected = torch.nn.functional.kl_div(
        logits[:, -1].log_softmax(-1), reference[:, -1].softmax(-1), reduction="batchmean"
    )
    torch.testing.assert_close(there, expected)
    assert there != back
    reference[:, :, 7] = -torch.inf  # a token that the reference rules out
    assert KL(reference)(logits).isfinite()


def test_normalised_metrics(logits, reference):
    metric = LogitDiff(5, 20)
    scaled = normalised(metric, clean=logits.requires_grad_(), corrupted=reference)
    logits = logits.detach()
    torch.testing.assert_close(scaled(logits), torch.tensor(1.0))
    torch.testing.assert_close(scaled(reference), torch.tensor(0.0), rtol=0, atol=1e-6)
    assert scaled.label == "normalised logit difference"
    torch.testing.assert_close(scaled.tokens(), metric.tokens())

    def function(logits):
        return logits[:, -1, 5].mean()

    scaled = normalised(function, clean=float(function(logits)), corrupted=function(reference))
    torch.testing.assert_close(scaled(logits), torch.tensor(1.0))
    with pytest.raises(InputError, match="in the clean run and in the corrupted"):
        normalised(metric, clean=2.0, corrupted=2.0)


def test_answers_as_text():
    model = hookedlm.load(model_of("gpt2"), tokenizer=word_tokenizer())
    mary, john = model.to_single_token("Mary"), model.to_single_token("John")
    torch.testing.assert_close(
        LogitDiff.of(model, "Mary", "John").tokens(), torch.tensor([[mary, john]])
    )
    metric = LogitDiff.of(model, ["Mary", "John"], john, positions=[1, 2])
    torch.testing.assert_close(metric.tokens(), torch.tensor([[mary, john], [john, john]]))
    assert LogProb.of(model, "Mary").answer.tolist() == [mary]
    with pytest.raises(hookedlm.errors.NotOneTokenError):
        AnswerRank.of(model, "Mary John")
    with pytest.raises(InputError, match=r"is text: use \.of"):
        LogProb("Mary")


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        (LogitDiff(5, 96), r"tokens: 96 is out of range; there are 0 to 95"),
        (LogProb(-1), r"tokens: -1 is out of range"),
        (LogProb(5, positions=LENGTH), r"positions: 6 is out of range; there are -6 to 5"),
        (LogProb([5, 6, 7]), r"log probability: 3 answers for a batch of 2"),
        (AnswerRank(5, positions=[1, 2, 3]), r"3 positions for a batch of 2"),
        (KL(torch.zeros(3, 96)), r"\[3, 96\] for runs of 2 examples"),
        (KL(torch.zeros(2, 95)), r"\[2, 95\] for runs of 2 examples"),
    ],
)
def test_metrics_that_do_not_fit_are_refused(gpt2, logits, metric, message):
    with pytest.raises(InputError, match=message):
        metric(logits)
    with pytest.raises(InputError, match=message):
        run(gpt2, metric=metric)


def test_metrics_of_nonsense_are_refused():
    for make in (lambda: LogProb([]), lambda: LogProb(1.5), lambda: LogitDiff(1, [[2]])):
        with pytest.raises(InputError, match="expected one integer, or one for each"):
            make()
    with pytest.raises(InputError, match="expected \\[batch, pos, d_vocab\\]"):
        KL(torch.zeros(96))
    with pytest.raises(InputError, match=r"expected \[batch, pos, vocab\]"):
        LogProb(1)(torch.zeros(4, 96))


def run(model, metric=None, grid=None, source=None, n=2, **options):
    """A small sweep."""
    base, source = prompts(n), prompts(n, seed=1) if source is None else source
    grid = {"name": "resid_pre", "layer": True, "pos": True} if grid is None else grid
    metric = LogitDiff(5, 20) if metric is None else metric
    return sweep(model, base, grid, metric, source, progress=False, **options)


@pytest.mark.parametrize("make", [
    lambda: LogitDiff(ANSWERS, WRONG), lambda: LogProb(ANSWERS), lambda: AnswerRank(5),
    lambda: KL(torch.randn(2, 96)), lambda: normalised(LogProb(5), clean=1, corrupted=3),
])  # fmt: skip
def test_the_classic_functions_read_no_more_than_a_metric_wants(gpt2, make, monkeypatch):
    """As a function of logits and as what it is, a metric gives the same numbers."""
    metric = make()
    _, cache = gpt2.run_with_cache(prompts(2, seed=1))
    arguments = (gpt2, prompts(2), cache)
    expected = patching.get_act_patch_resid_pre(*arguments, lambda logits: metric(logits))
    few, all_of_them = [], []
    of_tokens, forward = type(gpt2.unembed).of_tokens, type(gpt2.unembed).forward
    monkeypatch.setattr(type(gpt2.unembed), "of_tokens", lambda *a: few.append(1) or of_tokens(*a))
    monkeypatch.setattr(
        type(gpt2.unembed), "forward", lambda *a: all_of_them.append(a[1].shape) or forward(*a)
    )
    found = patching.get_act_patch_resid_pre(*arguments, metric)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert bool(few) != bool(all_of_them)
    assert bool(few) == isinstance(metric, LogitDiff)
    assert all(len(shape) == 3 and shape[1] == 2 for shape in all_of_them)  # cells, batch: no pos


def test_all_logits_are_read_a_few_at_a_time(gpt2, monkeypatch):
    expected = run(gpt2, LogProb(5)).values
    monkeypatch.setattr("hookedlm.patching.readout.LOGITS_AT_ONCE", 2 * 96 * 3)
    most = []
    forward = type(gpt2.unembed).forward
    monkeypatch.setattr(
        type(gpt2.unembed), "forward", lambda *a: most.append(len(a[1])) or forward(*a)
    )
    torch.testing.assert_close(run(gpt2, LogProb(5)).values, expected, rtol=1e-5, atol=1e-5)
    assert max(most) == 3


def test_a_metric_of_ones_own(gpt2):
    class Spread(Metric):
        def per_example(self, logits):
            return logits.amax(-1) - logits.amin(-1)

    found = run(gpt2, Spread(positions=-2))
    assert found.metric == "Spread"
    expected = run(gpt2, lambda logits: (logits[:, -2].amax(-1) - logits[:, -2].amin(-1)).mean())
    torch.testing.assert_close(found.values, expected.values, rtol=1e-5, atol=1e-5)


class NoLooking(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        aten = torch.ops.aten
        assert func not in (aten._local_scalar_dense.default, aten.nonzero.default)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", ["gpt2", "llama", "gptj", "gemma2"])
def test_the_loop_waits_for_no_device(kind, monkeypatch):
    """Nothing in it looks at a number, which on a GPU would stop everything."""
    firsts, packed_runs = [], engine.PackedRuns

    def packed(*args):
        with NoLooking():
            runs = packed_runs(*args)
            firsts.append(runs.pack.first)
            return runs

    def run_cells(base, plan, read, **options):
        def reading(out, cells):
            with NoLooking():
                return read(out, cells)

        return engine.run_cells(base, plan, reading, **options)

    monkeypatch.setitem(engine.OVERHEAD, "cpu", -1)
    monkeypatch.setattr(engine, "PackedRuns", packed)
    monkeypatch.setattr(MODULE, "run_cells", run_cells)
    metrics = [LogitDiff(5, 20), LogProb(5), AnswerRank(5), KL(torch.randn(1, 96))]
    for metric in [*metrics, normalised(metrics[0], clean=1.0, corrupted=0.0)]:
        run(model_for(kind), metric)
    assert set(firsts) == set(range(LENGTH))
    with pytest.raises(AssertionError), NoLooking():
        bool(torch.ones(1))


# What is put in -----------------------------------------------------------------------------------


def whats():
    d_head = 8
    mean = prompts(5, seed=3)
    vector = torch.randn(d_head, generator=torch.Generator().manual_seed(0))
    return {
        "add": patching.Add(vector),
        "project": patching.ProjectOut(vector),
        "mean": patching.Mean(mean),
        "mean by position": patching.Mean(mean, per_position=True),
        "given mean": patching.Mean(torch.randn(2, d_head)),
        "resample": patching.Resample(mean),
        "other rows": patching.Resample(),
        "noise": patching.Noise(0.5),
        "patch": patching.Patch(prompts(1, seed=4)),
        "freeze": patching.Freeze(),
    }


@pytest.mark.parametrize("kind", whats())
@pytest.mark.parametrize("inside", [("pos", "head"), ("head",), ()])
def test_interventions_are_what_intervene_makes_of_them(gpt2, kind, inside):
    what, metric = whats()[kind], LogitDiff(ANSWERS, WRONG)
    if kind == "given mean" and inside != ("pos", "head"):
        what = patching.Mean(torch.randn(8))  # of which each part is one
    few = {"pos": [0, 4], "head": [1, 3]}
    grid = {"name": "z", "layer": [0, 2], **{axis: few[axis] for axis in inside}}
    found = sweep(gpt2, prompts(2), grid, metric, what=what, progress=False)
    for layer, *chosen in product([0, 2], *(few[axis] for axis in inside)):
        at = dict(zip(inside, chosen, strict=True))
        fields = {"position" if axis == "pos" else axis: place for axis, place in at.items()}
        one = patching.Intervention("z", what, layer=layer, **fields)
        with torch.no_grad():
            expected = metric(gpt2.intervene(prompts(2), one))
        ours = found.at(layer=layer, **at).values
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


def test_a_what_of_ones_own_may_use_the_source(gpt2):
    class Halfway(patching.What):
        needs_source = True

        def of(self, x, source=None):
            return (x + source) / 2

    grid = {"name": "resid_pre", "layer": [1], "pos": [2, 5]}
    found = run(gpt2, grid=grid, what=Halfway())
    with torch.no_grad():
        cache = gpt2.cache(prompts(2, seed=1), "blocks.1.hook_resid_pre")
        for pos in (2, 5):
            logits = one_run(
                gpt2, prompts(2), None, "resid_pre", 1, {"pos": pos},
                lambda part, full, index: (part + cache[full][index]) / 2,
            )  # fmt: skip
            expected = LogitDiff(5, 20)(logits)
            torch.testing.assert_close(
                found.at(layer=1, pos=pos).values, expected, rtol=1e-5, atol=1e-5
            )
    with pytest.raises(InputError, match="nothing to patch with"):
        sweep(gpt2, prompts(2), grid, LogitDiff(5, 20), what=Halfway())


# Directions, axes, prompts ------------------------------------------------------------------------


def test_denoising_and_noising_are_two_sweeps(gpt2):
    base, source, metric = prompts(2), prompts(2, seed=1), LogitDiff(5, 20)
    grid = {"name": ["resid_pre", "z"], "layer": True, "pos": [1, -1]}
    both = run(gpt2, grid=grid, direction="both")
    assert both.axes == {
        "direction": ["denoise", "noise"], "name": ["resid_pre", "z"],
        "layer": [0, 1, 2, 3], "pos": [1, 5],
    }  # fmt: skip
    denoised = sweep(gpt2, base, grid, metric, source, progress=False)
    noised = sweep(gpt2, base, grid, metric, source, direction="noise", progress=False)
    swapped = sweep(gpt2, source, grid, metric, base, progress=False)
    close = dict(rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(both.at(direction="denoise").values, denoised.values, **close)
    torch.testing.assert_close(both.at(direction="noise").values, noised.values, **close)
    torch.testing.assert_close(noised.values, swapped.values, **close)
    with torch.no_grad():
        ends = [metric(gpt2(tokens)) for tokens in (base, source)]
    for result in (both, denoised, noised):
        torch.testing.assert_close(torch.stack([result.corrupted, result.clean]),
                                   torch.stack(ends), **close)  # fmt: skip
    assert (denoised.fixed, noised.fixed) == ({"direction": "denoise"}, {"direction": "noise"})
    # All of the stream at once leaves nothing of the run that is patched.
    whole = run(gpt2, grid={"name": "resid_pre", "layer": True}, direction="both").normalised()
    expected = torch.tensor([[1.0], [0.0]]).expand(2, 4)
    torch.testing.assert_close(whole.values, expected, rtol=0, atol=1e-4)


def test_axes_stand_as_the_grid_has_them(gpt2):
    grid = {"head": [1, 0], "example": True, "layer": [2], "name": "z", "pos": 3}
    found = run(gpt2, grid=grid)
    assert found.axes == {"head": [1, 0], "example": [0, 1], "layer": [2]}
    assert found.fixed == {"name": "z", "pos": 3, "direction": "denoise"}
    same = run(gpt2, grid={"name": ["z"], "layer": True, "pos": slice(3, 4), "head": range(4)})
    assert list(same.axes.values()) == [["z"], [0, 1, 2, 3], [3], [0, 1, 2, 3]]
    torch.testing.assert_close(
        found.values.mean(1)[:, 0], same.values[0, 2, 0, [1, 0]], rtol=1e-5, atol=1e-5
    )
    one = run(gpt2, grid={"name": "z", "layer": -2, "head": 1, "pos": 3, "example": 1})
    assert one.axes == {}
    torch.testing.assert_close(one.values, found.values[0, 1, 0], rtol=1e-5, atol=1e-5)
    assert one.clean.shape == ()


def test_full_names_and_other_spellings(gpt2):
    here = {"name": ["blocks.1.attn.hook_z", "blocks.3.hook_mlp_out"], "position": [2, 3]}
    there = {"name": ["z", "mlp_out"], "layer": [1, 3], "pos": [2, 3]}
    found, all_of_them = run(gpt2, grid=here), run(gpt2, grid=there)
    expected = torch.stack([all_of_them.values[0, 0], all_of_them.values[1, 1]])
    torch.testing.assert_close(found.values, expected, rtol=1e-5, atol=1e-5)
    inner = run(gpt2, grid={"name": "ln1.hook_normalized", "layer": [1], "pos": [2]})
    assert inner.values.shape == (1, 1)
    one = {"name": "pattern", "layer": 1, "head_index": 0, "dest_pos": [4], "src_pos": [1, 2]}
    assert list(run(gpt2, grid=one).axes) == ["pos", "key_pos"]


def test_every_layer_is_every_layer_that_has_it():
    model = model_for("bamba")
    has = [i for i in range(4) if f"blocks.{i}.attn.hook_z" in model.hook_dict]
    assert 0 < len(has) < 4
    found = run(model, grid={"name": ["resid_pre", "z"], "layer": True})
    assert found.axes["layer"] == has
    assert run(model, grid={"name": "resid_pre", "layer": True}).axes["layer"] == [0, 1, 2, 3]
    with pytest.raises(HookNameError, match="hook_z"):
        run(model, grid={"name": "z", "layer": [i for i in range(4) if i not in has]})


def test_text_is_tokenized_and_stands_in_the_result():
    model = hookedlm.load(model_of("gpt2"), tokenizer=word_tokenizer())
    base, source = "the cat sat on a mat", "the dog sat on a mat"
    grid, metric = {"name": "resid_pre", "layer": [0], "pos": True}, LogProb.of(model, "mat")
    found = sweep(model, base, grid, metric, source, prepend_bos=True, progress=False)
    assert found.tokens == ["<s>", *base.split()]
    same = sweep(
        model, model.to_tokens(base, True), grid, metric, model.to_tokens(source, True),
        progress=False,
    )  # fmt: skip
    assert torch.equal(found.values, same.values)
    ragged = [base, "the cat ran"], [source, "the dog ran"]
    per_example = sweep(
        model, ragged[0], grid | {"example": True}, LogProb(8, positions=[5, 2]), ragged[1],
        prepend_bos=False, progress=False,
    )  # fmt: skip
    assert per_example.tokens is None
    alone = sweep(
        model, ragged[0][1], grid, LogProb(8), ragged[1][1], prepend_bos=False, progress=False
    )
    torch.testing.assert_close(
        per_example.at(example=1).values[:, :3], alone.values, rtol=1e-4, atol=1e-5
    )
    with pytest.raises(InputError, match=r"position -1, which is padding in example 1.*sum\(1\)"):
        sweep(model, ragged[0], grid, LogProb(8), ragged[1])


def test_a_cache_will_do_as_a_source(gpt2):
    expected = run(gpt2)
    _, cache = gpt2.run_with_cache(prompts(2, seed=1))
    found = run(gpt2, source=cache)
    torch.testing.assert_close(found.values, expected.values, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.clean, expected.clean, rtol=1e-5, atol=1e-5)
    few = gpt2.cache(prompts(2, seed=1), "blocks.*.hook_resid_pre")
    found = run(gpt2, source=few)
    torch.testing.assert_close(found.values, expected.values, rtol=1e-5, atol=1e-5)
    assert found.clean is None
    with pytest.raises(InputError, match="normalising wants a clean run"):
        found.normalised()
    named = {name: few[name] for name in few}
    assert torch.equal(run(gpt2, source=named).values, found.values)
    assert len(found.top(2)) == 2  # what it was unpatched is known
    with pytest.raises(InputError, match="which must then be a prompt"):
        run(gpt2, source=few, direction="both")


def test_one_prompt_serves_many(gpt2):
    """One base for several sources, and the other way round."""
    grid = {"name": "resid_pre", "layer": [1], "pos": True, "example": True}
    one, many, metric = prompts(1), prompts(3, seed=1), LogitDiff(5, 20)
    for base, source in ((one, many), (many, one)):
        for direction in ("denoise", "noise"):
            options = dict(direction=direction, progress=False)
            found = sweep(gpt2, base, grid, metric, source, **options)
            same = sweep(gpt2, base.expand(3, -1), grid, metric, source.expand(3, -1), **options)
            torch.testing.assert_close(found.values, same.values, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(found.clean, same.clean, rtol=1e-5, atol=1e-5)


def test_half_precision():
    model = hookedlm.load(model_of("llama", dtype=torch.bfloat16))
    found = run(model)
    assert found.values.dtype == torch.float32
    expected = run(model_for("llama"))
    scale = float(expected.values.std())
    assert float((found.values - expected.values).abs().median()) < 0.2 * scale


# Interruptions ------------------------------------------------------------------------------------


def at_call(n, error):
    """A metric that raises at its n-th call (the first two are those of unpatched runs)."""
    calls = []

    def metric(logits):
        calls.append(len(calls))
        if len(calls) == n:
            raise error
        return logits[:, -1, 5].mean()

    return metric


def test_ctrl_c_returns_what_is_done(gpt2, tmp_path):
    plain = run(gpt2, lambda logits: logits[:, -1, 5].mean())
    found = run(gpt2, at_call(2 + 8, KeyboardInterrupt()), batch_size=3)
    assert not found.complete
    assert plain.complete
    done = ~found.values.isnan()
    assert int(done.sum()) == 6
    torch.testing.assert_close(found.values[done], plain.values[done], rtol=1e-5, atol=1e-5)
    assert "INCOMPLETE: 6 of 24" in repr(found)
    found.save(tmp_path / "found")
    assert not SweepResult.load(tmp_path / "found").complete
    assert len(found.top(100)) == 6
    assert no_hooks(gpt2)
    with pytest.raises(KeyboardInterrupt):
        run(gpt2, at_call(1, KeyboardInterrupt()))


def no_hooks(model):
    return not any(point.wanted for point in model.hook_dict.values())


def test_out_of_memory_halves_the_batch(gpt2, monkeypatch):
    plain, sizes, run_one = run(gpt2), [], engine._run

    def little(base, plan, cells, *rest):
        sizes.append(len(cells))
        if len(cells) > 3:
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")
        return run_one(base, plan, cells, *rest)

    monkeypatch.setattr(engine, "_run", little)
    found = run(gpt2, batch_size=12)
    assert sizes == [12, 6, *[3] * 8]
    torch.testing.assert_close(found.values, plain.values, rtol=1e-5, atol=1e-5)
    with pytest.raises(RuntimeError, match="something else"):
        run(gpt2, at_call(5, RuntimeError("something else")))
    with pytest.raises(RuntimeError, match="can't allocate"):
        run(gpt2, at_call(5, RuntimeError("can't allocate memory")), batch_size=1)


def test_a_metric_that_raises_leaves_no_hooks(gpt2):
    for kind in ("gpt2", "hrm_text"):
        with pytest.raises(ZeroDivisionError):
            run(model_for(kind), at_call(6, ZeroDivisionError()))
        assert no_hooks(model_for(kind))
    with pytest.raises(InputError, match=r"returned 2 values; expected one number"):
        run(gpt2, lambda logits: logits[:, -1, 5])
    grid = {"name": "z", "layer": 0, "example": True}
    with pytest.raises(InputError, match=r"one number for each, \[2\]"):
        run(gpt2, lambda logits: logits[:, -1, 5].mean(), grid=grid)


@pytest.mark.parametrize("metric", [LogitDiff(5, 20), lambda logits: logits[:, -1, 5].mean()])
def test_hooks_in_the_model_stay_in(gpt2, metric):
    """They see whole runs, one for each cell, and their edits are in every number."""
    shapes = []

    def double(x, hook):
        shapes.append(tuple(x.shape))
        return x * 2

    grid = {"name": "resid_pre", "layer": [0, 2], "pos": [1, 5]}
    with gpt2.hooks(fwd_hooks=[("blocks.1.hook_mlp_out", double)]):
        found = run(gpt2, metric, grid)
        assert shapes == [(2, LENGTH, 32)] * 6  # two unpatched runs, four cells
        cache = gpt2.cache(prompts(2, seed=1), "blocks.*.hook_resid_pre")
        for layer, pos in product([0, 2], [1, 5]):
            logits = one_run(
                gpt2, prompts(2), None, "resid_pre", layer, {"pos": pos},
                lambda part, full, index: cache[full][index],
            )  # fmt: skip
            torch.testing.assert_close(found.at(layer=layer, pos=pos).values, metric(logits))
        with torch.no_grad():
            torch.testing.assert_close(found.corrupted, metric(gpt2(prompts(2))))
    assert not torch.allclose(found.values, run(gpt2, metric, grid).values)


# Refusals -----------------------------------------------------------------------------------------

GRID = {"name": "z", "layer": True}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (dict(grid=[1]), "the grid is list: expected a dictionary"),
        (dict(grid={"layer": True}), "names no activation"),
        (dict(grid=GRID | {"heads": True}), "no axis 'heads': a grid may have name, layer, pos"),
        (dict(grid=GRID | {"pos": True, "position": 1}), "'pos' stands twice"),
        (dict(grid=GRID | {"layer": 4}), r"layer=4: there are 4 layers, 0 to 3 \(or -4 to -1\)"),
        (dict(grid=GRID | {"head": [0, 4]}), r"head=4: there are 4 heads, 0 to 3"),
        (dict(grid=GRID | {"pos": -7}), r"pos=-7: there are 6 positions, 0 to 5"),
        (dict(grid=GRID | {"pos": {"a": [0, 6]}}), r"pos\['a'\]=6: there are 6 positions"),
        (dict(grid=GRID | {"pos": torch.tensor([1, 2, 3])}), "given for 3 examples, and there"),
        (dict(grid=GRID | {"pos": {}}), "name at least one position"),
        (dict(grid=GRID | {"example": 2}), r"example=2: there are 2 examples, 0 to 1"),
        (dict(grid=GRID | {"neuron": 0}), r"hook_z is \[batch pos head d_head\]: 'neuron'"),
        (dict(grid=GRID | {"head": []}), r"head=\[\]: expected True"),
        (dict(grid=GRID | {"head": "first"}), "head='first': expected True"),
        (dict(grid=GRID | {"head": 1.5}), "head=1.5: expected True"),
        (dict(grid=GRID | {"head": False}), "head=False: expected True"),
        (dict(grid=GRID | {"head": [1, -3]}), "one stands there twice"),
        (dict(grid=GRID | {"name": []}), "expected an activation's name"),
        (dict(grid=GRID | {"name": ["z", "z"]}), "one stands there twice"),
        (dict(grid=GRID | {"name": "hook_*"}), "takes no patterns"),
        (dict(grid={"name": "z"}), "in several layers: add \"layer\": True"),
        (dict(grid=GRID | {"name": "blocks.1.attn.hook_z"}), "is a full name: give no layer"),
        (dict(grid={"name": "hook_embed"}), "stands outside the blocks"),
        (dict(direction="back"), "expected one of denoise, noise, both"),
        (dict(batch_size=0), "batch_size=0: expected at least 1"),
        (dict(source=prompts(2, length=5)), "base has 6 tokens and source 5 in example 0"),
        (dict(source=prompts(3)), "base has 2 prompts for 3"),
        (dict(source=None), "nothing to patch with"),
        (dict(source=torch.zeros(2, 6)), "source is a float tensor"),
        (dict(what=patching.Zero()), r"Zero\(\) takes nothing from a source"),
        (dict(what=patching.Patch(prompts(1), position=1), source=None), "those of the grid"),
        (dict(what=patching.Add(torch.zeros(7)), source=None), r"\[7\] does not broadcast"),
        (dict(what=patching.ProjectOut(torch.ones(7)), source=None), "width 7"),
        (dict(what=patching.Patch(prompts(1, length=4)), source=None), "has shape"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_before_anything_is_patched(gpt2, given, message, monkeypatch):
    monkeypatch.setattr(MODULE, "run_cells", lambda *a, **k: pytest.fail("it ran"))
    arguments = dict(grid=GRID, source=prompts(2, seed=1)) | given
    with pytest.raises(InputError, match=message):
        sweep(gpt2, prompts(2), metric=LogitDiff(5, 20), **arguments)
    assert no_hooks(gpt2)


def test_activations_that_differ_are_swept_apart():
    model = model_for("llama")
    with pytest.raises(InputError, match=r"number of heads: .*hook_q has 4, .*hook_k has 2"):
        run(model, grid={"name": ["q", "k"], "layer": True, "head": True})
    assert run(model, grid={"name": ["v", "k"], "layer": 0, "head": True}).values.shape == (2, 2)
    with pytest.raises(InputError, match="differ in their axes"):
        run(model_for("deepseek_v3"), grid={"name": "post", "layer": True})
    with pytest.raises(HookNameError, match=r"Nearest: blocks\.0\.hook_resid_pre"):
        run(model, grid={"name": "resid_pree", "layer": True})


def test_ragged_prompts_must_be_ragged_alike():
    model = hookedlm.load(model_of("gpt2"), tokenizer=word_tokenizer())
    with pytest.raises(InputError, match="base has 3 tokens and source 2 in example 1"):
        sweep(
            model, ["the cat sat on", "the cat ran"], GRID, LogProb(8, positions=0),
            ["the dog sat on", "the dog"], prepend_bos=False,
        )  # fmt: skip


# Results ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def result(gpt2):
    grid = {"name": ["resid_pre", "z"], "layer": True, "pos": True}
    return run(gpt2, grid=grid, n=1)


def test_parts_of_a_result(result):
    part = result.at(name="z", pos=[5, 1])
    assert part.axes == {"layer": [0, 1, 2, 3], "pos": [5, 1]}
    assert torch.equal(part.values, result.values[1][:, [5, 1]])
    assert part.fixed == result.fixed | {"name": "z"}
    for wrong in (dict(head=1), dict(name="q"), dict(pos=[6])):
        with pytest.raises(InputError, match=r"no axis|has no"):
            result.at(**wrong)
    with pytest.raises(InputError, match="values of shape"):
        SweepResult(torch.zeros(2), {"layer": [0]}, "metric")


def test_normalised_results(result, gpt2):
    bottom, top = result.corrupted, result.clean
    scaled = result.normalised()
    torch.testing.assert_close(scaled.values, (result.values - bottom) / (top - bottom))
    assert (float(scaled.corrupted), float(scaled.clean)) == (0, 1)
    grid = {"example": True, "name": "resid_pre", "layer": True}
    each = run(gpt2, grid=grid)  # all positions at once: each example is the clean one
    torch.testing.assert_close(each.normalised().values, torch.ones(2, 4), rtol=0, atol=1e-3)
    with pytest.raises(InputError, match="is the same"):
        run(gpt2, source=prompts(2)).normalised()


def test_the_largest_changes(result, gpt2):
    changes = (result.values - result.corrupted).flatten()
    best = changes.abs().argsort(descending=True)[:5]
    cells = list(product(*result.axes.values()))
    found = result.top(5)
    assert [tuple(cell[axis] for axis in result.axes) for cell in found] == [cells[i] for i in best]
    assert [cell["change"] for cell in found] == pytest.approx(changes[best].tolist())
    both = run(gpt2, direction="both")
    torch.testing.assert_close(both.changes()[1], both.values[1] - both.clean)
    torch.testing.assert_close(both.at(direction="noise").changes(), both.changes()[1])
    torch.testing.assert_close(both.at(direction=["noise"]).changes(), both.changes()[1:])


def test_tables(gpt2):
    model = hookedlm.load(model_of("gpt2"), tokenizer=word_tokenizer())
    grid = {"name": "resid_pre", "layer": [0, 3], "pos": [0, 2]}
    found = sweep(model, "the cat sat", grid, LogProb(5), "the dog sat", prepend_bos=False,
                  progress=False)  # fmt: skip
    table = found.df
    assert list(table.columns) == ["layer", "pos", "token", "value"]
    assert table[["layer", "pos"]].to_numpy().tolist() == [[0, 0], [0, 2], [3, 0], [3, 2]]
    assert list(table["token"]) == ["the", "sat"] * 2
    assert list(table["value"]) == found.values.flatten().tolist()


def test_tables_without_pandas(result, monkeypatch):
    importing = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "pandas":
            raise ImportError("no pandas")
        return importing(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"pip install hookedlm\[plots\]"):
        _ = result.df


def test_figures(result, gpt2):
    pytest.importorskip("plotly")
    [line] = result.at(name="z", pos=2).plot().data
    assert list(line.y) == pytest.approx(result.values[1, :, 2].tolist())
    figure = result.at(name="z").plot(title="here")
    assert torch.tensor(figure.data[0].z).allclose(result.values[1])
    assert figure.layout.title.text == "here"
    assert figure.data[0].zmid == pytest.approx(float(result.corrupted))
    panels = result.plot()
    assert [title.text for title in panels.layout.annotations] == ["resid_pre", "z"]
    assert panels.layout.coloraxis.colorbar.title.text == result.metric
    by_layer = run(gpt2, grid={"name": "z", "layer": [0, 1], "head": True, "pos": True}).plot()
    assert [title.text for title in by_layer.layout.annotations] == ["layer 0", "layer 1"]
    for panel, values in zip(panels.data, result.values, strict=True):
        assert torch.tensor(panel.z).allclose(values)
    assert panels.layout.coloraxis.cmid == pytest.approx(float(result.corrupted))
    with pytest.raises(InputError, match="one to three axes, and there are 4"):
        run(gpt2, grid={"name": ["z", "v"], "layer": True, "head": True, "pos": True}).plot()


def test_results_are_saved_whole(result, gpt2, tmp_path, monkeypatch):
    each = run(gpt2, grid={"name": "z", "layer": [1, 2], "example": True}, direction="both")
    ablated = sweep(gpt2, prompts(1), GRID, LogProb(5), what=patching.Zero(), progress=False)
    for found in (result, each, ablated):
        path = tmp_path / "sweep.safetensors"
        found.save(path)
        again = SweepResult.load(path)
        for name, value in vars(found).items():
            if isinstance(value, torch.Tensor):
                assert torch.equal(vars(again)[name], value)
            else:
                assert vars(again)[name] == value
        assert repr(again) == repr(found)
    before = path.read_bytes()
    monkeypatch.setattr("os.replace", lambda *a: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        result.save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_other_files_are_refused(tmp_path):
    with pytest.raises(CacheFileError, match="no such file"):
        SweepResult.load(tmp_path / "none")
    broken = tmp_path / "broken"
    broken.write_bytes(b"not at all")
    with pytest.raises(CacheFileError, match="damaged"):
        SweepResult.load(broken)
    from safetensors.torch import save_file

    save_file({"values": torch.zeros(1)}, broken)
    with pytest.raises(CacheFileError, match="was not written by"):
        SweepResult.load(broken)
