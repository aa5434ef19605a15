"""Interchange beside hooks on Hugging Face's own modules, and beside one `intervene` a cell;
subspaces beside finite differences, and what training must do and must leave alone."""

from __future__ import annotations

import builtins
import math
from contextlib import contextmanager
from itertools import product

import pytest
import torch
from conftest import hf, hooked
from measuring import model_of
from tiny import tinies

import hookedlm
from hookedlm.errors import CacheFileError, HookNameError, InputError, NotOneTokenError
from hookedlm.patching import (
    UNITS,
    BoundlessRotatedSpace,
    Counterfactuals,
    Intervention,
    LowRankRotatedSpace,
    Patch,
    RotatedInterchange,
    RotatedSpace,
    base_run,
    interchange,
)
from hookedlm.patching.frozen import frozen

LENGTH, TOKENS = 4, [5, 7]
CLOSE = dict(rtol=1e-4, atol=1e-5)
FAMILIES = {"gpt2": "gpt2-base", "llama": "llama-grouped", "gptj": "gptj-base"}


def prompts(n, seed=0, length=LENGTH):
    return torch.randint(3, 96, (n, length), generator=torch.Generator().manual_seed(seed))


def swap(model, base, source, unit, **options):
    options = {"layers": "all", "tokens": TOKENS, "progress": False} | options
    return interchange(model, base, source, unit=unit, **options)


# Beside hooks on Hugging Face's modules: where each unit is in their model ------------------------
# (module within the block, its input or output, which part of it)

PLACES = {
    "gpt2": {
        "blocks": "transformer.h",
        "query_output": ("attn.c_attn", "out", 0),
        "key_output": ("attn.c_attn", "out", 1),
        "value_output": ("attn.c_attn", "out", 2),
        "z": ("attn.c_proj", "in", None),
        "mlp_activation": ("mlp.c_proj", "in", None),
        "attn": "attn",
    },
    "llama": {
        "blocks": "model.layers",
        "query_output": ("self_attn.q_proj", "out", None),
        "key_output": ("self_attn.k_proj", "out", None),
        "value_output": ("self_attn.v_proj", "out", None),
        "z": ("self_attn.o_proj", "in", None),
        "mlp_activation": ("mlp.down_proj", "in", None),
        "attn": "self_attn",
    },
    "gptj": {
        "blocks": "transformer.h",
        "query_output": ("attn.q_proj", "out", None),
        "key_output": ("attn.k_proj", "out", None),
        "value_output": ("attn.v_proj", "out", None),
        "z": ("attn.out_proj", "in", None),
        "mlp_activation": ("mlp.fc_out", "in", None),
        "attn": "attn",
    },
}
SAME = {
    "mha_input": "attention_input",
    "head_query_output": "query_output",
    "head_key_output": "key_output",
    "head_value_output": "value_output",
    "head_attention_value_output": "z",
    "attention_value_output": "z",
}


def place_of(family, unit):
    unit, places = SAME.get(unit, unit), PLACES[family]
    whole = {
        "block_input": ("", "in", None),
        "block_output": ("", "out", None),
        "attention_input": (places["attn"], "in", None),
        "attention_output": (places["attn"], "out", None),
        "mlp_output": ("mlp", "out", None),
    }
    return whole.get(unit) or places[unit]


@contextmanager
def changed(family, layer, unit, change):
    """``change`` is called with the unit's tensor ``[batch, pos, width]``, and returns another."""
    module, side, third = place_of(family, unit)
    block = hf(FAMILIES[family]).get_submodule(PLACES[family]["blocks"])[layer]

    def part(x):
        if third is None:
            return change(x)
        parts = list(x.chunk(3, dim=-1))
        parts[third] = change(parts[third])
        return torch.cat(parts, dim=-1)

    def before(module, args, kwargs):
        if args:
            return (part(args[0]), *args[1:]), kwargs
        return args, kwargs | {"hidden_states": part(kwargs["hidden_states"])}

    def after(module, args, out):
        return (part(out[0]), *out[1:]) if isinstance(out, tuple) else part(out)

    target = block.get_submodule(module)
    if side == "in":
        handle = target.register_forward_pre_hook(before, with_kwargs=True)
    else:
        handle = target.register_forward_hook(after)
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def brute_force(family, unit, base, source, n_heads):
    """Last logits, [layer, head, pos, batch, vocab], one run a cell; no heads: one."""
    theirs, found = hf(FAMILIES[family]), []
    for layer in range(theirs.config.num_hidden_layers):
        kept = []
        with changed(family, layer, unit, lambda x, kept=kept: kept.append(x.clone()) or x):
            theirs(source)
        for head, pos in product(range(n_heads or 1), range(LENGTH)):

            def put(x, kept=kept, head=head, pos=pos):
                x, d = x.clone(), x.shape[-1] // (n_heads or 1)
                here = slice(head * d, (head + 1) * d)
                x[:, pos, here] = kept[0][:, pos, here]
                return x

            with changed(family, layer, unit, put):
                found.append(theirs(base).logits[:, -1])
    shape = [theirs.config.num_hidden_layers, n_heads or 1, LENGTH]
    return torch.stack(found).unflatten(0, shape)


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("family", FAMILIES)
def test_each_unit_is_where_hugging_face_has_it(family, unit):
    model, base, source = hooked(FAMILIES[family]), prompts(2), prompts(2, seed=1)
    n_heads = None
    if UNITS[unit].each_head:
        grouped = "kv_head" in UNITS[unit].axes
        n_heads = model.cfg.n_key_value_heads if grouped else model.cfg.n_heads
        n_heads = n_heads or model.cfg.n_heads
    expected = brute_force(family, unit, base, source, n_heads)
    ours = swap(model, base, source, unit)
    torch.testing.assert_close(ours.logits, expected[..., TOKENS], **CLOSE)
    torch.testing.assert_close(ours.probabilities, expected.softmax(-1)[..., TOKENS], **CLOSE)
    assert ours.heads == (None if n_heads is None else list(range(n_heads)))


def test_the_swaps_make_a_difference():
    model, base, source = hooked("gptj-base"), prompts(2), prompts(2, seed=1)
    for unit in UNITS:
        ours = swap(model, base, source, unit)
        moved = (ours.logits - ours.base.logit).abs().amax((1, 2, 3, 4))
        assert moved.min() > 1e-3, unit


# Beside one `intervene` a cell --------------------------------------------------------------------


@torch.no_grad()
def naive(model, base, source, unit, layer, at, there, head=None, masks=(None, None), read=None):
    """Logits of one swap, [batch, vocab], at the last position or ``read``."""
    recorded, name = {}, UNITS[unit].hook

    def keep(x, hook):
        recorded[hook.name] = x.clone()

    one = Intervention(name, Patch(torch.zeros(())), layer=layer)
    [point] = one.points(model)
    model.run_with_hooks(source, fwd_hooks=[(point.name, keep)], attention_mask=masks[1])
    what = Patch(recorded, position=there)
    put = Intervention(name, what, layer=layer, position=at, head=head)
    logits = model.intervene(base, [put], attention_mask=masks[0])
    return logits[:, -1] if read is None else logits[torch.arange(len(logits)), read]


KINDS = {
    "gpt2": base_run.Reuse.POSITIONS,
    "gemma2": base_run.Reuse.POSITIONS,
    "bamba": base_run.Reuse.LAYERS,
    "hrm_text": base_run.Reuse.NOTHING,
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("unit", ["block_output", "attention_output", "head_value_output"])
def test_every_way_of_running_gives_the_naive_numbers(kind, unit):
    model, base, source = hookedlm.load(model_of(kind)), prompts(2), prompts(2, 1, LENGTH + 2)
    assert base_run.run_base(model, base).reuse == KINDS[kind]
    pairs = [[1, 3], [4, 0]]
    ours = swap(model, base, source, unit, positions=tuple(pairs))
    for i, layer in list(enumerate(ours.layers))[-4:]:
        for j, head in enumerate(ours.heads or [None]):
            for k, (at, there) in enumerate(zip(*pairs, strict=True)):
                told = naive(model, base, source, unit, layer, [at], [there], head)
                torch.testing.assert_close(ours.logits[i, j, k], told[:, TOKENS], **CLOSE)
    if kind == "bamba" and unit != "block_output":
        assert 0 < len(ours.layers) < model.cfg.n_layers  # those that have attention


def ragged(seed, lengths, side):
    tokens, width = prompts(len(lengths), seed, max(lengths)), max(lengths)
    columns = torch.arange(width)
    n = torch.tensor(lengths)[:, None]
    mask = (columns < n) if side == "right" else (columns >= width - n)
    return tokens.masked_fill(~mask, 0), mask.long()


@pytest.mark.parametrize("side", ["right", "left"])
def test_positions_of_each_example_in_ragged_batches(side):
    model = hooked("llama-grouped")
    base, mask = ragged(0, [3, 5], side)
    source, other = ragged(1, [6, 2], side)
    last, end = ([2, 4], [5, 1]) if side == "right" else ([4, 4], [5, 5])
    options = dict(attention_mask=(mask, other), layers=[0, 2])
    masks = (mask, other)

    ours = swap(model, base, source, "head_key_output", positions="last", **options)
    assert ours.positions.base.tolist() == [last]
    assert ours.positions.source.tolist() == [end]
    before = (
        [torch.tensor(last) - 1, torch.tensor(end) - 1],
        [torch.tensor(last), torch.tensor(end)],
    )
    pair = tuple(torch.stack(both, dim=1) for both in zip(*before, strict=True))
    both = swap(model, base, source, "head_key_output", positions=pair, **options)
    torch.testing.assert_close(both.logits[:, :, 1:], ours.logits)
    for i, layer in enumerate([0, 2]):
        for head, (k, (at, there)) in product(range(2), enumerate(before)):
            told = naive(
                model, base, source, "key_output", layer, at, there, head, masks, torch.tensor(last)
            )
            torch.testing.assert_close(both.logits[i, head, k], told[:, TOKENS], **CLOSE)


def test_all_positions_at_once_and_one_source_for_all():
    model, base, source = hooked("gpt2-base"), prompts(3), prompts(1, seed=1)
    ours = swap(model, base, source, "attention_output", positions=None, layers=1)
    told = naive(model, base, source, "attention_output", 1, None, None)
    torch.testing.assert_close(ours.logits[0, 0, 0], told[:, TOKENS], **CLOSE)
    assert list(ours.df.columns) == ["layer", "example", "token", "probability", "logit"]
    many = swap(model, source, base, "attention_output", positions=None, layers=1)
    assert many.logits.shape[3] == 3


def test_swapping_the_last_stream_gives_the_source_run():
    model, base, source = hooked("gptj-base"), prompts(2), prompts(2, seed=1)
    ours = swap(model, base, source, "block_output", layers=-1, positions="last")
    torch.testing.assert_close(ours.logits[0, 0, 0], model(source)[:, -1, TOKENS], **CLOSE)
    torch.testing.assert_close(ours.source.logit, model(source)[:, -1, TOKENS], **CLOSE)
    torch.testing.assert_close(
        ours.base.probability, model(base)[:, -1].softmax(-1)[:, TOKENS], **CLOSE
    )


def test_where_logits_are_read():
    model, base, source = hooked("gpt2-base"), prompts(2), prompts(2, seed=1)
    ours = swap(
        model, base, source, "mlp_output", positions=[1], layers=0, read_at=torch.tensor([1, 2])
    )
    told = naive(model, base, source, "mlp_output", 0, [1], [1], read=torch.tensor([1, 2]))
    torch.testing.assert_close(ours.logits[0, 0, 0], told[:, TOKENS], **CLOSE)


def test_small_batches_give_the_same():
    model, base, source = hooked("llama-grouped"), prompts(2), prompts(2, seed=1)
    whole = swap(model, base, source, "head_query_output")
    parts = swap(model, base, source, "head_query_output", batch_size=5)
    torch.testing.assert_close(parts.logits, whole.logits, **CLOSE)


def test_the_model_is_left_alone_and_hooks_stay():
    model, base, source = hooked("gpt2-base"), prompts(1), prompts(1, seed=1)
    clean = swap(model, base, source, "block_input")
    seen = []
    with model.hooks(fwd_hooks=[("hook_embed", lambda x, hook: seen.append(1) or x * 2)]):
        doubled = swap(model, base, source, "block_input", layers=2, positions=[0])
        told = model(base)[:, -1, TOKENS]
    assert seen
    assert not any(point.wanted for point in model.hook_dict.values())
    torch.testing.assert_close(doubled.base.logit, told)
    assert (told - clean.base.logit).abs().max() > 1e-3


def test_an_interruption_returns_what_was_done(monkeypatch):
    from hookedlm.patching.interchange import Reader

    calls, whole = [], Reader.__call__

    def interrupted(self, out, cells):
        calls.append(cells)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return whole(self, out, cells)

    monkeypatch.setattr(Reader, "__call__", interrupted)
    model = hooked("gpt2-base")
    with monkeypatch.context() as patch:
        patch.setattr("hookedlm.patching.engine.listened", lambda model: True)
        ours = swap(model, prompts(1), prompts(1, 1), "block_input")
    done = ~ours.logits[..., 0].isnan()
    assert done.sum() == 2
    assert not ours.of(0).complete


# What it returns ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def demo():
    return hookedlm.load_demo()


def test_the_table_has_a_row_for_each_layer_head_position_and_token(demo):
    spain, poland = "The capital of Spain is", "The capital of Poland is"
    ours = swap(demo, spain, poland, "head_value_output", tokens=[" Madrid", " Warsaw"])
    table = ours.df
    columns = ["layer", "head", "position", "text", "token", "probability", "logit"]
    assert list(table.columns) == columns
    assert len(table) == 4 * 4 * 6 * 2
    for row in table.sample(20, random_state=0).to_dict("records"):
        token = [" Madrid", " Warsaw"].index(row["token"])
        cell = (row["layer"], row["head"], row["position"], 0, token)
        assert row["probability"] == pytest.approx(float(ours.probabilities[cell]))
        assert row["logit"] == pytest.approx(float(ours.logits[cell]))
        assert row["text"] == demo.to_str_tokens(spain)[row["position"]]
    assert ours.base.probability[0, 0] > 0.9
    assert ours.source.probability[0, 1] > 0.9


def test_one_token_as_a_sweep_with_its_figure(demo):
    spain, poland = "The capital of Spain is", "The capital of Poland is"
    ours = swap(demo, spain, poland, "block_input", tokens=[" Madrid", " Warsaw"])
    warsaw = ours.of(" Warsaw")
    assert warsaw.axes == {"layer": [0, 1, 2, 3], "pos": [0, 1, 2, 3, 4, 5]}
    assert warsaw.values[0, 4] > 0.9 > 0.1 > warsaw.values[0, 5]  # the country, where it is read
    assert float(warsaw.clean) > 0.9
    assert float(warsaw.corrupted) < 0.1
    best = ours.top(4, token=" Warsaw")
    assert {(cell["layer"], cell["pos"]) for cell in best} == {(0, 4), (1, 5), (2, 5), (3, 5)}
    figure = ours.plot(" Warsaw")
    assert figure.data[0].type == "heatmap"
    assert len(figure.data[0].z) == 4
    torch.testing.assert_close(ours.of(1, "logit").values, ours.logits[:, 0, :, 0, 1])
    with pytest.raises(InputError, match="' Madrid', ' Warsaw'"):
        ours.of(" Berlin")
    with pytest.raises(InputError, match="'probability' or 'logit'"):
        ours.of(0, "loss")


def test_tokens_by_name_for_each_example(demo):
    base = ["The capital of Spain is", "In Poland, the capital is"]
    source = ["The capital of Italy is", "In Egypt, the capital is"]
    names = {"own": [" Madrid", " Warsaw"], "other": [" Rome", " Cairo"]}
    places = {"country": (torch.tensor([4, 2]))}
    ours = swap(demo, base, source, "block_input", tokens=names, positions=places, layers=[0, 1])
    table = ours.df.set_index(["layer", "example", "answer"])
    assert table.loc[(0, 1, "other"), "token"] == " Cairo"
    assert table.loc[(0, 1, "other"), "text"] == " Poland"
    assert table.loc[(0, 1, "other"), "probability"] > 0.9
    assert table.loc[(1, 1, "own"), "probability"] > 0.9
    assert (table["place"] == "country").all()
    ids = torch.tensor(
        [[demo.to_single_token(t) for t in row] for row in zip(*names.values(), strict=True)]
    )
    again = swap(demo, base, source, "block_input", tokens=ids, positions=places, layers=[0, 1])
    torch.testing.assert_close(again.logits, ours.logits)


def test_padding_has_no_rows(word_tokenizer):
    model = hooked("gpt2-base")
    base, mask = ragged(0, [2, 4], "right")
    ours = swap(model, base, prompts(2, 1), "block_input", layers=0, attention_mask=(mask, mask))
    assert len(ours.df) == (2 + 4) * len(TOKENS)
    expected = ours.probabilities[0, 0, 3, 1, 0]
    torch.testing.assert_close(ours.of(0).values[0, 3], expected)


def test_without_pandas_the_message_says_what_to_install(monkeypatch):
    ours = swap(hooked("gpt2-base"), prompts(1), prompts(1, 1), "block_input", layers=0)
    real = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name == "pandas":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ImportError, match=r"hookedlm\[plots\]"):
        _ = ours.df


# What is refused ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        (dict(unit="residual"), InputError, "block_input, block_output"),
        (dict(layers=3), InputError, "0 to 2"),
        (dict(layers=[0, "one"]), InputError, "layer"),
        (dict(heads=[0]), InputError, "block_input has none"),
        (dict(unit="head_value_output", heads=4), InputError, "0 to 3"),
        (dict(positions=4), InputError, "0 to 3"),
        (dict(positions=(0, 1, 2)), InputError, "a list"),
        (dict(positions=([0, 1], [0])), None, ""),  # one of the source for all
        (dict(positions=([0], [0, 1])), InputError, "must pair up"),
        (dict(positions=(None, 1)), InputError, "alike"),
        (dict(positions=torch.tensor([0, 1, 2])), InputError, "for 3 examples"),
        (dict(positions="first"), InputError, "expected"),
        (dict(tokens=[]), InputError, "expected a token"),
        (dict(tokens=96), InputError, "0 to 95"),
        (dict(tokens={}), InputError, "at least one"),
        (dict(tokens={"a": [1, 2, 3]}), InputError, "3 for 2 examples"),
        (dict(tokens="the cat"), NotOneTokenError, "2 tokens"),
        (dict(tokens=1.5), InputError, "expected a token"),
        (dict(read_at=[0, 1, 2]), InputError, "for 3 examples"),
        (dict(read_at=9), InputError, "0 to 3"),
        (dict(batch_size=0), InputError, "at least 1"),
    ],
)
def test_what_makes_no_sense_is_refused_before_anything_runs(monkeypatch, options, error, said):
    model = hooked("gpt2-base")
    options = {"unit": "block_input"} | options
    if error is None:
        assert swap(model, prompts(2), prompts(2, 1), **options).logits.shape[2] == 2
        return
    monkeypatch.setattr(type(model), "forward", None)
    with pytest.raises(error, match=said):
        swap(model, prompts(2), prompts(2, 1), **options)


def test_prompts_that_do_not_fit_are_refused():
    model = hooked("gpt2-base")
    with pytest.raises(InputError, match="3 of the other run"):
        swap(model, prompts(2), prompts(3), "block_input")
    with pytest.raises(InputError, match="differ in length"):
        swap(model, prompts(2), prompts(2, 1, LENGTH + 1), "block_input")
    base, mask = ragged(0, [2, 4], "right")
    with pytest.raises(InputError, match="padding in example 0 of the base"):
        swap(model, base, prompts(2, 1), "block_input", positions=2, attention_mask=(mask, None))


@pytest.mark.parametrize(
    ("family", "variant", "unit", "said"),
    [
        ("opt", "flipped", "attention_input", "reads no norm of its own"),
        ("olmo2", "", "attention_input", "No norm stands there"),
        ("mamba", "", "head_value_output", "as Hugging Face wrote it"),
        ("mamba", "", "attention_input", "has no attention"),
        ("bamba", "", "attention_input", None),
    ],
)
def test_a_layout_without_a_unit_is_refused_with_the_reason(family, variant, unit, said):
    model = hookedlm.load(model_of(family, variant) if variant else model_of(family))
    if said is None:
        ours = swap(model, prompts(1), prompts(1, 1), unit)
        assert all("attn" in model.blocks[layer]._modules for layer in ours.layers)
        missing = next(i for i in range(model.cfg.n_layers) if i not in ours.layers)
        with pytest.raises((InputError, HookNameError)):
            swap(model, prompts(1), prompts(1, 1), unit, layers=missing)
        return
    with pytest.raises((InputError, HookNameError), match=said):
        swap(model, prompts(1), prompts(1, 1), unit)


# Rotated subspaces --------------------------------------------------------------------------------

WIDTH = 32
SPACES = {
    "rotated": lambda rank, **more: RotatedSpace(WIDTH, rank, **more),
    "low-rank": lambda rank, **more: LowRankRotatedSpace(WIDTH, rank, **more),
    "boundless": lambda rank, **more: BoundlessRotatedSpace(WIDTH, boundary=rank / WIDTH, **more),
}
each_space = pytest.mark.parametrize("kind", SPACES)


def examples(model, n=6, seed=0):
    """Labels are what the source run says."""
    base, source = prompts(n, seed), prompts(n, seed + 100)
    with torch.no_grad():
        labels = model(source)[:, -1].argmax(-1)
    return Counterfactuals.of(model, base, source, labels, positions=[1, 3])


@each_space
@pytest.mark.parametrize("unit", ["block_output", "attention_output", "mlp_output"])
def test_the_whole_space_is_the_whole_activation(kind, unit):
    model = hooked("gptj-base")
    data = examples(model)
    whole = RotatedInterchange(model, SPACES[kind](WIDTH, seed=3), unit=unit, layer=1)
    patch = Intervention(UNITS[unit].hook, Patch(data.pair.source.tokens), layer=1, position=[1, 3])
    with torch.no_grad():
        told = model.intervene(data.pair.base.tokens, [patch])[:, -1]
        torch.testing.assert_close(whole.logits(data), told, **CLOSE)


@each_space
def test_a_part_is_what_an_intervention_in_its_subspace_does(kind):
    model = hooked("llama-grouped")
    data = examples(model)
    some = RotatedInterchange(model, SPACES[kind](5, seed=3), unit="block_output", layer=0)
    put = some.intervention(data.pair.source.tokens, position=[1, 3])
    with torch.no_grad():
        told = model.intervene(data.pair.base.tokens, [put])[:, -1]
        ours = some.logits(data)
        assert (ours - model(data.pair.base.tokens)[:, -1]).abs().max() > 1e-3
    torch.testing.assert_close(ours, told, **CLOSE)


def test_one_head_is_rotated():
    model = hooked("llama-grouped")
    data = examples(model)
    width = model.cfg.d_head
    one = RotatedInterchange(
        model, RotatedSpace(width, width), unit="head_value_output", layer=1, head=1
    )
    patch = Intervention("v", Patch(data.pair.source.tokens), layer=1, position=[1, 3], head=1)
    with torch.no_grad():
        told = model.intervene(data.pair.base.tokens, [patch])[:, -1]
        torch.testing.assert_close(one.logits(data), told, **CLOSE)


@each_space
def test_rows_stay_orthonormal_in_training_and_only_they_change(kind):
    model = hooked("gpt2-base")
    data, space = examples(model), SPACES[kind](4)
    weights = {name: x.clone() for name, x in model.state_dict().items()}
    wanting = [parameter.requires_grad for parameter in model.parameters()]
    assert any(wanting)
    before, random = space.rows.detach().clone(), torch.random.get_rng_state()
    ours = RotatedInterchange(model, space, unit="block_output", layer=0)
    losses = ours.fit(data, epochs=15, lr=0.05, batch_size=4, progress=False)
    assert losses[-1] < losses[0]
    assert (space.rows - before).abs().max() > 0.01
    identity = torch.eye(len(space.rows))
    torch.testing.assert_close(space.rows @ space.rows.t(), identity, rtol=0, atol=1e-5)
    torch.testing.assert_close(
        space.directions @ space.directions.t(), torch.eye(space.rank), rtol=0, atol=1e-5
    )
    assert all(torch.equal(x, weights[name]) for name, x in model.state_dict().items())
    assert [parameter.requires_grad for parameter in model.parameters()] == wanting
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.random.get_rng_state(), random)
    assert not any(point.wanted for point in model.hook_dict.values())
    assert not space.training


def test_an_exception_leaves_the_model_as_it_was():
    model = hookedlm.load(model_of("gpt2"))
    model.train()
    model.blocks[0].eval()
    frozen_before = next(model.parameters()).requires_grad_(False)
    modes = [module.training for module in model.modules()]
    data = examples(hooked("gpt2-base"))
    ours = RotatedInterchange(model, LowRankRotatedSpace(WIDTH, 2), unit="block_output", layer=0)

    def fail(x, hook):
        raise RuntimeError("stop")

    with (
        model.hooks(fwd_hooks=[("blocks.1.hook_resid_pre", fail)]),
        pytest.raises(RuntimeError, match="stop"),
    ):
        ours.fit(data, progress=False)
    assert [module.training for module in model.modules()] == modes
    assert not frozen_before.requires_grad
    assert all(p.requires_grad for p in list(model.parameters())[1:])
    assert not any(point.wanted for point in model.hook_dict.values())
    assert not ours.space.training
    with pytest.raises(ValueError, match="inside"), frozen(model):
        raise ValueError("inside")
    assert [module.training for module in model.modules()] == modes


@each_space
def test_gradients_are_those_of_finite_differences(kind):
    model = hookedlm.load(tinies("gpt2")[0].build(torch.float64), dtype=torch.float64)
    data, space = examples(model), SPACES[kind](6, dtype=torch.float64)
    ours = RotatedInterchange(model, space, unit="attention_output", layer=1)
    space.train()
    space.anneal(0.9)

    def loss():
        logits = ours.logits(data)
        return torch.nn.functional.cross_entropy(logits, data.labels) + space.penalty()

    parameters = list(space.parameters())
    grads = torch.autograd.grad(loss(), parameters)
    generator, step = torch.Generator().manual_seed(0), 1e-6
    for parameter, grad in zip(parameters, grads, strict=True):
        direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        if kind == "low-rank":  # its diagonal holds signs
            direction.fill_diagonal_(0)
        with torch.no_grad():
            ends = []
            for sign in (1, -1):
                parameter += sign * step * direction
                ends.append(float(loss()))
                parameter -= sign * step * direction
        slope = (ends[0] - ends[1]) / (2 * step)
        assert abs(slope) > 1e-5
        assert float((grad * direction).sum()) == pytest.approx(slope, rel=1e-4)


def test_the_boundary_is_soft_in_training_and_sharp_elsewhere():
    space = BoundlessRotatedSpace(10, boundary=0.3, temperatures=(2.0, 0.5))
    assert space.mask().tolist() == [1.0] * 3 + [0.0] * 7
    assert space.rank == 3
    space.train()
    soft = [1 / (1 + math.exp(-(3 - i - 0.5) / 2)) for i in range(10)]
    assert space.mask().tolist() == pytest.approx(soft, rel=1e-5)
    space.anneal(1.0)
    soft = [1 / (1 + math.exp(-(3 - i - 0.5) / 0.5)) for i in range(10)]
    assert space.mask().tolist() == pytest.approx(soft, rel=1e-5)
    tiny = BoundlessRotatedSpace(10, boundary=1e-4)
    assert tiny.rank == 1
    assert len(tiny.directions) == 1


def test_a_random_rotation_is_the_seeds_own():
    one, same, other = (LowRankRotatedSpace(8, 3, seed=seed).rows.detach() for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.allclose(one, other)
    torch.testing.assert_close(one @ one.t(), torch.eye(3), rtol=0, atol=1e-5)


@each_space
def test_saved_and_loaded_it_is_the_same(kind, tmp_path):
    model, path = hooked("gpt2-base"), tmp_path / "space.safetensors"
    data = examples(model)
    ours = RotatedInterchange(model, SPACES[kind](3), unit="block_output", layer=-1)
    ours.fit(data, epochs=2, batch_size=4, progress=False)
    ours.save(path)
    again = RotatedInterchange.load(path, model)
    with torch.no_grad():
        assert torch.equal(again.logits(data), ours.logits(data))
    assert repr(again) == repr(ours)
    assert "layer=2" in repr(ours)
    assert again.evaluate(data).shuffled is None
    assert [file.name for file in tmp_path.iterdir()] == ["space.safetensors"]


def test_a_file_that_is_damaged_or_another_one_is_refused(tmp_path, monkeypatch):
    model, path = hooked("gpt2-base"), tmp_path / "space.safetensors"
    ours = RotatedInterchange(model, RotatedSpace(WIDTH, 3), unit="block_output", layer=0)
    with pytest.raises(CacheFileError, match="no such file"):
        RotatedInterchange.load(path, model)
    ours.save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CacheFileError, match="damaged"):
        RotatedInterchange.load(path, model)
    swap(model, prompts(1), prompts(1, 1), "block_input").of(0).save(path)
    with pytest.raises(CacheFileError, match="not written by"):
        RotatedInterchange.load(path, model)
    path.write_bytes(whole)

    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr("hookedlm.writing.os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        ours.save(path)
    assert path.read_bytes() == whole
    assert len(list(tmp_path.iterdir())) == 1


def placed(width, **where):
    return lambda model: RotatedInterchange(model, RotatedSpace(width, 1), **where)


def paired(labels, **options):
    return lambda m: Counterfactuals.of(m, prompts(2), prompts(2), labels, **options)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda m: RotatedSpace(8, 9), "1 to 8"),
        (lambda m: LowRankRotatedSpace(8, 0), "1 to 8"),
        (lambda m: BoundlessRotatedSpace(8, boundary=0.0), "share of the width"),
        (lambda m: RotatedSpace(8, 1, dtype=torch.float16), "float32 or float64"),
        (lambda m: RotatedSpace(8, 1).swapped(torch.zeros(9), torch.zeros(9)), "activations of 9"),
        (placed(8, unit="mlp_output", layer=0), "width 8"),
        (placed(8, unit="value_output", layer=0), "head=0 to 3"),
        (placed(WIDTH, unit="mlp_output", layer=0, head=1), "has none"),
        (placed(8, unit="value_output", layer=0, head=9), "0 to 3"),
        (placed(8, unit="value_output", layer="all", head=1), "one layer"),
        (paired([1, 2, 3]), "3 labels for 2"),
        (paired([1, 2], read_at=None), "one position"),
        (lambda m: paired([1, 2])(m).split(0.0), "one side"),
    ],
)
def test_spaces_that_make_no_sense_are_refused(make, said):
    with pytest.raises(InputError, match=said):
        make(hooked("gpt2-base"))


# On a trained model -------------------------------------------------------------------------------

CAPITALS = {"Spain": " Madrid", "Poland": " Warsaw"}
TRAINED_ON = [
    "The capital of {} is",
    "In {}, the capital is",
    "The country of {} has its capital in",
]
HELD_OUT = ["Everyone knows that the capital of {} is", "The capital city of {} is"]


def capitals(model, wordings):
    """Every ordered pair of countries in every wording: the label is the source's capital."""
    rows = [
        (text.format(base), text.format(source), base, CAPITALS[source])
        for text in wordings
        for base, source in [("Spain", "Poland"), ("Poland", "Spain")]
    ]
    base, source, countries, labels = (list(column) for column in zip(*rows, strict=True))
    at = [model.to_str_tokens(b).index(f" {c}") for b, c in zip(base, countries, strict=True)]
    return Counterfactuals.of(model, base, source, labels, positions=torch.tensor(at))


@pytest.mark.parametrize("make", [LowRankRotatedSpace, RotatedSpace])
def test_one_dimension_of_the_subject_says_which_country(demo, make):
    train, held_out = capitals(demo, TRAINED_ON), capitals(demo, HELD_OUT)
    ours = RotatedInterchange(demo, make(128, 1), unit="block_input", layer=0)
    ours.fit(train, epochs=40, lr=0.05, batch_size=3, seed=1, progress=False)
    score = ours.evaluate(held_out)
    assert score.accuracy == 1
    assert score.whole == 1
    assert score.nothing == 0
    assert score.random == 0
    assert score.rank == 1
    assert score.n_examples == 4
    assert score.shuffled is not None
    assert score.shuffled < 1


def test_training_is_the_same_for_the_same_seed(demo):
    train, found = capitals(demo, TRAINED_ON), []
    for seed in (1, 1, 2):
        ours = RotatedInterchange(demo, LowRankRotatedSpace(128, 2), unit="block_input", layer=0)
        found.append(ours.fit(train, epochs=3, batch_size=2, seed=seed, progress=False))
    assert found[0] == found[1] != found[2]


def test_the_boundary_shrinks_to_what_is_needed(demo):
    train, held_out = capitals(demo, TRAINED_ON), capitals(demo, HELD_OUT)
    space = BoundlessRotatedSpace(128, temperatures=(10.0, 0.1), cost=5.0)
    ours = RotatedInterchange(demo, space, unit="block_input", layer=0)
    ours.fit(train, epochs=150, lr=0.02, batch_size=6, progress=False)
    score = ours.evaluate(held_out, control=False)
    assert score.accuracy == 1
    assert score.rank < 20
    assert score.random < 0.5
