"""Attention from a config."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal, get_args

from jaxtyping import Float, Int
from torch import Tensor

from hookedlm.components.part import Config, Part, Stream, become, checked_layer
from hookedlm.config import HookedTransformerConfig
from hookedlm.errors import ConfigError
from hookedlm.layers import attention
from hookedlm.layers.context import Context
from hookedlm.toy import LayerMaker, ToyPreparer

PerHead = Float[Tensor, "batch pos *head d_model"]
AttnType = Literal["global", "local"]


class AbstractAttention(attention.Attention, metaclass=Part):
    """Attention, its queries grouped or not. It runs alone too: ``attn(x, x, x)``.

    Raises ConfigError for Shortformer attention, which reads more than the stream.
    """

    stands_for = staticmethod(lambda module: isinstance(module, attention.Attention))

    def __init__(self, cfg: Config, attn_type: AttnType = "global", layer_id: int | None = None):
        cfg = HookedTransformerConfig.unwrap(cfg)
        if attn_type not in get_args(AttnType):
            raise ConfigError(f"attn_type={attn_type!r}: expected one of {get_args(AttnType)}")
        if cfg.positional_embedding_type == "shortformer":
            raise ConfigError(
                "a Shortformer attention layer reads position embeddings besides the stream: build "
                "the whole block, TransformerBlock(cfg, block_index)"
            )
        if layer_id is None and cfg.scale_attn_by_inverse_layer_idx:
            raise ConfigError("scale_attn_by_inverse_layer_idx needs to know the layer: layer_id=")
        layer = checked_layer(layer_id or 0, cfg)
        types = [str(attn_type)] * cfg.n_layers
        cfg = replace(cfg, use_local_attn=attn_type == "local", attn_types=types)
        become(self, LayerMaker(cfg).attention(layer), cfg)
        self.layer_id = layer_id
        self.prepare = ToyPreparer(cfg)

    def forward(
        self,
        query_input: PerHead,
        key_input: PerHead,
        value_input: PerHead,
        ctx: Context | None = None,
        *,
        attention_mask: Int[Tensor, "batch pos"] | None = None,
    ) -> Stream:
        """What attention adds to the stream. A model passes ``ctx``; without one this is a pass
        over whole texts, padded as ``attention_mask`` (1 at real positions) says."""
        if ctx is None:
            prepared = self.prepare(embeds=query_input, attention_mask=attention_mask)
            ctx = prepared.contexts[self.layer_id or 0]
        return super().forward(query_input, key_input, value_input, ctx)


class Attention(AbstractAttention):
    """Attention with a key and a value for every query head (arXiv 1706.03762)."""

    stands_for = staticmethod(
        lambda module: (
            isinstance(module, attention.Attention)
            and module.spec.n_kv_heads == module.spec.n_heads
        )
    )

    def __init__(self, cfg: Config, attn_type: AttnType = "global", layer_id: int | None = None):
        cfg = replace(HookedTransformerConfig.unwrap(cfg), n_key_value_heads=None)
        super().__init__(cfg, attn_type, layer_id)


class GroupedQueryAttention(AbstractAttention):
    """Attention with ``cfg.n_key_value_heads`` keys and values (arXiv 2305.13245)."""

    stands_for = staticmethod(
        lambda module: (
            isinstance(module, attention.Attention) and module.spec.n_kv_heads < module.spec.n_heads
        )
    )

    def __init__(self, cfg: Config, attn_type: AttnType = "global", layer_id: int | None = None):
        cfg = HookedTransformerConfig.unwrap(cfg)
        if cfg.n_key_value_heads is None:
            raise ConfigError("n_key_value_heads is missing: how many keys the queries share")
        super().__init__(cfg, attn_type, layer_id)
