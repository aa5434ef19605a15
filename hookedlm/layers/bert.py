"""BERT's parts: an embedding of three sums, a block that norms the stream after each addition, and
the heads on top (arXiv 1810.04805); RoBERTa's positions (1907.11692), ELECTRA's projection and
discriminator (2003.10555).

::

    pre ─┬─ attn ─▶ + ─ mid ─ ln1 ─┬─ mlp ─▶ + ─ post ─ ln2 ─▶ normalized_resid_post
         └──────────┘              └─────────┘
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from hookedlm.axes import EMBEDDED, STREAM, split_axes
from hookedlm.hooks import HookPoint
from hookedlm.layers.block import SAME, AttentionBranch, Parts
from hookedlm.layers.context import Context
from hookedlm.layers.embed import Embed, PosEmbed
from hookedlm.layers.embed import TokenTypeEmbed as TokenTypeEmbed
from hookedlm.layers.norm import Norm
from hookedlm.layers.weights import Weights
from hookedlm.spec import BlockSpec

Stream = Float[Tensor, "batch pos d_model"]


class CountedPosEmbed(PosEmbed):
    """Position embedding whose positions count the tokens that are not ``padding``, from 0 on.

    Padding has a row of its own, ``W_padding``, wherever it stands.
    """

    def __init__(
        self,
        W_pos: Float[Tensor, "n_ctx d_model"],
        padding: int,
        W_padding: Float[Tensor, "1 d_model"],
    ):
        super().__init__(W_pos)
        self.padding = padding
        self.put("W_padding", W_padding, None, "")

    def forward(
        self,
        tokens: Int[Tensor, "batch pos"],
        past_kv_pos_offset: int = 0,
        attention_mask: Int[Tensor, "batch all_pos"] | None = None,
    ) -> Float[Tensor, "batch pos d_model"]:
        """What is added to the embedding of ``tokens``; the mask has no say in it."""
        real = tokens != self.padding
        positions = real.long().cumsum(-1) - 1 + past_kv_pos_offset
        return torch.where(real[..., None], self.at(positions), self.W_padding)


class Project(Weights):
    """``x W + b``: from embeddings of another width into the stream."""

    def __init__(
        self, W: Float[Tensor, "d_embed d_model"], b: Float[Tensor, "d_model"] | None = None
    ):
        super().__init__()
        self.put("W", W, None, "")
        self.put("b", b, (W.shape[1],), "W")

    def forward(self, x: Float[Tensor, "*batch d_embed"]) -> Float[Tensor, "*batch d_model"]:
        return F.linear(x, self.W.t(), self._parameters["b"])

    def linearised(
        self, x: Float[Tensor, "*batch d_embed"], biased: bool
    ) -> Float[Tensor, "*batch d_model"]:
        """A part of what is projected; the bias belongs to one of them."""
        return self(x) if biased else F.linear(x, self.W.t())


class BertEmbed(nn.Module):
    """Token, position and (where ``types`` is given) token-type embedding, summed and normed, then
    projected into the stream where they are of another width."""

    def __init__(
        self,
        embed: Embed,
        pos_embed: PosEmbed,
        types: TokenTypeEmbed | None,
        ln: Norm,
        project: Project | None = None,
    ):
        super().__init__()
        axes = STREAM if project is None else EMBEDDED
        self.embed = embed
        self.hook_embed = HookPoint(axes, shares=True)
        self.pos_embed = pos_embed
        self.hook_pos_embed = HookPoint(axes, shares=True)
        self.token_type_embed = types
        if types is not None:
            self.hook_token_type_embed = HookPoint(axes, shares=True)
        self.ln = ln
        if project is not None:
            ln.hook_normalized.axes = split_axes(axes)
        self.project = project

    def forward(self, tokens: Int[Tensor, "batch pos"], types: Int[Tensor, "batch pos"]) -> Stream:
        summed = self.hook_embed(self.embed(tokens))
        places = self.hook_pos_embed(self.pos_embed(tokens).expand(summed.shape))
        if self.token_type_embed is not None:
            summed = summed + self.hook_token_type_embed(self.token_type_embed(types))
        normed = self.ln(summed + places)
        return normed if self.project is None else self.project(normed)

    @property
    def n_types(self) -> int:
        """How many token types are told apart."""
        return 1 if self.token_type_embed is None else len(self.token_type_embed.W_token_type)


class BertBlock(AttentionBranch):
    """Attention and MLP, the stream normed after each. ``hook_resid_mid`` and ``hook_resid_post``
    stand before the norms, as in TransformerLens; ``hook_normalized_resid_post`` is what the next
    block reads."""

    def __init__(self, spec: BlockSpec, parts: Parts):
        super().__init__()
        self._build_inputs(spec, parts)
        self._build_attention(spec, parts)
        self.hook_resid_mid = HookPoint(STREAM, shares=True)
        self.hook_mlp_in = HookPoint(STREAM, on_demand=True, shares=True)
        assert parts.ln1 is not None
        assert parts.ln2 is not None
        self.ln1 = parts.ln1
        self._build_mlp(spec, parts)
        self.hook_resid_post = HookPoint(STREAM, shares=True)
        self.ln2 = parts.ln2
        self.hook_normalized_resid_post = HookPoint(STREAM, shares=True)

    def forward(self, resid: Stream, ctx: Context) -> Stream:
        pre = self.hook_resid_pre(resid)
        mid = self.hook_resid_mid(self._attention_of(pre, ctx, SAME) + pre)
        normed = self.ln1(self.hook_mlp_in(mid))
        post = self.hook_resid_post(self._mlp_of_normed(normed) + normed)
        return self.hook_normalized_resid_post(self.ln2(post))


class BertMLMHead(Weights):
    """``ln(act(x W + b))``: what stands between the stream and the unembedding."""

    def __init__(
        self,
        W: Float[Tensor, "d_model d_embed"],
        b: Float[Tensor, "d_embed"] | None,
        act: Callable[[Tensor], Tensor],
        ln: Norm,
    ):
        super().__init__()
        self.put("W", W, None, "")
        self.put("b", b, (W.shape[1],), "W")
        self.act_fn = act
        self.ln = ln
        if W.shape[0] != W.shape[1]:
            ln.hook_normalized.axes = split_axes(EMBEDDED)

    def forward(self, resid: Stream) -> Float[Tensor, "batch pos d_embed"]:
        return self.ln(self.act_fn(F.linear(resid, self.W.t(), self._parameters["b"])))


class BertPooler(Weights):
    """``tanh(x W + b)`` of the first position."""

    def __init__(self, W: Float[Tensor, "d_model d_model"], b: Float[Tensor, "d_model"] | None):
        super().__init__()
        self.put("W", W, None, "")
        self.put("b", b, (W.shape[1],), "W")
        self.hook_pooler_out = HookPoint("batch d_model")

    def forward(self, resid: Stream) -> Float[Tensor, "batch d_model"]:
        first = F.linear(resid[:, 0], self.W.t(), self._parameters["b"])
        return self.hook_pooler_out(torch.tanh(first))


class BertNSPHead(Weights):
    """Whether the second sentence follows the first: logits of yes and no."""

    def __init__(self, W: Float[Tensor, "d_model choice"], b: Float[Tensor, "choice"] | None):
        super().__init__()
        self.put("W", W, None, "")
        self.put("b", b, (W.shape[1],), "W")
        self.hook_nsp_out = HookPoint("batch choice")

    def forward(self, pooled: Float[Tensor, "batch d_model"]) -> Float[Tensor, "batch choice"]:
        return self.hook_nsp_out(F.linear(pooled, self.W.t(), self._parameters["b"]))


class BertRTDHead(Weights):
    """``act(x W + b) w + c``: how likely each token was replaced, as a logit (ELECTRA)."""

    def __init__(
        self,
        W: Float[Tensor, "d_model d_model"],
        b: Float[Tensor, "d_model"] | None,
        act: Callable[[Tensor], Tensor],
        W_out: Float[Tensor, "d_model 1"],
        b_out: Float[Tensor, "1"] | None,
    ):
        super().__init__()
        self.put("W", W, None, "")
        self.put("b", b, (W.shape[1],), "W")
        self.act_fn = act
        self.put("W_out", W_out, None, "")
        self.put("b_out", b_out, (1,), "W_out")
        self.hook_rtd_out = HookPoint("batch pos")

    def forward(self, resid: Stream) -> Float[Tensor, "batch pos"]:
        hidden = self.act_fn(F.linear(resid, self.W.t(), self._parameters["b"]))
        logits = F.linear(hidden, self.W_out.t(), self._parameters["b_out"])
        return self.hook_rtd_out(logits.squeeze(-1))
