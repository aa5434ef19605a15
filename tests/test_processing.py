"""Processing of state dicts, and loading with processing."""

from __future__ import annotations

import warnings

import pytest
import torch
from hf_truth import logits_of, padded_batch
from tiny import TINIES, VOCAB
from torch import Tensor, nn

import hookedlm
from hookedlm import HookedTransformer, transforms
from hookedlm.errors import InputError, ProcessingError

NAMES = [
    "gpt2-base",
    "gpt2-untied",
    "llama-grouped",
    "gemma2-base",
    "granite-multipliers",
    "gpt_neox-parallel",
    "qwen2-base",
    "mixtral-base",
]
TRANSFORMS = {
    "fold_layer_norm": transforms.fold_ln,
    "center_writing_weights": transforms.center_writing_weights,
    "center_unembed": transforms.center_unembed,
    "fold_value_biases": transforms.fold_value_biases,
    "refactor_factored_attn_matrices": transforms.refactor_factored_attn_matrices,
}
OFF = dict(
    fold_ln=False, center_writing_weights=False, center_unembed=False, fold_value_biases=False
)
TOKENS, MASK = padded_batch(VOCAB, [12, 7, 5], "left", seed=1)
REAL = MASK.bool()
SKIPS = "ignore:some processing does not apply"


def theirs(name: str, seed: int = 0) -> nn.Module:
    [tiny] = [tiny for tiny in TINIES if tiny.id == name]
    return tiny.build(seed=seed)


def build(name: str, seed: int = 0) -> HookedTransformer:
    return hookedlm.load(theirs(name, seed))


def truth(name: str, seed: int = 0) -> Tensor:
    return logits_of(theirs(name, seed), TOKENS, MASK)[REAL].log_softmax(-1)


@torch.no_grad()
def log_probs(model: HookedTransformer) -> Tensor:
    return model(TOKENS, attention_mask=MASK)[REAL].log_softmax(-1)


def snapshot(model: HookedTransformer) -> dict[str, Tensor]:
    return {name: x.clone() for name, x in model.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return list(a) == list(b) and all(torch.equal(x, b[name]) for name, x in a.items())


# --- State dict in, state dict out ---------------------------------------------------------------


@pytest.mark.filterwarnings(SKIPS)
@pytest.mark.parametrize("method", TRANSFORMS)
@pytest.mark.parametrize("name", NAMES)
def test_a_state_dict_becomes_what_the_transform_makes_of_the_model(name: str, method: str):
    model, other = build(name), build(name, seed=1)
    given, own = snapshot(other), snapshot(model)
    kept = dict(given)
    try:
        TRANSFORMS[method](other)
    except ProcessingError:
        with pytest.raises(ProcessingError):
            getattr(model, method)(given)
        assert same(snapshot(model), own)
        return
    expected = other.state_dict()
    result = getattr(model, method)(given)
    assert set(result) == set(expected)
    for key, x in result.items():
        assert torch.allclose(x, expected[key], atol=1e-6), key
    assert same(given, kept)
    assert all(given[key] is x for key, x in kept.items())
    assert same(snapshot(model), own)
    assert model.history == []


@pytest.mark.filterwarnings(SKIPS)
@pytest.mark.parametrize("name", NAMES)
def test_processed_state_dicts_say_what_hugging_face_says(name: str):
    """One after the other, in TransformerLens' order, then loaded as it is."""
    model = build(name)
    state = build(name, seed=1).state_dict()
    for method in TRANSFORMS:
        try:
            state = getattr(model, method)(state)
        except ProcessingError:
            continue
    assert not any(key.rpartition(".")[0].endswith(("ln1", "ln2", "ln_final")) for key in state)
    model.load_and_process_state_dict(state, **OFF)
    assert model.cfg.normalization_type.endswith("Pre")
    assert (log_probs(model) - truth(name, seed=1)).abs().max() < 1e-4


def test_the_form_of_each_by_hand():
    """TransformerLens' conventions, written out for one GPT-2."""
    model = build("gpt2-untied")
    s = snapshot(model)
    b, w = s["blocks.1.ln1.b"], s["blocks.1.ln1.w"]
    folded = model.fold_layer_norm(s)
    for x in "QKV":
        W = s[f"blocks.1.attn.W_{x}"]
        product = W * w[:, None]
        centred = product - product.mean(1, keepdim=True)
        assert torch.allclose(folded[f"blocks.1.attn.W_{x}"], centred, atol=1e-6)
        bias = s[f"blocks.1.attn.b_{x}"] + torch.einsum("d,hde->he", b, W)
        assert torch.allclose(folded[f"blocks.1.attn.b_{x}"], bias, atol=1e-5)
    product = s["blocks.1.mlp.W_in"] * s["blocks.1.ln2.w"][:, None]
    assert torch.allclose(folded["blocks.1.mlp.W_in"], product - product.mean(0), atol=1e-6)
    b_U = s["unembed.b_U"] + s["ln_final.b"] @ s["unembed.W_U"]
    assert torch.allclose(folded["unembed.b_U"], b_U, atol=1e-5)
    product = s["unembed.W_U"] * s["ln_final.w"][:, None]
    assert torch.allclose(folded["unembed.W_U"], product - product.mean(0), atol=1e-6)
    assert torch.equal(folded["embed.W_E"], s["embed.W_E"])

    uncentred = model.fold_layer_norm(s, center_weights=False)
    product = s["blocks.1.attn.W_Q"] * w[:, None]
    assert torch.allclose(uncentred["blocks.1.attn.W_Q"], product, atol=1e-6)

    written = model.center_writing_weights(s)
    for key, axis in (("embed.W_E", 1), ("pos_embed.W_pos", 1), ("blocks.0.attn.W_O", 2)):
        assert torch.allclose(written[key], s[key] - s[key].mean(axis, keepdim=True), atol=1e-6)
    for key in ("blocks.0.attn.b_O", "blocks.2.mlp.b_out", "blocks.2.mlp.W_out"):
        assert torch.allclose(written[key], s[key] - s[key].mean(-1, keepdim=True), atol=1e-6)

    unembed = model.center_unembed(folded)
    W_U, b_U = folded["unembed.W_U"], folded["unembed.b_U"]
    assert torch.allclose(unembed["unembed.W_U"], W_U - W_U.mean(1, keepdim=True), atol=1e-6)
    assert torch.allclose(unembed["unembed.b_U"], b_U - b_U.mean(), atol=1e-6)

    values = model.fold_value_biases(s)
    b_V, W_O = s["blocks.0.attn.b_V"], s["blocks.0.attn.W_O"]
    b_O = s["blocks.0.attn.b_O"] + sum(b_V[h] @ W_O[h] for h in range(4))
    assert torch.allclose(values["blocks.0.attn.b_O"], b_O, atol=1e-5)
    assert not values["blocks.0.attn.b_V"].any()


def test_fold_biases_off_leaves_norms_with_biases():
    model = build("gpt2-base")
    state = model.state_dict()
    with pytest.warns(UserWarning, match="it has a bias and fold_biases is off"):
        assert set(model.fold_layer_norm(state, fold_biases=False)) == set(state)


def test_names_of_transformer_lens_stay():
    """Grouped weights under their names there, and its buffers, come out as they went in."""
    model = build("qwen2-base")
    state = build("qwen2-base", seed=1).state_dict()
    theirs = {
        key.replace("attn.W_K", "attn._W_K").replace("attn.b_V", "attn._b_V"): x
        for key, x in state.items()
        if not key.endswith("b_gate")  # which it does not have
    } | {"blocks.0.attn.IGNORE": torch.tensor(-torch.inf)}
    folded = model.fold_layer_norm(theirs)
    assert set(folded) == {key for key in theirs if not key.endswith((".w", ".b"))}
    expected = model.fold_layer_norm(state)
    assert torch.equal(folded["blocks.0.attn._W_K"], expected["blocks.0.attn.W_K"])
    assert folded["blocks.0.attn.IGNORE"] is theirs["blocks.0.attn.IGNORE"]
    other = build("qwen2-base")
    other.load_and_process_state_dict(folded, **OFF)
    assert (log_probs(other) - truth("qwen2-base", seed=1)).abs().max() < 1e-4


def test_dtypes_are_those_given():
    model = build("gpt2-base")
    state = {key: x.double() for key, x in model.state_dict().items()}
    state["blocks.0.attn.b_Q"] = state["blocks.0.attn.b_Q"].float()
    folded = model.fold_layer_norm(state)
    assert folded["blocks.0.attn.b_Q"].dtype == torch.float32
    assert {x.dtype for key, x in folded.items() if key != "blocks.0.attn.b_Q"} == {torch.float64}
    product = state["blocks.0.attn.W_K"] * state["blocks.0.ln1.w"][:, None]
    expected = product - product.mean(1, keepdim=True)
    assert torch.allclose(folded["blocks.0.attn.W_K"], expected, atol=1e-14)


def test_hooks_neither_run_nor_are_copied():
    model = build("gpt2-base")
    seen: list[str] = []
    model.add_hook("hook_embed", lambda x, hook: seen.append(hook.name), is_permanent=True)
    model.fold_layer_norm(model.state_dict())
    model.load_and_process_state_dict(model.state_dict())
    assert seen == []
    model(TOKENS)
    assert seen == ["hook_embed"]


# --- Names ---------------------------------------------------------------------------------------

METHODS = [*TRANSFORMS, "load_and_process_state_dict", "fill_missing_keys"]


@pytest.mark.parametrize("method", METHODS)
def test_unknown_names_are_refused_with_the_nearest(method: str):
    model = build("gpt2-base")
    before, state = snapshot(model), model.state_dict()
    state["blocks.1.attn.W_q"] = state.pop("blocks.1.attn.W_Q")
    with pytest.raises(InputError, match=r"no weight 'blocks.1.attn.W_q'.*blocks.1.attn.W_Q"):
        getattr(model, method)(state)
    state = model.state_dict() | {"blocks.1.mlp.W_gate": torch.zeros(32, 128)}
    with pytest.raises(InputError, match=r"no weight 'blocks.1.mlp.W_gate'"):
        getattr(model, method)(state)
    state = model.state_dict() | {"blocks.1.attn.b_Q": torch.zeros(4, 9)}
    with pytest.raises(InputError, match=r"blocks.1.attn.b_Q is \(4, 9\), this model's \(4, 8\)"):
        getattr(model, method)(state)
    assert same(snapshot(model), before)


@pytest.mark.parametrize("method", TRANSFORMS)
def test_missing_names_are_refused_by_transforms(method: str):
    model = build("gpt2-base")
    state = model.state_dict()
    del state["blocks.2.mlp.b_in"]
    with pytest.raises(InputError, match=r"lacks blocks.2.mlp.b_in: .*fill_missing_keys"):
        getattr(model, method)(state)


def test_missing_names_are_filled_and_named():
    model, other = build("gpt2-base"), build("gpt2-base", seed=1)
    state = other.state_dict()
    gone = ["blocks.0.ln1.w", "blocks.2.mlp.b_in"]
    for key in gone:
        del state[key]
    with pytest.warns(UserWarning, match=r"blocks.0.ln1.w, blocks.2.mlp.b_in$") as caught:
        filled = model.fill_missing_keys(state)
    assert caught[0].filename == __file__
    assert gone[0] not in state
    assert torch.equal(filled[gone[0]], model.state_dict()[gone[0]])
    expected = other.state_dict() | {key: model.state_dict()[key].clone() for key in gone}
    with pytest.warns(UserWarning, match=r"blocks.0.ln1.w, blocks.2.mlp.b_in$") as caught:
        model.load_and_process_state_dict(state, **OFF)
    assert caught[0].filename == __file__
    assert same(snapshot(model), expected)


def test_what_a_family_lacks_is_not_missing():
    """Zero biases may be absent, and so may all norms: then they are folded."""
    model = build("llama-grouped")
    state = {k: x for k, x in model.state_dict().items() if ".b_" not in k}
    assert set(model.fill_missing_keys(state)) == set(state)
    folded = model.fold_layer_norm(model.state_dict())
    assert set(model.fill_missing_keys(folded)) == set(folded)


# --- Loading -------------------------------------------------------------------------------------


@pytest.mark.filterwarnings(SKIPS)
@pytest.mark.parametrize("name", NAMES)
def test_load_and_process(name: str):
    hf_model = theirs(name)
    original = {key: x.clone() for key, x in hf_model.state_dict().items()}
    model = hookedlm.load(hf_model)
    state = build(name, seed=1).state_dict()
    kept = dict(state)
    model.load_and_process_state_dict(state, refactor_factored_attn_matrices=True)
    assert list(state) == list(kept)
    assert all(state[key] is x for key, x in kept.items())
    assert (log_probs(model) - truth(name, seed=1)).abs().max() < 1e-4
    assert model.history[0].name == "fold_ln"
    assert model.cfg.normalization_type.endswith("Pre")
    assert all(torch.equal(x, original[key]) for key, x in hf_model.state_dict().items())
    # The dictionary's tensors are not the model's.
    with torch.no_grad():
        for x in model.parameters():
            x.zero_()
    assert all(torch.equal(x, kept[key]) for key, x in state.items())
    assert build(name, seed=1)(TOKENS).abs().max() > 0


@pytest.mark.filterwarnings(SKIPS)
@pytest.mark.parametrize("name", ["gpt2-base", "llama-grouped", "gemma2-base"])
def test_one_checkpoint_after_the_other(name: str):
    """A model whose norms are folded takes weights whose norms are not, and the other way round."""
    model = HookedTransformer.from_pretrained("tiny", hf_model=theirs(name))
    assert model.cfg.normalization_type.endswith("Pre")
    for seed in (1, 2):
        model.load_and_process_state_dict(build(name, seed).state_dict())
        assert (log_probs(model) - truth(name, seed)).abs().max() < 1e-4
    processed = model.state_dict()
    model.load_and_process_state_dict(build(name, 3).state_dict(), **OFF)
    assert model.cfg.normalization_type in ("LN", "RMS")
    assert "blocks.0.ln1.w" in model.state_dict()
    assert model.history == []
    assert (log_probs(model) - truth(name, 3)).abs().max() < 1e-4
    model.load_and_process_state_dict(processed)
    assert model.cfg.normalization_type in ("LNPre", "RMSPre")
    assert (log_probs(model) - truth(name, 2)).abs().max() < 1e-4


def test_dtype_is_the_models():
    model = hookedlm.load(theirs("gpt2-base"), dtype="bfloat16")
    model.load_and_process_state_dict(build("gpt2-base", 1).state_dict())
    assert {x.dtype for x in model.parameters()} == {torch.bfloat16}
    assert (log_probs(model).float() - truth("gpt2-base", 1)).abs().max() < 0.3


def toy(**changes) -> HookedTransformer:
    cfg = dict(n_layers=2, d_model=16, n_ctx=12, d_head=4, d_vocab=VOCAB, act_fn="gelu", seed=1)
    model = HookedTransformer(cfg | {"device": "cpu"} | changes)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


def test_an_optimizer_goes_on_with_loaded_weights():
    model, other = toy(), toy(seed=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.load_and_process_state_dict(other.state_dict(), **OFF)
    before = model(TOKENS, return_type="loss")
    assert torch.equal(before, other(TOKENS, return_type="loss"))
    before.backward()
    optimizer.step()
    assert model(TOKENS, return_type="loss") < before


def test_tied_weights_part_when_processing_parts_them():
    model = toy(tie_word_embeddings=True)
    expected = model(TOKENS).log_softmax(-1)
    W_E = model.W_E.clone()
    model.load_and_process_state_dict(model.state_dict(), center_writing_weights=False)
    assert torch.allclose(model(TOKENS).log_softmax(-1), expected, atol=1e-4)
    assert torch.equal(model.W_E, W_E)


def test_tied_weights_stay_tied_when_nothing_parts_them():
    model, other = toy(tie_word_embeddings=True), toy(tie_word_embeddings=True, seed=2)
    model.load_and_process_state_dict(other.state_dict(), **OFF)
    assert torch.equal(model(TOKENS), other(TOKENS))
    with torch.no_grad():
        model.embed.W_E += 1
    assert torch.equal(model.W_U, model.W_E.T)


@torch.no_grad()
def test_the_bias_of_a_norm_reaches_the_gate():
    model = toy(gated_mlp=True, act_fn="silu")
    expected, state = model(TOKENS).log_softmax(-1), model.state_dict()
    folded = model.fold_layer_norm(state)
    assert folded["blocks.0.mlp.b_gate"].abs().max() > 0.1
    model.load_and_process_state_dict(state)
    assert (model(TOKENS).log_softmax(-1) - expected).abs().max() < 1e-4
    assert model.blocks[0].ln2.live("b") is None


def test_without_norms():
    model = toy(normalization_type=None)
    with pytest.raises(ProcessingError, match="center_writing_weights would be wrong"):
        model.center_writing_weights(model.state_dict())
    expected = model(TOKENS).log_softmax(-1)
    with pytest.warns(UserWarning, match="center_writing_weights would be wrong") as caught:
        model.load_and_process_state_dict(model.state_dict())
    assert caught[0].filename == __file__
    assert model.cfg.normalization_type is None
    assert torch.allclose(model(TOKENS).log_softmax(-1), expected, atol=1e-3)  # hundreds of nats


# --- The model itself ----------------------------------------------------------------------------


IN_PLACE = ["gemma2-base", "granite-multipliers", "llama-grouped", "mixtral-base"]


@pytest.mark.parametrize("name", IN_PLACE)
def test_processing_in_place_twice(name: str):
    model = build(name)
    for _ in range(2):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model.process_weights_()
        [warning] = [w for w in caught if "does not apply" in str(w.message)]
        assert warning.filename == __file__
        assert "center_writing_weights would be wrong" in str(warning.message)
        assert ("softcap" in str(warning.message)) == (name == "gemma2-base")
        assert (log_probs(model) - truth(name)).abs().max() < 1e-4
    assert model.cfg.normalization_type == "RMSPre"
