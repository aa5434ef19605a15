"""Heads, neurons and the full decomposition: each component against a loop written out, labels,
slices, the two ways to apply a norm, and memory."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch
from tiny import VOCAB, tinies
from torch.utils._python_dispatch import TorchDispatchMode

import hookedlm
from hookedlm import ActivationCache, HookedTransformer, HookedTransformerConfig
from hookedlm.cache.parts import Neurons, Passed
from hookedlm.errors import CacheKeyError, InputError
from hookedlm.layers.norm import Norm
from hookedlm.spec import NormSpec

TOKENS = torch.randint(3, VOCAB, (3, 6), generator=torch.Generator().manual_seed(0))
POST_NORM = next(tiny for tiny in tinies("opt") if tiny.variant.startswith("post_norm"))


@cache
def run(family: str) -> tuple[HookedTransformer, ActivationCache]:
    model = hookedlm.load((POST_NORM if family == "post_norm" else tinies(family)[0]).build())
    with torch.no_grad():
        return model, model.run_with_cache(TOKENS)[1]


def close(got: torch.Tensor, expected: torch.Tensor, rtol: float = 1e-5) -> None:
    assert got.shape == expected.shape, (got.shape, expected.shape)
    error = (got.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-6)
    assert error <= rtol, f"relative error {error:.1e}"


# Neurons ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_neurons_result_is_its_activation_times_its_row(family):
    model, recorded = run(family)
    results = recorded.get_neuron_results(1)
    W_out = model.blocks[1].mlp.W_out.detach()
    post = recorded["post", 1]
    assert results.shape == (3, 6, *W_out.shape)
    for neuron in (0, 7, -1):
        for row, pos in ((0, 0), (2, 5)):
            close(results[row, pos, neuron], post[row, pos, neuron] * W_out[neuron])


def test_a_neurons_result_behind_a_post_norm():
    """Gemma 2 norms what the MLP says before it is added: RMSNorm's formula, its scale held."""
    model, recorded = run("gemma2")
    block, scale = model.blocks[1], recorded["blocks.1.ln2_post.hook_scale"]
    raw = recorded["post", 1][..., 5:6] * block.mlp.W_out[5].detach()
    close(recorded.get_neuron_results(1, 5), raw / scale * block.ln2_post.weight.detach())


def test_a_neurons_result_with_a_residual_multiplier():
    model, recorded = run("granite")
    factor = model.blocks[1].spec.residual_scale
    assert factor != 1.0
    raw = recorded["post", 1][..., 5:6] * model.blocks[1].mlp.W_out[5].detach()
    close(recorded.get_neuron_results(1, 5), raw * factor)


@pytest.mark.parametrize("neurons", [3, -1, [1, 4], [-1], (2, 9), (0, 10, 3), torch.tensor([5])])
def test_neuron_slices(neurons):
    model, recorded = run("gpt2")
    n = model.cfg.d_mlp
    index = list(range(n))
    if isinstance(neurons, tuple):
        index = index[slice(*neurons)]
    else:
        index = [index[i] for i in ([neurons] if isinstance(neurons, int) else neurons)]
    whole = recorded.get_neuron_results(1)
    some = recorded.get_neuron_results(1, neurons)
    expected = whole[..., index, :]
    assert torch.equal(some, expected[..., 0, :] if isinstance(neurons, int) else expected)
    stack, labels = recorded.stack_neuron_results(2, neuron_slice=neurons, return_labels=True)
    assert labels == [f"L{layer}N{i}" for layer in range(2) for i in index]
    assert torch.equal(stack[len(index) :], expected.movedim(-2, 0))
    attrs, labels = recorded.neuron_logit_attrs(7, neuron_slice=neurons, return_labels=True)
    assert labels == [f"L{layer}N{i}" for layer in range(3) for i in index]
    every = recorded.neuron_logit_attrs(7)
    close(attrs, every[[layer * n + i for layer in range(3) for i in index]])


def test_neurons_of_a_mixture_are_refused_and_its_decomposition_stays_whole():
    _, recorded = run("mixtral")
    for ask in (
        lambda: recorded.get_neuron_results(0),
        lambda: recorded.stack_neuron_results(-1),
        lambda: recorded.neuron_logit_attrs(7),
    ):
        with pytest.raises(InputError, match=r"neurons|taken apart"):
            ask()
    _, labels = recorded.get_full_resid_decomposition(return_labels=True)
    assert [label for label in labels if "mlp" in label] == ["0_mlp_out", "1_mlp_out", "2_mlp_out"]


@pytest.mark.parametrize("layer", [3, -4, 17])
def test_neurons_of_layers_that_do_not_exist(layer):
    _, recorded = run("gpt2")
    with pytest.raises(InputError, match="0 to 2"):
        recorded.get_neuron_results(layer)
    if layer != -1:
        with pytest.raises(InputError, match="0 to 2"):
            recorded.stack_neuron_results(17)


# The full decomposition ---------------------------------------------------------------------------


def test_labels_of_the_full_decomposition():
    model, recorded = run("gpt2")
    heads = [f"L{i}H{h}" for i in range(3) for h in range(model.cfg.n_heads)]
    neurons = [f"L{i}N{n}" for i in range(3) for n in range(model.cfg.d_mlp)]
    ends = ["embed", "pos_embed", "bias"]
    parts, labels = recorded.get_full_resid_decomposition(return_labels=True)
    assert labels == heads + neurons + ends
    at = dict(zip(labels, parts, strict=True))
    assert torch.equal(at["embed"], recorded["embed"])
    close(at["L1H2"], recorded["result", 1][:, :, 2])
    biases = sum(b.detach() for block in model.blocks for b in (block.attn.b_O, block.mlp.b_out))
    close(at["bias"], biases.expand_as(at["bias"]))
    some, labels = recorded.get_full_resid_decomposition(expand_neurons=False, return_labels=True)
    assert labels == [*heads, "0_mlp_out", "1_mlp_out", "2_mlp_out", *ends]
    b_O = sum(block.attn.b_O.detach() for block in model.blocks)
    close(some[labels.index("bias")], b_O.expand(3, 6, 32))
    _, labels = recorded.get_full_resid_decomposition(0, mlp_input=True, return_labels=True)
    assert labels == heads[:4] + ends


def test_the_first_layer_reads_embeddings_only():
    _, recorded = run("llama")
    parts, labels = recorded.get_full_resid_decomposition(0, return_labels=True)
    assert labels == ["embed", "bias"]
    assert not parts[1].any()


def test_every_later_norm_rescales_a_post_norm_models_heads():
    """The original Transformer's blocks: a head's output, pushed through each norm by hand."""
    model, recorded = run("post_norm")
    stack, labels = recorded.stack_head_results(2, return_labels=True)
    head = recorded["z", 0][:, :, 1] @ model.blocks[0].attn.W_O[1].detach()
    for name in ("blocks.0.ln1", "blocks.0.ln2", "blocks.1.ln1", "blocks.1.ln2"):
        norm = model.mod_dict[name]
        head = (head - head.mean(-1, keepdim=True)) / recorded[f"{name}.hook_scale"]
        head = head * norm.weight.detach()
    close(stack[labels.index("L0H1")], head)


def test_the_constant_of_a_write_holds_its_post_norms_bias():
    """No family here has a LayerNorm with a bias behind its attention; a toy part does."""
    post, W_out, b_out = torch.randn(4, 5), torch.randn(5, 8), torch.randn(8)
    norm = Norm(NormSpec("LN", eps=1e-2), torch.randn(8), torch.randn(8))
    raw = post @ W_out + b_out
    part = Neurons(0, np.arange(5), post, W_out)
    passed = Passed(part, b_out, norm, norm.scale_of(raw), 0.5)
    close((passed.outs().sum(0) + passed.constant()).detach(), norm.fast(raw).detach() * 0.5)


# Directions instead of vectors --------------------------------------------------------------------


def test_an_attribution_is_a_derivative_of_the_logit():
    """With its norms frozen a logit is linear in each neuron: finite differences of the real model
    agree where the norm's scale is held by a hook."""
    model, recorded = run("gpt2")
    token, layer, neuron, eps = 9, 2, 4, 0.5
    scales = {
        name: recorded[name] for name in recorded if name == "ln_final.hook_scale"
    }  # the last MLP is read by the final norm alone

    def frozen(x, hook):
        return scales[hook.name]

    def bumped(x, hook):
        x[..., neuron] += eps
        return x

    hooks = [(name, frozen) for name in scales]
    plain = model.run_with_hooks(TOKENS, fwd_hooks=hooks)[..., token]
    more = model.run_with_hooks(
        TOKENS, fwd_hooks=[*hooks, (f"blocks.{layer}.mlp.hook_post", bumped)]
    )[..., token]
    attrs, labels = recorded.neuron_logit_attrs(token, return_labels=True)
    per_unit = attrs[labels.index(f"L{layer}N{neuron}")] / recorded["post", layer][..., neuron]
    close(((more - plain) / eps).detach(), per_unit, 1e-3)


def test_edited_results_count():
    model, _ = run("gpt2")

    def no_head_1(result, hook):
        result[:, :, 1] = 0

    with model.hooks([("blocks.*.attn.hook_result", no_head_1)]), torch.no_grad():
        _, recorded = model.run_with_cache(TOKENS)
    attrs, labels = recorded.head_logit_attrs(5, return_labels=True)
    assert not attrs[labels.index("L1H1")].any()
    close(attrs, recorded.logit_attrs(recorded.stack_head_results(), 5))


@pytest.mark.parametrize("onto", [torch.ones(31), torch.ones(2, 32), torch.ones(32, 2, 2)])
def test_directions_of_a_wrong_shape(onto):
    _, recorded = run("gpt2")
    with pytest.raises(InputError, match=r"expected \[32\]"):
        recorded.stack_neuron_results(1, project_output_onto=onto)


def test_a_projection_needs_a_linear_norm():
    _, recorded = run("gpt2")
    with pytest.raises(InputError, match="frozen"):
        recorded.stack_neuron_results(1, apply_ln="recompute", project_output_onto=torch.ones(32))


def test_tokens_out_of_the_vocabulary():
    _, recorded = run("gpt2")
    for token in (-1, VOCAB, torch.tensor([3, 4, VOCAB])):
        with pytest.raises(InputError, match="0 to 95"):
            recorded.neuron_logit_attrs(token)


# The two ways to apply a norm ---------------------------------------------------------------------


def test_frozen_adds_up_and_recompute_is_the_logit_lens():
    model, recorded = run("llama")
    parts = recorded.decompose_resid()
    frozen = recorded.decompose_resid(apply_ln="frozen")
    assert torch.equal(frozen, recorded.decompose_resid(apply_ln=True))
    assert torch.equal(frozen, recorded.apply_ln_to_stack(parts, mode="frozen"))
    lens = recorded.decompose_resid(apply_ln="recompute")
    with torch.no_grad():
        close(lens, torch.stack([model.ln_final(part) for part in parts]))
    assert torch.equal(lens, recorded.apply_ln_to_stack(parts, recompute_ln=True))
    depths = recorded.accumulated_resid()
    assert torch.equal(
        recorded.accumulated_resid(apply_ln=True),
        recorded.accumulated_resid(apply_ln="recompute"),
    )
    close(
        recorded.accumulated_resid(apply_ln="frozen"),
        depths / recorded["scale"] * model.ln_final.weight.detach(),
    )
    lens_logits = recorded.logit_attrs(depths, 7, mode="recompute")
    with torch.no_grad():
        close(lens_logits, model.unembed(recorded.accumulated_resid(apply_ln=True))[..., 7])


def test_a_third_way_is_refused():
    _, recorded = run("llama")
    for ask in (
        lambda: recorded.decompose_resid(apply_ln="cached"),
        lambda: recorded.apply_ln_to_stack(recorded.decompose_resid(), mode="live"),
    ):
        with pytest.raises(InputError, match="frozen"):
            ask()


def test_norms_of_one_position_and_without_batch_keep_their_shapes():
    model, _ = run("gpt2")
    with torch.no_grad():
        _, short = model.run_with_cache(TOKENS[:2, :1])
    assert short.accumulated_resid(apply_ln=True).shape == (4, 2, 1, 32)
    row = short.apply_slice_to_batch_dim(0)
    assert row.accumulated_resid(apply_ln=True).shape == (4, 1, 32)


def test_a_stack_without_batch_axis_of_a_cache_with_one():
    model, _ = run("gpt2")
    with torch.no_grad():
        _, single = model.run_with_cache(TOKENS[:1])
    stack = single.decompose_resid()
    close(
        single.logit_attrs(stack[:, 0], 7, has_batch_dim=False),
        single.logit_attrs(stack, 7)[:, 0],
    )


# Memory -------------------------------------------------------------------------------------------


class LargestTensor(TorchDispatchMode):
    """The most bytes that any one tensor took, whatever made it."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, torch.Tensor):
                self.bytes = max(self.bytes, x.untyped_storage().nbytes())
        return out


def test_attributions_make_nothing_of_component_times_d_model():
    cfg = dict(n_layers=2, d_model=64, n_ctx=32, d_head=16, d_vocab=50, act_fn="gelu")
    model = HookedTransformer(HookedTransformerConfig(**cfg, seed=0))
    tokens = torch.randint(50, (4, 32))
    with torch.no_grad():
        _, recorded = model.run_with_cache(tokens)
    numbers = 2 * 256 * 4 * 32 * 4  # one float for every neuron, row and position
    for attribute in (
        lambda: recorded.neuron_logit_attrs(3, 4),
        lambda: recorded.stack_neuron_results(-1, project_output_onto=torch.ones(64)),
        lambda: recorded.get_full_resid_decomposition(project_output_onto=torch.ones(64)),
    ):
        with LargestTensor() as largest:
            attribute()
        assert largest.bytes <= 2 * numbers
    with LargestTensor() as largest:
        recorded.head_logit_attrs(3, 4)
    assert largest.bytes <= model.W_U.numel() * 4 + recorded["z", 0].numel() * 4
    with LargestTensor() as largest:
        recorded.stack_neuron_results(-1)
    assert largest.bytes >= 64 * numbers


def test_a_result_of_a_layer_without_heads():
    _, recorded = run("gpt2")
    with pytest.raises(CacheKeyError, match="in this cache"):
        recorded["result", 7]
