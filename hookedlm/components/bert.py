"""BERT's parts from a config, their weights drawn as Hugging Face draws them."""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Int
from torch import Tensor

from hookedlm.components.part import Config, Part, Stream, become
from hookedlm.config import HookedTransformerConfig
from hookedlm.convert.encoder import EncoderLayers
from hookedlm.encoder.loading import fresh_layers
from hookedlm.layers import bert
from hookedlm.layers.context import Context

Tokens = Int[Tensor, "batch pos"]


def _layers(cfg: Config) -> tuple[EncoderLayers, HookedTransformerConfig]:
    """A BERT of one block to take parts from, its weights drawn already, and the config.

    Raises ConfigError unless ``attention_dir`` is "bidirectional".
    """
    cfg = HookedTransformerConfig.unwrap(cfg)
    return fresh_layers(replace(cfg, n_layers=1, seed=None)), cfg


class TokenTypeEmbed(bert.TokenTypeEmbed, metaclass=Part):
    """Which of two sentences a token belongs to."""

    stands_for = staticmethod(lambda module: isinstance(module, bert.TokenTypeEmbed))

    def __init__(self, cfg: Config):
        layers, cfg = _layers(cfg)
        assert layers.embed.token_type_embed is not None, "a fresh BERT tells sentences apart"
        become(self, layers.embed.token_type_embed, cfg, draws=False)


class BertEmbed(bert.BertEmbed, metaclass=Part):
    """Token, position and token-type embedding, summed and normed."""

    stands_for = staticmethod(lambda module: isinstance(module, bert.BertEmbed))

    def __init__(self, cfg: Config):
        layers, cfg = _layers(cfg)
        become(self, layers.embed, cfg, draws=False)

    def forward(self, input_ids: Tokens, token_type_ids: Tokens | None = None) -> Stream:
        """The stream that enters the first block; without types all tokens are of the first."""
        types = torch.zeros_like(input_ids) if token_type_ids is None else token_type_ids
        return super().forward(input_ids, types)


class BertBlock(bert.BertBlock, metaclass=Part):
    """A block that norms the stream after each addition. It runs alone too: ``block(resid)``."""

    stands_for = staticmethod(lambda module: isinstance(module, bert.BertBlock))

    def __init__(self, cfg: Config):
        layers, cfg = _layers(cfg)
        become(self, layers.blocks[0], cfg, draws=False)

    def forward(self, resid_pre: Stream, ctx: Context | None = None) -> Stream:
        """The normed stream that leaves the block. A model passes ``ctx``; without one every
        position is real."""
        return super().forward(resid_pre, Context() if ctx is None else ctx)


class BertMLMHead(bert.BertMLMHead, metaclass=Part):
    """What stands between the stream and the unembedding."""

    stands_for = staticmethod(lambda module: isinstance(module, bert.BertMLMHead))

    def __init__(self, cfg: Config):
        layers, cfg = _layers(cfg)
        assert layers.mlm_head is not None, "a fresh BERT has all heads"
        become(self, layers.mlm_head, cfg, draws=False)


class BertPooler(bert.BertPooler, metaclass=Part):
    """A vector for the whole text, from its first position."""

    stands_for = staticmethod(lambda module: isinstance(module, bert.BertPooler))

    def __init__(self, cfg: Config):
        layers, cfg = _layers(cfg)
        assert layers.pooler is not None, "a fresh BERT has all heads"
        become(self, layers.pooler, cfg, draws=False)


class BertNSPHead(bert.BertNSPHead, metaclass=Part):
    """Whether the second sentence follows the first."""

    stands_for = staticmethod(lambda module: isinstance(module, bert.BertNSPHead))

    def __init__(self, cfg: Config):
        layers, cfg = _layers(cfg)
        assert layers.nsp_head is not None, "a fresh BERT has all heads"
        become(self, layers.nsp_head, cfg, draws=False)
