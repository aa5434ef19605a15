"""Types without a row, and parts without a uniform form: they load at once, exactly, with hooks."""

from __future__ import annotations

import hf_truth
import pytest
import torch
from tiny import quiet_transformers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

import hookedlm
from hookedlm.errors import HookNameError
from hookedlm.families import FAMILIES

VOCAB = 96
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LATENT = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
# type -> (its own sizes, what the reports of its parts must say once its row is gone)
TYPES: dict[str, tuple[dict, str]] = {
    "mamba": ({"state_size": 8}, "opaque block"),
    "deepseek_v3": (
        LATENT
        | {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}
        | {"moe_intermediate_size": 24, "first_k_dense_replace": 1},
        "opaque attention",
    ),
    "qwen2_moe": (
        {"num_key_value_heads": 2, "num_experts": 4, "num_experts_per_tok": 2}
        | {"moe_intermediate_size": 24, "shared_expert_intermediate_size": 24},
        "opaque MLP in uniform block",
    ),
    "jamba": (
        {"num_key_value_heads": 2, "mamba_d_state": 8, "mamba_dt_rank": 4, "num_experts": 2}
        | {"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False},
        "opaque block",
    ),
    "granitemoe": (
        {"num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2},
        "opaque",
    ),
    "rwkv": ({"attention_hidden_size": 32}, "opaque block"),
    "biogpt": ({}, "opaque block"),
    "helium": ({"num_key_value_heads": 2, "head_dim": 8}, "uniform, sequential"),
    "smollm3": (
        {"num_key_value_heads": 2, "no_rope_layer_interval": 2},
        "uniform, sequential",
    ),
}


@pytest.fixture(autouse=True)
def _without_their_rows(monkeypatch):
    """These tests are about types that have no row."""
    for kind in TYPES:
        if kind != "mamba":
            monkeypatch.delitem(FAMILIES, kind, raising=False)


def build(model_type: str, **extra):
    with quiet_transformers(), torch.random.fork_rng():
        torch.manual_seed(0)
        config = AutoConfig.for_model(model_type, **SIZES, **extra)
        model = AutoModelForCausalLM.from_config(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def tokens():
    return torch.randint(3, VOCAB, (2, 10), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def zeroed(theirs, path: str, x):
    """Hugging Face's logits with the stream entering block 1 zeroed by a torch hook."""

    def zero(module, args, kwargs):
        if args:
            return (torch.zeros_like(args[0]), *args[1:]), kwargs
        return args, kwargs | {"hidden_states": torch.zeros_like(kwargs["hidden_states"])}

    block = theirs.get_submodule(path)[1]
    handle = block.register_forward_pre_hook(zero, with_kwargs=True)
    try:
        return theirs(x, use_cache=False).logits
    finally:
        handle.remove()


def blocks_path(theirs) -> str:
    return next(
        name
        for name, module in theirs.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == 3
    )


@pytest.mark.parametrize("model_type", TYPES)
@torch.no_grad()
def test_a_type_without_a_row(model_type: str, monkeypatch):
    monkeypatch.delitem(FAMILIES, model_type, raising=False)
    sizes, form = TYPES[model_type]
    theirs = build(model_type, **sizes)
    ours = hookedlm.load(theirs)
    assert any(part.form.startswith(form) for part in ours.fidelity().parts), ours.fidelity()
    x = tokens()
    expected = theirs(x, use_cache=False).logits
    got, cache = ours.run_with_cache(x)
    assert float((got - expected).abs().max() / expected.abs().max()) <= 1e-5
    for layer in range(3):
        for point in ("pre", "post"):
            assert cache[f"resid_{point}", layer].shape == (2, 10, 32)
    name = "blocks.1.hook_resid_pre"
    edited = ours.run_with_hooks(x, fwd_hooks=[(name, lambda s, hook: torch.zeros_like(s))])
    same = zeroed(theirs, blocks_path(theirs), x)
    assert float((edited - same).abs().max() / same.abs().max().clamp(min=1e-6)) <= 1e-5
    assert float((edited - got).abs().max()) > 1e-4


@torch.no_grad()
def test_a_mixer_has_hooks_on_both_ends():
    ours = hookedlm.load(build("mamba", state_size=8))
    x = tokens()
    logits, cache = ours.run_with_cache(x)
    stream = cache["resid_pre", 1] + cache["blocks.1.mixer.hook_out"]
    torch.testing.assert_close(stream, cache["resid_post", 1])
    torch.testing.assert_close(
        cache["blocks.1.mixer.hook_in"], ours.blocks[1].ln1(cache["resid_pre", 1])
    )
    edited = ours.run_with_hooks(x, fwd_hooks=[("blocks.1.mixer.hook_out", lambda s, hook: 0 * s)])
    assert not torch.equal(edited, logits)
    with pytest.raises(HookNameError, match="Hugging Face wrote it"):
        ours.run_with_cache(x, names_filter="blocks.1.attn.hook_pattern")


@torch.no_grad()
def test_opaque_attention_in_a_uniform_block_adds_up(monkeypatch):
    monkeypatch.delitem(FAMILIES, "deepseek_v3", raising=False)
    sizes, _ = TYPES["deepseek_v3"]
    ours = hookedlm.load(build("deepseek_v3", **sizes))
    _, cache = ours.run_with_cache(tokens())
    parts = cache.decompose_resid()
    torch.testing.assert_close(parts.sum(0), cache["resid_post", -1], rtol=1e-5, atol=1e-5)


class OwnConfig(PretrainedConfig):
    model_type = "somebodys_own"


class OwnBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.Linear(16, 16)

    def forward(self, x):
        past = x.cumsum(1) / torch.arange(1, x.shape[1] + 1)[:, None]
        return x + torch.tanh(self.attention(past))


class OwnBody(nn.Module):
    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(VOCAB, 16)
        self.stack = nn.ModuleList([OwnBlock() for _ in range(3)])

    def forward(self, input_ids=None, inputs_embeds=None):
        x = self.words(input_ids) if inputs_embeds is None else inputs_embeds
        for block in self.stack:
            x = block(x)
        return x


class Own(PreTrainedModel):
    config_class = OwnConfig

    def __init__(self, config):
        super().__init__(config)
        self.body = OwnBody()
        self.out = nn.Linear(16, VOCAB)
        self.post_init()

    def get_input_embeddings(self):
        return self.body.words

    def get_output_embeddings(self):
        return self.out

    def forward(self, input_ids=None, inputs_embeds=None):
        return CausalLMOutput(logits=self.out(self.body(input_ids, inputs_embeds)))


@torch.no_grad()
def test_a_users_own_class_with_numbered_blocks():
    theirs = Own(OwnConfig(vocab_size=VOCAB, hidden_size=16, num_attention_heads=1)).eval()
    ours = hookedlm.load(theirs)
    x = tokens()
    torch.testing.assert_close(ours(x), theirs(x).logits)
    _, cache = ours.run_with_cache(x)
    torch.testing.assert_close(cache["resid_post", 2], theirs.body(x))


def test_truth_helpers_know_the_blocks():
    theirs = build("smollm3", num_key_value_heads=2)
    assert len(hf_truth.position_ids(torch.ones(1, 3, dtype=torch.long))[0]) == 3
    assert blocks_path(theirs) == "model.layers"
