"""The doors: names, folders and modules, and what is said when there is nothing behind them."""

from __future__ import annotations

import json
import logging
import shutil
import socket
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import word_tokenizer
from hf_truth import logits_of, padded_batch
from tiny import TINIES, VOCAB
from torch import nn

import hookedlm
from hookedlm import HookedTransformer, loading
from hookedlm.aliases import ALIASES
from hookedlm.errors import ConversionError, HookedLMError, LoadError

TOKENS, MASK = padded_batch(VOCAB, [9, 5], "left", seed=1)


def build(name: str) -> nn.Module:
    [tiny] = [tiny for tiny in TINIES if tiny.id == name]
    return tiny.build()


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Every attempt to reach a network, which fails."""
    attempts: list[object] = []

    def refuse(self: socket.socket, address: object) -> None:
        attempts.append(address)
        raise OSError("no network in this test")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    return attempts


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint folder with a tokenizer."""
    build("llama-grouped").save_pretrained(tmp_path / "ckpt")
    word_tokenizer().save_pretrained(tmp_path / "ckpt")
    return tmp_path / "ckpt"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[SimpleNamespace]:
    """A hub on which every name is the same tiny model; what was asked of it is written down."""
    asked: list[SimpleNamespace] = []

    def model(name: str, **options):
        asked.append(SimpleNamespace(what="model", name=name, options=options))
        return build("gpt2-base"), {"missing_keys": set()}

    def tokenizer(name: str, **options):
        asked.append(SimpleNamespace(what="tokenizer", name=name, options=options))
        return word_tokenizer()

    monkeypatch.setattr(loading.AutoModelForCausalLM, "from_pretrained", model)
    monkeypatch.setattr(loading.AutoTokenizer, "from_pretrained", tokenizer)
    return asked


def exact(model: HookedTransformer, theirs: nn.Module, tolerance: float = 1e-5) -> bool:
    ours = model(TOKENS, attention_mask=MASK)[MASK.bool()]
    return torch.allclose(ours, logits_of(theirs, TOKENS, MASK)[MASK.bool()], atol=tolerance)


# --- Folders -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [str, Path])
def test_folder(folder: Path, offline: list, kind: type):
    model = hookedlm.load(kind(folder), device="cpu")
    assert exact(model, build("llama-grouped"))
    assert model.history == []
    assert not model.training
    assert model.cfg.model_name == "ckpt"
    assert model.to_str_tokens("the cat") == ["<s>", "the", "cat"]
    assert model.generate("the cat", max_new_tokens=2).startswith("the cat")
    assert offline == []


def test_folder_by_the_classic_door(folder: Path, offline: list):
    with pytest.warns(UserWarning, match="some processing does not apply"):
        model = HookedTransformer.from_pretrained(str(folder), device="cpu")
    expected = logits_of(build("llama-grouped"), TOKENS).log_softmax(-1)
    assert torch.allclose(model(TOKENS).log_softmax(-1), expected, atol=1e-4)
    assert model.history[0].name == "fold_ln"
    assert model.cfg.normalization_type == "RMSPre"
    assert model.to_str_tokens("the cat") == ["<s>", "the", "cat"]
    plain = HookedTransformer.from_pretrained_no_processing(str(folder), device="cpu")
    assert exact(plain, build("llama-grouped"))
    assert plain.history == []
    assert offline == []


def test_folder_in_the_working_directory(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(folder.parent)
    for name in ("ckpt", "./ckpt", "ckpt/"):
        model = hookedlm.load(name, device="cpu")
        assert model.cfg.model_name == "ckpt"


def test_folder_without_a_tokenizer(folder: Path, offline: list):
    for file in folder.glob("*token*"):
        file.unlink()
    model = hookedlm.load(folder, device="cpu")
    assert model.tokenizer is None
    assert exact(model, build("llama-grouped"))
    own = word_tokenizer()
    assert hookedlm.load(folder, tokenizer=own, device="cpu").tokenizer is own
    assert offline == []


def test_several_shards(folder: Path):
    whole = (folder / "model.safetensors").stat().st_size
    (folder / "model.safetensors").unlink()
    build("llama-grouped").save_pretrained(folder, max_shard_size=whole // 3)
    assert len(list(folder.glob("*.safetensors"))) > 2
    assert exact(hookedlm.load(folder, device="cpu"), build("llama-grouped"))


@pytest.mark.parametrize(
    "given, dtype",
    [
        ("float16", torch.float16),
        ("torch.bfloat16", torch.bfloat16),
        (torch.float64, torch.float64),
        (None, torch.float32),
    ],
)
def test_dtypes(folder: Path, given: object, dtype: torch.dtype):
    model = hookedlm.load(folder, dtype=given, device="cpu")
    assert model.dtype == model.cfg.dtype == dtype
    in_memory = hookedlm.load(build("llama-grouped"), dtype=given)
    assert in_memory.dtype == in_memory.cfg.dtype == dtype


def test_dtype_of_the_checkpoint_is_kept(tmp_path: Path):
    build("llama-grouped").bfloat16().save_pretrained(tmp_path / "half")
    assert hookedlm.load(tmp_path / "half", device="cpu").dtype == torch.bfloat16
    # The classic door's default is float32.
    classic = HookedTransformer.from_pretrained_no_processing(str(tmp_path / "half"), device="cpu")
    assert classic.dtype == torch.float32


@pytest.mark.parametrize("dtype", ["float33", "int64x", "nn", "Tensor", "int64"])
def test_unknown_dtype(folder: Path, dtype: str):
    with pytest.raises(LoadError, match=f"dtype='{dtype}'.*float32"):
        hookedlm.load(folder, dtype=dtype)


def test_first_layers(folder: Path, caplog: pytest.LogCaptureFixture):
    logging.getLogger("transformers").addHandler(caplog.handler)
    try:
        model = hookedlm.load(folder, first_n_layers=2, device="cpu")
    finally:
        logging.getLogger("transformers").removeHandler(caplog.handler)
    assert caplog.records == []  # no list of the weights left out
    assert model.cfg.n_layers == len(model.blocks) == 2
    full = hookedlm.load(folder, device="cpu")
    assert torch.equal(model(TOKENS, stop_at_layer=2), full(TOKENS, stop_at_layer=2))
    for n in (0, 4):
        with pytest.raises(LoadError, match=f"first_n_layers={n}: this model has 3 layers"):
            hookedlm.load(folder, first_n_layers=n)
    with pytest.raises(LoadError, match=r"first_n_layers.*module"):
        hookedlm.load(build("gpt2-base"), first_n_layers=1)


def test_fewer_positions():
    theirs = build("gpt2-base")
    model = hookedlm.load(theirs, n_ctx=16)
    assert model.cfg.n_ctx == 16
    assert torch.equal(model.W_pos, theirs.transformer.wpe.weight[:16])
    assert model.W_pos.data_ptr() == theirs.transformer.wpe.weight.data_ptr()
    assert exact(model, theirs)
    with pytest.raises(HookedLMError, match=r"17 positions.*16"):
        model(torch.zeros(1, 17, dtype=torch.long))
    with pytest.raises(LoadError, match=r"n_ctx=65.*64 position embeddings"):
        hookedlm.load(theirs, n_ctx=65)
    # Rotary positions go on for as long as one likes.
    model = hookedlm.load(build("llama-grouped"), n_ctx=200)
    assert model.cfg.n_ctx == 200
    assert model(torch.zeros(1, 100, dtype=torch.long)).shape[1] == 100


# --- Modules -------------------------------------------------------------------------------------


def test_module(offline: list):
    theirs = build("gpt2-base")
    tokenizer = word_tokenizer()
    model = hookedlm.load(theirs, tokenizer=tokenizer)
    assert model.tokenizer is tokenizer
    assert exact(model, theirs)
    assert hookedlm.load(theirs).tokenizer is None
    assert model.cfg.device == "cpu"
    assert offline == []


def test_module_keeps_its_dtype_and_place():
    theirs = build("gpt2-base")
    model = hookedlm.load(theirs, dtype="float64")
    assert {p.dtype for p in theirs.parameters()} == {torch.float32}
    assert model.dtype == torch.float64
    assert exact(hookedlm.load(theirs), theirs)


def test_hf_model(offline: list):
    """The classic door's way to hand a module over; the name is only a name then."""
    theirs = build("gpt2-untied")
    before = {name: value.clone() for name, value in theirs.state_dict().items()}
    model = HookedTransformer.from_pretrained("gpt2", hf_model=theirs, tokenizer=word_tokenizer())
    assert model.cfg.model_name == "gpt2"
    assert len(model.history) == 4
    assert all(torch.equal(value, before[n]) for n, value in theirs.state_dict().items())
    expected = logits_of(theirs, TOKENS).log_softmax(-1)
    assert torch.allclose(model(TOKENS).log_softmax(-1), expected, atol=1e-4)
    assert offline == []


def test_hf_model_finds_its_tokenizer_by_name(hub: list[SimpleNamespace]):
    model = HookedTransformer.from_pretrained("gpt2-small", hf_model=build("gpt2-base"))
    assert model.tokenizer is not None
    assert [(call.what, call.name) for call in hub] == [("tokenizer", "gpt2")]


def test_keywords_for_a_checkpoint_with_a_module():
    with pytest.raises(LoadError, match=r"trust_remote_code.*not with a module"):
        hookedlm.load(build("gpt2-base"), trust_remote_code=True)


def test_strict():
    assert hookedlm.load(build("gpt2-base"), strict=True).fidelity()
    theirs = build("gpt2-base")
    theirs.transformer.h[1].attn.extra = nn.Parameter(torch.ones(1))  # nobody accounts for it
    assert exact(hookedlm.load(theirs), theirs)
    with pytest.raises(ConversionError, match=r"(?s)attn.*extra|extra"):
        hookedlm.load(theirs, strict=True)


def test_defaults_for_text():
    model = hookedlm.load(
        build("gpt2-base"),
        tokenizer=word_tokenizer(),
        default_prepend_bos=False,
        default_padding_side="left",
    )
    assert model.to_tokens("the cat").shape == (1, 2)
    assert model.to_tokens(["the cat", "the"])[1, 0] == 0
    assert model.cfg.default_prepend_bos is False


# --- Names ---------------------------------------------------------------------------------------


def test_short_names(hub: list[SimpleNamespace]):
    model = hookedlm.load("gpt2-small", device="cpu")
    assert [call.name for call in hub] == ["gpt2", "gpt2"]
    assert exact(model, build("gpt2-base"))
    hub.clear()
    HookedTransformer.from_pretrained("pythia-70m", device="cpu")
    assert {call.name for call in hub} == {"EleutherAI/pythia-70m"}
    hub.clear()
    hookedlm.load("somebody/something", device="cpu")
    assert {call.name for call in hub} == {"somebody/something"}
    hub.clear()
    hookedlm.load("GPT2-Small", device="cpu")
    assert {call.name for call in hub} == {"gpt2"}


def test_every_short_name_leads_somewhere_else():
    for short, name in ALIASES.items():
        assert loading.resolve(short) == (name, False)
        assert loading.resolve(short.upper())[0] in (name, short.upper())
        assert name not in ALIASES


def test_options_reach_transformers(hub: list[SimpleNamespace]):
    hookedlm.load("gpt2", revision="step3", dtype="float32", device="cpu", token="secret")
    model, tokenizer = hub
    assert model.options["revision"] == tokenizer.options["revision"] == "step3"
    assert model.options["dtype"] == torch.float32
    assert model.options["token"] == "secret"
    hub.clear()
    HookedTransformer.from_pretrained("pythia-70m", checkpoint_value=512, device="cpu")
    assert {call.options["revision"] for call in hub} == {"step512"}
    hub.clear()
    indexed = HookedTransformer.from_pretrained("pythia-70m", checkpoint_index=3, device="cpu")
    assert {call.options["revision"] for call in hub} == {"step4"}
    assert (indexed.cfg.checkpoint_value, indexed.cfg.checkpoint_index) == (4, 3)
    hub.clear()
    HookedTransformer.from_pretrained("stanford-gpt2-small-a", checkpoint_index=1, device="cpu")
    assert {call.options["revision"] for call in hub} == {"checkpoint-10"}
    assert {call.name for call in hub} == {"stanford-crfm/alias-gpt2-small-x21"}
    with pytest.raises(NotImplementedError, match="n_devices"):
        HookedTransformer.from_pretrained("pythia-70m", n_devices=2)


def one_line(error: BaseException) -> bool:
    return "\n" not in str(error)


@pytest.mark.parametrize("door", [hookedlm.load, HookedTransformer.from_pretrained])
def test_unknown_name_without_a_network(door, offline: list):
    with pytest.raises(LoadError) as caught:
        door("gpt2-smal")
    assert one_line(caught.value)
    for word in ("no model 'gpt2-smal'", "gpt2-small", "demo", "folder"):
        assert word in str(caught.value)
    with pytest.raises(LoadError, match="pythia-70m"):
        door("pythia-70n")
    assert offline == []  # HF_HUB_OFFLINE is set


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "~/no-such-folder"])
def test_missing_folder(name: str, offline: list):
    with pytest.raises(LoadError, match=f"no folder '{name}'") as caught:
        hookedlm.load(name)
    assert one_line(caught.value)
    with pytest.raises(LoadError, match="no folder"):
        hookedlm.load(Path("/nowhere/at/all"))
    assert offline == []


def test_folder_without_a_config(tmp_path: Path, offline: list):
    with pytest.raises(LoadError, match="can't read a causal language model from") as caught:
        hookedlm.load(tmp_path)
    assert one_line(caught.value)
    assert str(tmp_path) in str(caught.value)
    assert offline == []


def test_folder_with_another_kind_of_model(folder: Path):
    (folder / "config.json").write_text(json.dumps({"model_type": "no_such_type"}))
    with pytest.raises(LoadError, match="no_such_type"):
        hookedlm.load(folder)


def test_folder_without_weights(folder: Path):
    (folder / "model.safetensors").unlink()
    with pytest.raises(LoadError, match=r"can't read .*safetensors"):
        hookedlm.load(folder)


@pytest.mark.parametrize("how", ["cut", "header", "empty"])
def test_damaged_weights(folder: Path, how: str):
    file = folder / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(
        {"cut": content[: len(content) // 2], "header": b"\xff" * 64 + content[64:], "empty": b""}[
            how
        ]
    )
    with pytest.raises(LoadError, match="can't read a causal language model") as caught:
        hookedlm.load(folder)
    assert one_line(caught.value)


def test_missing_weights_are_not_made_up(folder: Path):
    """A checkpoint that lacks a matrix would get a random one."""
    from safetensors.torch import load_file, save_file

    file = folder / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(LoadError, match=r"model.layers.1.mlp.up_proj.weight"):
        hookedlm.load(folder)


def test_weights_of_other_sizes(folder: Path):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 24}))
    with pytest.raises(LoadError, match="can't read a causal language model"):
        hookedlm.load(folder)


def test_damaged_config(folder: Path):
    (folder / "config.json").write_text("{")
    with pytest.raises(LoadError, match="can't read a causal language model"):
        hookedlm.load(folder)


def test_no_warnings(folder: Path, capsys: pytest.CaptureFixture[str]):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hookedlm.load(folder, device="cpu")
    out, _ = capsys.readouterr()
    assert out == ""
    shutil.rmtree(folder)


# --- Memory --------------------------------------------------------------------------------------

PEAK = """
import ctypes, gc, sys
import torch, transformers
import hookedlm
from transformers import LlamaConfig, LlamaForCausalLM

torch.set_num_threads(1)

def status(key):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))

# Imports and first passes, on a model of no size.
small = LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, hidden_size=16, intermediate_size=16,
    num_attention_heads=2, num_key_value_heads=1, vocab_size=50))
small.save_pretrained(sys.argv[1] + "/small")
hookedlm.load(sys.argv[1] + "/small", device="cpu")(torch.zeros(1, 3, dtype=torch.long))
gc.collect()
ctypes.CDLL(None).malloc_trim(0)
with open("/proc/self/clear_refs", "w") as clear:
    clear.write("5")  # the high-water mark starts here
before = status("VmRSS")
model = hookedlm.load(sys.argv[1] + "/big", device="cpu")
size = sum(p.numel() * p.element_size() for p in model.parameters())
print(size, status("VmHWM") - before)
"""


@pytest.mark.slow
def test_peak_memory_of_loading(tmp_path: Path):
    """Reading a checkpoint holds the weights once: peak resident memory of a process of its own."""
    if sys.platform != "linux":
        pytest.skip("resident memory is read from /proc")
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        num_hidden_layers=8,
        hidden_size=768,
        intermediate_size=2048,
        num_attention_heads=12,
        num_key_value_heads=4,
        vocab_size=4000,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "big")
    run = subprocess.run(
        [sys.executable, "-c", PEAK, str(tmp_path)], capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr
    size, peak = map(int, run.stdout.split())
    assert size > 190e6
    assert peak < 1.15 * size
