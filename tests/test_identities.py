"""The cache adds up: one test per identity, over every tiny configuration of every family, as
Hugging Face has it and as the classic door processes it, with and without a batch axis, over every
kind of position slice. Tolerance: 1e-5 of the norm of the whole.
"""

from __future__ import annotations

import warnings

import pytest
import torch
from tiny import VOCAB, registered
from torch import Tensor

import hookedlm
from hookedlm import ActivationCache, HookedTransformer
from hookedlm.cache.ledger import Write
from hookedlm.errors import InputError
from hookedlm.families import FAMILIES
from hookedlm.layers.attention import Attention
from hookedlm.layers.block import PostNormBlock
from hookedlm.layers.mlp import MLP, GatedMLP
from hookedlm.layers.norm import Norm
from hookedlm.layers.opaque import OpaqueNorm

TOKENS = torch.randint(3, VOCAB, (3, 6), generator=torch.Generator().manual_seed(0))
SLICES = [None, 2, -1, (1,), (1, 4), (0, 6, 2), [0, 5], torch.tensor([3, 1])]


# A fixture, not a mark: pytest then runs all identities of one model before it makes the next.
@pytest.fixture(
    scope="module",
    params=[
        pytest.param((tiny, folded), id=f"{tiny.id}-{'folded' if folded else 'as-is'}")
        for tiny in registered(FAMILIES)
        for folded in (False, True)
    ],
)
def model(request) -> HookedTransformer:
    """A model as Hugging Face has it, and as the classic door processes it."""
    tiny, folded = request.param
    if not folded:
        return hookedlm.load(tiny.build())
    with warnings.catch_warnings():  # what is left alone on a family is said in a warning
        warnings.simplefilter("ignore", UserWarning)
        return HookedTransformer.from_pretrained(tiny.id, hf_model=tiny.build())


@pytest.fixture(scope="module", params=[True, False], ids=["batch", "one"])
def ran(request, model) -> tuple[HookedTransformer, Tensor, ActivationCache]:
    """(model, logits, full cache); of the first prompt alone where there is no batch axis."""
    batched = request.param
    with torch.no_grad():
        logits, cache = model.run_with_cache(
            TOKENS if batched else TOKENS[:1], remove_batch_dim=not batched
        )
    try:
        cache.decompose_resid()
    except InputError as error:
        if "is no sum of" not in str(error):
            raise
        pytest.skip("Hugging Face's loop does something to the stream between blocks")
    return model, logits if batched else logits[0], cache


def picked(x: Tensor, pos_slice, dim: int) -> Tensor:
    """The positions a slice means, selected in the plainest way."""
    index = list(range(x.shape[dim]))
    if isinstance(pos_slice, int):
        return x.select(dim, index[pos_slice])
    if isinstance(pos_slice, tuple):
        index = index[slice(*pos_slice)]
    elif pos_slice is not None:
        index = [index[i] for i in pos_slice]
    return x.index_select(dim, torch.tensor(index))


def adds_up(parts: Tensor, whole: Tensor, what: object, tolerance: float = 1e-5) -> None:
    total = parts.sum(0)
    assert total.shape == whole.shape, (what, total.shape, whole.shape)
    error = (total.double() - whole.double()).norm() / whole.double().norm().clamp(min=1e-6)
    assert error <= tolerance, f"{what}: off by {error:.1e} of the whole"


def stream(cache: ActivationCache, layer: int, mlp_input: bool = False) -> Tensor:
    """What enters a layer, or its MLP; behind the last layer, what leaves it."""
    n = cache.model.cfg.n_layers
    if layer == n:
        return cache["resid_post", n - 1]
    has_mid = f"blocks.{layer}.hook_resid_mid" in cache.model.hook_dict
    return cache["resid_mid" if mlp_input and has_mid else "resid_pre", layer]


def layers_of(model: HookedTransformer) -> list[tuple[int, bool]]:
    """Every (layer, mlp_input) that a decomposition can end at."""
    ends = [(i, False) for i in range(model.cfg.n_layers + 1)]
    return ends + [
        (i, True)
        for i, block in enumerate(model.blocks)
        if f"blocks.{i}.hook_mlp_out" in model.hook_dict
    ]


def constant_of(cache: ActivationCache, layer: int, kind: str, bias: Tensor | None) -> Tensor:
    """What attention or the MLP adds whatever its components say, from the formula of the norm."""
    block, d_model = cache.model.blocks[layer], cache.model.cfg.d_model
    constant = torch.zeros(d_model) if bias is None else bias.detach()
    name = "ln1_post" if kind == "attn" else "ln2_post"
    norm = block._modules[name]
    if isinstance(norm, Norm):
        x = constant - constant.mean() if norm.spec.centres else constant
        constant = x / cache[f"blocks.{layer}.{name}.hook_scale"] * norm.weight.detach()
        if norm.live("b") is not None:
            constant = constant + norm.live("b").detach()
    return constant * block.spec.residual_scale


def logits_before_softcap(model: HookedTransformer, logits: Tensor) -> Tensor:
    cap = model.unembed.softcap
    return logits.double() if cap is None else torch.atanh(logits.double() / cap) * cap


def constant_logits(model: HookedTransformer) -> Tensor:
    """What every logit has before any part of the stream speaks."""
    b = model.ln_final.live("b") if isinstance(model.ln_final, Norm) else None
    b_U = model.b_U.detach()
    return b_U if b is None else b_U + b.detach() @ model.W_U.detach()


# Parts sum to the stream --------------------------------------------------------------------------


def test_writes_sum_to_the_stream(ran):
    model, _, cache = ran
    for layer, mlp_input in layers_of(model):
        for pos in SLICES if layer == model.cfg.n_layers else SLICES[:2]:
            parts, labels = cache.decompose_resid(
                layer, mlp_input, pos_slice=pos, return_labels=True
            )
            assert len(parts) == len(labels) == len(set(labels))
            whole = picked(stream(cache, layer, mlp_input), pos, -2)
            adds_up(parts, whole, (layer, mlp_input, pos))


def test_the_full_decomposition_sums_to_the_stream(ran):
    model, _, cache = ran
    for layer, mlp_input in layers_of(model):
        for pos in SLICES if layer == model.cfg.n_layers else SLICES[:2]:
            for expand in (True, False):
                parts, labels = cache.get_full_resid_decomposition(
                    layer, mlp_input, expand, pos_slice=pos, return_labels=True
                )
                assert len(parts) == len(labels) == len(set(labels))
                whole = picked(stream(cache, layer, mlp_input), pos, -2)
                adds_up(parts, whole, (layer, mlp_input, expand, pos))


def test_heads_sum_to_what_attention_adds(ran):
    model, _, cache = ran
    for layer in range(model.cfg.n_layers):
        attn = model.blocks[layer]._modules.get("attn")
        if not isinstance(attn, Attention):
            continue
        heads = cache._heads(hookedlm.Slice())(Write(layer, "attn"))
        constant = constant_of(cache, layer, "attn", attn.live("b_O"))
        adds_up(heads.outs(), cache["attn_out", layer] - constant, layer)


def test_neurons_sum_to_what_the_mlp_adds(ran):
    model, _, cache = ran
    for layer in range(model.cfg.n_layers):
        mlp = model.blocks[layer]._modules.get("mlp")
        if not isinstance(mlp, (MLP, GatedMLP)):
            with pytest.raises(InputError, match="no neurons"):
                cache.get_neuron_results(layer)
            continue
        constant = constant_of(cache, layer, "mlp", mlp.live("b_out"))
        for pos in SLICES:
            neurons = cache.get_neuron_results(layer, pos_slice=pos)
            whole = picked(
                (cache["mlp_out", layer] - constant).expand_as(cache["mlp_out", layer]), pos, -2
            )
            adds_up(neurons.movedim(-2, 0), whole, (layer, pos))


def test_components_and_remainder_sum_to_the_stream(ran):
    model, _, cache = ran
    for layer in range(model.cfg.n_layers + 1):
        for stack in (cache.stack_head_results, cache.stack_neuron_results):
            for pos in (None, -1, (1, 4)):
                parts, labels = stack(layer, pos_slice=pos, incl_remainder=True, return_labels=True)
                assert labels[-1] == "remainder"
                assert len(parts) == len(labels)
                adds_up(parts, picked(stream(cache, layer), pos, -2), (stack, layer, pos))


# Norms are linear once their scale is held --------------------------------------------------------


def test_parts_through_a_frozen_norm_sum_to_what_it_gives(ran):
    model, _, cache = ran
    for layer, mlp_input in layers_of(model):
        name = (
            "ln_final"
            if layer == model.cfg.n_layers
            else (f"blocks.{layer}.{'ln2' if mlp_input else 'ln1'}")
        )
        norm = model.mod_dict.get(name)
        post = layer < model.cfg.n_layers and isinstance(model.blocks[layer], PostNormBlock)
        if not isinstance(norm, Norm) or post:  # read bare
            continue
        b = norm.live("b")
        with torch.no_grad():
            whole = norm.fast(stream(cache, layer, mlp_input)) - (0 if b is None else b)
        for parts in (
            cache.decompose_resid(layer, mlp_input, apply_ln=True),
            cache.get_full_resid_decomposition(layer, mlp_input, apply_ln="frozen"),
        ):
            adds_up(parts, whole, name)


# Logits -------------------------------------------------------------------------------------------


def test_attributions_sum_to_the_logits(ran):
    model, logits, cache = ran
    if model.unembed is None or "mlm_head" in model.mod_dict:  # logits are not linear in the stream
        return
    truth, constant = logits_before_softcap(model, logits), constant_logits(model).double()
    stacks = [
        cache.decompose_resid(),
        cache.stack_head_results(incl_remainder=True),
        cache.get_full_resid_decomposition(),
    ]
    rows = [7, 41, 60][: 3 if cache.has_batch_dim else 1]
    for stack in stacks:
        for token in (7, 41):
            attrs = cache.logit_attrs(stack, token)
            adds_up(attrs, truth[..., token] - constant[token], token)
        if cache.has_batch_dim:
            right, wrong = torch.tensor(rows), torch.tensor([8, 1, 3])
            attrs = cache.logit_attrs(stack, right, wrong)
            of_rows = torch.arange(3)
            whole = truth[of_rows, :, right] - truth[of_rows, :, wrong]
            adds_up(attrs, whole - (constant[right] - constant[wrong])[:, None], "rows")


# The fast ways equal the slow ones ----------------------------------------------------------------


def same(fast: Tensor, slow: Tensor, what: object = "") -> None:
    assert fast.shape == slow.shape, (what, fast.shape, slow.shape)
    error = (fast.double() - slow.double()).norm() / slow.double().norm().clamp(min=1e-6)
    assert error <= 1e-5, f"{what}: {error:.1e}"


def test_attributions_without_vectors_equal_those_of_vectors(ran):
    model, _, cache = ran
    if model.unembed is None or "mlm_head" in model.mod_dict:  # logits are not linear in the stream
        return
    n = (3,) if cache.has_batch_dim else ()
    tokens = [7, torch.full((*n, 6), 9).index_fill_(-1, torch.tensor([2]), 30)]
    tokens += [torch.tensor([7, 41, 60])] if cache.has_batch_dim else []
    for kind, attrs, stack in (
        (Attention, cache.head_logit_attrs, cache.stack_head_results),
        ((MLP, GatedMLP), cache.neuron_logit_attrs, cache.stack_neuron_results),
    ):
        if not any(isinstance(part, kind) for block in model.blocks for part in block.children()):
            with pytest.raises(InputError, match="no layer below"):
                attrs(7)
            with pytest.raises(InputError, match="no layer below"):
                stack(-1)
            continue
        for right in tokens:
            wrong = None if isinstance(right, int) else (right + 1)
            for pos in (None, -1, (1, 4)):
                vectors, labels = stack(-1, pos_slice=pos, return_labels=True)
                slow = cache.logit_attrs(vectors, right, wrong, pos_slice=pos)
                fast, names = attrs(right, wrong, pos_slice=pos, return_labels=True)
                assert names == labels
                same(fast, slow, (right, pos))


def test_projections_without_vectors_equal_those_of_vectors(ran):
    model, _, cache = ran
    d_model = model.cfg.d_model
    onto = torch.randn(d_model, 2)
    for layer in (model.cfg.n_layers, 1):
        norm = model.mod_dict.get(f"blocks.{layer}.ln1")
        if isinstance(norm, OpaqueNorm):
            with pytest.raises(InputError, match="runs as Hugging Face wrote it"):
                cache.get_full_resid_decomposition(layer, apply_ln=True)
        for apply_ln in (False, True) if not isinstance(norm, OpaqueNorm) else (False,):
            for pos in (None, -1):
                asked = dict(apply_ln=apply_ln, pos_slice=pos)
                vectors = cache.get_full_resid_decomposition(layer, **asked)
                fast = cache.get_full_resid_decomposition(layer, **asked, project_output_onto=onto)
                same(fast, vectors @ onto, (layer, asked))
                fast = cache.get_full_resid_decomposition(
                    layer, **asked, project_output_onto=onto[:, 0]
                )
                same(fast, vectors @ onto[:, 0], (layer, asked))
                vectors = cache.stack_neuron_results(layer, **asked, incl_remainder=True)
                fast = cache.stack_neuron_results(
                    layer, **asked, incl_remainder=True, project_output_onto=onto
                )
                same(fast, vectors @ onto, (layer, asked, "neurons"))
