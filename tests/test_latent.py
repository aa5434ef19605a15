"""Latent attention: true queries, keys and values of every head, beside Hugging Face's module."""

from __future__ import annotations

import copy
from functools import cache

import hf_truth
import pytest
import torch
from hook_sets import dead
from side_by_side import error, real
from tiny import LAYERS, VOCAB, Tiny
from torch import Tensor

import hookedlm
from hookedlm import HookedTransformer, SVDInterpreter
from hookedlm.errors import HookNameError, InputError, WeightError
from hookedlm.hooks import HookPoint
from hookedlm.layers.latent import LatentAttention, SparseLatentAttention
from hookedlm.past_key_values import HookedTransformerKeyValueCache
from hookedlm.transforms import fold_ln, refactor_factored_attn_matrices

COMMON = dict(
    vocab_size=VOCAB, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    hidden_size=32, intermediate_size=48, num_hidden_layers=LAYERS, max_position_embeddings=64,
    num_attention_heads=4, num_key_value_heads=4, kv_lora_rank=20, q_lora_rank=16,
    qk_nope_head_dim=8, qk_rope_head_dim=8, head_dim=8, v_head_dim=16,
)  # fmt: skip
EXPERTS = dict(
    moe_intermediate_size=24, n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1,
    first_k_dense_replace=1, rms_norm_eps=0.1,
)  # fmt: skip
STRAIGHT = dict(
    q_lora_rank=None, qk_nope_head_dim=10, qk_rope_head_dim=4, head_dim=4, v_head_dim=12,
    attention_bias=True,
)  # fmt: skip
YARN = dict(
    v_head_dim=4,
    rope_parameters=dict(
        rope_type="yarn", rope_theta=10000.0, factor=8.0, original_max_position_embeddings=16,
        mscale=0.7, mscale_all_dim=0.9,
    ),
)  # fmt: skip


def tiny(model_type: str, variant: str, **more) -> Tiny:
    experts = {} if model_type in ("youtu", "minicpm3") else EXPERTS
    return Tiny(model_type, variant, COMMON | experts | more)


TINIES = [
    tiny("deepseek_v3", "base"),
    tiny("deepseek_v3", "straight", **STRAIGHT, rope_interleave=False),
    tiny("deepseek_v3", "yarn", **YARN, n_group=2),
    tiny("deepseek_v2", "base"),
    tiny("deepseek_v2", "straight", **STRAIGHT, mlp_bias=True),
    tiny("deepseek_v2", "yarn", **YARN, topk_method="group_limited_greedy", n_group=2),
    tiny("glm4_moe_lite", "base"),
    tiny("axk1", "base"),
    tiny("youtu", "base"),
    tiny("youtu", "straight", **STRAIGHT),
    tiny("minicpm3", "base"),
    tiny("minicpm3", "straight", **STRAIGHT, scale_emb=3, scale_depth=1.1),
]
every = pytest.mark.parametrize("tiny", TINIES, ids=lambda tiny: tiny.id)
some = pytest.mark.parametrize("tiny", TINIES[:2], ids=lambda tiny: tiny.id)
TOKENS, MASK = hf_truth.padded_batch(VOCAB, [11, 6, 9], "left", 0, seed=7)
LATENTS = ["blocks.1.attn.hook_q_latent", "blocks.1.attn.hook_kv_latent"]
SPLITS = [f"blocks.1.hook_{name}" for name in ("q_input", "k_input", "v_input", "attn_in")]


@cache
def theirs(tiny: Tiny) -> torch.nn.Module:
    """Shared: leave it as it is."""
    return tiny.build()


@cache
def ours(tiny: Tiny) -> HookedTransformer:
    """Shared: leave it as it is."""
    return hookedlm.load(theirs(tiny), strict=True)


def fresh(tiny: Tiny) -> tuple[torch.nn.Module, HookedTransformer]:
    """The two of them, to be changed."""
    model = tiny.build()
    return model, hookedlm.load(model)


def noisy(x: Tensor, hook=None) -> Tensor:
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    return x + (0.5 * noise.abs() + 0.1).to(x.dtype)


def observed(model: torch.nn.Module, place: str, *inputs: Tensor) -> Tensor:
    """What a module of Hugging Face's gives in one run."""
    found = []
    handle = model.get_submodule(place).register_forward_hook(lambda m, x, y: found.append(y))
    try:
        with torch.no_grad():
            model(*inputs)
    finally:
        handle.remove()
    return found[0]


def edited(model: torch.nn.Module, place: str, edit) -> Tensor:
    """Hugging Face's logits when a module's result is replaced."""
    handle = model.get_submodule(place).register_forward_hook(lambda m, x, y: edit(y))
    try:
        with torch.no_grad():
            return model(TOKENS).logits
    finally:
        handle.remove()


# The numbers --------------------------------------------------------------------------------------


@every
@torch.no_grad()
def test_logits_are_hugging_faces_bit_by_bit(tiny: Tiny):
    model = ours(tiny)
    assert all(type(block.attn) is LatentAttention for block in model.blocks)
    expected = hf_truth.logits_of(theirs(tiny), TOKENS, MASK)
    assert torch.equal(model(TOKENS, attention_mask=MASK)[MASK.bool()], expected[MASK.bool()])
    assert torch.equal(model(TOKENS), hf_truth.logits_of(theirs(tiny), TOKENS))
    names = list(model.hook_dict)
    got, cache = model.run_with_cache(TOKENS, attention_mask=MASK, names_filter=names)
    assert error(real(got, MASK), real(expected, MASK)) <= 1e-5
    for name, point in model.hook_dict.items():
        assert cache[name].ndim == len(point.axes), name


@every
def test_queries_keys_and_values_are_hugging_faces(tiny: Tiny):
    model = ours(tiny)
    attn, place = model.blocks[1].attn, "model.layers.1.self_attn"
    s = attn.spec
    _, cache = model.run_with_cache(TOKENS)
    straight = s.d_q_latent is None
    q = observed(theirs(tiny), f"{place}.{'q_proj' if straight else 'q_b_proj'}", TOKENS)
    up = observed(theirs(tiny), f"{place}.kv_b_proj", TOKENS)[:, 0].unflatten(-1, (4, -1))
    k_rot = observed(theirs(tiny), f"{place}.kv_a_proj_with_mqa", TOKENS)[..., s.d_kv_latent :]
    k = torch.cat([up[..., : s.d_nope], k_rot[:, :, None].expand(-1, -1, 4, -1)], dim=-1)
    assert torch.equal(cache["q", 1], q.unflatten(-1, (4, -1)))
    assert torch.equal(cache["k", 1], k)
    assert torch.equal(cache["v", 1], up[..., s.d_nope :])
    for latent in ("kv",) if straight else ("q", "kv"):
        expected = observed(theirs(tiny), f"{place}.{latent}_a_layernorm", TOKENS)
        assert torch.equal(cache[f"blocks.1.attn.hook_{latent}_latent"], expected)
    assert ("blocks.1.attn.hook_q_latent" in model.hook_dict) is not straight
    assert cache["rot_k", 1].shape == cache["k", 1].shape == (3, 11, 4, s.d_nope + s.d_rotary)
    assert torch.equal(cache["rot_k", 1][..., : s.d_nope], k[..., : s.d_nope])
    assert not torch.equal(cache["rot_k", 1][:, 1:], k[:, 1:])


@every
@torch.no_grad()
def test_patterns_are_hugging_faces(tiny: Tiny):
    longhand = tiny.build()
    longhand.set_attn_implementation("eager")
    expected = longhand(TOKENS, output_attentions=True).attentions
    _, cache = ours(tiny).run_with_cache(TOKENS)
    _, live = ours(tiny).run_with_cache(TOKENS, names_filter="*.hook_pattern")
    for layer in range(LAYERS):
        assert error(cache["pattern", layer], expected[layer]) <= 1e-5
        assert error(live["pattern", layer], expected[layer]) <= 1e-5


@every
@torch.no_grad()
def test_generation_padded_with_and_without_a_cache(tiny: Tiny):
    expected = hf_truth.greedy(theirs(tiny), TOKENS, MASK, 5)
    for cached in (True, False):
        options = dict(max_new_tokens=5, do_sample=False, stop_at_eos=False)
        got = ours(tiny).generate(TOKENS, attention_mask=MASK, use_past_kv_cache=cached, **options)
        assert torch.equal(got[:, -5:], expected[:, -5:]), cached


@every
@torch.no_grad()
def test_in_pieces_as_in_one(tiny: Tiny):
    """A cache made from the config knows one width; values may have another."""
    model = ours(tiny)
    past = HookedTransformerKeyValueCache.init_cache(model.cfg, "cpu", 3)
    truth = hf_truth.logits_of(theirs(tiny), TOKENS)
    for start, end in ((0, 5), (5, 6), (6, 11)):
        got, seen = model.run_with_cache(TOKENS[:, start:end], past_kv_cache=past)
        assert error(got, truth[:, start:end]) <= 1e-5
        assert torch.equal(past[1].past_keys[:, start:], seen["rot_k", 1])
        assert torch.equal(past[1].past_values[:, start:], seen["v", 1])


@pytest.mark.parametrize("tiny", TINIES[8:10], ids=lambda tiny: tiny.id)  # no experts
@torch.no_grad()
def test_half_precision_and_double(tiny: Tiny):
    small = tiny.build(dtype=torch.bfloat16)
    model = hookedlm.load(small)
    assert all(type(block.attn) is LatentAttention for block in model.blocks)
    assert error(model(TOKENS).float(), small(TOKENS).logits.float()) <= 3e-2
    twin = copy.deepcopy(ours(tiny)).double()
    assert error(twin(TOKENS).float(), ours(tiny)(TOKENS)) <= 1e-5
    assert ours(tiny).dtype == torch.float32


def test_the_config_tells_the_sizes():
    cfg = ours(TINIES[1]).cfg
    assert (cfg.n_heads, cfg.n_key_value_heads, cfg.d_head, cfg.rotary_dim) == (4, None, 14, 4)
    assert cfg.positional_embedding_type == "rotary"
    assert ours(TINIES[2]).conversion.unread == ()


# Hooks --------------------------------------------------------------------------------------------


@every
@torch.no_grad()
def test_every_edit_counts(tiny: Tiny):
    assert dead(ours(tiny), TOKENS) == []


@every
@torch.no_grad()
def test_edits_of_latents_are_those_of_hugging_face(tiny: Tiny):
    for latent in ("q", "kv"):
        name = f"blocks.1.attn.hook_{latent}_latent"
        if name not in ours(tiny).hook_dict:
            continue
        expected = edited(theirs(tiny), f"model.layers.1.self_attn.{latent}_a_layernorm", noisy)
        got = ours(tiny).run_with_hooks(TOKENS, fwd_hooks=[(name, noisy)])
        assert torch.equal(got, expected)


@every
@torch.no_grad()
def test_edits_of_values_are_those_of_hugging_face(tiny: Tiny):
    attn = ours(tiny).blocks[1].attn

    def change(y: Tensor) -> Tensor:
        by_head = y.unflatten(-1, (4, -1)).clone()  # batch, 1, pos, head, d
        by_head[:, 0, 2, 1, attn.spec.d_nope :] += 3.0
        by_head[:, 0, 4, 3, : attn.spec.d_nope] *= -2.0
        return by_head.flatten(3)

    def value(v: Tensor, hook: HookPoint) -> None:
        v[:, 2, 1] += 3.0

    def key(k: Tensor, hook: HookPoint) -> None:
        k[:, 4, 3, : attn.spec.d_nope] *= -2.0

    expected = edited(theirs(tiny), "model.layers.1.self_attn.kv_b_proj", change)
    hooks = [("blocks.1.attn.hook_v", value), ("blocks.1.attn.hook_k", key)]
    got = ours(tiny).run_with_hooks(TOKENS, fwd_hooks=hooks)
    assert error(got, expected) <= 1e-5
    assert error(got, ours(tiny)(TOKENS)) > 1e-4


@every
@torch.no_grad()
def test_a_rotary_key_is_shared_but_edited_alone(tiny: Tiny):
    """One head's copy changes that head's scores and no other's."""
    names = ["blocks.1.attn.hook_attn_scores", "blocks.1.attn.hook_k"]
    _, before = ours(tiny).run_with_cache(TOKENS, names_filter=names)
    d_nope = ours(tiny).blocks[1].attn.spec.d_nope

    def turn(k: Tensor, hook: HookPoint) -> None:
        k[:, 3, 2, d_nope:] += 1.0

    with ours(tiny).hooks([("blocks.1.attn.hook_k", turn)]):
        _, after = ours(tiny).run_with_cache(TOKENS, names_filter=names)
    changed = (after[names[0]] != before[names[0]]).nonzero()
    assert set(changed[:, 1].tolist()) == {2}
    assert set(changed[:, 3].tolist()) == {3}


def test_axes_name_the_width_of_values():
    for index, d in ((0, "d_head"), (1, "d_value")):
        points = ours(TINIES[index]).hook_dict
        assert points["blocks.0.attn.hook_v"].axes == ("batch", "pos", "kv_head", d)
        assert points["blocks.0.attn.hook_z"].axes == ("batch", "pos", "head", d)
        assert points["blocks.0.attn.hook_kv_latent"].axes == ("batch", "pos", "d_latent")


def test_models_without_latents_say_so():
    with pytest.raises(HookNameError, match="bottleneck"):
        ours(TINIES[1]).run_with_hooks(TOKENS, fwd_hooks=[("blocks.0.attn.hook_q_latent", noisy)])


# A copy of the stream for every head --------------------------------------------------------------


def same(x: Tensor, hook: HookPoint) -> Tensor:
    return x


@every
@torch.no_grad()
def test_copies_that_are_let_alone_change_nothing(tiny: Tiny):
    expected, plain = ours(tiny).run_with_cache(TOKENS)
    hooks = [(name, same) for name in SPLITS]
    with ours(tiny).hooks(hooks):
        got, split = ours(tiny).run_with_cache(TOKENS)
    assert error(got, expected) <= 1e-5
    for name, x in plain.items():
        y = split[name]
        if name.endswith("attn_scores"):  # -inf where masked
            x, y = x.clamp(min=-99.0), y.clamp(min=-99.0)
        assert error(y, x) <= 2e-5, name


@every
@torch.no_grad()
def test_an_edited_copy_reaches_its_head_alone(tiny: Tiny):
    """Head 2 reads as if the whole stream were edited, the others as if nothing were."""
    names = [f"blocks.1.attn.hook_{x}" for x in "qkv"]
    model = ours(tiny)
    _, plain = model.run_with_cache(TOKENS, names_filter=names)
    with model.hooks([("blocks.1.hook_resid_pre", noisy)]):
        _, whole = model.run_with_cache(TOKENS, names_filter=names)
    for x in "qkv":

        def edit(copies: Tensor, hook: HookPoint) -> None:
            copies[:, :, 2] = noisy(copies[:, :, 2])

        with model.hooks([(f"blocks.1.hook_{x}_input", edit)]):
            _, found = model.run_with_cache(TOKENS, names_filter=names)
        for y in "qkv":
            expected = plain[y, 1].clone()
            if x == y:
                expected[:, :, 2] = whole[y, 1][:, :, 2]
            assert error(found[y, 1], expected) <= 2e-5, (x, y)


@every
@torch.no_grad()
def test_latents_beside_copies_are_the_streams_and_their_edits_hold(tiny: Tiny):
    model = ours(tiny)
    points = [name for name in LATENTS if name in model.hook_dict]
    norms = [name for name in model.hook_dict if "blocks.1.attn" in name and "latent_norm" in name]
    assert len(norms) == 2 * len(points)
    for name in (*points, *norms):
        expected = model.run_with_hooks(TOKENS, fwd_hooks=[(name, noisy)])
        hooks = [(name, noisy), *((split, same) for split in SPLITS)]
        got = model.run_with_hooks(TOKENS, fwd_hooks=hooks)
        assert error(got, expected) <= 1e-5, name
    _, plain = model.run_with_cache(TOKENS, names_filter=points)
    with model.hooks([(name, noisy) for name in SPLITS[:3]]):
        _, found = model.run_with_cache(TOKENS, names_filter=points)
    for name in points:
        assert error(found[name], plain[name]) <= 2e-5


# Decompositions -----------------------------------------------------------------------------------


@every
@torch.no_grad()
def test_heads_sum_to_the_stream(tiny: Tiny):
    model = ours(tiny)
    _, cache = model.run_with_cache(TOKENS)
    whole = cache["resid_post", LAYERS - 1]
    for parts in (
        cache.decompose_resid(),
        cache.get_full_resid_decomposition(),
        cache.stack_head_results(incl_remainder=True),
    ):
        assert error(parts.sum(0), whole) <= 1e-5
    result = cache["blocks.1.attn.hook_result"]
    z = cache["z", 1]
    W_o = theirs(tiny).model.layers[1].self_attn.o_proj.weight
    expected = torch.stack([
        z[:, :, h] @ W_o[:, h * z.shape[-1] : (h + 1) * z.shape[-1]].t() for h in range(4)
    ], dim=2)  # fmt: skip
    assert error(result, expected) <= 1e-5
    attrs = cache.head_logit_attrs(5)
    assert error(attrs, cache.logit_attrs(cache.stack_head_results(), 5)) <= 1e-4


# Weights ------------------------------------------------------------------------------------------


@some
@torch.no_grad()
def test_weights_are_views_of_hugging_faces(tiny: Tiny):
    model, hooked = fresh(tiny)
    module, attn = model.model.layers[1].self_attn, hooked.blocks[1].attn
    s = attn.spec
    up = module.kv_b_proj.weight.detach().unflatten(0, (4, -1))
    assert torch.equal(attn.W_K, up[:, : s.d_nope].transpose(1, 2))
    assert torch.equal(attn.W_V, up[:, s.d_nope :].transpose(1, 2))
    assert torch.equal(attn.W_DKV, module.kv_a_proj_with_mqa.weight.t())
    assert torch.equal(attn.W_K_rotary, attn.W_DKV[:, s.d_kv_latent :])
    assert torch.equal(attn.W_O.flatten(0, 1), module.o_proj.weight.t())
    before = hooked(TOKENS)
    attn.W_V[2] *= -1.0
    assert error(hooked(TOKENS), before) > 1e-4
    assert torch.equal(hooked(TOKENS), model(TOKENS).logits)
    attn.W_V = torch.nn.Parameter(torch.cat([attn.W_V[:2], -attn.W_V[2:3], attn.W_V[3:]]))
    assert error(hooked(TOKENS), before) <= 1e-5


@every
def test_gradients_are_hugging_faces(tiny: Tiny):
    model, hooked = fresh(tiny)
    for one in (model, hooked):
        one.requires_grad_(True)
    model(TOKENS).logits.square().mean().backward()
    hooked(TOKENS).square().mean().backward()
    module, attn = model.model.layers[1].self_attn, hooked.blocks[1].attn
    up = module.kv_b_proj.weight.grad.unflatten(0, (4, -1)).transpose(1, 2)
    d_nope = attn.spec.d_nope
    assert error(attn.W_K.grad, up[..., :d_nope]) <= 1e-4
    assert error(attn.W_V.grad, up[..., d_nope:]) <= 1e-4
    assert error(attn.W_DKV.grad, module.kv_a_proj_with_mqa.weight.grad.t()) <= 1e-4
    assert error(attn.W_O.grad, module.o_proj.weight.grad.t().unflatten(0, (4, -1))) <= 1e-4


@some
@torch.no_grad()
def test_absent_biases_count_once_they_are_there(tiny: Tiny):
    _, hooked = fresh(tiny)
    attn, s = hooked.blocks[1].attn, hooked.blocks[1].attn.spec
    before = hooked(TOKENS)
    shapes = {"b_Q": (4, s.d_head), "b_K": (4, s.d_nope), "b_V": (4, s.d_value)}
    assert {name: tuple(getattr(attn, name).shape) for name in shapes} == shapes
    assert error(hooked(TOKENS), before) <= 1e-5
    hooked.blocks[1].attn.b_V += 0.3
    shifted = hooked(TOKENS)
    attn.b_V -= 0.3
    attn.b_O += 0.3 * attn.W_O.sum((0, 1))  # every row of a pattern sums to one
    assert error(hooked(TOKENS), shifted) <= 1e-5
    assert error(shifted, before) > 1e-4


@some
@torch.no_grad()
def test_state_dicts_go_round(tiny: Tiny):
    _, hooked = fresh(tiny)
    state = {name: x.clone() for name, x in hooked.state_dict().items()}
    other = hookedlm.load(tiny.build(seed=1))
    assert error(other(TOKENS), hooked(TOKENS)) > 1e-2
    other.load_state_dict(state)
    assert error(other(TOKENS), hooked(TOKENS)) <= 1e-5


def test_what_is_no_matrix_between_streams_is_refused():
    model = ours(TINIES[0])
    refused = [
        lambda: model.W_Q, lambda: model.W_K, lambda: model.W_V, lambda: model.QK,
        lambda: model.OV, lambda: model.blocks[0].attn.QK, lambda: model.blocks[0].attn.OV,
        lambda: model.all_composition_scores("V"),
        lambda: SVDInterpreter(model).get_singular_vectors("OV", 0, head_index=0),
    ]  # fmt: skip
    for look in refused:
        with pytest.raises(WeightError, match="latent of 20 dimensions behind a norm"):
            look()
    assert model.W_O.shape == (LAYERS, 4, 16, 32)
    assert model.b_O.shape == (LAYERS, 32)


@every
def test_norms_fold_into_what_leads_down(tiny: Tiny):
    _, hooked = fresh(tiny)
    before = hooked(TOKENS).log_softmax(-1)
    record = fold_ln(hooked)
    assert record.skipped == []
    assert all(block.ln1.live("w") is None for block in hooked.blocks)
    assert (hooked(TOKENS).log_softmax(-1) - before).abs().max() <= 2e-4
    skipped = refactor_factored_attn_matrices(hooked).skipped
    assert len(skipped) == LAYERS


# Sparse attention on top --------------------------------------------------------------------------

SPARSE = [
    tiny(kind, variant, index_n_heads=2, index_head_dim=16, index_topk=3, **more)
    for kind, variant, more in (
        ("deepseek_v32", "base", {}),
        ("glm_moe_dsa", "own", {"indexer_types": ["full", "full", "full"]}),
        ("glm_moe_dsa", "shared", {"indexer_types": ["full", "shared", "full"]}),
    )
]
each_sparse = pytest.mark.parametrize("tiny", SPARSE, ids=lambda tiny: tiny.id)


@each_sparse
@torch.no_grad()
def test_sparse_attention_is_hugging_faces(tiny: Tiny):
    model = ours(tiny)
    assert all(type(block.attn) is SparseLatentAttention for block in model.blocks)
    expected = hf_truth.logits_of(theirs(tiny), TOKENS, MASK)
    assert torch.equal(model(TOKENS, attention_mask=MASK)[MASK.bool()], expected[MASK.bool()])
    got, cache = model.run_with_cache(TOKENS, names_filter=list(model.hook_dict))
    assert error(got, hf_truth.logits_of(theirs(tiny), TOKENS)) <= 1e-5
    longhand = tiny.build()
    longhand.set_attn_implementation("eager")
    patterns = longhand(TOKENS, output_attentions=True).attentions
    _, plain = model.run_with_cache(TOKENS)
    for layer in range(LAYERS):
        assert error(cache["pattern", layer], patterns[layer]) <= 1e-5
        assert error(plain["pattern", layer], patterns[layer]) <= 1e-5
        assert (cache["pattern", layer] > 0).sum(-1).max() == 3
    for cached in (True, False):
        options = dict(max_new_tokens=5, do_sample=False, stop_at_eos=False)
        got = model.generate(TOKENS, attention_mask=MASK, use_past_kv_cache=cached, **options)
        expected = hf_truth.greedy(theirs(tiny), TOKENS, MASK, 5)
        assert torch.equal(got[:, -5:], expected[:, -5:]), cached


@torch.no_grad()
def test_shared_picks_follow_an_edit_of_the_layer_that_picks():
    """Queries' latent of layer 0, negated: layers 0 and 1 attend to other keys, layer 2 picks."""
    model, place = ours(SPARSE[2]), "model.layers.0.self_attn.q_a_layernorm"
    expected = edited(theirs(SPARSE[2]), place, torch.neg)
    negate = [("blocks.0.attn.hook_q_latent", lambda x, hook: -x)]
    assert torch.equal(model.run_with_hooks(TOKENS, fwd_hooks=negate), expected)
    split = [*negate, *((f"blocks.0.hook_{x}_input", same) for x in "qkv")]
    assert error(model.run_with_hooks(TOKENS, fwd_hooks=split), expected) <= 1e-5
    _, before = model.run_with_cache(TOKENS)
    with model.hooks(negate):
        _, after = model.run_with_cache(TOKENS)
    for layer in (0, 1):
        assert ((after["pattern", layer] > 0) != (before["pattern", layer] > 0)).any()


@torch.no_grad()
def test_a_layer_that_shares_picks_can_not_come_first():
    model = ours(SPARSE[2])
    _, cache = model.run_with_cache(TOKENS)
    with pytest.raises(InputError, match="start before that layer"):
        model(cache["resid_pre", 1], start_at_layer=1)
    assert error(model(cache["resid_pre", 2], start_at_layer=2), model(TOKENS)) <= 1e-5


@each_sparse
@torch.no_grad()
def test_sparse_attention_in_pieces_and_frozen(tiny: Tiny):
    """Beside Hugging Face in the same pieces: among equal scores, which is picked hangs on how
    many keys there are."""
    model = ours(tiny)
    past = HookedTransformerKeyValueCache.init_cache(model.cfg, "cpu", 3)
    first = theirs(tiny)(TOKENS[:, :6], use_cache=True)
    second = theirs(tiny)(TOKENS[:, 6:], past_key_values=first.past_key_values).logits
    assert error(model(TOKENS[:, :6], past_kv_cache=past), first.logits) <= 1e-5
    past.freeze()
    for _ in range(2):
        assert error(model(TOKENS[:, 6:], past_kv_cache=past), second) <= 1e-5
    past.unfreeze()
    assert error(model(TOKENS[:, 6:], past_kv_cache=past), second) <= 1e-5
    assert past[0].picking_keys.shape[1] == past.get_seq_length() == 11


def test_a_norm_that_a_selector_reads_is_not_folded():
    _, hooked = fresh(SPARSE[2])
    skipped = fold_ln(hooked).skipped
    assert [reason.partition(":")[0] for reason in skipped] == ["blocks.0.ln1", "blocks.2.ln1"]


GATED_NORMS = tiny(
    "axk2", "base", index_n_heads=2, index_head_dim=16, index_topk=3,
    mlp_layer_types=["dense", "sparse", "sparse"],
)  # fmt: skip


@torch.no_grad()
def test_norms_of_unknown_make_leave_the_rest_of_the_block_uniform():
    model = hookedlm.load(theirs(GATED_NORMS))
    forms = {part.where: part.form for part in model.conversion.parts}
    assert forms["blocks.0"] == "opaque attention and ln1 in uniform block"
    assert forms["blocks.2"] == "opaque attention and ln1 and ln2 in uniform block"
    expected = hf_truth.logits_of(theirs(GATED_NORMS), TOKENS, MASK)
    got, cache = model.run_with_cache(TOKENS, attention_mask=MASK)
    assert torch.equal(got[MASK.bool()], expected[MASK.bool()])
    normed = observed(theirs(GATED_NORMS), "model.layers.2.post_attention_layernorm", TOKENS)
    _, cache = model.run_with_cache(TOKENS)
    assert torch.equal(cache["blocks.2.ln2.hook_normalized"], normed)
    assert error(cache["attn_out", 2] + cache["resid_pre", 2], cache["resid_mid", 2]) <= 1e-6
    for name in ("blocks.2.ln1.hook_normalized", "blocks.2.ln2.hook_normalized"):
        place = f"model.layers.2.{'input' if 'ln1' in name else 'post_attention'}_layernorm"
        edit = model.run_with_hooks(TOKENS, fwd_hooks=[(name, noisy)])
        assert torch.equal(edit, edited(theirs(GATED_NORMS), place, noisy))
    with pytest.raises(InputError, match="runs as Hugging Face wrote it"):
        cache.decompose_resid(2, mlp_input=True, apply_ln=True)
