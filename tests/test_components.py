"""Parts built from a config, and `isinstance` on the parts of any model."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace

import pytest
import torch
from conftest import hooked

import hookedlm
from hookedlm import HookedTransformer, HookedTransformerConfig, components
from hookedlm.errors import ConfigError, InputError
from hookedlm.layers.block import ParallelBlock, SequentialBlock

CFG = HookedTransformerConfig(
    n_layers=2, d_model=16, n_ctx=12, d_head=4, d_vocab=20, act_fn="gelu", device="cpu"
)
TOKENS = torch.randint(20, (2, 6), generator=torch.Generator().manual_seed(0))


def changed(**fields) -> HookedTransformerConfig:
    return replace(CFG, **fields)


def stands_for(module) -> set[str]:
    """The names of all classes an object counts as."""
    names = [name for name in vars(components) if name[0].isupper()]
    classes = {name: vars(components)[name] for name in names if "Factory" not in name}
    return {name for name, kind in classes.items() if isinstance(module, kind)}


# Asking -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "path", "expected"),
    [
        ("gpt2-base", "embed", {"Embed"}),
        ("gpt2-base", "pos_embed", {"PosEmbed"}),
        ("gpt2-base", "unembed", {"Unembed"}),
        ("gpt2-base", "blocks.0", {"TransformerBlock"}),
        ("gpt2-base", "blocks.0.ln1", {"LayerNorm"}),
        ("gpt2-base", "blocks.0.mlp", {"MLP"}),
        ("gpt2-base", "blocks.0.attn", {"AbstractAttention", "Attention"}),
        ("gpt2-base", "hook_embed", set()),
        ("llama-grouped", "blocks.0.ln1", {"RMSNorm"}),
        ("llama-grouped", "ln_final", {"RMSNorm"}),
        ("llama-grouped", "blocks.0.mlp", {"GatedMLP"}),
        ("llama-grouped", "blocks.0.attn", {"AbstractAttention", "GroupedQueryAttention"}),
        ("mixtral-base", "blocks.0.mlp", {"MoE"}),
        ("llama-full_heads", "blocks.0.attn", {"AbstractAttention", "Attention"}),
        ("gpt_neox-parallel", "blocks.0", {"TransformerBlock"}),
    ],
)
def test_a_part_of_a_loaded_model_counts_as(model, path, expected):
    assert stands_for(hooked(model).get_submodule(path)) == expected


def test_folding_makes_a_norm_another():
    folded = HookedTransformer.from_pretrained("demo", device="cpu")
    assert stands_for(folded.blocks[0].ln1) == {"LayerNormPre"}
    toy = HookedTransformer(changed(normalization_type="RMSPre"))
    assert stands_for(toy.ln_final) == {"RMSNormPre"}


def test_a_subclass_counts_only_what_was_made_of_it():
    class Mine(components.MLP):
        def forward(self, x):
            return 2 * super().forward(x)

    mine = Mine(CFG)
    assert isinstance(mine, Mine)
    assert isinstance(mine, components.MLP)
    assert not isinstance(hooked("gpt2-base").blocks[0].mlp, Mine)


# Building -----------------------------------------------------------------------------------------

PARTS = {
    "embed": (components.Embed, {}),
    "pos_embed": (components.PosEmbed, {}),
    "unembed": (components.Unembed, {}),
    "ln_final": (components.LayerNorm, {}),
    "blocks.1.ln1": (components.LayerNorm, {}),
    "blocks.1.attn": (components.Attention, {}),
    "blocks.1.mlp": (components.MLP, {}),
    "blocks.1": (lambda cfg: components.TransformerBlock(cfg, 1), {}),
    "blocks.1 parallel": (
        lambda cfg: components.TransformerBlock(cfg, 1),
        {"parallel_attn_mlp": True},
    ),
    "blocks.1 attn_only": (lambda cfg: components.TransformerBlock(cfg, 1), {"attn_only": True}),
    "ln_final pre": (components.LayerNormPre, {"normalization_type": "LNPre"}),
    "ln_final rms": (components.RMSNorm, {"normalization_type": "RMS"}),
    "ln_final rms_pre": (components.RMSNormPre, {"normalization_type": "RMSPre"}),
    "blocks.1.attn grouped": (components.GroupedQueryAttention, {"n_key_value_heads": 2}),
    "blocks.1.attn abstract": (components.AbstractAttention, {"n_key_value_heads": 2}),
    "blocks.1.attn scaled": (
        lambda cfg: components.Attention(cfg, layer_id=1),
        {"scale_attn_by_inverse_layer_idx": True},
    ),
    "blocks.1.attn rotary": (components.Attention, {"positional_embedding_type": "rotary"}),
    "blocks.1.attn local": (
        lambda cfg: components.Attention(cfg, "local", 1),
        {"use_local_attn": True, "window_size": 2, "attn_types": ["global", "local"]},
    ),
    "blocks.1.mlp gated": (components.GatedMLP, {"gated_mlp": True}),
    "blocks.1.mlp solu_ln": (components.MLP, {"act_fn": "solu_ln"}),
    "blocks.1.mlp experts": (components.MoE, {"num_experts": 3, "experts_per_token": 2}),
    "blocks.1.mlp factory": (components.MLPFactory.create_mlp, {"gated_mlp": True}),
}


@pytest.mark.parametrize("part", PARTS)
def test_a_part_computes_in_a_model_what_the_models_own_computes(part):
    make, fields = PARTS[part]
    cfg = changed(**fields)
    model = HookedTransformer(cfg)
    expected = model(TOKENS)
    path = part.split()[0]
    built, own = make(cfg), model.get_submodule(path)
    assert built.state_dict().keys() == own.state_dict().keys()
    assert all(torch.isfinite(weight).all() for weight in built.state_dict().values())
    drawn = [name for name in built.state_dict() if name.split(".")[-1].startswith("W_")]
    assert all(built.state_dict()[name].std() > 0 for name in drawn)
    built.load_state_dict(own.state_dict())
    model.set_submodule(path, built)
    model.setup()
    assert torch.equal(model(TOKENS), expected)
    _, cache = model.run_with_cache(TOKENS)
    assert f"{path}.hook_pre" in cache or not path.endswith("mlp") or cfg.num_experts


@pytest.mark.parametrize("fields", [{}, {"parallel_attn_mlp": True}, {"act_fn": "solu_ln"}])
def test_blocks_put_together_by_hand_are_the_model(fields):
    cfg = changed(**fields)
    model = HookedTransformer(cfg)
    embed, pos_embed = components.Embed(cfg), components.PosEmbed(cfg)
    blocks = [components.TransformerBlock(cfg, layer) for layer in range(cfg.n_layers)]
    ln_final, unembed = components.LayerNorm(cfg), components.Unembed(cfg)
    for path, part in {"embed": embed, "pos_embed": pos_embed, "unembed": unembed}.items():
        part.load_state_dict(model.get_submodule(path).state_dict())
    ln_final.load_state_dict(model.ln_final.state_dict())
    mask = torch.tensor([[1] * 6, [0, 0, 1, 1, 1, 1]])
    stream = embed(TOKENS) + pos_embed(TOKENS, 0, mask)
    for block, own in zip(blocks, model.blocks, strict=True):
        block.load_state_dict(own.state_dict())
        stream = block(stream, attention_mask=mask)
    got, expected = unembed(ln_final(stream)), model(TOKENS, attention_mask=mask)
    torch.testing.assert_close(got[mask.bool()], expected[mask.bool()])


def test_attention_alone_is_causal_and_knows_padding():
    attn = components.Attention(CFG)
    x = torch.randn(2, 6, 16)
    later = x.clone()
    later[:, 4:] += 1
    torch.testing.assert_close(attn(x, x, x)[:, :4], attn(later, later, later)[:, :4])
    mask = torch.tensor([[1] * 6, [0, 0, 1, 1, 1, 1]])
    padded = attn(x, x, x, attention_mask=mask)
    torch.testing.assert_close(padded[1:, 2:], attn(x[1:, 2:], x[1:, 2:], x[1:, 2:]))
    assert not torch.allclose(padded[1], attn(x, x, x)[1])


@pytest.mark.parametrize("parallel", [False, True])
def test_a_block_is_copied_and_pickled(parallel):
    block = components.TransformerBlock(changed(parallel_attn_mlp=parallel), 1)
    assert isinstance(block, ParallelBlock if parallel else SequentialBlock)
    x = torch.randn(2, 6, 16)
    for again in (copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
        assert type(again) is type(block)
        assert torch.equal(again(x), block(x))
        assert again.attn.W_Q.data_ptr() != block.attn.W_Q.data_ptr()


def test_a_subclass_of_a_block_runs_its_own_forward():
    class Skipped(components.TransformerBlock):
        def forward(self, resid, *args, **kwargs):
            super().forward(resid, *args, **kwargs)
            return resid

    model = HookedTransformer(CFG)
    model.blocks[0] = Skipped(CFG, 0)
    model.setup()
    _, cache = model.run_with_cache(TOKENS)
    assert torch.equal(cache["resid_pre", 1], cache["resid_pre", 0])
    assert not torch.equal(cache["resid_post", 0], cache["resid_pre", 0])


def test_layers_of_a_seeded_config_start_apart():
    cfg = changed(seed=3)
    assert not torch.equal(components.MLP(cfg).W_in, components.MLP(cfg).W_in)
    zero = components.MLP(changed(init_weights=False))
    assert not zero.W_in.any()


def test_a_part_from_a_loaded_models_config_starts_with_weights():
    loaded = hooked("gpt2-base")
    assert components.MLP(loaded.cfg).W_out.std() > 0
    assert components.TransformerBlock(loaded.cfg, 0).attn.W_Q.std() > 0


def test_a_norm_of_another_length():
    norm = components.LayerNorm(CFG, length=5)
    x = torch.randn(3, 5)
    torch.testing.assert_close(norm(x), torch.nn.functional.layer_norm(x, (5,)))


def test_an_activation_from_a_config():
    act = components.ActivationFunctionFactory.pick_activation_function(CFG)
    x = torch.randn(7)
    torch.testing.assert_close(act(x), torch.nn.functional.gelu(x))


def test_parts_of_bert():
    cfg = changed(attention_dir="bidirectional")
    model = hookedlm.encoder.HookedEncoder(cfg)
    assert stands_for(model.blocks[0]) == {"BertBlock"}
    embed, block = components.BertEmbed(cfg), components.BertBlock(cfg)
    embed.load_state_dict(model.embed.state_dict())
    block.load_state_dict(model.blocks[0].state_dict())
    _, cache = model.run_with_cache(TOKENS)
    torch.testing.assert_close(embed(TOKENS), cache["hook_full_embed"])
    torch.testing.assert_close(block(embed(TOKENS)), cache["blocks.0.hook_normalized_resid_post"])
    heads = [components.BertMLMHead, components.BertPooler, components.BertNSPHead]
    own = [model.mlm_head, model.pooler, model.nsp_head]
    for head, theirs in zip(heads, own, strict=True):
        assert stands_for(theirs) == {head.__name__}
        assert head(cfg).state_dict().keys() == theirs.state_dict().keys()
    assert components.TokenTypeEmbed(cfg).W_token_type.shape == (2, 16)


T5 = changed(
    positional_embedding_type="relative_positional_bias", act_fn="relu", decoder_start_token_id=0
)


def test_parts_of_t5():
    model = hookedlm.encoder_decoder.HookedEncoderDecoder(T5)
    said = TOKENS[:, :4]
    _, cache = model.run_with_cache(TOKENS, said)
    bias = {stack: cache[f"{stack}.0.attn.rel_pos_hook"] for stack in ("encoder", "decoder")}
    encoded = model.encoder_output(TOKENS)
    for stack, is_decoder in (("encoder", False), ("decoder", True)):
        for layer, own in enumerate(model.get_submodule(stack)):
            assert stands_for(own) >= {"T5Block"}
            assert stands_for(own.attn) >= {"T5Attention", "AbstractAttention"}
            built = components.T5Block(T5, layer, is_decoder)
            assert built.state_dict().keys() == own.state_dict().keys()
            built.load_state_dict(own.state_dict())
            given = {"encoder_hidden_states": encoded} if is_decoder else {}
            if layer:
                given["position_bias"] = bias[stack]
            for block in (built, copy.deepcopy(built), pickle.loads(pickle.dumps(built))):
                out = block(cache[f"{stack}.{layer}.hook_resid_pre"], **given)
                torch.testing.assert_close(out, cache[f"{stack}.{layer}.hook_resid_post"])
            model.set_submodule(f"{stack}.{layer}", built)
    model.setup()
    torch.testing.assert_close(model(TOKENS, said), cache["hook_logits"])
    with pytest.raises(InputError, match="encoder_hidden_states"):
        components.T5Block(T5, 0, True)(torch.randn(2, 4, 16))


@pytest.mark.parametrize("is_decoder", [False, True])
def test_attention_of_t5_alone(is_decoder):
    attn = components.T5Attention(T5, True, layer_id=0, is_decoder=is_decoder)
    x = torch.randn(2, 6, 16)
    q, k, v = (torch.einsum("bpd,hde->bhpe", x, W) for W in (attn.W_Q, attn.W_K, attn.W_V))
    scores = q @ k.mT + attn.position_bias(2, 6)
    if is_decoder:
        scores = scores.masked_fill(torch.ones(6, 6).triu(1).bool(), -torch.inf)
    expected = torch.einsum("bhpe,hed->bpd", scores.softmax(-1) @ v, attn.W_O)
    torch.testing.assert_close(attn(x, x, x), expected)
    assert "rel_pos_bias.weight" in attn.state_dict()
    assert "rel_pos_bias.weight" not in components.T5Attention(T5).state_dict()


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: components.T5Attention(T5, attn_type="local"), "attn_type"),
        (lambda: components.T5Block(T5, 2, False), "layer 2"),
        (lambda: components.PosEmbed(changed(positional_embedding_type="rotary")), "learned"),
        (lambda: components.TransformerBlock(CFG, 2), "layer 2"),
        (lambda: components.Attention(CFG, layer_id=5), "layer 5"),
        (lambda: components.Attention(CFG, "lokal"), "attn_type"),
        (lambda: components.Attention(CFG, "local"), "window_size"),
        (lambda: components.GroupedQueryAttention(CFG), "n_key_value_heads"),
        (lambda: components.MoE(CFG), "num_experts"),
        (
            lambda: components.Attention(changed(positional_embedding_type="shortformer")),
            "TransformerBlock",
        ),
        (
            lambda: components.Attention(changed(scale_attn_by_inverse_layer_idx=True)),
            "layer_id",
        ),
        (lambda: components.BertBlock(CFG), "bidirectional"),
    ],
)
def test_what_a_config_lacks_is_said(make, says):
    with pytest.raises(ConfigError, match=says):
        make()
