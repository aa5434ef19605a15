"""Devices, dtypes, copies and state dicts of models whose weights share memory."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from conftest import word_tokenizer
from hf_truth import logits_of, padded_batch
from tiny import TINIES, VOCAB, one_per_family
from torch import Tensor, nn

import hookedlm
from hookedlm import HookedTransformer
from hookedlm.layers.moe import MoE

each_family = pytest.mark.parametrize("tiny", one_per_family(), ids=lambda tiny: tiny.id)
TOKENS, MASK = padded_batch(VOCAB, [9, 5], "left", seed=1)
REAL = MASK.bool()
TOLERANCES = {torch.float64: 1e-5, torch.bfloat16: 0.15, torch.float16: 0.04}


def build(name: str) -> nn.Module:
    [tiny] = [tiny for tiny in TINIES if tiny.id == name]
    return tiny.build()


@torch.no_grad()
def logits(model: HookedTransformer) -> Tensor:
    return model(TOKENS, attention_mask=MASK)[REAL]


def held(model: HookedTransformer) -> int:
    """Bytes of all storages that the model and the modules beside it hold."""
    roots = [model, *model._outside_modules()]
    tensors = [x for root in roots for x in (*root.parameters(), *root.buffers())]
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage() for x in tensors}
    return sum(storage.nbytes() for storage in storages.values())


def relations(model: HookedTransformer) -> set[tuple[str, str]]:
    """Which parameters lie in one storage."""
    named = list(model.named_parameters(remove_duplicate=False))
    return {
        (a, b)
        for a, x in named
        for b, y in named
        if a < b and x.untyped_storage().data_ptr() == y.untyped_storage().data_ptr()
    }


# --- State dicts ---------------------------------------------------------------------------------

ATTENTION = [f"attn.{kind}_{x}" for kind in "Wb" for x in "QKVO"]
GPT2_NAMES = {
    "embed.W_E",
    "pos_embed.W_pos",
    "ln_final.w",
    "ln_final.b",
    "unembed.W_U",
    "unembed.b_U",
    *(
        f"blocks.{i}.{name}"
        for i in range(3)
        for name in (
            *ATTENTION,
            *("ln1.w", "ln1.b", "ln2.w", "ln2.b"),
            *("mlp.W_in", "mlp.b_in", "mlp.W_out", "mlp.b_out"),
        )
    ),
}
LLAMA_NAMES = {
    "embed.W_E",
    "ln_final.w",
    "unembed.W_U",
    "unembed.b_U",
    *(
        f"blocks.{i}.{name}"
        for i in range(3)
        for name in (
            *ATTENTION,
            *("ln1.w", "ln2.w"),
            *("mlp.W_gate", "mlp.W_in", "mlp.b_in", "mlp.W_out", "mlp.b_out"),
        )
    ),
}
GEMMA2_NAMES = {f"blocks.{i}.ln{j}_post.w" for i in range(3) for j in (1, 2)}
QWEN3_NAMES = {f"blocks.{i}.attn.{x}_norm.w" for i in range(3) for x in "qk"}


def test_names():
    assert set(hookedlm.load(build("gpt2-base")).state_dict()) == GPT2_NAMES
    llama = set(hookedlm.load(build("llama-grouped")).state_dict())
    assert llama - {f"blocks.{i}.mlp.b_gate" for i in range(3)} == LLAMA_NAMES
    assert set(hookedlm.load(build("gemma2-base")).state_dict()) - llama == GEMMA2_NAMES
    assert set(hookedlm.load(build("qwen3-base")).state_dict()) - llama == QWEN3_NAMES


def test_saving_changes_nothing():
    """Absent biases are saved as zeros and stay absent: they would cost time in every pass."""
    model = hookedlm.load(build("llama-grouped"))
    state = model.state_dict()
    assert not state["blocks.0.attn.b_Q"].any()
    assert state["blocks.0.attn.b_K"].shape == (2, 8)
    assert model.blocks[0].attn.live("b_Q") is None
    model.load_state_dict(state)
    assert model.blocks[0].attn.live("b_Q") is None
    state["blocks.0.attn.b_Q"] = torch.ones(4, 8)
    before = logits(model)
    model.load_state_dict(state)
    assert torch.equal(model.blocks[0].attn.live("b_Q"), torch.ones(4, 8))
    assert not torch.allclose(logits(model), before, atol=1e-3)


@each_family
def test_state_dict_round_trip(tiny):
    ours, other = hookedlm.load(tiny.build()), hookedlm.load(tiny.build(seed=1))
    expected = logits(ours)
    assert not torch.allclose(logits(other), expected, atol=1e-2)
    state = ours.state_dict()
    names = dict(state)
    other.load_state_dict(state)
    assert torch.allclose(logits(other), expected, atol=1e-5)
    assert list(state) == list(names)  # the caller's dictionary is left alone
    assert all(state[name] is value for name, value in names.items())
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=True)
    third = hookedlm.load(tiny.build(seed=2))
    third.load_state_dict(loaded)
    assert torch.allclose(logits(third), expected, atol=1e-5)


def test_loading_reaches_the_shared_memory():
    """A fused matrix and Hugging Face's module see what is loaded."""
    theirs = build("gpt2-base")
    model = hookedlm.load(theirs)
    model.load_state_dict(
        hookedlm.load(next(t for t in TINIES if t.id == "gpt2-base").build(seed=1)).state_dict()
    )
    assert torch.allclose(logits_of(theirs, TOKENS, MASK)[REAL], logits(model), atol=1e-5)


@pytest.mark.parametrize("name", ["gpt2-base", "gptj-base"])
def test_untied_weights_into_tied_ones(name: str):
    """Processed weights, whose unembedding is no longer the embedding, into a fresh model."""
    processed = HookedTransformer.from_pretrained("tiny", hf_model=build(name))
    state = processed.state_dict()
    theirs = build(name)
    fresh = hookedlm.load(theirs)
    for i in range(3):  # folding left no norm weights
        for part in ("w", "b"):
            for norm in (f"blocks.{i}.ln1", f"blocks.{i}.ln2", "ln_final"):
                state.setdefault(f"{norm}.{part}", torch.full((32,), float(part == "w")))
    fresh.load_state_dict(state)
    assert torch.allclose(logits(fresh), logits(processed), atol=1e-4)
    assert torch.equal(fresh.W_E, processed.W_E)
    assert torch.equal(fresh.W_U, processed.W_U)


def test_transformer_lens_names_of_grouped_queries():
    model, other = hookedlm.load(build("llama-biased")), hookedlm.load(build("llama-grouped"))
    state = other.state_dict()
    renamed = {
        name.replace(".W_K", "._W_K")
        .replace(".W_V", "._W_V")
        .replace(".b_K", "._b_K")
        .replace(".b_V", "._b_V"): value
        for name, value in state.items()
    }
    assert "blocks.0.attn._W_K" in renamed
    renamed |= {
        "blocks.0.attn.mask": torch.ones(3, 3),
        "blocks.0.attn.IGNORE": torch.tensor(-torch.inf),
        "blocks.0.attn.rotary_sin": torch.ones(3, 3),
        "blocks.0.attn.rotary_cos": torch.ones(3, 3),
    }
    model.load_state_dict(renamed)
    assert torch.allclose(logits(model), logits(other), atol=1e-5)


def test_unknown_and_missing_names():
    model = hookedlm.load(build("gpt2-base"))
    state = model.state_dict()
    with pytest.raises(RuntimeError, match=r"Unexpected.*blocks.0.attn.W_X"):
        model.load_state_dict(state | {"blocks.0.attn.W_X": torch.ones(1)})
    del state["blocks.1.mlp.W_in"]
    with pytest.raises(RuntimeError, match=r"Missing.*blocks.1.mlp.W_in"):
        model.load_state_dict(state)
    result = model.load_state_dict(state, strict=False)
    assert result.missing_keys == ["blocks.1.mlp.W_in"]
    with pytest.raises(RuntimeError, match=r"size mismatch for blocks.0.attn.b_Q"):
        model.load_state_dict(model.state_dict() | {"blocks.0.attn.b_Q": torch.zeros(4, 9)})
    llama = hookedlm.load(build("llama-grouped"))
    with pytest.raises(RuntimeError, match=r"size mismatch for blocks.0.attn.b_Q"):
        llama.load_state_dict(llama.state_dict() | {"blocks.0.attn.b_Q": torch.zeros(4, 9)})


# --- Dtypes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@each_family
def test_casting(tiny, dtype: torch.dtype):
    theirs = tiny.build()
    model = hookedlm.load(theirs)
    logits(model)
    shared, before = relations(model), held(model)
    if dtype == torch.float64 and any(isinstance(block.mlp, MoE) for block in model.blocks):
        pytest.skip("grouped experts have no float64 kernel")
    assert model.to(dtype) is model
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert model.dtype == model.cfg.dtype == dtype
    assert relations(model) == shared
    ratio = dtype.itemsize / 4
    assert held(model) < 1.02 * max(ratio, 1.0) * before if ratio > 1 else held(model) < before
    # Hugging Face's module is the user's: it keeps its dtype and its numbers.
    assert {p.dtype for p in theirs.parameters()} == {torch.float32}
    expected = logits_of(tiny.build(dtype), TOKENS, MASK)[REAL]
    if tiny.model_type in ("bloom", "mpt", "gemma2") and dtype == torch.float64:
        return  # Transformers' own masks overflow there
    ours = logits(model)
    assert ours.dtype == expected.dtype
    scale = float(expected.double().abs().max())
    assert (ours.double() - expected.double()).abs().max() < TOLERANCES[dtype] * max(1.0, scale / 8)


@pytest.mark.parametrize("name", ["gpt2-base", "llama-grouped", "gemma2-base"])
def test_cast_and_back(name: str):
    model = hookedlm.load(build(name))
    before = logits(model)
    model.to(torch.float64).to(torch.float32)
    assert torch.allclose(logits(model), before, atol=1e-6)
    assert held(model.half()) < 0.6 * held(hookedlm.load(build(name)))
    model.float()
    assert model.dtype == torch.float32
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_methods_that_cast_tell_the_config():
    model = hookedlm.load(build("gpt2-base"))
    for cast, dtype in ((model.half, torch.float16), (model.bfloat16, torch.bfloat16)):
        cast()
        assert model.dtype == model.cfg.dtype == dtype
    model.double()
    assert model.cfg.dtype == torch.float64
    model.to("cpu", torch.float32)
    assert model.cfg.dtype == torch.float32
    assert model.cfg.device == "cpu"


def test_moving_nowhere_copies_nothing():
    theirs = build("gpt2-base")
    model = hookedlm.load(theirs)
    for moved in (model.to("cpu"), model.cpu(), model.to(torch.float32), model.float()):
        assert moved is model
        assert model.embed.W_E.data_ptr() == theirs.transformer.wte.weight.data_ptr()


def test_an_edit_after_casting_takes_effect():
    """Nothing of before the cast is still in use: not fused matrices, not prepared contexts."""
    model = hookedlm.load(build("gpt2-base"))
    logits(model)
    model.to(torch.float64)
    before = logits(model)
    with torch.no_grad():
        model.blocks[0].attn.W_Q += torch.randn_like(model.blocks[0].attn.W_Q)
    after = logits(model)
    assert not torch.allclose(after, before, atol=1e-3)
    attn = model.blocks[0].attn
    assert (
        attn.fused.matrix((attn.W_Q, attn.W_K, attn.W_V), (attn.b_Q, attn.b_K, attn.b_V))
        is not None
    )


def test_meta_device():
    model = hookedlm.load(build("gpt2-base")).to("meta")
    assert model.device.type == "meta"
    assert all(p.device.type == "meta" for p in model.parameters())


def test_gradients_move_too():
    model = hookedlm.load(build("gpt2-base"))
    model(TOKENS, return_type="loss").backward()
    before = model.blocks[0].attn.W_Q.grad.clone()
    model.to(torch.float64)
    assert torch.equal(model.blocks[0].attn.W_Q.grad, before.double())


# --- Copies --------------------------------------------------------------------------------------


def twins(model: HookedTransformer, twin: HookedTransformer) -> None:
    """The same numbers, the same sharing, no memory in common."""
    assert torch.equal(logits(twin), logits(model))
    assert relations(twin) == relations(model)
    assert held(twin) <= held(model)
    ours = {p.untyped_storage().data_ptr() for p in model.parameters()}
    assert not ours & {p.untyped_storage().data_ptr() for p in twin.parameters()}
    before = logits(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter *= 1.5
    assert torch.equal(logits(model), before)
    assert not torch.allclose(logits(twin), before, atol=1e-2)
    assert [p.name for p in twin.hook_points()] == [p.name for p in model.hook_points()]
    assert set(map(id, twin.hook_points())) == {
        id(m) for m in twin.modules() if type(m).__name__ == "HookPoint"
    }
    assert not set(map(id, twin.hook_points())) & set(map(id, model.hook_points()))
    _, cache = twin.run_with_cache(TOKENS)
    assert "blocks.1.attn.hook_z" in cache


@each_family
def test_deepcopy(tiny):
    model = hookedlm.load(tiny.build())
    logits(model)
    twins(model, copy.deepcopy(model))


@each_family
def test_torch_save(tiny):
    model = hookedlm.load(tiny.build())
    logits(model)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    twins(model, torch.load(buffer, weights_only=False))


@each_family
def test_pickle(tiny):
    """Plain pickle writes every view's memory for itself; the numbers are the same."""
    model = hookedlm.load(tiny.build())
    twin = pickle.loads(pickle.dumps(model))
    assert torch.allclose(logits(twin), logits(model), atol=1e-5)
    twin.run_with_cache(TOKENS)
    twin.load_state_dict(model.state_dict())


def test_torch_save_of_a_processed_model():
    model = HookedTransformer.from_pretrained(
        "tiny", hf_model=build("gpt2-base"), tokenizer=word_tokenizer()
    )
    buffer = io.BytesIO()
    torch.save(model, buffer)
    n_bytes = sum(p.numel() * 4 for p in model.parameters())
    assert len(buffer.getvalue()) < 3 * n_bytes
    buffer.seek(0)
    twin = torch.load(buffer, weights_only=False)
    assert torch.equal(twin("the cat"), model("the cat"))
    assert [str(record) for record in twin.history] == [str(record) for record in model.history]
    twins(model, twin)


def test_copy_keeps_what_is_frozen():
    model = hookedlm.load(build("gpt2-base"))
    model.embed.W_E.requires_grad_(False)
    twin = copy.deepcopy(model)
    assert not twin.embed.W_E.requires_grad
    assert twin.blocks[0].attn.W_Q.requires_grad
    assert twin.cfg is not model.cfg
    assert twin.cfg == model.cfg
    assert isinstance(twin, HookedTransformer)


def test_toy_models_are_copied_too():
    cfg = {"n_layers": 2, "d_model": 16, "n_ctx": 12, "d_head": 4, "d_vocab": VOCAB}
    model = HookedTransformer(cfg | {"act_fn": "gelu", "seed": 1, "device": "cpu"})
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(twin), logits(model))
        twin.load_state_dict(model.state_dict())


# --- Train and eval ------------------------------------------------------------------------------


def test_train_and_eval():
    theirs = build("gpt2-base")
    model = hookedlm.load(theirs)
    assert not model.training
    assert model.train() is model
    assert model.training
    assert all(module.training for module in model.modules())
    assert not theirs.training
    model.eval()
    assert not any(module.training for module in model.modules())
    # A model that was training when it came stays so on its own side.
    theirs.train()
    other = hookedlm.load(theirs)
    assert theirs.training
    assert not other.training


@pytest.mark.gpu
@each_family
def test_cuda(tiny):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    theirs = tiny.build()
    model = hookedlm.load(theirs)
    expected, shared = logits(model), relations(model)
    model.cuda()
    assert model.device.type == "cuda"
    assert model.cfg.device == "cuda:0"
    assert relations(model) == shared
    assert {p.device.type for p in theirs.parameters()} == {"cpu"}
    assert torch.allclose(logits(model).cpu(), expected, atol=1e-3)
    model.cpu()
    assert torch.equal(logits(model), expected)
