"""Types that are odd in their own way: what they load as, show and refuse is true."""

from __future__ import annotations

import pytest
import torch
from measuring import config_of, model_of, options_of, runs, tokens_for
from sizes import IDS, merged, sizes_of, variants_of
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

import hookedlm
from hookedlm.errors import ConversionError, InputError


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert ours.shape == theirs.shape
    assert float((ours - theirs).abs().max() / theirs.abs().max()) < 1e-5


def recorded(kind: str):
    theirs = model_of(kind)
    model, tokens = hookedlm.load(theirs), tokens_for(theirs)
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens, names_filter=list(model.hook_dict))
    return theirs, model, tokens, cache


# What a point is said to hold ---------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["xlnet", "cpmant", "prophetnet", "rembert", "blt"])
def test_declared_axes_are_true(kind):
    _, model, tokens, cache = recorded(kind)
    sizes = {"batch": 2, "pos": tokens.shape[1], "d_model": model.cfg.d_model}
    for name, x in cache.items():
        axes = model.hook_dict[name].axes
        assert len(axes or ()) == x.ndim, name
        found = dict(zip(axes, x.shape, strict=True))
        assert {a: n for a, n in found.items() if sizes.get(a, n) != n} == {}, name


@pytest.mark.parametrize(("kind", "n"), [("cpmant", 9 + 32), ("prophetnet", 3 * 9)])
def test_a_stream_with_positions_of_its_own(kind, n):
    _, model, _, cache = recorded(kind)
    for name in ("hook_embed", "blocks.0.hook_resid_pre", "blocks.3.hook_resid_post"):
        assert model.hook_dict[name].axes == ("batch", "patch", "d_model")
        assert cache[name].shape == (2, n, model.cfg.d_model)
    assert cache["hook_logits"].shape[:2] == (2, 9)
    tokens = torch.full((3, 13), 5)
    for names in (None, "*resid_post"):
        _, whole = model.run_with_cache(tokens, names_filter=names)
        assert model.cache_size(tokens, names) == whole.nbytes


@torch.no_grad()
def test_positions_that_stand_before_the_batch():
    """XLNet's stream is ``[pos, batch, d_model]``; hooks see it the other way around."""
    theirs, model, tokens, cache = recorded("xlnet")
    inner = theirs(tokens, output_hidden_states=True).hidden_states
    close(cache["hook_embed"], inner[0])
    for layer in range(model.cfg.n_layers):
        close(cache["resid_pre", layer], inner[layer])

    def edit(module, args, output):
        stream = output[0].clone()
        stream[3, 1] += 1.0
        return (stream, *output[1:])

    def same_edit(x, hook):
        x = x.clone()
        x[1, 3] += 1.0
        return x

    handle = theirs.transformer.layer[1].register_forward_hook(edit)
    truth = theirs(tokens).logits
    handle.remove()
    close(model.run_with_hooks(tokens, fwd_hooks=[("blocks.1.hook_resid_post", same_edit)]), truth)
    whole = cache["resid_post", -1]
    close(cache.decompose_resid().sum(0), whole)


def test_a_head_of_another_width_than_the_stream():
    _, model, _, cache = recorded("rembert")
    name = "mlm_head.ln.hook_normalized"
    assert model.hook_dict[name].axes == ("batch", "pos", "d_embed")
    assert cache[name].shape[-1] == model.W_U.shape[0] != model.cfg.d_model


# Continuing ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("cached", [True, False], ids=["cached", "uncached"])
def test_a_loop_that_asks_its_blocks_for_their_images(cached):
    """GIT counts a block's image patches while it widens the mask over cached positions."""
    theirs = model_of("git")
    model, tokens = hookedlm.load(theirs), tokens_for(theirs)
    mask = torch.ones_like(tokens)
    mask[1, :3] = 0
    how = {"max_new_tokens": 4, "do_sample": False, "attention_mask": mask}
    ours = model.generate(tokens, use_past_kv_cache=cached, verbose=False, **how)
    assert torch.equal(ours, theirs.generate(tokens, use_cache=cached, **how))


@pytest.mark.parametrize("kind", ["qwen3_next", "jamba", "nemotron_h"])
@torch.no_grad()
def test_a_cache_of_states_alone_is_not_asked_for(kind):
    """Hugging Face's own code can't continue a hybrid without attention: its cache knows no length,
    and generation asks for it."""
    states = {
        "qwen3_next": {"layer_types": ["linear_attention"] * 4},
        "jamba": {"attn_layer_period": 9, "attn_layer_offset": 8},
        "nemotron_h": {"layers_block_type": ["mamba"] * 4},
    }
    config = AutoConfig.for_model(kind, **merged(IDS | sizes_of(kind), states[kind]))
    theirs = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    model, tokens = hookedlm.load(theirs), tokens_for(theirs)
    how = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
    with pytest.raises(ValueError, match="get_seq_length"):
        theirs.generate(tokens, **how)
    expected = theirs.generate(tokens, use_cache=False, **how)
    assert torch.equal(model.generate(tokens, **how, verbose=False), expected)
    with pytest.raises(InputError, match="keeps no past"):
        model(tokens, past_kv_cache=DynamicCache(config=config))


# What is refused ----------------------------------------------------------------------------------


def big_bird(**options):
    config = config_of("big_bird")
    for name, value in options.items():
        setattr(config, name, value)
    return AutoModelForCausalLM.from_config(config).eval()


def test_attention_that_turns_sparse_is_refused():
    sparse = big_bird(is_decoder=False)
    with pytest.raises(ConversionError, match="attention_type='original_full'"):
        hookedlm.load(sparse)
    sparse.bert.set_attention_type("original_full")
    assert not hookedlm.load(sparse).fidelity().opaque_parts
    assert hookedlm.load(big_bird(is_decoder=False, attention_type="original_full"))
    assert hookedlm.load(big_bird(is_decoder=True))


# What is measured ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "variant", "dropped"),
    [
        ("falcon", "flipped", set()),
        ("helium", "changed", {"head_dim"}),
        ("mimo_v2_flash", "changed", {"num_key_value_heads"}),
    ],
)
def test_options_that_transformers_can_not_run_are_dropped(kind, variant, dropped):
    wanted, kept = variants_of(kind)[variant], options_of(kind, variant)
    assert set(wanted) - set(kept) == dropped
    assert runs(kind, kept)
    assert runs(kind, wanted) == (not dropped)
