"""T5's parts from a config, their weights drawn as Hugging Face draws them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from hookedlm.components.attention import AttnType, PerHead
from hookedlm.components.block import empty, with_layout
from hookedlm.components.part import Config, Part, Stream, become, checked_layer
from hookedlm.config import HookedTransformerConfig
from hookedlm.convert.encoder_decoder import EncoderDecoderLayers
from hookedlm.encoder_decoder.loading import fresh_layers
from hookedlm.errors import ConfigError, InputError
from hookedlm.layers import relative
from hookedlm.layers.block import SequentialBlock
from hookedlm.layers.context import Context
from hookedlm.layers.cross import CrossBlock, CrossContext

Encoded = Float[Tensor, "batch key_pos d_model"]
Bias = Float[Tensor, "#batch head pos key_pos"]


def _layers(cfg: HookedTransformerConfig, n_layers: int) -> EncoderDecoderLayers:
    """A T5 to take parts from, its weights drawn already."""
    return fresh_layers(replace(cfg, n_layers=n_layers, seed=None))


def _bias(attn: Any, x: Tensor, given: Tensor | None) -> Any:
    """The bias of a pass over whole texts: the one given, or the layer's own if it has one."""
    if given is None and attn.has_relative_attention_bias:
        return attn.position_bias(*x.shape[:2])
    return given


class T5Attention(relative.RelativeAttention, metaclass=Part):
    """Attention without a scale, which may learn a bias by distance. It runs alone too:
    ``attn(x, x, x)``, every position attending to all (``is_decoder``: to those before it)."""

    stands_for = staticmethod(lambda module: isinstance(module, relative.RelativeAttention))

    def __init__(
        self,
        cfg: Config,
        has_relative_attention_bias: bool = False,
        attn_type: AttnType = "global",
        layer_id: int | None = None,
        *,
        is_decoder: bool = False,
    ):
        cfg = HookedTransformerConfig.unwrap(cfg)
        if attn_type != "global":
            raise ConfigError(f"attn_type={attn_type!r}: T5's attention is 'global'")
        layers = _layers(cfg, 1 if has_relative_attention_bias else 2)
        stack = layers.decoder if is_decoder else layers.encoder
        become(self, stack.blocks[-1].attn, cfg, draws=False)
        self.layer_id = None if layer_id is None else checked_layer(layer_id, cfg)

    def forward(
        self,
        query_input: PerHead,
        key_input: PerHead,
        value_input: PerHead,
        ctx: Context | None = None,
        *,
        position_bias: Bias | None = None,
    ) -> Stream:
        """What attention adds to the stream. A model passes ``ctx``; without one every position is
        real, and the bias is ``position_bias`` or the layer's own."""
        if ctx is None:
            ctx = replace(Context(), bias=_bias(self, query_input, position_bias))
        return super().forward(query_input, key_input, value_input, ctx)


class T5Block(nn.Module, metaclass=Part):
    """A block of a T5's encoder or decoder. It runs alone too: ``block(resid)``, and in a decoder
    ``block(resid, encoder_hidden_states=...)``. Block 0 computes the bias by distance; the others
    are given it, ``position_bias=...``."""

    stands_for = staticmethod(
        lambda module: (
            isinstance(module, (SequentialBlock, CrossBlock))
            and isinstance(module.attn, relative.RelativeAttention)
        )
    )

    def __init__(self, cfg: Config, block_index: int, is_decoder: bool):
        cfg = HookedTransformerConfig.unwrap(cfg)
        layers = _layers(cfg, 1 if checked_layer(block_index, cfg) == 0 else 2)
        built = (layers.decoder if is_decoder else layers.encoder).blocks[-1]
        layout: type = type(built)
        self.__class__ = with_layout(type(self), layout)
        become(self, built, cfg, draws=False)
        self.block_index, self.is_decoder = block_index, is_decoder

    def forward(
        self,
        resid_pre: Stream,
        ctx: Context | None = None,
        *,
        position_bias: Bias | None = None,
        encoder_hidden_states: Encoded | None = None,
    ) -> Stream:
        """The stream that leaves the block. A model passes ``ctx``; without one every position is
        real, of the text and of ``encoder_hidden_states``, which a decoder's block needs.

        Raises InputError when these are missing.
        """
        if ctx is None:
            ctx = CrossContext() if self.is_decoder else Context()
            ctx = replace(ctx, bias=_bias(self.attn, resid_pre, position_bias))
        if isinstance(ctx, CrossContext) and encoder_hidden_states is not None:
            ctx = replace(ctx, encoded=encoder_hidden_states)
        if isinstance(ctx, CrossContext) and ctx.encoded is None:
            raise InputError("a decoder's block attends to an encoder: pass encoder_hidden_states")
        return super().forward(resid_pre, ctx)

    def __reduce__(self) -> tuple[Any, ...]:
        return empty, type(self).__bases__, vars(self)  # the class has no name to pickle
