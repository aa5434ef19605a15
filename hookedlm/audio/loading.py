"""Loading speech encoders: a name, a folder, a module or a config becomes layers and a config."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoFeatureExtractor,
    AutoModel,
    AutoModelForCTC,
    HubertConfig,
    HubertForCTC,
    HubertModel,
)

from hookedlm.config import HookedTransformerConfig
from hookedlm.convert.audio import AudioLayers, convert_audio
from hookedlm.errors import ConfigError, LoadError
from hookedlm.families.hubert import AUDIO_ENCODERS
from hookedlm.loading import default_device, resolve, to_dtype
from hookedlm.spec import AttentionSpec, MLPSpec, NormSpec

UNBOUNDED = 8192
"""``cfg.n_ctx`` where positions come from a convolution, which knows no longest input."""


@dataclass
class LoadedAudio:
    """Everything a `HookedAudioEncoder` is made from."""

    cfg: HookedTransformerConfig
    layers: AudioLayers
    processor: Any
    hf_model: nn.Module
    device: torch.device
    dtype: torch.dtype | None
    casts: bool


def load_audio(
    name: str,
    hf_model: Any,
    processor: Any,
    dtype: str | torch.dtype | None,
    kwargs: dict[str, Any],
) -> LoadedAudio:
    """Find, read and convert; a module given as ``hf_model`` stays as it is.

    Raises LoadError when a name leads nowhere or weights are missing.
    """
    wanted = to_dtype(dtype)
    given = hf_model is not None
    if given and kwargs:
        raise LoadError(f"{', '.join(kwargs)}: only used when a checkpoint is read")
    if not given:
        path, local = resolve(name)
        hf_model = _from_files(path, local, wanted, kwargs)
        if processor is None:
            processor = load_processor(path, local, kwargs.get("revision"))
    layers = convert_audio(hf_model)
    cfg = describe_audio(hf_model, layers, name.rstrip("/").split("/")[-1])
    device = next(hf_model.parameters()).device if given else default_device()
    casts = wanted is not None and wanted != cfg.dtype
    return LoadedAudio(cfg, layers, processor, hf_model, device, wanted, casts)


def _from_files(
    path: str, local: bool, dtype: torch.dtype | None, kwargs: dict[str, Any]
) -> nn.Module:
    options: dict[str, Any] = {"dtype": "auto" if dtype is None else dtype, **kwargs}
    if local:
        options["local_files_only"] = True
    try:
        where = {key: value for key, value in options.items() if key != "dtype"}
        config = AutoConfig.from_pretrained(path, **where)
        if config.model_type not in AUDIO_ENCODERS:
            raise LoadError(
                f"{path!r} is a {config.model_type}: speech encoders here are "
                f"{', '.join(AUDIO_ENCODERS)}; language models load with hookedlm.load"
            )
        has_head = any(name.endswith("ForCTC") for name in config.architectures or ())
        door = AutoModelForCTC if has_head else AutoModel
        model, report = door.from_pretrained(path, output_loading_info=True, **options)
    except LoadError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise LoadError(f"can't read a speech encoder from {path!r}: {error}") from error
    # What replaces masked frames in training: many checkpoints lack it, and nothing here reads it.
    unused = AUDIO_ENCODERS[config.model_type].training
    missing = [key for key in report["missing_keys"] if not key.endswith(unused)]
    if missing:
        raise LoadError(f"{path!r} has no {', '.join(sorted(missing)[:3])}")
    return model.eval()


def load_processor(path: str, local: bool, revision: str | None) -> Any:
    """The feature extractor kept beside a model, or None when there is none to be had."""
    options: dict[str, Any] = {"local_files_only": True} if local else {}
    if revision is not None and not local:
        options["revision"] = revision
    try:
        return AutoFeatureExtractor.from_pretrained(path, **options)
    except (OSError, ValueError, KeyError):
        return None


def describe_audio(model: Any, layers: AudioLayers, name: str) -> HookedTransformerConfig:
    """The classic config of a converted speech encoder; ``d_vocab`` is -1 without a CTC head."""
    block = layers.blocks[0]
    attn, mlp = block.spec.attn, block.spec.mlp
    assert isinstance(attn, AttentionSpec)  # a speech encoder is uniform, or it was refused
    assert isinstance(mlp, MLPSpec)
    ln1 = block.spec.ln1
    assert isinstance(ln1, NormSpec)
    weight = next(block.parameters())
    act = model.config.hidden_act
    return HookedTransformerConfig(
        model_name=name,
        original_architecture=(model.config.architectures or [type(model).__name__])[0],
        n_layers=len(layers.blocks),
        d_model=model.config.hidden_size,
        n_ctx=UNBOUNDED,
        n_heads=attn.n_heads,
        d_head=attn.d_head,
        d_mlp=mlp.d_mlp,
        d_vocab=-1 if layers.unembed is None else layers.unembed.W_U.shape[1],
        act_fn=act if isinstance(act, str) else type(act).__name__,
        eps=ln1.eps,
        normalization_type="LN",
        attention_dir="bidirectional",
        positional_embedding_type="convolution",
        dtype=weight.dtype,
        device=str(weight.device),
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
    with torch.random.fork_rng(devices=[], enabled=cfg.seed is not None):
        if cfg.seed is not None:
            torch.manual_seed(cfg.seed)
        return convert_audio(kind(config))
