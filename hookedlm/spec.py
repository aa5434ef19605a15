"""What a model is made of, decided once: small frozen facts, one `BlockSpec` per layer.

A spec says everything the layers need to know to be built; after building no option is left to
test. Absence is None. Sizes come from the tensors, never from a table.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class NormSpec:
    """LayerNorm (``centres``) or RMSNorm over the last ``dims`` axes' last one.

    ``offset`` is added to the stored weight (Gemma stores w - 1). ``late_cast``: the weight is
    applied in float32, before rounding to the model's dtype. ``native``: torch's own layer_norm.
    """

    kind: Literal["LN", "RMS"]
    eps: float
    offset: float = 0.0
    late_cast: bool = False
    native: bool = True

    @property
    def centres(self) -> bool:
        """Whether the mean is subtracted."""
        return self.kind == "LN"


@dataclass(frozen=True)
class AttentionSpec:
    """One attention layer.

    ``scale`` multiplies q·k; ``scale_query`` applies it to the query before the product (OPT).
    ``rotary_dim`` is None where no rotation happens in this layer. ``window`` is told for the
    reader's sake: masks are prepared outside. ``qkv`` is the order in which a fused projection
    stores q, k and v: as three blocks, group by group (queries, their key, their value), or in so
    many chunks, each with parts in that order ("qvk").
    ``late_qk_norm``: queries and keys are normed behind the rotation. ``value_scale`` multiplies
    values. ``z_norm`` and ``gate``: what stands between the weighted values and ``W_O``.
    ``temperature``: queries are scaled by their position, in a way of this name. ``stores_keys``,
    ``reuses_keys``: under which name this layer's keys and values are left for later layers, or
    those of an earlier one are taken instead of its own. ``scores32``: scores and their softmax in
    float32, whatever the model computes in.
    """

    n_heads: int
    n_kv_heads: int
    d_head: int
    scale: float
    rotary: bool = False
    scale_query: bool = False
    softcap: float | None = None
    clip: float | None = None
    sinks: bool = False
    qk_norm: Literal["head", "full", "module"] | None = None
    qkv: Literal["split", "blocks", "groups"] | tuple[int, str] = "split"
    window: int | None = None
    causal: bool = True
    late_qk_norm: bool = False
    value_scale: float = 1.0
    z_norm: bool = False
    gate: str | None = None
    temperature: str | None = None
    stores_keys: str | None = None
    reuses_keys: str | None = None
    scores32: bool = False

    @property
    def longhand(self) -> bool:
        """Whether no fused kernel can compute this attention."""
        return self.softcap is not None or self.sinks


@dataclass(frozen=True, kw_only=True)
class LatentAttentionSpec(AttentionSpec):
    """Attention through latents. A query or key of ``d_head`` dimensions is ``d_nope`` without
    position and ``d_rotary`` that rotate; ``d_q_latent`` is None where queries have no latent.
    ``sparse``: queries attend to some keys only, which this layer or an earlier one picks.
    """

    d_rotary: int
    d_value: int
    d_kv_latent: int
    d_q_latent: int | None = None
    sparse: bool = False

    @property
    def d_nope(self) -> int:
        """Dimensions of queries and keys that carry no position."""
        return self.d_head - self.d_rotary


@dataclass(frozen=True)
class MLPSpec:
    """A dense MLP: plain, gated, or SoLU with a LayerNorm behind the activation. ``limit``: both
    branches of a gated one are clamped there, and one is added to the linear branch."""

    d_mlp: int
    gated: bool
    act: str
    act_norm: NormSpec | None = None
    limit: float | None = None


@dataclass(frozen=True)
class MoESpec:
    """A mixture of experts; the rule of routing is its router's own.

    ``scale`` multiplies what the picked experts write, ``divisor`` divides that and the shared
    experts. ``d_shared``: neurons of the shared experts together. ``weighted_input``: the router's
    weights multiply what experts read, not what they write.
    """

    n_experts: int
    top_k: int
    d_model: int
    d_mlp: int
    act: str = ""
    scale: float = 1.0
    divisor: float = 1.0
    d_shared: int | None = None
    weighted_input: bool = False


@dataclass(frozen=True)
class OpaqueSpec:
    """A part that runs as Hugging Face wrote it, and why."""

    what: str
    reason: str


Layout = Literal["sequential", "parallel", "post_norm", "normed_stream", "mixer"]


@dataclass(frozen=True)
class BlockSpec:
    """One block. A norm that is None does not exist; an `OpaqueSpec` stands for a wrapped part.

    ``layout``: sequential; parallel (attention and MLP read the same stream); post_norm (the stream
    itself is normalised after each addition); normed_stream (before each branch reads it and adds
    to it); mixer (one opaque branch). A ``mixer`` stands in attention's place or beside it.
    ``branches_first``: a parallel block adds its branches to each other before the stream.
    ``residual_scale`` multiplies what attention and MLP add (the MLP's is ``mlp_residual_scale``
    where it differs), ``keep`` the stream that they add it to, ``post_scale`` the stream at the
    end. ``per_layer_input``: a third branch reads what the token says to this layer.
    ``shared_norm``: both branches of a parallel block read the same norm. ``stream32``: a mixer's
    block keeps the stream in float32, whatever its weights are in.
    """

    layout: Layout = "sequential"
    attn: AttentionSpec | OpaqueSpec | None = None
    mlp: MLPSpec | MoESpec | OpaqueSpec | None = None
    mixer: OpaqueSpec | None = None
    ln1: NormSpec | OpaqueSpec | None = None
    ln2: NormSpec | OpaqueSpec | None = None
    ln1_post: NormSpec | None = None
    ln2_post: NormSpec | None = None
    residual_scale: float = 1.0
    mlp_residual_scale: float | None = None
    mixer_scale: float | None = None
    keep: tuple[float, float] = (1.0, 1.0)
    post_scale: float = 1.0
    per_layer_input: bool = False
    branches_first: bool = True
    shared_norm: bool = False
    stream32: bool = False

    def scale_of(self, kind: str) -> float:
        """What multiplies the output of "attn" or "mlp" before it is added."""
        own = self.mlp_residual_scale
        return own if kind == "mlp" and own is not None else self.residual_scale


@dataclass(frozen=True)
class CrossBlockSpec(BlockSpec):
    """A decoder's block that attends to an encoder: ``ln2`` is the norm of that, ``ln3`` the
    MLP's."""

    cross_attn: AttentionSpec | None = None
    ln3: NormSpec | None = None


@dataclass(frozen=True)
class ModelSpec:
    """A whole model: what enters the stream, the blocks, and how logits are read."""

    d_model: int
    d_vocab: int
    blocks: tuple[BlockSpec | OpaqueSpec, ...]
    ln_final: NormSpec | OpaqueSpec | None = None
    positions: Literal["standard", "rotary", "alibi", "none", "shortformer", "opaque"] = "none"
    embed_scale: float | None = None
    embed_norm: NormSpec | None = None
    logit_scale: float = 1.0
    logit_divisor: float = 1.0
    logit_softcap: float | None = None
    notes: tuple[str, ...] = field(default=())
