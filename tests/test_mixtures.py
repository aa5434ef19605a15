"""Mixtures of experts: routing, and single experts' neurons against Hugging Face's weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny import family, registered
from torch import Tensor
from torch.nn.functional import silu
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL

import hookedlm
from hookedlm.convert.experts import HFRouting
from hookedlm.families import FAMILIES
from hookedlm.layers.moe import MoE

TOKENS = torch.randint(3, 90, (2, 7), generator=torch.Generator().manual_seed(0))

DENSE = {"bamba", "falcon_h1", "lfm2", "lfm3", "minicpm3", "qwen3_5", "qwen3_5_text", "youtu"}
"""Types whose rows name the router of relatives."""
MIXTURES = [
    kind
    for kind, row in FAMILIES.items()
    if row.router is not None and kind in CAUSAL and kind not in DENSE
]


def tiny_of(kind: str) -> Any:
    """A tiny model of transformers' class."""
    return next(t for t in registered([kind]) if t.model_type == kind).build()


def mixtures_in(model: hookedlm.HookedTransformer) -> list[tuple[int, MoE]]:
    """(layer, its mixture)."""
    found = [(i, block._modules.get("mlp")) for i, block in enumerate(model.blocks)]
    return [(i, mlp) for i, mlp in found if isinstance(mlp, MoE)]


def mixture(kind: str):
    """(model, layer, its mixture) of the last layer that has one."""
    model = hookedlm.load(tiny_of(kind))
    return model, *mixtures_in(model)[-1]


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=2e-5)


# Routing ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", sorted(DENSE))
def test_no_mixture_is_left_out(kind):
    names = [name for name, _ in tiny_of(kind).named_modules()]
    assert not any("experts" in name or "router" in name for name in names)


@pytest.mark.parametrize("kind", MIXTURES)
@torch.no_grad()
def test_a_router_judges_its_own_logits_as_it_did(kind):
    model, _layer, moe = mixture(kind)
    x = torch.randn(2, 7, model.cfg.d_model, generator=torch.Generator().manual_seed(1))
    bias = moe._buffers.get("router_bias", moe._parameters.get("router_bias"))
    logits, weights, indices = moe.routing(x, bias)
    again, picked = moe.routing.picked(logits, bias)
    dense, anew = moe.dense(weights, indices), moe.dense(again.to(weights.dtype), picked)
    torch.testing.assert_close(anew, dense, atol=1e-6, rtol=1e-5)
    assert isinstance(moe.routing, HFRouting)


@pytest.mark.parametrize("kind", ["qwen2_moe", "deepseek_v3", "hunyuan_v1_moe", "dbrx", "hy_v3"])
@torch.no_grad()
def test_an_edited_logit_picks_its_expert(kind):
    model, layer, _ = mixture(kind)
    name = f"blocks.{layer}.mlp.hook_router_logits"

    def favour_two(logits, hook):
        logits[..., 2] += 100

    with model.hooks(fwd_hooks=[(name, favour_two)]):
        _, cache = model.run_with_cache(TOKENS)
    assert (cache[f"blocks.{layer}.mlp.hook_expert_weights"][..., 2] > 0).all()


@torch.no_grad()
def test_the_gate_of_shared_experts():
    model, layer, moe = mixture("qwen2_moe")
    _, cache = model.run_with_cache(TOKENS)
    x = model.blocks[layer].ln2(cache["resid_mid", layer])
    close(
        cache[f"blocks.{layer}.mlp.hook_shared_out"],
        torch.sigmoid(moe.shared_gate(x)) * moe.shared(x),
    )


# Neurons ------------------------------------------------------------------------------------------

LIMIT = 0.2
"""Where neurons are clamped in these tests: small models have small ones."""


class Swish:
    """``silu(x W_gate) * (x W_up)``, matrices ``[expert, out, in]``, the first two as one."""

    def pre(self, experts: Any, e: int, x: Tensor) -> list[Tensor]:
        W = experts.gate_up_proj[e]
        n = len(W) // 2
        return [x @ W[:n].T, x @ W[n:].T]

    def post(self, pre: list[Tensor]) -> Tensor:
        return silu(pre[0]) * pre[1]

    def out(self, experts: Any, e: int, post: Tensor) -> Tensor:
        return post @ experts.down_proj[e].T


class Turned(Swish):
    """The same with matrices ``[expert, in, out]``."""

    def pre(self, experts: Any, e: int, x: Tensor) -> list[Tensor]:
        W = experts.gate_up_proj[e]
        n = W.shape[1] // 2
        return [x @ W[:, :n], x @ W[:, n:]]

    def out(self, experts: Any, e: int, post: Tensor) -> Tensor:
        return post @ experts.down_proj[e]


class InTurns(Swish):
    """Columns of gate and linear branch in turns, with biases and clamps (gpt-oss' reference)."""

    def pre(self, experts: Any, e: int, x: Tensor) -> list[Tensor]:
        W, b = experts.gate_up_proj[e], experts.gate_up_proj_bias[e]
        return [x @ W[:, start::2] + b[start::2] for start in (0, 1)]

    def post(self, pre: list[Tensor]) -> Tensor:
        gate, up = pre[0].clamp(max=LIMIT), pre[1].clamp(-LIMIT, LIMIT)
        return gate * torch.sigmoid(1.702 * gate) * (up + 1)

    def out(self, experts: Any, e: int, post: Tensor) -> Tensor:
        return post @ experts.down_proj[e] + experts.down_proj_bias[e]


class Clamped(Swish):
    """Gate and linear branch behind each other, then as gpt-oss."""

    def post(self, pre: list[Tensor]) -> Tensor:
        gate, up = pre[0].clamp(max=LIMIT), pre[1].clamp(-LIMIT, LIMIT)
        return gate * torch.sigmoid(1.702 * gate) * (up + 1)


class Rows(Swish):
    """All experts' neurons behind each other, a row each."""

    def rows(self, experts: Any, name: str, e: int) -> Tensor:
        n = experts.ffn_hidden_size
        return getattr(experts.mlp, name)[e * n : (e + 1) * n]

    def pre(self, experts: Any, e: int, x: Tensor) -> list[Tensor]:
        return [x @ self.rows(experts, name, e).T for name in ("w1", "v1")]

    def out(self, experts: Any, e: int, post: Tensor) -> Tensor:
        return post @ self.rows(experts, "w2", e)


class Ungated(Swish):
    """One matrix into the neurons, ReLU squared."""

    def pre(self, experts: Any, e: int, x: Tensor) -> list[Tensor]:
        return [x @ experts.up_proj[e].T]

    def post(self, pre: list[Tensor]) -> Tensor:
        return pre[0].relu() ** 2


FORMULAS = {
    "mixtral": Swish(),
    "granitemoe": Swish(),
    "laguna": Swish(),
    "qwen2_moe": Swish(),
    "beam": Swish(),
    "aria_text": Turned(),
    "llama4_text": Turned(),
    "gpt_oss": InTurns(),
    "minimax_m3_vl_text": Clamped(),
    "dbrx": Rows(),
    "nemotron_h": Ungated(),
}
WEIGHS_INPUT = {"llama4_text"}


class Truth:
    """The mixture of a type's last layer that has one, from what entered Hugging Face's."""

    def __init__(self, kind: str):
        self.formula, self.weighs_input = FORMULAS[kind], kind in WEIGHS_INPUT
        theirs = tiny_of(kind)
        mixtures = [module for module in theirs.modules() if "experts" in module._modules]
        self.experts = mixtures[-1].experts
        for module in mixtures:
            clamps = {"limit", "swiglu_limit"} & set(vars(module.experts))
            vars(module.experts).update(dict.fromkeys(clamps, LIMIT))
        entered: list[Tensor] = []
        handle = mixtures[-1].register_forward_pre_hook(lambda _, args: entered.append(args[0]))
        theirs(TOKENS)
        handle.remove()
        self.x = entered[-1].view(*TOKENS.shape, -1)
        self.model = hookedlm.load(theirs)
        layer, self.moe = mixtures_in(self.model)[-1]
        self.name = f"blocks.{layer}.mlp"
        self.gated = not isinstance(self.formula, Ungated)
        self.points = [f"hook_{x}" for x in ("pre", *["pre_linear"] * self.gated, "post")]

    def run(self, **edits: Callable) -> tuple[dict[str, Tensor], Tensor]:
        """(what the mixture's hook points saw, what the mixture returned)."""
        returned: list[Tensor] = []
        handle = self.moe.register_forward_hook(lambda _, args, out: returned.append(out))
        names = [name for name in self.model.hook_dict if name.startswith(f"{self.name}.")]
        hooks = [(f"{self.name}.{point}", edit) for point, edit in edits.items()]
        with self.model.hooks(fwd_hooks=hooks):
            _, cache = self.model.run_with_cache(TOKENS, names_filter=names)
        handle.remove()
        return {name.removeprefix(f"{self.name}."): x for name, x in cache.items()}, returned[-1]

    def expected(
        self, weights: Tensor, **edits: Callable[[Tensor], Tensor]
    ) -> tuple[dict[str, Tensor], Tensor]:
        """(neurons at each point, outputs of all experts), by the formula."""
        pres, posts, outs = list[Tensor](), list[Tensor](), list[Tensor]()
        for e in range(weights.shape[-1]):
            w = weights[..., e, None]
            read = self.x * w if self.weighs_input else self.x
            pre = self.formula.pre(self.experts, e, read)
            pre = [edits.get(point, same)(y) for point, y in zip(self.points, pre, strict=False)]
            post = edits.get("hook_post", same)(self.formula.post(pre))
            out = self.formula.out(self.experts, e, post)
            pres.append(torch.stack(pre))
            posts.append(post)
            outs.append(out if self.weighs_input else out * w)
        neurons = [*torch.stack(pres, dim=-2), torch.stack(posts, dim=-2)]
        scaled = torch.stack(outs, dim=-2) * self.moe.spec.scale
        return dict(zip(self.points, neurons, strict=True)), scaled


def same(x: Tensor) -> Tensor:
    return x


def bent(x: Tensor) -> Tensor:
    """Another value for every entry."""
    return 0.3 - 1.5 * x


@pytest.fixture(scope="module", params=FORMULAS)
def truth(request):
    with torch.no_grad():
        return Truth(request.param)


@torch.no_grad()
def test_neurons_of_every_expert(truth):
    seen, returned = truth.run()
    assert {*truth.points, "hook_router_logits", "hook_expert_weights"} <= set(seen)
    assert ("hook_pre_linear" in seen) == truth.gated
    neurons, outs = truth.expected(seen["hook_expert_weights"])
    spec = truth.moe.spec
    for point in truth.points:
        assert seen[point].shape == (*TOKENS.shape, spec.n_experts, spec.d_mlp)
        close(seen[point], neurons[point])
    close(seen["hook_expert_out"], outs)
    close(returned, outs.sum(-2) + seen.get("hook_shared_out", 0))


@pytest.mark.parametrize("point", ["hook_pre", "hook_pre_linear", "hook_post"])
@torch.no_grad()
def test_an_edit_of_neurons_changes_what_they_write(truth, point):
    if point not in truth.points:
        assert not truth.gated
        return
    before, unedited = truth.run()
    seen, returned = truth.run(**{point: lambda x, hook: bent(x)})
    _, outs = truth.expected(before["hook_expert_weights"], **{point: bent})
    close(seen["hook_expert_out"], outs)
    close(returned, outs.sum(-2) + before.get("hook_shared_out", 0))
    assert not torch.allclose(returned, unedited, atol=1e-3)


@pytest.mark.parametrize("kind", ["gpt_oss", "minimax_m3_vl_text"])
@torch.no_grad()
def test_clamps_bite(kind):
    """Else the tests above would not see them."""
    truth = Truth(kind)
    seen, _ = truth.run()
    assert (seen["hook_pre"] > LIMIT).any()
    assert (seen["hook_pre_linear"].abs() > LIMIT).any()


@torch.no_grad()
def test_clamps_of_dense_and_shared_mlps():
    """MiniMax M3 has them in these too."""
    tiny = next(
        t for t in registered(["minimax_m3_vl_text"]) if t.model_type == "minimax_m3_vl_text"
    )
    kinds = {"mlp_layer_types": ["dense", "sparse", "dense", "sparse"], "swiglu_limit": LIMIT}
    [tiny] = family("minimax_m3_vl_text", tiny.config, changed=kinds)
    theirs = tiny.build()
    model = hookedlm.load(theirs, strict=True)
    points = list(model.hook_dict)
    _, cache = model.run_with_cache(TOKENS, names_filter=points)
    for layer, part, module in (
        (0, "mlp", theirs.model.layers[0].mlp),
        (1, "mlp.shared", theirs.model.layers[1].mlp.shared_experts),
    ):
        name, block = f"blocks.{layer}.{part}", model.blocks[layer]
        x = block.ln2(cache["resid_mid", layer])
        gate, up = (x @ module.gate_up_proj.weight.T).chunk(2, dim=-1)
        assert (gate > LIMIT).any()
        assert (up.abs() > LIMIT).any()
        close(cache[f"{name}.hook_pre"], gate)
        close(cache[f"{name}.hook_pre_linear"], up)
        post = cache[f"{name}.hook_post"]
        close(post, Clamped().post([gate, up]))
        close(post @ module.down_proj.weight.T, module(x))


@torch.no_grad()
def test_a_wrong_form_is_not_believed(monkeypatch):
    """Gate and linear branch the wrong way round: only neurons that are listened to tell."""
    row = FAMILIES["dbrx"].but(expert_matrices=("mlp.v1", "mlp.w1", "mlp.w2"))
    monkeypatch.setitem(FAMILIES, "dbrx", row)
    theirs = tiny_of("dbrx")
    model = hookedlm.load(theirs)
    assert {part.form for part in model.fidelity().opaque_parts} == {"opaque block"}
    assert torch.equal(model(TOKENS), theirs(TOKENS).logits)
