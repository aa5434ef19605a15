"""`WeightMethods`: the weights of all layers at once, under TransformerLens' names."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from hookedlm.errors import WeightError
from hookedlm.factored_matrix import FactoredMatrix
from hookedlm.layers.attention_math import repeat_heads

if TYPE_CHECKING:
    from hookedlm.model import HookedTransformer


class WeightMethods:
    """Stacked weights. Each access stacks anew: to edit, write to ``model.blocks[l].attn.W_Q``."""

    def __getattr__(self, name: str) -> Any:
        """As torch does, but a weight that is not there keeps its own reason: torch's lookup would
        answer "no attribute" to the AttributeError of a property."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            found = vars(WeightMethods).get(name)
            if isinstance(found, property):
                return found.fget(self)
            raise

    def _stacked(self: HookedTransformer, part: str, name: str) -> Tensor:
        found = []
        for layer, block in enumerate(self.blocks):
            module: Any = block._modules.get(part)
            weight = None if module is None else _weight_of(module, name)
            if weight is None:
                raise WeightError(
                    f"no {name} for all layers: layer {layer} has none"
                    + _why(block, part)
                    + f" Layers that have it: model.blocks[l].{part}.{name}."
                )
            if name in ("W_K", "W_V", "b_K", "b_V"):
                weight = repeat_heads(weight, module.spec.n_heads, dim=0)
            found.append(weight)
        shapes = {tuple(weight.shape) for weight in found}
        if len(shapes) > 1:
            raise WeightError(f"{name} has several shapes ({shapes}): read it layer by layer")
        return torch.stack(found)

    @property
    def W_E(self: HookedTransformer) -> Float[Tensor, "d_vocab d_model"]:
        """Token embeddings (times ``embed.W_proj`` where the family projects them)."""
        if self.embed is None:
            raise WeightError("the embedding runs as Hugging Face wrote it: there is no W_E")
        W_proj = self.embed.live("W_proj")
        return self.embed.W_E if W_proj is None else self.embed.W_E @ W_proj

    @property
    def W_pos(self: HookedTransformer) -> Float[Tensor, "n_ctx d_model"]:
        """Position embeddings; raises WeightError in families that have none."""
        if self.pos_embed is None:
            raise WeightError(
                f"no W_pos: positions here are {self.cfg.positional_embedding_type}, not learned"
            )
        return self.pos_embed.W_pos

    @property
    def W_E_pos(self: HookedTransformer) -> Float[Tensor, "d_vocab_and_n_ctx d_model"]:
        """``W_E`` above ``W_pos``: everything that can enter the stream."""
        return torch.cat([self.W_E, self.W_pos])

    @property
    def W_U(self: HookedTransformer) -> Float[Tensor, "d_model d_vocab"]:
        """From the normed stream to logits before any softcap, the family's scale included."""
        if self.unembed is None:
            raise WeightError("the head runs as Hugging Face wrote it: there is no W_U")
        return self.unembed.directions

    @property
    def b_U(self: HookedTransformer) -> Float[Tensor, "d_vocab"]:
        """Bias of the logits."""
        if self.unembed is None:
            raise WeightError("the head runs as Hugging Face wrote it: there is no b_U")
        factor = self.unembed.scale / self.unembed.divisor
        return self.unembed.b_U if factor == 1.0 else self.unembed.b_U * factor

    @property
    def W_Q(self) -> Float[Tensor, "layer head d_model d_head"]:
        """Query weights."""
        return self._stacked("attn", "W_Q")

    @property
    def W_K(self) -> Float[Tensor, "layer head d_model d_head"]:
        """Key weights, grouped ones repeated for every query head."""
        return self._stacked("attn", "W_K")

    @property
    def W_V(self) -> Float[Tensor, "layer head d_model d_head"]:
        """Value weights, grouped ones repeated for every query head."""
        return self._stacked("attn", "W_V")

    @property
    def W_O(self) -> Float[Tensor, "layer head d_head d_model"]:
        """Output weights."""
        return self._stacked("attn", "W_O")

    @property
    def b_Q(self) -> Float[Tensor, "layer head d_head"]:
        """Query biases."""
        return self._stacked("attn", "b_Q")

    @property
    def b_K(self) -> Float[Tensor, "layer head d_head"]:
        """Key biases, grouped ones repeated."""
        return self._stacked("attn", "b_K")

    @property
    def b_V(self) -> Float[Tensor, "layer head d_head"]:
        """Value biases, grouped ones repeated."""
        return self._stacked("attn", "b_V")

    @property
    def b_O(self) -> Float[Tensor, "layer d_model"]:
        """Attention output biases."""
        return self._stacked("attn", "b_O")

    @property
    def W_in(self) -> Float[Tensor, "layer d_model d_mlp"]:
        """MLP input weights (the linear branch of gated MLPs)."""
        return self._stacked("mlp", "W_in")

    @property
    def W_gate(self: HookedTransformer) -> Float[Tensor, "layer d_model d_mlp"] | None:
        """MLP gate weights; None in models without gated MLPs."""
        return self._stacked("mlp", "W_gate") if self.cfg.gated_mlp else None

    @property
    def W_out(self) -> Float[Tensor, "layer d_mlp d_model"]:
        """MLP output weights."""
        return self._stacked("mlp", "W_out")

    @property
    def b_in(self) -> Float[Tensor, "layer d_mlp"]:
        """MLP input biases."""
        return self._stacked("mlp", "b_in")

    @property
    def b_out(self) -> Float[Tensor, "layer d_model"]:
        """MLP output biases."""
        return self._stacked("mlp", "b_out")

    @property
    def QK(self) -> FactoredMatrix:
        """``W_Q W_Kᵀ [layer, head, d_model, d_model]``: what each head compares."""
        return FactoredMatrix(self.W_Q, self.W_K.transpose(-2, -1))

    @property
    def OV(self) -> FactoredMatrix:
        """``W_V W_O [layer, head, d_model, d_model]``: what each head moves."""
        return FactoredMatrix(self.W_V, self.W_O)

    def all_head_labels(self: HookedTransformer) -> list[str]:
        """``["L0H0", "L0H1", ...]``."""
        return [f"L{i}H{h}" for i in range(self.cfg.n_layers) for h in range(self.cfg.n_heads)]


def _weight_of(module: Any, name: str) -> Tensor | None:
    return module.__getattr__(name) if name in module._parameters else None


def _why(block: Any, part: str) -> str:
    spec = vars(block._modules.get(part, block)).get("spec")
    reason = None if spec is None else vars(spec).get("reason")
    return "." if reason is None else f" (it runs as Hugging Face wrote it: {reason})."
