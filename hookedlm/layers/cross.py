"""Decoder blocks that read an encoder: between attention and MLP they attend to its output
(arXiv 1706.03762).

::

    pre ─┬─ ln1 ─ attn ─▶ + mid ─┬─ ln2 ─ cross_attn ─▶ + mid_cross ─┬─ ln3 ─ mlp ─▶ + post
         └────────────────┘      └─────────▲────────────┘            └───────────────┘
                                        encoded

    post-norm: the stream itself is normed behind each +
"""

from __future__ import annotations

from dataclasses import dataclass, field

from jaxtyping import Float
from torch import Tensor, nn

from hookedlm.axes import CROSS_KEY, STREAM, split_axes
from hookedlm.hooks import HookPoint
from hookedlm.layers.attention import Attention
from hookedlm.layers.block import SAME, AttentionBranch, Parts
from hookedlm.layers.context import Context
from hookedlm.layers.norm import Norm, Same
from hookedlm.spec import BlockSpec

Stream = Float[Tensor, "batch pos d_model"]
Encoded = Float[Tensor, "batch key_pos d_model"]


@dataclass
class CrossParts(Parts):
    """The finished parts of a block with cross-attention; ``ln2`` is cross-attention's norm."""

    cross_attn: Attention | None = None
    ln3: Norm | None = None


@dataclass(frozen=True)
class CrossContext(Context):
    """A context of self-attention, what the encoder says, and the context of attention to it."""

    encoded: Encoded | None = None
    cross: Context = field(default_factory=Context)


class CrossBranch(AttentionBranch):
    """Base of blocks with cross-attention."""

    def _build_cross_attention(self, parts: CrossParts) -> None:
        assert parts.cross_attn is not None
        self.cross_attn = parts.cross_attn
        for point in (self.cross_attn.hook_k, self.cross_attn.hook_v):
            point.axes = split_axes(CROSS_KEY)
        self.hook_cross_attn_out = HookPoint(STREAM)

    def _cross_attention_of_normed(self, x: Stream, ctx: CrossContext) -> Stream:
        assert ctx.encoded is not None, "a decoder block was given no encoder output"
        attended = self.cross_attn(x, ctx.encoded, ctx.encoded, ctx.cross)
        return self.hook_cross_attn_out(attended)


class CrossBlock(CrossBranch):
    """Attention, cross-attention and MLP, each reading the stream through a norm (T5)."""

    def __init__(self, spec: BlockSpec, parts: CrossParts):
        super().__init__()
        self._build_inputs(spec, parts)
        self.ln1: nn.Module = parts.ln1 or Same()
        self._build_attention(spec, parts)
        self.hook_resid_mid = HookPoint(STREAM, shares=True)
        self.hook_cross_attn_in = HookPoint(STREAM, on_demand=True, shares=True)
        self.ln2: nn.Module = parts.ln2 or Same()
        self._build_cross_attention(parts)
        self.hook_resid_mid_cross = HookPoint(STREAM, shares=True)
        self.hook_mlp_in = HookPoint(STREAM, on_demand=True, shares=True)
        self.ln3: nn.Module = parts.ln3 or Same()
        self._build_mlp(spec, parts)
        self.hook_resid_post = HookPoint(STREAM, shares=True)

    def forward(self, resid: Stream, ctx: CrossContext) -> Stream:
        pre = self.hook_resid_pre(resid)
        mid = self.hook_resid_mid(pre + self._attention_of(pre, ctx, self.ln1))
        x = self.ln2(self.hook_cross_attn_in(mid))
        mid_cross = self.hook_resid_mid_cross(mid + self._cross_attention_of_normed(x, ctx))
        mlp_out = self._mlp_of_normed(self.ln3(self.hook_mlp_in(mid_cross)))
        return self.hook_resid_post(mid_cross + mlp_out)


class PostNormCrossBlock(CrossBranch):
    """The stream itself is normed after each addition (BART): ``hook_resid_mid``,
    ``hook_resid_mid_cross`` and ``hook_resid_post`` are the normed streams."""

    def __init__(self, spec: BlockSpec, parts: CrossParts):
        super().__init__()
        self._build_inputs(spec, parts)
        self._build_attention(spec, parts)
        self.ln1: nn.Module = parts.ln1 or Same()
        self.hook_resid_mid = HookPoint(STREAM, shares=True)
        self.hook_cross_attn_in = HookPoint(STREAM, on_demand=True, shares=True)
        self._build_cross_attention(parts)
        self.ln2: nn.Module = parts.ln2 or Same()
        self.hook_resid_mid_cross = HookPoint(STREAM, shares=True)
        self.hook_mlp_in = HookPoint(STREAM, on_demand=True, shares=True)
        self._build_mlp(spec, parts)
        self.ln3: nn.Module = parts.ln3 or Same()
        self.hook_resid_post = HookPoint(STREAM, shares=True)

    def forward(self, resid: Stream, ctx: CrossContext) -> Stream:
        pre = self.hook_resid_pre(resid)
        mid = self.hook_resid_mid(self.ln1(pre + self._attention_of(pre, ctx, SAME)))
        cross_out = self._cross_attention_of_normed(self.hook_cross_attn_in(mid), ctx)
        mid_cross = self.hook_resid_mid_cross(self.ln2(mid + cross_out))
        mlp_out = self._mlp_of_normed(self.hook_mlp_in(mid_cross))
        return self.hook_resid_post(self.ln3(mid_cross + mlp_out))
