"""What an edit does: it reaches the logits, exactly as far as it should, on every family.

Truths: the same edit by torch hooks on Hugging Face's own module, formulas written out here, and
the rest of Hugging Face's model run on an edited stream.
"""

from __future__ import annotations

import inspect
from functools import cache

import hf_truth
import pytest
import torch
from tiny import VOCAB, Tiny, one_per_family, tinies

import hookedlm
from hookedlm import HookedTransformer
from hookedlm.layers.block import ParallelBlock
from hookedlm.layers.moe import MoE
from hookedlm.layers.norm import Norm

by_id = dict(ids=lambda tiny: tiny.id)
POST_NORM = [tiny for tiny in tinies("opt") if tiny.variant == "post_norm"]
ALL = one_per_family() + POST_NORM
FAMILIES = pytest.mark.parametrize("tiny", ALL, **by_id)
TOKENS = torch.randint(3, VOCAB, (2, 6), generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


@cache
def loaded(tiny: Tiny) -> HookedTransformer:
    return hookedlm.load(tiny.build())


@cache
def clean(tiny: Tiny) -> dict[str, torch.Tensor]:
    """Every activation of an unedited run, everything live."""
    return recorded(tiny)


def recorded(tiny: Tiny, edits: dict | None = None) -> dict[str, torch.Tensor]:
    """All activations of a run with edits; on-demand points too."""
    model = loaded(tiny)
    with model.hooks(list((edits or {}).items())):
        _, found = model.run_with_cache(TOKENS, names_filter=list(model.hook_dict))
    return dict(found.items())


def edited(tiny: Tiny, edits: dict) -> torch.Tensor:
    """Logits of a run with edits, nobody else listening."""
    return loaded(tiny).run_with_hooks(TOKENS, fwd_hooks=list(edits.items()))


def close(got: torch.Tensor, expected: torch.Tensor, name: str = "", rtol: float = 2e-5) -> None:
    assert got.shape == expected.shape, (name, got.shape, expected.shape)
    if not got.numel():
        return
    error = (got - expected).abs().max() / expected.abs().max().clamp(min=1e-2)
    assert error <= rtol, f"{name}: relative error {error:.2e}"


def differ(got: torch.Tensor, expected: torch.Tensor, name: str = "") -> None:
    assert (got - expected).abs().max() > 1e-4, f"{name}: the edit changed nothing"


def scaled(factor: float):
    return lambda x, hook: x * factor


def zero(x, hook):
    return torch.zeros_like(x)


def noisy(x, hook):
    """``x`` and some noise, the same for the same shape."""
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    return x + (0.5 * noise.abs() + 0.1).to(x.dtype)


def points_of_block_1(model: HookedTransformer) -> list[str]:
    return [name for name in model.hook_dict if name.startswith("blocks.1.")]


# Every point matters ------------------------------------------------------------------------------


@FAMILIES
def test_every_edit_reaches_the_logits_through_the_stream(tiny):
    """Whatever is edited in block 1: the stream leaving it, put into Hugging Face's own model,
    gives the logits of the edited run."""
    model, hf = loaded(tiny), tiny.build()
    plain = model(TOKENS)
    for name in points_of_block_1(model):
        logits = edited(tiny, {name: noisy})
        differ(logits, plain, name)
        with model.hooks([(name, noisy)]):
            out, after = model.run_with_cache(TOKENS, names_filter="blocks.1.hook_resid_post")
        assert torch.equal(out, logits), name
        stream = after["blocks.1.hook_resid_post"]
        close(logits, with_block_output(hf, 1, stream), name, rtol=5e-5)


def with_block_output(hf, layer: int, stream: torch.Tensor) -> torch.Tensor:
    """Hugging Face's logits when ``stream`` leaves a block."""

    def replace(_module, _args, output):
        return (stream, *output[1:]) if isinstance(output, tuple) else stream

    handle = hf_truth.block_list(hf)[layer].register_forward_hook(replace)
    try:
        return hf_truth.logits_of(hf, TOKENS)
    finally:
        handle.remove()


@FAMILIES
def test_edits_outside_the_blocks_reach_the_logits(tiny):
    model = loaded(tiny)
    plain = model(TOKENS)
    outside = [name for name in model.hook_dict if not name.startswith("blocks.")]
    assert "hook_embed" in outside
    assert "hook_logits" in outside
    for name in outside:
        differ(edited(tiny, {name: noisy}), plain, name)
    assert torch.equal(edited(tiny, {"hook_logits": scaled(2)}), 2 * plain)


@FAMILIES
def test_an_in_place_edit_is_as_good_as_a_returned_one_and_changes_nothing_before_it(tiny):
    """Neighbouring points may hold one tensor: an edit at a later one must not reach an earlier."""
    model, before = loaded(tiny), clean(tiny)
    fired: list[str] = []
    with model.hooks([(list(model.hook_dict), lambda x, hook: fired.append(hook.name))]):
        model(TOKENS)

    def in_place(x, hook):
        x.mul_(1.7)

    for name in points_of_block_1(model):
        returned = recorded(tiny, {name: scaled(1.7)})
        written = recorded(tiny, {name: in_place})
        for other in fired:
            assert torch.equal(written[other], returned[other]), (name, other)
        for earlier in fired[: fired.index(name)]:
            assert torch.equal(written[earlier], before[earlier]), (name, earlier)


@FAMILIES
def test_an_edit_of_a_later_position_cannot_reach_an_earlier_one(tiny):
    model = loaded(tiny)
    plain = model(TOKENS)

    def late(x, hook):
        axis = hook.axes.index("pos")
        return torch.cat([x.narrow(axis, 0, 4), noisy(x, hook).narrow(axis, 4, 2)], axis)

    for name in points_of_block_1(model):
        logits = edited(tiny, {name: late})
        close(logits[:, :4], plain[:, :4], name)
        differ(logits[:, 4:], plain[:, 4:], name)


# The same edit in Hugging Face's model ------------------------------------------------------------


@FAMILIES
@pytest.mark.parametrize("layer", [0, 1, -1])
def test_zeroing_a_blocks_input(tiny, layer):
    hf = tiny.build()
    layer %= loaded(tiny).cfg.n_layers
    truth = hf_truth.zero_block_input(hf, layer, TOKENS)
    close(edited(tiny, {f"blocks.{layer}.hook_resid_pre": zero}), truth)


ATTENTION = ("attn", "attention", "self_attn", "self_attention")
MLPS = ("mlp", "ffn", "block_sparse_moe", "fc2")


def branch(hf, names: tuple[str, ...]) -> torch.nn.Module:
    """Attention or MLP of block 1."""
    return next(m for name, m in hf_truth.block_list(hf)[1].named_children() if name in names)


def with_branch_scaled(hf, names: tuple[str, ...], factor: float) -> torch.Tensor:
    """Hugging Face's logits when a branch of block 1 adds ``factor`` times what it would."""
    module = branch(hf, names)
    parameters = list(inspect.signature(module.forward).parameters)

    def scale(_module, args, kwargs, output):
        given = dict(zip(parameters, args, strict=False)) | kwargs
        out = output[0] if isinstance(output, tuple) else output
        residual = given.get("residual", 0.0)  # Bloom and MPT add it inside
        out = residual + factor * (out - residual)
        return (out, *output[1:]) if isinstance(output, tuple) else out

    handle = module.register_forward_hook(scale, with_kwargs=True)
    try:
        return hf_truth.logits_of(hf, TOKENS)
    finally:
        handle.remove()


@FAMILIES
@pytest.mark.parametrize("kind, names", [("attn", ATTENTION), ("mlp", MLPS)])
def test_switching_off_a_branch(tiny, kind, names):
    truth = with_branch_scaled(tiny.build(), names, 0.0)
    differ(truth, loaded(tiny)(TOKENS))
    close(edited(tiny, {f"blocks.1.hook_{kind}_out": zero}), truth, kind, 5e-5)


NORM_FOLLOWS = ("gemma2", "gemma3_text", "olmo2")  # between Hugging Face's module and the hook


@pytest.mark.parametrize("tiny", [t for t in ALL if t.model_type not in NORM_FOLLOWS], **by_id)
@pytest.mark.parametrize("kind, names", [("attn", ATTENTION), ("mlp", MLPS)])
def test_doubling_a_branch(tiny, kind, names):
    truth = with_branch_scaled(tiny.build(), names, 2.0)
    close(edited(tiny, {f"blocks.1.hook_{kind}_out": scaled(2)}), truth, kind, 5e-5)


LN1 = "ln_1 input_layernorm self_attn_layer_norm norm_1 ln_attn".split()
LN2 = "ln_2 norm_2 ln_mlp final_layer_norm pre_feedforward_layernorm post_attention_layernorm"
HF_NORMS = {"ln1": LN1, "ln2": LN2.split()}


def forgets_the_size(tiny: Tiny, norm: str) -> bool:
    """Gemma 3 norms queries and keys, and attention's output: only directions pass."""
    return tiny.model_type == "gemma3_text" and norm == "ln1"


@pytest.mark.parametrize("tiny", [t for t in ALL if t.model_type != "olmo2"], **by_id)
@pytest.mark.parametrize("which", ["ln1", "ln2"])
def test_scaling_what_a_norm_gives(tiny, which):
    """1.5 times the norm's output, whichever side of its weight the hook is on."""
    model, hf = loaded(tiny), tiny.build()
    block = model.blocks[1]
    children = dict(hf_truth.block_list(hf)[1].named_children())
    found = next((children[n] for n in HF_NORMS[which] if n in children), None)
    hooked = [which]
    if isinstance(block, ParallelBlock) and block.spec.shared_norm:  # one module for both
        found, hooked = children[next(n for n in LN1 if n in children)], ["ln1", "ln2"]
    assert found is not None
    handle = found.register_forward_hook(lambda _m, _a, output: 1.5 * output)
    truth = hf_truth.logits_of(hf, TOKENS)
    handle.remove()
    if not forgets_the_size(tiny, which):
        differ(truth, model(TOKENS))
    edits = {f"blocks.1.{name}.hook_normalized": scaled(1.5) for name in hooked}
    close(edited(tiny, edits), truth, which, 5e-5)


# Formulas -----------------------------------------------------------------------------------------


def per_query_head(x: torch.Tensor, n_heads: int) -> torch.Tensor:
    """Keys or values ``[batch, pos, kv_head, d]`` repeated for every query head."""
    return x.repeat_interleave(n_heads // x.shape[2], dim=2)


def mixed(pattern: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return torch.einsum("bhqk,bkhd->bqhd", pattern, per_query_head(v, pattern.shape[1]))


@FAMILIES
def test_editing_the_pattern(tiny):
    before = clean(tiny)
    allowed = torch.isfinite(before["blocks.1.attn.hook_attn_scores"]).float()
    uniform = allowed / allowed.sum(-1, keepdim=True)
    after = recorded(tiny, {"blocks.1.attn.hook_pattern": lambda x, hook: uniform})
    v = after["blocks.1.attn.hook_v"]
    assert torch.equal(v, before["blocks.1.attn.hook_v"])
    close(after["blocks.1.attn.hook_z"], mixed(uniform, v), "z")
    nothing = recorded(tiny, {"blocks.1.attn.hook_pattern": zero})
    assert not nothing["blocks.1.attn.hook_z"].any()
    differ(nothing["hook_logits"], before["hook_logits"])


@FAMILIES
def test_editing_the_scores(tiny):
    before, attn = clean(tiny), loaded(tiny).blocks[1].attn
    after = recorded(tiny, {"blocks.1.attn.hook_attn_scores": scaled(0.3)})
    scores = 0.3 * before["blocks.1.attn.hook_attn_scores"]
    exp = torch.exp(scores)
    total = exp.sum(-1, keepdim=True)
    if tiny.model_type == "gpt_oss":  # one more key, which has no value
        total = total + torch.exp(attn.sinks)[:, None, None]
    close(after["blocks.1.attn.hook_pattern"], exp / total, "pattern")
    z = mixed(exp / total, before["blocks.1.attn.hook_v"])
    close(after["blocks.1.attn.hook_z"], z, "z")


@FAMILIES
@pytest.mark.parametrize("letter", ["q", "k"])
def test_a_head_without_queries_or_keys_looks_everywhere_alike(tiny, letter):
    """Zero queries (or keys) leave scores of zero: a uniform pattern, bar ALiBi and sinks."""
    model, before = loaded(tiny), clean(tiny)
    for point in (f"hook_{letter}", f"hook_rot_{letter}"):
        name = f"blocks.1.attn.{point}"
        if name not in model.hook_dict:
            continue

        def first_head(x, hook):
            x[:, :, 0] = 0

        after = recorded(tiny, {name: first_head})
        n_heads, served = model.cfg.n_heads, 1
        if letter == "k":
            served = n_heads // before[name].shape[2]
        pattern = after["blocks.1.attn.hook_pattern"]
        others = before["blocks.1.attn.hook_pattern"][:, served:]
        assert torch.equal(pattern[:, served:], others)
        differ(pattern[:, :served], before["blocks.1.attn.hook_pattern"][:, :served], name)
        if model.cfg.positional_embedding_type == "alibi" or tiny.model_type == "gpt_oss":
            continue
        allowed = torch.isfinite(before["blocks.1.attn.hook_attn_scores"]).float()
        uniform = (allowed / allowed.sum(-1, keepdim=True))[:, :served]
        close(pattern[:, :served], uniform, name)


@FAMILIES
def test_a_value_head_serves_its_queries_and_no_others(tiny):
    before = clean(tiny)
    name = "blocks.1.attn.hook_v"

    def last_head(x, hook):
        x[:, :, -1] = 0

    z = recorded(tiny, {name: last_head})["blocks.1.attn.hook_z"]
    was = before["blocks.1.attn.hook_z"]
    served = z.shape[2] // before[name].shape[2]
    assert not z[:, :, -served:].any()
    assert torch.equal(z[:, :, :-served], was[:, :, :-served])


@FAMILIES
def test_a_head_without_result_is_a_head_without_z(tiny):
    def head_2(x, hook):
        x[:, :, 2] = 0

    by_z = recorded(tiny, {"blocks.1.attn.hook_z": head_2})
    by_result = recorded(tiny, {"blocks.1.attn.hook_result": head_2})
    close(by_result["blocks.1.hook_attn_out"], by_z["blocks.1.hook_attn_out"], "attn_out")
    logits = edited(tiny, {"blocks.1.attn.hook_result": head_2})
    close(logits, edited(tiny, {"blocks.1.attn.hook_z": head_2}), "logits", 5e-5)
    differ(logits, loaded(tiny)(TOKENS))


@FAMILIES
def test_doubling_a_scale(tiny):
    """LayerNorm's result is halved bar its bias; RMSNorm's is halved."""
    norms = {
        name: module
        for name, module in loaded(tiny).blocks[1].named_children()
        if isinstance(module, Norm)
    }
    assert len(norms) == (4 if tiny.model_type.startswith(("gemma2", "gemma3")) else 2)
    for norm, module in norms.items():
        check_doubled_scale(tiny, norm, module)


def check_doubled_scale(tiny: Tiny, norm: str, module: Norm) -> None:
    model, before, name = loaded(tiny), clean(tiny), f"blocks.1.{norm}"
    after = recorded(tiny, {f"{name}.hook_scale": scaled(2)})
    b = module.live("b")
    b = 0.0 if b is None or not module.spec.centres else b
    expected = (before[f"{name}.hook_normalized"] - b) / 2 + b
    close(after[f"{name}.hook_normalized"], expected, norm)
    same = {f"{name}.hook_normalized": lambda x, hook: expected}
    doubled = edited(tiny, {f"{name}.hook_scale": scaled(2)})
    close(doubled, edited(tiny, same), "logits", 5e-5)
    if not forgets_the_size(tiny, norm):
        differ(doubled, model(TOKENS))


@pytest.mark.parametrize("tiny", one_per_family(), **by_id)
def test_scaling_the_final_norm_scales_the_logits(tiny):
    model, before = loaded(tiny), clean(tiny)
    assert isinstance(model.ln_final, Norm)
    cap = model.unembed.softcap

    def linear(logits):
        return (logits if cap is None else cap * torch.atanh(logits / cap)) - model.b_U

    after = edited(tiny, {"ln_final.hook_normalized": scaled(0.5)})
    close(linear(after), 0.5 * linear(before["hook_logits"]), "normalized", 1e-4)
    if model.ln_final.live("b") is None:
        after = edited(tiny, {"ln_final.hook_scale": scaled(2.0)})
        close(linear(after), 0.5 * linear(before["hook_logits"]), "scale", 1e-4)


@FAMILIES
def test_editing_embeddings(tiny):
    model, before = loaded(tiny), clean(tiny)
    after = recorded(tiny, {"hook_embed": scaled(3)})
    places = before.get("hook_pos_embed", 0.0)
    close(after["blocks.0.hook_resid_pre"], 3 * before["hook_embed"] + places, "embed")
    if "hook_pos_embed" in model.hook_dict:
        after = recorded(tiny, {"hook_pos_embed": zero})
        close(after["blocks.0.hook_resid_pre"], before["hook_embed"], "pos_embed")


# Per-head inputs ----------------------------------------------------------------------------------


@FAMILIES
@pytest.mark.parametrize("letter", ["q", "k", "v"])
def test_one_heads_input_changes_that_head_alone(tiny, letter):
    """And changes it as the same edit of the whole stream would."""
    model, before = loaded(tiny), clean(tiny)
    name, seen = f"blocks.1.hook_{letter}_input", f"blocks.1.attn.hook_{letter}"
    head = before[name].shape[2] - 1

    def one(x, hook):
        x[:, :, head] = noisy(x[:, :, head], hook)

    after = recorded(tiny, {name: one})[seen]
    whole = edited_stream(tiny)[seen]
    full_norm = model.blocks[1].attn.spec.qk_norm == "full" and letter != "v"
    if full_norm:  # one norm over all heads: the others feel its scale
        differ(after[:, :, head], before[seen][:, :, head])
        return
    others = [h for h in range(before[seen].shape[2]) if h != head]
    close(after[:, :, others], before[seen][:, :, others], "the other heads")
    close(after[:, :, head], whole[:, :, head], "this head")
    differ(after[:, :, head], before[seen][:, :, head])


@cache
def edited_stream(tiny: Tiny) -> dict[str, torch.Tensor]:
    return recorded(tiny, {"blocks.1.hook_resid_pre": noisy})


@FAMILIES
def test_all_heads_inputs_are_the_stream_of_attention(tiny):
    """The edit of every head's input is the edit of the stream, as attention sees it."""
    model, before = loaded(tiny), clean(tiny)
    whole = edited_stream(tiny)
    stream = noisy(before["blocks.1.hook_resid_pre"], None)

    def all_heads(x, hook):
        return stream.unsqueeze(2).expand_as(x)

    inputs = [[f"blocks.1.hook_{letter}_input" for letter in "qkv"]]
    if "blocks.1.hook_attn_in" in model.hook_dict:
        inputs.append(["blocks.1.hook_attn_in"])
    for names in inputs:
        after = recorded(tiny, dict.fromkeys(names, all_heads))
        for part in ("attn.hook_q", "attn.hook_k", "attn.hook_v", "attn.hook_z", "hook_attn_out"):
            close(after[f"blocks.1.{part}"], whole[f"blocks.1.{part}"], part, 5e-5)
        assert torch.equal(after["blocks.1.hook_resid_pre"], before["blocks.1.hook_resid_pre"])
        by_copies = edited(tiny, dict.fromkeys(names, all_heads))
        by_output = edited(tiny, {"blocks.1.hook_attn_out": lambda x, hook: whole[hook.name]})
        close(by_copies, by_output, "logits", 5e-5)


@FAMILIES
def test_attn_in_comes_before_the_split_inputs(tiny):
    """An edit at both: each of q, k, v reads the edited copy, edited again."""
    if "blocks.1.hook_attn_in" not in loaded(tiny).hook_dict:
        assert loaded(tiny).cfg.n_key_value_heads < loaded(tiny).cfg.n_heads
        return
    after = recorded(tiny, {"blocks.1.hook_attn_in": zero})
    for letter in "qkv":
        assert not after[f"blocks.1.hook_{letter}_input"].any()


@FAMILIES
def test_the_mlps_input_is_the_stream_of_the_mlp(tiny):
    model, before = loaded(tiny), clean(tiny)
    read = "hook_resid_pre" if isinstance(model.blocks[1], ParallelBlock) else "hook_resid_mid"
    whole = recorded(tiny, {f"blocks.1.{read}": noisy})
    after = recorded(tiny, {"blocks.1.hook_mlp_in": noisy})
    close(after["blocks.1.hook_mlp_out"], whole["blocks.1.hook_mlp_out"], "mlp_out")
    for name in (f"blocks.1.{read}", "blocks.1.hook_attn_out"):
        assert torch.equal(after[name], before[name])
    differ(edited(tiny, {"blocks.1.hook_mlp_in": noisy}), model(TOKENS))


# Neurons and experts ------------------------------------------------------------------------------


ONE_MORE = {"gpt_oss"}
"""Types whose activation is multiplied by one more than the linear branch."""


@FAMILIES
@pytest.mark.parametrize("point", ["hook_pre", "hook_pre_linear", "hook_post"])
def test_silent_neurons_write_the_bias_alone(tiny, point):
    """All these activation functions map 0 to 0."""
    model = loaded(tiny)
    silent = -1.0 if point == "hook_pre_linear" and tiny.model_type in ONE_MORE else 0.0
    name, block = f"blocks.1.mlp.{point}", model.blocks[1]
    if name not in model.hook_dict:
        assert point == "hook_pre_linear"
        return
    after = recorded(tiny, {name: lambda x, hook: torch.full_like(x, silent)})
    assert not after["blocks.1.mlp.hook_post"].any()
    if isinstance(block.mlp, MoE):
        biased = any("bias" in name for name, _ in block.mlp.experts.named_parameters())
        assert after["blocks.1.mlp.hook_expert_out"].any() == biased
        return
    if not isinstance(block._modules["ln2_post"], Norm):
        b_out = block.mlp.b_out * block.spec.residual_scale
        out = after["blocks.1.hook_mlp_out"]
        close(out, b_out.expand_as(out), "mlp_out")


GATED = tinies("llama")[:1] + tinies("gemma2")[:1] + tinies("cohere")[:1] + tinies("phi3")[:1]


@pytest.mark.parametrize("tiny", GATED, **by_id)
def test_the_linear_branch_is_linear(tiny):
    before = clean(tiny)
    after = recorded(tiny, {"blocks.1.mlp.hook_pre_linear": scaled(-2)})
    name = "blocks.1.mlp.hook_post"
    close(after[name], -2 * before[name], "post")


WITH_EXPERTS = tinies("mixtral", "olmoe", "gpt_oss") + tinies("qwen3_moe")[:2]
MOE = pytest.mark.parametrize("tiny", WITH_EXPERTS, **by_id)


@MOE
def test_experts_sum_to_what_the_mlp_adds(tiny):
    before, mlp = clean(tiny), "blocks.1.mlp"
    experts = before[f"{mlp}.hook_expert_out"]
    close(experts.sum(2), before["blocks.1.hook_mlp_out"], "sum")
    weights = before[f"{mlp}.hook_expert_weights"]
    spec = loaded(tiny).blocks[1].mlp.spec
    assert ((weights != 0).sum(-1) == spec.top_k).all()
    assert not experts[weights == 0].any()
    logits = before[f"{mlp}.hook_router_logits"]
    best = logits.topk(spec.top_k).indices.sort().values
    assert torch.equal(weights.topk(spec.top_k).indices.sort().values, best)


@MOE
def test_editing_the_routers_logits_routes_anew(tiny):
    """Logits of the experts in reverse order: their weights in reverse order."""
    before, name = clean(tiny), "blocks.1.mlp.hook_router_logits"
    after = recorded(tiny, {name: lambda x, hook: x.flip(-1)})
    weights = "blocks.1.mlp.hook_expert_weights"
    close(after[weights], before[weights].flip(-1), "weights")
    # And without anybody listening to the weights:
    logits = edited(tiny, {name: lambda x, hook: x.flip(-1)})
    close(logits, after["hook_logits"], "logits", 5e-5)
    differ(logits, loaded(tiny)(TOKENS))


@MOE
def test_editing_the_weights_mixes_the_experts_anew(tiny):
    """Twice one expert and none of the others, where that expert ran anyway."""
    before, mlp = clean(tiny), "blocks.1.mlp"
    weights, outs = before[f"{mlp}.hook_expert_weights"], before[f"{mlp}.hook_expert_out"]
    expert = int((weights != 0).sum((0, 1)).argmax())
    chosen = torch.zeros_like(weights)
    chosen[..., expert] = 2.0
    ran = weights[..., expert] > 0.05
    alone = 2 * outs[..., expert, :] / weights[..., expert, None]
    hook = {f"{mlp}.hook_expert_weights": lambda x, hook: chosen}
    for listening in (["blocks.1.hook_mlp_out"], ["blocks.1.hook_mlp_out", f"{mlp}.hook_expert_*"]):
        with loaded(tiny).hooks(list(hook.items())):
            _, after = loaded(tiny).run_with_cache(TOKENS, names_filter=listening)
        close(after["blocks.1.hook_mlp_out"][ran], alone[ran], str(listening), 1e-4)


@MOE
def test_editing_one_experts_output(tiny):
    before, mlp = clean(tiny), "blocks.1.mlp"

    def without_0(x, hook):
        x[:, :, 0] = 0

    after = recorded(tiny, {f"{mlp}.hook_expert_out": without_0})
    expected = before["blocks.1.hook_mlp_out"] - before[f"{mlp}.hook_expert_out"][:, :, 0]
    close(after["blocks.1.hook_mlp_out"], expected, "mlp_out")


# Frozen models, generation ------------------------------------------------------------------------


def test_in_place_edits_in_a_frozen_model_with_gradients_from_the_stream():
    """q, k and v come out of one multiplication there: views that autograd guards."""
    with torch.enable_grad():
        model = hookedlm.load(tinies("gpt2")[0].build()).requires_grad_(False)
        stream = clean(tinies("gpt2")[0])["blocks.0.hook_resid_pre"].clone().requires_grad_()

        def first_head(x, hook):
            x[:, :, 0] = 0

        for letter in "qkv":
            hooks = [(f"blocks.1.attn.hook_{letter}", first_head)]
            out = model.run_with_hooks(stream, start_at_layer=0, fwd_hooks=hooks)
            (grad,) = torch.autograd.grad(out.square().sum(), stream)
            assert torch.isfinite(grad).all()
            close(out.detach(), edited(tinies("gpt2")[0], dict(hooks)), letter)


@pytest.mark.parametrize("tiny", one_per_family(), **by_id)
def test_hooks_are_active_while_generating_and_know_where_they_are(tiny):
    model = loaded(tiny)
    seen: list[tuple[int, int]] = []

    def note(x, hook):
        seen.append((hook.pos_offset, x.shape[1]))

    options = dict(max_new_tokens=3, do_sample=False, stop_at_eos=False, verbose=False)
    with model.hooks([("blocks.1.hook_resid_pre", note)]):
        cached = model.generate(TOKENS, **options)
        assert seen == [(0, 6), (6, 1), (7, 1)]
        seen.clear()
        again = model.generate(TOKENS, use_past_kv_cache=False, **options)
        assert seen == [(0, 6), (0, 7), (0, 8)]
    assert torch.equal(cached, again)
    assert model.hook_embed.pos_offset == 0
    assert not any(point.wanted for point in model.hook_points())


def test_an_edit_steers_generation():
    tiny = tinies("gpt2")[0]

    def only_token_17(logits, hook):
        logits[..., 17] = 1e4

    def only_from_position_7(logits, hook):
        if hook.pos_offset + logits.shape[1] > 7:  # what follows position 7 or a later one
            logits[..., 17] = 1e4

    options = dict(max_new_tokens=4, do_sample=False, stop_at_eos=False, verbose=False)
    model = loaded(tiny)
    plain = model.generate(TOKENS, **options)
    with model.hooks([("hook_logits", only_token_17)]):
        assert (model.generate(TOKENS, **options)[:, 6:] == 17).all()
    with model.hooks([("hook_logits", only_from_position_7)]):
        late = model.generate(TOKENS, **options)
    assert torch.equal(late[:, :8], plain[:, :8])
    assert (late[:, 8:] == 17).all()
    assert not (plain == 17).all()


TOY = dict(n_layers=1, d_model=8, n_ctx=8, d_head=4, d_vocab=11, seed=0, init_mode="gpt2")


def test_in_place_edits_in_models_built_from_a_config():
    """A norm behind the activation, and tokens as a hook point: neither shares with its neighbour,
    nor with the caller."""
    model = hookedlm.HookedTransformer(TOY | dict(act_fn="solu_ln", use_hook_tokens=True))
    tokens = torch.tensor([[1, 2, 3]])
    names = list(model.hook_dict)
    _, before = model.run_with_cache(tokens, names_filter=names)
    with model.hooks([("blocks.0.mlp.hook_post", lambda x, hook: x.zero_())]):
        _, after = model.run_with_cache(tokens, names_filter=names)
    assert torch.equal(
        after["blocks.0.mlp.ln.hook_normalized"], before["blocks.0.mlp.ln.hook_normalized"]
    )
    assert not after["blocks.0.mlp.hook_post"].any()
    with model.hooks([("hook_tokens", lambda x, hook: x.fill_(7))]):
        _, after = model.run_with_cache(tokens, names_filter=names)
    assert tokens.tolist() == [[1, 2, 3]]
    assert torch.equal(after["hook_embed"], model.W_E[torch.tensor([[7, 7, 7]])])
