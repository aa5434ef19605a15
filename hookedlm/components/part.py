"""What the classes of this folder share: a constructor that takes a config, and `isinstance`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from hookedlm.config import HookedTransformerConfig
from hookedlm.errors import ConfigError
from hookedlm.toy import init_weights

Config = HookedTransformerConfig | Mapping[str, Any]
Stream = Float[Tensor, "batch pos d_model"]


class Part(type):
    """Metaclass: a class here also counts as its own what `stands_for` accepts.

    A user's subclass does not: its instances are those that were made as such.
    """

    def __instancecheck__(cls, instance: Any) -> bool:
        stands_for = vars(cls).get("stands_for")
        return super().__instancecheck__(instance) or (
            stands_for is not None and bool(stands_for(instance))
        )


def become(
    module: nn.Module, built: nn.Module, cfg: HookedTransformerConfig, draws: bool = True
) -> None:
    """``module`` takes over everything ``built`` consists of, its weights drawn as ``cfg`` says.

    They come from the global generator, as any new torch module's: under ``cfg.seed`` all layers
    would start alike. A loaded model's config, which wants none drawn, speaks of its own weights.
    """
    vars(module).update(vars(built))
    vars(module)["cfg"] = cfg
    if draws and (cfg.init_weights or cfg.original_architecture is not None):
        init_weights(module, replace(cfg, seed=None))


def checked_layer(layer: int, cfg: HookedTransformerConfig) -> int:
    """``layer`` if the config has it; raises ConfigError."""
    if not 0 <= layer < cfg.n_layers:
        raise ConfigError(f"layer {layer}: cfg.n_layers={cfg.n_layers} allows 0 to n_layers - 1")
    return layer
