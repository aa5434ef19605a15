"""The text decoders whose blocks have a uniform form: all of it is there.

Every hook point, in its declared shape; heads sum to what attention computes, neurons and experts
to what the MLP computes. `tests/test_identities.py` has the sums of the stream, over every family.
"""

from __future__ import annotations

import pytest
import torch
from hook_sets import misshapen, missing
from measuring import model_of, tokens_for
from torch import Tensor

import hookedlm
from hookedlm import HookedTransformer
from hookedlm.layers.moe import MoE

UNIFORM = """
afmoe apertus arcee aria_text axk1 beam biogpt bitnet bloom codegen cohere cohere2 cohere2_moe
cohere_compass_text ctrl cwm dbrx deepseek_v2 deepseek_v3 dots1 emu3 ernie4_5 ernie4_5_moe exaone4
exaone_moe falcon flex_olmo flint gemma gemma2 gemma3_text gemma4_text gemma4_unified_text glm glm4
glm4_moe glm4_moe_lite gpt-sw3 gpt2 gpt_bigcode gpt_neo gpt_neox gpt_neox_japanese gpt_oss gptj
granite granite_swa granitemoe granitemoe_swa granitemoeshared helium hunyuan_v1_dense
hunyuan_v1_moe hy_v3 hyperclovax internlm3 iquestcoder jais2 kolibri1 laguna llama llama4
llama4_text mellum mimo_v2_flash minicpm3 minimax_m2 ministral ministral3 mistral mixtral
modernbert-decoder moshi mpt nanochat nemotron olmo olmo2 olmo3 olmoe openai-gpt opt persimmon phi
phi3 phimoe qwen2 qwen2_moe qwen3 qwen3_moe seed_oss smollm3 solar_open stablelm starcoder2
vaultgemma xglm youtu
""".split()
"""Causal-LM types of transformers 5.23 whose blocks are attention and an MLP on one stream."""

TABLES = {
    *("biogpt", "ctrl", "gpt-sw3", "gpt2", "gpt_bigcode", "gpt_neo", "openai-gpt", "opt", "xglm"),
}
"""Types with a table of positions, learned or of sines."""


@pytest.fixture(scope="module", params=UNIFORM)
def ran(request):
    """(type, model, tokens, every activation, what attention and MLP of each layer returned)."""
    theirs = model_of(request.param)
    model, tokens = hookedlm.load(theirs, strict=True), tokens_for(theirs)
    cache, written = recorded(model, tokens)
    return request.param, model, tokens, cache, written


def recorded(model: HookedTransformer, tokens: Tensor):
    """Every activation, and what the attention and the MLP of each layer returned."""
    written: dict[tuple[str, int], Tensor] = {}
    handles = [
        block._modules[part].register_forward_hook(
            lambda _module, _inputs, output, key=(part, i): written.update({key: output})
        )
        for i, block in enumerate(model.blocks)
        for part in ("attn", "mlp")
    ]
    try:
        with torch.no_grad():
            _, cache = model.run_with_cache(tokens, names_filter=list(model.hook_dict))
    finally:
        for handle in handles:
            handle.remove()
    return cache, written


def adds_up(total: Tensor, whole: Tensor, what: object) -> None:
    assert total.shape == whole.shape, what
    error = (total - whole).norm() / whole.norm()
    assert error <= 1e-5, f"{what}: {error:.1e} of the whole away"


def test_there_are_98_of_them():
    assert len(UNIFORM) == len(set(UNIFORM)) == 98


def test_every_hook_point_is_there_and_fires(ran):
    kind, model, _, cache, _ = ran
    assert missing(model) == set()
    assert set(cache) == set(model.hook_dict)
    assert ("hook_pos_embed" in model.hook_dict) == (kind in TABLES)


def test_every_tensor_has_its_declared_axes(ran):
    _, model, tokens, cache, _ = ran
    assert misshapen(model, cache, tokens) == {}


def test_scores_are_masked_and_rows_of_the_pattern_sum_to_one(ran):
    _, model, _, cache, _ = ran
    later = torch.ones(*cache["pattern", 0].shape[-2:]).triu(1).bool()
    for i, block in enumerate(model.blocks):
        assert cache["attn_scores", i][..., later].isneginf().all()
        total = cache["pattern", i].sum(-1)
        assert (total <= 1 + 1e-5).all()
        if not block.attn.spec.sinks:
            assert torch.allclose(total, torch.ones(()), atol=1e-5)


def test_heads_sum_to_what_attention_computes(ran):
    _, model, _, cache, written = ran
    for i, block in enumerate(model.blocks):
        b_O = block.attn.live("b_O")
        total = cache["result", i].sum(-2)
        adds_up(total if b_O is None else total + b_O, written["attn", i], i)


def test_neurons_or_experts_sum_to_what_the_mlp_computes(ran):
    _, model, _, cache, written = ran
    for i, block in enumerate(model.blocks):
        mlp = block.mlp
        if isinstance(mlp, MoE):
            total = cache[f"blocks.{i}.mlp.hook_expert_out"].sum(-2)
            if mlp.shared is not None:
                total = total + cache[f"blocks.{i}.mlp.hook_shared_out"]
        else:
            b_out = mlp.live("b_out")
            total = cache["post", i] @ mlp.W_out + (0 if b_out is None else b_out)
        adds_up(total, written["mlp", i], i)
