"""The parts of a model as classes of their own: built from a config, asked about with `isinstance`.

A loaded model is made of a few layer classes, whose options were spent while building. The classes
here carry TransformerLens' names and constructors: ``MLP(cfg)`` is a new layer with weights drawn
as the config says, a subclass of the layer that models are made of, so that it can stand in one.
``isinstance(model.blocks[0].ln1, LayerNormPre)`` answers by what the layer does.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal, get_args

from jaxtyping import Float, Int
from torch import Tensor, nn

from hookedlm.config import HookedTransformerConfig
from hookedlm.convert.build import Block
from hookedlm.errors import ConfigError
from hookedlm.layers import attention, embed, mlp, moe
from hookedlm.layers.context import Context
from hookedlm.layers.norm import Norm
from hookedlm.toy import LayerMaker, ToyPreparer, init_weights

Config = HookedTransformerConfig | Mapping[str, Any]
Stream = Float[Tensor, "batch pos d_model"]
PerHead = Float[Tensor, "batch pos *head d_model"]
AttnType = Literal["global", "local"]


class Part(type):
    """Metaclass: a class here also counts as its own what `stands_for` accepts.

    A user's subclass does not: its instances are those that were made as such.
    """

    def __instancecheck__(cls, instance: Any) -> bool:
        stands_for = vars(cls).get("stands_for")
        return super().__instancecheck__(instance) or (
            stands_for is not None and bool(stands_for(instance))
        )


def _become(module: nn.Module, built: nn.Module, cfg: HookedTransformerConfig) -> None:
    """``module`` takes over everything ``built`` consists of, its weights drawn as ``cfg`` says.

    They come from the global generator, as any new torch module's: under ``cfg.seed`` all layers
    would start alike.
    """
    vars(module).update(vars(built))
    vars(module)["cfg"] = cfg
    if cfg.init_weights:
        init_weights(module, replace(cfg, seed=None))


# Embedding and unembedding ------------------------------------------------------------------------


class Embed(embed.Embed, metaclass=Part):
    """Token embedding of ``cfg.d_vocab`` tokens."""

    stands_for = staticmethod(lambda module: isinstance(module, embed.Embed))

    def __init__(self, cfg: Config):
        cfg = HookedTransformerConfig.unwrap(cfg)
        _become(self, LayerMaker(cfg).embed(), cfg)


class PosEmbed(embed.PosEmbed, metaclass=Part):
    """Learned embedding of ``cfg.n_ctx`` positions. Raises ConfigError for configs without."""

    stands_for = staticmethod(lambda module: isinstance(module, embed.PosEmbed))

    def __init__(self, cfg: Config):
        cfg = HookedTransformerConfig.unwrap(cfg)
        built = LayerMaker(cfg).pos_embed()
        if built is None:
            raise ConfigError(
                f"positional_embedding_type={cfg.positional_embedding_type!r}: only 'standard' and "
                "'shortformer' positions are learned"
            )
        _become(self, built, cfg)


class Unembed(embed.Unembed, metaclass=Part):
    """Logits of ``cfg.d_vocab_out`` tokens."""

    stands_for = staticmethod(lambda module: isinstance(module, embed.Unembed))

    def __init__(self, cfg: Config):
        cfg = HookedTransformerConfig.unwrap(cfg)
        _become(self, LayerMaker(cfg).unembed(), cfg)


# Norms --------------------------------------------------------------------------------------------


def _norm(kind: str, weights: bool) -> Any:
    """What one of the four norms stands for."""

    def stands_for(module: Any) -> bool:
        if not isinstance(module, Norm):
            return False
        return module.spec.kind == kind and (module.live("w") is not None) == weights

    return staticmethod(stands_for)


class _ConfigNorm(Norm, metaclass=Part):
    """A norm over ``length`` dimensions, the stream's unless told otherwise."""

    kind: str
    weights: bool

    def __init__(self, cfg: Config, length: int | None = None):
        cfg = HookedTransformerConfig.unwrap(cfg)
        maker = LayerMaker(cfg)
        built = maker.norm(maker.norm_spec(self.kind), self.weights, length)
        assert built is not None, "a spec gives a norm"
        _become(self, built, cfg)


class LayerNorm(_ConfigNorm):
    """LayerNorm with weight and bias (arXiv 1607.06450)."""

    kind, weights, stands_for = "LN", True, _norm("LN", True)


class LayerNormPre(_ConfigNorm):
    """LayerNorm without weights: they were folded into what reads it."""

    kind, weights, stands_for = "LN", False, _norm("LN", False)


class RMSNorm(_ConfigNorm):
    """RMSNorm with a weight (arXiv 1910.07467)."""

    kind, weights, stands_for = "RMS", True, _norm("RMS", True)


class RMSNormPre(_ConfigNorm):
    """RMSNorm without weight: it was folded into what reads it."""

    kind, weights, stands_for = "RMS", False, _norm("RMS", False)


# Attention ----------------------------------------------------------------------------------------


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
        layer = _checked_layer(layer_id or 0, cfg)
        types = [str(attn_type)] * cfg.n_layers
        cfg = replace(cfg, use_local_attn=attn_type == "local", attn_types=types)
        _become(self, LayerMaker(cfg).attention(layer), cfg)
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


# MLPs ---------------------------------------------------------------------------------------------


class MLP(mlp.MLP, metaclass=Part):
    """A plain MLP of ``cfg.d_mlp`` neurons, with a LayerNorm inside for ``solu_ln``."""

    stands_for = staticmethod(lambda module: isinstance(module, mlp.MLP))

    def __init__(self, cfg: Config):
        cfg = replace(HookedTransformerConfig.unwrap(cfg), gated_mlp=False, num_experts=None)
        _become(self, LayerMaker(cfg).mlp(), cfg)


class GatedMLP(mlp.GatedMLP, metaclass=Part):
    """A gated MLP of ``cfg.d_mlp`` neurons (arXiv 2002.05202)."""

    stands_for = staticmethod(lambda module: isinstance(module, mlp.GatedMLP))

    def __init__(self, cfg: Config):
        cfg = replace(HookedTransformerConfig.unwrap(cfg), gated_mlp=True, num_experts=None)
        _become(self, LayerMaker(cfg).mlp(), cfg)


class MoE(moe.MoE, metaclass=Part):
    """``cfg.num_experts`` MLPs, each token through ``cfg.experts_per_token`` of them."""

    stands_for = staticmethod(lambda module: isinstance(module, moe.MoE))

    def __init__(self, cfg: Config):
        cfg = HookedTransformerConfig.unwrap(cfg)
        if cfg.num_experts is None:
            raise ConfigError("num_experts is missing, and experts_per_token: how many there are")
        _become(self, LayerMaker(cfg).moe(), cfg)


class MLPFactory:
    """The MLP that a config asks for."""

    @staticmethod
    def create_mlp(cfg: Config) -> MLP | GatedMLP | MoE:
        """A mixture of experts, a gated MLP or a plain one."""
        cfg = HookedTransformerConfig.unwrap(cfg)
        return MoE(cfg) if cfg.num_experts else GatedMLP(cfg) if cfg.gated_mlp else MLP(cfg)


class ActivationFunctionFactory:
    """The activation function that a config asks for."""

    @staticmethod
    def pick_activation_function(cfg: Config) -> mlp.Activation:
        """``cfg.act_fn`` as a function, with parameters of its own where it has any."""
        return LayerMaker(HookedTransformerConfig.unwrap(cfg)).act()


# Blocks -------------------------------------------------------------------------------------------


class TransformerBlock(nn.Module, metaclass=Part):
    """Block ``block_index`` of the model ``cfg`` describes. It runs alone too: ``block(resid)``.

    What it becomes an instance of besides, sequential or parallel, follows from the config.
    """

    stands_for = staticmethod(lambda module: isinstance(module, get_args(Block)))

    def __init__(self, cfg: Config, block_index: int):
        cfg = HookedTransformerConfig.unwrap(cfg)
        layer = _checked_layer(block_index, cfg)
        built = LayerMaker(cfg).block(layer)
        self.__class__ = _with_layout(type(self), type(built))
        _become(self, built, cfg)
        self.block_index = block_index
        self.prepare = ToyPreparer(cfg)

    def forward(
        self,
        resid_pre: Stream,
        ctx: Context | None = None,
        *,
        attention_mask: Int[Tensor, "batch pos"] | None = None,
        shortformer_pos_embed: Stream | None = None,
    ) -> Stream:
        """The stream that leaves the block. A model passes ``ctx``; without one this is a pass over
        whole texts, padded as ``attention_mask`` (1 at real positions) says."""
        if ctx is None:
            prepared = self.prepare(
                embeds=resid_pre, attention_mask=attention_mask, pos_embed=shortformer_pos_embed
            )
            ctx = prepared.contexts[self.block_index]
        return super().forward(resid_pre, ctx)

    def __reduce__(self) -> tuple[Any, ...]:
        return _empty, type(self).__bases__, vars(self)  # the class below has no name to pickle


@functools.cache
def _with_layout(kind: type, layout: type) -> Any:
    """The subclass of both: the block of the user's kind with the forward pass of a layout."""
    return Part(kind.__name__, (kind, layout), {"__module__": kind.__module__})


def _empty(kind: type, layout: type) -> Any:
    made = _with_layout(kind, layout)
    return made.__new__(made)


def _checked_layer(layer: int, cfg: HookedTransformerConfig) -> int:
    if not 0 <= layer < cfg.n_layers:
        raise ConfigError(f"layer {layer}: cfg.n_layers={cfg.n_layers} allows 0 to n_layers - 1")
    return layer
