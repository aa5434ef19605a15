"""What `run_with_cache` records: the declared axes, the options, and entries that are computed
afterwards because recording them would have disturbed the fused kernels."""

from __future__ import annotations

import copy
import pickle
from functools import cache

import hf_truth
import pytest
import torch
from tiny import TINIES, VOCAB, Tiny, one_per_family, tinies
from transformers import AutoModelForCausalLM, DynamicCache

import hookedlm
from hookedlm import HookedTransformer
from hookedlm.errors import CacheKeyError, HookNameError, InputError, StaleCacheError

by_id = dict(ids=lambda tiny: tiny.id)
FAMILIES = pytest.mark.parametrize("tiny", one_per_family(), **by_id)
EVERY = pytest.mark.parametrize("tiny", TINIES, **by_id)
DERIVED = ("hook_attn_scores", "hook_pattern", "hook_scale", "hook_normalized", ".mlp.hook_post")


@cache
def loaded(tiny: Tiny) -> HookedTransformer:
    return hookedlm.load(tiny.build())


def gpt2() -> HookedTransformer:
    return loaded(tinies("gpt2")[0])


def llama() -> HookedTransformer:
    return loaded(tinies("llama")[0])


def tokens_of(batch: int = 2, length: int = 5) -> torch.Tensor:
    generator = torch.Generator().manual_seed(batch * length)
    return torch.randint(3, VOCAB, (batch, length), generator=generator)


def observe(tensor, hook):
    return None


def sizes_of(model: HookedTransformer, name: str, batch: int, pos: int) -> tuple[int, ...]:
    """The shape that a point's declared axes promise, from the config and the weights."""
    cfg = model.cfg
    kv_heads = cfg.n_key_value_heads or cfg.n_heads
    sizes = {
        "batch": batch,
        "pos": pos,
        "key_pos": pos,
        "head": cfg.n_heads,
        "kv_head": kv_heads,
        "d_head": cfg.d_head,
        "d_model": cfg.d_model,
        "d_all": (kv_heads if ".k_norm." in name else cfg.n_heads) * cfg.d_head,
        "d_mlp": cfg.d_mlp,
        "d_vocab": cfg.d_vocab,
        "expert": cfg.num_experts,
        "1": 1,
    }
    axes = model.hook_dict[name].axes
    if "expert" in axes:  # layers with and without experts may differ in width
        sizes["d_mlp"] = model.blocks[int(name.split(".")[1])].mlp.spec.d_mlp
    return tuple(sizes[axis] for axis in axes)


# Axes ---------------------------------------------------------------------------------------------


@EVERY
def test_every_recorded_tensor_has_its_declared_axes(tiny):
    """Everything a model has, on-demand points too, live and in a plain cache."""
    model, tokens = loaded(tiny), tokens_of(2, 7)
    with torch.no_grad():
        _, live = model.run_with_cache(tokens, names_filter=list(model.hook_dict))
        _, plain = model.run_with_cache(tokens)
    assert set(live) == set(model.hook_dict)
    assert set(plain) == {name for name, point in model.hook_dict.items() if not point.on_demand}
    for recorded in (live, plain):
        for name, tensor in recorded.items():
            assert tuple(tensor.shape) == sizes_of(model, name, 2, 7), name


@FAMILIES
def test_positions_are_selected_on_the_declared_axis(tiny):
    model, tokens = loaded(tiny), tokens_of(2, 7)
    names = list(model.hook_dict)
    with torch.no_grad():
        _, whole = model.run_with_cache(tokens, names_filter=names)
        for pos_slice, picked in [(-2, [5]), ((1, 4), [1, 2, 3]), ([6, 0], [6, 0])]:
            _, sliced = model.run_with_cache(tokens, names_filter=names, pos_slice=pos_slice)
            for name in names:
                axis = model.hook_dict[name].axes.index("pos")
                expected = whole[name].index_select(axis, torch.tensor(picked))
                assert torch.equal(sliced[name], expected), name


@FAMILIES
def test_a_full_cache_may_be_sliced_too(tiny):
    model, tokens = loaded(tiny), tokens_of(2, 7)
    with torch.no_grad():
        _, whole = model.run_with_cache(tokens)
        _, last = model.run_with_cache(tokens, pos_slice=-1)
    assert list(last) == list(whole)
    for name, tensor in last.items():
        axis = model.hook_dict[name].axes.index("pos")
        close(tensor, whole[name].narrow(axis, 6, 1), name, rtol=1e-4)


# Against Hugging Face -----------------------------------------------------------------------------


@FAMILIES
@pytest.mark.parametrize("side", ["left", "right"])
def test_the_stream_is_hugging_faces(tiny, side):
    hf = tiny.build()
    tokens, mask = hf_truth.padded_batch(VOCAB, [7, 4, 6], side)
    entering, leaving, logits = hf_truth.block_outputs(hf, tokens, mask)
    model, real = loaded(tiny), mask.bool()
    with torch.no_grad():
        out, cache = model.run_with_cache(tokens, attention_mask=mask)
    close(out[real], logits[real], "logits")
    close(cache["hook_logits"][real], logits[real], "hook_logits")
    for i, (before, after) in enumerate(zip(entering, leaving, strict=True)):
        close(cache["resid_pre", i][real], before[real], f"resid_pre {i}")
        close(cache["resid_post", i][real], after[real], f"resid_post {i}")


@FAMILIES
def test_patterns_are_hugging_faces(tiny):
    """Transformers returns attention probabilities from its own eager code."""
    hf = tiny.build()
    eager = AutoModelForCausalLM.from_config(hf.config, attn_implementation="eager").eval()
    eager.load_state_dict(hf.state_dict())
    tokens, mask = hf_truth.padded_batch(VOCAB, [7, 4, 6], "left")
    inputs = hf_truth.inputs_of(eager, tokens, mask)
    with torch.no_grad():
        theirs = eager(**inputs, output_attentions=True).attentions
        _, cache = loaded(tiny).run_with_cache(tokens, attention_mask=mask)
    real = mask.bool()
    for i, pattern in enumerate(theirs):
        ours = cache["pattern", i]
        close(ours.transpose(1, 2)[real], pattern.transpose(1, 2)[real], f"pattern {i}")


# Derived entries ----------------------------------------------------------------------------------


def close(got: torch.Tensor, expected: torch.Tensor, name: str, rtol: float = 1e-5) -> None:
    """Equal to ``rtol`` of the largest finite entry; infinities in the same places."""
    assert got.shape == expected.shape, name
    finite = torch.isfinite(expected)
    assert torch.equal(torch.isfinite(got), finite), name
    assert torch.equal(got[~finite], expected[~finite]), name
    if finite.any():
        size = expected[finite].abs().max().clamp(min=1e-3)
        error = (got[finite] - expected[finite]).abs().max() / size
        assert error <= rtol, f"{name}: relative error {error:.2e}"


PADDINGS = [None, "left", "right"]


@EVERY
@pytest.mark.parametrize("side", PADDINGS)
def test_derived_entries_equal_listened_to_ones(tiny, side):
    """One run records little and derives; the other listens to every point, nothing fused."""
    model = loaded(tiny)
    tokens, mask = hf_truth.padded_batch(VOCAB, [7, 7] if side is None else [7, 3], side or "left")
    with torch.no_grad():
        _, plain = model.run_with_cache(tokens, attention_mask=mask)
        derived = [name for name in plain if name not in plain.cache_dict.recorded()]
        _, live = model.run_with_cache(tokens, attention_mask=mask, names_filter=derived)
    derivable = {name for name in plain if name.endswith(DERIVED)}
    assert set(derived) == {name for name in derivable if not name.startswith("embed.")}
    assert len(derived) > 1
    assert any(name.startswith("ln_final.") for name in derived) or model.ln_final is None
    assert live.cache_dict.recorded() == derived
    real = mask.bool()
    for name in derived:
        axes = model.hook_dict[name].axes
        got, expected = (x[name].movedim(axes.index("pos"), 1)[real] for x in (plain, live))
        close(got, expected, name)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.int32])
@pytest.mark.parametrize("tiny", tinies("gpt2")[:1] + tinies("bloom")[:1] + tinies("gemma2")[:1])
def test_a_mask_may_have_any_dtype(tiny, dtype):
    model = loaded(tiny)
    tokens, mask = hf_truth.padded_batch(VOCAB, [6, 3], "left")
    with torch.no_grad():
        logits, expected = model.run_with_cache(tokens, attention_mask=mask)
        same, cache = model.run_with_cache(tokens, attention_mask=mask.to(dtype))
    assert torch.equal(same, logits)
    assert torch.equal(cache["pattern", 1], expected["pattern", 1])


@FAMILIES
def test_rows_of_a_pattern_sum_to_one_or_less_to_a_sink(tiny):
    model, tokens = loaded(tiny), tokens_of()
    _, cache = model.run_with_cache(tokens)
    for i in range(model.cfg.n_layers):
        pattern, rows = cache["pattern", i], cache["pattern", i].sum(-1)
        assert (pattern >= 0).all()
        assert (pattern.triu(1) == 0).all()
        assert torch.isneginf(cache["attn_scores", i].masked_select(above(pattern))).all()
        if tiny.model_type == "gpt_oss":
            assert ((rows > 0) & (rows < 1)).all()
        else:
            assert torch.allclose(rows, torch.ones_like(rows), atol=1e-5)


def above(square: torch.Tensor) -> torch.Tensor:
    """True above the diagonal of the last two axes."""
    return torch.ones_like(square, dtype=torch.bool).triu(1)


def test_a_plain_cache_does_not_disturb_the_fused_kernels():
    """Bit-identical logits: recording changes nothing. (Bloom's norm of the embedding is recorded
    longhand: what it reads is no activation of its own.)"""
    for tiny in one_per_family():
        if tiny.model_type == "bloom":
            continue
        model, tokens = loaded(tiny), tokens_of()
        with torch.no_grad():
            plain = model(tokens)
            out, cache = model.run_with_cache(tokens)
        assert torch.equal(out, plain), tiny.id
        assert torch.equal(cache["hook_logits"], plain), tiny.id


@FAMILIES
def test_listening_changes_no_numbers(tiny):
    model, tokens = loaded(tiny), tokens_of()
    with torch.no_grad():
        plain = model(tokens)
        out, _ = model.run_with_cache(tokens, names_filter=list(model.hook_dict))
    close(out, plain, "logits", rtol=2e-5)


def test_entries_of_a_pass_that_stopped_early():
    model = llama()
    _, cache = model.run_with_cache(tokens_of(), stop_at_layer=1)
    assert {name.split(".")[1] for name in cache if name.startswith("blocks")} == {"0"}
    assert cache["pattern", 0].shape == (2, 4, 5, 5)
    assert "ln_final.hook_scale" not in cache
    with pytest.raises(CacheKeyError, match="stop_at_layer"):
        cache["pattern", 1]
    with pytest.raises(CacheKeyError, match="stop_at_layer"):
        cache["hook_logits"]


def test_entries_of_a_pass_that_started_late():
    model = llama()
    _, whole = model.run_with_cache(tokens_of())
    _, cache = model.run_with_cache(whole["resid_pre", 2], start_at_layer=2)
    assert "hook_embed" not in cache
    assert "blocks.1.attn.hook_pattern" not in cache
    for name in ("blocks.2.attn.hook_pattern", "blocks.2.ln2.hook_scale", "ln_final.hook_scale"):
        close(cache[name], whole[name], name)


def test_a_pass_without_output_still_has_a_full_cache():
    out, cache = gpt2().run_with_cache(tokens_of(), return_type=None)
    assert out is None
    assert set(cache) == {n for n, point in gpt2().hook_dict.items() if not point.on_demand}


def test_derived_entries_wait_for_nothing_but_the_recording():
    """Other runs between the recording and the question change nothing."""
    model = gpt2()
    _, cache = model.run_with_cache(tokens_of(2, 6))
    expected = model.run_with_cache(tokens_of(2, 6), names_filter="*hook_pattern")[1]
    model.run_with_cache(tokens_of(3, 4))
    model(tokens_of(1, 9))
    close(cache["pattern", 2], expected["pattern", 2], "pattern")


# With hooks of somebody else ----------------------------------------------------------------------


def test_an_edit_is_recorded_as_it_was_and_shows_downstream():
    """A scores edit must be in the scores and in the pattern although a plain run derives both."""
    for tiny in one_per_family():
        model, tokens = loaded(tiny), tokens_of()

        def first_key_only(scores, hook):
            scores[..., 1:] = -torch.inf

        where = "blocks.1.attn.hook_attn_scores"
        _, clean = model.run_with_cache(tokens)
        with torch.no_grad(), model.hooks([(where, first_key_only)]):
            _, cache = model.run_with_cache(tokens)
        assert torch.isneginf(cache[where][..., 1:]).all(), tiny.id
        pattern = cache["pattern", 1]
        assert (pattern[..., 1:] == 0).all(), tiny.id
        visible = torch.isfinite(clean[where][..., 0])  # not where a window is too short
        assert torch.equal(pattern[..., 0] > 0, visible), tiny.id
        v = cache["v", 1][:, :1].repeat_interleave(
            cache["z", 1].shape[2] // cache["v", 1].shape[2], dim=2
        )
        z = pattern[..., 0].transpose(1, 2)[..., None] * v
        close(cache["z", 1], z, f"{tiny.id} z")


def test_an_edited_norm_is_recorded_as_it_was():
    model = gpt2()
    for norm in ("blocks.1.ln1", "ln_final"):
        with model.hooks([(f"{norm}.hook_scale", lambda scale, hook: 2 * scale)]):
            _, cache = model.run_with_cache(tokens_of())
        _, plain = model.run_with_cache(tokens_of())
        close(cache[f"{norm}.hook_scale"], 2 * plain[f"{norm}.hook_scale"], norm)
        b = model.mod_dict[norm].b
        expected = (plain[f"{norm}.hook_normalized"] - b) / 2 + b
        close(cache[f"{norm}.hook_normalized"], expected, norm)


def test_edits_of_points_on_demand_are_part_of_the_cache():
    """Otherwise head results would be recomputed from z, as if nobody had edited them."""
    model = gpt2()

    def no_head_2(result, hook):
        result[:, :, 2] = 0

    with model.hooks([("blocks.1.attn.hook_result", no_head_2)]):
        _, cache = model.run_with_cache(tokens_of())
    assert "blocks.0.attn.hook_result" not in cache
    assert not cache["result", 1][:, :, 2].any()
    close(cache["result", 1].sum(2) + model.blocks[1].attn.b_O, cache["attn_out", 1], "attn_out")


def test_in_place_edits_do_not_reach_what_was_recorded_before():
    """resid_post of one block and resid_pre of the next are one tensor until somebody edits."""
    model, tokens = gpt2(), tokens_of()
    _, clean = model.run_with_cache(tokens)
    with model.hooks([("blocks.1.hook_resid_pre", lambda x, hook: x.zero_())]):
        _, cache = model.run_with_cache(tokens)
    assert not cache["resid_pre", 1].any()
    assert torch.equal(cache["resid_post", 0], clean["resid_post", 0])
    assert cache["resid_post", 0].any()


# Options ------------------------------------------------------------------------------------------


FILTERS = [
    "blocks.1.hook_resid_pre",
    "blocks.1.hook_resid_p*",
    ["blocks.1.hook_resid_pre", "hook_embed"],
    ("blocks.1.hook_resid_pre", "blocks.*.attn.hook_z"),
    {"blocks.1.hook_resid_pre"},
    lambda name: name.startswith("blocks.1."),
    ["blocks.1.hook_resid_pre", lambda name: name == "hook_embed"],
]


@pytest.mark.parametrize("names_filter", FILTERS, ids=lambda f: type(f).__name__)
def test_filters_record_what_they_select(names_filter):
    model = gpt2()
    _, cache = model.run_with_cache(tokens_of(), names_filter=names_filter)
    assert list(cache) == [point.name for point in model.select(names_filter)]
    assert cache.cache_dict.recorded() == list(cache)
    _, plain = model.run_with_cache(tokens_of())
    for name, tensor in cache.items():
        close(tensor, plain[name], name)


def test_recorded_tensors_are_detached():
    model = gpt2()
    out, cache = model.run_with_cache(tokens_of())
    assert out.requires_grad
    assert not any(tensor.requires_grad for tensor in cache.values())


def test_dtype_applies_as_recorded():
    model = gpt2()
    _, plain = model.run_with_cache(tokens_of())
    _, cache = model.run_with_cache(tokens_of(), dtype=torch.bfloat16)
    assert {x.dtype for x in cache.values()} == {torch.bfloat16}
    assert list(cache) == list(plain)
    assert torch.equal(cache["pattern", 1], plain["pattern", 1].bfloat16())


def test_device_applies_as_recorded():
    _, cache = gpt2().run_with_cache(tokens_of(), names_filter="*hook_z", device="meta")
    assert {x.device.type for x in cache.values()} == {"meta"}


def test_a_small_part_does_not_keep_the_whole_alive():
    """What was asked for is all that stays in memory."""
    model, tokens = gpt2(), tokens_of(2, 40)
    for options in (
        dict(names_filter="*hook_resid_pre", pos_slice=-1),
        dict(pos_slice=(-1, None)),
        dict(names_filter=["*attn.hook_q"]),  # one third of a fused matrix product
    ):
        _, cache = model.run_with_cache(tokens, **options)
        for name, x in cache.items():
            assert x.untyped_storage().nbytes() <= 2 * x.numel() * x.element_size(), name


def test_remove_batch_dim():
    for tiny in one_per_family():
        model, tokens = loaded(tiny), tokens_of(1, 5)
        with torch.no_grad():
            _, whole = model.run_with_cache(tokens)
            _, cache = model.run_with_cache(tokens, remove_batch_dim=True)
        assert not cache.has_batch_dim
        assert list(cache) == list(whole)
        for name, tensor in cache.items():
            close(tensor, whole[name][0], f"{tiny.id} {name}")


@pytest.mark.parametrize("names_filter", [None, "blocks.1.attn.hook_q", "hook_embed"])
def test_remove_batch_dim_of_a_larger_batch_is_an_error(names_filter):
    with pytest.raises(InputError, match="batch of one"):
        gpt2().run_with_cache(tokens_of(2), names_filter=names_filter, remove_batch_dim=True)
    assert not any(point.wanted for point in gpt2().hook_points())


def test_a_plain_dictionary_on_request():
    """Whatever one does with a dictionary gives tensors, those computed late included."""
    _, kept = gpt2().run_with_cache(tokens_of())

    def fresh() -> dict:
        return gpt2().run_with_cache(tokens_of(), return_cache_object=False)[1]

    assert isinstance(fresh(), dict)
    for copied in (
        fresh(),
        dict(fresh()),
        {**fresh()},
        fresh().copy(),
        fresh() | {},
        copy.copy(fresh()),
        copy.deepcopy(fresh()),
        pickle.loads(pickle.dumps(fresh())),
        dict(fresh().items()),
        dict(zip(fresh(), fresh().values(), strict=True)),
        {name: fresh().get(name) for name in fresh()},
        {name: fresh().pop(name) for name in fresh()},
        {name: fresh().setdefault(name, None) for name in fresh()},
    ):
        assert list(copied) == list(kept)
        for name, tensor in copied.items():
            assert isinstance(tensor, torch.Tensor), name
            assert torch.equal(tensor, kept[name]), name
    assert fresh().get("no such name", 5) == 5
    assert fresh().pop("no such name", 5) == 5
    with pytest.raises(KeyError):
        fresh().pop("no such name")


def test_saving_and_loading_a_cache(tmp_path):
    _, cache = gpt2().run_with_cache(tokens_of())
    torch.save(cache.cache_dict, tmp_path / "cache.pt")
    again = torch.load(tmp_path / "cache.pt", weights_only=True)
    assert list(again) == list(cache)
    assert torch.equal(again["blocks.1.attn.hook_pattern"], cache["pattern", 1])


# Points that exist on demand ----------------------------------------------------------------------


FLAGS = [
    ("use_attn_result", ["attn.hook_result"]),
    ("use_split_qkv_input", ["hook_q_input", "hook_k_input", "hook_v_input"]),
    ("use_attn_in", ["hook_attn_in"]),
    ("use_hook_mlp_in", ["hook_mlp_in"]),
]


@pytest.mark.parametrize("flag, points", FLAGS)
def test_flags_make_points_part_of_everything(flag, points):
    model = hookedlm.load(tinies("gpt2")[0].build())
    names = {f"blocks.{i}.{point}" for i in range(3) for point in points}
    _, plain = model.run_with_cache(tokens_of())
    assert not names & set(plain)
    for switch in (lambda on: setattr(model.cfg, flag, on), vars_setter(model, flag)):
        switch(True)
        _, cache = model.run_with_cache(tokens_of())
        assert set(cache) - set(plain) == names
        _, predicate = model.run_with_cache(tokens_of(), names_filter=lambda name: True)
        assert set(predicate) == set(cache)
        for name in plain:
            close(cache[name], plain[name], name)
        switch(False)
        assert set(model.run_with_cache(tokens_of())[1]) == set(plain)


def vars_setter(model: HookedTransformer, flag: str):
    return {
        "use_attn_result": model.set_use_attn_result,
        "use_split_qkv_input": model.set_use_split_qkv_input,
        "use_attn_in": model.set_use_attn_in,
        "use_hook_mlp_in": model.set_use_hook_mlp_in,
    }[flag]


def test_grouped_queries_have_no_attn_in_and_say_so():
    with pytest.raises(InputError, match="hook_q_input"):
        llama().set_use_attn_in(True)
    with pytest.raises(HookNameError, match="grouped"):
        llama().run_with_cache(tokens_of(), names_filter="blocks.0.hook_attn_in")


@FAMILIES
def test_per_head_copies_are_the_stream(tiny):
    model, tokens = loaded(tiny), tokens_of()
    copies = ("hook_q_input", "hook_k_input", "hook_v_input", "hook_attn_in")
    names = [name for name in model.hook_dict if name.endswith(copies)]
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens, names_filter=[*names, "*hook_resid_pre"])
    for name in names:
        stream = cache["resid_pre", int(name.split(".")[1])]
        assert torch.equal(cache[name], stream.unsqueeze(2).expand_as(cache[name])), name


@FAMILIES
def test_mlp_in_is_the_stream_the_mlp_reads(tiny):
    model, tokens = loaded(tiny), tokens_of()
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens, names_filter=["*hook_mlp_in", "*hook_resid*"])
    for i in range(model.cfg.n_layers):
        mid = f"blocks.{i}.hook_resid_mid"
        read = cache[mid] if mid in cache else cache["resid_pre", i]
        assert torch.equal(cache[f"blocks.{i}.hook_mlp_in"], read)


# Gradients ----------------------------------------------------------------------------------------


@FAMILIES
def test_recorded_gradients_are_autograds(tiny):
    """Every `<name>_grad` beside torch.autograd.grad with respect to the live tensor."""
    model, tokens = loaded(tiny), tokens_of()
    names = [point.name for point in model.select(None)]
    live: dict[str, torch.Tensor] = {}

    def keep(tensor, hook):
        live[hook.name] = tensor

    loss = model.run_with_hooks(tokens, return_type="loss", fwd_hooks=[(names, keep)])
    grads = torch.autograd.grad(loss, [live[name] for name in names], allow_unused=True)
    truth = dict(zip(names, grads, strict=True))
    out, cache = model.run_with_cache(tokens, return_type="loss", incl_bwd=True)
    model.zero_grad()
    close(out.detach(), loss.detach(), "loss")
    assert None not in truth.values()
    assert set(cache) == {*names, *(f"{name}_grad" for name in names)}
    for name in names:
        close(cache[f"{name}_grad"], truth[name], name, rtol=1e-4)


def test_gradients_of_some_points():
    model = gpt2()
    _, cache = model.run_with_cache(
        tokens_of(), return_type="loss", incl_bwd=True, names_filter="*hook_z", pos_slice=-1
    )
    model.zero_grad()
    assert len(cache) == 6
    assert cache["blocks.1.attn.hook_z_grad"].shape == (2, 1, 4, 8)


@pytest.mark.parametrize("tiny", [tinies("gpt2")[0], tinies("llama")[0]])
def test_what_neurons_said_is_not_what_another_function_makes_of_it(tiny):
    model = hookedlm.load(tiny.build())
    _, cache = model.run_with_cache(tokens_of())
    assert cache["post", 0].shape == cache["pre", 0].shape  # read before
    for block in model.blocks:
        block.mlp.act_fn = torch.nn.Identity()
    assert not torch.equal(cache["post", 0], cache["pre", 0])
    with pytest.raises(StaleCacheError, match="activation function was exchanged"):
        cache["post", 1]


@pytest.mark.parametrize("frozen", ["all", "embedding", "none"])
def test_gradients_of_activations_want_none_of_weights(frozen):
    model, tokens, names = gpt2(), tokens_of(), ["hook_embed", "blocks.*.hook_resid_pre"]
    options = dict(return_type="loss", incl_bwd=True, names_filter=names)
    model.zero_grad()
    _, expected = model.run_with_cache(tokens, **options)
    weights = list(model.embed.parameters()) if frozen == "embedding" else list(model.parameters())
    asked = [w.requires_grad for w in weights]
    for weight in weights if frozen != "none" else []:
        weight.requires_grad_(False)
    try:
        _, cache = model.run_with_cache(tokens, **options)
    finally:
        for weight, wanted in zip(weights, asked, strict=True):
            weight.requires_grad_(wanted)
    assert list(cache) == list(expected)
    assert sum(name.endswith("_grad") for name in cache) == len(cache) / 2
    for name in cache:
        torch.testing.assert_close(cache[name], expected[name], rtol=1e-5, atol=1e-7)
    assert all(weight.grad is None for weight in model.parameters())
    assert model.run_state.watched is None


def test_backward_hooks_before_the_named_points_run_too():
    model, seen = gpt2(), []
    with model.hooks(bwd_hooks=[("hook_embed", lambda grad, hook: seen.append(grad.shape))]):
        model.run_with_cache(
            tokens_of(), return_type="loss", incl_bwd=True, names_filter="blocks.2.hook_resid_pre"
        )
    assert len(seen) == 1


def test_gradients_are_of_one_number():
    model = gpt2()
    with pytest.raises(InputError, match='one number: return_type="loss"'):
        model.run_with_cache(tokens_of(), incl_bwd=True, names_filter="*hook_z")
    assert model.run_state.watched is None
    assert not any(point.wanted for point in model.hook_dict.values())


def test_gradients_need_grad_mode():
    with torch.no_grad(), pytest.raises(InputError, match="incl_bwd"):
        gpt2().run_with_cache(tokens_of(), return_type="loss", incl_bwd=True)


POINTS = [
    "hook_embed",
    "blocks.1.hook_resid_pre",
    "blocks.1.ln1.hook_scale",
    "blocks.1.ln1.hook_normalized",
    "blocks.1.attn.hook_q",
    "blocks.1.attn.hook_v",
    "blocks.1.attn.hook_attn_scores",
    "blocks.1.attn.hook_pattern",
    "blocks.1.attn.hook_result",
    "blocks.1.hook_v_input",
    "blocks.1.mlp.hook_post",
    "blocks.1.hook_mlp_out",
    "ln_final.hook_scale",
    "hook_logits",
]


@pytest.mark.parametrize("tiny", [tinies("gpt2")[0], tinies("llama")[0], tinies("gemma2")[0]])
@pytest.mark.parametrize("name", POINTS)
def test_gradients_are_what_finite_differences_say(tiny, name):
    """d loss along a random direction, by moving the activation itself there and back."""
    model, tokens, eps = loaded(tiny), tokens_of(), 1e-2
    _, cache = model.run_with_cache(tokens, return_type="loss", incl_bwd=True, names_filter=name)
    model.zero_grad()
    grad = cache[f"{name}_grad"]
    direction = torch.randn(grad.shape, generator=torch.Generator().manual_seed(0))
    direction = direction / direction.norm() + grad / grad.norm()  # not orthogonal by chance

    def loss(step: float) -> float:
        with torch.no_grad():
            return model.run_with_hooks(
                tokens, return_type="loss", fwd_hooks=[(name, lambda x, hook: x + step * direction)]
            ).item()

    slope = (loss(eps) - loss(-eps)) / (2 * eps)
    assert slope == pytest.approx((grad * direction).sum().item(), rel=0.02, abs=1e-4)


# Key-value cache ----------------------------------------------------------------------------------


@pytest.mark.parametrize("tiny", [tinies("gpt2")[0], tinies("llama")[0]], **by_id)
def test_a_cache_of_new_positions(tiny):
    """With past keys the pattern has more keys than queries, and equals the whole pass' rows."""
    model, tokens = loaded(tiny), tokens_of(2, 7)
    with torch.no_grad():
        _, whole = model.run_with_cache(tokens)
        past = DynamicCache()
        model(tokens[:, :4], past_kv_cache=past)
        _, cache = model.run_with_cache(tokens[:, 4:], past_kv_cache=past)
    assert set(cache) == set(whole)
    close(cache["pattern", 1], whole["pattern", 1][:, :, 4:], "pattern")
    close(cache["resid_post", 2], whole["resid_post", 2][:, 4:], "resid_post")
    assert model.hook_embed.pos_offset == 4
    model(tokens)
    assert model.hook_embed.pos_offset == 0


@FAMILIES
def test_gradients_are_finite_although_padding_attends_to_nothing(tiny):
    model = loaded(tiny)
    tokens, mask = hf_truth.padded_batch(VOCAB, [6, 3], "left")
    _, cache = model.run_with_cache(
        tokens, attention_mask=mask, return_type="loss", incl_bwd=True, names_filter="*.attn.hook_*"
    )
    for name, parameter in model.named_parameters():
        assert parameter.grad is None or torch.isfinite(parameter.grad).all(), name
    model.zero_grad()
    assert all(torch.isfinite(x).all() for name, x in cache.items() if name.endswith("_grad"))
