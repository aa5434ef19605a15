"""Patching beside brute force: torch hooks on Hugging Face's own module, one run an index."""

from __future__ import annotations

import builtins
import inspect
from contextlib import ExitStack, contextmanager
from itertools import product

import pytest
import torch
from tiny import tinies
from transformers import AttentionInterface

import hookedlm
from hookedlm import patching
from hookedlm.errors import HookNameError, InputError

LENGTH = 4
FAMILIES = {
    "gpt2": dict(blocks="transformer.h", out="attn.c_proj"),
    "llama": dict(blocks="model.layers", out="self_attn.o_proj", k="self_attn.k_proj"),
}
CLOSE = dict(rtol=1e-4, atol=1e-5)


def metric(logits):
    return (logits[:, -1, 3] - logits[:, -1, 4]).mean()


class Case:
    """A tiny model, ours and Hugging Face's, with a clean and a corrupted batch."""

    def __init__(self, family: str):
        tiny = next(t for t in tinies(family) if t.config.get("num_key_value_heads", 2) == 2)
        self.hf, self.place = tiny.build(), FAMILIES[family]
        self.model = hookedlm.load(self.hf)
        generator = torch.Generator().manual_seed(0)
        self.clean, self.corrupted = torch.randint(96, (2, 2, LENGTH), generator=generator)
        _, self.cache = self.model.run_with_cache(self.clean)
        self.blocks = self.hf.get_submodule(self.place["blocks"])
        self.n_layers, self.n_heads = self.model.cfg.n_layers, self.model.cfg.n_heads

    def run(self, sweep, **kwargs):
        return sweep(self.model, self.corrupted, self.cache, metric, **kwargs)


@pytest.fixture(scope="module", params=list(FAMILIES))
def case(request):
    return Case(request.param)


# Brute force: `wrap(layer, change)` puts `change` where the activation is in Hugging Face's model.


def stream(case, layer, change):
    def before(module, args, kwargs):
        hidden = args[0] if args else kwargs.pop("hidden_states")
        return (change(hidden), *args[1:]), kwargs

    return case.blocks[layer].register_forward_pre_hook(before, with_kwargs=True)


def head_output(case, layer, change):
    def before(module, args):
        z = args[0].unflatten(-1, (case.n_heads, -1))
        return (change(z).flatten(-2),)

    return case.blocks[layer].get_submodule(case.place["out"]).register_forward_pre_hook(before)


def key(case, layer, change):
    def after(module, args, out):
        return change(out.unflatten(-1, (2, -1))).flatten(-2)

    return case.blocks[layer].get_submodule(case.place["k"]).register_forward_hook(after)


def brute_force(case, put_in, indices, where):
    """One number an index: ``where(index)`` selects what is taken from the clean run."""
    clean = []

    def record(x):
        clean.append(x.clone())
        return x

    with ExitStack() as stack, torch.no_grad():
        for layer in range(case.n_layers):
            stack.callback(put_in(case, layer, record).remove)
        case.hf(case.clean)
    answers = []
    for index in indices:

        def change(x, index=index):
            x = x.clone()
            x[where(index)] = clean[index[0]][where(index)]
            return x

        handle = put_in(case, index[0], change)
        try:
            with torch.no_grad():
                answers.append(metric(case.hf(case.corrupted).logits))
        finally:
            handle.remove()
    return torch.stack(answers)


def grid(*lengths):
    return list(product(*(range(n) for n in lengths)))


ALL = slice(None)


def test_the_stream_at_each_position(case):
    ours = case.run(patching.get_act_patch_resid_pre)
    indices = grid(case.n_layers, LENGTH)
    theirs = brute_force(case, stream, indices, lambda i: (ALL, i[1]))
    torch.testing.assert_close(ours.flatten(), theirs, **CLOSE)
    assert ours.shape == (case.n_layers, LENGTH)


def test_heads_at_each_position_and_at_all(case):
    indices = grid(case.n_layers, LENGTH, case.n_heads)
    theirs = brute_force(case, head_output, indices, lambda i: (ALL, i[1], i[2]))
    ours = case.run(patching.get_act_patch_attn_head_out_by_pos)
    torch.testing.assert_close(ours.flatten(), theirs, **CLOSE)

    indices = grid(case.n_layers, case.n_heads)
    theirs = brute_force(case, head_output, indices, lambda i: (ALL, ALL, i[1]))
    ours = case.run(patching.get_act_patch_attn_head_out_all_pos)
    torch.testing.assert_close(ours.flatten(), theirs, **CLOSE)


def test_grouped_keys_have_their_own_heads():
    case = Case("llama")
    theirs = brute_force(case, key, grid(3, LENGTH, 2), lambda i: (ALL, i[1], i[2]))
    ours = case.run(patching.get_act_patch_attn_head_k_by_pos)
    assert ours.shape == (3, LENGTH, 2)
    torch.testing.assert_close(ours.flatten(), theirs, **CLOSE)


@contextmanager
def attention_replaced(hf, change):
    """Hugging Face's model with plain causal attention; ``change(layer, pattern)`` in between."""

    def attend(module, query, key, value, attention_mask, scaling=None, **kwargs):
        groups = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        scores = query @ key.transpose(-2, -1) * scale
        later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        pattern = change(module.layer_idx, scores.masked_fill(later, -torch.inf).softmax(-1))
        return (pattern @ value).transpose(1, 2).contiguous(), pattern

    before = hf.config._attn_implementation
    AttentionInterface.register("patched_in_a_test", attend)
    hf.config._attn_implementation = "patched_in_a_test"
    try:
        yield
    finally:
        hf.config._attn_implementation = before


def patterns_by_brute_force(case, indices, where):
    clean = {}

    def record(layer, pattern):
        clean[layer] = pattern
        return pattern

    with attention_replaced(case.hf, record), torch.no_grad():
        case.hf(case.clean)
    answers = []
    for index in indices:

        def change(layer, pattern, index=index):
            if layer == index[0]:
                pattern = pattern.clone()
                pattern[where(index)] = clean[layer][where(index)]
            return pattern

        with attention_replaced(case.hf, change), torch.no_grad():
            answers.append(metric(case.hf(case.corrupted).logits))
    return torch.stack(answers)


@pytest.mark.parametrize(
    ("sweep", "axes"),
    [
        (patching.get_act_patch_attn_head_pattern_all_pos, 0),
        (patching.get_act_patch_attn_head_pattern_by_pos, 1),
        (patching.get_act_patch_attn_head_pattern_dest_src_pos, 2),
    ],
)
def test_patterns(case, sweep, axes):
    shape = (case.n_layers, case.n_heads, *[LENGTH] * axes)
    theirs = patterns_by_brute_force(case, grid(*shape), lambda i: (ALL, *i[1:]))
    ours = case.run(sweep)
    assert ours.shape == shape
    torch.testing.assert_close(ours.flatten(), theirs, **CLOSE)


# The whole table ----------------------------------------------------


SWEEPS = [
    name
    for name in vars(patching)
    if name.startswith("get_act_patch_") and not name.endswith("_every")
]


def test_the_table_is_transformer_lens():
    assert len(SWEEPS) == 15
    setters = [name for name in vars(patching) if name.endswith("_patch_setter")]
    assert len(setters) == 6
    for name in SWEEPS + setters:
        function = vars(patching)[name]
        assert function.__name__ == name
        assert function.__doc__
    assert (
        list(inspect.signature(patching.generic_activation_patch).parameters)
        == (
            "model corrupted_tokens clean_cache patching_metric patch_setter activation_name "
            "index_axis_names index_df return_index_df"
        ).split()
    )


@pytest.mark.parametrize("name", SWEEPS)
def test_patching_a_run_with_itself_changes_nothing(case, name):
    _, same = case.model.run_with_cache(case.corrupted)
    ours = vars(patching)[name](case.model, case.corrupted, same, metric)
    expected = metric(case.model(case.corrupted)).detach()
    torch.testing.assert_close(ours, expected.expand(ours.shape), **CLOSE)


def test_stacks(case):
    n, h = case.n_layers, case.n_heads
    every = case.run(patching.get_act_patch_attn_head_by_pos_every)
    assert every.shape == (5, n, LENGTH, h)
    assert torch.equal(every[0], case.run(patching.get_act_patch_attn_head_out_by_pos))
    rows = case.run(patching.get_act_patch_attn_head_pattern_by_pos)
    assert torch.equal(every[4], rows.transpose(1, 2))

    every = case.run(patching.get_act_patch_attn_head_all_pos_every)
    keys = case.run(patching.get_act_patch_attn_head_k_all_pos)
    assert every.shape == (5, n, h)
    assert torch.equal(every[2][:, :: h // keys.shape[1]], keys)

    every = case.run(patching.get_act_patch_block_every)
    assert every.shape == (3, n, LENGTH)
    assert torch.equal(every[2], case.run(patching.get_act_patch_mlp_out))


# Tables of indices, and what is refused ----------------------------------------------------


def test_a_table_of_indices_gives_a_list():
    case = Case("gpt2")
    whole, table = case.run(patching.get_act_patch_resid_pre, return_index_df=True)
    assert list(table.columns) == ["layer", "pos"]
    assert table.shape == (case.n_layers * LENGTH, 2)

    some = table.iloc[[7, 2, 10]]
    answers, same = patching.generic_activation_patch(
        case.model,
        case.corrupted,
        case.cache,
        metric,
        patching.layer_pos_patch_setter,
        "resid_pre",
        index_df=some,
        return_index_df=True,
    )
    assert same is some
    torch.testing.assert_close(answers, whole.flatten()[[7, 2, 10]], **CLOSE)


def test_pandas_is_only_needed_for_tables(monkeypatch):
    real = builtins.__import__

    def no_pandas(name, *args, **kwargs):
        if name.split(".")[0] == "pandas":
            raise ImportError("no pandas")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", no_pandas)
    case = Case("gpt2")
    assert case.run(patching.get_act_patch_mlp_out).shape == (case.n_layers, LENGTH)
    with pytest.raises(ImportError, match=r"hookedlm\[plots\]"):
        patching.make_df_from_ranges([2, 2], ["layer", "pos"])


def test_an_own_setter_and_other_hooks_stay_in():
    case = Case("gpt2")
    zero = case.model.add_hook("blocks.2.hook_mlp_out", lambda x, hook: x * 0)

    def swap(corrupted, index, clean):
        return clean

    ours = patching.generic_activation_patch(
        case.model, case.corrupted, case.cache, metric, swap, "resid_pre", ["layer"]
    )
    expected = metric(case.model(case.clean)).detach()
    torch.testing.assert_close(ours, expected.expand(case.n_layers), **CLOSE)
    assert case.model.hook_dict["blocks.2.hook_mlp_out"].fwd_hooks == [zero]


def test_hooks_are_gone_after_an_error():
    case = Case("gpt2")
    runs = []

    def failing(logits):
        runs.append(logits)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        patching.get_act_patch_resid_pre(case.model, case.corrupted, case.cache, failing)
    assert len(runs) == 1
    assert not any(point.wanted for point in case.model.hook_points())


def refuse(case, match, *, tokens=None, cache=None, axes=("layer", "pos"), name="resid_pre", **kw):
    def never(logits):
        raise AssertionError("nothing should have run")

    with pytest.raises((InputError, HookNameError), match=match):
        patching.generic_activation_patch(
            case.model,
            case.corrupted if tokens is None else tokens,
            case.cache if cache is None else cache,
            kw.pop("metric", never),
            patching.layer_pos_patch_setter,
            name,
            index_axis_names=axes,
            **kw,
        )


def test_what_does_not_fit_is_refused_before_anything_runs():
    case = Case("gpt2")
    table = patching.make_df_from_ranges([case.n_layers, LENGTH], ["layer", "pos"])
    _, small = case.model.run_with_cache(case.clean[:1], remove_batch_dim=True)
    refuse(case, "index_axis_names", axes=("pos", "layer"))
    refuse(case, "index_axis_names", axes=("layer", "position"))
    refuse(case, "indexes none of them", axes=("layer", "head"))
    refuse(case, "not both", index_df=table)
    refuse(case, "not both", axes=None)
    refuse(case, "layer 3", axes=None, index_df=table.assign(layer=table["layer"] + 1))
    refuse(case, "pos 4", axes=None, index_df=table.assign(pos=table["pos"] + 1))
    refuse(case, "equal length", tokens=case.corrupted[:, :-1])
    refuse(case, "batch axis", tokens=case.corrupted[:1], cache=small)
    refuse(case, "resid_pre", name="resid_prae")
    refuse(case, "to_tokens", tokens="a text")
    refuse(case, "one number", metric=lambda logits: logits[:, -1, 3])
