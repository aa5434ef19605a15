"""`Row`: where Hugging Face keeps each part of a family, and what is odd about it.

A row holds names, never sizes. A *place* is a dotted path, from the block for parts of a block and
from the model for the rest; a tuple of places means the first that exists. A *fact* is a constant,
or, if it is a string with a dot in it, a place whose value is read (``".name"`` on the block or
model itself, ``"config.<key>"`` in the config). A `Choice` picks by a key of the config.
``when`` gives alternatives: the first place that a block has says what differs in it.
A tuple of facts in ``rotary_if`` means any of them. ``more_blocks`` are further lists of blocks, in
the order in which they run: then Hugging Face's own loop runs them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

Place = str | tuple[str, ...] | None


@dataclass(frozen=True)
class Choice:
    """``options[config.<key>]``; options may be choices again."""

    key: str
    options: Mapping[Any, Any]


Fact = bool | float | int | str | tuple[Any, ...] | Choice | None


@dataclass(frozen=True, repr=False)
class Row:
    """The defaults are Llama's; a relative says how it differs (`but`). Prints as its source."""

    # The model
    refused: tuple[Fact, Any, str] | None = None
    """(a fact, its value in models that blocks of ours would compute wrongly, what to do then)."""
    base: str = "model"
    blocks: str = "model.layers"
    more_blocks: tuple[str, ...] = ()
    embed: str = "model.embed_tokens"
    embed_scale: Fact = None
    embed_norm: Place = None
    entry_norm: Place = None
    """A norm inside of block 0, which is the embedding's: found there as ``<embed>.norm``."""
    embed_proj: Place = None
    codebooks: Fact = None
    pos_embed: Place = None
    pos_offset: int = 0
    type_embed: Place = None
    embed_sum_norm: Place = None
    ln_final: Place = "model.norm"
    head_dense: Place = None
    head_act: Fact = None
    head_norm: Place = None
    unembed: str = "lm_head"
    unembed_proj: Place = None
    logit_scale: Fact = None
    logit_divisor: Fact = None
    logit_softcap: Fact = None

    # The block
    layout: Fact = "sequential"
    branches_first: bool = True
    residual_scale: Fact = None
    mlp_residual_scale: Fact = None
    keep_attn: Fact = None
    keep_mlp: Fact = None
    depth_scaled: tuple[str, str] | None = None
    post_scale: Fact = None
    stream32: Fact = False
    ple_gate: Place = None
    ple_proj: Place = None
    ple_norm: Place = None
    ple_act: Place = None
    token_inputs: tuple[tuple[str, str], ...] = ()
    ln1: Place = "input_layernorm"
    ln2: Place = "post_attention_layernorm"
    ln1_post: Place = None
    ln2_post: Place = None
    mixer: Place = None
    mixer_args: Mapping[str, str] = field(default_factory=dict)
    """What the mixer calls an argument -> what the block calls it."""
    mixer_scale: Fact = None
    unused: tuple[str, ...] = ()
    asked: tuple[str, ...] = ()
    loop_stays: Fact = False
    parallel_lists: Mapping[str, str] = field(default_factory=dict)
    two_streams: tuple[str, ...] = ()
    when: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    norm: Fact = "RMS"
    norm_eps: Fact = None
    norm_offset: float = 0.0

    # Attention
    attn: Place = "self_attn"
    q: Place = "self_attn.q_proj"
    k: Place = "self_attn.k_proj"
    v: Place = "self_attn.v_proj"
    qkv: Place = None
    qkv_order: Fact = "blocks"
    o: Place = "self_attn.o_proj"
    o_bias: Place = None
    d_head: Place = ("self_attn.head_dim", "self_attn.head_size")
    n_heads: Place = None
    kv_down: Place = None
    kv_latent_norm: Place = None
    kv_up: Place = None
    q_down: Place = None
    q_latent_norm: Place = None
    selector: Place = None
    selected_before: Place = None
    picks_given: str = "prev_topk_indices"
    q_norm: Place = None
    k_norm: Place = None
    qk_norm: Fact = "head"
    qk_late: Fact = False
    v_norm: Place = None
    value_scale: Fact = None
    z_norm: Place = None
    attn_gate: Place = None
    attn_gate_bias: Place = None
    attn_gate_act: str = "sigmoid"
    temperature: Fact = None
    keys_name: Fact = None
    stores_keys: Fact = False
    reuses_keys: Fact = False
    scale: Fact = "self_attn.scaling"
    key_scale: Fact = None
    attn_in_scale: Fact = None
    scale_query: bool = False
    softcap: Fact = None
    clip: Fact = None
    sinks: Place = None
    scores32: bool = False
    window: Fact = None
    causal: Fact = True

    # Positions
    rotary: Fact = "tables"
    rotary_if: Fact | tuple[Fact, ...] = True
    rotary_tables: Place = None
    rotary_given: str = "position_embeddings"
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
    act_name: str | None = None
    act_in_scale: Fact = None
    swish_beta: Fact = None
    gated_limit: Fact = None
    mlp_norm: Place = None
    router: Place = None
    experts: Place = "mlp.experts"
    expert_form: Mapping[str, bool] | None = None
    expert_matrices: tuple[str, str, str] | None = None
    router_bias: Place = None
    router_batched: bool = False
    router_scores: bool = False
    picks: Place = None
    top_k: Place = ()
    routed_scale: Fact = None
    weighted_input: bool = False
    shared: Place = None
    shared_gate: Place = None
    shared_divisor: Fact = None

    @property
    def assembled(self) -> bool:
        """Whether the blocks are made of parts that the model's loop keeps otherwise."""
        return bool(self.parallel_lists or self.two_streams or self.entry_norm)

    def __repr__(self) -> str:
        usual, said = vars(type(self)()), vars(self)
        said = {f.name: said[f.name] for f in fields(self) if said[f.name] != usual[f.name]}
        return f"Row({', '.join(f'{name}={value!r}' for name, value in said.items())})"

    def but(self, **differences: Any) -> Row:
        """This row with some entries changed."""
        return replace(self, **differences)
