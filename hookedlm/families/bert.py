"""BERT: an encoder; the stream is normed after each addition, every position attends to all."""

from __future__ import annotations

from dataclasses import dataclass

from hookedlm.families.row import Row


@dataclass(frozen=True)
class EncoderRow:
    """Where Hugging Face keeps an encoder's parts: places from the model, ``block`` from a block.

    A model has those of the heads that its class has.
    """

    block: Row
    embed: str
    pos_embed: str
    token_type_embed: str
    embed_norm: str
    mlm_dense: str
    mlm_act: str
    mlm_norm: str
    unembed: str
    pooler: str
    nsp: str


BERT = EncoderRow(
    block=Row(
        base="bert",
        blocks="bert.encoder.layer",
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
    embed="bert.embeddings.word_embeddings",
    pos_embed="bert.embeddings.position_embeddings",
    token_type_embed="bert.embeddings.token_type_embeddings",
    embed_norm="bert.embeddings.LayerNorm",
    mlm_dense="cls.predictions.transform.dense",
    mlm_act="cls.predictions.transform.transform_act_fn",
    mlm_norm="cls.predictions.transform.LayerNorm",
    unembed="cls.predictions.decoder",
    pooler="bert.pooler.dense",
    nsp="cls.seq_relationship",
)

ENCODERS: dict[str, EncoderRow] = {"bert": BERT}
"""``config.model_type`` -> row."""
