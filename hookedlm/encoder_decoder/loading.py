"""Loading encoder-decoders: a name, a folder, a module or a config becomes layers and a config."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForSeq2SeqLM, T5Config, T5ForConditionalGeneration
from transformers.activations import ACT2FN

from hookedlm.config import HookedTransformerConfig
from hookedlm.convert.encoder_decoder import EncoderDecoderLayers, convert_encoder_decoder
from hookedlm.errors import ConfigError, LoadError
from hookedlm.families.t5 import ENCODER_DECODERS
from hookedlm.layers.norm import Norm
from hookedlm.layers.relative import RelativeAttention
from hookedlm.loading import default_device, load_tokenizer, resolve, to_dtype
from hookedlm.spec import AttentionSpec, MLPSpec

N_CTX = 512
"""How long T5's texts were in training. Biases by distance set no limit: only texts are cut."""

BUCKETS, MAX_DISTANCE = 32, 128
"""T5's, where a config does not say."""


@dataclass
class LoadedEncoderDecoder:
    """Everything a `HookedEncoderDecoder` is made from."""

    cfg: HookedTransformerConfig
    layers: EncoderDecoderLayers
    tokenizer: Any
    hf_model: nn.Module
    device: torch.device
    dtype: torch.dtype | None
    casts: bool


def load_encoder_decoder(
    name: str,
    hf_model: Any,
    tokenizer: Any,
    dtype: str | torch.dtype | None,
    kwargs: dict[str, Any],
) -> LoadedEncoderDecoder:
    """Find, read and convert; a module given as ``hf_model`` stays as it is.

    Raises LoadError when a name leads nowhere, or weights are missing there.
    """
    wanted = to_dtype(dtype)
    path, local = resolve(name) if hf_model is None else (name, False)
    given = hf_model is not None
    if given and kwargs:
        raise LoadError(f"{', '.join(kwargs)}: only used when a checkpoint is read")
    if not given:
        hf_model = _from_files(path, local, wanted, kwargs)
    layers = convert_encoder_decoder(hf_model)
    if tokenizer is None and not given:
        tokenizer = load_tokenizer(path, local, kwargs.get("revision"))
    cfg = describe_encoder_decoder(hf_model, layers, name.rstrip("/").split("/")[-1])
    if tokenizer is not None:
        cfg.tokenizer_name = tokenizer.name_or_path or None
    device = default_device() if not given else next(hf_model.parameters()).device
    casts = wanted is not None and wanted != cfg.dtype
    return LoadedEncoderDecoder(cfg, layers, tokenizer, hf_model, device, wanted, casts)


def _from_files(
    path: str, local: bool, dtype: torch.dtype | None, kwargs: dict[str, Any]
) -> nn.Module:
    # Transformers keeps some of T5's weights in float32 then: read all so, and cast all at the end.
    first = torch.float32 if dtype == torch.float16 else dtype
    options: dict[str, Any] = {"dtype": "auto" if first is None else first, **kwargs}
    if local:
        options["local_files_only"] = True
    try:
        where = {key: value for key, value in options.items() if key != "dtype"}
        config = AutoConfig.from_pretrained(path, **where)
        if config.model_type not in ENCODER_DECODERS:
            raise LoadError(
                f"{path!r} is a {config.model_type}: encoder-decoders here are "
                f"{', '.join(ENCODER_DECODERS)}; decoders load with "
                "HookedTransformer.from_pretrained, BERT with HookedEncoder.from_pretrained"
            )
        model, report = AutoModelForSeq2SeqLM.from_pretrained(
            path, output_loading_info=True, **options
        )
    except LoadError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        why = " ".join(str(error).split())
        raise LoadError(f"can't read an encoder-decoder from {path!r}: {why}") from error
    if missing := sorted(report["missing_keys"]):
        raise LoadError(f"{path!r} has no {', '.join(missing[:3])}")
    return model.eval()


def describe_encoder_decoder(
    model: Any, layers: EncoderDecoderLayers, name: str
) -> HookedTransformerConfig:
    """The classic config of a converted encoder-decoder, read off its encoder's layers."""
    block, config = layers.encoder.blocks[0], layers.config
    attn, mlp = block.spec.attn, block.spec.mlp
    assert isinstance(attn, AttentionSpec)  # both stacks are uniform, or they were refused
    assert isinstance(mlp, MLPSpec)
    assert isinstance(block.ln1, Norm)
    places = layers.encoder.pos_embed
    relative = block.attn.rel_pos_bias if isinstance(block.attn, RelativeAttention) else None
    d_vocab, d_model = layers.embed.W_E.shape
    return HookedTransformerConfig(
        model_name=name,
        original_architecture=(config.architectures or [type(model).__name__])[0],
        n_layers=len(layers.encoder.blocks),
        d_model=d_model,
        n_ctx=vars(config).get("n_positions", N_CTX) if places is None else len(places.W_pos),
        n_heads=attn.n_heads,
        d_head=attn.d_head,
        d_mlp=mlp.d_mlp,
        gated_mlp=mlp.gated,
        d_vocab=d_vocab,
        d_vocab_out=layers.unembed.W_U.shape[1],
        act_fn=vars(config).get("dense_act_fn") or vars(config)["activation_function"],
        eps=block.ln1.eps,
        normalization_type=block.ln1.spec.kind,
        final_rms=block.ln1.spec.kind == "RMS",
        positional_embedding_type="standard" if places else "relative_positional_bias",
        relative_attention_num_buckets=None if relative is None else relative.weight.shape[0],
        relative_attention_max_distance=None if relative is None else relative.max_distance,
        use_attn_scale=attn.scale != 1.0,
        attn_scale=1.0 / attn.scale,
        decoder_start_token_id=_start(model),
        tie_word_embeddings=layers.unembed.W_U.data_ptr() == layers.embed.W_E.data_ptr(),
        attention_dir="bidirectional",
        dtype=layers.embed.W_E.dtype,
        device=str(layers.embed.W_E.device),
    )


def _start(model: Any) -> int | None:
    found = vars(model.config).get("decoder_start_token_id")
    return model.generation_config.decoder_start_token_id if found is None else found


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
    with torch.random.fork_rng(devices=[], enabled=cfg.seed is not None):
        if cfg.seed is not None:
            torch.manual_seed(cfg.seed)
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
