"""Hybrids: models in which attention is one way among others to mix tokens.

Truths: Hugging Face's logits, padded and continued; formulas over recorded activations; the same
edit by torch hooks on Hugging Face's own modules.
"""

from __future__ import annotations

from functools import cache

import hf_truth
import pytest
import torch
from hook_sets import dead
from tiny import VOCAB, Tiny, quiet_transformers
from transformers import DynamicCache

import hookedlm
from hookedlm import HookedTransformer
from hookedlm.errors import HookNameError, InputError, ProcessingError
from hookedlm.transforms import center_writing_weights, fold_ln, fold_value_biases

SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = {
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 24,
}
MAMBA2 = {"mamba_d_state": 8, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1}
DELTA = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
LATENT = {"kv_lora_rank": 16, "q_lora_rank": None, "v_head_dim": 8, "num_key_value_heads": 4}
LATENT |= {"qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "n_group": 1, "topk_group": 1}
TURNS = {"layer_types": ["linear_attention", "full_attention"] * 2}
CONV_TURNS = {"layer_types": ["conv", "full_attention"] * 2}
KINDS: dict[str, dict] = {
    "mamba2": {"state_size": 8, "num_heads": 4, "head_dim": 16, "n_groups": 1},
    "bamba": MAMBA2 | {"attn_layer_indices": [1, 3]},
    "jamba": EXPERTS
    | {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 8, "mamba_dt_rank": 4},
    "falcon_h1": MAMBA2
    | {"mamba_d_ssm": 64, "attention_in_multiplier": 1.3, "attention_out_multiplier": 0.7}
    | {"key_multiplier": 0.6, "ssm_out_multiplier": 1.4, "mlp_multipliers": [0.9, 1.7]}
    | {"lm_head_multiplier": 0.5, "embedding_multiplier": 2.0},
    "granitemoehybrid": MAMBA2
    | EXPERTS
    | TURNS
    | {"shared_intermediate_size": 24, "residual_multiplier": 0.7},
    "lfm2": CONV_TURNS,
    "lfm2_moe": EXPERTS | CONV_TURNS | {"num_dense_layers": 2},
    "lfm3": CONV_TURNS | {"use_sandwich_norm": True, "use_attention_gate": True},
    "nemotron_h": EXPERTS
    | {"ssm_state_size": 8, "mamba_num_heads": 4, "mamba_head_dim": 16, "n_groups": 1}
    | {"n_group": 1, "topk_group": 1, "moe_shared_expert_intermediate_size": 24}
    | {"layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"]},
    "olmo_hybrid": DELTA | TURNS,
    "qwen3_next": EXPERTS | DELTA | TURNS,
    "qwen3_5_text": DELTA | TURNS,
    "recurrent_gemma": {"attention_window_size": 4, "lru_width": 32},
    "kimi_linear": EXPERTS | LATENT | TURNS | {"linear_num_heads": 4, "linear_head_dim": 8},
    "bailing_hybrid": EXPERTS | LATENT | TURNS,
    "minimax": EXPERTS
    | TURNS
    | {"linear_attn_alpha_factor": 0.9, "linear_attn_beta_factor": 1.2}
    | {"full_attn_alpha_factor": 0.8, "full_attn_beta_factor": 1.1}
    | {"mlp_alpha_factor": 1.3, "mlp_beta_factor": 0.6},
    "doge": {},
    "diffllama": {},
    "jetmoe": {"kv_channels": 8, "num_local_experts": 4, "num_experts_per_tok": 2},
    "inkling_text": EXPERTS
    | {"swa_head_dim": 8, "swa_num_attention_heads": 4, "swa_num_key_value_heads": 2}
    | {"sliding_window_size": 4, "rel_extent": 4, "d_rel": 8, "n_shared_experts": 1},
    "minimax_m3_vl_text": EXPERTS
    | {"layer_types": ["full_attention", "minimax_m3_sparse"] * 2, "index_n_heads": 2}
    | {"index_head_dim": 8, "index_block_size": 2, "index_topk_blocks": 2}
    | {"index_local_blocks": 1, "shared_intermediate_size": 24, "dense_intermediate_size": 24},
    "rwkv": {"attention_hidden_size": 32},
    "xlstm": {"num_blocks": 4, "num_heads": 4},
}
TOKENS = torch.randint(3, VOCAB, (2, 9), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(TOKENS).index_put((torch.tensor(1), torch.arange(3)), torch.tensor(0))
NO_CACHE = ("mamba2", "rwkv", "xlstm")  # they keep a state that is no transformers Cache
each = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad(), quiet_transformers():
        yield


@cache
def theirs_of(kind: str):
    return Tiny(kind, "hybrid", SIZES | KINDS[kind]).build()


@cache
def ours_of(kind: str) -> HookedTransformer:
    return hookedlm.load(theirs_of(kind))


def close(ours: torch.Tensor, theirs: torch.Tensor, mask: torch.Tensor | None = None) -> None:
    if mask is not None:
        ours, theirs = ours[mask.bool()], theirs[mask.bool()]
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


# Form --------------------------------------------------------------------------------------------


@each
def test_logits(kind: str):
    for mask in (None, MASK):
        expected = hf_truth.logits_of(theirs_of(kind), TOKENS, mask)
        close(ours_of(kind)(TOKENS, attention_mask=mask), expected, mask)


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "inkling_text"])
def test_no_block_is_opaque_as_a_whole(kind: str):
    forms = {part.where: part.form for part in ours_of(kind).fidelity().parts}
    assert "opaque block" not in forms.values()
    assert forms["embed"] == forms["logits"] == "uniform"


@pytest.mark.parametrize(
    ("kind", "mixing", "attending"),
    [
        ("bamba", [0, 2], [1, 3]),
        ("jamba", [0, 2], [1, 3]),
        ("falcon_h1", [0, 1, 2, 3], [0, 1, 2, 3]),
        ("granitemoehybrid", [0, 2], [1, 3]),
        ("lfm2", [0, 2], [1, 3]),
        ("olmo_hybrid", [0, 2], [1, 3]),
        ("qwen3_next", [0, 2], [1, 3]),
        ("recurrent_gemma", [0, 1, 3], [2]),
        ("kimi_linear", [0, 2], [1, 3]),
        ("bailing_hybrid", [0, 2], [1, 3]),
        ("minimax", [0, 2], [1, 3]),
        ("nemotron_h", [0], [2]),
    ],
)
def test_each_layer_shows_what_it_has(kind: str, mixing: list[int], attending: list[int]):
    names = ours_of(kind).hook_dict
    for i in range(4):
        for point in ("mixer.hook_in", "mixer.hook_out"):
            assert (f"blocks.{i}.{point}" in names) == (i in mixing)
        for point in ("attn.hook_q", "attn.hook_pattern", "attn.hook_z", "hook_attn_out"):
            assert (f"blocks.{i}.{point}" in names) == (i in attending)
        assert f"blocks.{i}.hook_resid_pre" in names


def test_blocks_of_one_branch():
    names = ours_of("nemotron_h").hook_dict
    for i, has_mlp in enumerate([False, True, False, True]):
        assert (f"blocks.{i}.hook_mlp_out" in names) == has_mlp
        assert (f"blocks.{i}.ln2.hook_scale" in names) == has_mlp
        assert (f"blocks.{i}.ln1.hook_scale" in names) != has_mlp
        assert f"blocks.{i}.hook_resid_mid" not in names
    with pytest.raises(HookNameError, match="no attention"):
        ours_of("nemotron_h").run_with_cache(TOKENS, names_filter="blocks.1.attn.hook_q")


# Hooks -------------------------------------------------------------------------------------------


@each
def test_every_point_fires_and_its_edit_matters(kind: str):
    assert dead(ours_of(kind), TOKENS) == []


@pytest.mark.parametrize(
    ("kind", "layer", "path"),
    [
        ("bamba", 2, "mamba"),
        ("falcon_h1", 1, "mamba"),
        ("lfm2", 2, "conv"),
        ("minimax", 2, "self_attn"),
        ("qwen3_next", 0, "linear_attn"),
        ("nemotron_h", 0, "mixer"),
        ("recurrent_gemma", 1, "temporal_block"),
    ],
)
def test_an_edit_at_a_mixer_is_the_same_edit_at_hugging_faces(kind: str, layer: int, path: str):
    theirs, ours = theirs_of(kind), ours_of(kind)
    module = theirs.model.layers[layer].get_submodule(path)

    def tripled(module, args, output):
        return (output[0] * 3, *output[1:]) if isinstance(output, tuple) else output * 3

    handle = module.register_forward_hook(tripled)
    expected = hf_truth.logits_of(theirs, TOKENS)
    handle.remove()
    name = f"blocks.{layer}.mixer.hook_out"
    close(ours.run_with_hooks(TOKENS, fwd_hooks=[(name, lambda x, hook: x * 3)]), expected)
    assert not torch.allclose(expected, ours(TOKENS))


@pytest.mark.parametrize("kind", ["qwen3_next", "qwen3_5_text"])
def test_queries_and_gates_are_views_of_one_matrix(kind: str):
    theirs, attn = theirs_of(kind), ours_of(kind).blocks[1].attn
    q_proj = theirs.model.layers[1].self_attn.q_proj
    storage = q_proj.weight.untyped_storage().data_ptr()
    assert attn.W_Q.untyped_storage().data_ptr() == storage
    assert attn.gate.W_gate.untyped_storage().data_ptr() == storage
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
    q, gate = q_proj(x).unflatten(-1, (4, 16)).chunk(2, dim=-1)
    torch.testing.assert_close(torch.einsum("bpd,hde->bphe", x, attn.W_Q), q)
    torch.testing.assert_close(attn.gate(x), gate.sigmoid())


# The stream adds up ------------------------------------------------------------------------------


@each
def test_writes_sum_to_the_stream(kind: str):
    ours = ours_of(kind)
    logits, cache = ours.run_with_cache(TOKENS)
    for layer in range(1, 5):
        end = "resid_post" if layer == 4 else "resid_pre"
        whole = cache[end, min(layer, 3)]
        for parts in (cache.decompose_resid(layer), cache.get_full_resid_decomposition(layer)):
            close(parts.sum(0), whole)
    if ours.unembed is None:
        return
    if (cap := ours.unembed.softcap) is not None:
        logits = torch.atanh(logits / cap) * cap
    norm = ours.ln_final
    bias = 0 if norm.live("b") is None else norm.live("b") @ ours.W_U[:, 7]
    attributed = cache.logit_attrs(cache.decompose_resid(), 7).sum(0) + bias
    close(attributed + ours.b_U[7], logits[..., 7])


def test_what_a_mixer_adds_has_a_label_of_its_own():
    _, cache = ours_of("falcon_h1").run_with_cache(TOKENS)
    _, labels = cache.decompose_resid(return_labels=True)
    assert labels[1:4] == ["0_mixer_out", "0_attn_out", "0_mlp_out"]
    close(cache["blocks.0.hook_mixer_out"], cache["blocks.0.mixer.hook_out"] * 1.4)


def test_a_stream_that_is_normed_before_each_branch():
    """MiniMax: ``h = norm(x)``, then ``alpha h + beta branch(h)``."""
    _, c = ours_of("minimax").run_with_cache(TOKENS)
    ln1, ln2 = ours_of("minimax").blocks[1].ln1, ours_of("minimax").blocks[1].ln2
    read = c["normalized", 1, "ln1"] * ln1.w
    close(c["resid_mid", 1], 0.8 * read + c["attn_out", 1])
    read = c["normalized", 1, "ln2"] * ln2.w
    close(c["resid_post", 1], 1.3 * read + c["mlp_out", 1])


def test_a_stream_scaled_in_each_dimension():
    block, theirs = ours_of("doge").blocks[2], theirs_of("doge").model.layers[2]
    _, c = ours_of("doge").run_with_cache(TOKENS)
    close(c["resid_mid", 2], theirs.input_residual * c["resid_pre", 2] + c["attn_out", 2])
    assert block.attn_keep.factor.data_ptr() == theirs.input_residual.data_ptr()


# Processing, generation --------------------------------------------------------------------------


@each
def test_processing_keeps_log_probs_and_says_what_it_leaves(kind: str):
    ours = hookedlm.load(theirs_of(kind))
    before = ours(TOKENS).log_softmax(-1)
    record = fold_ln(ours)
    fold_value_biases(ours)
    assert (ours(TOKENS).log_softmax(-1) - before).abs().max() < 1e-4
    mixing = [name for name in ours.hook_dict if name.endswith("hook_mixer_out")]
    told = "\n".join(record.skipped)
    for name in mixing:
        where = f"{name.rpartition('.')[0]}.ln1"
        assert f"{where}: a mixer" in told or f"{where}: it normalises" in told
    if kind != "rwkv":
        with pytest.raises(ProcessingError):
            center_writing_weights(ours)


@each
@pytest.mark.parametrize("cached", [True, False], ids=["cached", "uncached"])
def test_generation(kind: str, cached: bool):
    options = dict(max_new_tokens=5, do_sample=False, stop_at_eos=False)
    for mask in (None, MASK):
        kept = cached and kind not in NO_CACHE
        asked = dict(max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=0)
        given = {} if mask is None else {"attention_mask": mask}
        expected = theirs_of(kind).generate(TOKENS, use_cache=kept, **given, **asked)[:, -5:]
        got = ours_of(kind).generate(
            TOKENS, attention_mask=mask, use_past_kv_cache=cached, **options
        )
        assert torch.equal(got[:, -5:], expected)


@pytest.mark.parametrize("kind", NO_CACHE)
def test_a_state_of_its_own_is_no_cache(kind: str):
    with pytest.raises(InputError, match="use_past_kv_cache=False"):
        ours_of(kind)(TOKENS, past_kv_cache=DynamicCache())


def test_a_family_with_a_cache_of_its_own_takes_no_other():
    from transformers.models.minimax.modeling_minimax import MiniMaxCache

    ours = ours_of("minimax")
    with pytest.raises(InputError, match="MiniMaxCache"):
        ours(TOKENS, past_kv_cache=DynamicCache())
    past = MiniMaxCache()
    ours(TOKENS[:, :8], past_kv_cache=past)
    close(ours(TOKENS[:, 8:], past_kv_cache=past), ours(TOKENS)[:, 8:])


def test_weights_that_a_model_halves_when_it_runs_are_left_whole():
    """RWKV divides weights in place, against overflow, the first time it runs."""
    sizes = SIZES | KINDS["rwkv"] | {"num_hidden_layers": 6, "rescale_every": 2}
    theirs = Tiny("rwkv", "rescaled", sizes).build()
    before = {name: p.clone() for name, p in theirs.named_parameters()}
    ours = hookedlm.load(theirs)
    assert all(torch.equal(p, before[name]) for name, p in theirs.named_parameters())
    expected = theirs(TOKENS).logits  # here it divides
    output = theirs.rwkv.blocks[5].attention.output
    assert torch.equal(output.weight * 4, before["rwkv.blocks.5.attention.output.weight"])
    for model in (ours, hookedlm.load(theirs)):
        close(model(TOKENS), expected)
