"""BERT and its relatives: encoders; the stream is normed after each addition, every position
attends to all."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from hookedlm.families.row import Fact, Place, Row


@dataclass(frozen=True)
class HeadRow:
    """Where a head of two matrices stands, places from the model: ``norm(act(x W + b)) W' + b'``.

    ``act``: a place, or what transformers calls the function. ``unused``: parameters of the head
    that nothing reads, or that are another's by a second name.
    """

    dense: str
    act: Fact
    out: str
    norm: Place = None
    unused: Place = None


@dataclass(frozen=True)
class EncoderRow:
    """Where Hugging Face keeps an encoder's parts: places from its base model (``nsp`` and those of
    ``mlm`` and ``rtd`` from the model), ``block`` from a block.

    A model has those of the heads that its class has: masked language modelling, replaced-token
    detection (ELECTRA's discriminator), next sentence. ``heads`` tells below which modules the
    weights of each stand, which a checkpoint may lack. ``masked_apart``: the class for pre-training
    has no masked-language-model head.
    """

    block: Row
    embed: str = "embeddings.word_embeddings"
    pos_embed: str = "embeddings.position_embeddings"
    token_type_embed: Place = "embeddings.token_type_embeddings"
    embed_norm: str = "embeddings.LayerNorm"
    embed_project: Place = None
    pooler: Place = None
    mlm: HeadRow | None = None
    rtd: HeadRow | None = None
    nsp: Place = None
    heads: dict[str, tuple[str, ...]] = field(default_factory=dict)
    masked_apart: bool = False

    def but(self, **differences: Any) -> EncoderRow:
        """This row with some entries changed."""
        return replace(self, **differences)


_TRANSFORM = "cls.predictions.transform"
BERT = EncoderRow(
    block=Row(
        blocks="encoder.layer",
        layout="post_norm",
        norm="LN",
        ln1="attention.output.LayerNorm",
        ln2="output.LayerNorm",
        attn="attention",
        q="attention.self.query",
        k="attention.self.key",
        v="attention.self.value",
        o="attention.output.dense",
        d_head="attention.self.attention_head_size",
        scale="attention.self.scaling",
        causal=False,
        rotary=None,
        mlp="",
        gate=None,
        up="intermediate.dense",
        down="output.dense",
        act="intermediate.intermediate_act_fn",
    ),
    pooler="pooler.dense",
    mlm=HeadRow(
        dense=f"{_TRANSFORM}.dense",
        act=f"{_TRANSFORM}.transform_act_fn",
        norm=f"{_TRANSFORM}.LayerNorm",
        out="cls.predictions.decoder",
        unused="cls.predictions.bias",
    ),
    nsp="cls.seq_relationship",
    heads={"mlm": ("cls.predictions",), "pooler": ("pooler",), "nsp": ("cls.seq_relationship",)},
)
ROBERTA = BERT.but(
    mlm=HeadRow(
        dense="lm_head.dense",
        act="gelu",
        norm="lm_head.layer_norm",
        out="lm_head.decoder",
        unused="lm_head.bias",
    ),
    nsp=None,
    heads={"mlm": ("lm_head",), "pooler": ("pooler",)},
)
ELECTRA = BERT.but(
    embed_project="embeddings_project",
    pooler=None,
    mlm=HeadRow(
        dense="generator_predictions.dense",
        act="generator_predictions.activation",
        norm="generator_predictions.LayerNorm",
        out="generator_lm_head",
    ),
    rtd=HeadRow(
        dense="discriminator_predictions.dense",
        act="discriminator_predictions.activation",
        out="discriminator_predictions.dense_prediction",
    ),
    nsp=None,
    heads={
        "mlm": ("generator_predictions", "generator_lm_head"),
        "rtd": ("discriminator_predictions",),
    },
    masked_apart=True,
)
DISTILBERT = BERT.but(
    block=BERT.block.but(
        blocks="transformer.layer",
        ln1="sa_layer_norm",
        ln2="output_layer_norm",
        q="attention.q_lin",
        k="attention.k_lin",
        v="attention.v_lin",
        o="attention.out_lin",
        n_heads="attention.n_heads",
        d_head="attention.attention_head_size",
        scale="attention.scaling",
        mlp="ffn",
        up="ffn.lin1",
        down="ffn.lin2",
        act="ffn.activation",
    ),
    token_type_embed=None,
    pooler=None,
    mlm=HeadRow(
        dense="vocab_transform", act=".activation", norm="vocab_layer_norm", out="vocab_projector"
    ),
    nsp=None,
    heads={"mlm": ("vocab_transform", "vocab_layer_norm", "vocab_projector")},
)

ENCODERS: dict[str, EncoderRow] = {
    "bert": BERT,
    "roberta": ROBERTA,
    "camembert": ROBERTA,
    "xlm-roberta": ROBERTA,
    "data2vec-text": ROBERTA,
    "electra": ELECTRA,
    "ernie": BERT,
    "distilbert": DISTILBERT,
}
"""``config.model_type`` -> row."""
