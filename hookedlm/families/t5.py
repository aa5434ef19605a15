"""T5 and BART: an encoder, and a decoder whose blocks attend to what it says."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from hookedlm.families.row import Fact, Place, Row


@dataclass(frozen=True)
class StackRow:
    """One of the two stacks: places from the stack, ``block`` and ``cross`` from one of its blocks.

    ``cross`` tells where a decoder block keeps cross-attention, its ``ln1`` being the norm of it;
    the norm of the MLP is ``ln2`` of ``block`` in both stacks. ``positions``: a table of biases by
    distance, in the blocks that have one, and how far it tells distances apart.
    """

    stack: str
    blocks: str
    block: Row
    cross: Row | None = None
    positions: Place = None
    max_distance: Fact = None
    embed: str = "embed_tokens"
    pos_embed: Place = None
    pos_offset: Fact = 0
    embed_norm: Place = None
    ln_final: Place = None


@dataclass(frozen=True)
class EncoderDecoderRow:
    """Where Hugging Face keeps an encoder-decoder's parts: places from the model.

    ``scales_output``: the decoder's output is divided by the root of ``d_model`` before the head.
    """

    encoder: StackRow
    decoder: StackRow
    embed: str
    embed_scale: Fact = None
    unembed: str = "lm_head"
    unembed_bias: Place = None
    scales_output: Fact = False

    def but(self, **differences: Any) -> EncoderDecoderRow:
        """This row with some entries changed."""
        return replace(self, **differences)


_T5_ENCODER_BLOCK = Row(
    ln1="layer.0.layer_norm",
    ln2="layer.1.layer_norm",
    attn="layer.0.SelfAttention",
    q="layer.0.SelfAttention.q",
    k="layer.0.SelfAttention.k",
    v="layer.0.SelfAttention.v",
    o="layer.0.SelfAttention.o",
    d_head="layer.0.SelfAttention.key_value_proj_dim",
    scale="layer.0.SelfAttention.scaling",
    causal=False,
    rotary=None,
    mlp="layer.1.DenseReluDense",
    gate="layer.1.DenseReluDense.wi_0",
    up=("layer.1.DenseReluDense.wi", "layer.1.DenseReluDense.wi_1"),
    down="layer.1.DenseReluDense.wo",
    act="layer.1.DenseReluDense.act",
)
_T5_ENCODER = StackRow(
    stack="encoder",
    blocks="block",
    block=_T5_ENCODER_BLOCK,
    positions="layer.0.SelfAttention.relative_attention_bias",
    max_distance="layer.0.SelfAttention.relative_attention_max_distance",
    ln_final="final_layer_norm",
)
_T5_DECODER = replace(
    _T5_ENCODER,
    stack="decoder",
    block=_T5_ENCODER_BLOCK.but(
        causal=True,
        ln2="layer.2.layer_norm",
        mlp="layer.2.DenseReluDense",
        gate="layer.2.DenseReluDense.wi_0",
        up=("layer.2.DenseReluDense.wi", "layer.2.DenseReluDense.wi_1"),
        down="layer.2.DenseReluDense.wo",
        act="layer.2.DenseReluDense.act",
    ),
    cross=_T5_ENCODER_BLOCK.but(
        ln1="layer.1.layer_norm",
        attn="layer.1.EncDecAttention",
        q="layer.1.EncDecAttention.q",
        k="layer.1.EncDecAttention.k",
        v="layer.1.EncDecAttention.v",
        o="layer.1.EncDecAttention.o",
        d_head="layer.1.EncDecAttention.key_value_proj_dim",
        scale="layer.1.EncDecAttention.scaling",
    ),
)
T5 = EncoderDecoderRow(
    encoder=_T5_ENCODER,
    decoder=_T5_DECODER,
    embed="shared",
    scales_output="config.scale_decoder_outputs",
)

_BART_ENCODER_BLOCK = Row(
    layout="post_norm",
    norm="LN",
    ln1="self_attn_layer_norm",
    ln2="final_layer_norm",
    o="self_attn.out_proj",
    causal=False,
    rotary=None,
    mlp=None,
    gate=None,
    up="fc1",
    down="fc2",
    act="activation_fn",
)
_BART_ENCODER = StackRow(
    stack="model.encoder",
    blocks="layers",
    block=_BART_ENCODER_BLOCK,
    pos_embed="embed_positions",
    pos_offset="embed_positions.offset",
    embed_norm="layernorm_embedding",
)
_BART_DECODER = replace(
    _BART_ENCODER,
    stack="model.decoder",
    block=_BART_ENCODER_BLOCK.but(causal=True),
    cross=_BART_ENCODER_BLOCK.but(
        ln1="encoder_attn_layer_norm",
        attn="encoder_attn",
        q="encoder_attn.q_proj",
        k="encoder_attn.k_proj",
        v="encoder_attn.v_proj",
        o="encoder_attn.out_proj",
        d_head="encoder_attn.head_dim",
        scale="encoder_attn.scaling",
    ),
)
BART = EncoderDecoderRow(
    encoder=_BART_ENCODER,
    decoder=_BART_DECODER,
    embed="model.shared",
    embed_scale="model.shared.embed_scale",
    unembed_bias="final_logits_bias",
)
MBART = BART.but(
    encoder=replace(
        _BART_ENCODER, block=_BART_ENCODER_BLOCK.but(layout="sequential"), ln_final="layer_norm"
    ),
    decoder=replace(
        _BART_DECODER, block=_BART_DECODER.block.but(layout="sequential"), ln_final="layer_norm"
    ),
)

BLENDERBOT = MBART.but(
    encoder=replace(MBART.encoder, pos_offset=0, embed_norm=None),
    decoder=replace(MBART.decoder, pos_offset=0, embed_norm=None),
)
MARIAN = BART.but(
    encoder=replace(_BART_ENCODER, pos_offset=0, embed_norm=None),
    decoder=replace(_BART_DECODER, pos_offset=0, embed_norm=None),
    embed_scale="model.encoder.embed_scale",
)

ENCODER_DECODERS: dict[str, EncoderDecoderRow] = {
    "t5": T5,
    "mt5": T5.but(scales_output=False),
    "umt5": T5.but(scales_output="config.tie_word_embeddings"),
    "bart": BART,
    "mbart": MBART,
    "plbart": BART,
    "mvp": BART.but(embed_scale="model.encoder.embed_scale"),
    "marian": MARIAN,
    "blenderbot": BLENDERBOT,
    "pegasus": BLENDERBOT.but(embed_scale="model.encoder.embed_scale"),
}
"""``config.model_type`` -> row."""
