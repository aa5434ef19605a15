"""The hook points that a block of a given make has, the axes their tensors must have, and whether
edits of them count.

A parallel block has no stream between its branches, a layer without rotation no rotated queries, a
block whose family norms only what a branch writes no norm before it. Nothing else may be missing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from hookedlm import HookedTransformer
from hookedlm.hooks import HookPoint
from hookedlm.layers.attention import Attention
from hookedlm.layers.latent import LatentAttention
from hookedlm.layers.mlp import MLP, GatedMLP
from hookedlm.layers.moe import MoE
from hookedlm.layers.norm import Norm
from hookedlm.spec import BlockSpec

OUTSIDE = {"hook_embed", "hook_logits"}
NORM = ("hook_scale", "hook_normalized")
STREAMS = {f"hook_{x}" for x in ("resid_pre", "attn_out", "mlp_out", "resid_post")}
READ_BY_HEADS = {"hook_q_input", "hook_k_input", "hook_v_input"}
HEADS = {f"attn.hook_{x}" for x in ("q", "k", "v", "attn_scores", "pattern", "z", "result")}
ROUTING = {f"mlp.hook_{x}" for x in ("router_logits", "expert_weights", "expert_out")}
NEURONS = {"mlp.hook_pre", "mlp.hook_post"}
OF_KEYS = {"attn.hook_k", "attn.hook_v", "attn.hook_rot_k", "hook_k_input", "hook_v_input"}


def kind_of(name: str) -> str:
    """A hook's name without its layer."""
    return re.sub(r"^blocks\.\d+\.", "blocks.L.", name)


def complete(block: nn.Module) -> set[str]:
    """Every hook point that a uniform block with attention and an MLP must have."""
    spec, attn, mlp = block.spec, block.attn, block.mlp
    assert isinstance(spec, BlockSpec)
    assert isinstance(attn, Attention)
    names = STREAMS | {"hook_mlp_in"}
    names |= set() if spec.layout == "parallel" else {"hook_resid_mid"}
    for norm in ("ln1", "ln2", "ln1_post", "ln2_post"):
        if vars(spec)[norm] is not None:
            names |= {f"{norm}.{point}" for point in NORM}
    return names | of_attention(attn) | of_mlp(mlp)


def of_attention(attn: Attention) -> set[str]:
    """Hook points of attention, and of the stream as its heads read it."""
    spec = attn.spec
    names = HEADS | READ_BY_HEADS
    names |= {"attn.hook_rot_q", "attn.hook_rot_k"} if spec.rotary else set()
    names |= {"hook_attn_in"} if spec.n_heads == spec.n_kv_heads else set()
    names |= {"attn.hook_kv_latent"} if isinstance(attn, LatentAttention) else set()
    for part in ("q_norm", "k_norm", "v_norm"):
        if isinstance(attn._modules.get(part), Norm):
            names |= {f"attn.{part}.{point}" for point in NORM}
    return names - (OF_KEYS if spec.reuses_keys is not None else set())


def of_mlp(mlp: nn.Module) -> set[str]:
    """Hook points of an MLP or a mixture, whose experts have neurons too."""
    if isinstance(mlp, MLP):
        return NEURONS
    names = NEURONS | {"mlp.hook_pre_linear"}
    if isinstance(mlp, GatedMLP):
        return names
    assert isinstance(mlp, MoE)
    return names | ROUTING | ({"mlp.hook_shared_out"} if mlp.shared is not None else set())


def missing(model: HookedTransformer) -> set[str]:
    """What a uniform model lacks, layers left out of the names."""
    wanted = set(OUTSIDE)
    if model.ln_final is not None:
        wanted |= {f"ln_final.{point}" for point in NORM}
    for i, block in enumerate(model.blocks):
        wanted |= {f"blocks.{i}.{name}" for name in complete(block)}
    return {kind_of(name) for name in wanted - set(model.hook_dict)}


def misshapen(model: HookedTransformer, cache: Mapping[str, Tensor], tokens: Tensor) -> dict:
    """Points whose tensors are not of their declared axes: name -> what is wrong."""
    batch, pos = tokens.shape
    sizes = {"batch": batch, "pos": pos, "key_pos": pos, "d_model": model.cfg.d_model, "1": 1}
    sizes["d_vocab"] = model.cfg.d_vocab_out
    wrong = {}
    for name, x in cache.items():
        axes = model.hook_dict[name].axes
        if axes is None or len(axes) != x.ndim:
            wrong[kind_of(name)] = f"{tuple(x.shape)} for axes {axes}"
            continue
        known = sizes | sizes_in(model, name)
        for axis, size in zip(axes, x.shape, strict=True):
            once = axis == "batch" and size == 1  # positions, the same for all rows
            if known.get(axis, size) != size and not once:
                wrong[kind_of(name)] = f"{axis} is {size}, not {known[axis]}"
    return wrong


def sizes_in(model: HookedTransformer, name: str) -> dict[str, int]:
    """Axes whose sizes the block of a point knows."""
    if not name.startswith("blocks."):
        return {}
    block = model.blocks[int(name.split(".")[1])]
    heads, mlp = block.attn.spec, block.mlp
    sizes = {"head": heads.n_heads, "kv_head": heads.n_kv_heads, "d_head": heads.d_head}
    if isinstance(mlp, MoE):
        sizes["expert"] = mlp.spec.n_experts
    if ".shared." not in name:
        sizes["d_mlp"] = mlp.spec.d_mlp
    return sizes


def said(error: BaseException) -> str:
    """An exception on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def dead(model: HookedTransformer, tokens: Tensor) -> list[str]:
    """Hook points that do not fire once with their axes, or whose edit leaves the logits alone."""
    logits = model(tokens)
    whys = {name: why_dead(model, name, tokens, logits) for name in model.hook_dict}
    return [f"{name} ({why})" for name, why in whys.items() if why]


def why_dead(model: HookedTransformer, name: str, tokens: Tensor, logits: Tensor) -> str:
    """What is wrong with one hook point; "" if nothing is."""
    shapes: list[torch.Size] = []

    def edit(x: Tensor, hook: HookPoint) -> Tensor:
        shapes.append(x.shape)
        if not x.is_floating_point():
            return x
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(2)).to(x.dtype)
        edited = x + 0.7 * noise * (1 + x.abs().nan_to_num(0, 0, 0))
        return torch.where(torch.isfinite(x), edited, x)

    try:
        edited = model.run_with_hooks(tokens, fwd_hooks=[(name, edit)])
    except Exception as error:
        return said(error)
    axes = model.hook_dict[name].axes
    if len(shapes) != 1:
        return f"fired {len(shapes)} times"
    if axes is None or len(shapes[0]) != len(axes):
        return f"{tuple(shapes[0])} for axes {axes}"
    return "no effect" if torch.equal(edited, logits) else ""
