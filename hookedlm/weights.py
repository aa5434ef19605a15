"""`WeightMethods`: the weights of all layers at once, under TransformerLens' names."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from hookedlm.cache.ledger import Renorm, Write, ledger
from hookedlm.derive import named_blocks
from hookedlm.errors import InputError, WeightError
from hookedlm.factored_matrix import FactoredMatrix, widened
from hookedlm.layers.attention import Attention
from hookedlm.layers.attention_math import repeat_heads
from hookedlm.layers.bert import Project
from hookedlm.layers.mlp import MLP, GatedMLP
from hookedlm.layers.moe import MoE
from hookedlm.layers.norm import Norm, Same, Times
from hookedlm.spec import BlockSpec

if TYPE_CHECKING:
    from hookedlm.model import HookedTransformer


READERS = ("W_Q", "W_K", "W_V")
"""What is taken to read the stream of ``d_model`` dimensions."""


class WeightMethods:
    """Stacked weights. Each access stacks anew: to edit, write to ``model.blocks[l].attn.W_Q``."""

    def __getattr__(self, name: str) -> Any:
        """As torch does, but a weight that is not there keeps its own reason: torch's lookup would
        answer "no attribute" to the AttributeError of a property."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            kinds = (vars(kind) for kind in type(self).__mro__)
            found = next((attributes[name] for attributes in kinds if name in attributes), None)
            if isinstance(found, property):
                return found.fget(self)
            raise

    def _stacked(self: HookedTransformer, part: str, name: str) -> Tensor:
        found = []
        for place, block in named_blocks(self).items():
            stack, layer = place.split(".")
            module: Any = block._modules.get(part)
            if name in READERS and isinstance(module, Attention) and module.why_not_bilinear():
                raise WeightError(
                    f"no {name} for all layers: in layer {layer}, {module.why_not_bilinear()}"
                )
            weight = None if module is None else _weight_of(module, name)
            if weight is None:
                raise WeightError(
                    f"no {name} for all layers: layer {layer} has none"
                    + _why(block, part)
                    + f" Layers that have it: model.{stack}[l].{part}.{name}."
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

    # What follows from them -----------------------------------------------------------------------

    def accumulated_bias(
        self: HookedTransformer,
        layer: int,
        mlp_input: bool = False,
        include_mlp_biases: bool = True,
    ) -> Float[Tensor, "d_model"]:
        """What stands in the stream entering ``layer`` besides embeddings, heads and neurons: the
        sum of the output biases below, residual multipliers included.

        ``mlp_input``: entering the MLP of ``layer`` (behind its attention, unless the block is
        parallel). ``include_mlp_biases=False`` leaves ``b_out`` out. Raises InputError where there
        is no such constant, because a bias passes a norm whose scale depends on the input: there
        `ActivationCache.get_full_resid_decomposition` has it for each position, as "bias".
        """
        n = len(self.blocks)
        if not 0 <= layer <= n - mlp_input:
            raise InputError(
                f"accumulated_bias({layer}, mlp_input={mlp_input}): expected a layer from 0 to "
                f"{n - mlp_input}"
            )
        total = torch.zeros(self.cfg.d_model, dtype=self.dtype, device=self.device)
        for step in ledger(self, layer, mlp_input):
            if isinstance(step, Renorm):
                total = self._renormed_bias(step, total)
            elif include_mlp_biases or step.kind != "mlp":
                total = total + self._constant_of(step)
        return total

    def _renormed_bias(self: HookedTransformer, step: Renorm, total: Tensor) -> Tensor:
        norm = self.mod_dict[step.name]
        if isinstance(norm, (Same, Times, Project)):
            return norm(total)
        if not isinstance(norm, Norm) or total.any():
            raise InputError(f"{step.name} norms the stream, biases included. {NO_CONSTANT}")
        b = norm.live("b")
        return total if b is None else b

    def _constant_of(self: HookedTransformer, write: Write) -> Tensor | float:
        """What a part adds to the stream when its heads or neurons say nothing."""
        block = self.blocks[write.layer]
        part = block._modules.get(write.kind)
        if isinstance(part, Attention):
            b = part.live("b_O")
        elif isinstance(part, (MLP, GatedMLP)):
            b = part.live("b_out")
        elif isinstance(part, MoE) and not _has_output_bias(part, self.cfg.d_model):
            b = None
        else:
            kind = "adds its biases as it routes" if isinstance(part, MoE) else "is not uniform"
            raise InputError(f"blocks.{write.layer}.{write.kind} {kind}. {NO_CONSTANT}")
        norm = self.mod_dict[write.inner_norm]
        if isinstance(norm, Norm):
            if b is not None and b.any():
                raise InputError(f"the bias before {write.inner_norm} passes it. {NO_CONSTANT}")
            b = norm.live("b")
        spec: BlockSpec = vars(block)["spec"]
        return 0.0 if b is None else b * spec.scale_of(write.kind)

    @torch.no_grad()
    def all_composition_scores(
        self: HookedTransformer, mode: Literal["Q", "K", "V"]
    ) -> Float[Tensor, "layer head later_layer later_head"]:
        """How much of what a head writes a later head reads, through its queries, keys or values:
        ``|OV₁ M₂| / (|OV₁| |M₂|)`` in Frobenius norms, M being QK, its transpose, or OV.

        Zero unless the second head's layer is later. Weights are taken as they are: a norm's weight
        between the two counts only once it is folded, and a post-norm or residual multiplier never.
        Source: "A Mathematical Framework for Transformer Circuits" (2021). Raises InputError for
        another ``mode``, WeightError where attention is not uniform.
        """
        if mode not in ("Q", "K", "V"):
            raise InputError(f"mode={mode!r}: expected 'Q', 'K' or 'V'")
        read = self.OV if mode == "V" else self.QK if mode == "Q" else self.QK.T
        # An orthonormal factor on the outside changes no norm: what remains is d_head on that side.
        writes = torch.linalg.qr(widened(self.W_V))[1] @ widened(self.W_O)
        reads = widened(read.A) @ torch.linalg.qr(widened(read.B).mT)[1].mT
        n_layers, n_heads = writes.shape[:2]
        scores = writes.new_zeros(n_layers, n_heads, n_layers, n_heads)
        for layer in range(n_layers - 1):
            both = torch.einsum("hed,lgdf->hlgef", writes[layer], reads[layer + 1 :])
            scores[layer, :, layer + 1 :] = torch.linalg.matrix_norm(both)
        sizes = [torch.linalg.matrix_norm(x) for x in (writes, reads)]
        product = sizes[0][:, :, None, None] * sizes[1]
        return scores / product.clamp(min=torch.finfo(product.dtype).tiny)

    def all_head_labels(self: HookedTransformer) -> list[str]:
        """``["L0H0", "L0H1", ...]``."""
        return [f"L{i}H{h}" for i in range(self.cfg.n_layers) for h in range(self.cfg.n_heads)]


NO_CONSTANT = (
    "What it adds differs from position to position: see cache.get_full_resid_decomposition()."
)


def _has_output_bias(moe: MoE, d_model: int) -> bool:
    return any(
        parameter.ndim == 2 and parameter.shape[1] == d_model and bool(parameter.any())
        for parameter in moe.experts.parameters(recurse=False)
    )


def _weight_of(module: Any, name: str) -> Tensor | None:
    return module.__getattr__(name) if name in module._parameters else None


def _why(block: Any, part: str) -> str:
    spec = vars(block._modules.get(part, block)).get("spec")
    reason = None if spec is None else vars(spec).get("reason")
    return "." if reason is None else f" (it runs as Hugging Face wrote it: {reason})."
