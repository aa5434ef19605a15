"""Loading encoder-decoders: a name, a folder, a module or a config becomes layers and a config."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AutoModelForSeq2SeqLM, T5Config, T5ForConditionalGeneration
from transformers.activations import ACT2FN

from hookedlm.config import HookedTransformerConfig
from hookedlm.convert.encoder_decoder import EncoderDecoderLayers, convert_encoder_decoder
from hookedlm.encoders import Door, described, drawn_under
from hookedlm.errors import ConfigError
from hookedlm.families.t5 import ENCODER_DECODERS
from hookedlm.layers.relative import RelativeAttention

N_CTX = 512
"""How long T5's texts were in training. Biases by distance set no limit: only texts are cut."""

BUCKETS, MAX_DISTANCE = 32, 128
"""T5's, where a config does not say."""


def describe_encoder_decoder(
    model: Any, layers: EncoderDecoderLayers, name: str
) -> HookedTransformerConfig:
    """The classic config of a converted encoder-decoder, read off its encoder's layers."""
    block, config = layers.encoder.blocks[0], vars(layers.config)
    places = layers.encoder.pos_embed
    relative = block.attn.rel_pos_bias if isinstance(block.attn, RelativeAttention) else None
    return described(
        model,
        layers.encoder.blocks,
        config.get("dense_act_fn") or config["activation_function"],
        name,
        n_ctx=config.get("n_positions", N_CTX) if places is None else len(places.W_pos),
        d_vocab=layers.embed.W_E.shape[0],
        d_vocab_out=layers.unembed.W_U.shape[1],
        positional_embedding_type="standard" if places else "relative_positional_bias",
        relative_attention_num_buckets=None if relative is None else relative.weight.shape[0],
        relative_attention_max_distance=None if relative is None else relative.max_distance,
        decoder_start_token_id=_start(model),
        tie_word_embeddings=layers.unembed.W_U.data_ptr() == layers.embed.W_E.data_ptr(),
    )


def _start(model: Any) -> int | None:
    found = vars(model.config).get("decoder_start_token_id")
    return model.generation_config.decoder_start_token_id if found is None else found


DOOR = Door(
    what="encoder-decoder",
    kinds=ENCODER_DECODERS,
    elsewhere="decoders load with HookedTransformer.from_pretrained, BERT and its relatives with "
    "HookedEncoder.from_pretrained",
    auto=lambda config: AutoModelForSeq2SeqLM,
    convert=lambda model, without: convert_encoder_decoder(model),
    describe=describe_encoder_decoder,
)


def fresh_layers(cfg: HookedTransformerConfig) -> EncoderDecoderLayers:
    """An untrained T5 of these sizes, initialised by Hugging Face, under ``cfg.seed``.

    Raises ConfigError on fields that no T5 has.
    """
    _check(cfg)
    config = T5Config(
        vocab_size=cfg.d_vocab,
        d_model=cfg.d_model,
        d_kv=cfg.d_head,
        d_ff=cfg.d_mlp,
        num_layers=cfg.n_layers,
        num_heads=cfg.n_heads,
        relative_attention_num_buckets=cfg.relative_attention_num_buckets or BUCKETS,
        relative_attention_max_distance=cfg.relative_attention_max_distance or MAX_DISTANCE,
        layer_norm_epsilon=cfg.eps,
        feed_forward_proj=f"gated-{cfg.act_fn}" if cfg.gated_mlp else cfg.act_fn,
        tie_word_embeddings=cfg.tie_word_embeddings,
        decoder_start_token_id=cfg.decoder_start_token_id,
        n_positions=cfg.n_ctx,
    )
    config.dense_act_fn = cfg.act_fn  # which T5Config makes gelu_new of a gated gelu
    with drawn_under(cfg.seed):
        model = T5ForConditionalGeneration(config).eval()
        if not cfg.tie_word_embeddings:  # T5Config always ties
            head = torch.randn(cfg.d_vocab, cfg.d_model) * cfg.d_model**-0.5
            model.lm_head.weight = nn.Parameter(head)
    return convert_encoder_decoder(model.to(cfg.dtype))


def _check(cfg: HookedTransformerConfig) -> None:
    if cfg.d_vocab <= 0:
        raise ConfigError("d_vocab is missing: give it, or a tokenizer that sets it")
    if cfg.act_fn not in ACT2FN:
        raise ConfigError(f"act_fn={cfg.act_fn!r}: expected one that transformers has, as 'relu'")
    if cfg.n_layers < 1 or cfg.attn_only or cfg.num_experts:
        raise ConfigError("a T5 has 1 layer or more, and a dense MLP in each")
    if cfg.d_vocab_out not in (-1, cfg.d_vocab):
        raise ConfigError(f"d_vocab_out={cfg.d_vocab_out}: T5 answers in its {cfg.d_vocab} tokens")
    n_buckets = cfg.relative_attention_num_buckets or BUCKETS
    max_distance = cfg.relative_attention_max_distance or MAX_DISTANCE
    if n_buckets < 4 or n_buckets % 2 or max_distance <= n_buckets // 2:
        raise ConfigError(
            f"relative_attention_num_buckets={n_buckets}: expected an even number of 4 or more, "
            f"and relative_attention_max_distance={max_distance} to be above half of it"
        )
