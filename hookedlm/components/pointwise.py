"""Parts that treat each position by itself: embeddings, norms, MLPs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from hookedlm.components.part import Config, Part, become
from hookedlm.config import HookedTransformerConfig
from hookedlm.errors import ConfigError
from hookedlm.layers import embed, mlp, moe
from hookedlm.layers.norm import Norm
from hookedlm.toy import LayerMaker

# Embedding and unembedding ------------------------------------------------------------------------


class Embed(embed.Embed, metaclass=Part):
    """Token embedding of ``cfg.d_vocab`` tokens."""

    stands_for = staticmethod(lambda module: isinstance(module, embed.Embed))

    def __init__(self, cfg: Config):
        cfg = HookedTransformerConfig.unwrap(cfg)
        become(self, LayerMaker(cfg).embed(), cfg)


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
        become(self, built, cfg)


class Unembed(embed.Unembed, metaclass=Part):
    """Logits of ``cfg.d_vocab_out`` tokens."""

    stands_for = staticmethod(lambda module: isinstance(module, embed.Unembed))

    def __init__(self, cfg: Config):
        cfg = HookedTransformerConfig.unwrap(cfg)
        become(self, LayerMaker(cfg).unembed(), cfg)


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
        become(self, built, cfg)


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


# MLPs ---------------------------------------------------------------------------------------------


class MLP(mlp.MLP, metaclass=Part):
    """A plain MLP of ``cfg.d_mlp`` neurons, with a LayerNorm inside for ``solu_ln``."""

    stands_for = staticmethod(lambda module: isinstance(module, mlp.MLP))

    def __init__(self, cfg: Config):
        cfg = replace(HookedTransformerConfig.unwrap(cfg), gated_mlp=False, num_experts=None)
        become(self, LayerMaker(cfg).mlp(), cfg)


class GatedMLP(mlp.GatedMLP, metaclass=Part):
    """A gated MLP of ``cfg.d_mlp`` neurons (arXiv 2002.05202)."""

    stands_for = staticmethod(lambda module: isinstance(module, mlp.GatedMLP))

    def __init__(self, cfg: Config):
        cfg = replace(HookedTransformerConfig.unwrap(cfg), gated_mlp=True, num_experts=None)
        become(self, LayerMaker(cfg).mlp(), cfg)


class MoE(moe.MoE, metaclass=Part):
    """``cfg.num_experts`` MLPs, each token through ``cfg.experts_per_token`` of them."""

    stands_for = staticmethod(lambda module: isinstance(module, moe.MoE))

    def __init__(self, cfg: Config):
        cfg = HookedTransformerConfig.unwrap(cfg)
        if cfg.num_experts is None:
            raise ConfigError("num_experts is missing, and experts_per_token: how many there are")
        become(self, LayerMaker(cfg).moe(), cfg)


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
