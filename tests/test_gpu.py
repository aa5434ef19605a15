"""On CUDA: the same numbers, hooks, caches and text as on the CPU and as Hugging Face's there."""

from __future__ import annotations

import hf_truth
import pytest
import torch
from tiny import VOCAB, Tiny, one_per_family

import hookedlm
from hookedlm.patching.base_run import Reuse, run_base
from hookedlm.patching.engine import run_cells
from hookedlm.patching.plans import SitePlan, from_source
from hookedlm.patching.sites import Sites

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
each_family = pytest.mark.parametrize("tiny", one_per_family(), ids=lambda tiny: tiny.id)


@pytest.fixture(autouse=True)
def _full_precision():
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


def batch():
    tokens, mask = hf_truth.padded_batch(VOCAB, [11, 6, 9], "left", 0, seed=7)
    return tokens.cuda(), mask.cuda()


def error(ours, theirs, mask):
    a, b = ours[mask.bool()].float(), theirs[mask.bool()].float()
    return float((a - b).abs().max() / b.abs().max())


@each_family
@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-4), (torch.bfloat16, 5e-2)])
@torch.no_grad()
def test_logits(tiny: Tiny, dtype: torch.dtype, bound: float):
    theirs = tiny.build(dtype=dtype).cuda()
    ours = hookedlm.load(theirs)
    assert ours.device.type == "cuda"
    tokens, mask = batch()
    expected = hf_truth.logits_of(theirs, tokens, mask)
    assert error(ours(tokens, attention_mask=mask), expected, mask) < bound


@each_family
@torch.no_grad()
def test_cache_stays_on_the_device_and_derives_there(tiny: Tiny):
    ours = hookedlm.load(tiny.build().cuda())
    tokens, mask = batch()
    _, cache = ours.run_with_cache(tokens, attention_mask=mask)
    _, live = ours.run_with_cache(tokens, attention_mask=mask, names_filter=lambda name: True)
    for name in cache:
        assert cache[name].device.type == "cuda"
        if "scores" not in name and "pattern" not in name:
            a, b = cache[name][mask.bool()], live[name][mask.bool()]
            assert float((a - b).abs().max()) <= 1e-3 * float(b.abs().max().clamp(min=1)), name
    _, on_cpu = ours.run_with_cache(tokens, attention_mask=mask, device="cpu")
    assert all(x.device.type == "cpu" for x in on_cpu.values())
    total = cache.decompose_resid().sum(0)[mask.bool()]
    torch.testing.assert_close(total, cache["resid_post", -1][mask.bool()], rtol=1e-3, atol=1e-3)


@each_family
@torch.no_grad()
def test_an_edit_is_the_same_edit(tiny: Tiny):
    theirs = tiny.build().cuda()
    ours = hookedlm.load(theirs)
    tokens, mask = batch()

    def zero(x, hook):
        x[:] = 0.0

    got = ours.run_with_hooks(
        tokens, attention_mask=mask, fwd_hooks=[("blocks.1.hook_resid_pre", zero)]
    )
    expected = hf_truth.zero_block_input(theirs, 1, tokens, mask)
    scale = expected[mask.bool()].abs().max().clamp(min=1)
    assert float((got - expected)[mask.bool()].abs().max() / scale) < 1e-4


@each_family
def test_generation(tiny: Tiny):
    theirs = tiny.build().cuda()
    ours = hookedlm.load(theirs)
    prompt = torch.randint(3, VOCAB, (2, 6), generator=torch.Generator().manual_seed(3)).cuda()
    expected = hf_truth.greedy(theirs, prompt, torch.ones_like(prompt), 6)
    got = ours.generate(prompt, max_new_tokens=6, do_sample=False, stop_at_eos=False)
    assert torch.equal(got[:, -6:], expected[:, -6:])


def test_moving_keeps_shared_storages_shared():
    from transformers import GPT2Config, GPT2LMHeadModel

    theirs = GPT2LMHeadModel(GPT2Config(n_layer=4, n_embd=256, n_head=8, vocab_size=8000))
    ours = hookedlm.load(theirs)
    weights = sum(p.numel() * p.element_size() for p in theirs.parameters())
    before = torch.cuda.memory_allocated()
    ours.to("cuda")
    assert torch.cuda.memory_allocated() - before < 1.05 * weights
    assert next(theirs.parameters()).device.type == "cpu"


@torch.no_grad()
def test_patching_on_the_demo_model():
    from hookedlm import patching

    sweeps = []
    for device in ("cpu", "cuda"):
        model = hookedlm.load_demo(device=device)
        clean = model.to_tokens("When John and Mary went to the shops, John gave the bag to")
        other = model.to_tokens("When John and Mary went to the shops, Mary gave the bag to")
        names = [model.to_single_token(name) for name in (" Mary", " John")]
        _, cache = model.run_with_cache(clean)
        sweep = patching.get_act_patch_resid_pre(
            model, other, cache, lambda logits, names=names: logits[0, -1, names].diff().neg()[0]
        )
        sweeps.append(sweep.cpu())
    torch.testing.assert_close(sweeps[0], sweeps[1], rtol=1e-3, atol=1e-3)


@each_family
@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-4), (torch.bfloat16, 5e-2)])
@torch.no_grad()
def test_a_sweep_waits_for_nothing_and_is_the_naive_loop(
    tiny: Tiny, dtype: torch.dtype, bound: float
):
    ours = hookedlm.load(tiny.build(dtype=dtype).cuda())
    generator = torch.Generator().manual_seed(0)
    clean, corrupted = torch.randint(3, VOCAB, (2, 2, 7), generator=generator).cuda()
    base = run_base(ours, corrupted)
    _, cache = ours.run_with_cache(clean, names_filter="blocks.*.hook_resid_pre")
    points = {layer: ours.hook_dict[f"blocks.{layer}.hook_resid_pre"] for layer in (0, 1)}
    cells = [(layer, pos) for layer in (0, 1) for pos in (0, 3, 6)]
    index = {"pos": torch.tensor([pos for _, pos in cells]).cuda()}
    sites = Sites(points, [layer for layer, _ in cells], index)
    clean_streams = {layer: cache["resid_pre", layer] for layer in points}
    plan = SitePlan(sites, from_source, clean_streams, base.n_examples)
    tokens = torch.full((2, 1), 5).cuda()
    torch.cuda.set_sync_debug_mode("error" if base.reuse == Reuse.POSITIONS else "default")
    try:
        found = list(run_cells(base, plan, lambda out, _: out.logits_at(6, tokens), batch_size=6))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for some, numbers in found:
        for cell, number in zip(some, numbers, strict=True):
            layer, pos = cells[cell]

            def patch(x, hook, layer=layer, pos=pos):
                x[:, pos] = clean_streams[layer][:, pos]

            fwd_hooks = [(points[layer].name, patch)]
            logits = ours.run_with_hooks(corrupted, fwd_hooks=fwd_hooks)[:, -1]
            off = (number[:, 0] - logits[:, 5]).abs().max() / logits.abs().max()
            assert float(off) < bound, (layer, pos)
