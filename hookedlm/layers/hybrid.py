"""Blocks of models that mix tokens in more ways than one: attention here, a recurrence there.

::

    hybrid                                               normed_stream
    pre ─┬─ ln1 ─ mixer ─ (ln1_post) ─▶ + ─ mid          pre ─ ln1 ─┬─ attn or mixer ─▶ + ─ mid
         ├─ ln1 ─ attn (some families) ─┤                           └───────────────────┘
         └──────────────────────────────┘                mid ─ ln2 ─┬─ mlp ─▶ + ─ post
    mid ─┬─ ln2 ─ mlp  ─ ln2_post ─▶ + ─ post                       └────────┘
         └──────────────────────────┘                    mlp
                                                         pre ─┬─ ln2 ─ mlp ─▶ + ─ post
                                                              └───────────────┘
"""

from __future__ import annotations

from itertools import chain

from torch import nn

from hookedlm.axes import STREAM
from hookedlm.hooks import HookPoint
from hookedlm.layers.block import SAME, AttentionBranch, MixerBlock, Parts, Stream, times
from hookedlm.layers.context import Context
from hookedlm.layers.norm import Same
from hookedlm.spec import BlockSpec


class MixingBranch(AttentionBranch):
    """Base of blocks in which a mixer that is not attention stands in attention's place, or beside
    it: ``hook_mixer_out`` is what it adds to the stream."""

    def _build_mixing(self, spec: BlockSpec, parts: Parts) -> None:
        alone = parts.attn is None
        if parts.mixer is not None:
            self.mixer = parts.mixer
            if alone:
                self.ln1_post = parts.ln1_post or Same()
            factor = spec.residual_scale if spec.mixer_scale is None else spec.mixer_scale
            self.mixer_scale: nn.Module = times(factor)
            self.hook_mixer_out = HookPoint(STREAM, shares=True)
            self.mixer_keep: nn.Module = parts.kept(spec, 0) if alone else Same()
        if not alone:
            self._build_attention(spec, parts)

    def _mixed(self, pre: Stream, ctx: Context, norm: nn.Module) -> Stream:
        """The stream with what mixer and attention add to it, which they read through ``norm``."""
        attends, mixes = "attn" in self._modules, "mixer" in self._modules
        if not mixes:
            return self.attn_keep(pre) + self._attention_of(pre, ctx, norm)
        x = norm(pre)
        out = self._mixer_of(x, ctx, SAME if attends else self.ln1_post)
        if not attends:
            return self.mixer_keep(pre) + out
        read = (pre, ctx, norm) if self._splits_wanted() else (x, ctx, SAME)
        return self.attn_keep(pre) + (out + self._attention_of(*read))

    def _mixer_of(self, x: Stream, ctx: Context, post: nn.Module) -> Stream:
        return self.hook_mixer_out(self.mixer_scale(post(self.mixer(x, ctx))))


class HybridBlock(MixingBranch):
    """A mixer (beside it perhaps attention, on the same norm: arXiv 2507.22448), then the MLP."""

    def __init__(self, spec: BlockSpec, parts: Parts):
        super().__init__()
        self._build_inputs(spec, parts)
        self.ln1: nn.Module = parts.ln1 or Same()
        self._build_mixing(spec, parts)
        self.hook_resid_mid = HookPoint(STREAM, shares=True)
        self.hook_mlp_in = HookPoint(STREAM, on_demand=True, shares=True)
        self.ln2: nn.Module = parts.ln2 or Same()
        self._build_mlp(spec, parts)
        self.hook_resid_post = HookPoint(STREAM, shares=True)

    def forward(self, resid: Stream, ctx: Context) -> Stream:
        mid = self.hook_resid_mid(self._mixed(self.hook_resid_pre(resid), ctx, self.ln1))
        mlp_out = self._mlp_of_normed(self.ln2(self.hook_mlp_in(mid)))
        return self.hook_resid_post(self.mlp_keep(mid) + mlp_out)


class NormedStreamBlock(MixingBranch):
    """The stream itself is normalised before each branch reads it and adds to it
    (arXiv 2501.08313)."""

    def __init__(self, spec: BlockSpec, parts: Parts):
        super().__init__()
        self._build_inputs(spec, parts)
        self.ln1: nn.Module = parts.ln1 or Same()
        self._build_mixing(spec, parts)
        self.hook_resid_mid = HookPoint(STREAM, shares=True)
        self.ln2: nn.Module = parts.ln2 or Same()
        self.hook_mlp_in = HookPoint(STREAM, on_demand=True, shares=True)
        self._build_mlp(spec, parts)
        self.hook_resid_post = HookPoint(STREAM, shares=True)

    def forward(self, resid: Stream, ctx: Context) -> Stream:
        pre = self.ln1(self.hook_resid_pre(resid))
        mid = self.ln2(self.hook_resid_mid(self._mixed(pre, ctx, SAME)))
        return self.hook_resid_post(self.mlp_keep(mid) + self._mlp_of_normed(self.hook_mlp_in(mid)))


class MLPBlock(AttentionBranch):
    """One branch: a norm and an MLP."""

    def __init__(self, spec: BlockSpec, parts: Parts):
        super().__init__()
        self._build_inputs(spec, parts)
        self.hook_mlp_in = HookPoint(STREAM, on_demand=True, shares=True)
        self.ln2: nn.Module = parts.ln2 or Same()
        self._build_mlp(spec, parts)
        self.hook_resid_post = HookPoint(STREAM, shares=True)

    def forward(self, resid: Stream, ctx: Context) -> Stream:
        pre = self.hook_resid_pre(resid)
        mlp_out = self._mlp_of_normed(self.ln2(self.hook_mlp_in(pre)))
        return self.hook_resid_post(self.mlp_keep(pre) + mlp_out)


class Float32StreamBlock(MixerBlock):
    """A mixer's block that keeps the stream in float32, whatever its weights are in: its norm reads
    the stream in their dtype (``residual_in_fp32`` in the code of arXiv 2312.00752)."""

    def forward(self, resid: Stream, ctx: Context) -> Stream:
        pre = self.hook_resid_pre(resid)
        dtype = next(chain(self.ln1.parameters(), self.mixer.parameters())).dtype
        return self.hook_resid_post(pre.float() + self.mixer(self.ln1(pre.to(dtype)), ctx))
