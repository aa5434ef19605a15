"""`HookedRootModule`: points found by name, hooks that come and go, in a user's own module and in
a loaded model."""

from __future__ import annotations

import copy
from functools import cache

import pytest
import torch
from tiny import tinies
from torch import nn

import hookedlm
from hookedlm import HookedRootModule, HookedTransformer, HookPoint
from hookedlm.errors import HookNameError, HookNeverFiredError, HookReturnError, NoGradientError


class Inner(nn.Module):
    def __init__(self):
        super().__init__()
        self.hook_square = HookPoint()

    def forward(self, x):
        return self.hook_square(x**2)


class Chain(HookedRootModule):
    """x, 2x, (2x)², summed: what a user would write, with plain hook points."""

    def __init__(self):
        super().__init__()
        self.hook_in = HookPoint()
        self.factor = nn.Parameter(torch.tensor(2.0))
        self.hook_double = HookPoint()
        self.inner = Inner()
        self.setup()

    def forward(self, x, stop=False):
        x = self.hook_double(self.hook_in(x) * self.factor)
        return x.sum() if stop else self.inner(x).sum()


@pytest.fixture
def chain() -> Chain:
    return Chain()


X = torch.tensor([[1.0, 2.0, 3.0]])
PLAIN = float((4 * X**2).sum())


def zero(tensor, hook):
    return torch.zeros_like(tensor)


def observe(tensor, hook):
    return None


def interrupt(tensor, hook):
    raise KeyboardInterrupt


def fns(model) -> dict[str, list]:
    """Every hook in a model: name -> functions, both directions."""
    return {
        name: [handle.fn for handle in (*point.fwd_hooks, *point.bwd_hooks)]
        for name, point in model.hook_dict.items()
        if point.fwd_hooks or point.bwd_hooks
    }


@cache
def gpt2() -> HookedTransformer:
    return hookedlm.load(tinies("gpt2")[0].build())


TOKENS = torch.arange(10).reshape(2, 5) + 3


@pytest.fixture
def model():
    yield gpt2()
    left = fns(gpt2())
    gpt2().reset_hooks(including_permanent=True)
    assert not left, "this test left hooks behind"


# A module of the user's own -----------------------------------------------------------------------


def test_setup_names_modules_and_points(chain):
    assert list(chain.hook_dict) == ["hook_in", "hook_double", "inner.hook_square"]
    assert [point.name for point in chain.hook_points()] == list(chain.hook_dict)
    assert set(chain.mod_dict) == {"inner", *chain.hook_dict}
    assert chain.hook_dict["inner.hook_square"] is chain.inner.hook_square


def test_a_users_module_runs_with_hooks_and_caches(chain):
    assert chain(X).item() == PLAIN
    out = chain.run_with_hooks(X, fwd_hooks=[("hook_double", lambda x, hook: x + 1)])
    assert out.item() == ((2 * X + 1) ** 2).sum().item()
    out, cache = chain.run_with_cache(X)
    assert out.item() == PLAIN
    assert list(cache) == list(chain.hook_dict)
    assert torch.equal(cache["inner.hook_square"], 4 * X**2)
    assert not cache["inner.hook_square"].requires_grad
    assert type(cache) is dict


def test_options_of_a_users_cache(chain):
    _, cache = chain.run_with_cache(
        X, names_filter="hook_*", remove_batch_dim=True, dtype=torch.float64, incl_bwd=True
    )
    assert set(cache) == {"hook_in", "hook_double", "hook_double_grad"}  # the input needs no grad
    assert cache["hook_double"].shape == (3,)
    assert cache["hook_double"].dtype == torch.float64
    assert torch.equal(cache["hook_double_grad"], (4 * X).double()[0])
    _, cache = chain.run_with_cache(X, pos_slice=-1)  # undeclared axes: batch, then pos
    assert torch.equal(cache["hook_double"], 2 * X[:, -1:])


def test_points_added_later_are_found_after_setup(chain):
    chain.inner.hook_late = HookPoint()
    assert "inner.hook_late" not in chain.hook_dict
    chain.setup()
    assert chain.hook_dict["inner.hook_late"].name == "inner.hook_late"
    assert chain.inner.hook_late.run_state is chain.run_state


def test_a_copy_has_hook_points_of_its_own(chain):
    twin = copy.deepcopy(chain)
    twin.add_hook("hook_in", zero)
    assert not fns(chain)
    assert twin(X).item() == 0
    assert chain(X).item() == PLAIN
    assert twin.hook_dict["hook_in"] is twin.hook_in


def test_check_hooks_to_add_can_refuse(chain):
    class Careful(Chain):
        def check_hooks_to_add(self, hook_point, hook_point_name, hook, *args, **kwargs):
            if hook_point_name == "hook_in":
                raise PermissionError(hook_point_name)

    careful = Careful()
    with pytest.raises(PermissionError):
        careful.add_hook("hook_in", observe)
    with pytest.raises(PermissionError):
        careful.run_with_hooks(X, fwd_hooks=[("hook_double", zero), ("hook_in", observe)])
    assert not fns(careful)


# Which points -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "where, expected",
    [
        ("blocks.1.hook_resid_pre", ["blocks.1.hook_resid_pre"]),
        ("blocks.*.hook_resid_pre", [f"blocks.{i}.hook_resid_pre" for i in range(3)]),
        ("blocks.[02].attn.hook_?", [f"blocks.{i}.attn.hook_{x}" for i in (0, 2) for x in "qkvz"]),
        (["ln_final.hook_scale", "hook_embed"], ["hook_embed", "ln_final.hook_scale"]),
        (("hook_logits",), ["hook_logits"]),
        ({"hook_logits", "hook_embed"}, ["hook_embed", "hook_logits"]),
        (
            ["blocks.1.*_pre", "hook_embed"],
            ["hook_embed", "blocks.1.hook_resid_pre", "blocks.1.mlp.hook_pre"],
        ),
        ((name for name in ("hook_embed", "hook_logits")), ["hook_embed", "hook_logits"]),
        (lambda name: name.endswith("attn.hook_z"), [f"blocks.{i}.attn.hook_z" for i in range(3)]),
        ("blocks.*.attn.hook_result", [f"blocks.{i}.attn.hook_result" for i in range(3)]),
    ],
)
def test_filters_select_in_firing_order(model, where, expected):
    assert [point.name for point in model.select(where)] == expected


def test_firing_order_is_the_order_of_names(model):
    fired = []
    names = list(model.hook_dict)
    with model.hooks([(names, lambda tensor, hook: fired.append(hook.name))]):
        model(TOKENS)
    assert sorted(fired) == sorted(names)
    listed = [name for name in names if not model.hook_dict[name].on_demand]
    assert [name for name in fired if name in listed] == listed


@pytest.mark.parametrize(
    "typo, meant",
    [
        ("blocks.1.attn.hook_patern", "blocks.1.attn.hook_pattern"),
        ("blocks.1.hook_pattern", "blocks.1.attn.hook_pattern"),
        ("blocks.7.hook_resid_pre", "blocks.2.hook_resid_pre"),
        ("resid_pre", "hook_resid_pre"),
        ("hook_embeds", "hook_embed"),
        ("blocks.0.hook_mlp.post", "blocks.0.mlp.hook_post"),
    ],
)
def test_a_typo_is_an_error_that_names_the_nearest(model, typo, meant):
    for attempt in (
        lambda: model.run_with_hooks(TOKENS, fwd_hooks=[("hook_embed", zero), (typo, observe)]),
        lambda: model.run_with_hooks(TOKENS, bwd_hooks=[(typo, observe)]),
        lambda: model.run_with_cache(TOKENS, names_filter=typo),
        lambda: model.run_with_cache(TOKENS, names_filter=["hook_embed", typo]),
        lambda: model.add_hook(typo, observe),
        lambda: model.add_caching_hooks([typo]),
    ):
        with pytest.raises(HookNameError) as raised:
            attempt()
        assert meant in str(raised.value)
        assert isinstance(raised.value, KeyError)
        assert not fns(model)


@pytest.mark.parametrize(
    "nothing", ["blocks.*.hook_nothing", [], lambda name: False, ["blocks.9*"], {"x?": 1}]
)
def test_filters_that_match_nothing_are_errors(model, nothing):
    with pytest.raises(HookNameError):
        model.run_with_cache(TOKENS, names_filter=nothing)
    with pytest.raises(HookNameError):
        model.add_hook(nothing, observe)
    assert not fns(model)


def test_predicates_mean_on_demand_points_only_when_nothing_else_fits(model):
    everything = [point.name for point in model.select(lambda name: True)]
    assert everything == [name for name, point in model.hook_dict.items() if not point.on_demand]
    assert any(point.on_demand for point in model.hook_points())
    results = model.select(lambda name: name.endswith("hook_result"))
    assert [point.name for point in results] == [f"blocks.{i}.attn.hook_result" for i in range(3)]


# Contexts -----------------------------------------------------------------------------------------


def test_nested_contexts_remove_exactly_their_own(model):
    mine = model.add_hook("hook_embed", observe)

    def outer(tensor, hook):
        return None

    def inner(tensor, hook):
        return None

    with model.hooks([("hook_embed", outer)]):
        assert model.context_level == 1
        with model.hooks([("hook_embed", inner), ("hook_logits", inner)]):
            assert model.context_level == 2
            assert fns(model) == {"hook_embed": [observe, outer, inner], "hook_logits": [inner]}
        assert fns(model) == {"hook_embed": [observe, outer]}
    assert model.context_level == 0
    assert fns(model) == {"hook_embed": [observe]}
    mine.remove()


def test_one_function_in_two_contexts_is_two_hooks(model):
    with model.hooks([("hook_embed", observe)]):
        with model.hooks([("hook_embed", observe)]):
            pass
        assert fns(model) == {"hook_embed": [observe]}


@pytest.mark.parametrize("how", ["hooks", "run_with_hooks", "run_with_cache"])
@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_an_exception_in_a_hook_leaves_nothing_of_the_run(model, how, error):
    def fail(tensor, hook):
        raise error

    mine = model.add_hook("blocks.0.hook_resid_pre", observe)
    forever = model.add_perma_hook("blocks.2.mlp.hook_post", observe)
    before = fns(model)
    if how == "run_with_cache":
        failing = model.add_hook("blocks.1.attn.hook_z", fail)
        with pytest.raises(error):
            model.run_with_cache(TOKENS)
        failing.remove()
    elif how == "run_with_hooks":
        hooks = [("blocks.*.attn.hook_z", observe), ("blocks.1.attn.hook_z", fail)]
        with pytest.raises(error):
            model.run_with_hooks(TOKENS, fwd_hooks=hooks, reset_hooks_end=False)
    else:
        with pytest.raises(error), model.hooks([("blocks.1.attn.hook_z", fail)]):
            model(TOKENS)
    assert fns(model) == before
    assert model.context_level == 0
    mine.remove()
    forever.remove()


def test_reset_hooks_end_false_keeps_the_hooks(model):
    out = model.run_with_hooks(
        TOKENS, fwd_hooks=[("blocks.1.hook_attn_out", zero)], reset_hooks_end=False
    )
    assert fns(model) == {"blocks.1.hook_attn_out": [zero]}
    assert torch.equal(model(TOKENS), out)
    model.reset_hooks()
    assert not torch.allclose(model(TOKENS), out)


def test_a_kept_recorder_still_only_observes(model):
    """It must not count as an edit, or the model would never use its fused kernels again."""
    model.run_with_cache(TOKENS, names_filter="hook_embed", reset_hooks_end=False)
    assert list(fns(model)) == ["hook_embed"]
    assert not model.hook_embed.edited
    model.reset_hooks()


def test_clear_contexts(model):
    def remember(tensor, hook):
        hook.ctx["seen"] = True

    hooks = [("hook_embed", remember)]
    model.run_with_hooks(TOKENS, fwd_hooks=hooks)
    assert model.hook_embed.ctx == {"seen": True}
    model.run_with_hooks(TOKENS, fwd_hooks=hooks, clear_contexts=True)
    assert model.hook_embed.ctx == {}
    model.run_with_hooks(TOKENS, fwd_hooks=hooks)
    model.reset_hooks(clear_contexts=False)
    assert model.hook_embed.ctx == {"seen": True}
    model.reset_hooks()
    assert model.hook_embed.ctx == {}


# Adding and resetting -----------------------------------------------------------------------------


def test_add_hook_returns_one_handle_or_several(model):
    one = model.add_hook("hook_embed", observe)
    several = model.add_hook("blocks.*.attn.hook_z", observe)
    assert isinstance(several, list)
    assert len(several) == 3
    for handle in (one, *several):
        handle.remove()


def test_permanent_hooks_survive_reset(model):
    kept = model.add_perma_hook(["hook_embed", "hook_logits"], observe)
    model.add_hook("hook_embed", zero)
    model.reset_hooks()
    assert fns(model) == {"hook_embed": [observe], "hook_logits": [observe]}
    model.reset_hooks(including_permanent=True)
    assert not fns(model)
    assert len(kept) == 2


def test_reset_by_direction_and_level(model):
    model.add_hook("hook_embed", observe, "both")
    model.reset_hooks(direction="bwd")
    assert fns(model) == {"hook_embed": [observe]}
    model.add_hook("hook_embed", zero, level=7)
    model.reset_hooks(level=7)
    assert fns(model) == {"hook_embed": [observe]}
    model.reset_hooks()


def test_users_hooks_and_a_runs_hooks_act_together(model):
    mine = model.add_hook("blocks.0.hook_attn_out", zero)
    both = model.run_with_hooks(TOKENS, fwd_hooks=[("blocks.0.hook_mlp_out", zero)])
    mine.remove()
    specs = [("blocks.0.hook_attn_out", zero), ("blocks.0.hook_mlp_out", zero)]
    assert torch.equal(model.run_with_hooks(TOKENS, fwd_hooks=specs), both)


def test_a_point_added_to_a_block_works_after_setup():
    model = hookedlm.load(tinies("gpt2")[0].build())
    block, seen = model.blocks[1], []
    block.hook_extra = HookPoint("batch pos d_model")
    inside = block.mlp.forward
    block.mlp.forward = lambda x: block.hook_extra(inside(x))
    with pytest.raises(HookNameError, match="hook_extra"):
        model.add_hook("blocks.1.hook_extra", observe)
    model.setup()
    model.run_with_hooks(
        TOKENS,
        return_type=None,
        fwd_hooks=[("blocks.1.hook_extra", lambda x, hook: seen.append(x.shape))],
    )
    assert seen == [(2, 5, 32)]
    out = model.run_with_hooks(TOKENS, fwd_hooks=[("blocks.1.hook_extra", zero)])
    assert torch.allclose(
        out, model.run_with_hooks(TOKENS, fwd_hooks=[("blocks.1.hook_mlp_out", zero)])
    )


def test_a_subclass_of_the_model_can_add_points():
    class Watched(HookedTransformer):
        def _build(self, layers):
            super()._build(layers)
            self.hook_answer = HookPoint("batch pos d_vocab")
            self.setup()

        def forward(self, *args, **kwargs):
            return self.hook_answer(super().forward(*args, **kwargs))

    model = Watched(dict(n_layers=1, d_model=8, n_ctx=8, d_head=4, d_vocab=11, act_fn="relu"))
    out = model.run_with_hooks(torch.tensor([[1, 2]]), fwd_hooks=[("hook_answer", zero)])
    assert out.shape == (1, 2, 11)
    assert not out.any()
    assert model.hook_answer.name == "hook_answer"


# Hooks that never run -----------------------------------------------------------------------------


def test_a_named_hook_that_never_fires_is_an_error(model):
    for attempt in (
        lambda: model.run_with_hooks(
            TOKENS, stop_at_layer=1, fwd_hooks=[("blocks.1.attn.hook_z", observe)]
        ),
        lambda: model.run_with_hooks(
            TOKENS,
            stop_at_layer=1,
            fwd_hooks=[("hook_embed", observe), ("blocks.1.attn.hook_z", observe)],
        ),
        lambda: model.run_with_hooks(
            TOKENS, stop_at_layer=1, fwd_hooks=[(["hook_embed", "blocks.1.attn.hook_z"], observe)]
        ),
        lambda: model.run_with_hooks(
            TOKENS, stop_at_layer=1, bwd_hooks=[("blocks.1.attn.hook_z", observe)]
        ),
        lambda: model.run_with_cache(TOKENS, stop_at_layer=1, names_filter="blocks.1.attn.hook_z"),
        lambda: model.run_with_cache(
            TOKENS, stop_at_layer=1, names_filter=["hook_embed", "blocks.1.attn.hook_z"]
        ),
    ):
        with pytest.raises(HookNeverFiredError, match=r"blocks\.1\.attn\.hook_z.*stop_at_layer"):
            attempt()
        assert not fns(model)


def test_patterns_may_partly_fire_but_not_wholly_miss(model):
    seen = []

    def see(tensor, hook):
        seen.append(hook.name)

    reached = ["blocks.0.attn.hook_z", "blocks.1.attn.hook_z"]
    for where in ("blocks.*.attn.hook_z", lambda name: name.endswith("attn.hook_z")):
        model.run_with_hooks(TOKENS, stop_at_layer=2, fwd_hooks=[(where, see)])
        assert seen == reached
        seen.clear()
        _, cache = model.run_with_cache(TOKENS, stop_at_layer=2, names_filter=where)
        assert list(cache) == reached
    for where in ("blocks.2.*", lambda name: name.startswith("blocks.2.")):
        with pytest.raises(HookNeverFiredError):
            model.run_with_hooks(TOKENS, stop_at_layer=1, fwd_hooks=[(where, observe)])


def test_a_context_in_which_nothing_ran_demands_nothing(model):
    with model.hooks([("blocks.2.hook_resid_pre", observe)]):
        pass
    with model.hooks([("blocks.2.hook_resid_pre", observe)]):
        model(TOKENS, stop_at_layer=1)
        model(TOKENS)  # it fired in one of the runs


# Arguments ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["__call__", "run_with_hooks", "run_with_cache"])
def test_unknown_keywords_are_errors(model, how):
    with pytest.raises(TypeError, match="nmes_filter"):
        vars(type(model)).get(how, getattr(type(model), how))(model, TOKENS, nmes_filter="x")


def test_bad_replacements_in_a_model_say_where(model):
    def sliced(tensor, hook):
        return tensor[:, :1]

    with pytest.raises(HookReturnError, match=r"blocks\.1\.attn\.hook_pattern.*batch head pos"):
        model.run_with_hooks(TOKENS, fwd_hooks=[("blocks.1.attn.hook_pattern", sliced)])
    with pytest.raises(HookReturnError, match="float16"):
        model.run_with_hooks(TOKENS, fwd_hooks=[("hook_embed", lambda x, hook: x.half())])


# Backward hooks in a model ------------------------------------------------------------------------


def test_backward_hooks_of_a_run_act_during_a_later_backward(model):
    seen = {}
    loss = model.run_with_hooks(
        TOKENS,
        return_type="loss",
        bwd_hooks=[("blocks.*.hook_resid_pre", lambda g, hook: seen.update({hook.name: g}))],
    )
    assert not fns(model)
    assert not seen
    loss.backward()
    assert list(seen) == [f"blocks.{i}.hook_resid_pre" for i in (2, 1, 0)]
    model.zero_grad()


def test_a_replaced_gradient_is_what_flows_on(model):
    """Without the gradient of block 1's input nothing reaches what comes before."""

    def gradients(**hooks):
        with model.hooks(**hooks):
            model(TOKENS, return_type="loss").backward()
        grads = {name: p.grad for name, p in model.named_parameters()}
        model.zero_grad()
        return grads

    plain = gradients()
    cut = gradients(bwd_hooks=[("blocks.1.hook_resid_pre", lambda g, hook: (0 * g,))])
    for name in ("blocks.0.attn.W_Q", "blocks.0.mlp.W_in", "pos_embed.W_pos"):
        assert plain[name].abs().max() > 0
        assert cut[name].abs().max() == 0
    assert torch.equal(plain["blocks.1.mlp.W_in"], cut["blocks.1.mlp.W_in"])
    tripled = gradients(bwd_hooks=[("blocks.1.hook_resid_pre", lambda g, hook: 3 * g)])
    assert torch.allclose(tripled["pos_embed.W_pos"], 3 * plain["pos_embed.W_pos"], rtol=1e-4)


def test_a_backward_hook_without_gradients_is_an_error(model):
    with torch.no_grad(), pytest.raises(NoGradientError, match="no_grad"):
        model.run_with_hooks(TOKENS, bwd_hooks=[("blocks.1.attn.hook_z", observe)])
    with torch.inference_mode(), pytest.raises(NoGradientError):
        model.run_with_hooks(TOKENS, bwd_hooks=[("blocks.1.attn.hook_pattern", observe)])
    assert not fns(model)


# Recorders that stay ------------------------------------------------------------------------------


def test_add_caching_hooks_records_every_run_until_reset(model):
    store = {}
    assert model.add_caching_hooks(["hook_embed", "blocks.1.attn.hook_pattern"], cache=store) is (
        store
    )
    assert model.is_caching
    model(TOKENS)
    assert set(store) == {"hook_embed", "blocks.1.attn.hook_pattern"}
    first = store["hook_embed"]
    model(TOKENS + 1)
    assert not torch.equal(store["hook_embed"], first)
    model.reset_hooks()
    assert not model.is_caching
    last = store["hook_embed"]
    model(TOKENS)
    assert store["hook_embed"] is last


def test_old_spellings_of_caching(model):
    every, some = {}, {}
    model.cache_all(every)
    model.cache_some(some, lambda name: "resid_pre" in name, remove_batch_dim=True)
    model(TOKENS[:1])
    model.reset_hooks()
    _, cache = model.run_with_cache(TOKENS[:1])
    assert set(every) == set(cache)
    for name, tensor in every.items():
        assert torch.allclose(tensor, cache[name], atol=1e-5), name
    assert set(some) == {f"blocks.{i}.hook_resid_pre" for i in range(3)}
    assert some["blocks.0.hook_resid_pre"].shape == (5, 32)


def test_get_caching_hooks_installs_nothing(model):
    store, forward, backward = model.get_caching_hooks(
        "blocks.0.hook_*_out", incl_bwd=True, pos_slice=(1, 3), dtype=torch.float64
    )
    assert not fns(model)
    assert [name for name, _ in forward] == ["blocks.0.hook_attn_out", "blocks.0.hook_mlp_out"]
    with model.hooks(forward, backward):
        model(TOKENS, return_type="loss").backward()
    model.zero_grad()
    assert set(store) == {
        f"blocks.0.hook_{part}_out{suffix}" for part in ("attn", "mlp") for suffix in ("", "_grad")
    }
    assert {(x.shape, x.dtype) for x in store.values()} == {((2, 2, 32), torch.float64)}
