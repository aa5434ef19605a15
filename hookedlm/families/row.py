"""`Row`: where Hugging Face keeps each part of a family, and what is odd about it.

A row holds names, never sizes. A *place* is a dotted path, from the block for parts of a block and
from the model for the rest; a tuple of places means the first that exists. A *fact* is a constant,
or, if it is a string with a dot in it, a place whose value is read (``".name"`` on the block or
model itself, ``"config.<key>"`` in the config). A `Choice` picks by a key of the config.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

Place = str | tuple[str, ...] | None


@dataclass(frozen=True)
class Choice:
    """``options[config.<key>]``; options may be choices again."""

    key: str
    options: Mapping[Any, Any]


Fact = bool | float | int | str | Choice | None


@dataclass(frozen=True)
class Row:
    """The defaults are Llama's; a relative says how it differs (`but`)."""

    # The model
    base: str = "model"
    blocks: str = "model.layers"
    embed: str = "model.embed_tokens"
    embed_scale: Fact = None
    embed_norm: Place = None
    embed_proj: Place = None
    pos_embed: Place = None
    pos_offset: int = 0
    ln_final: Place = "model.norm"
    unembed: str = "lm_head"
    unembed_proj: Place = None
    logit_scale: Fact = None
    logit_divisor: Fact = None
    logit_softcap: Fact = None

    # The block
    layout: Fact = "sequential"
    branches_first: bool = True
    residual_scale: Fact = None
    ln1: Place = "input_layernorm"
    ln2: Place = "post_attention_layernorm"
    ln1_post: Place = None
    ln2_post: Place = None
    mixer: Place = None
    norm: str = "RMS"
    norm_eps: Fact = None
    norm_offset: float = 0.0
    norm_late_cast: bool = False

    # Attention
    attn: Place = "self_attn"
    q: Place = "self_attn.q_proj"
    k: Place = "self_attn.k_proj"
    v: Place = "self_attn.v_proj"
    qkv: Place = None
    qkv_order: Fact = "blocks"
    o: Place = "self_attn.o_proj"
    d_head: Place = ("self_attn.head_dim", "self_attn.head_size")
    q_norm: Place = None
    k_norm: Place = None
    qk_norm: Fact = "head"
    scale: Fact = "self_attn.scaling"
    scale_query: bool = False
    softcap: Fact = None
    clip: Fact = None
    sinks: Place = None
    window: Fact = None
    causal: Fact = True

    # Positions
    rotary: Fact = "tables"
    rotary_if: Fact = True
    bias: Fact = None
    mask_hides: bool = False
    mask_table: Place = None

    # MLP
    mlp: Place = "mlp"
    gate: Place = "mlp.gate_proj"
    up: Place = "mlp.up_proj"
    gate_up: Place = None
    down: Place = "mlp.down_proj"
    act: Place = "mlp.act_fn"
    router: Place = None
    experts: Place = "mlp.experts"
    router_bias: Place = None
    router_batched: bool = False
    picks: Place = None
    top_k: Place = ()
    routed_scale: Fact = None
    weighted_input: bool = False
    shared: Place = None
    shared_gate: Place = None
    shared_divisor: Fact = None

    def but(self, **differences: Any) -> Row:
        """This row with some entries changed."""
        return replace(self, **differences)
