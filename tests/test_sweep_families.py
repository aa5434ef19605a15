"""Sweeps on every registered family: one batch of packed runs beside one run after the other."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from tiny import VOCAB, registered

import hookedlm
from hookedlm import patching
from hookedlm.families import FAMILIES
from hookedlm.patching import LogitDiff, sweep
from hookedlm.patching.base_run import Reuse, run_base

LENGTH = 6
POSITIONS = [0, 2, 5]


@pytest.fixture(scope="module", params=[pytest.param(t, id=t.id) for t in registered(FAMILIES)])
def model(request):
    return hookedlm.load(request.param.build())


def prompts(n, seed):
    return torch.randint(3, VOCAB, (n, LENGTH), generator=torch.Generator().manual_seed(seed))


def layers_with(model, name):
    """Those that have it, alike."""
    points = {
        layer: model.hook_dict[hookedlm.get_act_name(name, layer)]
        for layer in range(model.cfg.n_layers)
        if hookedlm.get_act_name(name, layer) in model.hook_dict
    }
    shapes = {layer: point.axes for layer, point in points.items()}
    return [layer for layer in points if shapes[layer] == shapes[min(shapes)]]


@torch.no_grad()
def naive(model, base, mask, name, layer, index, clean, metric):
    """The metric of one run with one part patched."""
    full = hookedlm.get_act_name(name, layer)

    def patch(x, hook):
        x = x.clone()
        x[index] = clean[full][index]
        return x

    hooks = [(full, patch)]
    return metric(model.run_with_hooks(base, fwd_hooks=hooks, attention_mask=mask))


@pytest.mark.parametrize(
    ("name", "padded"),
    [("resid_pre", False), ("resid_pre", True), ("z", True), ("mlp_out", False), ("pattern", True)],
)
def test_a_sweep_is_one_run_after_the_other(model, name, padded):
    layers = layers_with(model, name)
    if not layers:
        pytest.skip(f"no {name}")
    n = 2 if padded else 1
    base, source = prompts(n, 0), prompts(n, 1)
    mask = torch.ones(n, LENGTH, dtype=torch.long)
    mask[-1, :2] = 0
    mask = mask if padded else None
    names = [hookedlm.get_act_name(name, layer) for layer in layers]
    clean = model.cache(source, names, attention_mask=mask)
    metric = LogitDiff(5, 20, positions=3 if name == "mlp_out" else -1)
    grid = {"name": name, "layer": layers}
    grid |= {"head": [0, 1]} if name == "pattern" else {"pos": POSITIONS}
    options = dict(attention_mask=mask, progress=False)
    found = sweep(model, base, grid, metric, source, **options).values
    logits = model(base, attention_mask=mask).detach()
    room = dict(rtol=1e-5, atol=1e-5 * float(logits.abs().max()))
    for i, j in product(range(len(layers)), range(found.shape[1])):
        index = (slice(None), [0, 1][j] if name == "pattern" else POSITIONS[j])
        expected = naive(model, base, mask, name, layers[i], index, clean, metric)
        torch.testing.assert_close(found[i, j], expected, **room)


def test_the_classic_functions_read_columns(model):
    """A function that indexes one token's logits, on runs which all begin at once."""
    layers = layers_with(model, "z")
    if layers != list(range(model.cfg.n_layers)):
        pytest.skip("a layer without heads")
    base, source = prompts(2, 0), prompts(2, 1)
    clean = model.run_with_cache(source)[1]

    def metric(logits):
        return (logits[:, -1, 5] - logits[:, -1, [7, 9]].sum(-1)).mean()

    found = patching.get_act_patch_attn_head_out_all_pos(model, base, clean, metric)
    room = dict(rtol=1e-5, atol=1e-5 * float(model(base).detach().abs().max()))
    for layer, head in product(layers, (0, found.shape[1] - 1)):
        index = (slice(None), slice(None), head)
        expected = naive(model, base, None, "z", layer, index, clean, metric)
        torch.testing.assert_close(found[layer, head], expected, **room)


def test_most_families_go_on_from_the_middle():
    """So that the tests above are of packed runs."""
    kinds = [run_base(hookedlm.load(t.build()), prompts(1, 0)).reuse for t in registered(FAMILIES)]
    assert sum(kind == Reuse.POSITIONS for kind in kinds) > 0.7 * len(kinds)
