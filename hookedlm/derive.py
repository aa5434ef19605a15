"""Entries of a cache that were not recorded but follow from what was.

A plain full cache leaves the fused kernels running. Scores and patterns follow from queries and
keys, a norm's scale and result from the stream it read, neurons after their activation function
from those before it: the functions the layers themselves use are applied to the recorded tensors
when somebody asks.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hookedlm.errors import StaleCacheError
from hookedlm.hooks import HookPoint
from hookedlm.layers import attention_math as math
from hookedlm.layers.attention import Attention
from hookedlm.layers.bert import BertBlock
from hookedlm.layers.block import AttentionBranch, ParallelBlock, PostNormBlock
from hookedlm.layers.context import Context
from hookedlm.layers.cross import CrossBranch, CrossContext, PostNormCrossBlock
from hookedlm.layers.hybrid import MLPBlock
from hookedlm.layers.latent import SparseLatentAttention
from hookedlm.layers.mlp import MLP, GatedMLP
from hookedlm.layers.norm import Norm, Same
from hookedlm.layers.per_layer import PerLayerInputBlock
from hookedlm.layers.qkv import from_heads

if TYPE_CHECKING:
    from hookedlm.model import HookedTransformer

Tensors = Mapping[str, Tensor]


class Deferred:
    """A tensor that is computed when first asked for."""

    def __init__(self, compute: Callable[[], Tensor]):
        self.compute = compute

    def map(self, change: Callable[[Tensor], Tensor]) -> Deferred:
        """The same, changed."""
        return Deferred(lambda: change(self.compute()))


class Activations(dict):
    """A dictionary of activations some of which are still `Deferred`; reading one computes and
    keeps it. Everything a dict does works, copying and saving included."""

    def __iter__(self) -> Iterator[str]:
        return super().__iter__()  # overridden so that dict(x) and {**x} read through __getitem__

    def __getitem__(self, key: str) -> Tensor:
        value = super().__getitem__(key)
        if isinstance(value, Deferred):
            with torch.no_grad():
                value = value.compute()
            self[key] = value
        return value

    def get(self, key: str, default: Any = None) -> Any:
        """The activation, or ``default``."""
        try:
            return self[key]
        except KeyError:
            return default

    def setdefault(self, key: str, default: Any = None) -> Any:
        """The activation; ``default``, which is then kept, where there is none."""
        return self[key] if key in self else super().setdefault(key, default)

    def pop(self, key: str, *default: Any) -> Any:
        """The activation, taken out."""
        value = super().pop(key, *default)
        return value.compute() if isinstance(value, Deferred) else value

    def copy(self) -> dict[str, Tensor]:
        """A plain dictionary of all activations."""
        return dict(self)

    def values(self):
        """All activations, computed."""
        return [self[key] for key in self]

    def items(self):
        """All (name, activation) pairs, computed."""
        return [(key, self[key]) for key in self]

    def map(self, change: Callable[[Tensor], Tensor]) -> Activations:
        """Every activation changed, the deferred ones when they are asked for."""
        changed = Activations()
        for key, value in self.raw():
            changed[key] = value.map(change) if isinstance(value, Deferred) else change(value)
        return changed

    def raw(self) -> Iterator[tuple[str, Tensor | Deferred]]:
        """(name, tensor or Deferred) pairs, nothing computed."""
        return iter(super().items())

    def recorded(self) -> list[str]:
        """Names of the activations that are tensors already."""
        return [key for key, value in self.raw() if isinstance(value, Tensor)]

    def __reduce__(self) -> tuple[Any, ...]:
        # What torch.load(weights_only=True) can read.
        return OrderedDict, (), None, None, iter(self.items())


Derivation = Callable[[Tensors, Context], Tensor]


def derivations(model: HookedTransformer) -> dict[str, Derivation]:
    """Name -> how to compute it from a full recording, for every point that allows it."""
    table: dict[str, Derivation] = {}
    for name, block in named_blocks(model).items():
        if isinstance(block, AttentionBranch):
            table.update(_of_block(name, block))
    ln_final = model._modules.get("ln_final")
    if isinstance(ln_final, Norm):
        last = f"blocks.{len(model.blocks) - 1}.hook_resid_post"
        table.update(_of_norm("ln_final", ln_final, partial(_entry, last)))
    return table


def named_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """Every block by the name that its points begin with, in the order in which they run."""
    return {
        f"{stack}.{layer}": block
        for stack in ("blocks", "encoder", "decoder")
        for layer, block in enumerate(_children(model, stack))
    }


def _children(model: nn.Module, name: str) -> list[nn.Module]:
    module = model._modules.get(name)
    return list(module.children()) if isinstance(module, nn.ModuleList) else []


def _entry(name: str, tensors: Tensors) -> Tensor:
    return tensors[name]


def points_of(part: nn.Module) -> list[HookPoint]:
    """All hook points of a part of the model."""
    return [module for module in part.modules() if isinstance(module, HookPoint)]


def _of_block(name: str, block: AttentionBranch) -> dict[str, Derivation]:
    table: dict[str, Derivation] = {}
    pre, mid = f"{name}.hook_resid_pre", f"{name}.hook_resid_mid"
    attn_out, mlp_out = f"{name}.hook_attn_out", f"{name}.hook_mlp_out"
    inputs: dict[str, Callable[[Tensors], Tensor]] = {
        "ln1": lambda t: t[pre],
        "ln2": lambda t: t[pre] if isinstance(block, (ParallelBlock, MLPBlock)) else t[mid],
    }
    if isinstance(block, PostNormBlock):
        inputs = {"ln1": lambda t: t[pre] + t[attn_out], "ln2": lambda t: t[mid] + t[mlp_out]}
    if isinstance(block, BertBlock):
        inputs = {"ln1": lambda t: t[mid], "ln2": lambda t: t[f"{name}.hook_resid_post"]}
    if isinstance(block, CrossBranch):
        inputs |= _norms_around_cross_attention(name, block)
        table.update(_of_attention(f"{name}.cross_attn", block.cross_attn, _cross))
    attn = block._modules.get("attn")
    if isinstance(attn, Attention):
        inputs["ln1_post"] = lambda t: from_heads(
            t[f"{name}.attn.hook_z"], attn.W_O, attn.live("b_O")
        )
        table.update(_of_attention(f"{name}.attn", attn))
    elif "mixer" in block._modules:
        inputs["ln1_post"] = lambda t: t[f"{name}.mixer.hook_out"]
    mlp = block._modules.get("mlp")
    if isinstance(mlp, (MLP, GatedMLP)):
        inputs["ln2_post"] = lambda t: mlp.out(t[f"{name}.mlp.hook_post"])
        if (post := _post_of(f"{name}.mlp", mlp)) is not None:
            inputs["ln2_post"] = lambda t: mlp.out(post(t))
            table[f"{name}.mlp.hook_post"] = lambda t, ctx: post(t)
    if isinstance(block, PerLayerInputBlock):
        ple = block.ple
        inputs["ple_norm"] = lambda t: ple.out(t[f"{name}.ple.hook_post"])
    for norm_name, read in inputs.items():
        norm = block._modules.get(norm_name)
        if isinstance(norm, Norm):
            table.update(_of_norm(f"{name}.{norm_name}", norm, read))
    return table


def _norms_around_cross_attention(
    name: str, block: CrossBranch
) -> dict[str, Callable[[Tensors], Tensor]]:
    pre, mid, crossed = (f"{name}.hook_resid_{x}" for x in ("pre", "mid", "mid_cross"))
    attn_out, cross_out, mlp_out = (f"{name}.hook_{x}_out" for x in ("attn", "cross_attn", "mlp"))
    if not isinstance(block, PostNormCrossBlock):
        return {"ln2": lambda t: t[mid], "ln3": lambda t: t[crossed]}
    return {
        "ln1": lambda t: t[pre] + t[attn_out],
        "ln2": lambda t: t[mid] + t[cross_out],
        "ln3": lambda t: t[crossed] + t[mlp_out],
    }


def _of_norm(name: str, norm: Norm, read: Callable[[Tensors], Tensor]) -> dict[str, Derivation]:
    def scale(t: Tensors, ctx: Context) -> Tensor:
        return norm.scale_of(read(t))

    def normalized(t: Tensors, ctx: Context) -> Tensor:
        x = read(t)
        return norm.normalized(x, norm.scale_of(x))

    return {f"{name}.hook_scale": scale, f"{name}.hook_normalized": normalized}


def _post_of(name: str, mlp: MLP | GatedMLP) -> Callable[[Tensors], Tensor] | None:
    """What its neurons say, from what they read: one operation on each, not worth the memory of
    keeping both. None where there are weights in between. Raises StaleCacheError if the activation
    function was exchanged since."""
    act = mlp.act_fn
    trained = isinstance(act, nn.Module) and any(True for _ in act.parameters())
    if trained or not isinstance(mlp.ln, Same):
        return None

    def post(t: Tensors) -> Tensor:
        if mlp.act_fn is not act:
            raise StaleCacheError(
                f"'{name}.hook_post' was not read yet, and the activation function was exchanged "
                "since: read it before, or name it in names_filter to have it recorded."
            )
        pre = t[f"{name}.hook_pre"]
        if isinstance(mlp, GatedMLP):
            return mlp.combine(pre, t[f"{name}.hook_pre_linear"])
        return mlp.act_fn(pre)

    return post


def _own(ctx: Context) -> Context:
    return ctx


def _cross(ctx: Context) -> Context:
    assert isinstance(ctx, CrossContext)
    return ctx.cross


def _of_attention(
    name: str, attn: Attention, context: Callable[[Context], Context] = _own
) -> dict[str, Derivation]:
    if isinstance(attn, SparseLatentAttention):
        return {}  # which keys were picked is not recorded
    rot = "rot_" if attn.rotate is not None else ""

    def scores(t: Tensors, ctx: Context) -> Tensor:
        q = t[f"{name}.hook_{rot}q"].transpose(1, 2)
        k = t[f"{name}.hook_{rot}k"].transpose(1, 2)
        scale = attn.spec.scale
        if attn.spec.scale_query:
            q, scale = q * scale, 1.0
        ctx = context(ctx)
        return attn.scores(q, k, scale, _allowed(attn, q, k, ctx), ctx)

    def pattern(t: Tensors, ctx: Context) -> Tensor:
        pattern = math.attention_pattern(scores(t, ctx), attn.live("sinks"))
        return pattern.to(t[f"{name}.hook_{rot}q"].dtype)

    return {f"{name}.hook_attn_scores": scores, f"{name}.hook_pattern": pattern}


def _allowed(attn: Attention, q: Tensor, k: Tensor, ctx: Context) -> Tensor | None:
    return attn.allowed(q.shape[2], k.shape[2], ctx, q.device)
