"""Attention whose keys and values are those of an earlier layer (arXiv 2405.12981)."""

from __future__ import annotations

from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from hookedlm.errors import InputError, WeightError
from hookedlm.hooks import HookPoint
from hookedlm.layers.attention import Attention, AttentionTensors, Rotate
from hookedlm.layers.context import Context
from hookedlm.layers.norm import Same
from hookedlm.layers.qkv import from_heads, into_heads, per_head_into_heads
from hookedlm.spec import AttentionSpec


class ReusingAttention(Attention):
    """Queries of its own, keys and values as an earlier layer left them: rotated, cached ones
    included. ``hook_rot_k`` and ``hook_v`` see them as this layer does, once more, and an edit
    counts in this layer only; there is no ``hook_k``."""

    def __init__(
        self,
        spec: AttentionSpec,
        tensors: AttentionTensors,
        rotate: Rotate | None = None,
        q_norm: nn.Module | None = None,
        *others: Any,
    ):
        super().__init__(spec, tensors, rotate)
        self.q_norm: nn.Module = Same() if q_norm is None else q_norm
        del self.hook_k

    def _key_points(self) -> list[HookPoint]:
        return [self.hook_v] if self.rotate is None else [self.hook_v, self.hook_rot_k]

    def forward(
        self,
        x_q: Float[Tensor, "batch pos *head d_model"],
        x_k: Float[Tensor, "batch pos *kv_head d_model"],
        x_v: Float[Tensor, "batch pos *kv_head d_model"],
        ctx: Context,
    ) -> Float[Tensor, "batch pos d_model"]:
        """What attention adds; ``x_k`` and ``x_v`` are not read."""
        project = per_head_into_heads if x_q.ndim == 4 else into_heads
        q = project(x_q, self.W_Q, self._parameters["b_Q"])
        q = self.hook_q(self.q_norm(q))
        k, v = (x.transpose(1, 2) for x in self._found(ctx))
        if self.ungrouped and any(point.wanted for point in self._key_points()):
            k, v = self._per_query_head(k), self._per_query_head(v)
        if self.rotate is not None:
            assert ctx.rotary is not None, "a rotary layer was given no tables"
            turned, _ = self.rotate(q.transpose(1, 2), q.transpose(1, 2), ctx.rotary)
            q, k = self.hook_rot_q(turned.transpose(1, 2)), self.hook_rot_k(k)
        v = self.hook_v(v)
        z = self._attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), ctx)
        z = self.hook_z(z)
        b_O = self._parameters["b_O"]
        if self.hook_result.wanted:
            out = self.hook_result(self.result(z)).sum(dim=2)
            return out if b_O is None else out + b_O
        return from_heads(z, self._parameters["W_O"], b_O)

    def _found(self, ctx: Context) -> tuple[Tensor, Tensor]:
        name = self.spec.reuses_keys
        if ctx.shared_keys is None or name not in ctx.shared_keys:
            raise InputError(
                f"this layer reads keys and values that an earlier {name} layer leaves in the same "
                "pass: start before that layer"
            )
        return ctx.shared_keys[name]

    def why_not_bilinear(self) -> str:
        """Why there is no ``W_K`` and ``W_V``."""
        return "this layer takes keys and values from an earlier one"

    @property
    def QK(self):
        """Refused with a WeightError: the other side of the comparison is another layer's."""
        raise WeightError(f"no QK circuit: {self.why_not_bilinear()}")

    @property
    def OV(self):
        """Refused with a WeightError: what is moved is read by another layer."""
        raise WeightError(f"no OV circuit: {self.why_not_bilinear()}")
