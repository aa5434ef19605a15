"""`ActivationCache`: the activations of one pass, and the residual-stream algebra on them.

The stream is a sum of what each part wrote. Norms are linear once their scale is held fixed, so a
logit is a sum over parts too; every method here is built so that its parts add up to the whole,
on every family. Source of the view: "A Mathematical Framework for Transformer Circuits" (2021).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hookedlm.derive import Activations
from hookedlm.errors import CacheKeyError, InputError
from hookedlm.layers.attention import Attention
from hookedlm.layers.block import AttentionBranch, PostNormBlock
from hookedlm.layers.norm import Norm
from hookedlm.layers.opaque import OpaqueNorm
from hookedlm.names import get_act_name, nearest
from hookedlm.slices import Slice, SliceInput

if TYPE_CHECKING:
    from hookedlm.model import HookedTransformer

Stack = Float[Tensor, "component *batch_pos d_model"]
Labels = list[str]


class ActivationCache:
    """A dictionary of activations that knows its model.

    Keys: a full name, a shorthand (``"k6"``, ``"pattern3"``), or a tuple ``("resid_pre", 3)``,
    ``("scale", 3, "ln1")``; negative layers count from the end. ``has_batch_dim`` says whether the
    tensors still have their batch axis.
    """

    def __init__(
        self,
        cache_dict: dict[str, Tensor],
        model: HookedTransformer,
        has_batch_dim: bool = True,
    ):
        self.cache_dict = (
            cache_dict if isinstance(cache_dict, Activations) else Activations(cache_dict)
        )
        self.model = model
        self.has_batch_dim = has_batch_dim
        self.has_embed = "hook_embed" in self.cache_dict
        self.has_pos_embed = "hook_pos_embed" in self.cache_dict

    # A dictionary ---------------------------------------------------------------------------------

    def __getitem__(self, key: str | tuple[Any, ...]) -> Tensor:
        name = self.name_of(key)
        if name in self.cache_dict:
            return self.cache_dict[name]
        if name.endswith("attn.hook_result"):
            self._compute_result(name)
            return self.cache_dict[name]
        why = (
            self.model.why_missing(name)
            if name not in self.model.hook_dict
            else (
                "The model has it, but it was not recorded: see names_filter, stop_at_layer and "
                "return_type."
            )
        )
        close = nearest(name, self.cache_dict)
        raise CacheKeyError(
            f"no activation {name!r} in this cache of {len(self.cache_dict)}. "
            + (f"Nearest: {', '.join(close)}. " if close else "")
            + why
        )

    def name_of(self, key: str | tuple[Any, ...]) -> str:
        """The full hook name a key stands for."""
        if isinstance(key, str):
            return key if key in self.cache_dict else get_act_name(key)
        if not isinstance(key, tuple) or not 1 <= len(key) <= 3:
            raise CacheKeyError(f"{key!r}: a key is a name or (name[, layer[, layer_type]])")
        name, layer, *kind = (*key, None) if len(key) == 1 else key
        if isinstance(layer, int) and layer < 0:
            layer += self.model.cfg.n_layers
        return get_act_name(name, layer, *kind)

    def __len__(self) -> int:
        return len(self.cache_dict)

    def __contains__(self, key: Any) -> bool:
        try:
            return self.name_of(key) in self.cache_dict
        except KeyError:  # no way to write a name
            return False

    def __iter__(self) -> Iterator[str]:
        return iter(self.cache_dict)

    def keys(self) -> Any:
        """Hook names, in firing order."""
        return self.cache_dict.keys()

    def values(self) -> Any:
        """All tensors; what was not recorded is computed."""
        return self.cache_dict.values()

    def items(self) -> Any:
        """All (name, tensor) pairs; what was not recorded is computed."""
        return self.cache_dict.items()

    def __repr__(self) -> str:
        recorded = len(self.cache_dict.recorded())
        return (
            f"ActivationCache of {len(self)} activations ({recorded} recorded, the others computed "
            f"when asked for): {', '.join(list(self.keys())[:4])}, ..."
        )

    def remove_batch_dim(self) -> ActivationCache:
        """Drop the batch axis of one, in place; a second call does nothing.

        Raises InputError if the batch is larger.
        """
        if not self.has_batch_dim:
            return self
        for name in self.cache_dict.recorded():
            rows = self.cache_dict[name].shape[0]
            if rows != 1:
                raise InputError(f"remove_batch_dim needs a batch of one; {name} has {rows}")
        self.cache_dict = self.cache_dict.map(lambda x: x[0])
        self.has_batch_dim = False
        return self

    def to(self, device: str | torch.device, move_model: bool = False) -> ActivationCache:
        """Move every tensor, in place (and the model with ``move_model``)."""
        self.cache_dict = self.cache_dict.map(lambda x: x.to(device))
        if move_model:
            self.model.to(device)
        return self

    # Positions and batch --------------------------------------------------------------------------

    def _stream(self, name: str, pos: Slice) -> Tensor:
        """One recorded stream ``[batch?, pos?, d_model]``, positions selected."""
        return pos.apply(self[name], dim=-2)

    def _resid(self, layer: int | None, mlp_input: bool, pos: Slice) -> tuple[Tensor, int]:
        """(the stream entering ``layer``, its MLP or the final norm; the layer as a number)."""
        layer = self._layer(layer)
        if layer == self.model.cfg.n_layers:
            return self._stream(f"blocks.{layer - 1}.hook_resid_post", pos), layer
        point = "hook_resid_mid" if mlp_input and self._has_mid(layer) else "hook_resid_pre"
        return self._stream(f"blocks.{layer}.{point}", pos), layer

    def _has_mid(self, layer: int) -> bool:
        """Whether the MLP of ``layer`` reads another stream than its attention."""
        if layer == self.model.cfg.n_layers:
            return False
        if f"blocks.{layer}.hook_mlp_out" not in self.model.hook_dict:
            raise InputError(f"mlp_input=True: layer {layer} has no MLP of its own")
        return f"blocks.{layer}.hook_resid_mid" in self.model.hook_dict

    def _layer(self, layer: int | None) -> int:
        n = self.model.cfg.n_layers
        if layer is None or layer == -1:
            return n
        if not 0 <= layer <= n:
            raise InputError(f"layer={layer}: this model has layers 0 to {n - 1}; {n} is the end")
        return layer

    # The stream as it grows -----------------------------------------------------------------------

    def accumulated_resid(
        self,
        layer: int | None = None,
        incl_mid: bool = False,
        apply_ln: bool = False,
        pos_slice: SliceInput = None,
        mlp_input: bool = False,
        return_labels: bool = False,
    ) -> Stack | tuple[Stack, Labels]:
        """The stream at every depth up to ``layer`` (None: the end): the logit lens' input.

        Returns ``[component, batch, pos, d_model]``: ``0_pre`` (``0_mid``) ``1_pre`` ...,
        ``final_post``. ``apply_ln`` passes each through the norm that reads the last one, with the
        statistics of each stream itself (as the logit lens does). Source: nostalgebraist (2020).
        """
        pos, end = Slice(pos_slice), self._layer(layer)
        names: list[tuple[str, str]] = []
        for i in range(end):
            names.append((f"{i}_pre", f"blocks.{i}.hook_resid_pre"))
            if incl_mid and f"blocks.{i}.hook_resid_mid" in self.model.hook_dict:
                names.append((f"{i}_mid", f"blocks.{i}.hook_resid_mid"))
        if end == self.model.cfg.n_layers:
            names.append(("final_post", f"blocks.{end - 1}.hook_resid_post"))
        else:
            names.append((f"{end}_pre", f"blocks.{end}.hook_resid_pre"))
            if mlp_input and self._has_mid(end):
                names.append((f"{end}_mid", f"blocks.{end}.hook_resid_mid"))
        stack = torch.stack([self._stream(name, pos) for _, name in names])
        if apply_ln:
            stack = self.apply_ln_to_stack(stack, end, mlp_input, pos_slice, recompute_ln=True)
        return (stack, [label for label, _ in names]) if return_labels else stack

    def decompose_resid(
        self,
        layer: int | None = None,
        mlp_input: bool = False,
        mode: Literal["all", "mlp", "attn"] = "all",
        apply_ln: bool = False,
        pos_slice: SliceInput = None,
        incl_embeds: bool = True,
        return_labels: bool = False,
    ) -> Stack | tuple[Stack, Labels]:
        """What each part wrote into the stream that enters ``layer`` (None: the end).

        Returns ``[component, batch, pos, d_model]``: ``embed``, ``pos_embed``, ``0_attn_out``,
        ``0_mlp_out``, ...; in mode "all" they sum to the stream. ``apply_ln`` applies the norm that
        reads it, linear with its cached scale.
        """
        if mode not in ("all", "mlp", "attn"):
            raise InputError(f"mode={mode!r}: expected 'all', 'mlp' or 'attn'")
        pos, end = Slice(pos_slice), self._layer(layer)
        parts: list[tuple[str, Tensor]] = []
        if incl_embeds:
            parts += [
                (name, self._stream(f"hook_{name}", pos))
                for name in ("embed", "pos_embed")
                if f"hook_{name}" in self.model.hook_dict and not self._apart_from_stream(name)
            ]
        for i in range(end + 1 if mlp_input and self._has_mid(end) else end):
            parts = self._after_block(i, parts, pos, mode, only_attention=i == end)
        if not parts:
            resid, _ = self._resid(layer, mlp_input, pos)
            empty = resid.new_zeros((0, *resid.shape))
            return (empty, []) if return_labels else empty
        stack = torch.stack([part for _, part in parts])
        if apply_ln:
            stack = self.apply_ln_to_stack(stack, end, mlp_input, pos_slice)
        return (stack, [label for label, _ in parts]) if return_labels else stack

    def _apart_from_stream(self, name: str) -> bool:
        return name == "pos_embed" and self.model.cfg.positional_embedding_type == "shortformer"

    def _after_block(
        self,
        i: int,
        parts: list[tuple[str, Tensor]],
        pos: Slice,
        mode: str,
        only_attention: bool,
    ) -> list[tuple[str, Tensor]]:
        """The parts once block ``i`` added its own (and, post-norm, rescaled all there are)."""
        block = self.model.blocks[i]
        if not isinstance(block, AttentionBranch):
            return [*parts, (f"{i}_block_out", self._block_out(i, pos))]
        for kind, norm in (("attn", "ln1"), ("mlp", "ln2")):
            name = f"blocks.{i}.hook_{kind}_out"
            if name not in self.model.hook_dict or (kind == "mlp" and only_attention):
                continue
            if mode in ("all", kind):
                parts = [*parts, (f"{i}_{kind}_out", self._stream(name, pos))]
            if isinstance(block, PostNormBlock):
                parts = self._renormed(parts, f"blocks.{i}.{norm}", f"{i}_{kind}_out", pos)
        return parts

    def _block_out(self, i: int, pos: Slice) -> Tensor:
        after = self._stream(f"blocks.{i}.hook_resid_post", pos)
        return after - self._stream(f"blocks.{i}.hook_resid_pre", pos)

    def _renormed(
        self, parts: list[tuple[str, Tensor]], name: str, newest: str, pos: Slice
    ) -> list[tuple[str, Tensor]]:
        """All parts through a norm of the stream itself; its bias goes to the newest."""
        norm = self.model.mod_dict[name]
        if not isinstance(norm, Norm):
            return parts
        scale, b = self._stream(f"{name}.hook_scale", pos), norm.live("b")
        return [
            (label, norm.linearised(x, scale) + (b if label == newest and b is not None else 0.0))
            for label, x in parts
        ]

    # Heads ----------------------------------------------------------------------------------------

    def compute_head_results(self) -> None:
        """Add ``blocks.L.attn.hook_result`` of every layer: what each head writes."""
        for i, block in enumerate(self.model.blocks):
            if isinstance(block, AttentionBranch) and isinstance(block.attn, Attention):
                name = f"blocks.{i}.attn.hook_result"
                if name not in self.cache_dict:
                    self._compute_result(name)

    def _compute_result(self, name: str) -> None:
        attn = self.model.mod_dict.get(name.removesuffix(".hook_result"))
        if not isinstance(attn, Attention):
            raise CacheKeyError(f"{name!r}: attention there has no uniform heads")
        with torch.no_grad():
            z = self[name.replace("hook_result", "hook_z")]
            batched = z if z.ndim == 4 else z[None]
            result = attn.result(batched.to(attn.W_O.device)).to(z.device)
        self.cache_dict[name] = result if z.ndim == 4 else result[0]

    def stack_head_results(
        self,
        layer: int = -1,
        return_labels: bool = False,
        incl_remainder: bool = False,
        pos_slice: SliceInput = None,
        apply_ln: bool = False,
    ) -> Stack | tuple[Stack, Labels]:
        """What every head of the layers below ``layer`` adds to the stream.

        Returns ``[component, batch, pos, d_model]``, labels ``L0H0``...; post-norms and residual
        multipliers applied. ``incl_remainder`` adds ``remainder``: the rest of the stream.
        """
        pos, end = Slice(pos_slice), self._layer(layer)
        stacks: list[Tensor] = []
        labels: Labels = []
        for i in range(end):
            block = self.model.blocks[i]
            if isinstance(block, PostNormBlock):
                raise InputError(
                    "stack_head_results: this model normalises the stream itself after each "
                    "addition; a head's output is rescaled by every later layer."
                )
            if isinstance(block, AttentionBranch) and isinstance(block.attn, Attention):
                heads = self._head_outs(i, block, pos)
                stacks.append(heads)
                labels += [f"L{i}H{h}" for h in range(heads.shape[0])]
        resid, _ = self._resid(end, False, pos)
        stack = torch.cat(stacks) if stacks else resid.new_zeros((0, *resid.shape))
        if incl_remainder:
            stack = torch.cat([stack, (resid - stack.sum(0))[None]])
            labels.append("remainder")
        if apply_ln:
            stack = self.apply_ln_to_stack(stack, end, pos_slice=pos_slice)
        return (stack, labels) if return_labels else stack

    def _head_outs(self, i: int, block: AttentionBranch, pos: Slice) -> Tensor:
        """``[head, batch?, pos?, d_model]``: each head's part of ``hook_attn_out``."""
        name = f"blocks.{i}"
        with torch.no_grad():
            if f"{name}.attn.hook_result" in self.cache_dict:  # may have been edited
                heads = pos.apply(self[f"{name}.attn.hook_result"], dim=-3).movedim(-2, 0)
            else:
                z = pos.apply(self[f"{name}.attn.hook_z"], dim=-3)
                heads = torch.einsum("...he,hed->h...d", z, block.attn.W_O.to(z.device))
            if isinstance(block.ln1_post, Norm):
                heads = block.ln1_post.linearised(heads, self._scale(f"{name}.ln1_post", pos))
            return heads * block.spec.residual_scale

    def _scale(self, norm: str, pos: Slice) -> Tensor:
        return pos.apply(self[f"{norm}.hook_scale"], dim=-2)

    def stack_activation(
        self, activation_name: str, layer: int = -1, sublayer_type: str | None = None
    ) -> Float[Tensor, "layer ..."]:
        """One activation of all layers below ``layer``, stacked along a new first axis."""
        end = self._layer(layer)
        if end == 0:
            first = self[(activation_name, 0, sublayer_type)]
            return first.new_zeros((0, *first.shape))
        return torch.stack([self[(activation_name, i, sublayer_type)] for i in range(end)])

    # Norms and logits -----------------------------------------------------------------------------

    def apply_ln_to_stack(
        self,
        residual_stack: Stack,
        layer: int | None = None,
        mlp_input: bool = False,
        pos_slice: SliceInput = None,
        batch_slice: SliceInput = None,
        has_batch_dim: bool = True,
        recompute_ln: bool = False,
    ) -> Stack:
        """The norm that reads the stream at ``layer`` applied to parts of that stream.

        Linear by default: centred (LayerNorm only), divided by the *cached* scale, multiplied by
        the weight; the bias belongs to no part. With ``recompute_ln`` each item is normalised by
        its own statistics, bias included: the logit lens. ``pos_slice`` and ``batch_slice`` say
        which positions and rows the stack holds.
        """
        layer = self._layer(layer)
        name = (
            "ln_final"
            if layer == self.model.cfg.n_layers
            else (f"blocks.{layer}.{'ln2' if mlp_input else 'ln1'}")
        )
        norm = self.model.mod_dict.get(name)
        if isinstance(norm, OpaqueNorm):
            raise InputError(f"{name} runs as Hugging Face wrote it: it is not known to be linear")
        if not isinstance(norm, Norm) or self._norms_the_stream_itself(layer):
            return residual_stack  # nothing reads the stream through a norm here
        with torch.no_grad():
            if recompute_ln:
                return norm.fast(residual_stack)
            scale = self[f"{name}.hook_scale"]
            if self.has_batch_dim:
                scale = Slice(batch_slice).apply(scale, dim=0)
            scale = Slice(pos_slice).apply(scale, dim=-2)
            self._check_rows(residual_stack, scale)
            return norm.linearised(residual_stack, scale.to(residual_stack.device))

    def _check_rows(self, stack: Tensor, scale: Tensor) -> None:
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

    def _norms_the_stream_itself(self, layer: int) -> bool:
        return layer < self.model.cfg.n_layers and isinstance(
            self.model.blocks[layer], PostNormBlock
        )

    def logit_attrs(
        self,
        residual_stack: Stack,
        tokens: str | int | Int[Tensor, "..."],
        incorrect_tokens: str | int | Int[Tensor, "..."] | None = None,
        pos_slice: SliceInput = None,
        batch_slice: SliceInput = None,
        has_batch_dim: bool = True,
    ) -> Float[Tensor, "component *batch_pos"]:
        """How much each part adds to the logit of ``tokens`` (minus that of ``incorrect_tokens``).

        The final norm is applied with its cached scale and its weight. Over a complete stack the
        parts sum to the logit before any softcap, less the constant ``ln_final.b @ W_U + b_U``.
        Tokens: a string, an id, ``[batch]``, ``[batch, pos]``, or ``[pos]`` without a batch axis;
        one for each row and position of the stack, or of the cache if the stack is a slice of it.
        """
        direction = self._directions(tokens)
        if incorrect_tokens is not None:
            wrong = self._directions(incorrect_tokens)
            if wrong.shape != direction.shape:
                raise InputError(
                    f"tokens have shape {tuple(direction.shape[:-1])}, incorrect_tokens "
                    f"{tuple(wrong.shape[:-1])}: they must match"
                )
            direction = direction - wrong
        stack = self.apply_ln_to_stack(
            residual_stack, None, False, pos_slice, batch_slice, has_batch_dim
        )
        if direction.ndim == 3 or (direction.ndim == 2 and not self.has_batch_dim):
            direction = _fitted(direction, pos_slice, stack, axis=-2)
        elif direction.ndim == 2 and Slice(pos_slice).mode != "int":
            direction = direction[:, None]  # one token a row, the same at all positions
        if direction.ndim > 1 and self.has_batch_dim:
            after = 1 if Slice(pos_slice).mode == "int" else 2
            direction = _fitted(direction, batch_slice, stack, axis=-1 - after)
        return (stack * direction.to(stack.device)).sum(-1)

    def _directions(self, tokens: str | int | Int[Tensor, "..."]) -> Tensor:
        if isinstance(tokens, str):
            tokens = self.model.to_single_token(tokens)
        index = torch.as_tensor(tokens, device=self.model.device)
        with torch.no_grad():
            return self.model.W_U.t()[index if index.numel() > 1 else index.reshape(())]


def _fitted(direction: Tensor, selected: SliceInput, stack: Tensor, axis: int) -> Tensor:
    """Directions of the whole cache cut like the stack; those of the stack's own rows as given."""
    selection = Slice(selected)
    if selection.mode == "identity":
        return direction
    if selection.mode != "int" and direction.shape[axis] == stack.shape[axis]:
        return direction
    return selection.apply(direction, dim=axis)
