"""The block: one picture, a few lines.

::

    sequential                                      parallel
    pre ─┬─ ln1 ─ attn ─ ln1_post ─▶ + mid          pre ─┬─ ln1 ─ attn ─ ln1_post ─▶ +
         └───────────────────────────┘                   ├─ ln2 ─ mlp  ─ ln2_post ─▶ + post
    mid ─┬─ ln2 ─ mlp  ─ ln2_post ─▶ + post              └───────────────────────────┘
         └───────────────────────────┘
    post_norm                                       mixer
    pre ─┬─ attn ─▶ + ─ ln1 ─ mid                   pre ─┬─ ln1 ─ mixer ─▶ + post
         └──────────┘                                    └─────────────────┘
    mid ─┬─ mlp  ─▶ + ─ ln2 ─ post
         └──────────┘
"""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor, nn

from hookedlm.axes import PER_HEAD, PER_KV_HEAD, STREAM, split_axes
from hookedlm.hooks import HookPoint
from hookedlm.layers.attention import Attention
from hookedlm.layers.context import Context
from hookedlm.layers.latent import LatentAttention
from hookedlm.layers.mlp import MLP, GatedMLP
from hookedlm.layers.moe import MoE
from hookedlm.layers.norm import Norm, Same, Times
from hookedlm.layers.opaque import OpaqueAttention, OpaqueMixer, OpaqueMLP, OpaqueNorm
from hookedlm.parts import AtHand
from hookedlm.spec import BlockSpec

Stream = Float[Tensor, "batch pos d_model"]
SAME = Same()


def times(factor: float | Float[Tensor, "d_model"]) -> nn.Module:
    """Multiplication by a constant, or one for each dimension; nothing at all where it is 1."""
    return Same() if isinstance(factor, float) and factor == 1.0 else Times(factor)


@dataclass
class Parts:
    """The finished parts of a block; None where the family has none."""

    attn: Attention | OpaqueAttention | None = None
    mlp: MLP | GatedMLP | MoE | OpaqueMLP | None = None
    ln1: Norm | OpaqueNorm | None = None
    ln2: Norm | OpaqueNorm | None = None
    ln1_post: Norm | None = None
    ln2_post: Norm | None = None
    mixer: OpaqueMixer | None = None
    keep: tuple[Tensor | None, Tensor | None] = (None, None)
    """What multiplies the stream dimension by dimension, where that is more than a number."""

    def kept(self, spec: BlockSpec, branch: int) -> nn.Module:
        """What the stream passes before a branch (0: attention, 1: MLP) is added to it."""
        vector = self.keep[branch]
        return times(spec.keep[branch] if vector is None else vector)


class AttentionBranch(AtHand):
    """Base of blocks with attention: the stream as each head reads it, normed and attended."""

    packs = False
    """Whether positions of many runs may be given as one row (``Context.packed``)."""

    def _build_inputs(self, spec: BlockSpec, parts: Parts) -> None:
        self.spec = spec
        self.hook_resid_pre = HookPoint(STREAM, shares=True)
        self._splits: tuple[HookPoint, ...] = ()
        if isinstance(parts.attn, Attention):
            heads = parts.attn.spec
            if heads.n_heads == heads.n_kv_heads:
                self.hook_attn_in = HookPoint(PER_HEAD, on_demand=True, shares=True)
                self._splits += (self.hook_attn_in,)
            self.hook_q_input = HookPoint(PER_HEAD, on_demand=True, shares=True)
            self._splits += (self.hook_q_input,)
            if heads.reuses_keys is None:
                self.hook_k_input = HookPoint(PER_KV_HEAD, on_demand=True, shares=True)
                self.hook_v_input = HookPoint(PER_KV_HEAD, on_demand=True, shares=True)
                self._splits += (self.hook_k_input, self.hook_v_input)

    def _build_attention(self, spec: BlockSpec, parts: Parts) -> None:
        assert parts.attn is not None
        self.attn = parts.attn
        self.ln1_post: nn.Module = parts.ln1_post or Same()
        self.attn_scale: nn.Module = times(spec.residual_scale)
        self.hook_attn_out = HookPoint(STREAM, shares=parts.ln1_post is not None)
        self.attn_keep: nn.Module = parts.kept(spec, 0)

    def _build_mlp(self, spec: BlockSpec, parts: Parts) -> None:
        assert parts.mlp is not None
        self.mlp = parts.mlp
        self.ln2_post: nn.Module = parts.ln2_post or Same()
        factor = spec.mlp_residual_scale
        self.mlp_scale: nn.Module = times(spec.residual_scale if factor is None else factor)
        self.hook_mlp_out = HookPoint(STREAM, shares=parts.ln2_post is not None)
        self.mlp_keep: nn.Module = parts.kept(spec, 1)

    def ungroup(self, ungrouped: bool) -> None:
        """Whether hooks see one key and one value for every query head."""
        attn = self._modules.get("attn")
        if isinstance(attn, Attention):
            attn.ungroup(ungrouped)
            axes = split_axes(PER_HEAD if attn.ungrouped else PER_KV_HEAD)
            for point in self._splits:
                if point in (self._modules.get("hook_k_input"), self._modules.get("hook_v_input")):
                    point.axes = axes

    def _splits_wanted(self) -> bool:
        return any(point.wanted for point in self._splits)

    def _attention_of(self, resid: Stream, ctx: Context, norm: nn.Module) -> Stream:
        """What attention adds to a stream that it reads through ``norm``."""
        if self._splits_wanted():
            q, k, v, *stream = self._copies(resid, norm)
        else:
            q = k = v = norm(resid)
            stream = []
        attended = self.attn(q, k, v, ctx, *stream)
        return self.hook_attn_out(self.attn_scale(self.ln1_post(attended)))

    def _copies(self, resid: Stream, norm: nn.Module) -> list[Tensor]:
        """Normed copies of the stream, one for every head to read, for q, k and v; behind them, for
        latent attention, the stream itself."""
        assert isinstance(self.attn, Attention)  # only uniform attention has split inputs
        spec = self.attn.spec
        per_head = resid.unsqueeze(2).expand(-1, -1, spec.n_heads, -1)
        per_kv_head = resid.unsqueeze(2).expand(-1, -1, self.attn.n_key_heads, -1)
        if spec.n_heads == spec.n_kv_heads:
            per_head = per_kv_head = self.hook_attn_in(per_head)
        copies = [self.hook_q_input(per_head)]
        if spec.reuses_keys is None:
            copies += [self.hook_k_input(per_kv_head), self.hook_v_input(per_kv_head)]
        else:  # its keys and values are not read from the stream
            copies += copies * 2
        if isinstance(self.attn, LatentAttention):
            copies.append(resid.unsqueeze(2))
        return norm.of_copies(resid, copies) if isinstance(norm, Norm) else copies

    def _mlp_of_normed(self, x: Stream) -> Stream:
        return self.hook_mlp_out(self.mlp_scale(self.ln2_post(self.mlp(x))))


class SequentialBlock(AttentionBranch):
    """Attention, then the MLP on the result (arXiv 1706.03762, pre-norm)."""

    packs = True

    def __init__(self, spec: BlockSpec, parts: Parts):
        super().__init__()
        self._build_inputs(spec, parts)
        self.ln1: nn.Module = parts.ln1 or Same()
        self._build_attention(spec, parts)
        self.hook_resid_mid = HookPoint(STREAM, shares=True)
        self.hook_mlp_in = HookPoint(STREAM, on_demand=True, shares=True)
        self.ln2: nn.Module = parts.ln2 or Same()
        self._build_mlp(spec, parts)
        self.post_scale: nn.Module = times(spec.post_scale)
        self.hook_resid_post = HookPoint(STREAM, shares=True)

    def forward(self, resid: Stream, ctx: Context) -> Stream:
        return self.hook_resid_post(self.post_scale(self._behind_mlp(resid, ctx)))

    def _behind_mlp(self, resid: Stream, ctx: Context) -> Stream:
        pre = self.hook_resid_pre(resid)
        attn_out = self._attention_of(pre, ctx, self.ln1)
        mid = self.hook_resid_mid(self.attn_keep(ctx.onward(pre)) + attn_out)
        mlp_out = self._mlp_of_normed(self.ln2(self.hook_mlp_in(mid)))
        return self.mlp_keep(mid) + mlp_out


class AttentionOnlyBlock(AttentionBranch):
    """Attention without an MLP: toy models."""

    packs = True

    def __init__(self, spec: BlockSpec, parts: Parts):
        super().__init__()
        self._build_inputs(spec, parts)
        self.ln1: nn.Module = parts.ln1 or Same()
        self._build_attention(spec, parts)
        self.hook_resid_post = HookPoint(STREAM, shares=True)

    def forward(self, resid: Stream, ctx: Context) -> Stream:
        pre = self.hook_resid_pre(resid)
        attn_out = self._attention_of(pre, ctx, self.ln1)
        return self.hook_resid_post(ctx.onward(pre) + attn_out)


class ParallelBlock(AttentionBranch):
    """Attention and MLP both read the stream that enters (GPT-J, arXiv 2204.02311).

    Where the family has one norm for both, ``ln1`` and ``ln2`` hold the same weights, and the norm
    is computed once unless a hook sits on either.
    """

    packs = True

    def __init__(self, spec: BlockSpec, parts: Parts):
        super().__init__()
        self._build_inputs(spec, parts)
        self.ln1: nn.Module = parts.ln1 or Same()
        self._build_attention(spec, parts)
        self.hook_mlp_in = HookPoint(STREAM, on_demand=True, shares=True)
        self.ln2: nn.Module = parts.ln2 or Same()
        self._build_mlp(spec, parts)
        self.hook_resid_post = HookPoint(STREAM, shares=True)
        self._sum = _branches_first if spec.branches_first else _stream_first

    def forward(self, resid: Stream, ctx: Context) -> Stream:
        pre = self.hook_resid_pre(resid)
        if self.spec.shared_norm and ctx.packed is None and self._norm_once():
            x = self.ln1(pre)
            attn_out, mlp_out = self._attention_of(x, ctx, SAME), self._mlp_of_normed(x)
        else:
            attn_out = self._attention_of(pre, ctx, self.ln1)
            pre = ctx.onward(pre)
            mlp_out = self._mlp_of_normed(self.ln2(self.hook_mlp_in(pre)))
        return self.hook_resid_post(self._sum(pre, attn_out, mlp_out))

    def _norm_once(self) -> bool:
        ln1, ln2 = self.ln1, self.ln2
        if self._splits_wanted() or not (isinstance(ln1, Norm) and isinstance(ln2, Norm)):
            return False
        hooked = (ln1.hook_scale, ln1.hook_normalized, ln2.hook_scale, ln2.hook_normalized)
        if any(point.wanted for point in (*hooked, self.hook_mlp_in)) or ln1.eps != ln2.eps:
            return False
        return all(_pointer(ln1.live(name)) == _pointer(ln2.live(name)) for name in ("w", "b"))


class PostNormBlock(AttentionBranch):
    """The stream itself is normalised after each addition (OPT-350m, the original Transformer):
    ``hook_resid_mid`` and ``hook_resid_post`` are the normalised streams."""

    packs = True

    def __init__(self, spec: BlockSpec, parts: Parts):
        super().__init__()
        self._build_inputs(spec, parts)
        self._build_attention(spec, parts)
        self.ln1: nn.Module = parts.ln1 or Same()
        self.hook_resid_mid = HookPoint(STREAM, shares=True)
        self.hook_mlp_in = HookPoint(STREAM, on_demand=True, shares=True)
        self._build_mlp(spec, parts)
        self.ln2: nn.Module = parts.ln2 or Same()
        self.hook_resid_post = HookPoint(STREAM, shares=True)

    def forward(self, resid: Stream, ctx: Context) -> Stream:
        pre = self.hook_resid_pre(resid)
        attn_out = self._attention_of(pre, ctx, SAME)
        mid = self.hook_resid_mid(self.ln1(ctx.onward(pre) + attn_out))
        mlp_out = self._mlp_of_normed(self.hook_mlp_in(mid))
        return self.hook_resid_post(self.ln2(mid + mlp_out))


class MixerBlock(AtHand):
    """One branch: a norm and a token mixer that is not attention (Mamba)."""

    def __init__(self, spec: BlockSpec, parts: Parts):
        super().__init__()
        assert parts.mixer is not None
        self.spec = spec
        self.hook_resid_pre = HookPoint(STREAM, shares=True)
        self.ln1: nn.Module = parts.ln1 or Same()
        self.mixer = parts.mixer
        self.hook_resid_post = HookPoint(STREAM, shares=True)

    def forward(self, resid: Stream, ctx: Context) -> Stream:
        pre = self.hook_resid_pre(resid)
        return self.hook_resid_post(pre + self.mixer(self.ln1(pre), ctx))


def _branches_first(pre: Tensor, attn_out: Tensor, mlp_out: Tensor) -> Tensor:
    return pre + (attn_out + mlp_out)


def _stream_first(pre: Tensor, attn_out: Tensor, mlp_out: Tensor) -> Tensor:
    return (pre + attn_out) + mlp_out


def _pointer(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()
