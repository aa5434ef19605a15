"""`AttributionMethods`: norms applied to parts of the stream, and what parts add to logits."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hookedlm.cache.dictionary import CacheDictionary
from hookedlm.cache.ledger import Renorm, norms_the_stream
from hookedlm.cache.parts import Stack
from hookedlm.cache.reading import Reading
from hookedlm.errors import InputError
from hookedlm.layers.bert import Project
from hookedlm.layers.hybrid import MLPBlock
from hookedlm.layers.norm import Norm, Times
from hookedlm.layers.opaque import OpaqueNorm
from hookedlm.slices import Slice, SliceInput

LNMode = Literal["frozen", "recompute"]
TokenInput = str | int | Int[Tensor, "..."]


class AttributionMethods(CacheDictionary):
    """Norms and unembedding directions applied to parts."""

    # Norms ----------------------------------------------------------------------------------------

    @torch.no_grad()
    def apply_ln_to_stack(
        self,
        residual_stack: Stack,
        layer: int | None = None,
        mlp_input: bool = False,
        pos_slice: SliceInput | Slice = None,
        batch_slice: SliceInput | Slice = None,
        has_batch_dim: bool = True,
        recompute_ln: bool = False,
        mode: LNMode = "frozen",
    ) -> Stack:
        """The norm that reads the stream at ``layer`` applied to parts of that stream.

        "frozen": linear; centred (LayerNorm only), divided by the *cached* scale, multiplied by the
        weight; the bias belongs to no part. "recompute" (or ``recompute_ln=True``): each item
        normed by its own statistics, bias included: the logit lens. ``pos_slice`` and
        ``batch_slice`` say which positions and rows the stack holds, ``has_batch_dim=False`` that
        it has no batch axis although the cache has one. Raises InputError on a norm that is not
        known to be linear and on a stack of other rows or positions than these.
        """
        mode = self._mode("recompute" if recompute_ln else mode)
        name = self._norm_name(self._layer(layer), mlp_input)
        if name is None:  # nothing reads the stream through a norm here
            return residual_stack
        norm = self.model.mod_dict[name]
        assert isinstance(norm, Norm)
        if mode == "recompute":
            return norm.fast(residual_stack)
        scale, rows = self[f"{name}.hook_scale"], Slice(batch_slice)
        if self.has_batch_dim:
            only = not has_batch_dim and rows.mode == "identity" and len(scale) == 1
            scale = Slice(0 if only else rows).apply(scale, dim=0)
        scale = Slice(pos_slice).apply(scale, dim=-2)
        _check_rows(residual_stack, scale)
        return norm.linearised(residual_stack, scale.to(residual_stack.device))

    def _mode(self, mode: str) -> LNMode:
        if mode == "frozen":
            return "frozen"
        if mode == "recompute":
            return "recompute"
        raise InputError(f"{mode!r}: a norm is applied 'frozen' (its cached scale) or 'recompute'd")

    def _norm_name(self, layer: int, mlp_input: bool) -> str | None:
        """The norm that reads the stream at ``layer``; None if it is read as it is."""
        end = self.model.cfg.n_layers
        if layer < end and norms_the_stream(self.model.blocks[layer]):
            return None
        name = "ln_final"
        if layer < end:
            only_mlp = isinstance(self.model.blocks[layer], MLPBlock)
            name = f"blocks.{layer}.{'ln2' if mlp_input or only_mlp else 'ln1'}"
        norm = self.model.mod_dict.get(name)
        if isinstance(norm, OpaqueNorm):
            raise InputError(f"{name} runs as Hugging Face wrote it: it is not known to be linear")
        return name if isinstance(norm, Norm) else None

    def _normed(
        self, stack: Stack, apply_ln: bool | LNMode, layer: int, mlp_input: bool, pos: Slice
    ) -> Stack:
        """``stack`` as ``apply_ln`` asks; True is "frozen"."""
        if apply_ln is False or apply_ln is None:
            return stack
        mode = self._mode("frozen" if apply_ln is True else apply_ln)
        return self.apply_ln_to_stack(stack, layer, mlp_input, pos, mode=mode)

    def _scale(self, norm: str, pos: Slice) -> Float[Tensor, "*batch_pos 1"]:
        return pos.apply(self[f"{norm}.hook_scale"], dim=-2)

    def _renormed(self, step: Renorm, x: Tensor, pos: Slice, biased: bool = False) -> Tensor:
        """Parts that were in the stream when the stream itself passed a norm."""
        norm = self.model.mod_dict[step.name]
        if isinstance(norm, Times):
            return norm(x)
        if isinstance(norm, Project):
            return norm.linearised(x, biased)
        if not isinstance(norm, Norm):
            return x
        x = norm.linearised(x, self._scale(step.name, pos).to(x.device))
        b = norm.live("b") if biased else None
        return x if b is None else x + b

    # Logits ---------------------------------------------------------------------------------------

    @torch.no_grad()
    def logit_attrs(
        self,
        residual_stack: Stack,
        tokens: TokenInput,
        incorrect_tokens: TokenInput | None = None,
        pos_slice: SliceInput = None,
        batch_slice: SliceInput = None,
        has_batch_dim: bool = True,
        mode: LNMode = "frozen",
    ) -> Float[Tensor, "component *batch_pos"]:
        """How much each part adds to the logit of ``tokens`` (minus that of ``incorrect_tokens``).

        The final norm is applied "frozen" (its cached scale, its weight) or by "recompute", each
        part by its own statistics. Frozen, over a complete stack, the parts sum to the logit before
        any softcap, less the constant ``ln_final.b @ W_U + b_U``. Tokens: a string, an id,
        ``[batch]``, ``[batch, pos]``, or ``[pos]`` without a batch axis; one for each row and
        position of the stack, or of the cache if the stack is a slice of it.
        """
        directions = self.token_directions(tokens, incorrect_tokens)
        stack = self.apply_ln_to_stack(
            residual_stack, None, False, pos_slice, batch_slice, has_batch_dim, mode=mode
        )
        pos, rows = Slice(pos_slice), Slice(batch_slice)
        directions = self._aligned(directions, pos, rows, tuple(stack.shape[1:-1]))
        return (stack * directions.to(stack.device)).sum(-1)

    @torch.no_grad()
    def token_directions(
        self, tokens: TokenInput, incorrect_tokens: TokenInput | None = None
    ) -> Float[Tensor, "*tokens d_model"]:
        """The directions of the normed stream that raise a token's logit (over another's)."""
        if "mlm_head" in self.model.mod_dict:
            raise InputError(
                "these logits are no linear function of the stream: a head with an activation "
                "function stands between them"
            )
        directions = self._columns(tokens)
        if incorrect_tokens is None:
            return directions
        wrong = self._columns(incorrect_tokens)
        if wrong.shape != directions.shape:
            raise InputError(
                f"tokens have shape {tuple(directions.shape[:-1])}, incorrect_tokens "
                f"{tuple(wrong.shape[:-1])}: they must match"
            )
        return directions - wrong

    def _columns(self, tokens: TokenInput) -> Tensor:
        if isinstance(tokens, str):
            tokens = self.model.to_single_token(tokens)
        index = torch.as_tensor(tokens, device=self.model.device)
        W_U = self.model.W_U
        n = W_U.shape[1]
        if index.numel() and not (int(index.min()) >= 0 and int(index.max()) < n):
            raise InputError(f"token ids must be from 0 to {n - 1}, got {tokens}")
        return W_U.t()[index if index.numel() > 1 else index.reshape(())]

    def _aligned(
        self, directions: Tensor, pos: Slice, rows: Slice, shape: tuple[int, ...]
    ) -> Float[Tensor, "*rows d_model"]:
        """Directions made to broadcast against parts of ``shape`` ``[batch?, pos?]``."""
        if directions.ndim == 3 or (directions.ndim == 2 and not self.has_batch_dim):
            directions = _fitted(directions, pos, shape, axis=-1)
        elif directions.ndim == 2 and pos.mode != "int":
            directions = directions[:, None]  # one token a row, the same at all positions
        if directions.ndim > 1 and self.has_batch_dim:
            after = 0 if pos.mode == "int" else 1
            directions = _fitted(directions, rows, shape, axis=-1 - after)
        return directions

    def _token_reading(
        self, tokens: TokenInput, incorrect_tokens: TokenInput | None, pos: Slice
    ) -> Reading:
        """What `logit_attrs` reads, as a function of the stream behind the last block."""
        resid = self._resid(self.model.cfg.n_layers, False, pos)
        directions = self._aligned(
            self.token_directions(tokens, incorrect_tokens), pos, Slice(), tuple(resid.shape[:-1])
        )
        return self._behind_norm(Reading(directions.float().unsqueeze(-2)), None, False, pos)

    def _behind_norm(
        self, reading: Reading, layer: int | None, mlp_input: bool, pos: Slice
    ) -> Reading:
        """A reading of the normed stream as one of the stream itself, the scale frozen."""
        name = self._norm_name(self._layer(layer), mlp_input)
        if name is None:
            return reading
        norm = self.model.mod_dict[name]
        assert isinstance(norm, Norm)
        return reading.before(norm, self._scale(name, pos))


def _check_rows(stack: Tensor, scale: Tensor) -> None:
    """The stack must hold the rows and positions the scale is of."""
    got, expected = tuple(stack.shape[-scale.ndim : -1]), tuple(scale.shape[:-1])
    fits = len(got) == len(expected) and all(
        e in (1, g) for g, e in zip(got, expected, strict=True)
    )
    if not fits:
        raise InputError(
            f"a stack of shape {tuple(stack.shape)} holds other rows or positions than the "
            f"cached scale {tuple(scale.shape)}: say with pos_slice and batch_slice which"
        )


def _fitted(directions: Tensor, selection: Slice, shape: tuple[int, ...], axis: int) -> Tensor:
    """Directions of the whole cache cut like the parts; those of the parts' own rows as given."""
    if selection.mode == "identity":
        return directions
    if selection.mode != "int" and directions.shape[axis - 1] == shape[axis]:
        return directions
    return selection.apply(directions, dim=axis - 1)
