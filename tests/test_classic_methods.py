"""The rest of TransformerLens' methods of a model, each against a truth of its own."""

from __future__ import annotations

import copy
import pickle
import random
from functools import cache

import numpy as np
import pytest
import torch
from conftest import hf, hooked, word_tokenizer
from hf_truth import logits_of, padded_batch
from tiny import VOCAB
from torch import Tensor

import hookedlm
from hookedlm import HookedTransformer, HookedTransformerConfig, samples
from hookedlm.errors import InputError, TokenizerError, WeightError
from hookedlm.past_key_values import HookedTransformerKeyValueCache

TOKENS, MASK = padded_batch(VOCAB, [12, 7, 9], "left", seed=1)
REAL = MASK.bool()
NAMES = ["gpt2-base", "llama-grouped", "gemma2-base", "granite-multipliers", "gpt_neox-parallel"]
every = pytest.mark.parametrize("name", NAMES)
GROUPED = ["llama-grouped", "gemma2-base", "granite-multipliers", "falcon-multi_query"]
NORMED = ["qwen3-base", "olmo2-grouped", "stablelm-qk_layernorm"]


def fresh(name: str) -> HookedTransformer:
    return hookedlm.load(hf(name), tokenizer=word_tokenizer())


def with_opaque_attention() -> HookedTransformer:
    """A layer of it: somebody added a parameter that nothing accounts for."""
    theirs = copy.deepcopy(hf("gpt2-base"))
    theirs.transformer.h[1].attn.extra = torch.nn.Parameter(torch.ones(1))
    return hookedlm.load(theirs)


# --- Accumulated biases --------------------------------------------------------------------------


@torch.no_grad()
def silent_streams(model: HookedTransformer, mlps: bool = True) -> dict[str, Tensor]:
    """What stands in the stream when no head and no neuron says anything, less the embeddings."""

    def nothing(x: Tensor, hook: object) -> Tensor:
        return torch.zeros_like(x)

    silent = [(name, nothing) for name in ("*.hook_z", "*mlp.hook_post")]
    if not mlps:
        silent[1] = ("*hook_mlp_out", nothing)
    with model.hooks(fwd_hooks=silent):
        _, seen = model.run_with_cache(TOKENS, names_filter=["*hook_resid_*", "*hook_mlp_in"])
    start = seen["resid_pre", 0]
    return {name: x - start for name, x in seen.items()}


BIASED = ["gpt2-base", "granite-biased", "gpt_neox-parallel", "gptj-base", "phi-base", "bloom-base"]
ACCUMULATED = [*NAMES, *(x for x in BIASED if x not in NAMES), "falcon-multi_query"]


@pytest.mark.parametrize("mlps", [True, False])
@pytest.mark.parametrize("name", ACCUMULATED)
@torch.no_grad()
def test_accumulated_bias_is_what_a_silent_model_accumulates(name: str, mlps: bool):
    model = fresh(name)
    streams = silent_streams(model, mlps)
    n = model.cfg.n_layers
    for layer in range(n + 1):
        where = f"blocks.{layer}.hook_resid_pre" if layer < n else f"blocks.{n - 1}.hook_resid_post"
        bias = model.accumulated_bias(layer, include_mlp_biases=mlps)
        assert bias.shape == (model.cfg.d_model,)
        assert torch.allclose(streams[where], bias.expand_as(streams[where]), atol=1e-4)
        if layer < n:
            mid = streams[f"blocks.{layer}.hook_mlp_in"]
            bias = model.accumulated_bias(layer, mlp_input=True, include_mlp_biases=mlps)
            assert torch.allclose(mid, bias.expand_as(mid), atol=1e-4)
    assert bool(model.accumulated_bias(n).any()) == (name in BIASED)


def test_accumulated_bias_by_hand():
    model = hooked("gpt2-base")
    b_O, b_out = model.b_O, model.b_out
    total = b_O[0] + b_out[0] + b_O[1] + b_out[1]
    assert torch.allclose(model.accumulated_bias(2), total, atol=1e-6)
    assert torch.allclose(model.accumulated_bias(2, True), total + b_O[2], atol=1e-6)
    attn = b_O[0] + b_O[1] + b_O[2]
    assert torch.allclose(model.accumulated_bias(2, True, False), attn, atol=1e-6)
    assert not model.accumulated_bias(0).any()


def test_accumulated_bias_before_and_behind_norms():
    """No constant passes a norm, but a norm's own bias is one."""
    model = hooked("opt-post_norm")
    assert not model.accumulated_bias(0).any()
    with pytest.raises(InputError, match=r"blocks.0.ln1 norms the stream.*differs from position"):
        model.accumulated_bias(1)
    model = hookedlm.load(hf("gemma2-base"))
    assert not model.accumulated_bias(3).any()
    attn = model.blocks[1].attn
    attn.b_O = torch.nn.Parameter(torch.ones_like(attn.b_O))
    assert not model.accumulated_bias(1).any()
    with pytest.raises(InputError, match=r"bias before blocks.1.ln1_post"):
        model.accumulated_bias(2)
    sizes = dict(n_layers=1, d_model=8, n_ctx=8, d_head=4, d_vocab=9, act_fn="relu", seed=1)
    toy = HookedTransformer(sizes | dict(use_normalization_before_and_after=True, device="cpu"))
    with torch.no_grad():
        toy.blocks[0].ln1_post.b += 2
        toy.blocks[0].ln2_post.b += 3
    assert torch.equal(toy.accumulated_bias(1), torch.full((8,), 5.0))
    assert torch.equal(toy.accumulated_bias(0, mlp_input=True), torch.full((8,), 2.0))


def test_accumulated_bias_refuses():
    model = hooked("gpt2-base")
    for layer, mlp_input in ((4, False), (3, True), (-1, False)):
        with pytest.raises(InputError, match="expected a layer from 0 to"):
            model.accumulated_bias(layer, mlp_input)
    with pytest.raises(InputError, match=r"blocks.0.mlp adds its biases as it routes"):
        hooked("gpt_oss-base").accumulated_bias(1)
    assert not hooked("mixtral-base").accumulated_bias(3).any()
    model = with_opaque_attention()
    assert torch.equal(model.accumulated_bias(1), hooked("gpt2-base").accumulated_bias(1))
    with pytest.raises(InputError, match=r"blocks.1.attn is not uniform"):
        model.accumulated_bias(2)


# --- Composition ---------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["Q", "K", "V"])
@pytest.mark.parametrize("name", [*NAMES, "falcon-multi_query"])
@torch.no_grad()
def test_composition_scores_are_those_of_dense_matrices(name: str, mode: str):
    model = hooked(name)
    W_Q, W_K, W_V, W_O = (getattr(model, f"W_{x}").double() for x in "QKVO")
    scores = model.all_composition_scores(mode)
    n, h = model.cfg.n_layers, model.cfg.n_heads
    assert scores.shape == (n, h, n, h)
    for l1 in range(n):
        for h1 in range(h):
            writes = W_V[l1, h1] @ W_O[l1, h1]
            for l2 in range(n):
                for h2 in range(h):
                    reads = {
                        "Q": W_Q[l2, h2] @ W_K[l2, h2].T,
                        "K": W_K[l2, h2] @ W_Q[l2, h2].T,
                        "V": W_V[l2, h2] @ W_O[l2, h2],
                    }[mode]
                    expected = (writes @ reads).norm() / writes.norm() / reads.norm()
                    got = scores[l1, h1, l2, h2]
                    assert abs(got - (expected if l2 > l1 else 0)) < 1e-5


def test_composition_of_little():
    with pytest.raises(InputError, match="mode='q': expected 'Q', 'K' or 'V'"):
        hooked("gpt2-base").all_composition_scores("q")
    with pytest.raises(WeightError, match="layer 1 has none"):
        with_opaque_attention().all_composition_scores("Q")
    model = copy.deepcopy(hooked("gpt2-base"))  # with weights of its own
    with torch.no_grad():
        model.blocks[0].attn.W_O[2] = 0
    assert not model.all_composition_scores("Q")[0, 2].any()
    half = hookedlm.load(hf("gpt2-base"), dtype="bfloat16").all_composition_scores("V")
    assert torch.allclose(half, hooked("gpt2-base").all_composition_scores("V"), atol=0.02)


# --- Ungrouped keys and values -------------------------------------------------------------------


KEYS = ["hook_k", "hook_v"]


@pytest.mark.parametrize("name", [*GROUPED, "gpt2-base"])
@torch.no_grad()
def test_ungrouping_shows_a_head_for_every_query_head(name: str):
    model = fresh(name)
    plain, grouped = model.run_with_cache(TOKENS, attention_mask=MASK)
    model.set_ungroup_grouped_query_attention(True)
    assert model.cfg.ungroup_grouped_query_attention
    quiet = model(TOKENS, attention_mask=MASK)
    assert torch.equal(quiet[REAL], plain[REAL])  # nobody listens: the same kernels
    logits, seen = model.run_with_cache(TOKENS, attention_mask=MASK)
    assert torch.allclose(logits[REAL], plain[REAL], atol=1e-5)
    n, n_kv = model.cfg.n_heads, model.cfg.n_key_value_heads or model.cfg.n_heads
    rotates = "blocks.0.attn.hook_rot_k" in model.hook_dict
    for point in [*KEYS, "hook_rot_k"] if rotates else KEYS:
        key = f"blocks.1.attn.{point}"
        assert grouped[key].shape[2] == n_kv
        assert seen[key].shape == (3, 12, n, model.cfg.d_head)
        assert torch.allclose(seen[key], grouped[key].repeat_interleave(n // n_kv, 2), atol=1e-5)
        assert model.hook_dict[key].axes[2] == ("head" if n_kv < n else "kv_head")
    assert torch.allclose(seen["pattern", 1], grouped["pattern", 1], atol=1e-5)
    model.set_ungroup_grouped_query_attention(False)
    _, again = model.run_with_cache(TOKENS, attention_mask=MASK)
    assert all(again[key].shape == grouped[key].shape for key in grouped)
    assert model.hook_dict["blocks.1.attn.hook_k"].axes[2] == "kv_head"


@pytest.mark.parametrize("point", ["hook_v", "hook_k", "hook_rot_k"])
@pytest.mark.parametrize("name", GROUPED)
@torch.no_grad()
def test_an_edit_reaches_one_query_head(name: str, point: str):
    """Truth: the edited head's pattern and output from its own q, k and v; others unchanged."""
    if f"blocks.1.attn.{point}" not in hooked(name).hook_dict:
        pytest.skip("no rotation")
    model, head = fresh(name), 1
    model.set_ungroup_grouped_query_attention(True)
    _, clean = model.run_with_cache(TOKENS)

    def edit(x: Tensor, hook: object) -> None:
        x[:, :, head] *= 0.5

    with model.hooks(fwd_hooks=[(f"blocks.1.attn.{point}", edit)]):
        _, seen = model.run_with_cache(TOKENS)
        quick = model(TOKENS)
    z, before = seen["z", 1], clean["z", 1]
    others = [h for h in range(model.cfg.n_heads) if h != head]
    assert torch.allclose(z[:, :, others], before[:, :, others], atol=1e-5)
    if point == "hook_v":
        assert torch.allclose(z[:, :, head], 0.5 * before[:, :, head], atol=1e-5)
    else:  # half the key is half the score, before any softcap: here the pattern must follow z
        assert not torch.allclose(z[:, :, head, :], before[:, :, head], atol=1e-3)
        expected = seen["pattern", 1][:, head] @ seen["v", 1][:, :, head]
        assert torch.allclose(z[:, :, head], expected, atol=1e-4)
        assert torch.allclose(seen["pattern", 1][:, others], clean["pattern", 1][:, others])
    assert torch.allclose(quick, seen["hook_logits"], atol=1e-5)


@pytest.mark.parametrize("name", [*GROUPED, *NORMED])
@torch.no_grad()
def test_inputs_of_single_keys(name: str):
    model = fresh(name)
    plain, clean = model.run_with_cache(TOKENS)
    model.set_ungroup_grouped_query_attention(True)
    n = model.cfg.n_heads
    points = [f"blocks.1.{p}" for p in ("hook_k_input", "hook_v_input", "attn.hook_z")]
    logits, seen = model.run_with_cache(TOKENS, names_filter=points)
    assert seen["blocks.1.hook_k_input"].shape == (3, 12, n, model.cfg.d_model)
    assert model.hook_dict["blocks.1.hook_v_input"].axes[2] == "head"
    assert torch.allclose(logits, plain, atol=1e-4)

    def silence(x: Tensor, hook: object) -> None:
        x[:, :, 0] = 0

    with model.hooks(fwd_hooks=[("blocks.1.hook_k_input", silence)]):
        _, edited = model.run_with_cache(TOKENS, names_filter="blocks.1.attn.hook_z")
    z, before = edited["z", 1], clean["z", 1]
    assert not torch.allclose(z[:, :, 0], before[:, :, 0], atol=1e-4)
    # A norm over all keys together hears of it too, in the same place of every group.
    in_group = n // (model.cfg.n_key_value_heads or n)
    together = [h for h in range(n) if "olmo2" in name and h % in_group == 0]
    others = [h for h in range(1, n) if h not in together]
    assert torch.allclose(z[:, :, others], before[:, :, others], atol=1e-4)


def test_gradients_of_single_keys():
    model = fresh("llama-grouped")
    grads = {}
    for ungrouped in (False, True):
        model.set_ungroup_grouped_query_attention(ungrouped)
        name = "blocks.0.attn.hook_v"
        _, seen = model.run_with_cache(
            TOKENS, names_filter=name, return_type="loss", incl_bwd=True, clear_contexts=True
        )
        grads[ungrouped] = seen[f"{name}_grad"]
    summed = grads[True].unflatten(2, (2, 2)).sum(3)
    assert grads[True].shape[2] == 4
    assert torch.allclose(summed, grads[False], atol=1e-6)


@pytest.mark.parametrize("listened", [True, False])
@torch.no_grad()
def test_ungrouped_with_a_key_value_cache(listened: bool):
    model = fresh("llama-grouped")
    plain = model(TOKENS)
    model.set_ungroup_grouped_query_attention(True)
    past = HookedTransformerKeyValueCache.init_cache(model.cfg, "cpu", 3)
    hook = [("blocks.0.attn.hook_k", lambda x, hook: None)] if listened else []
    first = model.run_with_hooks(TOKENS[:, :5], past_kv_cache=past, fwd_hooks=hook)
    rest = model(TOKENS[:, 5:], past_kv_cache=past)
    assert torch.allclose(torch.cat([first, rest], dim=1), plain, atol=1e-4)
    model.set_ungroup_grouped_query_attention(False)
    with pytest.raises(InputError, match="holds 4 heads a layer and the pass gives 2"):
        model(TOKENS[:, :1], past_kv_cache=past)


@torch.no_grad()
def test_flags_may_be_set_on_the_config():
    model = fresh("llama-grouped")
    model.cfg.ungroup_grouped_query_attention = True
    model.cfg.use_attn_result = True
    model.cfg.use_split_qkv_input = True
    model.cfg.use_hook_mlp_in = True
    _, seen = model.run_with_cache(TOKENS)
    assert seen["blocks.2.attn.hook_result"].shape == (3, 12, 4, 32)
    attn_out = seen["blocks.2.attn.hook_result"].sum(2)
    assert torch.allclose(attn_out, seen["blocks.2.hook_attn_out"], atol=1e-5)
    assert seen["blocks.2.hook_k_input"].shape == (3, 12, 4, 32)
    assert seen["blocks.2.hook_mlp_in"].shape == (3, 12, 32)
    model.cfg.ungroup_grouped_query_attention = False
    model.cfg.use_attn_result = False
    _, seen = model.run_with_cache(TOKENS)
    assert "blocks.2.attn.hook_result" not in seen.cache_dict
    assert seen["blocks.2.hook_k_input"].shape == (3, 12, 2, 32)
    cfg = dict(n_layers=1, d_model=16, n_ctx=12, d_head=4, d_vocab=VOCAB, act_fn="gelu", seed=1)
    options = dict(n_key_value_heads=2, ungroup_grouped_query_attention=True)
    _, seen = HookedTransformer(cfg | options).run_with_cache(TOKENS)
    assert seen["k", 0].shape == (3, 12, 4, 4)


# --- What enters the blocks ----------------------------------------------------------------------


@pytest.mark.parametrize("name", [*NAMES, "bloom-base", "opt-pre_norm", "opt-pre_norm_projected"])
@torch.no_grad()
def test_embedding_and_the_rest_make_the_whole(name: str):
    model = hooked(name)
    truth = logits_of(hf(name), TOKENS, MASK)
    stream, tokens, apart, mask = model.input_to_embed(TOKENS, attention_mask=MASK)
    assert apart is None
    assert torch.equal(tokens, TOKENS)
    assert torch.equal(mask, MASK)
    _, seen = model.run_with_cache(TOKENS, attention_mask=MASK)
    assert torch.allclose(stream[REAL], seen["resid_pre", 0][REAL], atol=1e-6)
    got = model(stream, start_at_layer=0, tokens=tokens, attention_mask=mask)
    assert torch.allclose(got[REAL], truth[REAL], atol=1e-4)
    given = seen["hook_embed"]
    for got in (
        model.get_residual(given, 0, attention_mask=MASK)[0],
        model.get_residual(given, 0, None, MASK, tokens, False, "cpu"),
    ):
        assert torch.allclose(got[REAL], stream[REAL], atol=1e-6)


@torch.no_grad()
def test_text_is_embedded():
    model = hooked("gpt2-base")
    texts = ["the cat sat", "the"]
    tokens, expected = model.to_tokens_and_mask(texts, prepend_bos=False, padding_side="left")
    stream, got, _, mask = model.input_to_embed(texts, prepend_bos=False, padding_side="left")
    assert torch.equal(got, tokens)
    assert torch.equal(mask, expected)
    W = model.W_E[tokens[0]] + model.W_pos[:3]
    assert torch.allclose(stream[0], W, atol=1e-6)
    one, _, _, mask = model.input_to_embed("the cat", prepend_bos=True)
    assert one.shape == (1, 3, 32)
    assert mask is None
    with pytest.raises(InputError, match="float tensor"):
        model.input_to_embed(stream)


@pytest.mark.parametrize("name", ["gpt2-base", "gemma2-base"])
@torch.no_grad()
def test_positions_go_on_after_a_cache(name: str):
    model = hooked(name)
    whole, _, _, _ = model.input_to_embed(TOKENS, attention_mask=MASK)
    past = HookedTransformerKeyValueCache.init_cache(model.cfg, "cpu", 3)
    model(TOKENS[:, :6], attention_mask=MASK[:, :6], past_kv_cache=past)
    stream, tokens, _, mask = model.input_to_embed(TOKENS[:, 6:], past_kv_cache=past)
    assert torch.equal(stream, whole[:, 6:])
    assert torch.equal(mask, MASK)
    truth = logits_of(hf(name), TOKENS, MASK)[:, 6:]
    got = model(stream, start_at_layer=0, tokens=tokens, attention_mask=mask, past_kv_cache=past)
    assert torch.allclose(got, truth, atol=1e-4)
    embedded = model.embed(TOKENS[:, 6:])
    for given in (MASK, None):
        got, _ = model.get_residual(embedded, 6, attention_mask=given)
        if given is None:
            expected = embedded + (model.W_pos[6:12] if model.pos_embed is not None else 0)
        else:
            expected = whole[:, 6:]
        assert torch.allclose(got, expected, atol=1e-6)


@torch.no_grad()
def test_shortformer_positions_stay_apart():
    cfg = dict(n_layers=2, d_model=16, n_ctx=12, d_head=4, d_vocab=VOCAB, act_fn="gelu", seed=1)
    model = HookedTransformer(cfg | dict(positional_embedding_type="shortformer"))
    stream, tokens, apart, mask = model.input_to_embed(TOKENS)
    assert torch.equal(stream, model.embed(TOKENS))
    assert torch.equal(apart, model.W_pos[:12].expand(3, -1, -1))
    got = model(
        stream, start_at_layer=0, tokens=tokens, shortformer_pos_embed=apart, attention_mask=mask
    )
    assert torch.equal(got, model(TOKENS))
    residual, other = model.get_residual(stream, 0)
    assert torch.equal(residual, stream)
    assert torch.equal(other, apart)


def test_streams_that_do_not_fit():
    model = hooked("gpt2-base")
    with pytest.raises(InputError, match="70 positions, but this model has position embeddings"):
        model.get_residual(torch.zeros(1, 10, 32), 60)
    with pytest.raises(InputError, match=r"\[batch, pos, 32\]"):
        model.get_residual(torch.zeros(1, 10, 31), 0)


# --- Samples -------------------------------------------------------------------------------------


ROWS = [{"text": text} for text in ("the cat sat", "Mary went home", "blue mat", "dog " * 100)]


def test_datapoints():
    model = fresh("gpt2-base")
    model.dataset = ROWS
    before = random.getstate(), torch.get_rng_state(), np.random.get_state()[1].tolist()
    texts = {model.sample_datapoint(seed=seed) for seed in range(50)}
    assert texts == {row["text"] for row in ROWS}
    assert {model.sample_datapoint() for _ in range(200)} == texts
    assert random.getstate() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])
    assert np.random.get_state()[1].tolist() == before[2]
    for seed in range(10):
        text = model.sample_datapoint(seed=seed)
        for prepend_bos in (True, False):
            tokens = model.sample_datapoint(True, prepend_bos, "left", seed=seed)
            whole = model.to_tokens(text, prepend_bos, truncate=False)
            assert torch.equal(tokens, whole[:, : model.cfg.n_ctx])  # cut without a warning
    model.dataset = []
    with pytest.raises(InputError, match="no texts"):
        model.sample_datapoint()
    model.dataset = ROWS
    model.tokenizer = None
    with pytest.raises(TokenizerError, match="needs a tokenizer"):
        model.sample_datapoint(tokenize=True)


@pytest.mark.parametrize(
    ("name", "dataset"),
    [("gpt2-base", "openwebtext"), ("gpt_neox-parallel", "pile"), ("llama-grouped", "openwebtext")],
)
def test_datasets_are_chosen_by_architecture(
    name: str, dataset: str, monkeypatch: pytest.MonkeyPatch
):
    asked = []

    def get_dataset(name: str, **kwargs: object) -> list[dict[str, str]]:
        asked.append((name, kwargs))
        return ROWS

    monkeypatch.setattr(samples, "get_dataset", get_dataset)
    model = fresh(name)
    assert model.dataset is None
    model.load_sample_training_dataset(streaming=False)
    assert asked == [(dataset, {"streaming": False})]
    assert model.dataset is ROWS
    model = fresh(name)
    assert model.sample_datapoint() in [row["text"] for row in ROWS]


# --- Devices, configs ----------------------------------------------------------------------------


def test_moving():
    model = fresh("gpt2-base")
    assert model.to(device_or_dtype=torch.float64) is model
    assert model.cfg.dtype == torch.float64
    assert model.to("cpu", print_details=True) is model
    model.move_model_modules_to_device()
    assert model.device.type == "cpu"
    model.cfg.n_devices = 2
    with pytest.raises(NotImplementedError, match="one device"):
        model.move_model_modules_to_device()


@cache
def old_pickle() -> bytes:
    """A config as pickled by a release that had fewer fields."""
    cfg = HookedTransformerConfig(n_layers=2, d_model=8, n_ctx=4, d_head=4, act_fn="relu")
    for gone in ("use_NTK_by_parts_rope", "ungroup_grouped_query_attention", "dtype"):
        del vars(cfg)[gone]
    vars(cfg)["something_else"] = 3
    return pickle.dumps(cfg)


def test_old_configs_are_read():
    cfg = pickle.loads(old_pickle())
    assert (cfg.use_NTK_by_parts_rope, cfg.dtype, cfg.something_else) == (False, torch.float32, 3)
    assert HookedTransformerConfig.from_dict(cfg.to_dict()) == cfg
    assert "d_model=8" in repr(cfg)
