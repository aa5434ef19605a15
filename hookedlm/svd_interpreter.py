"""`SVDInterpreter`: what the singular directions of a weight matrix say about tokens.

The right singular vectors of a matrix that reads from or writes to the residual stream are
directions of that stream; through the unembedding each becomes a score for every token. Source:
Millidge & Black, "The Singular Value Decompositions of Transformer Weight Matrices are Highly
Interpretable" (2022).
"""

from __future__ import annotations

from typing import Literal, cast, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hookedlm.errors import InputError, WeightError
from hookedlm.factored_matrix import FactoredMatrix, widened
from hookedlm.layers.attention import Attention
from hookedlm.layers.attention_math import repeat_heads
from hookedlm.layers.block import PostNormBlock
from hookedlm.layers.mlp import MLP, GatedMLP
from hookedlm.layers.norm import Norm
from hookedlm.missing import why_missing
from hookedlm.model import HookedTransformer

VectorType = Literal["OV", "w_in", "w_gate", "w_out"]
VECTOR_TYPES: tuple[VectorType, ...] = get_args(VectorType)


class SVDInterpreter:
    """Singular directions of a model's heads and MLPs, as scores of tokens.

    Weights are read anew at each call, as they are: nothing is folded for it, and the weight of the
    final norm is not applied (fold it first, or use `from_pretrained`, to have it in ``W_U``).
    """

    def __init__(self, model: HookedTransformer):
        self.model = model
        self.cfg = model.cfg

    @torch.no_grad()
    def get_singular_vectors(
        self,
        vector_type: VectorType,
        layer_index: int,
        num_vectors: int = 10,
        head_index: int | None = None,
    ) -> Float[Tensor, "d_vocab 1 num_vectors"]:
        """Scores of all tokens along the singular directions of one matrix, strongest first.

        "OV": where the head ``head_index`` writes, the right singular vectors of ``W_V W_O``.
        "w_out": where the MLP writes, those of ``W_out``. "w_in" and "w_gate" (gated MLPs): what
        it reads, those of ``W_inᵀ`` and ``W_gateᵀ`` times the weight of the norm before it, if that
        is not folded. Each direction has length 1, is taken times ``W_U``, and its sign is
        arbitrary. Half precision gives float32.

        Raises InputError for what this model has not, WeightError where a part has no such matrix.
        """
        directions = self._directions(vector_type, layer_index, head_index)
        if not 1 <= num_vectors <= directions.shape[1]:
            raise InputError(
                f"num_vectors={num_vectors}: {vector_type} of layer {layer_index} has "
                f"{directions.shape[1]} singular directions (1 to {directions.shape[1]})"
            )
        W_U = self.model.W_U.to(directions.dtype)
        return (W_U.T @ directions[:, :num_vectors]).unsqueeze(1)

    def get_top_tokens(
        self,
        vector_type: VectorType,
        layer_index: int,
        num_vectors: int = 10,
        head_index: int | None = None,
        k: int = 10,
        largest: bool = True,
    ) -> list[list[str]]:
        """The ``k`` tokens that score highest along each singular direction, highest first.

        Signs are arbitrary: ``largest=False`` gives the tokens at the other end. Raises as
        `get_singular_vectors`, and TokenizerError without a tokenizer.
        """
        scores = self.get_singular_vectors(vector_type, layer_index, num_vectors, head_index)
        if not 1 <= k <= scores.shape[0]:
            raise InputError(f"k={k}: expected 1 to {scores.shape[0]}, the size of the vocabulary")
        ids = scores[:, 0].topk(k, dim=0, largest=largest).indices
        return [
            [self.model.to_single_str_token(token) for token in column] for column in ids.T.tolist()
        ]

    # The matrices ---------------------------------------------------------------------------------

    def _directions(
        self, vector_type: VectorType, layer: int, head: int | None
    ) -> Float[Tensor, "d_model k"]:
        """Right singular vectors as columns, the strongest first."""
        if vector_type not in VECTOR_TYPES:
            raise InputError(f"vector_type={vector_type!r}: expected one of {VECTOR_TYPES}")
        _check_range("layer_index", layer, len(self.model.blocks), "layers")
        if vector_type == "OV":
            return self._ov(layer, head).Vh
        if head is not None:
            raise InputError(f"head_index={head}: only 'OV' has heads, {vector_type!r} has none")
        return torch.linalg.svd(self._mlp_matrix(vector_type, layer), full_matrices=False).Vh.mT

    def _ov(self, layer: int, head: int | None) -> FactoredMatrix:
        attn = self._part(layer, "attn")
        if not isinstance(attn, Attention):
            raise self._absent("OV circuit", f"blocks.{layer}.attn.hook_z")
        n_heads = attn.spec.n_heads
        if head is None:
            raise InputError(f"'OV' needs head_index, 0 to {n_heads - 1}")
        _check_range("head_index", head, n_heads, "heads")
        if attn.why_not_bilinear():
            raise WeightError(f"no OV circuit in layer {layer}: {attn.why_not_bilinear()}")
        W_V = repeat_heads(cast(Tensor, attn.W_V), n_heads, dim=0)
        return FactoredMatrix(W_V[head], cast(Tensor, attn.W_O)[head])

    def _mlp_matrix(self, vector_type: VectorType, layer: int) -> Float[Tensor, "d_mlp d_model"]:
        mlp = self._part(layer, "mlp")
        if not isinstance(mlp, (MLP, GatedMLP)):
            raise self._absent(vector_type, f"blocks.{layer}.mlp.hook_pre")
        if vector_type == "w_gate" and not isinstance(mlp, GatedMLP):
            raise WeightError(f"no w_gate: the MLP of layer {layer} is not gated")
        if vector_type == "w_out":
            return widened(cast(Tensor, mlp.W_out))
        matrix = widened(cast(Tensor, mlp.W_gate if vector_type == "w_gate" else mlp.W_in)).T
        norm = self._part(layer, "ln2")
        if isinstance(norm, Norm) and not isinstance(self.model.blocks[layer], PostNormBlock):
            return matrix * norm.weight
        return matrix

    def _part(self, layer: int, name: str) -> nn.Module | None:
        return self.model.blocks[layer]._modules.get(name)

    def _absent(self, what: str, hook_name: str) -> WeightError:
        _, layer, part, _ = hook_name.split(".")
        message = f"no {what}: blocks.{layer}.{part} is absent or of a form without such a matrix."
        return WeightError(f"{message} {why_missing(self.model, hook_name)}".strip())


def _check_range(name: str, index: int, n: int, what: str) -> None:
    if not 0 <= index < n:
        raise InputError(f"{name}={index}: this model's {n} {what} are 0 to {n - 1}")
