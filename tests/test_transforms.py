"""Transforms of the weights: the same predictions, and the form each of them promises."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable

import pytest
import torch
from hf_truth import logits_of, padded_batch
from tiny import TINIES, VOCAB, Tiny, one_per_family
from torch import Tensor, nn

import hookedlm
from hookedlm import HookedTransformer, transforms
from hookedlm.errors import ProcessingError
from hookedlm.layers.attention import Attention
from hookedlm.layers.norm import Norm, Same

# One of each family, and what else changes what a transform may do.
EXTRA = [
    "gpt2-untied",
    "gpt2-unscaled",
    "llama-full_heads",
    "llama-tied",
    "llama-biased",
    "gpt_neox-sequential",
    "opt-post_norm",
    "opt-post_norm_projected",
    "opt-pre_norm_projected",
    "opt-no_final_norm",
    "opt-no_bias",
    "mpt-clip_qkv",
    "falcon-alibi_sequential",
    "falcon-new_two_norms",
    "stablelm-qk_layernorm",
    "qwen3_moe-mlp_only_layers",
    "bloom-untied",
]
MODELS = [*one_per_family(), *(tiny for tiny in TINIES if tiny.id in EXTRA)]
TOKENS, MASK = padded_batch(VOCAB, [12, 7, 5], "left", seed=1)

every_model = pytest.mark.parametrize("tiny", MODELS, ids=lambda tiny: tiny.id)


def build(name: str) -> nn.Module:
    [tiny] = [tiny for tiny in TINIES if tiny.id == name]
    return tiny.build()


@functools.cache
def truth(tiny: Tiny) -> Tensor:
    """Hugging Face's log-probabilities at real positions."""
    return logits_of(tiny.build(), TOKENS, MASK)[MASK.bool()].log_softmax(-1)


@torch.no_grad()
def log_probs(model: HookedTransformer) -> Tensor:
    return model(TOKENS, attention_mask=MASK)[MASK.bool()].log_softmax(-1)


def check(model: HookedTransformer, tiny: Tiny) -> None:
    """Predictions are Hugging Face's, with nobody listening and with everybody listening."""
    assert (log_probs(model) - truth(tiny)).abs().max() < 1e-4
    logits, _ = model.run_with_cache(TOKENS, attention_mask=MASK, names_filter=lambda name: True)
    listening = logits[MASK.bool()].log_softmax(-1)
    assert (listening - truth(tiny)).abs().max() < 1e-4


def norms(model: HookedTransformer) -> list[tuple[str, Norm]]:
    """Norms that read the stream, by name."""
    found = [(n, m) for n, m in model.named_modules() if isinstance(m, Norm)]
    return [(n, m) for n, m in found if n.rpartition(".")[2] in ("ln1", "ln2", "ln_final")]


# --- Each alone ----------------------------------------------------------------------------------


@every_model
def test_fold_ln(tiny: Tiny):
    model = hookedlm.load(tiny.build())
    weighted = {name for name, norm in norms(model) if norm.live("w") is not None}
    record = transforms.fold_ln(model)
    check(model, tiny)
    skipped = [reason.split(":")[0] for reason in record.skipped]
    for name, norm in norms(model):
        assert (norm.live("w") is None and norm.live("b") is None) == (name not in skipped), name
    if tiny.model_type in ("gpt2", "llama", "gemma2", "gptj", "falcon", "mixtral", "qwen3_moe"):
        assert skipped == []
        assert model.cfg.normalization_type in ("LNPre", "RMSPre")
    assert model.history == [record]
    assert record.name == "fold_ln"
    # A reader of LayerNorm does not see the direction that LayerNorm removes.
    for i, block in enumerate(model.blocks):
        if f"blocks.{i}.ln1" in weighted - set(skipped) and block.ln1.spec.centres:
            assert block.attn.W_Q.mean(1).abs().max() < 1e-6


@every_model
def test_center_writing_weights(tiny: Tiny):
    model = hookedlm.load(tiny.build())
    if why := transforms.why_writing_matters(model):
        before = {name: value.clone() for name, value in model.state_dict().items()}
        with pytest.raises(ProcessingError, match="center_writing_weights would be wrong here"):
            transforms.center_writing_weights(model)
        assert model.history == []
        assert all(torch.equal(value, before[n]) for n, value in model.state_dict().items())
        kind = {norm.spec.kind for _, norm in norms(model)}
        assert kind == {"RMS"} or "OPT" in type(tiny.build()).__name__ or "opaque" in why
        return
    transforms.center_writing_weights(model)
    check(model, tiny)
    for block in model.blocks:
        for value in (block.attn.W_O, block.attn.b_O, block.mlp.W_out, block.mlp.b_out):
            assert value.mean(-1).abs().max() < 1e-6
    if isinstance(model.embed.ln, Same):
        assert model.W_E.mean(-1).abs().max() < 1e-6
    if model.pos_embed is not None:
        assert model.W_pos.mean(-1).abs().max() < 1e-6
    _, cache = model.run_with_cache(TOKENS, attention_mask=MASK)
    if isinstance(model.embed.ln, Same):
        assert cache["resid_post", -1].mean(-1).abs().max() < 1e-4


def test_which_families_can_be_centred():
    """LayerNorm throughout, and nothing else."""
    can = {
        tiny.model_type
        for tiny in one_per_family()
        if not transforms.why_writing_matters(hookedlm.load(tiny.build()))
    }
    assert can == {
        *("gpt2", "gpt_bigcode", "gpt_neo", "gptj", "gpt_neox", "opt", "bloom", "falcon", "mpt"),
        *("phi", "olmo", "stablelm", "starcoder2", "cohere"),
    }


@every_model
def test_center_unembed(tiny: Tiny):
    model = hookedlm.load(tiny.build())
    W_E = model.W_E.clone()
    if model.unembed.softcap is not None:
        with pytest.raises(ProcessingError, match="softcap"):
            transforms.center_unembed(model)
        return
    transforms.center_unembed(model)
    check(model, tiny)
    assert model.W_U.mean(-1).abs().max() < 1e-6
    assert model.b_U.mean().abs() < 1e-6
    assert torch.equal(model.W_E, W_E)  # a tied embedding is untied first
    logits = model(TOKENS)
    assert logits.mean(-1).abs().max() < 1e-4


@every_model
def test_fold_value_biases(tiny: Tiny):
    model = hookedlm.load(tiny.build())
    record = transforms.fold_value_biases(model)
    check(model, tiny)
    for i, block in enumerate(model.blocks):
        left = any(reason.startswith(f"blocks.{i}.attn") for reason in record.skipped)
        b_V = block.attn.live("b_V")
        assert left or b_V is None or not b_V.any()
    if tiny.model_type == "gpt_oss":
        assert len(record.skipped) == len(model.blocks)
        assert "sink" in record.skipped[0]


@every_model
def test_refactor(tiny: Tiny):
    model = hookedlm.load(tiny.build())
    products = [(b.attn.QK.AB, b.attn.OV.AB) for b in model.blocks]
    record = transforms.refactor_factored_attn_matrices(model)
    check(model, tiny)
    left = {int(reason.split(".")[1]) for reason in record.skipped}
    for i, (block, (QK, OV)) in enumerate(zip(model.blocks, products, strict=True)):
        attn = block.attn
        assert torch.allclose(attn.QK.AB, QK, atol=1e-4)
        assert torch.allclose(attn.OV.AB, OV, atol=1e-4)
        if i in left:
            spec = attn.spec
            grouped = spec.n_kv_heads < spec.n_heads
            assert spec.rotary or spec.qk_norm or grouped or spec.clip is not None or spec.sinks
            continue
        # W_O's rows are orthonormal, W_V carries the singular values, largest first ...
        eye = torch.eye(attn.spec.d_head).expand(attn.spec.n_heads, -1, -1)
        assert torch.allclose(attn.W_O @ attn.W_O.transpose(-2, -1), eye, atol=1e-4)
        sizes = attn.W_V.norm(dim=1)
        assert (sizes[:, :-1] >= sizes[:, 1:] - 1e-5).all()
        # ... and queries and keys carry equal shares, their biases being one more input.
        q = torch.cat([attn.W_Q, attn.b_Q[:, None]], dim=1).norm(dim=1)
        k = torch.cat([attn.W_K, attn.b_K[:, None]], dim=1).norm(dim=1)
        assert torch.allclose(q, k, rtol=1e-3, atol=1e-5)
    if tiny.model_type in ("gpt2", "gpt_neo", "opt", "bloom") or tiny.id == "mpt-base":
        assert left == set()


ALL: list[Callable[[HookedTransformer], transforms.Record]] = [
    transforms.fold_ln,
    transforms.center_writing_weights,
    transforms.center_unembed,
    transforms.fold_value_biases,
    transforms.refactor_factored_attn_matrices,
]


@pytest.mark.parametrize("transform", ALL, ids=lambda transform: transform.__name__)
def test_in_any_order(transform: Callable):
    """Each of them first, then the others."""
    tiny = next(tiny for tiny in TINIES if tiny.id == "gpt2-base")
    model = hookedlm.load(tiny.build())
    for step in [transform, *(other for other in ALL if other is not transform)]:
        step(model)
    check(model, tiny)
    assert len(model.history) == 5
    for entry in model.history:
        assert "log-probs moved by" in str(entry)
        assert 0 <= entry.change < 1e-4


def test_float64_stays_exact():
    theirs = build("gpt2-untied").double()
    model = hookedlm.load(theirs)
    for step in ALL:
        step(model)
    assert model.dtype == torch.float64
    ours = log_probs(model)
    expected = logits_of(theirs, TOKENS, MASK)[MASK.bool()].log_softmax(-1)
    assert (ours - expected).abs().max() < 1e-10


# --- The classic door ----------------------------------------------------------------------------


@every_model
def test_from_pretrained(tiny: Tiny):
    theirs = tiny.build()
    before = copy.deepcopy(theirs.state_dict())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = HookedTransformer.from_pretrained("tiny", hf_model=theirs)
    check(model, tiny)
    caught = [warning for warning in caught if "does not apply" in str(warning.message)]
    assert len(caught) <= 1
    names = [record.name for record in model.history]
    skipped = [record for record in model.history if record.skipped]
    assert bool(caught) == (len(names) < 4 or bool(skipped))
    if tiny.id == "gpt2-base":
        assert not caught
    if tiny.id == "llama-grouped":
        assert "does not subtract the mean" in str(caught[0].message)
        assert caught[0].filename == __file__
    # Nothing of it reached Hugging Face's module: experts and tied embeddings included.
    assert all(torch.equal(value, before[n]) for n, value in theirs.state_dict().items())


def test_nothing_to_skip_when_not_asked():
    options = {"center_writing_weights": False}
    model = HookedTransformer.from_pretrained("tiny", hf_model=build("llama-grouped"), **options)
    assert [record.name for record in model.history] == [
        "fold_ln",
        "center_unembed",
        "fold_value_biases",
    ]


@pytest.mark.parametrize("name", ["gpt2-base", "opt-pre_norm", "gptj-base", "bloom-base"])
def test_processing_twice_is_harmless(name: str):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*a norm stands behind it")  # Bloom
        model = HookedTransformer.from_pretrained("tiny", hf_model=build(name))
    once = {n: value.clone() for n, value in model.state_dict().items()}
    kind = model.cfg.normalization_type
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*a norm stands behind it")
        model.process_weights_()
    assert model.cfg.normalization_type == kind
    for n, value in model.state_dict().items():
        assert torch.allclose(value, once[n], atol=1e-5), n


def test_process_weights_of_a_toy_model():
    cfg = {"n_layers": 2, "d_model": 16, "n_ctx": 12, "d_head": 4, "d_vocab": VOCAB}
    model = HookedTransformer(cfg | {"act_fn": "gelu", "seed": 1, "device": "cpu"})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
        before = model(TOKENS).log_softmax(-1)
        model.process_weights_(refactor_factored_attn_matrices=True)
        assert (model(TOKENS).log_softmax(-1) - before).abs().max() < 1e-4
    assert all(norm.live("w") is None for _, norm in norms(model))


def test_half_precision():
    model = HookedTransformer.from_pretrained("tiny", hf_model=build("gpt2-base"), dtype="bfloat16")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert len(model.history) == 4
    assert (log_probs(model).float() - truth(MODELS[0])).abs().max() < 0.3


# --- Failure -------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["wrong", "raises"])
def test_a_failing_transform_restores_everything(monkeypatch: pytest.MonkeyPatch, how: str):
    theirs = build("gpt2-base")
    model = hookedlm.load(theirs)
    before = {n: (p, p.clone()) for n, p in model.named_parameters()}
    described = copy.deepcopy(model.cfg.to_dict())
    fold = transforms._fold

    def corrupt(norm: Norm, readers: list, center_weights: bool) -> None:
        fold(norm, readers, center_weights)
        if how == "raises":
            raise ZeroDivisionError
        reader = readers[0]
        transforms.put(reader.module, reader.name, 1.1 * reader.module._parameters[reader.name])

    monkeypatch.setattr(transforms, "_fold", corrupt)
    error = ZeroDivisionError if how == "raises" else ProcessingError
    with pytest.raises(error, match=None if how == "raises" else "nothing was changed"):
        transforms.fold_ln(model)
    assert model.history == []
    assert model.cfg.to_dict() == described
    after = dict(model.named_parameters())
    assert list(after) == list(before)
    for n, (parameter, value) in before.items():
        assert after[n] is parameter
        assert torch.equal(parameter, value)
    assert torch.equal(log_probs(model), log_probs(hookedlm.load(theirs)))


def test_opaque_parts_are_left_alone_and_said():
    """Attention that runs as it was written: what it reads and writes is not touched."""
    theirs = build("gpt2-base")
    theirs.transformer.h[1].attn.extra = nn.Parameter(torch.ones(1))  # nobody accounts for it
    model = hookedlm.load(theirs)
    assert not isinstance(model.blocks[1]._modules.get("attn"), Attention)
    before = log_probs(model)
    for transform, part in (
        (transforms.fold_ln, "blocks.1.ln1: what reads it runs as Hugging Face wrote it"),
        (transforms.center_writing_weights, "blocks.1.attn: not uniform"),
        (transforms.fold_value_biases, "blocks.1: attention is not uniform"),
        (transforms.refactor_factored_attn_matrices, "blocks.1: attention is not uniform"),
    ):
        record = transform(model)
        assert record.skipped == [part]
        assert part in str(record)
    assert (log_probs(model) - before).abs().max() < 1e-4
    assert model.blocks[1].ln1.live("w") is not None
    assert model.blocks[1].ln2.live("w") is None


# --- Models without norms ------------------------------------------------------------------------


@torch.no_grad()
def without_layernorm(theirs: nn.Module) -> nn.Module:
    """GPT-2 whose norms divide by a constant, as models trained to do without LayerNorm are
    published: eps dwarfs the variance, and the weights make up for it."""
    for module in theirs.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = 1e12
            module.weight *= 1e6 / 4  # the random stream is about 4 long
    return theirs


@pytest.mark.parametrize("name", ["gpt2-base", "gpt2-untied", "gptj-base"])
def test_remove_layernorm(name: str):
    theirs = without_layernorm(build(name))
    before = {n: p.clone() for n, p in theirs.state_dict().items()}
    model = hookedlm.load(theirs)
    assert all(part.form.startswith("uniform") for part in model.fidelity().parts)
    truth = logits_of(theirs, TOKENS, MASK)[MASK.bool()]
    real = MASK.bool()
    assert torch.allclose(model(TOKENS, attention_mask=MASK)[real], truth, atol=1e-4)
    model.remove_layernorm()
    assert torch.allclose(model(TOKENS, attention_mask=MASK)[real], truth, atol=2e-4)
    names = [n for n in model.hook_dict if "ln" in n]
    assert names == []
    assert norms(model) == []
    assert model.cfg.normalization_type is None
    assert model.history[-1].name == "remove_layernorm"
    # The stream is now read as it is: the whole model is linear but for attention and MLPs.
    _, cache = model.run_with_cache(TOKENS[:1])
    last = cache["resid_post", -1] @ model.W_U + model.b_U
    assert torch.allclose(model(TOKENS[:1]), last, atol=1e-4)
    assert all(torch.equal(p, before[n]) for n, p in theirs.state_dict().items())


def test_remove_layernorm_after_processing():
    theirs = without_layernorm(build("gpt2-base"))
    model = HookedTransformer.from_pretrained("tiny", hf_model=theirs)
    expected = logits_of(theirs, TOKENS, MASK)[MASK.bool()].log_softmax(-1)
    assert (log_probs(model) - expected).abs().max() < 1e-4
    model.remove_layernorm()
    assert (log_probs(model) - expected).abs().max() < 1e-4


@pytest.mark.parametrize("name", ["gpt2-base", "llama-grouped", "opt-post_norm"])
def test_ordinary_norms_are_not_removed(name: str):
    model = hookedlm.load(build(name))
    with pytest.raises(ProcessingError, match=r"remove_layernorm: blocks\.0\.ln1"):
        model.remove_layernorm()
    assert len(norms(model)) >= 6
    assert model.history == []
    assert "blocks.0.ln1.hook_scale" in model.hook_dict
    model.run_with_cache(TOKENS)


@torch.no_grad()
@pytest.mark.parametrize("name", ["gpt2-base", "llama-grouped", "gpt_neox-parallel"])
def test_edited_norms_convert_exactly(name: str):
    """Weights and eps are read off the modules, whatever the config says."""
    theirs = build(name)
    for module in theirs.modules():
        if "Norm" in type(module).__name__:
            module.weight /= 1e6
            [eps] = {"eps", "variance_epsilon"} & set(vars(module))
            setattr(module, eps, 1e-12)
    model = hookedlm.load(theirs, strict=True)
    real = MASK.bool()
    expected = logits_of(theirs, TOKENS, MASK)[real]
    assert torch.allclose(model(TOKENS, attention_mask=MASK)[real], expected, atol=1e-6)
    model = HookedTransformer.from_pretrained("tiny", hf_model=theirs, center_writing_weights=False)
    assert (log_probs(model) - expected.log_softmax(-1)).abs().max() < 1e-4
