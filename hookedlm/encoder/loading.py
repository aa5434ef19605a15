"""Loading encoders: which class of transformers reads a checkpoint, and what a config becomes."""

from __future__ import annotations

from typing import Any

from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForPreTraining,
    BertConfig,
    BertForPreTraining,
)

from hookedlm.config import HookedTransformerConfig
from hookedlm.convert.encoder import EncoderLayers, convert_encoder
from hookedlm.encoders import Door, described, drawn_under
from hookedlm.errors import ConfigError
from hookedlm.families.bert import ENCODERS


def _class_for(config: Any) -> Any:
    """The class with most of the heads that a checkpoint may have weights of."""
    made_by = (config.architectures or [""])[0]
    if made_by.endswith("Model"):
        return AutoModel
    masked = made_by.endswith("ForMaskedLM") and ENCODERS[config.model_type].masked_apart
    return AutoModelForMaskedLM if masked else AutoModelForPreTraining


def _head_of(config: Any, weight: str) -> str | None:
    """The head that a weight belongs to, in a model with or without heads."""
    for head, places in ENCODERS[config.model_type].heads.items():
        starts = tuple(f"{place}." for place in places)
        if weight.startswith(starts) or weight.partition(".")[2].startswith(starts):
            return head
    return None


def describe_encoder(model: Any, layers: EncoderLayers, name: str) -> HookedTransformerConfig:
    """The classic config of a converted encoder, read off its layers."""
    return described(
        model,
        layers.blocks,
        vars(model.config).get("hidden_act") or vars(model.config)["activation"],
        name,
        n_ctx=layers.embed.pos_embed.W_pos.shape[0],
        d_vocab=layers.embed.embed.W_E.shape[0],
    )


DOOR = Door(
    what="encoder",
    kinds=ENCODERS,
    elsewhere="decoders load with HookedTransformer.from_pretrained",
    auto=_class_for,
    convert=convert_encoder,
    describe=describe_encoder,
    part_of=_head_of,
)


def fresh_layers(cfg: HookedTransformerConfig) -> EncoderLayers:
    """An untrained BERT of these sizes, initialised by Hugging Face, under ``cfg.seed``."""
    if cfg.attention_dir != "bidirectional" or cfg.act_fn is None:
        raise ConfigError("an encoder's config needs attention_dir='bidirectional' and an act_fn")
    config = BertConfig(
        vocab_size=cfg.d_vocab,
        hidden_size=cfg.d_model,
        num_hidden_layers=cfg.n_layers,
        num_attention_heads=cfg.n_heads,
        intermediate_size=cfg.d_mlp,
        hidden_act=cfg.act_fn,
        max_position_embeddings=cfg.n_ctx,
        layer_norm_eps=cfg.eps,
    )
    with drawn_under(cfg.seed):
        return convert_encoder(BertForPreTraining(config).eval())
