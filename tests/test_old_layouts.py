"""Absolute positions, norms of the stream, decoder halves and layouts that few families share: each
mechanism against Hugging Face's own modules, or against its formula."""

from __future__ import annotations

import inspect
import math
import warnings

import pytest
import torch
from sizes import IDS, merged, sizes_of
from tiny import perturb, quiet_transformers
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, MusicgenForCausalLM
from transformers.models.musicgen.configuration_musicgen import MusicgenDecoderConfig

import hookedlm
from hookedlm import HookedTransformer
from hookedlm.errors import InputError

TOKENS = torch.randint(3, 96, (2, 9), generator=torch.Generator().manual_seed(1))
PAD = 0


def built(kind: str, **more):
    """A tiny random Hugging Face model, every parameter perturbed."""
    config = AutoConfig.for_model(kind, **(IDS | merged(sizes_of(kind), more)))
    with quiet_transformers(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    perturb(model, 0)
    return model


def both(kind: str, **more):
    theirs = built(kind, **more)
    return theirs, hookedlm.load(theirs)


def forms(model: HookedTransformer) -> set[str]:
    return {part.form for part in model.fidelity().parts}


def padded(side: str) -> tuple[torch.Tensor, torch.Tensor]:
    mask = torch.ones_like(TOKENS)
    mask[1, slice(0, 4) if side == "left" else slice(5, 9)] = 0
    return TOKENS.masked_fill(mask == 0, PAD), mask


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert ours.shape == theirs.shape
    assert float((ours - theirs).abs().max() / theirs.abs().max()) < 1e-5


# Positions ----------------------------------------------------------------------------------------


def test_sinusoids_are_those_of_the_formula():
    _, model = both("xglm")
    half = model.cfg.d_model // 2
    rates = torch.exp(-math.log(10000) / (half - 1) * torch.arange(half))
    angles = (torch.arange(2, 66)[:, None]) * rates  # two rows are left out, as in fairseq
    assert torch.allclose(model.W_pos, torch.cat([angles.sin(), angles.cos()], 1), atol=1e-6)
    assert not model.pos_embed.W_pos.requires_grad


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", ["bart", "whisper", "marian", "roformer", "mbart"])
def test_families_that_number_padding_too(kind, side):
    """Their models take no position ids: the first real token is not at position 0."""
    theirs, model = both(kind)
    assert "position_ids" not in inspect.signature(theirs.forward).parameters
    tokens, mask = padded(side)
    with torch.no_grad():
        truth = theirs(tokens, attention_mask=mask).logits
        close(model(tokens, attention_mask=mask)[mask.bool()], truth[mask.bool()])


@pytest.mark.parametrize("pad", [0, 1])
@pytest.mark.parametrize("kind", ["roberta", "xlm-roberta-xl", "data2vec-text"])
def test_positions_that_begin_behind_paddings(kind, pad):
    theirs, model = both(kind, pad_token_id=pad)
    embeddings = theirs.base_model.embeddings
    assert torch.equal(model.W_pos, embeddings.position_embeddings.weight[pad + 1 :])
    for side in ("left", "right"):
        tokens, mask = padded(side)
        tokens = tokens.masked_fill(mask == 0, pad)
        with torch.no_grad():
            truth = theirs(tokens, attention_mask=mask).logits  # positions from the ids of padding
            close(model(tokens, attention_mask=mask)[mask.bool()], truth[mask.bool()])


@pytest.mark.parametrize("kind", ["roberta", "bart", "bert", "biogpt", "persimmon", "codegen"])
@torch.no_grad()
def test_a_pass_in_two_steps_equals_one_of_both(kind):
    _, model = both(kind)
    tokens, mask = padded("left")
    whole = model(tokens, attention_mask=mask)
    past = DynamicCache(config=model._outside[0].config)
    model(tokens[:, :6], attention_mask=mask[:, :6], past_kv_cache=past)
    rest = model(tokens[:, 6:], attention_mask=mask, past_kv_cache=past)
    close(rest, whole[:, 6:])


@torch.no_grad()
def test_a_base_that_scales_embeddings_in_place_leaves_the_stream_alone():
    theirs, model = both("ctrl")
    _, cache = model.run_with_cache(TOKENS)
    entering = cache["hook_embed"] + cache["hook_pos_embed"]
    assert torch.equal(cache["blocks.0.hook_resid_pre"], entering)
    close(cache["hook_embed"], theirs.transformer.w(TOKENS) * model.cfg.d_model**0.5)


@torch.no_grad()
def test_tables_made_inside_attention():
    theirs, model = both("moshi")
    assert "blocks.0.attn.hook_rot_q" in model.hook_dict
    close(model(TOKENS), theirs(TOKENS).logits)


@torch.no_grad()
def test_a_mask_of_keys_alone_stays_causal():
    """GPT-1's attention is causal by a table of its own; its prepared mask only hides padding."""
    _, model = both("openai-gpt")
    tokens, mask = padded("left")
    other = tokens.clone()
    other[:, -1] = 5
    before, after = (model(t, attention_mask=mask) for t in (tokens, other))
    assert torch.equal(before[0, :-1], after[0, :-1])
    assert not torch.equal(before[0, -1], after[0, -1])


# Embeddings and heads -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bert", "bart", "mbart", "roberta-prelayernorm"])
@torch.no_grad()
def test_the_normed_sum_of_embeddings_enters_block_0(kind):
    _, model = both(kind)
    _, cache = model.run_with_cache(TOKENS)
    summed = sum(cache[name] for name in model.hook_dict if name in EMBEDDED)
    close(cache["blocks.0.hook_resid_pre"], model.embed_ln(summed))
    parts = cache.decompose_resid(layer=0)
    close(parts.sum(0), cache["blocks.0.hook_resid_pre"])
    edited = model.run_with_hooks(
        TOKENS, fwd_hooks=[("embed_ln.hook_scale", lambda x, hook: 2 * x)]
    )
    assert not torch.equal(edited, model(TOKENS))


EMBEDDED = ("hook_embed", "hook_pos_embed", "hook_token_type_embed")


@torch.no_grad()
def test_a_head_between_stream_and_unembedding():
    theirs, model = both("modernbert-decoder")
    _, cache = model.run_with_cache(TOKENS)
    stream = cache["blocks.3.hook_resid_post"]
    read = theirs.lm_head(theirs.model.final_norm(stream))
    close(cache["mlm_head.ln.hook_normalized"], read)
    close(read @ model.W_U + model.b_U, theirs(TOKENS).logits)
    with pytest.raises(InputError, match="no linear function"):
        cache.logit_attrs(cache.decompose_resid(), 7)


@pytest.mark.parametrize("kind", ["modernbert-decoder", "megatron-bert", "nemotron", "biogpt"])
@torch.no_grad()
def test_processing_keeps_what_they_say(kind):
    theirs = built(kind)
    with warnings.catch_warnings():  # what is left alone is said in a warning
        warnings.simplefilter("ignore", UserWarning)
        processed = HookedTransformer.from_pretrained(kind, hf_model=theirs)
    assert processed.ln_final.live("w") is None  # folded, into the head where there is one
    before = theirs(TOKENS).logits.log_softmax(-1)
    assert torch.allclose(processed(TOKENS).log_softmax(-1), before, atol=1e-4)


# Blocks -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n_heads", "copied"), [(4, False), (8, True)])
@torch.no_grad()
def test_chunks_of_queries_values_and_keys(n_heads, copied):
    theirs, model = both("codegen", n_head=n_heads, n_embd=32, rotary_dim=4)
    attn, x = theirs.transformer.h[0].attn, torch.randn(1, 3, 32)
    chunks = attn.qkv_proj(x).unflatten(-1, (4, 3, -1))
    for part, W in zip((0, 2, 1), (model.W_Q, model.W_K, model.W_V), strict=True):
        heads = chunks[..., part, :].flatten(-2).unflatten(-1, (n_heads, -1))
        close(torch.einsum("bpd,hde->bphe", x, W[0]), heads)
    assert (model.blocks[0].attn.fused is None) == copied
    close(model(TOKENS), theirs(TOKENS).logits)


@torch.no_grad()
def test_a_bias_kept_outside_the_output_matrix():
    theirs, model = both("gpt_neox_japanese")
    last = theirs.gpt_neox_japanese.layers[-1].attention.dense_bias
    assert torch.equal(model.blocks[-1].attn.b_O, last)
    assert all(not block.attn.b_O.any() for block in model.blocks[:-1])


@torch.no_grad()
def test_layer_norms_stored_less_one():
    theirs, model = both("nemotron")
    _, cache = model.run_with_cache(TOKENS)
    truth = theirs.model.layers[1].input_layernorm(cache["blocks.1.hook_resid_pre"])
    close(cache["blocks.1.ln1.hook_normalized"], truth)


def test_a_first_block_without_its_norm():
    _, model = both("modernbert-decoder")
    assert "blocks.0.ln1.hook_scale" not in model.hook_dict
    assert "blocks.1.ln1.hook_scale" in model.hook_dict


def test_cross_attention_without_an_encoder_is_left_out():
    theirs, model = both("bart")
    assert forms(model) == {"uniform", "uniform, post_norm"}
    ours = sum(p.numel() for p in model.parameters())
    assert ours < sum(p.numel() for p in theirs.parameters())


@pytest.mark.parametrize("kind", ["bert", "megatron-bert", "roformer", "electra"])
@torch.no_grad()
def test_a_model_that_is_no_decoder_looks_both_ways(kind):
    theirs, model = both(kind, is_decoder=False)
    assert not any("opaque" in form for form in forms(model))
    close(model(TOKENS), theirs(TOKENS).logits)
    _, cache = model.run_with_cache(TOKENS)
    assert (cache["pattern", 0][..., 0, 1:] > 0).all()


# Layers that are no list of blocks ----------------------------------------------------------------


@pytest.mark.parametrize("causal", [False, True])
@torch.no_grad()
def test_parts_in_parallel_lists_become_blocks(causal):
    """XLM's loop holds the stream of padding at zero, so it stays Hugging Face's own."""
    theirs, model = both("xlm", causal=causal)
    assert "uniform, post_norm" in forms(model)
    tokens, mask = padded("left")
    truth = theirs(tokens, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0))
    close(model(tokens, attention_mask=mask)[mask.bool()], truth.logits[mask.bool()])
    ended = tokens.index_fill(1, torch.tensor([8]), theirs.config.pad_index)
    close(model(ended), theirs(ended).logits)  # padding is known by its id too
    assert type(theirs.transformer.attentions[0]).__name__ == "MultiHeadAttention"


@torch.no_grad()
def test_two_streams_run_side_by_side_in_one():
    theirs, model = both("reformer")
    close(model(TOKENS), theirs(TOKENS).logits)
    _, cache = model.run_with_cache(TOKENS)
    seen = []
    theirs.reformer.encoder.layers[1].register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True
    )
    theirs(TOKENS)
    pair = torch.cat([seen[0]["prev_attn_output"], seen[0]["hidden_states"]], -1)
    close(cache["blocks.1.hook_resid_pre"], pair)


@pytest.mark.parametrize("kind", ["prophetnet", "xlnet", "cpmant", "xmod"])
@torch.no_grad()
def test_what_has_no_uniform_block_runs_as_it_was_written(kind):
    theirs, model = both(kind)
    assert "opaque block" in forms(model)
    truth = theirs(TOKENS).logits
    close(model(TOKENS), truth)
    edited = model.run_with_hooks(
        TOKENS, fwd_hooks=[("blocks.1.hook_resid_post", lambda x, hook: x.flip(-1))]
    )
    assert not torch.equal(edited, truth)


@torch.no_grad()
def test_codebooks_are_rows_of_one_text():
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 48}
    ids = {"vocab_size": 96, "pad_token_id": 95, "bos_token_id": 95, "num_codebooks": 3}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        theirs = MusicgenForCausalLM(MusicgenDecoderConfig(**sizes, **ids)).eval()
    perturb(theirs, 0)
    model = hookedlm.load(theirs)
    assert {"uniform, sequential", "opaque embedding", "opaque head"} == forms(model)
    tokens = torch.randint(3, 90, (6, 7))
    close(model(tokens), theirs(tokens).logits)
    _, cache = model.run_with_cache(tokens)
    assert cache["pattern", 0].shape == (2, 4, 7, 7)
