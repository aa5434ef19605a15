"""Interventions against hooks written by hand: what, where, order, generation, files, refusals."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import hf, hooked, word_tokenizer
from tiny import one_per_family, registered
from transformers import DynamicCache

import hookedlm
from hookedlm import patching
from hookedlm.errors import (
    CacheFileError,
    CacheKeyError,
    HookNameError,
    HookNeverFiredError,
    HookReturnError,
    InputError,
)
from hookedlm.interventions.sizes import sizes_of
from hookedlm.patching import (
    Add,
    Freeze,
    Intervention,
    Mean,
    Noise,
    Patch,
    ProjectOut,
    Resample,
    Scale,
    What,
    Zero,
)

Z, K, PRE, POST = (
    "blocks.1.attn.hook_z",
    "blocks.1.attn.hook_k",
    "blocks.1.hook_resid_pre",
    "blocks.1.mlp.hook_post",
)
GROUPED = "llama-grouped"


def tokens(rows: int = 2, n: int = 6, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 90, (rows, n), generator=generator)


def by_hand(model, given, where, edit, **kwargs):
    """Logits with ``edit(x)`` made in place on a copy."""

    def hook(x, hook):
        x = x.clone()
        edit(x)
        return x

    return model.run_with_hooks(given, fwd_hooks=[(where, hook)], **kwargs)


def same(left, right):
    torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-5)


def silent(model) -> bool:
    return not any(point.fwd_hooks or point.wanted for point in model.hook_points()) and not (
        model._forward_pre_hooks or model._forward_hooks
    )


@pytest.fixture
def given() -> torch.Tensor:
    return tokens()


@pytest.fixture
def other(model):
    """Another batch, and its activations."""
    given = tokens(seed=2)
    return given, model.run_with_cache(given)[1]


# What ---------------------------------------------------------------------------------------------


def test_zero_and_scale(model, given):
    same(
        model.intervene(given, [Intervention("z", Zero(), layer=1, head=2)]),
        by_hand(model, given, Z, lambda z: z[:, :, 2].zero_()),
    )
    same(
        model.intervene(given, Intervention("z", Scale(-2.5), layer=1, head=2, position=3)),
        by_hand(model, given, Z, lambda z: z[:, 3, 2].mul_(-2.5)),
    )


def test_add_is_steering(model, given):
    vector = torch.randn(model.cfg.d_model)
    made = model.intervene(given, [Intervention(PRE, Add(vector, 3.0), position=slice(2, None))])
    same(made, by_hand(model, given, PRE, lambda x: x[:, 2:].add_(3 * vector)))
    each = torch.randn(2, model.cfg.d_model)  # one for each row
    made = model.intervene(given, [Intervention(PRE, Add(each), position=-1)])
    same(made, by_hand(model, given, PRE, lambda x: x[:, -1].add_(each)))


def test_patch_from_every_kind_of_source(model, given, other):
    theirs, cache = other
    truth = by_hand(model, given, Z, lambda z: z[:, 2].copy_(cache[Z][:, 2]))
    for source in (cache, theirs, {Z: cache[Z]}, cache[Z][:, 2]):
        made = model.intervene(given, [Intervention("z", Patch(source), layer=1, position=2)])
        same(made, truth)
    one = model.run_with_cache(theirs[0])[1]
    truth = by_hand(model, given, Z, lambda z: z[:, :, 1].copy_(one[Z][:, :, 1]))
    for source in (one, theirs[:1], theirs[0], one.remove_batch_dim()):
        same(model.intervene(given, [Intervention(Z, Patch(source), head=1)]), truth)


def test_patch_from_text(model):
    text = ["the cat sat on a mat", "Mary went to the red store"]
    _, cache = model.run_with_cache(text[1])
    truth = by_hand(model, text[0], PRE, lambda x: x[:, 3].copy_(cache[PRE][:, 3]))
    same(model.intervene(text[0], [Intervention(PRE, Patch(text[1]), position=3)]), truth)


def test_texts_are_read_alike(model):
    texts = "the cat sat on a mat", "Mary went to the red store"
    alike = [model.to_tokens(text, prepend_bos=False) for text in texts]
    patch = Intervention(PRE, Patch(texts[1]), position=3)
    made = model.intervene(texts[0], [patch], prepend_bos=False)
    same(made, model.intervene(alike[0], [Intervention(PRE, Patch(alike[1]), position=3)]))


def test_patch_from_elsewhere_in_the_source(model, given, other):
    theirs, cache = other
    patch = Intervention(PRE, Patch(theirs, position=[0, -1]), position=[4, 1])
    truth = by_hand(model, given, PRE, lambda x: _put(x, cache[PRE]))
    same(model.intervene(given, [patch]), truth)
    longer = Patch(tokens(2, 9, seed=3), position=torch.tensor([8, 0]))
    source = model.run_with_cache(tokens(2, 9, seed=3))[1][PRE]
    rows = torch.arange(2)

    def edit(x):
        x[rows, torch.tensor([1, 5])] = source[rows, torch.tensor([8, 0])]

    patch = Intervention(PRE, longer, position=torch.tensor([1, 5]))
    same(model.intervene(given, [patch]), by_hand(model, given, PRE, edit))


def _put(x, source):
    x[:, 4], x[:, 1] = source[:, 0], source[:, -1]


def test_mean_over_a_dataset_leaves_padding_out(model, given):
    data = [tokens(2, 6, 5), "the cat sat", ["a mat", "Mary and John went home"]]
    found = []
    for batch in (tokens(2, 6, 5)[:1], tokens(2, 6, 5)[1:], "the cat sat", *data[2]):
        found.append(model.run_with_cache(batch)[1][Z][0])
    mean = torch.cat(found).mean(0)
    made = model.intervene(given, [Intervention("z", Mean(data), layer=1, head=[0, 3])])

    def edit(z):
        z[:, :, [0, 3]] = mean[[0, 3]]

    truth = by_hand(model, given, Z, edit)
    same(made, truth)
    same(
        model.intervene(given, [Intervention(Z, Mean(mean[2]), head=2)]),
        by_hand(model, given, Z, lambda z: z[:, :, 2].copy_(mean[2])),
    )


def test_mean_at_each_position(model, given):
    data = tokens(40, 6, 5)  # more than run at once
    mean = model.run_with_cache(data)[1][PRE].mean(0)
    made = model.intervene(given, [Intervention(PRE, Mean(data, per_position=True))])
    same(made, by_hand(model, given, PRE, lambda x: x.copy_(mean.expand_as(x))))


def test_resample_draws_rows_with_a_generator_of_its_own(model, given):
    data = tokens(7, 6, 5)
    rows = model.run_with_cache(data)[1]
    drawn = torch.randint(7, (2,), generator=torch.Generator().manual_seed(3))
    before = torch.get_rng_state()
    listed = [Intervention("z", Resample(data, seed=3), layer=layer) for layer in (0, 1)]
    made = model.intervene(given, listed)
    assert torch.equal(before, torch.get_rng_state())
    hooks = [(name, lambda z, hook: rows[hook.name][drawn]) for name in ("blocks.0.attn.hook_z", Z)]
    same(made, model.run_with_hooks(given, fwd_hooks=hooks))


def test_resample_from_the_batch_takes_other_rows(model):
    given = tokens(5, 4)
    _, clean = model.run_with_cache(given)
    seen = {}

    def see(x, hook):
        seen[hook.name] = x

    with model.intervening([Intervention(Z, Resample(seed=1)), Intervention(PRE, Scale(2.0))]):
        model.run_with_hooks(given, fwd_hooks=[(Z, see)])
    distances = (seen[Z][:, None] - clean[Z][None]).abs().flatten(2).amax(2)
    rows = distances.argmin(1)
    assert distances.amin(1).max() < 1e-6
    assert (rows != torch.arange(5)).all()


def test_noise_is_seeded_and_of_that_size(model):
    given = tokens(4, 50)
    seen = []
    noise = [Intervention(PRE, Noise(0.7, seed=5), position=range(10, 50))]
    before = torch.get_rng_state()
    for _ in "ab":
        _, cache = model.run_with_cache(given)
        with model.intervening(noise):
            seen.append(model.run_with_cache(given)[1][PRE] - cache[PRE])
    assert torch.equal(before, torch.get_rng_state())
    same(seen[0], seen[1])
    assert seen[0][:, :10].abs().max() == 0
    assert 0.68 < seen[0][:, 10:].std() < 0.72
    assert (seen[0][:, 10] - seen[0][:, 11]).abs().min() > 0
    others = [Intervention(PRE, Noise(0.7, seed=6))]
    with model.intervening(others):
        assert not torch.allclose(model.run_with_cache(given)[1][PRE] - cache[PRE], seen[0])


def test_project_out(model, given):
    directions = torch.randn(3, model.cfg.d_model)
    directions = torch.cat([directions, directions[:1] * 2])  # one depends on another
    q, _ = torch.linalg.qr(directions[:3].t())
    made = model.intervene(given, [Intervention(PRE, ProjectOut(directions), position=1)])
    same(made, by_hand(model, given, PRE, lambda x: x[:, 1].sub_(x[:, 1] @ q @ q.t())))


@pytest.mark.parametrize("hook", ["pattern", "ln2.hook_scale"])
def test_freeze_to_the_same_run_without_other_interventions(model, given, hook):
    _, clean = model.run_with_cache(given)
    name = Intervention(hook, Freeze(), layer=1).points(model)[0].name
    steer = Intervention("resid_pre", Scale(3.0), layer=0)
    with model.hooks([("blocks.0.hook_resid_pre", lambda x, hook: 3 * x)]):
        truth = by_hand(model, given, name, lambda x: x.copy_(clean[name]))
        moved = model(given)
    made = model.intervene(given, [steer, Intervention(hook, Freeze(), layer=1)])
    same(made, truth)
    assert not torch.allclose(made, moved)


def test_freeze_to_another_run(model, given, other):
    theirs, cache = other
    made = model.intervene(given, [Intervention("pattern", Freeze(theirs), layer=range(3))])
    hooks = [("blocks.*.attn.hook_pattern", lambda x, hook: cache[hook.name])]
    same(made, model.run_with_hooks(given, fwd_hooks=hooks))


# Where --------------------------------------------------------------------------------------------


def test_every_field_at_once(model, given):
    made = model.intervene(
        given, [Intervention("z", Scale(5.0), layer=-2, position=[1, -1], head=[0, 2], dims=[3, 4])]
    )

    def edit(z):
        for p in (1, 5):
            for h in (0, 2):
                z[:, p, h, 3:5] *= 5

    same(made, by_hand(model, given, Z, edit))
    made = model.intervene(
        given, [Intervention("post", Zero(), layer=1, neuron=[7, 0], position=2)]
    )
    same(made, by_hand(model, given, POST, lambda x: _zero(x, 2, [0, 7])))


def _zero(x, position, dims):
    for d in dims:
        x[:, position, d] = 0


def test_dims_of_a_pattern_are_keys(model, given):
    name = "blocks.1.attn.hook_attn_scores"
    knock_out = Patch(torch.tensor(float("-inf")))
    made = model.intervene(given, [Intervention(name, knock_out, head=1, position=4, dims=2)])
    same(made, by_hand(model, given, name, lambda x: x[:, 1, 4, 2].fill_(float("-inf"))))
    assert made.isfinite().all()


def test_subspace_changes_nothing_outside(model, given, other):
    _, cache = other
    basis = torch.randn(2, model.cfg.d_model)
    q, _ = torch.linalg.qr(basis.t())
    made = model.intervene(given, [Intervention(PRE, Patch(cache), position=3, subspace=basis)])

    def edit(x):
        x[:, 3] += (cache[PRE][:, 3] - x[:, 3]) @ q @ q.t()

    same(made, by_hand(model, given, PRE, edit))


@pytest.mark.parametrize("side", ["left", "right"])
def test_positions_for_each_example_of_a_padded_batch(side):
    model = hookedlm.load(hf("gpt2-base"), tokenizer=word_tokenizer(side=side))
    texts = ["the cat sat on a mat", "John went home", "a dog ran"]
    given, mask = model.to_tokens_and_mask(texts, False, side)
    last = torch.tensor([5, 2, 2]) if side == "right" else torch.tensor([5, 5, 5])
    start = last - torch.tensor([5, 2, 2])
    places = torch.stack([start, last - 1], dim=1)
    vector = torch.randn(model.cfg.d_head)
    rows = torch.arange(3)[:, None]

    def edit(z):
        z[rows, places, 1] += vector

    listed = [Intervention("z", Add(vector), layer=1, head=1, position=places)]
    made = model.intervene(given, listed, attention_mask=mask)
    same(made, by_hand(model, given, Z, edit, attention_mask=mask))
    for i, text in enumerate(texts):  # and as if each were alone
        alone = Intervention("z", Add(vector), layer=1, head=1, position=[0, len(text.split()) - 2])
        at = int(start[i])
        same(
            model.intervene(text, [alone], prepend_bos=False)[0, -1],
            made[i, at + len(text.split()) - 1],
        )


def test_key_value_heads_are_counted():
    model, given = hooked(GROUPED), tokens()
    n = model.cfg.n_key_value_heads
    assert n < model.cfg.n_heads
    made = model.intervene(given, [Intervention("k", Scale(3.0), layer=1, head=n - 1)])
    same(made, by_hand(model, given, K, lambda k: k[:, :, n - 1].mul_(3)))
    with pytest.raises(InputError, match=rf"there are {n} key/value heads, 0 to {n - 1}"):
        model.intervene(given, [Intervention("k", Zero(), layer=1, head=n)])
    model.intervene(given, [Intervention("q", Zero(), layer=1, head=n)])


def test_globs_and_several_layers(model, given):
    every = model.intervene(given, [Intervention("blocks.*.hook_mlp_out", Zero())])
    same(every, model.intervene(given, [Intervention("mlp_out", Zero(), layer=range(3))]))
    hooks = [("blocks.*.hook_mlp_out", lambda x, hook: torch.zeros_like(x))]
    same(every, model.run_with_hooks(given, fwd_hooks=hooks))


SIZED = [*one_per_family(), *registered(["deepseek_v3"])[-1:], *registered(["lfm2"])[-1:]]


@pytest.mark.parametrize("tiny", SIZED, ids=lambda tiny: tiny.id)
def test_sizes_told_beforehand_are_those_of_the_run(tiny):
    model = hookedlm.load(tiny.build())
    for point in model.hook_points():
        _, cache = model.run_with_cache(
            tokens(2, 5), names_filter=point.name, return_cache_object=False
        )
        for size, n in zip(sizes_of(model, point), cache[point.name].shape, strict=True):
            assert size in (None, n), point.name


FIELD_OF = {"pos": "position", "head": "head", "kv_head": "head", "d_mlp": "neuron"}


@pytest.mark.parametrize("tiny", SIZED, ids=lambda tiny: tiny.id)
def test_any_part_of_any_activation(tiny):
    """Against a mask that is made axis by axis."""
    model, given = hookedlm.load(tiny.build()), tokens(2, 5)
    generator = torch.Generator().manual_seed(7)
    for point in model.hook_points():
        fields = {}

        def halve(x, hook, fields=fields):
            keep = torch.ones(x.shape, dtype=torch.bool)
            for dim, axis in enumerate(hook.axes):
                field = FIELD_OF.get(axis, "dims" if dim == x.ndim - 1 else None)
                if field is None or torch.rand((), generator=generator) < 0.3:
                    continue
                n = x.shape[dim]
                some = torch.randperm(n, generator=generator)[: max(1, n // 2)].tolist()
                fields[field] = some[0] if len(some) == 1 else some
                line = torch.zeros(n, dtype=torch.bool)
                line[some] = True
                keep = keep & line.view([-1 if d == dim else 1 for d in range(x.ndim)])
            return torch.where(keep, 0.5 * x, x)

        truth = model.run_with_hooks(given, fwd_hooks=[(point.name, halve)])
        made = model.intervene(given, [Intervention(point.name, Scale(0.5), **fields)])
        torch.testing.assert_close(made, truth, rtol=1e-5, atol=1e-5, msg=point.name)


# Composition --------------------------------------------------------------------------------------


def test_the_order_is_that_given(model, given):
    vector = torch.randn(model.cfg.d_model)
    add, double = Intervention(PRE, Add(vector)), Intervention(PRE, Scale(2.0))
    same(
        model.intervene(given, [add, double]),
        by_hand(model, given, PRE, lambda x: x.add_(vector).mul_(2)),
    )
    same(
        model.intervene(given, [double, add]),
        by_hand(model, given, PRE, lambda x: x.mul_(2).add_(vector)),
    )


def test_contexts_nest_and_are_recorded(model, given):
    plain = model(given)
    with model.intervening(Intervention(PRE, Scale(2.0))) as inside:
        assert inside is model
        with model.intervening([Intervention(PRE, Zero(), position=0)]):
            _, cache = model.run_with_cache(given, names_filter=PRE)
        assert cache[PRE][:, 0].abs().max() == 0
        _, cache = model.run_with_cache(given)
        same(cache[PRE], 2 * cache["resid_post", 0])
    assert silent(model)
    assert torch.equal(model(given), plain)


def test_forward_keywords_and_gradients(model, given):
    vector = torch.randn(model.cfg.d_model, requires_grad=True)
    listed = [Intervention(PRE, Add(vector), position=2)]
    loss = model.intervene(given, listed, return_type="loss")
    loss.backward()
    shift = 1e-2 * vector.grad / vector.grad.norm()
    up, down = (
        model.intervene(
            given,
            [Intervention(PRE, Add(vector.detach() + s * shift), position=2)],
            return_type="loss",
        )
        for s in (1, -1)
    )
    assert vector.grad.norm() > 1e-4
    torch.testing.assert_close(
        (up - down).detach() / 2e-2, vector.grad.norm(), rtol=2e-2, atol=1e-5
    )
    stream = model.intervene(given, listed, stop_at_layer=2)
    assert stream.shape == (2, 6, model.cfg.d_model)


def test_own_kinds_of_what(model, given):
    class Sign(What):
        def of(self, x, source=None):
            return x.sign()

    same(
        model.intervene(given, [Intervention(PRE, Sign(), position=1)]),
        by_hand(model, given, PRE, lambda x: x[:, 1].sign_()),
    )

    class Short(What):
        def of(self, x, source=None):
            return x[..., :1]

    with pytest.raises(HookReturnError, match="keep both"):
        model.intervene(given, [Intervention(PRE, Short())])
    assert silent(model)


# Generation ---------------------------------------------------------------------------------------


def greedy(model, given, n, hooks=(), cached=True):
    """Generation by hand: a run for every token."""
    cache = DynamicCache() if cached else None
    step = given
    with model.hooks(hooks), torch.no_grad():
        for _ in range(n):
            new = model(step, past_kv_cache=cache)[:, -1:].argmax(-1)
            given = torch.cat([given, new], dim=1)
            step = new if cached else given
    return given


GENERATION = dict(max_new_tokens=6, do_sample=False, stop_at_eos=False, verbose=False)


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("name", ["gpt2-base", GROUPED])
def test_generation_is_that_of_a_loop_by_hand(name, cached):
    model, given = hooked(name), tokens(2, 4)
    vectors = torch.randn(3, model.cfg.d_model) * 4
    # Positions of the prompt, of what is written, and from somewhere on.
    listed = [
        Intervention(PRE, Add(vectors[:2]), position=[1, 6]),
        Intervention(PRE, Add(vectors[2]), position=slice(7, None)),
        Intervention("z", Zero(), layer=2, head=1, position=torch.tensor([2, 5])),
    ]

    def steer(x, hook):
        x = x.clone()
        for i in range(x.shape[1]):
            p = hook.pos_offset + i
            if p in (1, 6):
                x[:, i] += vectors[0 if p == 1 else 1]
            if p >= 7:
                x[:, i] += vectors[2]
        return x

    def zero(z, hook):
        z = z.clone()
        for row, p in enumerate((2, 5)):
            if 0 <= p - hook.pos_offset < z.shape[1]:
                z[row, p - hook.pos_offset, 1] = 0
        return z

    hooks = [(PRE, steer), ("blocks.2.attn.hook_z", zero)]
    truth = greedy(model, given, 6, hooks, cached)
    with model.intervening(listed):
        made = model.generate(given, use_past_kv_cache=cached, **GENERATION)
    assert torch.equal(made, truth)
    assert not torch.equal(truth, greedy(model, given, 6))
    assert silent(model)


def logits_of_generation(model, given, listed, cached):
    seen = []
    with (
        model.intervening(listed),
        model.hooks([("hook_logits", lambda x, hook: seen.append(x[:, -1]))]),
    ):
        model.generate(given, use_past_kv_cache=cached, **GENERATION)
    return torch.stack(seen)


@pytest.mark.parametrize("name", ["gpt2-base", GROUPED])
def test_what_comes_from_runs_is_the_same_with_and_without_a_cache(name):
    model, given = hooked(name), tokens(2, 4)
    data = tokens(5, 12, 3)
    listed = [
        Intervention("resid_pre", Noise(2.0, seed=1), layer=0, position=range(1, 8)),
        Intervention("z", Mean(data), layer=1, head=0),
        Intervention("mlp_out", Mean(data, per_position=True), layer=1, position=range(9)),
        Intervention("z", Resample(data), layer=2, head=1, position=[3, 5]),
        Intervention("mlp_out", Patch(data[0], position=[0, 7]), layer=0, position=[5, 2]),
        Intervention("pattern", Freeze(), layer=2),
    ]
    with_cache, without = (logits_of_generation(model, given, listed, c) for c in (True, False))
    torch.testing.assert_close(with_cache, without, rtol=1e-4, atol=1e-4)
    plain = logits_of_generation(model, given, [], True)
    assert not torch.allclose(plain, with_cache)


def test_the_same_run_beside_a_key_value_cache_by_hand(model):
    given = tokens(2, 7)
    name = "blocks.2.attn.hook_pattern"
    listed = [Intervention(PRE, Scale(3.0)), Intervention(name, Freeze())]
    whole = model.intervene(given, listed)
    cache = DynamicCache()
    with model.intervening(listed):
        parts = [model(given[:, :3], past_kv_cache=cache)]
        parts += [model(given[:, i : i + 2], past_kv_cache=cache) for i in (3, 5)]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-5)


def test_a_reordered_key_value_cache_is_refused(model):
    with (
        model.intervening([Intervention("pattern", Freeze(), layer=0)]),
        pytest.raises(InputError, match="use_past_kv_cache=False"),
    ):
        model.generate(tokens(2, 4), num_beams=2, **GENERATION)
    assert silent(model)


# Refusals -----------------------------------------------------------------------------------------


REFUSED = [
    (dict(hook="z", layer=3), InputError, r"layers 0 to 2 \(or -3 to -1\)"),
    (dict(hook="z", layer=-4), InputError, "layers 0 to 2"),
    (dict(hook="z", layer=1, head=4), InputError, "there are 4 heads, 0 to 3"),
    (dict(hook="z", layer=1, head=[0, -5]), InputError, "0 to 3"),
    (dict(hook="z", layer=1, dims=8), InputError, "0 to 7"),
    (dict(hook="z", layer=1, position=6), InputError, "there are 6 positions, 0 to 5"),
    (dict(hook="z", layer=1, position=[0, -7]), InputError, "0 to 5"),
    (dict(hook="z", layer=1, position=[2, -4]), InputError, "twice"),
    (dict(hook="z", layer=1, position=torch.tensor([0, 1, 2])), InputError, "3 examples"),
    (dict(hook="z", layer=1, position=torch.tensor([0, 6])), InputError, "0 to 5"),
    (dict(hook="z", layer=1, head="all"), InputError, "expected an int"),
    (dict(hook="z", layer=1, head=torch.tensor([0.5])), InputError, "expected an int"),
    (dict(hook="resid_pre", layer=1, head=0), InputError, "axes are batch pos d_model"),
    (dict(hook="z", layer=1, neuron=0), InputError, "batch pos head d_head"),
    (dict(hook="post", layer=1, neuron=0, dims=1), InputError, "both select"),
    (dict(hook="resid_pree", layer=1), HookNameError, "resid_pre"),
    (dict(hook="z"), HookNameError, r"layer=0 to 2"),
    (dict(hook=Z, layer=1), InputError, "full name"),
    (dict(hook=PRE, what=Add(torch.ones(5))), InputError, "does not broadcast"),
    (dict(hook=Z, what=Add(torch.ones(3, 8)), head=[0, 1]), InputError, "does not broadcast"),
    (dict(hook=PRE, what=ProjectOut(torch.ones(5))), InputError, "width 5"),
    (dict(hook=PRE, subspace=torch.ones(5)), InputError, "width 5"),
    (dict(hook=PRE, what=Patch(tokens(2, 5))), InputError, r"position=range\(5\)"),
    (dict(hook=PRE, what=Patch(tokens(2, 5)), position=5), InputError, "positions 0 to 4"),
    (dict(hook=PRE, what=Patch(tokens(3, 6))), InputError, r"\[3, 6, 32\]"),
    (dict(hook=PRE, what=Patch({Z: torch.ones(2, 6, 4, 8)})), CacheKeyError, "resid_pre"),
    (dict(hook=PRE, what=Patch(tokens(), position=0)), InputError, "wants one"),
    (dict(hook=PRE, what=Patch(tokens(), position=[0, 1]), position=2), InputError, "2 positions"),
    (dict(hook=PRE, what=Resample([tokens(1, 4), tokens(1, 5)])), InputError, "one length"),
    (dict(hook=PRE, what=Mean([tokens(1, 4), tokens(1, 5)], True)), InputError, "one length"),
    (dict(hook=PRE, what=Mean([])), InputError, "without examples"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "error", "says"), REFUSED, ids=range(len(REFUSED)))
def test_refused_before_the_run_and_nothing_stays(model, given, fields, error, says):
    fired = []
    listed = [
        Intervention("resid_pre", Zero(), layer=0),
        Intervention(**({"what": Zero()} | fields)),
    ]
    with (
        pytest.raises(error, match=says),
        model.hooks([("hook_embed", lambda x, hook: fired.append(x))]),
    ):
        model.intervene(given, listed)
    assert not fired
    assert silent(model)


def test_what_makes_no_sense_is_refused_when_made():
    for make in (
        lambda: Intervention("z", torch.ones(3)),
        lambda: Intervention("z", Zero(), subspace=torch.zeros(2, 3)),
        lambda: Patch(3),
        lambda: Patch([]),
        lambda: Patch(torch.ones(2), position=3),
        lambda: Add([1.0]),
        lambda: Add(torch.ones(3, dtype=torch.long)),
        lambda: Mean("text"),
        lambda: Mean(iter([tokens()])),
        lambda: Resample(torch.ones(2, 3)),
        lambda: Freeze(torch.ones(3)),
        lambda: ProjectOut(torch.zeros(4)),
        lambda: ProjectOut(torch.ones(1, 2, 3)),
    ):
        with pytest.raises(InputError):
            make()


def test_resample_wants_other_rows(model):
    with pytest.raises(InputError, match="this one has none"):
        model.intervene(tokens(1, 4), [Intervention(PRE, Resample())])
    assert silent(model)


def test_positions_that_no_run_reached(model, given):
    late = [Intervention(PRE, Zero(), position=[1, 9])]
    with pytest.raises(HookNeverFiredError, match=r"position 9.*0 to 5"), model.intervening(late):
        model(given)
    with model.intervening(late):  # nothing ran
        pass
    with model.intervening(late):
        model.generate(given, **GENERATION)
    assert silent(model)


def test_an_exception_within_leaves_nothing(model, given):
    def stop(x, hook):
        raise KeyboardInterrupt

    with (
        pytest.raises(KeyboardInterrupt),
        model.intervening([Intervention("z", Freeze(), layer=0)]),
        model.hooks([("blocks.1.hook_resid_pre", stop)]),
    ):
        model(given)
    assert silent(model)


def test_source_runs_do_not_disturb_other_hooks(model, given):
    fired = []
    with model.hooks([("hook_embed", lambda x, hook: fired.append(x))]):
        model.intervene(
            given,
            [Intervention("pattern", Freeze(), layer=0), Intervention(PRE, Patch(tokens(seed=4)))],
        )
    assert len(fired) == 1


# Printed and kept ---------------------------------------------------------------------------------


def test_print_readably():
    steer = Intervention("resid_pre", Add(torch.ones(32), 4.0), layer=2, position=slice(3, None))
    assert repr(steer) == (
        "Intervention('resid_pre', Add(float32[32], coefficient=4.0), layer=2, position=3:)"
    )
    assert repr(Intervention("z", Patch("the cat"), layer=1, head=[0, 2])) == (
        "Intervention('z', Patch('the cat'), layer=1, head=[0, 2])"
    )
    assert repr(Freeze()) == "Freeze()"
    assert repr(Mean(tokens())) == "Mean(int64[2, 6])"
    assert repr(Intervention("z", Zero(), layer=0, position=torch.tensor([3, 4]))) == (
        "Intervention('z', Zero(), layer=0, position=[3, 4])"
    )


@pytest.fixture
def all_kinds(model, other):
    theirs, cache = other
    d_model = model.cfg.d_model
    return [
        Intervention("z", Patch(theirs), layer=0, head=1),
        Intervention("mlp_out", Patch(cache), layer=-1, position=[1, 3]),
        Intervention(PRE, Patch("the cat sat on a mat"), position=torch.tensor([1, 2])),
        Intervention(PRE, Patch(theirs, position=(1, 2)), position=range(2, 4), dims=slice(3, 9)),
        Intervention("z", Mean([theirs, "the cat"]), layer=1),
        Intervention("z", Resample(tokens(5, 6, 9), seed=4), layer=2, head=slice(0, 2)),
        Intervention("pattern", Freeze(), layer=2),
        Intervention("resid_post", Noise(0.5, seed=2), layer=1, position=0),
        Intervention("resid_post", ProjectOut(torch.randn(2, d_model)), layer=1),
        Intervention("post", Scale(2.0), layer=[0, 2], neuron=[1, 2]),
        Intervention("resid_post", Zero(), layer=0, subspace=torch.randn(3, d_model)),
        Intervention("resid_post", Add(torch.randn(d_model, dtype=torch.float16), 0.5), layer=0),
    ]


def test_saved_and_loaded_they_do_the_same(model, given, all_kinds, tmp_path):
    patching.save(all_kinds, tmp_path / "new" / "folder")
    back = patching.load(tmp_path / "new" / "folder")
    assert torch.equal(model.intervene(given, back), model.intervene(given, all_kinds))
    for one, two in zip(all_kinds, back, strict=True):  # each alone too
        assert torch.equal(model.intervene(given, [one]), model.intervene(given, [two]))
    json.loads((tmp_path / "new" / "folder" / "interventions.json").read_text("utf-8"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_cuda_they_do_the_same(given, all_kinds, dtype):
    there = hookedlm.load(hf("gpt2-base"), tokenizer=word_tokenizer()).to("cuda").to(dtype)
    here = hookedlm.load(hf("gpt2-base"), tokenizer=word_tokenizer()).to(dtype)
    places = [Intervention("z", Scale(3.0), layer=1, position=torch.tensor([1, 4]).cuda(), head=2)]
    for listed in ([each] for each in [*all_kinds, *places]):
        made, truth = (model.intervene(given, listed).cpu().float() for model in (there, here))
        tolerance = 1e-3 if dtype == torch.float32 else 0.15
        assert (made - truth).norm() < tolerance * truth.norm(), listed


def test_in_half_precision(given, all_kinds):
    model = hookedlm.load(hf("gpt2-base"), tokenizer=word_tokenizer()).to(torch.bfloat16)
    for each in all_kinds:
        assert model.intervene(given, [each]).dtype == torch.bfloat16
    model.intervene(given, all_kinds)


def test_saving_again_replaces(model, all_kinds, tmp_path, monkeypatch):
    patching.save(all_kinds[:3], tmp_path)
    before = sorted(path.name for path in tmp_path.iterdir())
    assert len(before) == 2

    def full(*args, **kwargs):
        raise OSError("no space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("hookedlm.interventions.files.os.replace", full)
        with pytest.raises(OSError, match="no space"):
            patching.save(all_kinds, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert len(patching.load(tmp_path)) == 3
    patching.save(all_kinds, tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
    assert len(patching.load(tmp_path)) == len(all_kinds)


def test_files_that_are_none_are_refused(model, tmp_path):
    with pytest.raises(CacheFileError, match="no such file"):
        patching.load(tmp_path)
    (tmp_path / "interventions.json").write_text('{"format": "other"}')
    with pytest.raises(CacheFileError, match="not written by"):
        patching.load(tmp_path)
    patching.save([Intervention(PRE, Add(torch.ones(3)))], tmp_path)
    [tensors] = tmp_path.glob("*.safetensors")
    tensors.write_bytes(tensors.read_bytes()[:-3])
    with pytest.raises(CacheFileError, match="damaged"):
        patching.load(tmp_path)

    class Mine(What):
        pass

    with pytest.raises(InputError, match="can't be saved"):
        patching.save([Intervention(PRE, Mine())], tmp_path)
