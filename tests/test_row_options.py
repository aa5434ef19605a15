"""Options that a few families have, each against its own formula."""

from __future__ import annotations

import pytest
import torch
from tiny import family, registered

import hookedlm
from hookedlm.errors import CacheKeyError, InputError, WeightError

TOKENS = torch.randint(3, 90, (2, 7), generator=torch.Generator().manual_seed(0))


def loaded(kind: str, **options):
    """A tiny model of a type, every hook point of it recorded."""
    tiny = next(t for t in registered([kind]) if t.model_type == kind)
    if options:
        [tiny] = family(kind, tiny.config, changed=options)
    model = hookedlm.load(tiny.build(), strict=True)
    with torch.no_grad():
        logits, cache = model.run_with_cache(TOKENS, names_filter=list(model.hook_dict))
    return model, logits, cache


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=2e-5)


# Attention ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "act"), [("afmoe", torch.sigmoid), ("beam", torch.sigmoid),
                                           ("laguna", torch.nn.functional.softplus)])  # fmt: skip
@torch.no_grad()
def test_gates(kind, act):
    model, _logits, cache = loaded(kind)
    attn = model.blocks[1].attn
    x = model.blocks[1].ln1(cache["resid_pre", 1])
    pre = torch.einsum("bpd,hdg->bphg", x, attn.gate.W_gate) + attn.gate.b_gate
    close(cache["blocks.1.attn.gate.hook_gate"], act(pre))
    close(cache["z", 1], cache["blocks.1.attn.hook_weighted"] * act(pre))
    shut = [("blocks.1.attn.gate.hook_gate", lambda gate, hook: 0 * gate)]
    with model.hooks(fwd_hooks=shut):
        _, without = model.run_with_cache(TOKENS)
    assert not without["z", 1].any()
    assert without["blocks.1.attn.hook_weighted"].any()

    # An input of one head alone moves the gate of that head alone.
    def first_head(copies, hook):
        copies[:, :, 0] += 1

    with model.hooks(fwd_hooks=[("blocks.1.hook_q_input", first_head)]):
        _, moved = model.run_with_cache(TOKENS)
    changed = (moved["blocks.1.attn.gate.hook_gate"] - cache["blocks.1.attn.gate.hook_gate"]).abs()
    assert changed[:, :, 0].min() > 0
    assert changed[:, :, 1:].max() < 1e-5


@torch.no_grad()
def test_a_norm_before_the_output():
    model, _, cache = loaded("bitnet")
    z = cache["blocks.1.attn.hook_weighted"].flatten(2)
    scale = (z.pow(2).mean(-1, keepdim=True) + model.blocks[1].attn.z_norm.eps).sqrt()
    close(cache["z", 1].flatten(2), z / scale * model.blocks[1].attn.z_norm.w)
    neurons = model.blocks[1].mlp
    close(cache["post", 1], neurons.ln(cache["blocks.1.mlp.hook_mid"]))


@torch.no_grad()
def test_norms_behind_the_rotation():
    model, _, cache = loaded("hunyuan_v1_dense")
    spec = model.blocks[1].attn.spec
    assert spec.late_qk_norm
    q, w = cache["rot_q", 1], model.blocks[1].attn.q_norm.w
    close((q / w).pow(2).mean(-1), torch.ones_like(q[..., 0]))


@torch.no_grad()
def test_temperatures():
    rope = {"rope_type": "default", "rope_theta": 1e4, "llama_4_scaling_beta": 0.5}
    rope |= {"original_max_position_embeddings": 2}
    model, logits, cache = loaded("ministral3", rope_parameters=rope, sliding_window=None)
    positions = torch.arange(7)
    hot = 1 + 0.5 * torch.log(1 + (positions // 2).float())
    attn = model.blocks[1].attn
    q, k = cache["rot_q", 1], cache["rot_k", 1].repeat_interleave(2, dim=2)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * attn.spec.scale * hot[:, None]
    seen = torch.ones(7, 7).tril().bool()
    close(cache["attn_scores", 1][:, :, seen], scores[:, :, seen])
    past = hookedlm.past_key_values.HookedTransformerKeyValueCache.init_cache(model.cfg, "cpu", 2)
    model(TOKENS[:, :4], past_kv_cache=past)
    close(model(TOKENS[:, 4:], past_kv_cache=past), logits[:, 4:])


@torch.no_grad()
def test_values_wider_than_queries():
    model, _, cache = loaded("mimo_v2_flash")
    attn = model.blocks[1].attn
    assert attn.W_V.shape[2] == 16
    assert attn.W_Q.shape[2] == 8
    x = model.blocks[1].ln1(cache["resid_pre", 1])
    close(cache["v", 1], torch.einsum("bpd,hde->bphe", x, attn.W_V) * attn.spec.value_scale)


# Shared keys, the layer's own input ---------------------------------------------------------------


@torch.no_grad()
def test_keys_of_an_earlier_layer():
    model, _logits, cache = loaded("gemma4_unified_text")
    stores = {block.attn.spec.stores_keys: i for i, block in enumerate(model.blocks)}
    reuser = model.blocks[3].attn
    source = stores[reuser.spec.reuses_keys]
    assert torch.equal(cache["v", 3], cache["v", source])
    assert torch.equal(cache["rot_k", 3], cache["rot_k", source])

    def double(v, hook):
        return 2 * v

    with model.hooks(fwd_hooks=[(f"blocks.{source}.attn.hook_v", double)]):
        _, both = model.run_with_cache(TOKENS)
    close(both["v", 3], both["v", source])
    with model.hooks(fwd_hooks=[("blocks.3.attn.hook_v", double)]):
        _, one = model.run_with_cache(TOKENS)
    close(one["z", 3], 2 * cache["z", 3])
    close(one["z", source], cache["z", source])
    for read in (lambda: reuser.QK, lambda: model.W_K):
        with pytest.raises(WeightError, match="earlier"):
            read()
    with pytest.raises(CacheKeyError, match="earlier one"):
        cache["k", 3]
    with pytest.raises(InputError, match="start before that layer"):
        model(cache["resid_pre", 3], start_at_layer=3)


@torch.no_grad()
def test_inputs_of_single_layers():
    model, _logits, cache = loaded("gemma4_text")
    block = model.blocks[1]
    x, given = cache["blocks.1.hook_resid_mid_ple"], cache["blocks.1.ple.hook_input"]
    post = block.ple.act_fn(x @ block.ple.W_gate) * given
    close(cache["blocks.1.hook_ple_out"], block.ple_norm(post @ block.ple.W_out))
    whole = x + cache["blocks.1.hook_ple_out"]
    close(cache["resid_post", 1], block.post_scale(whole))
    with pytest.raises(InputError, match="start_at_layer=1"):
        model(cache["resid_pre", 1], start_at_layer=1)
    _, labels = cache.decompose_resid(return_labels=True)
    assert "1_ple_out" in labels


@torch.no_grad()
def test_additions_that_average():
    model, _, cache = loaded("beam")
    block = model.blocks[1]
    assert block.spec.keep[0] < 1
    close(cache["resid_mid", 1], block.spec.keep[0] * cache["resid_pre", 1] + cache["attn_out", 1])
