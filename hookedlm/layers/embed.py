"""What enters the stream, and how logits are read from it."""

from __future__ import annotations

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
        self.put("W_E", W_E, None, "")
        self.put("W_proj", W_proj, None, "")
        if isinstance(scale, Tensor):  # rounded to the model's dtype, as Gemma does
            self.register_buffer("scale", scale.detach().clone(), persistent=False)
        else:
            self.scale = scale
        self.ln: nn.Module = Same() if ln is None else ln

    def forward(self, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos d_model"]:
        x = F.embedding(tokens, self.W_E)
        W_proj = self._parameters["W_proj"]
        if W_proj is not None:
            x = F.linear(x, W_proj.t())
        if self.scale is not None:
            x = x * (self.scale.to(x.dtype) if isinstance(self.scale, Tensor) else self.scale)
        return self.ln(x)


class PosEmbed(Weights):
    """Learned position embedding: rows of ``W_pos [n_ctx, d_model]``."""

    def __init__(self, W_pos: Float[Tensor, "n_ctx d_model"]):
        super().__init__()
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
        if attention_mask is None:
            positions = torch.arange(n, device=tokens.device) + past_kv_pos_offset
        else:
            positions = (attention_mask.long().cumsum(-1) - 1)[..., -n:]
        return self.at(positions.expand(tokens.shape))

    def at(self, positions: Int[Tensor, "*batch pos"]) -> Float[Tensor, "*batch pos d_model"]:
        """The rows of these positions; what stands before the first has the first one's."""
        return F.embedding(positions.clamp(min=0), self.W_pos)


class Unembed(Weights):
    """Logits: ``x W_U + b_U``, then the family's scale and softcap."""

    def __init__(
        self,
        W_U: Float[Tensor, "d_embed d_vocab"],
        b_U: Float[Tensor, "d_vocab"] | None = None,
        W_proj: Float[Tensor, "d_model d_embed"] | None = None,
        scale: float = 1.0,
        divisor: float = 1.0,
        softcap: float | None = None,
    ):
        super().__init__()
        self.put("W_proj", W_proj, None, "")
        self.put("W_U", W_U, None, "")
        self.put("b_U", b_U, (W_U.shape[1],), "W_U")
        self.scale, self.divisor, self.softcap = scale, divisor, softcap

    def forward(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_vocab"]:
        W_proj = self._parameters["W_proj"]
        if W_proj is not None:
            x = F.linear(x, W_proj.t())
        logits = F.linear(x, self.W_U.t(), self._parameters["b_U"])
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.divisor != 1.0:
            logits = logits / self.divisor
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        return logits

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
