"""`ActivationCache`: a dictionary with shorthands, and parts that add up to the whole on every
family."""

from __future__ import annotations

from functools import cache

import hf_truth
import pytest
import torch
from conftest import word_tokenizer
from tiny import TINIES, VOCAB, Tiny, one_per_family, tinies

import hookedlm
from hookedlm import ActivationCache, HookedTransformer
from hookedlm.errors import CacheKeyError, InputError
from hookedlm.layers.block import ParallelBlock
from hookedlm.layers.norm import Norm

by_id = dict(ids=lambda tiny: tiny.id)
FAMILIES = pytest.mark.parametrize("tiny", one_per_family(), **by_id)
EVERY = pytest.mark.parametrize("tiny", TINIES, **by_id)
POST_NORM = [tiny for tiny in tinies("opt") if tiny.variant.startswith("post_norm")]
FAMILIES_AND_POST_NORM = pytest.mark.parametrize("tiny", one_per_family() + POST_NORM, **by_id)
TOKENS = torch.randint(3, VOCAB, (3, 6), generator=torch.Generator().manual_seed(0))


@cache
def loaded(tiny: Tiny) -> HookedTransformer:
    return hookedlm.load(tiny.build())


def gpt2() -> HookedTransformer:
    return loaded(tinies("gpt2")[0])


@cache
def run(tiny: Tiny, batched: bool = True) -> tuple[torch.Tensor, ActivationCache]:
    """Logits and full cache; without a batch axis for the first prompt alone."""
    tokens = TOKENS if batched else TOKENS[:1]
    with torch.no_grad():
        logits, recorded = loaded(tiny).run_with_cache(tokens, remove_batch_dim=not batched)
    return (logits if batched else logits[0]), recorded


def close(got: torch.Tensor, expected: torch.Tensor, name: str = "", rtol: float = 1e-5) -> None:
    """Equal to ``rtol`` of the largest entry: sums of parts lose what the parts' sizes lose."""
    assert got.shape == expected.shape, (name, got.shape, expected.shape)
    finite = torch.isfinite(expected)  # masked scores are not
    assert torch.equal(got[~finite], expected[~finite]), name
    got, expected = got[finite], expected[finite]
    if not got.numel():
        return
    error = (got - expected).abs().max() / expected.abs().max().clamp(min=1e-3)
    assert error <= rtol, f"{name}: relative error {error:.2e}"


# A dictionary -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "key, name",
    [
        ("blocks.1.attn.hook_q", "blocks.1.attn.hook_q"),
        ("q1", "blocks.1.attn.hook_q"),
        (("q", 1), "blocks.1.attn.hook_q"),
        (("q", -1), "blocks.2.attn.hook_q"),
        (("q", -3), "blocks.0.attn.hook_q"),
        (("query", 1), "blocks.1.attn.hook_q"),
        (("attn", 1), "blocks.1.attn.hook_pattern"),
        (("attn_logits", 1), "blocks.1.attn.hook_attn_scores"),
        (("k", 1, "a"), "blocks.1.attn.hook_k"),
        ("pattern2", "blocks.2.attn.hook_pattern"),
        (("scale", 1, "ln1"), "blocks.1.ln1.hook_scale"),
        (("normalized", -1, "ln2"), "blocks.2.ln2.hook_normalized"),
        ("scale", "ln_final.hook_scale"),
        (("scale",), "ln_final.hook_scale"),
        ("normalized", "ln_final.hook_normalized"),
        ("embed", "hook_embed"),
        ("pos_embed", "hook_pos_embed"),
        ("logits", "hook_logits"),
        (("resid_post", -2), "blocks.1.hook_resid_post"),
        (("mlp_post", 0), "blocks.0.mlp.hook_post"),
        ("pre0", "blocks.0.mlp.hook_pre"),
        (("attn_out", 0), "blocks.0.hook_attn_out"),
        (("result", 1), "blocks.1.attn.hook_result"),
    ],
)
def test_keys(key, name):
    _, cache = gpt2().run_with_cache(TOKENS)
    tensor = cache[key]
    assert tensor is cache[name]
    assert key in cache
    _, live = gpt2().run_with_cache(TOKENS, names_filter=name)
    close(tensor, live[name], name)


@pytest.mark.parametrize(
    "key, says",
    [
        ("blocks.1.attn.hook_patern", r"Nearest: blocks\.1\.attn\.hook_pattern"),
        (("q", 3), "layers 0 to 2"),
        (("q", -4), "layers 0 to 2"),
        ("blocks.1.attn.hook_rot_q", "does not rotate"),
        ("blocks.1.mlp.hook_pre_linear", "gated"),
        ("blocks.1.mlp.hook_mid", "SoLU"),
        ("blocks.1.ln1_post.hook_scale", "in this model|no activation"),
        (("a", 1, "b", 2), "name"),
        (5, "name"),
        (("k6", 1), "layer 6"),
    ],
)
def test_keys_that_mean_nothing(key, says):
    _, cache = run(tinies("gpt2")[0])
    assert key not in cache
    with pytest.raises(KeyError, match=says):
        cache[key]


@pytest.mark.parametrize(
    "family, name, why",
    [
        ("llama", "hook_pos_embed", "rotary"),
        ("bloom", "hook_pos_embed", "alibi"),
        ("gpt_neox", "blocks.0.hook_resid_mid", "parallel"),
        ("mixtral", "blocks.0.mlp.hook_mid", "hook_expert_out"),
        ("olmo2", "blocks.0.ln1.hook_scale", "No norm stands there"),
        ("llama", "blocks.0.hook_attn_in", "not recorded|grouped"),
        ("llama", "blocks.0.hook_q_input", "not recorded"),
        ("llama", "blocks.0.attn.hook_nonsense", "no activation"),
    ],
)
def test_an_absent_point_says_why(family, name, why):
    _, cache = run(tinies(family)[0])
    with pytest.raises(CacheKeyError, match=why) as raised:
        cache[name]
    assert "\\n" not in str(raised.value)


def test_a_post_norm_block_says_where_its_norms_are():
    _, cache = run(POST_NORM[0])
    with pytest.raises(CacheKeyError, match="see ln1 and ln2"):
        cache["blocks.0.ln1_post.hook_scale"]


def test_a_mapping():
    _, cache = gpt2().run_with_cache(TOKENS)
    names = list(cache)
    assert names == list(cache.keys())
    assert len(cache) == len(names) == len(set(names))
    assert [name for name, _ in cache.items()] == names
    for (name, tensor), value in zip(cache.items(), cache.values(), strict=True):
        assert tensor is value
        assert tensor is cache[name]
    assert "hook_embed" in cache
    assert "blocks.0.attn.hook_result" not in cache
    assert f"{len(cache)} activations" in repr(cache)


def test_repr_counts_what_was_recorded():
    _, cache = gpt2().run_with_cache(TOKENS, names_filter=["hook_embed", "hook_logits"])
    assert "2 activations (2 recorded" in repr(cache)


def test_to_moves_everything():
    _, cache = gpt2().run_with_cache(TOKENS)
    assert cache.to("meta") is cache
    assert {tensor.device.type for tensor in cache.values()} == {"meta"}


def test_remove_batch_dim_in_place_and_twice():
    _, cache = gpt2().run_with_cache(TOKENS[:1])
    whole = dict(cache.items())
    _, cache = gpt2().run_with_cache(TOKENS[:1])
    assert cache.has_batch_dim
    assert cache.remove_batch_dim() is cache
    assert not cache.has_batch_dim
    cache.remove_batch_dim()
    for name, tensor in cache.items():
        assert torch.equal(tensor, whole[name][0]), name
    close(cache["result", 1].sum(1) + gpt2().blocks[1].attn.b_O, cache["attn_out", 1])


def test_remove_batch_dim_of_several_rows_is_an_error_and_changes_nothing():
    _, cache = gpt2().run_with_cache(TOKENS)
    with pytest.raises(InputError, match="3"):
        cache.remove_batch_dim()
    assert cache.has_batch_dim
    assert cache["pattern", 0].shape == (3, 4, 6, 6)


def test_a_cache_from_a_plain_dictionary():
    _, recorded = gpt2().run_with_cache(TOKENS, return_cache_object=False)
    cache = ActivationCache(dict(recorded), gpt2())
    close(cache.decompose_resid().sum(0), cache["resid_post", -1])


# The stream as it grows ---------------------------------------------------------------------------


@FAMILIES_AND_POST_NORM
def test_accumulated_resid_is_hugging_faces_stream(tiny):
    """Every depth of the stream, read off Hugging Face's own blocks."""
    _, cache = run(tiny)
    entering, leaving, _ = hf_truth.block_outputs(tiny.build(), TOKENS)
    truth = torch.stack([*entering, leaving[-1]])
    n = len(entering)
    stack, labels = cache.accumulated_resid(return_labels=True)
    close(stack, truth, "all")
    assert labels == [*(f"{i}_pre" for i in range(n)), "final_post"]
    for layer in (None, -1, n):
        assert torch.equal(cache.accumulated_resid(layer), stack)
    for layer in range(n):
        stack, labels = cache.accumulated_resid(layer, return_labels=True)
        close(stack, truth[: layer + 1], f"{layer}")
        assert labels[-1] == f"{layer}_pre"


@FAMILIES_AND_POST_NORM
def test_accumulated_resid_between_attention_and_mlp(tiny):
    model, (_, cache) = loaded(tiny), run(tiny)
    parallel = isinstance(model.blocks[0], ParallelBlock)
    stack, labels = cache.accumulated_resid(2, incl_mid=True, mlp_input=True, return_labels=True)
    if parallel:  # its MLP reads what its attention reads
        assert labels == ["0_pre", "1_pre", "2_pre"]
    else:
        assert labels == ["0_pre", "0_mid", "1_pre", "1_mid", "2_pre", "2_mid"]
        assert torch.equal(stack[-1], cache["resid_mid", 2])
        assert torch.equal(stack[1], cache["resid_mid", 0])
    ends = cache.accumulated_resid(2, mlp_input=True)
    assert len(ends) == (3 if parallel else 4)
    assert torch.equal(ends[-1], stack[-1])


SLICES = [None, 2, -1, (1,), (1, 4), (0, 6, 2), [0, 5], [-1], torch.tensor([3, 1])]


def picked(tensor: torch.Tensor, pos_slice, dim: int) -> torch.Tensor:
    """The positions a slice means, selected in the plainest way."""
    index = list(range(tensor.shape[dim]))
    if isinstance(pos_slice, int):
        return tensor.select(dim, index[pos_slice])
    if pos_slice is None:
        return tensor
    if isinstance(pos_slice, tuple):
        index = index[slice(*pos_slice)]
    else:
        index = [index[i] for i in pos_slice]
    return tensor.index_select(dim, torch.tensor(index))


@pytest.mark.parametrize("pos_slice", SLICES, ids=str)
@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("apply_ln", [True, False])
@pytest.mark.parametrize("tiny", [tinies("gpt2")[0], tinies("gemma2")[0], POST_NORM[0]], **by_id)
def test_position_slices_commute_with_everything(tiny, pos_slice, batched, apply_ln):
    _, cache = run(tiny, batched)
    for method in (cache.accumulated_resid, cache.decompose_resid, cache.stack_head_results):
        for layer in (None, 1, 0):
            whole = method(layer, apply_ln=apply_ln) if layer is not None else method(
                apply_ln=apply_ln
            )  # fmt: skip
            some = method(-1 if layer is None else layer, apply_ln=apply_ln, pos_slice=pos_slice)
            close(some, picked(whole, pos_slice, dim=whole.ndim - 2), method.__name__, 1e-5)


@FAMILIES_AND_POST_NORM
def test_accumulated_resid_normed_is_the_logit_lens(tiny):
    """Each stream through Hugging Face's own final norm and head, nothing of ours."""
    hf, (logits, cache), model = tiny.build(), run(tiny), loaded(tiny)
    stack = cache.accumulated_resid(apply_ln=True)
    with torch.no_grad():
        close(model.unembed(stack[-1]), logits, "last", 2e-5)
    norm = next(
        (
            module
            for name, module in hf.named_modules()
            if name.rpartition(".")[2] in ("ln_f", "final_layer_norm", "norm", "norm_f")
            and name.count(".") <= 2
        ),
        None,
    )
    if norm is None and tiny.model_type == "phi":
        norm = hf.model.final_layernorm
    if tiny in POST_NORM:
        assert norm is None or not isinstance(model.ln_final, Norm)
        return
    assert norm is not None
    with torch.no_grad():
        close(stack, norm(cache.accumulated_resid()), "every depth", 2e-5)


@FAMILIES
def test_accumulated_resid_normed_inside(tiny):
    """Before the end, the norm that reads the stream there: its own output for the last item."""
    model, (_, cache) = loaded(tiny), run(tiny)
    for mlp_input, name in ((False, "ln1"), (True, "ln2")):
        norm = model.blocks[1]._modules[name]
        stack = cache.accumulated_resid(1, apply_ln=True, mlp_input=mlp_input)
        if not isinstance(norm, Norm):
            assert torch.equal(stack, cache.accumulated_resid(1, mlp_input=mlp_input))
            continue
        normalized = cache[f"blocks.1.{name}.hook_normalized"]
        weight = 1.0 if norm.spec.centres or norm.live("w") is None else norm.weight
        close(stack[-1], normalized * weight, name, 2e-5)


def test_a_post_norm_block_reads_the_stream_bare():
    _, cache = run(POST_NORM[0])
    for mlp_input in (False, True):
        for method in (cache.accumulated_resid, cache.decompose_resid):
            bare = method(1, mlp_input=mlp_input)
            assert torch.equal(method(1, mlp_input=mlp_input, apply_ln=True), bare)


@pytest.mark.parametrize("layer", [4, -2, 99])
def test_layers_that_do_not_exist(layer):
    _, cache = run(tinies("gpt2")[0])
    for method in (cache.accumulated_resid, cache.decompose_resid, cache.stack_head_results):
        with pytest.raises(InputError, match="layers 0 to 2"):
            method(layer)


# The stream as a sum ------------------------------------------------------------------------------


@FAMILIES_AND_POST_NORM
def test_parts_normed_sum_to_what_the_final_norm_gives(tiny):
    model, (_, cache) = loaded(tiny), run(tiny)
    with torch.no_grad():
        stream = cache["resid_post", -1]
        normed = stream if model.ln_final is None else model.ln_final(stream)
        b = model.ln_final.live("b") if isinstance(model.ln_final, Norm) else None
        parts = cache.decompose_resid(apply_ln=True).sum(0)
        close(parts if b is None else parts + b, normed, "ln_final", 2e-5)


def test_labels_and_modes():
    _, cache = run(tinies("gpt2")[0])
    parts, labels = cache.decompose_resid(2, return_labels=True)
    assert labels == ["embed", "pos_embed"] + [
        f"{i}_{kind}_out" for i in range(2) for kind in ("attn", "mlp")
    ]
    for part, label in zip(parts[2:], labels[2:], strict=True):
        layer, kind, _ = label.split("_")
        assert torch.equal(part, cache[f"{kind}_out", int(layer)])
    for mode in ("attn", "mlp"):
        some, names = cache.decompose_resid(2, mode=mode, return_labels=True)
        assert names == ["embed", "pos_embed", f"0_{mode}_out", f"1_{mode}_out"]
        assert torch.equal(some[2], cache[f"{mode}_out", 0])
        bare, names = cache.decompose_resid(
            2, mode=mode, incl_embeds=False, return_labels=True, pos_slice=-1
        )
        assert names == [f"0_{mode}_out", f"1_{mode}_out"]
        assert torch.equal(bare, some[2:, :, -1])
    with pytest.raises(InputError, match="heads"):
        cache.decompose_resid(mode="heads")
    llama = run(tinies("llama")[0])[1]
    assert llama.decompose_resid(0, return_labels=True)[1] == ["embed"]


def test_nothing_below_layer_0():
    for batched, shape in ((True, (3, 6, 32)), (False, (6, 32))):
        _, cache = run(tinies("gpt2")[0], batched)
        empty, labels = cache.decompose_resid(0, incl_embeds=False, return_labels=True)
        assert (empty.shape, labels) == ((0, *shape), [])
        empty, labels = cache.stack_head_results(0, return_labels=True)
        assert (empty.shape, labels) == ((0, *shape), [])
        assert cache.stack_head_results(0, pos_slice=-1).shape == (0, *shape[:-2], 32)
        rest, labels = cache.stack_head_results(0, incl_remainder=True, return_labels=True)
        assert labels == ["remainder"]
        assert torch.equal(rest[0], cache["resid_pre", 0])
        assert cache.stack_activation("pattern", 0).shape == (0, *cache["pattern", 0].shape)
        assert cache.logit_attrs(empty, 5).shape == (0, *shape[:-1])


def test_a_decomposition_misses_no_part_silently():
    """Parts that were not recorded are an error: the rest would not sum to the stream."""
    model = gpt2()
    _, cache = model.run_with_cache(TOKENS, names_filter=["hook_embed", "*_out"])
    with pytest.raises(CacheKeyError, match="hook_pos_embed"):
        cache.decompose_resid()
    assert len(cache.decompose_resid(incl_embeds=False)) == 6


def test_stack_activation():
    _, cache = run(tinies("gpt2")[0])
    stack = cache.stack_activation("pattern")
    assert torch.equal(stack, torch.stack([cache["pattern", i] for i in range(3)]))
    scales = cache.stack_activation("scale", 2, "ln2")
    assert torch.equal(scales[1], cache["blocks.1.ln2.hook_scale"])
    assert len(scales) == 2


# Heads --------------------------------------------------------------------------------------------


@FAMILIES
def test_results_are_hugging_faces_projection_head_by_head(tiny):
    """The matrix behind z, from Hugging Face: its columns that belong to a head, times its z."""
    hf, model, (_, cache) = tiny.build(), loaded(tiny), run(tiny)
    attention = next(
        child
        for name, child in hf_truth.block_list(hf)[1].named_children()
        if name.endswith(("attn", "attention"))
    )
    while not any(isinstance(child, torch.nn.Linear) or "Conv1D" in str(type(child))
                  for child in attention.children()):  # fmt: skip
        attention = next(attention.children())  # GPT-Neo wraps it once more
    last = next(
        child
        for name, child in attention.named_children()
        if name in ("c_proj", "out_proj", "dense", "o_proj")
    )
    weight = last.weight if "Conv1D" in str(type(last)) else last.weight.t()
    z, d_head = cache["z", 1], model.cfg.d_head
    for head in range(model.cfg.n_heads):
        rows = weight[head * d_head : (head + 1) * d_head].detach()
        close(cache["result", 1][:, :, head], z[:, :, head] @ rows, f"head {head}")


def test_compute_head_results_adds_all_layers_once():
    _, cache = gpt2().run_with_cache(TOKENS)
    cache.compute_head_results()
    names = [f"blocks.{i}.attn.hook_result" for i in range(3)]
    assert [name for name in cache if name.endswith("hook_result")] == names
    before = [cache[name] for name in names]
    cache.compute_head_results()
    assert all(cache[name] is tensor for name, tensor in zip(names, before, strict=True))


def test_edited_results_are_the_heads_results():
    model = gpt2()

    def no_head_1(result, hook):
        result[:, :, 1] = 0

    with model.hooks([("blocks.*.attn.hook_result", no_head_1)]):
        _, cache = model.run_with_cache(TOKENS)
    stack, labels = cache.stack_head_results(return_labels=True)
    assert not stack[labels.index("L1H1")].any()
    assert stack[labels.index("L1H2")].any()
    close(stack[-4:].sum(0) + model.blocks[2].attn.b_O.detach(), cache["attn_out", 2])


# Logits -------------------------------------------------------------------------------------------


def uncapped(model: HookedTransformer, logits: torch.Tensor) -> torch.Tensor:
    """Logits before the softcap."""
    cap = model.unembed.softcap
    return logits if cap is None else torch.atanh(logits.double() / cap).float() * cap


def constants(model: HookedTransformer) -> torch.Tensor:
    """What every logit has before any part of the stream speaks ``[d_vocab]``."""
    b_U = model.b_U.detach()
    b = model.ln_final.live("b") if isinstance(model.ln_final, Norm) else None
    return b_U if b is None else b_U + b.detach() @ model.W_U.detach()


GRID = torch.randint(3, VOCAB, (3, 6), generator=torch.Generator().manual_seed(1))
TARGETS = [
    ("a string", "cat"),
    ("an id", 5),
    ("0-d", torch.tensor(5)),
    ("[batch]", torch.tensor([5, 9, 11])),
    ("[batch, pos]", GRID),
]


@pytest.mark.parametrize("what, tokens", TARGETS)
@pytest.mark.parametrize("pos_slice", [None, -1, (1, 4), [0, 2]], ids=str)
@pytest.mark.parametrize("batch_slice", [None, 1, (0, 2), [2, 0]], ids=str)
def test_attributions_of_slices(what, tokens, pos_slice, batch_slice):
    """Any selection of rows and positions gives those rows and positions of the whole."""
    model = worded()
    _, cache = model.run_with_cache(TOKENS)
    whole = cache.decompose_resid()
    wrong = {"a string": "dog", "an id": 8, "0-d": 8, "[batch]": torch.tensor([8, 1, 3])}.get(
        what, GRID.flip(0)
    )
    ids = torch.full((3, 6), 5) if what != "a string" else torch.full((3, 6), model_id("cat"))
    wrong_ids = torch.full((3, 6), 8 if what != "a string" else model_id("dog"))
    if what.startswith("["):
        ids = tokens if tokens.ndim == 2 else tokens[:, None].expand(3, 6)
        wrong_ids = wrong if wrong.ndim == 2 else wrong[:, None].expand(3, 6)
    logits = cache["hook_logits"]
    truth, untruth = (logits.gather(-1, x[..., None])[..., 0] for x in (ids, wrong_ids))
    bias, unbias = constants(model)[ids], constants(model)[wrong_ids]
    stack = picked(picked(whole, pos_slice, dim=2), batch_slice, dim=1)
    options = dict(pos_slice=pos_slice, batch_slice=batch_slice)
    for got, expected in (
        (cache.logit_attrs(stack, tokens, **options), truth - bias),
        (cache.logit_attrs(stack, tokens, wrong, **options), truth - untruth - bias + unbias),
    ):
        close(got.sum(0), picked(picked(expected, pos_slice, 1), batch_slice, 0), what, 1e-4)


@cache
def worded() -> HookedTransformer:
    return hookedlm.load(tinies("gpt2")[0].build(), tokenizer=word_tokenizer())


def model_id(word: str) -> int:
    return word_tokenizer().convert_tokens_to_ids(word)


@pytest.mark.parametrize("batch_slice, rows", [((1, 3), [1, 2]), ([2, 0], [2, 0]), ([1], [1])])
def test_tokens_may_be_those_of_the_slice(batch_slice, rows):
    """One token for each row of the stack is as good as one for each row of the cache."""
    _, cache = run(tinies("gpt2")[0])
    tokens = torch.tensor([5, 9, 11])
    stack = cache.decompose_resid()[:, rows]
    expected = cache.logit_attrs(cache.decompose_resid(), tokens)[:, rows]
    for given in (tokens, tokens[rows]):
        close(cache.logit_attrs(stack, given, batch_slice=batch_slice), expected)


@pytest.mark.parametrize("pos_slice", [None, -1, (1, 4), [0, 2]], ids=str)
def test_attributions_without_a_batch_axis(pos_slice):
    tiny = tinies("gpt2")[0]
    model, (logits, cache) = loaded(tiny), run(tiny, batched=False)
    stack = cache.decompose_resid(pos_slice=pos_slice)
    for tokens in (5, GRID[0]):
        ids = torch.full((6,), 5) if isinstance(tokens, int) else tokens
        truth = logits.gather(-1, ids[:, None])[:, 0] - constants(model)[ids]
        got = cache.logit_attrs(stack, tokens, pos_slice=pos_slice, has_batch_dim=False)
        close(got.sum(0), picked(truth, pos_slice, 0), "", 1e-4)


def test_bad_targets_and_stacks():
    _, cache = run(tinies("gpt2")[0])
    stack = cache.decompose_resid()
    with pytest.raises(InputError, match="must match"):
        cache.logit_attrs(stack, torch.tensor([5, 9, 11]), 4)
    for wrong in (stack[:, :, -1], stack[:, :2], stack[:, :, :4]):
        with pytest.raises(InputError, match="pos_slice"):
            cache.logit_attrs(wrong, 5)


@FAMILIES_AND_POST_NORM
def test_applying_a_norm_is_linear_unless_recomputed(tiny):
    model, (_, cache) = loaded(tiny), run(tiny)
    if not isinstance(model.ln_final, Norm):
        stack = cache.decompose_resid()
        assert torch.equal(cache.apply_ln_to_stack(stack), stack)
        return
    parts = cache.decompose_resid()
    linear = cache.apply_ln_to_stack(parts)
    close(cache.apply_ln_to_stack(3 * parts), 3 * linear, "scaled")
    close(cache.apply_ln_to_stack(parts.sum(0)), linear.sum(0), "summed", 2e-5)
    own = cache.apply_ln_to_stack(parts, recompute_ln=True)
    with torch.no_grad():
        close(own, model.ln_final(parts), "recomputed")
    assert (own - linear).abs().max() > 0.1  # they are different questions
    stream = cache["resid_post", -1]
    b = model.ln_final.live("b")
    whole = cache.apply_ln_to_stack(stream) + (0.0 if b is None else b.detach())
    close(cache.apply_ln_to_stack(stream, recompute_ln=True), whole, "the stream itself", 2e-5)


def test_applying_a_norm_fires_no_hooks():
    model, fired = gpt2(), []
    _, cache = model.run_with_cache(TOKENS)
    with model.hooks([("ln_final.*", lambda x, hook: fired.append(hook.name))]):
        cache.accumulated_resid(apply_ln=True)
        cache.logit_attrs(cache.decompose_resid(), 5)
    assert not fired
