"""The neurons of Hugging Face's experts, behind the signature of `hookedlm.layers.moe`."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import linear

from hookedlm.convert import hf
from hookedlm.convert.placed import is_away
from hookedlm.families.row import Row

ACT: tuple[str, ...] = ("act_fn", "activation_fn", "mlp.activation_fn")
"""What experts call their activation function."""

Pre = tuple[Tensor, ...]
"""What enters the activation ``[token, d_mlp]``, and the linear branch if gated."""


@dataclass(frozen=True)
class StackedForm:
    """How experts stacked to ``[expert, out, in]`` keep their matrices: transformers' decorator
    writes it into the modules of a class, a row tells it of a class without that decorator.

    ``is_transposed``: ``[expert, in, out]``. ``is_concatenated``: neurons of the gate come before
    those of the linear branch; else they take turns.
    """

    has_gate: bool = True
    has_bias: bool = False
    is_transposed: bool = False
    is_concatenated: bool = True
    has_post_expert_norm: bool = False


class StackedNeurons:
    """Neurons of experts in transformers' common form. ``combine`` names the class's own way to
    make one of gate and linear branch, which it takes as its matrix gives them; without it, it is
    ``act(gate) * linear``."""

    def __init__(self, experts: Any, form: StackedForm, combine: str | None = None):
        self.experts = experts
        self.form = form
        self.combine = combine
        self.branches: tuple[str, ...] = ("pre", "pre_linear") if form.has_gate else ("pre",)
        self._apart, self._branch = ((2, -1), -2) if form.is_concatenated else ((-1, 2), -1)

    def pre(self, expert: int, x: Float[Tensor, "token d_model"]) -> Pre:
        """What enters the activation, and the linear branch if gated."""
        if not self.form.has_gate:
            return (self._linear(x, "up_proj", expert),)
        both = self._linear(x, "gate_up_proj", expert)
        return both.unflatten(-1, self._apart).unbind(self._branch)

    def post(self, expert: int, pre: Pre) -> Float[Tensor, "token d_mlp"]:
        """What the neurons say."""
        if not self.form.has_gate:
            return self.experts.act_fn(pre[0])
        if self.combine is None:
            return self.experts.act_fn(pre[0]) * pre[1]
        combine = getattr(self.experts, self.combine)
        return combine(torch.stack(pre, dim=self._branch).flatten(-2))

    def out(
        self, expert: int, post: Float[Tensor, "token d_mlp"]
    ) -> Float[Tensor, "token d_model"]:
        """What they write."""
        return self._linear(post, "down_proj", expert)

    def _linear(self, x: Tensor, name: str, expert: int) -> Tensor:
        W = getattr(self.experts, name)[expert]
        b = getattr(self.experts, f"{name}_bias")[expert] if self.form.has_bias else None
        return linear(x, W.t() if self.form.is_transposed else W, b)


class RowsOfNeurons:
    """Neurons of gated experts whose matrices have a row for each neuron of all experts,
    ``[expert d_mlp, d_model]``, the last one too (DBRX). ``names`` are those of the gate, of the
    linear branch and of what is written."""

    branches: tuple[str, ...] = ("pre", "pre_linear")

    def __init__(self, experts: nn.Module, names: tuple[str, str, str], n_experts: int):
        self.experts = experts
        self.gate, self.up, self.down = names
        self.n_experts = n_experts

    def pre(self, expert: int, x: Float[Tensor, "token d_model"]) -> Pre:
        """What enters the activation, and the linear branch."""
        return linear(x, self._rows(self.gate, expert)), linear(x, self._rows(self.up, expert))

    def post(self, expert: int, pre: Pre) -> Float[Tensor, "token d_mlp"]:
        """What the neurons say."""
        return hf.find(self.experts, ACT)(pre[0]) * pre[1]

    def out(
        self, expert: int, post: Float[Tensor, "token d_mlp"]
    ) -> Float[Tensor, "token d_model"]:
        """What they write."""
        return post @ self._rows(self.down, expert)

    def _rows(self, name: str, expert: int) -> Float[Tensor, "d_mlp d_model"]:
        return self.experts.get_parameter(name).unflatten(0, (self.n_experts, -1))[expert]


HFNeurons = StackedNeurons | RowsOfNeurons


def neurons_of(experts: nn.Module, row: Row, n_experts: int) -> HFNeurons | None:
    """The neurons of experts whose form their class or a row tells; None for another, and where
    weights are fetched only as they run."""
    if any(map(is_away, experts.modules())):
        return None
    if row.expert_matrices is not None:
        return RowsOfNeurons(experts, row.expert_matrices, n_experts)
    told = vars(experts) if "is_concatenated" in vars(experts) else row.expert_form
    if told is None:
        return None
    form = StackedForm(**{f.name: told[f.name] for f in fields(StackedForm) if f.name in told})
    if form.has_post_expert_norm:
        return None
    combines = hf.find(experts, "_apply_gate") is not None
    return StackedNeurons(experts, form, "_apply_gate" if combines else None)
