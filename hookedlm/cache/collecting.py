"""`CollectingMethods`: components gathered along the ledger, forwards as vectors, or backwards as
what a reading finds in them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from hookedlm.cache.attribution import LNMode, TokenInput
from hookedlm.cache.ledger import Renorm, Write, ledger
from hookedlm.cache.parts import HeadResults, Heads, Labels, Neurons, Part, Passed, Readings
from hookedlm.cache.reading import Reading
from hookedlm.cache.residual import ResidualMethods
from hookedlm.errors import InputError
from hookedlm.layers.attention import Attention
from hookedlm.layers.block import AttentionBranch
from hookedlm.layers.mlp import MLP, GatedMLP
from hookedlm.layers.norm import Norm, Same, Times
from hookedlm.slices import Slice

Expand = Callable[[Write], Passed | None]
Directions = Float[Tensor, "d_model"] | Float[Tensor, "d_model out"]


class CollectingMethods(ResidualMethods):
    """What the public methods on heads and neurons share."""

    def _heads(self, pos: Slice) -> Expand:
        """Writes of uniform attention as heads."""

        def expand(write: Write) -> Passed | None:
            attn = self._attention(write.layer) if write.kind == "attn" else None
            result = f"blocks.{write.layer}.attn.hook_result"
            if attn is None:
                return None
            if result in self.cache_dict:  # may have been edited
                heads: Part = HeadResults(write.layer, pos.apply(self[result], dim=-3))
            else:
                z = self[f"blocks.{write.layer}.attn.hook_z"]
                heads = Heads(write.layer, pos.apply(z, dim=-3), attn.W_O)
            return self._passed(write, heads, attn.live("b_O"), pos)

        return expand

    def _neurons(self, pos: Slice, neurons: Slice) -> Expand:
        """Writes of uniform MLPs as neurons."""

        def expand(write: Write) -> Passed | None:
            mlp = self._module(write.layer, "mlp") if write.kind == "mlp" else None
            if not isinstance(mlp, (MLP, GatedMLP)):
                return None
            post = pos.apply(self[f"blocks.{write.layer}.mlp.hook_post"], dim=-2)
            index = neurons.indices(post.shape[-1]) % post.shape[-1]
            post, W_out = neurons.apply(post, dim=-1), neurons.apply(mlp.W_out, dim=0)
            return self._passed(
                write, Neurons(write.layer, index, post, W_out), mlp.live("b_out"), pos
            )

        return expand

    def _module(self, layer: int, name: str) -> Any:
        block = self.model.blocks[layer]
        return block._modules.get(name) if isinstance(block, AttentionBranch) else None

    def _attention(self, layer: int) -> Attention | None:
        attn = self._module(layer, "attn")
        return attn if isinstance(attn, Attention) else None

    def _passed(self, write: Write, part: Part, bias: Tensor | None, pos: Slice) -> Passed | None:
        """A part with what it passes on its way to the stream; None if that is not linear."""
        norm = self._module(write.layer, write.inner_norm.rsplit(".", 1)[-1])
        block = self.model.blocks[write.layer]
        assert isinstance(block, AttentionBranch)
        factor = block.spec.scale_of(write.kind)
        if isinstance(norm, Norm):
            return Passed(part, bias, norm, self._scale(write.inner_norm, pos), factor)
        return Passed(part, bias, None, None, factor) if isinstance(norm, Same) else None

    def _collected(
        self, steps: Sequence[Write | Renorm], expand: Expand, pos: Slice, reading: Reading | None
    ) -> tuple[list[Tensor], list[Passed]]:
        """The components of all writes that ``expand`` knows, or what ``reading`` finds in them."""
        if reading is not None:
            pairs = list(self._read_backwards(steps, expand, pos, reading))[::-1]
            return [found for found, _ in pairs], [part for _, part in pairs]
        found: list[Tensor] = []
        parts: list[Passed] = []
        for step in steps:
            if isinstance(step, Renorm):
                found = [self._renormed(step, x, pos) for x in found]
            elif part := expand(step):
                found.append(part.outs())
                parts.append(part)
        return found, parts

    def _read_backwards(
        self, steps: Sequence[Write | Renorm], expand: Expand, pos: Slice, reading: Reading
    ) -> Iterator[tuple[Tensor, Passed]]:
        for step in reversed(steps):
            if not isinstance(step, Renorm):
                if part := expand(step):
                    yield part.read(reading), part
                continue
            norm = self.model.mod_dict[step.name]
            if isinstance(norm, Times):
                reading = reading.times(norm.factor)
            elif isinstance(norm, Norm):
                reading = reading.before(norm, self._scale(step.name, pos))

    def _unexpanded(
        self, steps: Sequence[Write | Renorm], expands: Sequence[Expand], pos: Slice
    ) -> tuple[Labels, list[Tensor]]:
        """Whole writes, embeddings, and the bias: all that is no component."""
        labels, parts = self._embeddings(pos)
        bias = torch.zeros_like(parts[0])
        n_whole = 0
        for step in steps:
            if isinstance(step, Renorm):
                parts = [self._renormed(step, x, pos) for x in parts]
                bias = self._renormed(step, bias, pos, biased=True)
                continue
            passed = next(filter(None, (expand(step) for expand in expands)), None)
            if passed is not None:
                bias = bias + passed.constant().to(bias.device)
                continue
            labels.insert(n_whole, step.label)
            parts.insert(n_whole, self._written(step, pos))
            n_whole += 1
        return [*labels, "bias"], [*parts, bias]

    @torch.no_grad()
    def _components(
        self,
        layer: int,
        pos: Slice,
        expand: Expand,
        incl_remainder: bool,
        apply_ln: bool | LNMode,
        onto: Directions | None = None,
    ) -> tuple[Tensor, Callable[[], Labels]]:
        """(components below a layer and perhaps the remainder, their labels when asked for)."""
        end = self._layer(layer)
        steps = list(ledger(self.model, end, False))
        reading = self._projection(onto, end, False, apply_ln, pos)
        found, parts = self._collected(steps, expand, pos, reading)
        if not incl_remainder:
            self._check_found(steps, parts)
        resid = self._resid(end, False, pos)
        whole = resid if reading is None else reading.of(resid)
        if incl_remainder:
            found.append((whole - sum((x.sum(0) for x in found), torch.zeros_like(whole)))[None])
        found = found or [whole.new_zeros((0, *whole.shape))]
        if reading is None:
            stack = self._normed(torch.cat(found), apply_ln, end, False, pos)
        else:
            stack = joined(found, onto)
        return stack, lambda: labels_of(parts) + ["remainder"] * incl_remainder

    @torch.no_grad()
    def _token_attrs(
        self,
        tokens: TokenInput,
        incorrect_tokens: TokenInput | None,
        pos: Slice,
        expand: Expand,
    ) -> tuple[Tensor, Callable[[], Labels]]:
        reading = self._token_reading(tokens, incorrect_tokens, pos)
        steps = list(ledger(self.model, self.model.cfg.n_layers, False))
        found, parts = self._collected(steps, expand, pos, reading)
        self._check_found(steps, parts)
        return joined(found, None), lambda: labels_of(parts)

    def _projection(
        self,
        onto: Directions | None,
        end: int,
        mlp_input: bool,
        apply_ln: bool | LNMode,
        pos: Slice,
    ) -> Reading | None:
        """``project_output_onto`` as a reading of the stream before the norm that reads it."""
        if onto is None:
            return None
        d_model = self.model.cfg.d_model
        if onto.ndim not in (1, 2) or onto.shape[0] != d_model:
            raise InputError(
                f"project_output_onto has shape {tuple(onto.shape)}: expected [{d_model}] or "
                f"[{d_model}, out]"
            )
        reading = Reading(onto.reshape(d_model, -1).t().float())
        if not apply_ln:
            return reading
        if self._mode("frozen" if apply_ln is True else apply_ln) == "recompute":
            raise InputError(
                "project_output_onto needs apply_ln='frozen': with its own statistics a part's "
                "norm is not linear. Take the stack and multiply it by the directions yourself."
            )
        return self._behind_norm(reading, end, mlp_input, pos)

    def _check_found(self, steps: Sequence[Write | Renorm], parts: Sequence[Passed]) -> None:
        if parts or not steps:
            return
        raise InputError(
            "no layer below has such components: its attention or MLPs are not taken apart here "
            "(mixtures of experts and opaque parts; print model.hook_points() and "
            "model.fidelity()). get_full_resid_decomposition() takes apart what there is."
        )


def joined(found: Sequence[Readings], onto: Directions | None) -> Tensor:
    """Readings of all components behind each other; without the ``out`` axis for one direction."""
    # Components are the fastest axis in memory, as the products leave them: no transposed copy.
    joined = torch.cat([x.movedim(0, -1) for x in found], dim=-1).movedim(-1, 0)
    return joined if onto is not None and onto.ndim == 2 else joined.squeeze(-1)


def labels_of(parts: Sequence[Passed]) -> Labels:
    """Labels of all components, in order."""
    return list(chain.from_iterable(part.labels for part in parts))
