"""What types without a row must survive: padding, caches, odd heads and odd loops.

`test_unknown_types.py` loads such types and edits their streams; here they are padded, continued
and refused.
"""

from __future__ import annotations

import hf_truth
import pytest
import torch
from tiny import quiet_transformers
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DynamicCache,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import CausalLMOutput

import hookedlm
from hookedlm.convert.guess import guess_blocks
from hookedlm.errors import ConversionError, InputError
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
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 24}
TYPES = {
    "deepseek_v3": EXPERTS
    | {"q_lora_rank": 16, "kv_lora_rank": 16, "n_routed_experts": 4, "n_group": 1}
    | {"qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "topk_group": 1}
    | {"first_k_dense_replace": 1},
    "qwen2_moe": EXPERTS
    | {"num_key_value_heads": 2, "num_experts": 4, "shared_expert_intermediate_size": 24},
    "granitemoe": {"num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2},
    "biogpt": {},
    "helium": {"num_key_value_heads": 2, "head_dim": 8},
    "smollm3": {"num_key_value_heads": 2, "no_rope_layer_interval": 2},
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
        config = AutoConfig.for_model(model_type, **(SIZES | extra))
        model = AutoModelForCausalLM.from_config(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def assert_close(ours, theirs, mask=None):
    if mask is not None:
        ours, theirs = ours[mask.bool()], theirs[mask.bool()]
    assert float((ours - theirs).abs().max() / theirs.abs().max()) <= 1e-5


def prompts(side: str = "left"):
    return hf_truth.padded_batch(VOCAB, [9, 4, 7], side, 0, seed=3)


# --- Padded and continued ------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", TYPES)
@torch.no_grad()
def test_padded_batches(model_type: str):
    theirs = build(model_type, **TYPES[model_type])
    ours = hookedlm.load(theirs)
    for side in ("left", "right"):
        tokens, mask = prompts(side)
        expected = hf_truth.logits_of(theirs, tokens, mask)
        assert_close(ours(tokens, attention_mask=mask), expected, mask)


@pytest.mark.parametrize("model_type", TYPES)
def test_generation(model_type: str):
    theirs = build(model_type, **TYPES[model_type])
    ours = hookedlm.load(theirs)
    tokens, mask = prompts()
    expected = hf_truth.greedy(theirs, tokens, mask, 6)
    options = {"max_new_tokens": 6, "do_sample": False, "stop_at_eos": False}
    for cached in (True, False):
        got = ours.generate(tokens, attention_mask=mask, use_past_kv_cache=cached, **options)
        assert torch.equal(got[:, -6:], expected), f"cached={cached}"


def test_a_base_that_keeps_no_past_is_not_asked_to():
    """OpenAI's first GPT takes no cache; one that is handed in must not be dropped unnoticed."""
    theirs = build("openai-gpt", n_embd=32, n_layer=3, n_head=4, n_positions=64)
    ours = hookedlm.load(theirs)
    tokens, _ = prompts()
    expected = hf_truth.greedy(theirs, tokens, None, 5)
    options = {"max_new_tokens": 5, "do_sample": False, "stop_at_eos": False}
    got = ours.generate(tokens, **options)  # finds out by itself that there is no cache
    assert torch.equal(got[:, -5:], expected)
    with pytest.raises(InputError, match="use_past_kv_cache=False"):
        ours(tokens, past_kv_cache=DynamicCache())


# --- Heads and embeddings of another width -------------------------------------------------------


@torch.no_grad()
def test_a_head_of_another_width_is_wrapped(monkeypatch):
    """RemBERT embeds and reads out in widths of their own, with layers between; without its row."""
    monkeypatch.delitem(FAMILIES, "rembert")
    extra = {"input_embedding_size": 16, "output_embedding_size": 24, "is_decoder": True}
    theirs = build("rembert", **extra)
    ours = hookedlm.load(theirs)
    assert ours.fidelity().part("embed").opaque
    assert ours.fidelity().part("logits").opaque
    tokens, mask = prompts()
    assert_close(ours(tokens), hf_truth.logits_of(theirs, tokens))
    assert_close(ours(tokens, attention_mask=mask), hf_truth.logits_of(theirs, tokens, mask), mask)


# --- Somebody's own class ------------------------------------------------------------------------


class OwnConfig(PretrainedConfig):
    model_type = "somebodys_second"


class OwnBlock(nn.Module):
    kind = "averaging"  # of the class, not of the module: the loop below asks for it

    def __init__(self):
        super().__init__()
        self.attention = nn.Linear(16, 16)

    def forward(self, x, attention_mask=None):
        past = x.cumsum(1) / torch.arange(1, x.shape[1] + 1)[:, None]
        return x + torch.tanh(self.attention(past)) * attention_mask["strength"]


class OwnBody(nn.Module):
    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(VOCAB, 16)
        self.stack = nn.ModuleList([OwnBlock() for _ in range(3)])

    def forward(self, input_ids=None, inputs_embeds=None):
        x = self.words(input_ids) if inputs_embeds is None else inputs_embeds
        for block in self.stack:
            assert block.kind == "averaging"
            x = block(x, attention_mask={"strength": 0.5})  # no tensor
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
def test_a_loop_that_asks_the_class_of_its_blocks_and_hands_on_no_tensor():
    theirs = Own(OwnConfig(vocab_size=VOCAB, hidden_size=16, num_attention_heads=1)).eval()
    for parameter in theirs.parameters():  # biases too: a zeroed stream should leave a trace
        parameter.normal_(generator=torch.Generator().manual_seed(parameter.numel()))
    assert guess_blocks(theirs) == "body.stack"
    ours = hookedlm.load(theirs)
    tokens, _ = prompts()
    assert_close(ours(tokens), theirs(tokens).logits)

    # The same edit on both sides.
    name = "blocks.1.hook_resid_pre"
    edited = ours.run_with_hooks(tokens, fwd_hooks=[(name, lambda x, hook: torch.zeros_like(x))])
    handle = theirs.body.stack[1].register_forward_pre_hook(lambda _, args: (0 * args[0],))
    same = theirs(tokens).logits
    handle.remove()
    assert_close(edited, same)
    assert not torch.equal(edited, ours(tokens))


class HandingBlock(OwnBlock):
    def forward(self, x, before=None):
        now = torch.tanh(self.attention(x))
        return (x + now if before is None else x + now + before), now


class HandingBody(OwnBody):
    def __init__(self):
        super().__init__()
        self.stack = nn.ModuleList([HandingBlock() for _ in range(3)])

    def forward(self, input_ids=None, inputs_embeds=None):
        x = self.words(input_ids) if inputs_embeds is None else inputs_embeds
        before = None
        for block in self.stack:
            x, before = block(x, before=before)
        return x


@torch.no_grad()
def test_blocks_that_hand_each_other_more_than_the_stream_keep_their_loop():
    """Each block alone computes what it should; only the whole would be wrong."""
    theirs = Own(OwnConfig(vocab_size=VOCAB, hidden_size=16, num_attention_heads=1)).eval()
    theirs.body = HandingBody()
    ours = hookedlm.load(theirs)
    assert "block 1 is called with before, which other blocks compute" in str(ours.fidelity())
    tokens, _ = prompts()
    assert_close(ours(tokens), theirs(tokens).logits)


# --- Refused in words ----------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ["granitemoe", "biogpt"])
def test_strict_refuses_opaque_parts(model_type: str):
    with pytest.raises(ConversionError, match="not uniform"):
        hookedlm.load(build(model_type, **TYPES[model_type]), strict=True)
