"""Loading speech encoders: a name, a folder, a module or a config becomes layers and a config."""

from __future__ import annotations

from typing import Any

from transformers import (
    AutoFeatureExtractor,
    AutoModel,
    AutoModelForCTC,
    HubertConfig,
    HubertForCTC,
    HubertModel,
)

from hookedlm.config import HookedTransformerConfig
from hookedlm.convert.audio import AudioLayers, convert_audio
from hookedlm.encoders import Door, described, drawn_under
from hookedlm.errors import ConfigError
from hookedlm.families.hubert import AUDIO_ENCODERS
from hookedlm.reach import where_found

UNBOUNDED = 8192
"""``cfg.n_ctx`` where positions come from a convolution, which knows no longest input."""


def load_processor(path: str, local: bool, revision: str | None) -> Any:
    """The feature extractor kept beside a model, or None when there is none to be had."""
    options: dict[str, Any] = {"local_files_only": True} if local else where_found({})
    if revision is not None and not local:
        options["revision"] = revision
    try:
        return AutoFeatureExtractor.from_pretrained(path, **options)
    except (OSError, ValueError, KeyError):
        return None


def _class_for(config: Any) -> Any:
    has_head = any(name.endswith("ForCTC") for name in config.architectures or ())
    return AutoModelForCTC if has_head else AutoModel


def _unused(config: Any, weight: str) -> str | None:
    """What replaces masked frames in training: many checkpoints lack it, and nothing reads it."""
    place = AUDIO_ENCODERS[config.model_type].training
    return place if weight.endswith(place) else None


def describe_audio(model: Any, layers: AudioLayers, name: str) -> HookedTransformerConfig:
    """The classic config of a converted speech encoder; ``d_vocab`` is -1 without a CTC head."""
    return described(
        model,
        layers.blocks,
        model.config.hidden_act,
        name,
        n_ctx=UNBOUNDED,
        d_vocab=-1 if layers.unembed is None else layers.unembed.W_U.shape[1],
        positional_embedding_type="convolution",
    )


DOOR = Door(
    what="encoder of speech",
    kinds=AUDIO_ENCODERS,
    elsewhere="language models load with hookedlm.load",
    auto=_class_for,
    convert=lambda model, without: convert_audio(model),
    describe=describe_audio,
    companion=load_processor,
    part_of=_unused,
)


def fresh_layers(cfg: HookedTransformerConfig) -> AudioLayers:
    """An untrained HuBERT of these sizes behind the base model's convolutions, initialised by
    Hugging Face under ``cfg.seed``; with a CTC head if there is a ``cfg.d_vocab``."""
    if cfg.attention_dir != "bidirectional" or cfg.act_fn is None:
        raise ConfigError(
            "a speech encoder's config needs attention_dir='bidirectional' and an act_fn"
        )
    if cfg.n_heads * cfg.d_head != cfg.d_model:
        raise ConfigError(
            f"{cfg.n_heads} heads of {cfg.d_head}: in a speech encoder they fill "
            f"d_model={cfg.d_model}"
        )
    config = HubertConfig(
        hidden_size=cfg.d_model,
        num_hidden_layers=cfg.n_layers,
        num_attention_heads=cfg.n_heads,
        intermediate_size=cfg.d_mlp,
        hidden_act=cfg.act_fn,
        layer_norm_eps=cfg.eps,
        bos_token_id=None,
        eos_token_id=None,
        **({"vocab_size": cfg.d_vocab} if cfg.d_vocab > 0 else {}),
    )
    if cfg.d_model % config.num_conv_pos_embedding_groups:
        raise ConfigError(
            f"d_model={cfg.d_model}: HuBERT's positional convolution needs a multiple of "
            f"{config.num_conv_pos_embedding_groups}"
        )
    kind = HubertForCTC if cfg.d_vocab > 0 else HubertModel
    with drawn_under(cfg.seed):
        return convert_audio(kind(config))
