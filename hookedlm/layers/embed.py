"""What enters the stream, and how logits are read from it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from hookedlm.layers.norm import Norm, Same
from hookedlm.layers.weights import Weights


class Embed(Weights):
    """Token embedding: rows of ``W_E [d_vocab, d_model]``, scaled and normed as the family does.

    A family with narrow embeddings (OPT) projects them with ``W_proj`` into the stream.
    """

    def __init__(
        self,
        W_E: Float[Tensor, "d_vocab d_embed"],
        scale: float | Tensor | None = None,
        W_proj: Float[Tensor, "d_embed d_model"] | None = None,
        ln: Norm | None = None,
    ):
        super().__init__()
        self.table_scales = False
        self.put("W_E", W_E, None, "")
        self.put("W_proj", W_proj, None, "")
        if isinstance(scale, Tensor):  # rounded to the model's dtype, as Gemma does
            self.register_buffer("scale", scale.detach().clone(), persistent=False)
        else:
            self.scale = scale
        self.ln: nn.Module = Same() if ln is None else ln

    def forward(self, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos d_model"]:
        return self.of_rows(F.embedding(tokens, self.W_E))

    def of_rows(self, x: Float[Tensor, "batch pos d_embed"]) -> Float[Tensor, "batch pos d_model"]:
        """What enters the stream for rows of ``W_E``, or for vectors in their place."""
        W_proj = self._parameters["W_proj"]
        if W_proj is not None:
            x = F.linear(x, W_proj.t())
        return self.ln(self._scaled(x))

    def words(self, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos d_embed"]:
        """What Hugging Face's table of embeddings gives: rows, scaled if that scales them."""
        x = F.embedding(tokens, self.W_E)
        return self._scaled(x) if self.table_scales else x

    def finished(self, x: Float[Tensor, "batch pos d_embed"]) -> Float[Tensor, "batch pos d_model"]:
        """The stream of embeddings that are scaled already."""
        W_proj = self._parameters["W_proj"]
        return self.ln(x if W_proj is None else F.linear(x, W_proj.t()))

    def _scaled(self, x: Tensor) -> Tensor:
        if self.scale is None:
            return x
        return x * (self.scale.to(x.dtype) if isinstance(self.scale, Tensor) else self.scale)


class PosEmbed(Weights):
    """Position embedding, learned or sinusoidal: rows of ``W_pos [n_ctx, d_model]``.

    ``skips_padding``: positions count real tokens only; some families number padding too (BART).
    """

    def __init__(self, W_pos: Float[Tensor, "n_ctx d_model"], skips_padding: bool = True):
        super().__init__()
        self.skips_padding = skips_padding
        self.put("W_pos", W_pos, None, "")

    def forward(
        self,
        tokens: Int[Tensor, "batch pos"],
        past_kv_pos_offset: int = 0,
        attention_mask: Int[Tensor, "batch all_pos"] | None = None,
    ) -> Float[Tensor, "batch pos d_model"]:
        """What is added to the embedding of ``tokens``, whatever they are, the first of them at
        position ``past_kv_pos_offset``. Positions count what ``attention_mask`` says is real."""
        n = tokens.shape[-1]
        if attention_mask is None or not self.skips_padding:
            positions = torch.arange(n, device=tokens.device) + past_kv_pos_offset
        else:
            positions = (attention_mask.long().cumsum(-1) - 1)[..., -n:]
        return self.at(positions.expand(tokens.shape))

    def at(self, positions: Int[Tensor, "*batch pos"]) -> Float[Tensor, "*batch pos d_model"]:
        """The rows of these positions; what stands before the first has the first one's."""
        return F.embedding(positions.clamp(min=0), self.W_pos)

    def between(self, first: int, end: int) -> Float[Tensor, "pos d_model"]:
        """The rows of the positions ``first`` to ``end - 1``: a view, to be read."""
        return self.W_pos[first:end]

    def numbered(self, positions: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos d_model"]:
        """The rows of positions that count real tokens, or of all from 0 if padding counts too."""
        if not self.skips_padding:
            positions = torch.arange(positions.shape[-1], device=positions.device)
        return self.at(positions)


class TokenTypeEmbed(Weights):
    """Which of two sentences a token belongs to: rows of ``W_token_type [2, d_model]``."""

    def __init__(self, W_token_type: Float[Tensor, "type d_model"]):
        super().__init__()
        self.put("W_token_type", W_token_type, None, "")

    def forward(self, types: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos d_model"]:
        return F.embedding(types, self.W_token_type)


@dataclass
class Entrance:
    """All that makes the stream entering block 0: embeddings, summed, and a norm of the sum."""

    embed: Embed | None
    pos_embed: PosEmbed | None = None
    type_embed: TokenTypeEmbed | None = None
    embed_ln: Norm | None = None

    def __call__(
        self, tokens: Int[Tensor, "batch pos"], positions: Int[Tensor, "batch pos"]
    ) -> Float[Tensor, "batch pos d_model"]:
        """The stream, every token of type 0."""
        assert self.embed is not None
        stream = self.embed(tokens)
        if self.type_embed is not None:
            stream = stream + self.type_embed(torch.zeros_like(tokens))
        if self.pos_embed is not None:
            stream = stream + self.pos_embed.numbered(positions)
        return stream if self.embed_ln is None else self.embed_ln(stream)


class Unembed(Weights):
    """Logits: ``x W_U + b_U``, then, in float32 if it ``upcasts``, the family's scale and cap."""

    def __init__(
        self,
        W_U: Float[Tensor, "d_embed d_vocab"],
        b_U: Float[Tensor, "d_vocab"] | None = None,
        W_proj: Float[Tensor, "d_model d_embed"] | None = None,
        scale: float = 1.0,
        divisor: float = 1.0,
        softcap: float | None = None,
        upcasts: bool = False,
    ):
        super().__init__()
        self.put("W_proj", W_proj, None, "")
        self.put("W_U", W_U, None, "")
        self.put("b_U", b_U, (W_U.shape[1],), "W_U")
        self.scale, self.divisor, self.softcap = scale, divisor, softcap
        self.upcasts = upcasts

    def forward(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_vocab"]:
        return self._finished(F.linear(self._inside(x), self.W_U.t(), self._parameters["b_U"]))

    def of_tokens(
        self, x: Float[Tensor, "*rows batch d_model"], tokens: Int[Tensor, "batch n"]
    ) -> Float[Tensor, "*rows batch n"]:
        """The logits of some tokens, each example's own."""
        b_U = self._parameters["b_U"]
        logits = torch.einsum("...bd,bnd->...bn", self._inside(x), self.W_U.t()[tokens])
        return self._finished(logits if b_U is None else logits + b_U[tokens])

    def _inside(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_embed"]:
        W_proj = self._parameters["W_proj"]
        if x.dtype != self.W_U.dtype:  # a stream that is kept in float32
            x = x.to(self.W_U.dtype)
        return x if W_proj is None else F.linear(x, W_proj.t())

    def _finished(self, logits: Float[Tensor, "*any"]) -> Float[Tensor, "*any"]:
        if self.upcasts:
            logits = logits.float()
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.divisor != 1.0:
            logits = logits / self.divisor
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        return logits

    @property
    def scaled(self) -> bool:
        """Whether anything but the matrix and its bias makes the logits."""
        return self.scale != self.divisor or self.softcap is not None

    @property
    def directions(self) -> Float[Tensor, "d_model d_vocab"]:
        """The matrix from the normed stream to logits before the softcap, scale included."""
        W_proj = self._parameters["W_proj"]
        W = self.W_U if W_proj is None else W_proj @ self.W_U
        factor = self.scale / self.divisor
        return W if factor == 1.0 else W * factor

    def extra_repr(self) -> str:
        parts = [f"scale={self.scale / self.divisor:g}"] if self.scale != self.divisor else []
        return ", ".join(parts + ([f"softcap={self.softcap:g}"] if self.softcap else []))
