"""Loading encoders: a name, a folder, a module or a config becomes layers, config and tokenizer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, BertConfig, BertForPreTraining

from hookedlm.config import HookedTransformerConfig
from hookedlm.convert.encoder import EncoderLayers, convert_encoder
from hookedlm.errors import ConfigError, LoadError
from hookedlm.families.bert import ENCODERS
from hookedlm.layers.norm import Norm
from hookedlm.loading import default_device, load_tokenizer, resolve, to_dtype
from hookedlm.spec import AttentionSpec, MLPSpec

HEADS = {"mlm": ("cls.predictions.",), "pooler": ("bert.pooler.",), "nsp": ("cls.seq_",)}
"""Where the parameters of each head stand in a checkpoint."""


@dataclass
class LoadedEncoder:
    """Everything a `HookedEncoder` is made from."""

    cfg: HookedTransformerConfig
    layers: EncoderLayers
    tokenizer: Any
    hf_model: nn.Module
    device: torch.device
    dtype: torch.dtype | None
    casts: bool


def load_encoder(
    name: str,
    hf_model: Any,
    tokenizer: Any,
    dtype: str | torch.dtype | None,
    kwargs: dict[str, Any],
) -> LoadedEncoder:
    """Find, read and convert; a module given as ``hf_model`` stays as it is.

    Raises LoadError when a name leads nowhere or the encoder's own weights are missing.
    """
    wanted = to_dtype(dtype)
    without: frozenset[str] = frozenset()
    path, local = resolve(name) if hf_model is None else (name, False)
    given = hf_model is not None
    if given and kwargs:
        raise LoadError(f"{', '.join(kwargs)}: only used when a checkpoint is read")
    if not given:
        hf_model, without = _from_files(path, local, wanted, kwargs)
    layers = convert_encoder(hf_model.eval() if not given else hf_model, without)
    if tokenizer is None and not given:
        tokenizer = load_tokenizer(path, local, kwargs.get("revision"))
    cfg = describe_encoder(hf_model, layers, name.rstrip("/").split("/")[-1])
    device = default_device() if not given else next(hf_model.parameters()).device
    casts = wanted is not None and wanted != cfg.dtype
    return LoadedEncoder(cfg, layers, tokenizer, hf_model, device, wanted, casts)


def _from_files(
    path: str, local: bool, dtype: torch.dtype | None, kwargs: dict[str, Any]
) -> tuple[nn.Module, frozenset[str]]:
    options: dict[str, Any] = {"dtype": "auto" if dtype is None else dtype, **kwargs}
    if local:
        options["local_files_only"] = True
    try:
        where = {key: value for key, value in options.items() if key != "dtype"}
        config = AutoConfig.from_pretrained(path, **where)
        if config.model_type not in ENCODERS:
            raise LoadError(
                f"{path!r} is a {config.model_type}: encoders here are {', '.join(ENCODERS)}; "
                "decoders load with HookedTransformer.from_pretrained"
            )
        model, report = BertForPreTraining.from_pretrained(
            path, output_loading_info=True, **options
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        if isinstance(error, LoadError):
            raise
        raise LoadError(f"can't read an encoder from {path!r}: {error}") from error
    missing = set(report["missing_keys"])
    without = {
        head for head, prefixes in HEADS.items() if any(key.startswith(prefixes) for key in missing)
    }
    left = [key for key in missing if not key.startswith(sum(HEADS.values(), ()))]
    if left:
        raise LoadError(f"{path!r} has no {', '.join(sorted(left)[:3])}")
    return model, frozenset(without)


def describe_encoder(model: Any, layers: EncoderLayers, name: str) -> HookedTransformerConfig:
    """The classic config of a converted encoder, read off its layers."""
    attn, mlp = layers.blocks[0].spec.attn, layers.blocks[0].spec.mlp
    ln1 = layers.blocks[0].ln1
    assert isinstance(ln1, Norm)
    assert isinstance(attn, AttentionSpec)  # an encoder is uniform, or it was refused
    assert isinstance(mlp, MLPSpec)
    d_vocab, d_model = layers.embed.embed.W_E.shape
    act = model.config.hidden_act
    return HookedTransformerConfig(
        model_name=name,
        original_architecture=(model.config.architectures or [type(model).__name__])[0],
        n_layers=len(layers.blocks),
        d_model=d_model,
        n_ctx=layers.embed.pos_embed.W_pos.shape[0],
        n_heads=attn.n_heads,
        d_head=attn.d_head,
        d_mlp=mlp.d_mlp,
        d_vocab=d_vocab,
        act_fn=act if isinstance(act, str) else type(act).__name__,
        eps=ln1.eps,
        normalization_type="LN",
        attention_dir="bidirectional",
        dtype=layers.embed.embed.W_E.dtype,
        device=str(layers.embed.embed.W_E.device),
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
    with torch.random.fork_rng(devices=[], enabled=cfg.seed is not None):
        if cfg.seed is not None:
            torch.manual_seed(cfg.seed)
        return convert_encoder(BertForPreTraining(config).eval())
