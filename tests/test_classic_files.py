"""Checkpoints in TransformerLens' own format, from folders and from a pretended hub."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, PretrainedConfig

import hookedlm
from hookedlm import (
    HookedTransformer,
    HookedTransformerConfig,
    checkpoints,
    classic_files,
    model_configs,
)
from hookedlm.errors import LoadError
from hookedlm.loading import DEMO

SIZES = {
    "d_model": 16, "n_layers": 3, "n_heads": 2, "d_head": 8, "n_ctx": 12, "d_vocab": 30,
}  # fmt: skip
TOKENS = torch.tensor([[1, 5, 2, 29, 0, 7]])

KINDS = {
    "gelu": {"act_fn": "gelu", "attn_only": False, "normalization": "LN", "d_mlp": 24},
    "solu": {"act_fn": "solu_ln", "attn_only": False, "normalization": "LNPre", "d_mlp": 24},
    "attn-only": {"act_fn": None, "attn_only": True, "normalization": "LN", "d_mlp": 64},
    "shortformer": {
        "act_fn": "gelu", "attn_only": True, "normalization_type": "LNPre", "shortformer_pos": True,
    },
}  # fmt: skip


def written(folder: Path, raw: dict, weights: dict, name: str = "model_final.pth") -> Path:
    """A folder as the training code left it on the hub."""
    folder.mkdir(parents=True, exist_ok=True)
    kept = SIZES | raw | {"seed": 5, "lr": 1e-3}  # the training's settings stand there too
    (folder / "config.json").write_text(json.dumps(kept))
    (folder / name).parent.mkdir(exist_ok=True)
    torch.save(weights, folder / name)
    return folder


def drawn(raw: dict, seed: int = 0) -> HookedTransformer:
    """A model of such a config with random weights, biases and norms included."""
    fields = {k: v for k, v in raw.items() if k in ("act_fn", "attn_only", "d_mlp")}
    fields["normalization_type"] = raw.get("normalization", raw.get("normalization_type"))
    if raw.get("shortformer_pos"):
        fields["positional_embedding_type"] = "shortformer"
    model = HookedTransformer(HookedTransformerConfig(**SIZES, **fields, device="cpu"))
    generator = torch.Generator().manual_seed(seed)
    for x in model.parameters():
        x.data = torch.randn(x.shape, generator=generator) * 0.3
    return model.eval()


@pytest.fixture(params=KINDS)
def case(request, tmp_path) -> tuple[HookedTransformer, Path]:
    raw = KINDS[request.param]
    model = drawn(raw)
    buffers = {"blocks.0.attn.mask": torch.ones(12, 12), "blocks.0.attn.IGNORE": torch.tensor(-1e5)}
    return model, written(tmp_path / "net", raw, {**model.state_dict(), **buffers})


def test_a_folder_is_loaded_as_it_is(case):
    model, folder = case
    loaded = hookedlm.load(str(folder))
    assert torch.equal(loaded(TOKENS.to(loaded.device)).cpu(), model(TOKENS))
    assert loaded.cfg.model_name == "net"
    assert loaded.tokenizer is None
    assert loaded.dtype == torch.float32
    assert {p.requires_grad for p in loaded.parameters()} == {True}


@pytest.mark.filterwarnings("ignore:some processing does not apply")
def test_the_classic_door_processes(case):
    model, folder = case
    loaded = HookedTransformer.from_pretrained(str(folder), device="cpu")
    ours, theirs = loaded(TOKENS).log_softmax(-1), model(TOKENS).log_softmax(-1)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    assert loaded.history
    assert loaded.W_U.mean(-1).abs().max() < 1e-6
    plain = HookedTransformer.from_pretrained_no_processing(str(folder), device="cpu")
    assert torch.equal(plain(TOKENS), model(TOKENS))


def test_parts_of_it(tmp_path):
    model = drawn(KINDS["gelu"])
    folder = written(tmp_path / "net", KINDS["gelu"], model.state_dict())
    short = hookedlm.load(folder, first_n_layers=2, n_ctx=6, dtype="float64", device="cpu")
    assert (short.cfg.n_layers, short.cfg.n_ctx, short.dtype) == (2, 6, torch.float64)
    two = model.double()(TOKENS, stop_at_layer=2)
    torch.testing.assert_close(short(TOKENS, stop_at_layer=2), two)
    for wrong in ({"first_n_layers": 4}, {"first_n_layers": 0}, {"n_ctx": 13}):
        with pytest.raises(LoadError, match=next(iter(wrong))):
            hookedlm.load(folder, **wrong)


def test_a_tokenizer_beside_it(tmp_path):
    raw = {**KINDS["gelu"], "d_vocab": 2160}
    folder = written(tmp_path / "net", raw, {})
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO / name, folder / name)
    sizes = SIZES | {"d_vocab": 2160, "d_mlp": 24, "act_fn": "gelu", "normalization_type": "LN"}
    weights = HookedTransformer(HookedTransformerConfig(**sizes)).state_dict()
    torch.save(weights, folder / "model_final.pth")
    loaded = hookedlm.load(folder)
    assert loaded.to_str_tokens("The capital")[1:] == ["The", " capital"]
    # The config may name it instead.
    raw["tokenizer_name"] = "demo"
    other = written(tmp_path / "other", raw, weights)
    assert hookedlm.load(other).to_str_tokens("The capital")[1:] == ["The", " capital"]


def test_the_weights_of_a_step(tmp_path):
    last, early = drawn(KINDS["gelu"], 1), drawn(KINDS["gelu"], 2)
    folder = written(tmp_path / "net", KINDS["gelu"], last.state_dict())
    for step, weights in ((1000, early), (11000, last)):
        written(folder, KINDS["gelu"], weights.state_dict(), f"checkpoints/net_{step}.pth")
    name = str(folder)
    assert checkpoints.get_checkpoint_labels(name) == ([1000, 11000], "step")
    for which in ({"checkpoint_index": 0}, {"checkpoint_value": 1000}):
        loaded = HookedTransformer.from_pretrained_no_processing(name, device="cpu", **which)
        assert torch.equal(loaded(TOKENS), early(TOKENS))
        assert (loaded.cfg.from_checkpoint, loaded.cfg.checkpoint_value) == (True, 1000)
    loaded = HookedTransformer.from_pretrained_no_processing(name, device="cpu")
    assert torch.equal(loaded(TOKENS), last(TOKENS))
    with pytest.raises(LoadError, match=r"\*_2000.pth"):
        HookedTransformer.from_pretrained(name, checkpoint_value=2000)


def test_configs_by_name(tmp_path):
    folder = written(tmp_path / "net", KINDS["attn-only"], {})
    fields = model_configs.convert_neel_model_config(str(folder))
    assert fields["normalization_type"] == "LN"
    assert fields["original_architecture"] == "neel"
    cfg = model_configs.get_pretrained_model_config(str(folder), fold_ln=True, first_n_layers=1)
    assert (cfg.normalization_type, cfg.n_layers, cfg.attn_only) == ("LNPre", 1, True)
    with pytest.raises(LoadError, match="TransformerLens' format"):
        model_configs.convert_neel_model_config("demo")


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda folder: (folder / "model_final.pth").unlink(), "no weights"),
        (lambda folder: (folder / "model_final.pth").write_bytes(b"no"), "no file of tensors"),
        (
            lambda folder: torch.save({"x": print}, folder / "model_final.pth"),
            "no file of tensors",
        ),
    ],
)
def test_a_damaged_folder_is_refused(tmp_path, spoil, says):
    folder = written(tmp_path / "net", KINDS["gelu"], drawn(KINDS["gelu"]).state_dict())
    spoil(folder)
    with pytest.raises(LoadError, match=says):
        hookedlm.load(folder)


def test_the_hub(tmp_path, monkeypatch):
    """What is asked of the hub, and what is made of its answers."""
    model = drawn(KINDS["gelu"])
    folder = written(tmp_path / "net", KINDS["gelu"], model.state_dict())
    asked = []

    def config(name, **options):
        asked.append((name, options))
        return json.loads((folder / "config.json").read_text()), options

    def snapshot(name, allow_patterns, **options):
        asked.append((name, allow_patterns, options))
        return str(folder)

    monkeypatch.setattr(PretrainedConfig, "get_config_dict", config)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    monkeypatch.setattr(
        huggingface_hub, "list_repo_files", lambda name: ["a_30.pth", "config.json", "a_4.pth"]
    )
    loaded = hookedlm.load("gelu-2l", revision="main", token="secret", device="cpu")
    assert torch.equal(loaded(TOKENS), model(TOKENS))
    place, options = "NeelNanda/GELU_2L512W_C4_Code", {"revision": "main", "token": "secret"}
    assert asked == [(place, options), (place, ["*final.pth"], options)]
    assert checkpoints.get_checkpoint_labels("gelu-2l") == ([4, 30], "step")
    monkeypatch.setattr(huggingface_hub, "list_repo_files", lambda name: ["a_2000000000.pth"])
    assert checkpoints.get_checkpoint_labels("gelu-2l") == ([2_000_000_000], "token")


# Older layouts ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n_layers", "positions", "others"), [(1, 1, 1), (8, 1, 0), (10, 0, 0)])
def test_the_first_solu_models(n_layers, positions, others, tmp_path, monkeypatch):
    """Written as they were: transposed up to some depth, norms by another name."""
    raw = KINDS["solu"] | {"n_layers": n_layers, "normalization": "LN"}
    sizes = SIZES | {k: raw[k] for k in ("n_layers", "d_mlp", "act_fn")}
    cfg = HookedTransformerConfig(**sizes, normalization_type="LN", device="cpu", seed=0)
    model = HookedTransformer(cfg)
    old = {}
    for name, x in model.state_dict().items():
        turned = positions if "W_pos" in name else others
        old_name = name.replace("ln_final", "norm").replace("ln", "norm")
        old[old_name] = x.transpose(-2, -1) if turned and "W_" in name else x
    folder = written(tmp_path / "SoLU_old", raw, old)
    assert torch.equal(hookedlm.load(folder, device="cpu")(TOKENS), model(TOKENS))


def test_mingpt(tmp_path):
    """A GPT-2 of Hugging Face, its weights by minGPT's names."""
    torch.manual_seed(0)
    config = GPT2Config(
        n_embd=16, n_layer=3, n_head=2, n_positions=12, vocab_size=30,
        activation_function="gelu", tie_word_embeddings=False,
    )  # fmt: skip
    gpt2 = GPT2LMHeadModel(config).eval()
    for x in gpt2.parameters():
        x.data += 0.1 * torch.randn_like(x)
    names = {"ln_f": "transformer.ln_f"}
    theirs = {
        "tok_emb.weight": gpt2.transformer.wte.weight,
        "pos_emb": gpt2.transformer.wpe.weight[None],
        "head.weight": gpt2.lm_head.weight,
    }
    for layer, block in enumerate(gpt2.transformer.h):
        qkv = zip(
            block.attn.c_attn.weight.split(16, 1), block.attn.c_attn.bias.split(16), strict=True
        )
        for name, (W, b) in zip(("query", "key", "value"), qkv, strict=True):
            theirs[f"blocks.{layer}.attn.{name}.weight"] = W.T
            theirs[f"blocks.{layer}.attn.{name}.bias"] = b
        for name, linear in (
            ("attn.proj", block.attn.c_proj),
            ("mlp.0", block.mlp.c_fc),
            ("mlp.2", block.mlp.c_proj),
        ):
            theirs[f"blocks.{layer}.{name}.weight"] = linear.weight.T
            theirs[f"blocks.{layer}.{name}.bias"] = linear.bias
        names |= {f"blocks.{layer}.ln{i}": f"transformer.h.{layer}.ln_{i}" for i in (1, 2)}
    for name, place in names.items():
        norm = gpt2.get_submodule(place)
        theirs |= {f"{name}.weight": norm.weight, f"{name}.bias": norm.bias}
    raw = KINDS["gelu"] | {"architecture": "mingpt", "d_mlp": 64}
    folder = written(
        tmp_path / "othello", raw, {k: v.detach().contiguous() for k, v in theirs.items()}
    )
    ours = hookedlm.load(folder, device="cpu")(TOKENS)
    torch.testing.assert_close(ours, gpt2(TOKENS).logits, atol=1e-5, rtol=1e-5)


def test_the_layouts_are_known():
    assert set(classic_files.LAYOUTS) == {"neel-solu-old", "mingpt"}
