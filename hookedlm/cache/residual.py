"""`ResidualMethods`: the residual stream as it grows, and as the sum of what was written to it."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from hookedlm.cache.attribution import AttributionMethods, LNMode
from hookedlm.cache.ledger import Renorm, Write, embeddings, has_mid, ledger, stream_before
from hookedlm.cache.parts import Labels, Stack
from hookedlm.errors import InputError
from hookedlm.layers.block import AttentionBranch
from hookedlm.lent import demand_one_stream
from hookedlm.slices import Slice, SliceInput


class ResidualMethods(AttributionMethods):
    """Depths of the stream, and its parts."""

    def accumulated_resid(
        self,
        layer: int | None = None,
        incl_mid: bool = False,
        apply_ln: bool | LNMode = False,
        pos_slice: SliceInput = None,
        mlp_input: bool = False,
        return_labels: bool = False,
    ) -> Stack | tuple[Stack, Labels]:
        """The stream at every depth up to ``layer`` (None: the end): the logit lens' input.

        Returns ``[component, batch, pos, d_model]``: ``0_pre`` (``0_mid``) ``1_pre`` ...,
        ``final_post``. ``apply_ln`` passes each through the norm that reads the last one: "frozen"
        with the scale of the last, "recompute" (what True means here) with the statistics of each
        stream itself, as the logit lens does. Source: nostalgebraist (2020).
        """
        pos, end = Slice(pos_slice), self._layer(layer)
        demand_one_stream(self.model)
        names: list[tuple[str, str]] = []
        for i in range(end + 1):
            label = "final_post" if i == self.model.cfg.n_layers else f"{i}_pre"
            names.append((label, stream_before(self.model, i)))
            shows_mid = f"blocks.{i}.hook_resid_mid" in self.model.hook_dict
            if (incl_mid and shows_mid) if i < end else (mlp_input and has_mid(self.model, i)):
                names.append((f"{i}_mid", stream_before(self.model, i, mlp_input=True)))
        stack = torch.stack([self._stream(name, pos) for _, name in names])
        apply_ln = "recompute" if apply_ln is True else apply_ln
        stack = self._normed(stack, apply_ln, end, mlp_input, pos)
        return (stack, [label for label, _ in names]) if return_labels else stack

    @torch.no_grad()
    def decompose_resid(
        self,
        layer: int | None = None,
        mlp_input: bool = False,
        mode: Literal["all", "mlp", "attn"] = "all",
        apply_ln: bool | LNMode = False,
        pos_slice: SliceInput = None,
        incl_embeds: bool = True,
        return_labels: bool = False,
    ) -> Stack | tuple[Stack, Labels]:
        """What each part wrote into the stream that enters ``layer`` (None: the end).

        Returns ``[component, batch, pos, d_model]``: ``embed``, ``pos_embed``, ``0_attn_out``,
        ``0_mlp_out``, ...; in mode "all" they sum to the stream. ``apply_ln`` applies the norm that
        reads it: "frozen" (what True means here) linear with its cached scale, or "recompute".
        """
        if mode not in ("all", "mlp", "attn"):
            raise InputError(f"mode={mode!r}: expected 'all', 'mlp' or 'attn'")
        pos, end = Slice(pos_slice), self._layer(layer)
        labels, parts = self._embeddings(pos) if incl_embeds else ([], [])
        newest = labels[-1] if labels else ""
        for step in ledger(self.model, end, mlp_input):
            if isinstance(step, Renorm):
                # The norm's bias is no part's own; it goes to the write that it follows.
                parts = [
                    self._renormed(step, x, pos, biased=label == newest)
                    for label, x in zip(labels, parts, strict=True)
                ]
                continue
            newest = step.label
            if mode in ("all", step.kind) or step.kind == "block":
                labels, parts = [*labels, step.label], [*parts, self._written(step, pos)]
        if not parts:
            resid = self._resid(end, mlp_input, pos)
            empty = resid.new_zeros((0, *resid.shape))
            return (empty, []) if return_labels else empty
        stack = self._normed(torch.stack(parts), apply_ln, end, mlp_input, pos)
        return (stack, labels) if return_labels else stack

    def _embeddings(self, pos: Slice) -> tuple[Labels, list[Tensor]]:
        """What is in the stream before the first block."""
        names = embeddings(self.model)
        return list(names), [self._stream(name, pos) for name in names.values()]

    def _written(self, step: Write, pos: Slice) -> Tensor:
        """What one step of the ledger added to the stream."""
        if isinstance(self.model.blocks[step.layer], AttentionBranch):
            return self._stream(step.point, pos)
        after = self._stream(f"blocks.{step.layer}.hook_resid_post", pos)
        return after - self._stream(f"blocks.{step.layer}.hook_resid_pre", pos)
