"""BERT's parts: an embedding of three sums, a block that norms the stream after each addition, and
the heads on top (arXiv 1810.04805).

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

from hookedlm.axes import STREAM
from hookedlm.hooks import HookPoint
from hookedlm.layers.block import SAME, AttentionBranch, Parts
from hookedlm.layers.context import Context
from hookedlm.layers.embed import Embed, PosEmbed
from hookedlm.layers.embed import TokenTypeEmbed as TokenTypeEmbed
from hookedlm.layers.norm import Norm
from hookedlm.layers.weights import Weights
from hookedlm.spec import BlockSpec

Stream = Float[Tensor, "batch pos d_model"]


class BertEmbed(nn.Module):
    """Token, position and token-type embedding, summed and normed."""

    def __init__(self, embed: Embed, pos_embed: PosEmbed, types: TokenTypeEmbed, ln: Norm):
        super().__init__()
        self.embed = embed
        self.hook_embed = HookPoint(STREAM, shares=True)
        self.pos_embed = pos_embed
        self.hook_pos_embed = HookPoint(STREAM, shares=True)
        self.token_type_embed = types
        self.hook_token_type_embed = HookPoint(STREAM, shares=True)
        self.ln = ln

    def forward(self, tokens: Int[Tensor, "batch pos"], types: Int[Tensor, "batch pos"]) -> Stream:
        positions = torch.arange(tokens.shape[1], device=tokens.device)[None]
        embedded = self.hook_embed(self.embed(tokens))
        places = self.hook_pos_embed(self.pos_embed.at(positions).expand(embedded.shape))
        of_type = self.hook_token_type_embed(self.token_type_embed(types))
        return self.ln(embedded + of_type + places)


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
        W: Float[Tensor, "d_model d_model"],
        b: Float[Tensor, "d_model"] | None,
        act: Callable[[Tensor], Tensor],
        ln: Norm,
    ):
        super().__init__()
        self.put("W", W, None, "")
        self.put("b", b, (W.shape[1],), "W")
        self.act_fn = act
        self.ln = ln

    def forward(self, resid: Stream) -> Stream:
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
