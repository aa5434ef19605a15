"""Attention in five steps: project in, position, remember, attend, project out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from hookedlm.axes import KEY, PER_HEAD, QUERY, SCORES, VALUE, Z
from hookedlm.hooks import HookPoint
from hookedlm.layers import attention_math as math
from hookedlm.layers.context import Context
from hookedlm.layers.qkv import FusedQKV, from_heads, into_heads, per_head_into_heads
from hookedlm.layers.qkv_steps import Three, late_steps_of, steps_of
from hookedlm.layers.weights import Weights
from hookedlm.spec import AttentionSpec

Rotate = Callable[[Tensor, Tensor, tuple[Tensor, ...]], tuple[Tensor, Tensor]]
"""(q, k ``[batch, head, pos, d_head]``, prepared tables) -> both rotated."""


@dataclass
class AttentionTensors:
    """The weights of one attention layer, as views of whatever holds them."""

    W_Q: Float[Tensor, "head d_model d_head"]
    W_K: Float[Tensor, "kv_head d_model d_head"] | None
    W_V: Float[Tensor, "kv_head d_model d_head"] | None
    W_O: Float[Tensor, "head d_head d_model"]
    b_Q: Float[Tensor, "head d_head"] | None = None
    b_K: Float[Tensor, "kv_head d_head"] | None = None
    b_V: Float[Tensor, "kv_head d_head"] | None = None
    b_O: Float[Tensor, "d_model"] | None = None
    sinks: Float[Tensor, "head"] | None = None
    fused: FusedQKV | None = None


class Attention(Weights):
    """Multi-head attention, grouped queries included (arXiv 1706.03762, 2305.13245).

    The kernel is fused unless this layer's scores or pattern are listened to, or its family needs
    what no kernel has (softcap, sinks).
    """

    def __init__(
        self,
        spec: AttentionSpec,
        tensors: AttentionTensors,
        rotate: Rotate | None = None,
        q_norm: nn.Module | None = None,
        k_norm: nn.Module | None = None,
        v_norm: nn.Module | None = None,
        z_norm: nn.Module | None = None,
        gate: nn.Module | None = None,
    ):
        super().__init__()
        self.spec = spec
        self.rotate = rotate if spec.rotary else None
        self.fused = tensors.fused
        self._always_longhand = spec.longhand
        self._steps, self._late_steps = steps_of(spec, v_norm is not None), late_steps_of(spec)
        self.ungrouped = False
        _, d_value, d_model = tensors.W_O.shape
        for name in ("W_Q", "W_K", "W_V", "W_O"):
            self.put(name, vars(tensors)[name], None, "")
        self.put("b_Q", tensors.b_Q, (spec.n_heads, spec.d_head), "W_Q")
        keys = values = None  # of an earlier layer, if this one has no matrices for them
        if tensors.W_K is not None:
            keys, values = (spec.n_kv_heads, tensors.W_K.shape[2]), (spec.n_kv_heads, d_value)
        self.put("b_K", tensors.b_K, keys, "W_K")
        self.put("b_V", tensors.b_V, values, "W_V")
        self.put("b_O", tensors.b_O, (d_model,), "W_O")
        self.put("sinks", tensors.sinks, None, "")
        if q_norm is not None and k_norm is not None:
            self.q_norm, self.k_norm = q_norm, k_norm
        if v_norm is not None:
            self.v_norm = v_norm
        value, z = (KEY, QUERY) if d_value == spec.d_head else (VALUE, Z)
        self.hook_q, self.hook_k, self.hook_v = HookPoint(QUERY), HookPoint(KEY), HookPoint(value)
        if self.rotate is not None:
            self.hook_rot_q, self.hook_rot_k = HookPoint(QUERY), HookPoint(KEY)
        self.hook_attn_scores = HookPoint(SCORES)
        self.hook_pattern = HookPoint(SCORES)
        self.finishes = z_norm is not None or gate is not None
        if self.finishes:
            self.hook_weighted = HookPoint(z)
            self.z_norm, self.gate = z_norm, gate
        self.hook_z = HookPoint(z)
        self.hook_result = HookPoint(PER_HEAD, on_demand=True)

    def ungroup(self, ungrouped: bool) -> None:
        """Whether hooks see keys and values once for every query head, each to be edited alone."""
        self.ungrouped = ungrouped and self.spec.n_kv_heads < self.spec.n_heads
        heads = "head" if self.ungrouped else "kv_head"
        for point in self._key_points():
            assert point.axes is not None
            point.axes = (*point.axes[:2], heads, *point.axes[3:])

    def _key_points(self) -> list[HookPoint]:
        rotated = [] if self.rotate is None else [self.hook_rot_k]
        return [self.hook_k, self.hook_v, *rotated]

    @property
    def n_key_heads(self) -> int:
        """How many heads keys and values have for hooks: one for every query head if ungrouped."""
        return self.spec.n_heads if self.ungrouped else self.spec.n_kv_heads

    def forward(
        self,
        x_q: Float[Tensor, "batch pos *head d_model"],
        x_k: Float[Tensor, "batch pos *kv_head d_model"],
        x_v: Float[Tensor, "batch pos *kv_head d_model"],
        ctx: Context,
    ) -> Float[Tensor, "batch pos d_model"]:
        """What attention adds to the stream (before a post-norm); inputs are normed streams."""
        return self._attended(*self._project_in(x_q, x_k, x_v), x_q, ctx)

    def _attended(
        self, q: Tensor, k: Tensor, v: Tensor, x_q: Tensor, ctx: Context
    ) -> Float[Tensor, "batch pos d_model"]:
        """What attention adds, from queries, keys and values ``[batch, pos, head, d_head]``."""
        # A key-value cache keeps what hooks may have edited: one kind of heads, listened to or not.
        if self.ungrouped and (
            ctx.remember is not None
            or ctx.packed is not None
            or any(point.wanted for point in self._key_points())
        ):
            k, v = self._per_query_head(k), self._per_query_head(v)
        q, k, v = self.hook_q(q), self.hook_k(k), self.hook_v(v)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if self.rotate is not None:
            assert ctx.rotary is not None, "a rotary layer was given no tables"
            q, k = (x.transpose(1, 2) for x in self.rotate(q, k, ctx.rotary))
            for step in self._late_steps:
                q, k, v = step(self, q, k, v)
            q = self.hook_rot_q(q).transpose(1, 2)
            k = self.hook_rot_k(k).transpose(1, 2)
        if ctx.remember is not None:
            k, v = ctx.remember(k, v)
        if self.spec.stores_keys is not None and ctx.shared_keys is not None:
            ctx.shared_keys[self.spec.stores_keys] = k, v
        packed = ctx.packed
        if packed is None:
            z = self._attend(q, k, v, ctx)
        else:
            z = packed.attend(self._attend, q, k, v, ctx)
        if self.finishes:
            z = self._finished(self.hook_weighted(z), x_q if packed is None else packed.kept(x_q))
        z = self.hook_z(z if packed is None else packed.joined(z))
        if self.hook_result.wanted:
            result = self.hook_result(self.result(z))
            b_O = self._parameters["b_O"]
            out = result.sum(dim=2)
            return out if b_O is None else out + b_O
        return from_heads(z, self._parameters["W_O"], self._parameters["b_O"])

    # Project in -----------------------------------------------------------------------------------

    def _project_in(self, x_q: Tensor, x_k: Tensor, x_v: Tensor) -> Three:
        p = self._parameters
        if x_q.ndim == 4:  # a stream for every head
            q = per_head_into_heads(x_q, self.W_Q, p["b_Q"])
            k = self._keys_from_copies(x_k, self.W_K, p["b_K"])
            v = self._keys_from_copies(x_v, self.W_V, p["b_V"])
        else:
            q, k, v = self._fused_projection(x_q) or (
                into_heads(x_q, self.W_Q, p["b_Q"]),
                into_heads(x_k, self.W_K, p["b_K"]),
                into_heads(x_v, self.W_V, p["b_V"]),
            )
        return self._corrected(q, k, v)

    def _keys_from_copies(self, x: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
        n = x.shape[2]  # more than W has where heads are ungrouped
        b = None if b is None else math.repeat_heads(b, n, dim=0)
        return per_head_into_heads(x, math.repeat_heads(W, n, dim=0), b)

    def _per_query_head(self, x: Tensor) -> Tensor:
        """Keys or values with a head of its own, not a view, for every query head."""
        return x.repeat_interleave(self.spec.n_heads // x.shape[2], dim=2)

    def _fused_projection(self, x: Tensor) -> Three | None:
        if self.fused is None:
            return None
        p = self._parameters
        parts = (p["W_Q"], p["W_K"], p["W_V"])
        biases = (p["b_Q"], p["b_K"], p["b_V"])
        if torch.is_grad_enabled() and any(w.requires_grad for w in parts):
            return None  # the three need gradients of their own
        matrix = self.fused.matrix(parts, biases)
        if matrix is None:
            return None
        spec = self.spec
        y = F.linear(x, *matrix)
        return self.fused.split(y, spec.n_heads, spec.n_kv_heads, spec.d_head)

    def _corrected(self, q: Tensor, k: Tensor, v: Tensor) -> Three:
        for step in self._steps:
            q, k, v = step(self, q, k, v)
        return q, k, v

    def _finished(self, z: Tensor, x: Tensor) -> Float[Tensor, "batch pos head d_head"]:
        """What stands between the weighted values and ``W_O``."""
        if self.z_norm is not None:
            z = self.z_norm(z.flatten(2)).view(z.shape)
        return z if self.gate is None else z * self.gate(x)

    # Attend ---------------------------------------------------------------------------------------

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, ctx: Context
    ) -> Float[Tensor, "batch pos head d_head"]:
        scale = self.spec.scale
        if self.spec.scale_query:
            q, scale = q * scale, 1.0
        if not (self._always_longhand or self.hook_attn_scores.wanted or self.hook_pattern.wanted):
            q = self._tempered(q, ctx)
            return math.fused(q, k, v, ctx.mask, ctx.bias, scale, self.spec.causal)
        allowed = self.allowed(q.shape[2], k.shape[2], ctx, q.device)
        scores = self.hook_attn_scores(self.scores(q, k, scale, allowed, ctx))
        pattern = math.attention_pattern(scores, self.live("sinks")).to(v.dtype)
        return math.weighted_values(self.hook_pattern(pattern), v)

    def allowed(
        self, n_query: int, n_key: int, ctx: Context, device: torch.device
    ) -> Tensor | None:
        """Which keys each query may attend to; None where all are."""
        allowed = ctx.allowed(n_query, n_key)
        if allowed is None and self.spec.causal and n_query > 1:
            return math.causal_mask(n_query, n_key, device)
        return allowed

    def _tempered(self, q: Tensor, ctx: Context) -> Float[Tensor, "batch head pos d_head"]:
        return q if ctx.temperature is None else (q * ctx.temperature).to(q.dtype)

    def scores(
        self, q: Tensor, k: Tensor, scale: float, allowed: Tensor | None, ctx: Context
    ) -> Float[Tensor, "batch head pos key_pos"]:
        """Masked scores of queries and keys ``[batch, head, pos, d_head]``."""
        bias = ctx.bias
        if ctx.mask is not None and ctx.mask.dtype != torch.bool:  # may carry a bias (Falcon)
            additive = ctx.mask[..., -q.shape[2] :, : k.shape[2]]
            bias = additive if bias is None else bias + additive
        q = self._tempered(q, ctx)
        if self.spec.scores32:
            q, k = q.float(), k.float()
        scores = math.attention_scores(q, k, scale, bias, self.spec.softcap)
        return math.masked(scores.to(q.dtype), allowed)

    # Project out ----------------------------------------------------------------------------------

    def result(
        self, z: Float[Tensor, "batch pos head d_head"]
    ) -> Float[Tensor, "batch pos head d_model"]:
        """Each head's contribution to the stream (before a post-norm); ``b_O`` belongs to none."""
        return torch.einsum("bphe,hed->bphd", z, self.W_O)

    def why_not_bilinear(self) -> str:
        """Why ``W_Q``, ``W_K`` and ``W_V`` do not read the normed stream; "" if they do."""
        return ""

    @property
    def QK(self):
        """`FactoredMatrix` ``W_Q W_Kᵀ [head, d_model, d_model]``: what each head compares."""
        from hookedlm.factored_matrix import FactoredMatrix

        W_K = math.repeat_heads(self.W_K, self.spec.n_heads, dim=0)
        return FactoredMatrix(self.W_Q, W_K.transpose(-2, -1))

    @property
    def OV(self):
        """`FactoredMatrix` ``W_V W_O [head, d_model, d_model]``: what each head moves."""
        from hookedlm.factored_matrix import FactoredMatrix

        return FactoredMatrix(math.repeat_heads(self.W_V, self.spec.n_heads, dim=0), self.W_O)

    def extra_repr(self) -> str:
        s = self.spec
        kv = "" if s.n_kv_heads == s.n_heads else f", {s.n_kv_heads} key/value heads"
        return f"{s.n_heads} heads{kv}, d_head={s.d_head}, scale={s.scale:.4g}"
