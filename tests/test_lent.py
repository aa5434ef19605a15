"""Models whose loop stays Hugging Face's own: their blocks are lent to it.

The truth is Hugging Face's model, whole or with a torch hook at a block; every claim is checked on
a loop over two stacks (HRM), on several streams (Gemma 3n, DeepSeek V4), on blocks that hand each
other more than a stream (Zaya), and on bytes in patches (BLT).
"""

from __future__ import annotations

import copy
from functools import cache

import hf_truth
import pytest
import torch
from conftest import word_tokenizer
from hook_sets import dead
from tiny import perturb, quiet_transformers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PreTrainedModel

import hookedlm
from hookedlm import HookedTransformer
from hookedlm.axes import STREAMS, split_axes
from hookedlm.convert.hf import at
from hookedlm.errors import ConversionError, HookNeverFiredError, InputError
from hookedlm.lent import loop_of

VOCAB = 96
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
PART = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
BYTES = PART | {"num_hidden_layers": 2, "vocab_size": VOCAB}
TYPES: dict[str, dict] = {
    "hrm_text": {"num_hidden_layers": 2, "head_dim": 8, "initializer_range": 1.0},
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": VOCAB,
        "laurel_rank": 4,
        "sliding_window": 4,
        "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0],
        "intermediate_size": [48] * 4,
    },
    "deepseek_v4": {
        "num_hidden_layers": 3,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "q_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "moe_intermediate_size": 24,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "index_n_heads": 2,
        "index_head_dim": 16,
        "index_topk": 4,
        "sliding_window": 4,
    },
    "zaya": {
        "num_hidden_layers": 3,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "num_experts": 4,
        "num_experts_per_tok": 1,
        "moe_intermediate_size": 24,
    },
    "blt": {
        "encoder_config": BYTES | {"hidden_size_global": 32},
        "decoder_config": BYTES | {"hidden_size_global": 32},
        "global_config": PART | {"num_hidden_layers": 2},
        "patcher_config": BYTES,
        "encoder_hash_byte_group_vocab": 50,
        "local_attention_window_len": 6,
    },
}
WHY = {
    "hrm_text": "its blocks stand in several lists",
    "gemma3n_text": "several streams",
    "deepseek_v4": "several streams",
    "zaya": "prev_router_hidden_states, which other blocks compute",
    "blt": "its blocks stand in several lists",
}
each_type = pytest.mark.parametrize("kind", TYPES)
REMEMBERING = [kind for kind in TYPES if kind != "blt"]


@cache
def theirs(kind: str) -> PreTrainedModel:
    """A tiny model as transformers builds it, with random weights everywhere."""
    sizes = {} if kind == "blt" else SIZES
    with quiet_transformers(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = AutoConfig.for_model(kind, **({"vocab_size": VOCAB} | sizes | TYPES[kind]))
        model = AutoModelForCausalLM.from_config(config).eval()
    perturb(model, 0)
    return model


@cache
def ours(kind: str) -> HookedTransformer:
    return hookedlm.load(theirs(kind))


@pytest.fixture
def prompts() -> torch.Tensor:
    return torch.randint(3, VOCAB, (2, 9), generator=torch.Generator().manual_seed(3))


def logits_of(model: nn.Module, tokens: torch.Tensor, mask: torch.Tensor | None = None):
    inputs = hf_truth.inputs_of(model, tokens, mask)
    with torch.no_grad():
        return model(**inputs | {"use_cache": False}).logits


def error(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


def visits(kind: str) -> list[tuple[int, nn.Module, int]]:
    """(layer here, Hugging Face's module, which of its calls) for all layers."""
    loop = loop_of(ours(kind))
    assert loop is not None
    return [
        (layer, at(theirs(kind), loop.paths[number]), loop.order[:layer].count(number))
        for layer, number in enumerate(loop.order)
    ]


# --- The same numbers -----------------------------------------------------------------------------


@each_type
@torch.no_grad()
def test_logits_are_hugging_faces(kind: str, prompts):
    model, given = ours(kind), theirs(kind)
    assert error(model(prompts), logits_of(given, prompts)) <= 1e-5
    for side in ("left", "right"):
        tokens, mask = hf_truth.padded_batch(VOCAB, [9, 4, 7], side, 0, seed=3)
        real = mask.bool()
        found = model(tokens, attention_mask=mask)
        assert error(found[real], logits_of(given, tokens, mask)[real]) <= 1e-5


@each_type
@torch.no_grad()
def test_half_precision_is_bit_identical(kind: str, prompts):
    half = copy.deepcopy(theirs(kind)).to(torch.bfloat16)
    assert torch.equal(hookedlm.load(half)(prompts), logits_of(half, prompts))


@each_type
def test_the_users_module_is_left_alone(kind: str, prompts):
    before = logits_of(theirs(kind), prompts)
    names = {type(module).__name__ for module in theirs(kind).modules()}
    ours(kind).run_with_hooks(prompts, fwd_hooks=[("blocks.0.hook_resid_pre", lambda x, hook: -x)])
    assert torch.equal(logits_of(theirs(kind), prompts), before)
    assert "Slot" not in names


@each_type
def test_the_report_says_why(kind: str):
    report = ours(kind).fidelity()
    assert WHY[kind] in str(report)
    assert report.logits.error <= 1e-5
    with pytest.raises(ConversionError, match="strict=True"):
        hookedlm.load(theirs(kind), strict=True)


@each_type
@torch.no_grad()
def test_generation_is_hugging_faces(kind: str):
    tokens, mask = hf_truth.padded_batch(VOCAB, [9, 4, 7], "left", 0, seed=3)
    options = {"max_new_tokens": 5, "do_sample": False}
    for cached in (True, False):
        expected = theirs(kind).generate(
            tokens,
            attention_mask=mask,
            use_cache=cached and kind in REMEMBERING,
            eos_token_id=None,
            pad_token_id=0,
            **options,
        )
        found = ours(kind).generate(
            tokens,
            attention_mask=mask,
            use_past_kv_cache=cached,
            stop_at_eos=False,
            verbose=False,
            **options,
        )
        assert torch.equal(found, expected)


@pytest.mark.parametrize("kind", REMEMBERING)
@torch.no_grad()
def test_a_cache_continues_a_text(kind: str, prompts):
    model, config = ours(kind), theirs(kind).config
    past, known = DynamicCache(config=config), DynamicCache(config=config)
    pieces = [prompts[:, :6], prompts[:, 6:7], prompts[:, 7:8]]
    found = [model(piece, past_kv_cache=past) for piece in pieces]
    expected = [theirs(kind)(p, past_key_values=known, use_cache=True).logits for p in pieces]
    assert error(torch.cat(found, 1), torch.cat(expected, 1)) <= 1e-5
    assert model.run_state.pos_offset == 7


def test_a_model_that_can_not_be_continued_says_so(prompts):
    with pytest.raises(InputError, match=r"can't be continued .* use_past_kv_cache=False"):
        ours("blt")(prompts, past_kv_cache=DynamicCache())


# --- Hooks ----------------------------------------------------------------------------------------


@each_type
@torch.no_grad()
def test_an_edit_of_a_stream_is_the_same_edit_of_hugging_faces(kind: str, prompts):
    """Half as much again of what enters each layer, one layer at a time, on both sides."""
    plain = ours(kind)(prompts)
    for layer, module, visit in visits(kind):
        calls = []

        def more(_module, args, kwargs, calls=calls, visit=visit):
            calls.append(1)
            if len(calls) - 1 != visit:
                return None
            return (args[0] * 1.5, *args[1:]), kwargs

        handle = module.register_forward_pre_hook(more, with_kwargs=True)
        expected = logits_of(theirs(kind), prompts)
        handle.remove()
        name = f"blocks.{layer}.hook_resid_pre"
        found = ours(kind).run_with_hooks(prompts, fwd_hooks=[(name, lambda x, hook: x * 1.5)])
        assert error(found, expected) <= 1e-5
        assert not torch.equal(found, plain)


@each_type
@torch.no_grad()
def test_every_hook_fires_once_and_its_edit_counts(kind: str, prompts):
    assert dead(ours(kind), prompts) == []


@each_type
@torch.no_grad()
def test_recorded_tensors_have_their_axes_and_are_hugging_faces(kind: str, prompts):
    model, seen = ours(kind), {}
    for layer, module, visit in visits(kind):
        count = []

        def look(_module, args, kwargs, out, layer=layer, visit=visit, count=count):
            count.append(1)
            if len(count) - 1 == visit:
                out = out[0] if isinstance(out, tuple) else out
                seen[layer] = (hf_truth.hidden_states(args, kwargs).clone(), out.clone())

        handle = module.register_forward_hook(look, with_kwargs=True)
        logits_of(theirs(kind), prompts)
        handle.remove()
    _, cache = model.run_with_cache(prompts)
    for name, x in cache.items():
        axes = model.hook_dict[name].axes
        assert axes is not None
        assert len(axes) == x.ndim
        sizes = dict(zip(axes, x.shape, strict=True))
        assert sizes["batch"] == 2
        assert sizes.get("pos", 9) == 9
    for layer, (before, after) in seen.items():
        for point, stream in (("pre", before), ("post", after)):
            recorded = cache[f"blocks.{layer}.hook_resid_{point}"]
            if kind == "gemma3n_text":  # which keeps its streams first
                stream = stream.movedim(0, 2)
            assert error(recorded, stream) <= 1e-5


def test_several_streams_have_an_axis_of_their_own():
    for kind, n in (("gemma3n_text", 4), ("deepseek_v4", 4)):
        point = ours(kind).hook_dict["blocks.1.hook_resid_post"]
        assert point.axes == split_axes(STREAMS) == ("batch", "pos", "stream", "d_model")
        _, cache = ours(kind).run_with_cache(torch.tensor([[5, 6, 7]]), pos_slice=-1)
        assert cache["resid_post", 1].shape == (1, 1, n, 32)
        _, cache = ours(kind).run_with_cache(torch.tensor([[5, 6, 7]]), remove_batch_dim=True)
        assert cache["resid_post", 1].shape == (3, n, 32)


@torch.no_grad()
def test_every_visit_of_a_block_is_a_layer():
    """Two stacks of two blocks; twice (three times the first, once the second)."""
    model, loop = ours("hrm_text"), loop_of(ours("hrm_text"))
    assert loop is not None
    assert loop.order == [0, 1] * 3 + [2, 3] + [0, 1] * 3 + [2, 3]
    assert model.cfg.n_layers == theirs("hrm_text").config.num_hidden_layers == 16
    first, again = model.blocks[0], model.blocks[8]
    assert first.attn.W_Q is again.attn.W_Q
    assert first.attn.hook_q is not again.attn.hook_q
    assert model.blocks[6].attn.W_Q is not first.attn.W_Q
    report = model.fidelity()
    assert report.part("blocks.8").form == "uniform, sequential"
    assert "model.L_module.layers, visit 4 of 6" in report.part("blocks.8").reason


@torch.no_grad()
def test_weights_of_visits_stay_one(prompts):
    """Moved, copied and edited in place, the visits of a block share what they shared."""
    wide = copy.deepcopy(ours("hrm_text")).to(torch.float64)
    assert wide.blocks[0].attn.W_Q is wide.blocks[2].attn.W_Q
    assert ours("hrm_text").blocks[0].attn.W_Q.dtype == torch.float32
    given = copy.deepcopy(theirs("hrm_text")).double()  # whose norms stay in float32
    assert error(wide(prompts), logits_of(given, prompts)) <= 1e-4
    wide.blocks[0].mlp.W_out.zero_()
    given.model.L_module.layers[0].mlp.down_proj.weight.zero_()
    assert error(wide(prompts), logits_of(given, prompts)) <= 1e-4


@each_type
def test_gradients_are_hugging_faces(kind: str, prompts):
    """Of the loss for the embedding, and seen on their way back by the last block."""
    model, grads = ours(kind), {}
    name = f"blocks.{len(model.blocks) - 1}.hook_resid_post"
    with model.hooks(bwd_hooks=[(name, lambda grad, hook: grads.update(here=grad.clone()))]):
        model(prompts)[:, -1, 5].sum().backward()
    module, seen = visits(kind)[-1][1], []

    def keep(_module, args, out):
        out = out[0] if isinstance(out, tuple) else out
        out.retain_grad()
        seen.append(out)

    handle = module.register_forward_hook(keep)
    theirs(kind)(prompts, use_cache=False).logits[:, -1, 5].sum().backward()
    handle.remove()
    expected = seen[-1].grad.movedim(0, 2) if kind == "gemma3n_text" else seen[-1].grad
    assert error(grads["here"], expected) <= 1e-4
    model.zero_grad()
    theirs(kind).zero_grad()


# --- Parts of a pass ------------------------------------------------------------------------------


@each_type
@torch.no_grad()
def test_a_pass_may_stop_early(kind: str, prompts):
    model = ours(kind)
    _, cache = model.run_with_cache(prompts)
    n = len(model.blocks)
    for stop in (0, 1, n - 1, -1):
        stream = model(prompts, stop_at_layer=stop)
        assert error(stream, cache["resid_pre", stop]) <= 1e-5
    assert error(model(prompts, stop_at_layer=n), cache["resid_post", n - 1]) <= 1e-5
    with pytest.raises(HookNeverFiredError):
        model.run_with_hooks(
            prompts, stop_at_layer=1, fwd_hooks=[("blocks.1.hook_resid_pre", lambda x, hook: None)]
        )
    assert error(model(prompts), logits_of(theirs(kind), prompts)) <= 1e-5  # and nothing is left


@each_type
@torch.no_grad()
def test_only_what_somebody_listens_to_is_computed(kind: str, prompts):
    model, ran = ours(kind), []
    last = f"blocks.{len(model.blocks) - 1}.hook_resid_pre"
    watch = [(last, lambda x, hook: ran.append(1))]
    with model.hooks(fwd_hooks=watch):
        assert model(prompts, return_type=None) is None
        assert ran == [1]
    name = "blocks.0.hook_resid_post"
    nothing, cache = model.run_with_cache(prompts, return_type=None, names_filter=name)
    assert nothing is None
    assert list(cache) == [name]
    _, cache = model.run_with_cache(prompts, return_type=None, names_filter="hook_logits")
    assert torch.equal(cache["hook_logits"], model(prompts))


@each_type
def test_a_pass_can_not_start_in_the_middle(kind: str, prompts):
    stream = ours(kind)(prompts, stop_at_layer=1)
    for start in (0, 1):
        with pytest.raises(InputError, match="Hugging Face's own loop"):
            ours(kind)(stream, start_at_layer=start)
    with pytest.raises(InputError, match="Hugging Face's own loop"):
        ours(kind).input_to_embed(prompts)


@each_type
@torch.no_grad()
def test_losses(kind: str, prompts):
    logits = logits_of(theirs(kind), prompts)
    expected = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), prompts[:, 1:].flatten())
    found = ours(kind)(prompts, return_type="both")
    assert error(found.logits, logits) <= 1e-5
    torch.testing.assert_close(found.loss, expected)


@torch.no_grad()
def test_embeddings_in_the_place_of_tokens(prompts):
    for kind in ("hrm_text", "zaya"):
        embeds = theirs(kind).get_input_embeddings()(prompts)
        model, expected = ours(kind), logits_of(theirs(kind), prompts)
        assert error(model(inputs_embeds=embeds), expected) <= 1e-5
        double = [("hook_embed", lambda x, hook: 2 * x)]
        edited = model.run_with_hooks(prompts, fwd_hooks=double)
        assert torch.equal(model.run_with_hooks(inputs_embeds=embeds, fwd_hooks=double), edited)
        assert not torch.equal(edited, model(prompts))


def test_what_a_model_takes_besides_tokens(prompts):
    model = ours("hrm_text")
    types = torch.zeros_like(prompts)
    types[:, :4] = 1  # attended to in both directions
    with torch.no_grad():
        expected = theirs("hrm_text")(prompts, token_type_ids=types, use_cache=False).logits
        assert error(model(prompts, token_type_ids=types), expected) <= 1e-5
        assert not torch.equal(model(prompts), model(prompts, token_type_ids=types))
    with pytest.raises(InputError, match="colours"):
        model(prompts, colours=1)


# --- What does not hold here ----------------------------------------------------------------------


@each_type
@torch.no_grad()
def test_a_stream_that_is_no_sum_is_not_taken_apart(kind: str, prompts):
    _, cache = ours(kind).run_with_cache(prompts)
    for method in (
        cache.decompose_resid,
        cache.get_full_resid_decomposition,
        cache.stack_head_results,
        cache.stack_neuron_results,
    ):
        with pytest.raises(InputError, match="no sum"):
            method(-1)


@torch.no_grad()
def test_the_stream_at_every_depth(prompts):
    _, cache = ours("deepseek_v4").run_with_cache(prompts)
    stack, labels = cache.accumulated_resid(return_labels=True, pos_slice=(2, 5))
    assert labels == ["0_pre", "1_pre", "2_pre", "final_post"]
    assert torch.equal(stack[1], cache["resid_pre", 1][:, 2:5])
    _, cache = ours("blt").run_with_cache(prompts)
    with pytest.raises(InputError, match="patch"):
        cache.accumulated_resid()


@each_type
def test_processing_is_skipped_with_its_reasons(kind: str, prompts):
    with pytest.warns(UserWarning, match=r"center_unembed.*opaque"):
        model = HookedTransformer.from_pretrained(
            kind, hf_model=theirs(kind), tokenizer=word_tokenizer()
        )
    with torch.no_grad():
        assert error(model(prompts), logits_of(theirs(kind), prompts)) <= 1e-4


# --- Blocks of a loop of ours that read the embedding ---------------------------------------------


@pytest.fixture(scope="module")
def zamba() -> PreTrainedModel:
    """Shared attention that reads the embedding beside the stream (arXiv 2405.16712)."""
    kinds = ["linear_attention", "hybrid"] * 2
    own = {"num_hidden_layers": 4, "layers_block_type": kinds, "attention_hidden_size": 64}
    own |= {"attention_head_dim": 16, "num_key_value_heads": 4, "mamba_dt_rank": 4}
    with quiet_transformers(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = AutoConfig.for_model("zamba", **(SIZES | own | {"mamba_d_state": 8}))
        model = AutoModelForCausalLM.from_config(config).eval()
    perturb(model, 0)
    return model


def test_gradients_for_an_embedding_that_blocks_read(zamba, prompts):
    model, found, seen = hookedlm.load(zamba), [], []
    with model.hooks(bwd_hooks=[("hook_embed", lambda grad, hook: found.append(grad.clone()))]):
        model(prompts)[:, -1, 5].sum().backward()

    def keep(_module, args, out):
        out.retain_grad()
        seen.append(out)

    handle = zamba.get_input_embeddings().register_forward_hook(keep)
    zamba(prompts, use_cache=False).logits[:, -1, 5].sum().backward()
    handle.remove()
    assert error(sum(found), seen[0].grad) <= 1e-5


@torch.no_grad()
def test_a_pass_over_such_blocks_starts_at_the_embedding(zamba, prompts):
    model = hookedlm.load(zamba)
    stream = model(prompts, stop_at_layer=0)
    assert error(model(stream, start_at_layer=0), logits_of(zamba, prompts)) <= 1e-5
    with pytest.raises(InputError, match="original_hidden_states, which come from the embedding"):
        model(model(prompts, stop_at_layer=2), start_at_layer=2)


# --- Loops that nobody described ------------------------------------------------------------------


class Handing(nn.Module):
    """A block that returns, besides the stream, what the next one reads."""

    def __init__(self):
        super().__init__()
        self.attention = nn.Linear(16, 16)

    def forward(self, x, before=None):
        now = torch.tanh(self.attention(x))
        return (x + now if before is None else x + now + before), now


class Loop(nn.Module):
    """A user's own class: three blocks, gone through ``rounds`` times."""

    def __init__(self, rounds: int = 2):
        super().__init__()
        self.words = nn.Embedding(VOCAB, 16)
        self.stack = nn.ModuleList([Handing() for _ in range(3)])
        self.out = nn.Linear(16, VOCAB)
        self.rounds = rounds

    def forward(self, ids):
        x, before = self.words(ids), None
        for _ in range(self.rounds):
            for block in self.stack:
                x, before = block(x, before=before)
        return self.out(x)


@pytest.mark.parametrize("rounds", [1, 2])
@torch.no_grad()
def test_somebodys_own_loop(rounds: int, prompts):
    given = Loop(rounds)
    for parameter in given.parameters():
        parameter.normal_(generator=torch.Generator().manual_seed(parameter.numel()))
    model = hookedlm.load(given)
    assert len(model.blocks) == 3 * rounds
    assert error(model(prompts), given(prompts)) <= 1e-5
    last = f"blocks.{3 * rounds - 1}.hook_resid_pre"
    edited = model.run_with_hooks(prompts, fwd_hooks=[(last, lambda x, hook: 0 * x)])
    assert not torch.equal(edited, model(prompts))


@torch.no_grad()
def test_a_loop_that_turns_more_often_than_it_did(prompts):
    given = Loop(2)
    model = hookedlm.load(given)
    loop = loop_of(model)
    assert loop is not None
    loop.module.rounds = 3
    with pytest.raises(InputError, match="runs 3 times in this pass, but ran 2"):
        model(prompts)
    loop.module.rounds = 1  # fewer rounds leave hooks silent, which is said where one was asked for
    assert error(model(prompts), given.__class__.forward(loop_with(given, 1), prompts)) <= 1e-5
    with pytest.raises(HookNeverFiredError):
        model.run_with_hooks(prompts, fwd_hooks=[("blocks.5.hook_resid_pre", lambda x, hook: None)])


def loop_with(given: Loop, rounds: int) -> Loop:
    twin = copy.deepcopy(given)
    twin.rounds = rounds
    return twin


@torch.no_grad()
def test_a_hook_may_run_the_model_again(prompts):
    """Each pass keeps its own place in the loop."""
    model, inner = ours("hrm_text"), []

    def again(x, hook):
        hook.ctx["depth"] = hook.ctx.get("depth", 0) + 1
        if hook.ctx["depth"] == 1:
            inner.append(model(prompts))

    outer = model.run_with_hooks(prompts, fwd_hooks=[("blocks.3.hook_resid_pre", again)])
    assert torch.equal(outer, inner[0])
    model.clear_contexts()
