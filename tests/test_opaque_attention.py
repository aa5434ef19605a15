"""Hook points inside attention that runs as Hugging Face wrote it.

Truths: the same model with uniform attention, Hugging Face's own attention weights, and the same
edit made in Hugging Face's weights.
"""

from __future__ import annotations

import copy
import pickle

import hf_truth
import pytest
import torch
from test_hybrids import KINDS, SIZES
from tiny import Tiny, one_per_family, perturb
from torch import nn
from transformers import AttentionInterface, DynamicCache, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import hookedlm
from hookedlm.convert.interface import NAME
from hookedlm.errors import HookNameError
from hookedlm.families import FAMILIES
from hookedlm.layers.opaque import OpaqueAttention

TOKENS = torch.randint(3, 90, (2, 9), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(TOKENS).index_put((torch.tensor(1), torch.arange(3)), torch.tensor(0))
UNIFORM = ("llama", "gemma2", "gpt_oss", "gemma3_text", "qwen3", "smollm3")
SMOLLM3 = Tiny("smollm3", "here", SIZES | {"no_rope_layer_interval": 2})
TINIES = {tiny.model_type: tiny for tiny in one_per_family()} | {"smollm3": SMOLLM3}
INSIDE = ("hook_v", "hook_attn_scores", "hook_pattern", "hook_z")


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


def theirs_of(kind: str, **more):
    return Tiny(kind, "here", SIZES | KINDS.get(kind, {}) | more).build()


def close(ours: torch.Tensor, theirs: torch.Tensor, real: torch.Tensor | None = None) -> None:
    if real is not None:
        ours, theirs = ours[real.bool()], theirs[real.bool()]
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


def opaque(monkeypatch, kind: str):
    """(a tiny model, ours with uniform attention, ours with its attention kept opaque)."""
    theirs = TINIES[kind].build()
    uniform = hookedlm.load(theirs)
    monkeypatch.setitem(FAMILIES, kind, FAMILIES[kind].but(o="nowhere"))
    ours = hookedlm.load(theirs)
    assert all(isinstance(block.attn, OpaqueAttention) for block in ours.blocks)
    return theirs, uniform, ours


# What they see -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", UNIFORM)
@pytest.mark.parametrize("mask", [None, MASK], ids=["whole", "padded"])
def test_points_see_what_uniform_attention_shows(monkeypatch, kind: str, mask):
    _, uniform, ours = opaque(monkeypatch, kind)
    names = [name for name in ours.hook_dict if ".attn.hook_" in name]
    assert {name.rpartition(".")[2] for name in names} >= set(INSIDE)
    everything = dict(names_filter=names, attention_mask=mask)
    _, got = ours.run_with_cache(TOKENS, **everything)
    _, expected = uniform.run_with_cache(TOKENS, **everything)
    for name in names:
        x, y = got[name], expected[name]
        if name.endswith(("scores", "pattern")):  # [batch, head, pos, key_pos]
            x, y = x.movedim(1, 2), y.movedim(1, 2)
        hidden = torch.isinf(y)
        assert torch.equal(torch.isinf(x), hidden)
        close(x.masked_fill(hidden, 0), y.masked_fill(hidden, 0), mask)


def test_rotation_is_told_by_the_layer(monkeypatch):
    """SmolLM3 rotates queries and keys in some layers only."""
    _, uniform, ours = opaque(monkeypatch, "smollm3")
    told = {name for name in ours.hook_dict if name.endswith(("hook_q", "hook_k", "hook_rot_q"))}
    rotated = {name for name in uniform.hook_dict if name.endswith("rot_q")}
    assert {name for name in told if name.endswith("rot_q")} == rotated
    assert len(rotated) not in (0, len(ours.blocks))
    assert {int(n.split(".")[1]) for n in told if not n.endswith("rot_q")}.isdisjoint(
        int(n.split(".")[1]) for n in rotated
    )


@pytest.mark.parametrize("kind", ["doge", "jetmoe", "inkling_text"])
def test_patterns_are_hugging_faces_attention_weights(kind: str):
    theirs = theirs_of(kind, attn_implementation="eager")
    ours = hookedlm.load(theirs)
    weights = theirs(TOKENS, output_attentions=True).attentions
    for layer, expected in enumerate(weights):
        _, cache = ours.run_with_cache(TOKENS, names_filter=f"blocks.{layer}.attn.hook_pattern")
        close(cache["pattern", layer], expected)


def test_the_kernel_stays_while_nobody_listens(monkeypatch):
    theirs, _, ours = opaque(monkeypatch, "llama")
    called = []
    original = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def counted(*args, **kwargs):
        called.append(1)
        return original(*args, **kwargs)

    monkeypatch.setitem(AttentionInterface._global_mapping, "sdpa", counted)
    assert torch.equal(ours(TOKENS), hf_truth.logits_of(theirs, TOKENS))
    n = len(ours.blocks)
    called.clear()
    ours(TOKENS)
    assert len(called) == n
    called.clear()
    ours.run_with_hooks(TOKENS, fwd_hooks=[("blocks.1.attn.hook_pattern", lambda x, hook: None)])
    assert len(called) == n - 1


def test_their_module_stays_as_it_is(monkeypatch):
    theirs = TINIES["llama"].build()
    before = {name: set(vars(module)) for name, module in theirs.named_modules()}
    config = theirs.config
    monkeypatch.setitem(FAMILIES, "llama", FAMILIES["llama"].but(o="nowhere"))
    ours = hookedlm.load(theirs)
    assert "blocks.0.attn.hook_pattern" in ours.hook_dict
    for name, module in theirs.named_modules():
        assert set(vars(module)) == before[name]
        assert not module._forward_pre_hooks
        if "config" in vars(module):
            assert module.config is config
    assert config._attn_implementation == "sdpa"


# What an edit does -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", UNIFORM)
def test_edits_do_what_they_do_to_uniform_attention(monkeypatch, kind: str):
    _, uniform, ours = opaque(monkeypatch, kind)
    generator = torch.Generator().manual_seed(1)
    for name in [name for name in ours.hook_dict if ".attn.hook_" in name]:
        factor = torch.rand(64, generator=generator) + 0.5

        def edit(x, hook, factor=factor):
            scaled = x * factor[: x.shape[-1]]
            return torch.where(torch.isinf(x), x, scaled)

        got = ours.run_with_hooks(TOKENS, fwd_hooks=[(name, edit)])
        close(got, uniform.run_with_hooks(TOKENS, fwd_hooks=[(name, edit)]))
        assert not torch.allclose(got, ours(TOKENS), atol=1e-5), name


@pytest.mark.parametrize("kind", ["doge", "inkling_text"])
def test_a_head_knocked_out_is_its_output_matrix_zeroed(kind: str):
    theirs = theirs_of(kind)
    ours = hookedlm.load(theirs)

    def knock_out(z, hook):
        z[:, :, 1] = 0

    got = ours.run_with_hooks(TOKENS, fwd_hooks=[("blocks.1.attn.hook_z", knock_out)])
    without = copy.deepcopy(theirs)
    without.model.layers[1].self_attn.o_proj.weight[:, 8:16] = 0
    close(got, hf_truth.logits_of(without, TOKENS))
    assert not torch.allclose(got, ours(TOKENS), atol=1e-4)


def test_gradients_reach_a_point(monkeypatch):
    _, uniform, ours = opaque(monkeypatch, "llama")
    found = []
    for model in (ours, uniform):
        with (
            torch.enable_grad(),
            model.hooks(
                bwd_hooks=[("blocks.0.attn.hook_pattern", lambda g, hook: found.append(g.clone()))]
            ),
        ):
            model(TOKENS).logsumexp(-1).sum().backward()
    close(*found)


# The key-value cache -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["doge", "jetmoe"])
def test_keys_and_values_are_all_that_the_cache_holds(kind: str):
    ours = hookedlm.load(theirs_of(kind))
    cache = DynamicCache()
    _, whole = ours.run_with_cache(TOKENS)
    ours(TOKENS[:, :6], past_kv_cache=cache)
    _, step = ours.run_with_cache(TOKENS[:, 6:], past_kv_cache=cache)
    close(step["pattern", 1], whole["pattern", 1][:, :, 6:])
    close(step["v", 1], whole["v", 1])
    close(step["z", 1], whole["z", 1][:, 6:])


@pytest.mark.parametrize("name", ["hook_v", "hook_pattern", "hook_z"])
def test_an_edit_during_generation_does_the_same_with_and_without_the_cache(name: str):
    ours = hookedlm.load(theirs_of("doge"))
    options = dict(max_new_tokens=6, do_sample=False, stop_at_eos=False)
    with ours.hooks([(f"blocks.1.attn.{name}", lambda x, hook: x * 3)]):
        a, b = (ours.generate(TOKENS, use_past_kv_cache=c, **options) for c in (True, False))
    assert torch.equal(a, b)
    assert not torch.equal(a, ours.generate(TOKENS, **options))


# Several calls, copies, failures -----------------------------------------------------------------


def test_attention_that_calls_its_kernel_twice_shows_both_calls():
    """Differential attention (arXiv 2410.05258): one pattern on two halves of the values."""
    ours = hookedlm.load(theirs_of("diffllama"))
    inside = [name for name in ours.hook_dict if name.startswith("blocks.1.attn.")]
    assert {name.split(".")[3] for name in inside} == {"0", "1"}
    _, cache = ours.run_with_cache(TOKENS, names_filter=inside)
    close(cache["blocks.1.attn.0.hook_pattern"], cache["blocks.1.attn.1.hook_pattern"])
    assert not torch.equal(cache["blocks.1.attn.0.hook_v"], cache["blocks.1.attn.1.hook_v"])
    clean = ours(TOKENS)
    for call in "01":
        edit = [(f"blocks.1.attn.{call}.hook_z", lambda x, hook: x * 2)]
        assert not torch.allclose(ours.run_with_hooks(TOKENS, fwd_hooks=edit), clean)


def test_a_failing_hook_leaves_the_count_of_calls_in_order():
    ours = hookedlm.load(theirs_of("diffllama"))
    clean = ours(TOKENS)

    def fail(x, hook):
        raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        ours.run_with_hooks(TOKENS, fwd_hooks=[("blocks.1.attn.0.hook_pattern", fail)])
    assert torch.equal(ours(TOKENS), clean)
    seen = []
    for call in "01":
        name = f"blocks.1.attn.{call}.hook_v"
        _, cache = ours.run_with_cache(TOKENS, names_filter=name)
        seen.append(cache[name])
    assert not torch.equal(*seen)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_listen_for_themselves(monkeypatch, copied):
    _, _, ours = opaque(monkeypatch, "llama")
    other = copied(ours)
    edit = [("blocks.0.attn.hook_z", lambda x, hook: x * 0)]
    with other.hooks(edit):
        assert not torch.allclose(other(TOKENS), ours(TOKENS))
    assert torch.equal(other(TOKENS), ours(TOKENS))


# Refused -----------------------------------------------------------------------------------------


class OwnConfig(PretrainedConfig):
    model_type = "somebodys_attention"


def eager_attention_forward(module, q, k, v, mask, scaling=1.0, sharpened=1.0, **kwargs):
    """Somebody's own kernel: it knows a word that no other does."""
    scores = q @ k.transpose(-1, -2) * scaling * sharpened
    n = q.shape[2]
    scores = scores.masked_fill(~torch.ones(n, n, dtype=torch.bool).tril(), -torch.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2), None


class OwnAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (12, 4)).transpose(1, 2).split(4, dim=1)
        implementation = self.config._attn_implementation
        kernel = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
        z, _ = kernel(self, q, k, v, None, scaling=0.5, sharpened=self.config.sharpened)
        return self.out(z.flatten(2))


class OwnBlock(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.attention = OwnAttention(config)

    def forward(self, x):
        return x + self.attention(x)


class OwnBody(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.words = nn.Embedding(96, 16)
        self.stack = nn.ModuleList([OwnBlock(config) for _ in range(2)])

    def forward(self, input_ids=None, inputs_embeds=None):
        x = self.words(input_ids) if inputs_embeds is None else inputs_embeds
        for block in self.stack:
            x = block(x)
        return x


class Own(PreTrainedModel):
    config_class = OwnConfig

    def __init__(self, config):
        super().__init__(config)
        self.body = OwnBody(config)
        self.out = nn.Linear(16, 96)
        self.post_init()

    def get_input_embeddings(self):
        return self.body.words

    def get_output_embeddings(self):
        return self.out

    def forward(self, input_ids=None, inputs_embeds=None):
        return CausalLMOutput(logits=self.out(self.body(input_ids, inputs_embeds)))


def own(sharpened: float) -> Own:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = OwnConfig(
            vocab_size=96, hidden_size=16, num_attention_heads=4, num_hidden_layers=2
        )
        config.sharpened = sharpened
        config._attn_implementation = "eager"
        model = Own(config).eval()
    perturb(model, 0)
    return model


def test_a_class_of_somebodys_own_shows_its_heads():
    theirs = own(sharpened=1.0)
    ours = hookedlm.load(theirs)
    got = ours.run_with_hooks(TOKENS, fwd_hooks=[("blocks.0.attn.hook_z", lambda z, hook: z * 0)])
    without = copy.deepcopy(theirs)
    without.body.stack[0].attention.out.weight.zero_()
    close(got, without(TOKENS).logits)


def test_a_kernel_that_computes_something_else_is_not_replaced():
    theirs = own(sharpened=1.7)
    ours = hookedlm.load(theirs)
    assert torch.equal(ours(TOKENS), theirs(TOKENS).logits)
    assert not any(".attn." in name for name in ours.hook_dict)
    assert "heads are not shown: longhand is" in ours.fidelity().part("blocks.0").reason
    with pytest.raises(HookNameError):
        ours.run_with_hooks(TOKENS, fwd_hooks=[("blocks.0.attn.hook_z", lambda z, hook: z)])
    assert NAME not in vars(theirs.body.stack[0].attention)


def test_attention_that_asks_for_its_kernels_name_is_left_alone():
    """MiniMax-M3 selects blocks of keys by a mask, but only for kernels that it knows by name."""
    theirs = theirs_of("minimax_m3_vl_text")
    ours = hookedlm.load(theirs)
    assert torch.equal(ours(TOKENS), hf_truth.logits_of(theirs, TOKENS))
    for layer in range(4):  # every other layer selects
        shown = f"blocks.{layer}.attn.hook_pattern" in ours.hook_dict
        assert shown == (layer % 2 == 0)
    assert "depends on the kernel's name" in ours.fidelity().part("blocks.1").reason


def test_points_stand_only_where_the_interface_is_called(monkeypatch):
    """BLOOM's attention asks no interface for its kernel."""
    monkeypatch.setitem(FAMILIES, "bloom", FAMILIES["bloom"].but(o="nowhere"))
    ours = hookedlm.load(TINIES["bloom"].build())
    assert ours.fidelity().part("blocks.0").opaque
    assert not any("hook_pattern" in name for name in ours.hook_dict)
