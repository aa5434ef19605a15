"""Latent attention: queries, keys and values of all heads come out of low-rank bottlenecks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from hookedlm.axes import LATENT
from hookedlm.errors import InputError, WeightError
from hookedlm.hooks import HookPoint
from hookedlm.layers.attention import Attention, AttentionTensors, Rotate
from hookedlm.layers.context import Context
from hookedlm.layers.norm import Norm, observed
from hookedlm.layers.qkv import into_heads, per_head_into_heads
from hookedlm.layers.qkv_steps import Three
from hookedlm.spec import LatentAttentionSpec


@dataclass(kw_only=True)
class LatentTensors(AttentionTensors):
    """``W_Q`` (where queries have a latent), ``W_K`` and ``W_V`` read latents, not the stream."""

    W_DKV: Float[Tensor, "d_model d_latent_and_rotary"]
    b_DKV: Float[Tensor, "d_latent_and_rotary"] | None = None
    W_DQ: Float[Tensor, "d_model d_latent"] | None = None
    b_DQ: Float[Tensor, "d_latent"] | None = None


class TurnedEnd:
    """A rotation of the dimensions from ``start`` on; those before carry no position."""

    def __init__(self, rotate: Rotate, start: int):
        self.rotate = rotate
        self.start = start

    def __call__(self, q: Tensor, k: Tensor, tables: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        n = self.start
        turned_q, turned_k = self.rotate(q[..., n:], k[..., n:], tables)
        return torch.cat([q[..., :n], turned_q], -1), torch.cat([k[..., :n], turned_k], -1)


class LatentAttention(Attention):
    """Multi-head latent attention (arXiv 2405.04434, section 2.1), with a key and a value for every
    head.

    ``x W_DKV`` is the keys' and values' latent and, behind it, a key shared by all heads that is
    rotated. The latent is normed; ``W_K [head, d_latent, d_nope]`` and ``W_V [head, d_latent,
    d_value]`` read it. Queries come by ``W_Q [head, d_latent, d_head]`` from a latent of their own,
    ``x W_DQ``, or straight from the stream. ``hook_q`` and ``hook_k`` see all that scores are made
    of: ``d_nope`` dimensions without position, then ``d_rotary`` with. A key-value cache keeps
    these, not the latent, as hooks may have edited them.
    """

    spec: LatentAttentionSpec

    def __init__(
        self,
        spec: LatentAttentionSpec,
        tensors: LatentTensors,
        rotate: Rotate | None,
        kv_latent_norm: Norm,
        q_latent_norm: Norm | None = None,
        gate: nn.Module | None = None,
    ):
        turned = None if rotate is None else TurnedEnd(rotate, spec.d_nope)
        super().__init__(spec, tensors, turned, gate=gate)
        self.put("W_DQ", tensors.W_DQ, None, "")
        self.put("b_DQ", tensors.b_DQ, None if tensors.W_DQ is None else (spec.d_q_latent,), "W_DQ")
        self.put("W_DKV", tensors.W_DKV, None, "")
        self.put("b_DKV", tensors.b_DKV, (tensors.W_DKV.shape[1],), "W_DKV")
        later = dict(self._modules)
        self._modules.clear()  # hook points are listed in the order in which they fire
        if q_latent_norm is not None:
            self.q_latent_norm = q_latent_norm
            self.hook_q_latent = HookPoint(LATENT, shares=True)
        self.kv_latent_norm = kv_latent_norm
        self.hook_kv_latent = HookPoint(LATENT, shares=True)
        self._modules.update(later)

    def forward(
        self,
        x_q: Float[Tensor, "batch pos *head d_model"],
        x_k: Float[Tensor, "batch pos *head d_model"],
        x_v: Float[Tensor, "batch pos *head d_model"],
        ctx: Context,
        x: Float[Tensor, "batch pos 1 d_model"] | None = None,
    ) -> Float[Tensor, "batch pos d_model"]:
        """As `Attention`. ``x`` is the normed stream itself where the others are copies of it, one
        for each head: hooks on the latents see those of ``x``, and their edits hold for all heads.
        """
        if x is None:
            qkv, source = self._from_stream(x_q)
        else:
            qkv, source = self._from_copies(x_q, x_k, x_v, x)
        ctx = self._narrowed(ctx, x_q if x is None else x.squeeze(2), source)
        return self._attended(*self._corrected(*qkv), x_q, ctx)

    def _narrowed(self, ctx: Context, x: Tensor, source: Tensor) -> Context:
        """The context of attention to some of the keys; all of them here. ``x`` is the normed
        stream, ``source`` what queries are made from."""
        return ctx

    # From the stream ------------------------------------------------------------------------------

    def _from_stream(self, x: Tensor) -> tuple[Three, Tensor]:
        """(queries, keys and values; what queries are made from)."""
        p = self._parameters
        source = x
        if p["W_DQ"] is not None:
            down = F.linear(x, p["W_DQ"].t(), p["b_DQ"])
            source = self.hook_q_latent(self.q_latent_norm(down))
        q = into_heads(source, self.W_Q, p["b_Q"])
        down, k_rot = self._down(x)
        k, v = self._up(self.hook_kv_latent(self.kv_latent_norm(down)))
        shared = k_rot.unsqueeze(2).expand(-1, -1, self.spec.n_heads, -1)
        return (q, torch.cat([k, shared], dim=-1), v), source

    def _down(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(keys' and values' latent before its norm, the key that all heads share)."""
        both = F.linear(x, self.W_DKV.t(), self._parameters["b_DKV"])
        n = self.spec.d_kv_latent
        return both[..., :n], both[..., n:]

    def _up(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        """Keys without their rotary part, and values: one multiplication while one matrix holds
        both weights and nobody needs their gradients apart."""
        p = self._parameters
        parts, biases = (p["W_K"], p["W_V"]), (p["b_K"], p["b_V"])
        apart = torch.is_grad_enabled() and any(w.requires_grad for w in parts)
        matrix = None if apart or self.fused is None else self.fused.matrix(parts, biases)
        if matrix is None:
            return into_heads(latent, self.W_K, p["b_K"]), into_heads(latent, self.W_V, p["b_V"])
        both = F.linear(latent, *matrix).unflatten(-1, (self.spec.n_heads, -1))
        return both[..., : self.spec.d_nope], both[..., self.spec.d_nope :]

    # From a copy of the stream for every head -----------------------------------------------------

    def _from_copies(
        self, x_q: Tensor, x_k: Tensor, x_v: Tensor, x: Tensor
    ) -> tuple[Three, Tensor]:
        p = self._parameters
        source = x.squeeze(2)
        if p["W_DQ"] is not None:
            downs = [F.linear(y, p["W_DQ"].t(), p["b_DQ"]) for y in (x_q, x)]
            [x_q], source = self._latents(downs, self.q_latent_norm, self.hook_q_latent)
        q = per_head_into_heads(x_q, self.W_Q, p["b_Q"])
        (down_k, k_rot), (down_v, _), (down, _) = (self._down(y) for y in (x_k, x_v, x))
        downs = [down_k, down_v, down]
        copies, _ = self._latents(downs, self.kv_latent_norm, self.hook_kv_latent)
        latent_k, latent_v = copies
        k = per_head_into_heads(latent_k, self.W_K, p["b_K"])
        v = per_head_into_heads(latent_v, self.W_V, p["b_V"])
        return (q, torch.cat([k, k_rot], -1), v), source

    def _latents(
        self, downs: list[Tensor], norm: nn.Module, point: HookPoint
    ) -> tuple[list[Tensor], Tensor]:
        """(each head's latents, normed; the stream's, which hooks see: the last of ``downs``)."""
        assert isinstance(norm, Norm)
        *copies, stream = norm.of_copies(downs[-1].squeeze(2), downs)
        seen, edited = observed(point, stream.squeeze(2))
        heads = [seen.unsqueeze(2).expand_as(copy) for copy in copies] if edited else copies
        return heads, seen

    # Weights --------------------------------------------------------------------------------------

    @property
    def W_K_rotary(self) -> Float[Tensor, "d_model d_rotary"]:
        """From the stream to the rotary key that all heads share: the last columns of ``W_DKV``."""
        return self.W_DKV[:, self.spec.d_kv_latent :]

    def why_not_bilinear(self) -> str:
        """Why ``W_Q``, ``W_K`` and ``W_V`` give no circuits between streams."""
        return (
            "keys and values here are read from a latent of "
            f"{self.spec.d_kv_latent} dimensions behind a norm, not from the stream: see "
            "blocks[l].attn.W_DKV, kv_latent_norm, W_K and W_V"
        )

    @property
    def QK(self):
        """Refused with a WeightError: no matrix compares two streams here."""
        raise WeightError(f"no QK circuit: {self.why_not_bilinear()}")

    @property
    def OV(self):
        """Refused with a WeightError: no matrix takes the stream to what a head writes."""
        raise WeightError(f"no OV circuit: {self.why_not_bilinear()}")

    def extra_repr(self) -> str:
        s = self.spec
        q = "" if s.d_q_latent is None else f", queries through {s.d_q_latent}"
        widths = f"d_head={s.d_nope}+{s.d_rotary}, d_value={s.d_value}"
        return f"{s.n_heads} heads, {widths}, keys and values through {s.d_kv_latent}{q}"


class SparseLatentAttention(LatentAttention):
    """Latent attention of each query to the keys that a selector picks (DeepSeek Sparse Attention,
    arXiv 2512.02556).

    ``select(x, source, ctx)`` gives their positions, from the normed stream and what queries are
    made from. A layer without a selector takes what the last layer with one has picked in the same
    pass. Scores of other keys are -inf.
    """

    def __init__(
        self,
        spec: LatentAttentionSpec,
        tensors: LatentTensors,
        rotate: Rotate | None,
        kv_latent_norm: Norm,
        q_latent_norm: Norm | None = None,
        gate: nn.Module | None = None,
        select: nn.Module | None = None,
    ):
        super().__init__(spec, tensors, rotate, kv_latent_norm, q_latent_norm, gate)
        self.select: Callable[[Tensor, Tensor, Context], Int[Tensor, "batch pos k"]] | None = select

    def _narrowed(self, ctx: Context, x: Tensor, source: Tensor) -> Context:
        handed, mask = ctx.handed, ctx.mask
        assert handed is not None
        assert mask is not None
        if self.select is not None:
            handed["picks"] = self.select(x, source, ctx)
        elif "picks" not in handed:
            raise InputError(
                "this layer attends to keys that an earlier layer picks in the same pass: start "
                "before that layer"
            )
        picks = handed["picks"].long()
        picked = picks.new_zeros((*picks.shape[:2], mask.shape[-1]), dtype=torch.bool)
        picked = picked.scatter(-1, picks, True).unsqueeze(1)
        if mask.dtype == torch.bool:
            return replace(ctx, mask=mask & picked)
        return replace(ctx, mask=mask.masked_fill(~picked, torch.finfo(x.dtype).min))
