"""Position-infused attention (Shortformer, arXiv 2012.15832)."""

from __future__ import annotations

from typing import final

from jaxtyping import Float
from torch import Tensor

from hookedlm.layers.attention import Attention
from hookedlm.layers.context import Context


@final
class ShortformerAttention(Attention):
    """Attention whose queries and keys, but not values, read the position embedding besides the
    stream: positions steer where heads look and never enter the stream."""

    def forward(
        self,
        x_q: Float[Tensor, "batch pos *head d_model"],
        x_k: Float[Tensor, "batch pos *kv_head d_model"],
        x_v: Float[Tensor, "batch pos *kv_head d_model"],
        ctx: Context,
    ) -> Float[Tensor, "batch pos d_model"]:
        """As `Attention`; ``ctx.positions`` is added after the norm, to every head's copy alike."""
        assert ctx.positions is not None, "a shortformer layer was given no position embedding"
        places = ctx.positions if x_q.ndim == 3 else ctx.positions.unsqueeze(2)
        return super().forward(x_q + places, x_k + places, x_v, ctx)
