"""A converted model in the words of `HookedTransformerConfig`."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from hookedlm.convert import hf
from hookedlm.convert.conversion import Conversion
from hookedlm.convert.text_model import text_config
from hookedlm.layers.attention import Attention
from hookedlm.layers.mlp import MLP, GatedMLP
from hookedlm.layers.moe import MoE
from hookedlm.layers.norm import Norm

ACTIVATIONS = {
    "NewGELUActivation": "gelu_new",
    "GELUActivation": "gelu",
    "GELU": "gelu",
    "FastGELUActivation": "gelu_fast",
    "BloomGelu": "gelu_fast",
    "GELUTanh": "gelu_pytorch_tanh",
    "PytorchGELUTanh": "gelu_pytorch_tanh",
    "SiLUActivation": "silu",
    "SiLU": "silu",
    "Swish": "silu",
    "ReLU": "relu",
}
"""Activation class of transformers or torch -> TransformerLens' name."""


def config_fields(conversion: Conversion, name: str) -> dict[str, Any]:
    """The config fields a converted model has; what no field can say is left at its default."""
    config = text_config(conversion.own)
    fields: dict[str, Any] = {
        "model_name": name,
        "n_layers": len(conversion.blocks),
        "d_model": _d_model(conversion),
        "d_vocab": _d_vocab(conversion, config),
        "n_ctx": _n_ctx(conversion, config),
        "original_architecture": conversion.fidelity.model_class,
        "tie_word_embeddings": bool(hf.find(config, "tie_word_embeddings")),
        "init_weights": False,
    }
    fields["d_vocab_out"] = fields["d_vocab"]
    if conversion.unembed is not None:
        fields["d_vocab_out"] = int(conversion.unembed.W_U.shape[1])
        fields["output_logits_soft_cap"] = conversion.unembed.softcap or -1.0
    blocks = conversion.blocks
    attention = [m["attn"] for m in map(_modules, blocks) if isinstance(m.get("attn"), Attention)]
    everywhere = len(attention) == len(blocks)
    mlps = [m["mlp"] for m in map(_modules, blocks) if m.get("mlp") is not None]
    fields |= _of_attention(attention, config, everywhere, fields["d_model"])
    fields |= _of_mlps(mlps, config)
    fields |= _of_norms(conversion) | _of_positions(conversion, attention, config)
    fields["parallel_attn_mlp"] = "parallel" in {
        p.form.split(", ")[-1] for p in conversion.fidelity.parts
    }
    return fields


def _modules(block: nn.Module) -> dict[str, Any]:
    return dict(block._modules)


def _d_model(conversion: Conversion) -> int:
    norm = conversion.ln_final
    if isinstance(norm, Norm) and norm.live("w") is not None:
        return int(norm.w.shape[0])
    if conversion.pos_embed is not None:
        return int(conversion.pos_embed.W_pos.shape[1])
    if conversion.width is not None:
        return conversion.width
    return int(text_config(conversion.own).hidden_size)


def _d_vocab(conversion: Conversion, config: Any) -> int:
    if conversion.embed is not None:
        return int(conversion.embed.W_E.shape[0])
    told = hf.find(config, "vocab_size")
    return int(told or hf.rows_of_tokens(conversion.own, conversion.row.embed))


def _n_ctx(conversion: Conversion, config: Any) -> int:
    if conversion.pos_embed is not None:
        return int(conversion.pos_embed.W_pos.shape[0])
    places = ("max_position_embeddings", "max_seq_len", "n_positions", "seq_length")
    n_ctx = int(hf.find(config, places) or 0)
    return n_ctx if n_ctx > 0 else 2048  # some configs say that there is no limit


def _of_attention(
    layers: list[Attention], config: Any, everywhere: bool, d_model: int
) -> dict[str, Any]:
    if not layers:
        heads = int(hf.find(config, ("num_attention_heads",)) or 1)
        width = int(hf.find(config, ("hidden_size",)) or d_model)
        return {"n_heads": heads, "d_head": width // heads}
    spec = layers[0].spec
    windows = [layer.spec.window for layer in layers]
    return {
        "n_heads": spec.n_heads,
        "d_head": spec.d_head,
        "n_key_value_heads": None if spec.n_kv_heads == spec.n_heads else spec.n_kv_heads,
        "attn_scale": 1.0 / spec.scale,
        "use_attn_scale": spec.scale != 1.0,
        "attn_scores_soft_cap": spec.softcap or -1.0,
        "use_qk_norm": spec.qk_norm is not None,
        "use_local_attn": any(windows) and everywhere,
        "window_size": next((window for window in windows if window), None),
        "attn_types": ["local" if w else "global" for w in windows]
        if any(windows) and everywhere
        else None,
        "attention_dir": "causal" if spec.causal else "bidirectional",
    }


def _width_of_mlp(config: Any) -> int | None:
    told = hf.find(config, "intermediate_size")
    return int(told[0] if isinstance(told, (list, tuple)) else told or 0) or None


def _of_mlps(layers: list[nn.Module], config: Any) -> dict[str, Any]:
    dense = [layer for layer in layers if isinstance(layer, (MLP, GatedMLP))]
    moes = [layer for layer in layers if isinstance(layer, MoE)]
    fields: dict[str, Any] = {
        "act_fn": "gelu",
        "d_mlp": _width_of_mlp(config),
    }
    if moes:
        spec = moes[0].spec
        fields |= {"num_experts": spec.n_experts, "experts_per_token": spec.top_k}
        fields |= {
            "gated_mlp": True,
            "d_mlp": spec.d_mlp,
            "act_fn": ACTIVATIONS.get(spec.act, "silu"),
        }
    if dense:
        fields["d_mlp"] = dense[0].spec.d_mlp
        fields["gated_mlp"] = dense[0].spec.gated
        fields["act_fn"] = ACTIVATIONS.get(dense[0].spec.act, "gelu")
    return fields


def _of_norms(conversion: Conversion) -> dict[str, Any]:
    norms = [
        m for block in conversion.blocks for m in _modules(block).values() if isinstance(m, Norm)
    ]
    norms += [conversion.ln_final] if isinstance(conversion.ln_final, Norm) else []
    both = any(
        {"ln1", "ln1_post"} <= {n for n, m in _modules(b).items() if isinstance(m, Norm)}
        for b in conversion.blocks
    )
    return {
        "normalization_type": norms[0].spec.kind if norms else None,
        "eps": norms[0].eps if norms else 1e-5,
        "use_normalization_before_and_after": both,
        "post_embedding_ln": conversion.row.embed_norm is not None,
    }


def _of_positions(conversion: Conversion, layers: list[Attention], config: Any) -> dict[str, Any]:
    if conversion.pos_embed is not None:
        return {"positional_embedding_type": "standard"}
    if any(layer.spec.rotary for layer in layers):
        parameters = hf.find(config, ("rope_parameters",)) or {}
        base = parameters.get("rope_theta", 10000) if isinstance(parameters, dict) else 10000
        factor = (
            parameters.get("partial_rotary_factor", 1.0) if isinstance(parameters, dict) else 1.0
        )
        told = hf.find(config, ("rotary_dim", "qk_rope_head_dim"))
        width = told or int(layers[0].spec.d_head * factor)
        return {
            "positional_embedding_type": "rotary",
            "rotary_dim": width,
            "rotary_base": int(base),
        }
    if conversion.row.bias is not None or hf.find(config, ("alibi",)):
        return {"positional_embedding_type": "alibi"}
    return {"positional_embedding_type": "none"}


def dtype_of(model: nn.Module) -> torch.dtype:
    """The dtype of a module's floating-point weights."""
    return next(p.dtype for p in model.parameters() if p.is_floating_point())
