"""Weights under TransformerLens' names: Hugging Face's memory, edited, stacked and trained."""

from __future__ import annotations

import copy
import gc
import math
import subprocess
import sys
import weakref
from collections.abc import Callable

import pytest
import torch
from hf_truth import block_list, logits_of, padded_batch
from tiny import TINIES, VOCAB, one_per_family, tinies
from torch import Tensor, nn

import hookedlm
from hookedlm import FactoredMatrix, HookedTransformer
from hookedlm.errors import WeightError


def build(name: str) -> nn.Module:
    [tiny] = [tiny for tiny in TINIES if tiny.id == name]
    return tiny.build()


def some_tokens(batch: int = 2, n: int = 9, seed: int = 0) -> Tensor:
    return padded_batch(VOCAB, [n] * batch, "left", seed=seed)[0]


def close(a: Tensor, b: Tensor, tolerance: float = 2e-5) -> bool:
    assert a.shape == b.shape
    return torch.allclose(a, b, rtol=tolerance, atol=tolerance)


def storages(tensors) -> set[int]:
    return {x.untyped_storage().data_ptr() for x in tensors}


def copies_qkv(model: HookedTransformer) -> bool:
    """Whether queries had to be cut out of a matrix in which they interleave with keys."""
    return "they are copied" in str(model.fidelity())


# --- The same memory -----------------------------------------------------------------------------


@pytest.mark.parametrize("tiny", TINIES, ids=lambda tiny: tiny.id)
def test_every_weight_is_a_view(tiny):
    theirs = tiny.build()
    model = hookedlm.load(theirs)
    if copies_qkv(model):
        pytest.skip("q, k and v interleave in one matrix")
    known = storages(theirs.parameters())
    for name, parameter in model.named_parameters():
        assert parameter.untyped_storage().data_ptr() in known, name
    # And the other way round: nothing of theirs is left out.
    assert storages(model.parameters()) == known


MEASURE = """
import ctypes, gc, os, sys, weakref
import torch
from transformers import AutoConfig, AutoModelForCausalLM
import hookedlm

def resident():
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what the allocator keeps for later is nobody's
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

def build(kind):
    options = {
        "gpt2": dict(n_layer=12, n_embd=768, n_head=12),
        "llama": dict(hidden_size=768, intermediate_size=2048, num_hidden_layers=12,
                      num_attention_heads=12, num_key_value_heads=4, vocab_size=32000),
    }[kind]
    config = AutoConfig.for_model(kind, **options)
    return AutoModelForCausalLM.from_config(config).eval()

torch.set_num_threads(1)
tokens = torch.randint(1000, (1, 8))
# Whatever a first conversion and pass import or allocate for good is no model's memory.
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
small = {"gpt2": GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=16, n_head=2)),
         "llama": LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, hidden_size=16,
             intermediate_size=16, num_attention_heads=2, num_key_value_heads=1))}[sys.argv[1]]
with torch.no_grad():
    hookedlm.load(small)(tokens)
theirs = build(sys.argv[1])
with torch.no_grad():
    theirs(tokens)
size = sum(p.numel() * p.element_size() for p in theirs.parameters())
before = resident()
model = hookedlm.load(theirs)
with torch.no_grad():
    model(tokens)
after = resident()
gone = weakref.ref(model)
del model
left = resident()
assert gone() is None
del theirs
freed = after - resident()
print(size, after - before, left - before, freed)
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_converting_costs_no_memory(kind: str):
    """Resident memory of a process of its own, about 100 million parameters."""
    if sys.platform != "linux":
        pytest.skip("resident memory is read from /proc")
    run = subprocess.run(
        [sys.executable, "-c", MEASURE, kind], capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr
    size, added, left, freed = map(int, run.stdout.split())
    assert size > 300e6
    assert added < 0.05 * size
    assert left < 0.02 * size
    assert freed > 0.95 * size


@pytest.mark.parametrize(
    "tiny",
    [tiny for tiny in one_per_family() if tiny.model_type in ("gpt2", "llama", "mixtral", "gptj")],
    ids=lambda tiny: tiny.id,
)
def test_nothing_keeps_a_model_alive(tiny):
    theirs = tiny.build()
    model = hookedlm.load(theirs)
    model.run_with_cache(some_tokens())
    model.generate(some_tokens(), max_new_tokens=2, stop_at_eos=False)
    gone = [weakref.ref(model), weakref.ref(model.blocks[1]), weakref.ref(model.embed.W_E)]
    del model
    gc.collect()
    assert [ref() for ref in gone] == [None, None, None]
    # Nor does the model keep Hugging Face's.
    model = hookedlm.load(theirs)
    other = weakref.ref(theirs)
    del theirs
    gc.collect()
    assert other() is None
    model(some_tokens())


@pytest.mark.parametrize("tiny", one_per_family(), ids=lambda tiny: tiny.id)
def test_hugging_faces_module_is_left_alone(tiny):
    theirs = tiny.build()
    names = list(dict(theirs.named_modules()))
    before = {name: value.clone() for name, value in theirs.state_dict().items()}
    logits = logits_of(theirs, some_tokens())
    model = hookedlm.load(theirs)
    model.run_with_cache(some_tokens())
    model(some_tokens(), return_type="loss").backward()
    assert list(dict(theirs.named_modules())) == names
    assert all(torch.equal(value, before[n]) for n, value in theirs.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in theirs.parameters())
    assert not theirs.training
    assert torch.equal(logits_of(theirs, some_tokens()), logits)


# --- Edits ---------------------------------------------------------------------------------------

# Where a family keeps its fused projection: all of them, and two that keep the three apart.
FUSED = {
    "gpt2-base": "attn.c_attn",
    "gpt_bigcode-multi_query": "attn.c_attn",
    "gpt_neox-parallel": "attention.query_key_value",
    "bloom-base": "self_attention.query_key_value",
    "falcon-new_two_norms": "self_attention.query_key_value",
    "falcon-multi_query": "self_attention.query_key_value",
    "mpt-base": "attn.Wqkv",
    "phi3-grouped": "self_attn.qkv_proj",
}
APART = ["llama-grouped", "gptj-base", "opt-pre_norm"]


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize("name", [*FUSED, *APART])
def test_in_place_edits_take_effect(name: str, grad: bool):
    """Each edit changes the logits, and Hugging Face's module, whose memory it is, by as much."""
    theirs = build(name)
    model = hookedlm.load(theirs)
    tokens = some_tokens()
    block = model.blocks[1]
    edits: list[tuple[Tensor, tuple]] = [
        (block.attn.W_Q, (1,)),
        (block.attn.W_K, (0, slice(3))),
        (block.attn.W_V, (0,)),
        (block.attn.W_O, (2,)),
        (block.mlp.W_in, (slice(None), slice(5, 20))),
        (block.mlp.W_out, (slice(5, 20),)),
        (model.embed.W_E, (tokens[0, 0],)),
        (model.unembed.W_U, (slice(None), 7)),
    ]
    for biased, bias in ((block.attn, "b_Q"), (block.attn, "b_V"), (block.mlp, "b_in")):
        if biased.live(bias) is not None:
            edits.append((biased.live(bias), (slice(None),)))
    with torch.set_grad_enabled(grad):
        model(tokens)  # so that something stale could have been kept
        before = model(tokens)
        for weight, where in edits:
            with torch.no_grad():
                weight[where] += torch.randn_like(weight[where])
            after = model(tokens)
            assert not torch.allclose(after, before, atol=1e-4)
            if not copies_qkv(model):
                assert close(after, logits_of(theirs, tokens), 1e-4)
            before = after


@pytest.mark.parametrize("tiny", one_per_family(), ids=lambda tiny: tiny.id)
def test_absent_biases_come_into_being(tiny):
    """A bias that the family lacks reads as zeros; writing to it is an addition to the output."""
    model = hookedlm.load(tiny.build())
    tokens, mask = padded_batch(VOCAB, [9, 5], "left", seed=1)
    real = mask.bool()
    with torch.no_grad():
        before = model(tokens, attention_mask=mask)
        for attn in [block.attn for block in model.blocks]:
            for name in ("b_Q", "b_K", "b_V", "b_O"):
                was = attn.live(name)
                bias = attn.__getattr__(name)
                assert isinstance(bias, nn.Parameter)
                assert bias is attn.__getattr__(name)
                assert bias is attn.live(name)
                assert was is bias or not bias.any()
        assert model.blocks[0].attn.b_Q.shape == model.blocks[0].attn.W_Q.shape[::2]
        after = model(tokens, attention_mask=mask)
        assert close(after[real], before[real], 1e-4)
        attn = model.blocks[1].attn
        for name, hook in (("b_Q", "hook_q"), ("b_O", "hook_attn_out")):
            bias = attn.__getattr__(name)
            quantity = f"blocks.1.attn.{hook}" if hook == "hook_q" else f"blocks.1.{hook}"
            if hook == "hook_attn_out" and type(model.blocks[1].ln1_post).__name__ != "Same":
                continue  # a norm stands behind it
            if attn.spec.qk_norm is not None or attn.spec.clip is not None:
                continue
            kept = model.run_with_cache(tokens, names_filter=quantity)[1][quantity]
            bias += 0.5
            edited = model.run_with_cache(tokens, names_filter=quantity)[1][quantity]
            assert close(
                edited,
                kept + 0.5 * model.blocks[1].spec.residual_scale if name == "b_O" else kept + 0.5,
                1e-4,
            )
            assert not close(model(tokens, attention_mask=mask)[real], after[real])


@pytest.mark.parametrize("name", [*FUSED, *APART])
@pytest.mark.parametrize("part", ["W_Q", "W_K", "W_V"])
def test_assigning_a_parameter(name: str, part: str):
    """A new tensor in one of three places is used, not what the fused matrix still holds."""
    theirs, plain = build(name), build(name)
    model = hookedlm.load(theirs)
    tokens = some_tokens()
    with torch.no_grad():
        before = model(tokens)
        attn = model.blocks[1].attn
        new = nn.Parameter(torch.randn(attn.__getattr__(part).shape))
        setattr(attn, part, new)
        after = model(tokens)
        assert not close(after, before, 1e-3)
        # The same, written into a second copy's memory.
        other = hookedlm.load(plain)
        other.blocks[1].attn.__getattr__(part).copy_(new)
        assert close(after, other(tokens), 1e-4)
        if not copies_qkv(other):
            assert close(after, logits_of(plain, tokens), 1e-4)
        # Theirs did not hear of it, and editing what was assigned still counts.
        assert close(logits_of(theirs, tokens), before, 1e-4)
        new.zero_()
        assert not close(model(tokens), after, 1e-3)
    with torch.enable_grad():
        model(tokens).sum().backward()
    assert new.grad is not None


def test_data_and_views_of_weights_may_be_replaced():
    model = hookedlm.load(build("gpt2-base"))
    tokens = some_tokens()
    with torch.no_grad():
        before = model(tokens)
        attn = model.blocks[0].attn
        attn.W_K.data = attn.W_K.data.flip(0)
        after = model(tokens)
        assert not close(after, before, 1e-3)
        attn.W_K.data = attn.W_K.data.flip(0)
        assert close(model(tokens), before, 1e-5)


# --- Stacks --------------------------------------------------------------------------------------


def linear(block: nn.Module, path: str) -> Tensor:
    """The matrix [in, out] of a linear layer, whichever way round it is stored."""
    module = block.get_submodule(path)
    return module.weight if type(module).__name__ == "Conv1D" else module.weight.t()


def heads(W: Tensor, n: int) -> Tensor:
    """[d_model, n * d_head] -> [n, d_model, d_head], column block by column block."""
    return torch.stack(W.chunk(n, dim=1))


def expected_gpt2(block: nn.Module) -> dict[str, Tensor]:
    Q, K, V = linear(block, "attn.c_attn").chunk(3, dim=1)
    b_Q, b_K, b_V = block.attn.c_attn.bias.chunk(3)
    return {
        "W_Q": heads(Q, 4),
        "W_K": heads(K, 4),
        "W_V": heads(V, 4),
        "W_O": torch.stack(linear(block, "attn.c_proj").chunk(4)),
        "b_Q": torch.stack(b_Q.chunk(4)),
        "b_K": torch.stack(b_K.chunk(4)),
        "b_V": torch.stack(b_V.chunk(4)),
        "b_O": block.attn.c_proj.bias,
        "W_in": linear(block, "mlp.c_fc"),
        "b_in": block.mlp.c_fc.bias,
        "W_out": linear(block, "mlp.c_proj"),
        "b_out": block.mlp.c_proj.bias,
    }


def expected_llama(block: nn.Module) -> dict[str, Tensor]:
    K, V = (heads(linear(block, f"self_attn.{x}_proj"), 2) for x in "kv")
    twice = [0, 0, 1, 1]  # each key and value head serves two neighbouring query heads
    return {
        "W_Q": heads(linear(block, "self_attn.q_proj"), 4),
        "W_K": K[twice],
        "W_V": V[twice],
        "W_O": torch.stack(linear(block, "self_attn.o_proj").chunk(4)),
        "b_Q": torch.zeros(4, 8),
        "b_K": torch.zeros(4, 8),
        "b_V": torch.zeros(4, 8),
        "b_O": torch.zeros(32),
        "W_gate": linear(block, "mlp.gate_proj"),
        "W_in": linear(block, "mlp.up_proj"),
        "b_in": torch.zeros(48),
        "W_out": linear(block, "mlp.down_proj"),
        "b_out": torch.zeros(32),
    }


def expected_neox(block: nn.Module) -> dict[str, Tensor]:
    """Stored head by head: q, k, v of head 0, of head 1, ..."""
    rows = block.attention.query_key_value.weight.split(8)
    biases = block.attention.query_key_value.bias.split(8)
    return {
        "W_Q": torch.stack([row.t() for row in rows[0::3]]),
        "W_K": torch.stack([row.t() for row in rows[1::3]]),
        "W_V": torch.stack([row.t() for row in rows[2::3]]),
        "b_Q": torch.stack(biases[0::3]),
        "b_K": torch.stack(biases[1::3]),
        "b_V": torch.stack(biases[2::3]),
        "W_O": torch.stack(linear(block, "attention.dense").chunk(4)),
        "b_O": block.attention.dense.bias,
        "W_in": linear(block, "mlp.dense_h_to_4h"),
        "b_out": block.mlp.dense_4h_to_h.bias,
    }


def expected_falcon(block: nn.Module) -> dict[str, Tensor]:
    """Stored group by group: two queries, their key, their value."""
    rows = block.self_attention.query_key_value.weight.split(8)
    q = [rows[i] for i in (0, 1, 4, 5)]
    k, v = [rows[i] for i in (2, 2, 6, 6)], [rows[i] for i in (3, 3, 7, 7)]
    return {
        "W_Q": torch.stack([row.t() for row in q]),
        "W_K": torch.stack([row.t() for row in k]),
        "W_V": torch.stack([row.t() for row in v]),
        "W_O": torch.stack(linear(block, "self_attention.dense").chunk(4)),
        "W_in": linear(block, "mlp.dense_h_to_4h"),
        "b_V": torch.zeros(4, 8),
    }


EXPECTED: dict[str, Callable[[nn.Module], dict[str, Tensor]]] = {
    "gpt2-base": expected_gpt2,
    "gpt2-untied": expected_gpt2,
    "llama-grouped": expected_llama,
    "gpt_neox-parallel": expected_neox,
    "falcon-new_two_norms": expected_falcon,
}


@pytest.mark.parametrize("name", list(EXPECTED))
def test_stacks(name: str):
    theirs = build(name)
    model = hookedlm.load(theirs)
    layers = [EXPECTED[name](block) for block in block_list(theirs)]
    for weight in layers[0]:
        stack = getattr(model, weight)
        assert torch.equal(stack, torch.stack([layer[weight] for layer in layers])), weight
    # Each product, for one head of one layer, by plain matrix multiplication.
    W = layers[2]
    assert isinstance(model.QK, FactoredMatrix)
    assert model.QK.shape == (3, 4, 32, 32)
    assert close(model.QK.AB[2, 3], W["W_Q"][3] @ W["W_K"][3].t())
    assert close(model.OV.AB[2, 1], W["W_V"][1] @ W["W_O"][1])
    assert close(model.blocks[2].attn.QK.AB, model.QK.AB[2])
    assert close(model.blocks[2].attn.OV.AB, model.OV.AB[2])
    assert torch.equal(model.W_E, theirs.get_input_embeddings().weight)
    assert torch.equal(model.W_U, theirs.get_output_embeddings().weight.t())
    assert torch.equal(model.b_U, torch.zeros(VOCAB))
    assert model.all_head_labels()[:5] == ["L0H0", "L0H1", "L0H2", "L0H3", "L1H0"]


def test_grouped_parameters_stay_grouped():
    model = hookedlm.load(build("llama-grouped"))
    attn = model.blocks[0].attn
    assert attn.W_K.shape == attn.W_V.shape == (2, 32, 8)
    assert attn.b_K.shape == (2, 8)
    assert model.W_K.shape == (3, 4, 32, 8)


def test_positions():
    theirs = build("gpt2-base")
    model = hookedlm.load(theirs)
    assert torch.equal(model.W_pos, theirs.transformer.wpe.weight)
    assert torch.equal(model.W_E_pos, torch.cat([model.W_E, model.W_pos]))
    for name, kind in (("llama-grouped", "rotary"), ("bloom-base", "alibi")):
        with pytest.raises(WeightError, match=f"no W_pos: .*{kind}"):
            hookedlm.load(build(name)).W_pos  # noqa: B018
    # OPT looks positions up two rows further down.
    opt = build("opt-pre_norm")
    assert torch.equal(hookedlm.load(opt).W_pos, opt.model.decoder.embed_positions.weight[2:])


def test_gates():
    assert hookedlm.load(build("gpt2-base")).W_gate is None
    assert hookedlm.load(build("llama-grouped")).W_gate.shape == (3, 32, 48)


def test_scaled_heads():
    """Logits are the normed stream times W_U plus b_U, whatever the family multiplies by."""
    for name in ("granite-multipliers", "cohere-biased", "opt-pre_norm_projected", "gptj-base"):
        model = hookedlm.load(build(name))
        logits, cache = model.run_with_cache(some_tokens())
        normed = model.ln_final(cache["resid_post", -1])
        assert close(logits, normed @ model.W_U + model.b_U, 1e-4), name


@pytest.mark.parametrize("part", ["W_in", "W_out", "b_in"])
def test_experts_have_no_plain_matrix(part: str):
    model = hookedlm.load(build("mixtral-base"))
    with pytest.raises(WeightError, match=f"no {part} for all layers: layer 0 has none"):
        getattr(model, part)
    assert model.W_Q.shape == (3, 4, 32, 8)


def test_some_layers_have_no_plain_matrix():
    model = hookedlm.load(build("qwen3_moe-mlp_only_layers"))
    with pytest.raises(WeightError, match=r"layer 0 has none.*model.blocks\[l\].mlp.W_in"):
        model.W_in  # noqa: B018
    assert model.blocks[1].mlp.W_in.shape == (32, 48)


# --- Gradients and training ----------------------------------------------------------------------


def gradients(module: nn.Module) -> nn.Module:
    """A copy of a module whose weights are the original's gradients."""
    twin = copy.deepcopy(module)
    for ours, theirs in zip(twin.parameters(), module.parameters(), strict=True):
        assert theirs.grad is not None
        ours.data = theirs.grad.clone()
    return twin


@pytest.mark.parametrize(
    "name",
    [
        "gpt2-base",
        "gpt2-untied",
        "llama-grouped",
        "gpt_neox-parallel",
    ],
)
def test_gradients(name: str):
    theirs = build(name)
    model = hookedlm.load(theirs)
    tokens = some_tokens(3)
    model(tokens, return_type="loss").backward()
    theirs(input_ids=tokens, labels=tokens).loss.backward()
    grads = gradients(theirs)
    expected = [EXPECTED[name](block) for block in block_list(grads)]
    kv = {"W_K", "W_V", "b_K", "b_V"}
    for layer, block in enumerate(model.blocks):
        for weight, grad in expected[layer].items():
            part = block.attn if weight in {*kv, "W_Q", "W_O", "b_Q", "b_O"} else block.mlp
            if part.live(weight) is None:
                continue
            if name == "llama-grouped" and weight in kv:
                grad = grad[::2]
            assert close(part.live(weight).grad, grad, 1e-5), (layer, weight)
    head = grads.get_output_embeddings().weight
    ours = model.unembed.W_U.grad.t()
    if theirs.config.tie_word_embeddings:
        ours = ours + model.embed.W_E.grad
    assert close(ours, head, 1e-5)


@pytest.mark.parametrize("tiny", one_per_family(), ids=lambda tiny: tiny.id)
def test_every_parameter_learns(tiny):
    """Training by gradient descent, all weights, lowers the loss, and Hugging Face's with it."""
    theirs = tiny.build()
    model = hookedlm.load(theirs)
    tokens = some_tokens(4, 12)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.01)
    losses = []
    for _ in range(6):
        loss = model(tokens, return_type="loss")
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    # (One norm that two branches share may have its gradient in one of its two names.)
    learnt = {p.data_ptr() for p in model.parameters() if p.grad is not None}
    for name, parameter in model.named_parameters():
        assert parameter.data_ptr() in learnt, name
    after = model(tokens, return_type="loss").item()
    assert after < losses[0] - 0.002
    if copies_qkv(model):
        return
    assert math.isclose(
        theirs(input_ids=tokens, labels=tokens).loss.item(), after, rel_tol=1e-3, abs_tol=1e-3
    )


def test_frozen_stays_frozen():
    theirs = build("gpt2-base").requires_grad_(False)
    model = hookedlm.load(theirs)
    assert not any(p.requires_grad for p in model.parameters())
    assert not model(some_tokens()).requires_grad
    model.requires_grad_(True)
    assert model(some_tokens()).requires_grad


def test_tinies_of_a_family_are_found():
    assert len(tinies("gpt2")) > 1
    assert isinstance(hookedlm.load(build("gpt2-base")), HookedTransformer)
