"""Quantised and placed models: linear modules that hold no plain matrix stay and run."""

from __future__ import annotations

import copy

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from conftest import hf
from torch import Tensor, nn

import hookedlm
from hookedlm.convert.placed import Mover, follow
from hookedlm.errors import InputError, WeightError
from hookedlm.layers.context import Context

NAMES = ["llama-grouped", "qwen2-base", "gemma2-base", "gpt_neox-parallel", "mixtral-base"]


class EightBit(nn.Module):
    """Whole numbers and a scale for every row, as bitsandbytes and GPTQ store a matrix."""

    ran = 0

    def __init__(self, linear: nn.Linear):
        super().__init__()
        weight = linear.weight.detach()
        scales = weight.abs().amax(1, keepdim=True) / 127
        self.register_buffer("qweight", (weight / scales).round().to(torch.int8))
        self.register_buffer("scales", scales)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        EightBit.ran += 1
        return nn.functional.linear(x, self.qweight.to(x.dtype) * self.scales, self.bias)


def quantised(model: nn.Module, spare: tuple[str, ...]) -> nn.Module:
    for name, child in list(model.named_children()):
        if isinstance(child, nn.Linear) and name not in spare:
            setattr(model, name, EightBit(child))
        else:
            quantised(child, spare)
    return model


def tokens() -> Tensor:
    return torch.randint(3, 90, (2, 9), generator=torch.Generator().manual_seed(1))


def check(ours, theirs) -> None:
    """Logits and greedy generation are theirs, and every hook is told and obeyed."""
    x = tokens()
    expected = theirs(x, use_cache=False).logits
    assert torch.equal(ours(x), expected)
    got, cache = ours.run_with_cache(x)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    for name, point in ours.hook_dict.items():
        if point.on_demand:
            continue
        assert name in cache
        noisy = [(name, lambda x, hook: x + torch.randn_like(x))]
        with torch.random.fork_rng(devices=[]):
            edited = ours.run_with_hooks(x, fwd_hooks=noisy)
        assert not torch.allclose(edited, got), name
    greedy = {"max_new_tokens": 4, "do_sample": False}
    generated = theirs.generate(x, **greedy, eos_token_id=None, pad_token_id=0)
    assert torch.equal(ours.generate(x, **greedy, stop_at_eos=False), generated)
    torch.testing.assert_close(
        cache.decompose_resid().sum(0), cache["resid_post", -1], rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_quantised_linears_stay(name: str):
    theirs = quantised(copy.deepcopy(hf(name)), ("lm_head", "embed_out"))
    ours = hookedlm.load(theirs)
    before = EightBit.ran
    ours(tokens())
    assert EightBit.ran > before
    check(ours, theirs)
    pattern = ours.run_with_cache(tokens())[1]["pattern", 1]
    torch.testing.assert_close(pattern.sum(-1), torch.ones_like(pattern[..., 0]))
    with pytest.raises(WeightError, match="EightBit holds no plain matrix"):
        _ = ours.W_Q
    assert ours.W_U.shape[1] == ours.cfg.d_vocab


@torch.no_grad()
def test_a_quantised_head():
    theirs = quantised(copy.deepcopy(hf("llama-grouped")), ())
    ours = hookedlm.load(theirs)
    check(ours, theirs)
    with pytest.raises(WeightError, match="no W_U"):
        _ = ours.W_U


def placed(how: str, folder) -> nn.Module:
    model, cpu = copy.deepcopy(hf("llama-grouped")), torch.device("cpu")
    if how == "memory":
        return cpu_offload(model, execution_device=cpu)
    if how == "disk":
        disk_offload(model, folder, execution_device=cpu)
        return model
    places = {f"model.layers.{i}": place for i, place in enumerate(("cpu", "disk", "cpu"))}
    places |= dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb"), "cpu")
    places |= {"lm_head": "cpu"}
    return dispatch_model(model, places, main_device="cpu", offload_dir=folder, force_hooks=True)


@pytest.mark.parametrize("how", ["memory", "disk", "both"])
@torch.no_grad()
def test_offloaded_weights_are_fetched_as_they_run(how: str, tmp_path):
    theirs = placed(how, tmp_path)
    ours = hookedlm.load(theirs)
    check(ours, theirs)
    assert torch.equal(ours(tokens()), hf("llama-grouped")(tokens(), use_cache=False).logits)
    assert str(ours.device) == "cpu"
    assert all(x.device.type == "cpu" for x in ours.run_with_cache(tokens())[1].values())
    away = [parameter for parameter in theirs.parameters() if parameter.is_meta]
    assert len(away) >= (9 if how == "both" else 20)  # nothing was brought for good
    with pytest.raises(InputError, match="accelerate placed"):
        ours.to(torch.float64)
    if how == "both":
        assert [part.form for part in ours.fidelity().parts[1:4:2]] == ["uniform, sequential"] * 2
        assert ours.blocks[0].attn.W_Q.shape == (4, 32, 8)


@torch.no_grad()
def test_an_offloaded_mixture_leaves_its_block_readable():
    theirs = cpu_offload(copy.deepcopy(hf("mixtral-base")), execution_device=torch.device("cpu"))
    ours = hookedlm.load(theirs)
    check(ours, theirs)
    assert "TopKRouter's weights are fetched as it runs" in ours.fidelity().parts[1].reason
    assert {"blocks.0.hook_resid_mid", "blocks.0.hook_mlp_out"} <= set(ours.hook_dict)


def test_offloaded_weights_are_not_copied(tmp_path):
    from hookedlm.convert.hf import skeleton

    theirs = placed("memory", tmp_path)
    before = theirs.model.layers[0].mlp.up_proj._hf_hook.weights_map
    after = skeleton(theirs).model.layers[0].mlp.up_proj._hf_hook.weights_map
    assert after is before


@torch.no_grad()
def test_neurons_are_shown_although_weights_are_not():
    theirs = quantised(copy.deepcopy(hf("llama-grouped")), ("lm_head",))
    ours, x = hookedlm.load(theirs), tokens()
    _, cache = ours.run_with_cache(x)
    mlp, normed = theirs.model.layers[1].mlp, theirs.model.layers[1].post_attention_layernorm
    into = normed(cache["resid_mid", 1])
    torch.testing.assert_close(cache["pre", 1], mlp.gate_proj(into))
    torch.testing.assert_close(cache["post", 1], mlp.act_fn(cache["pre", 1]) * mlp.up_proj(into))
    torch.testing.assert_close(cache["mlp_out", 1], mlp.down_proj(cache["post", 1]))
    with pytest.raises(WeightError, match=r"no W_in.*no plain matrix|no W_in.*no attribute"):
        _ = ours.W_in


def test_parts_on_several_devices_fetch_their_inputs():
    """The meta device stands for a second one: it holds no numbers, but knows where it is."""
    away = torch.device("meta")
    block, here = nn.Linear(4, 4, device=away), nn.Linear(4, 4)
    follow([here, None, block])
    context = Context(mask=torch.ones(1, 1, 2, 2), rotary=(torch.ones(2), torch.ones(2)))
    _, moved = Mover(away)(block, (torch.ones(1, 2, 4), context))
    assert {x.device for x in (moved.mask, *moved.rotary)} == {away}
    assert block(torch.ones(1, 2, 4)).device == away
    assert here(torch.ones(1, 2, 4)).device.type == "cpu"
    single = nn.Linear(4, 4)
    follow([single, here])
    assert not single._forward_pre_hooks
