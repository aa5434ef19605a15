"""`EmbedsMethods`: embeddings in place of tokens, and inputs that are not text."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from jaxtyping import Float, Int
from torch import Tensor

from hookedlm.errors import InputError

if TYPE_CHECKING:
    from hookedlm.model import HookedTransformer

Embeds = Float[Tensor, "batch pos d_embed"]


class EmbedsMethods:
    """What enters the stream when it is not the embedding of tokens alone."""

    def _read_embeds(
        self: HookedTransformer,
        embeds: Embeds,
        input: Any,
        tokens: Int[Tensor, "batch pos"] | None,
        attention_mask: Tensor | None,
        start_at_layer: int | None,
    ) -> tuple[Int[Tensor, "batch pos"] | None, Tensor | None]:
        """(tokens, if they are told, for the loss; mask of real positions or None if all are)."""
        if input is not None or start_at_layer is not None:
            raise InputError(
                "inputs_embeds is the input: give neither another nor start_at_layer (tokens= for "
                "the loss may stand beside it)"
            )
        if embeds.ndim != 3 or not embeds.is_floating_point():
            raise InputError(
                f"inputs_embeds of shape {tuple(embeds.shape)} and dtype {embeds.dtype}: expected "
                "a float tensor [batch, pos, d_model]"
            )
        if attention_mask is not None and attention_mask.shape[0] != embeds.shape[0]:
            raise InputError(
                f"attention_mask of shape {tuple(attention_mask.shape)}: expected "
                f"[{embeds.shape[0]}, pos] for inputs_embeds {tuple(embeds.shape)}"
            )
        return tokens, self._unless_full(attention_mask)

    def _enter_merged(
        self: HookedTransformer,
        tokens: Int[Tensor, "batch pos"] | None,
        stream: Float[Tensor, "batch pos d_model"] | None,
        mask: Tensor | None,
        past: int,
        cache: Any,
        embeds: Embeds | None,
        others: dict[str, Any],
    ) -> tuple[Float[Tensor, "batch pos d_model"], Any]:
        """`_enter` with embeddings for tokens, or with more than text: Hugging Face's own code
        merges what it is given, and our embedding adds what comes behind that."""
        given = next(x for x in (stream, embeds, tokens) if x is not None)
        n_new = given.shape[1]
        mask = self.driver.full_mask(mask, n_new, past, cache)
        told = others.pop("position_ids", None)
        positions = self.driver.positions(mask, n_new, past, given.device)
        preparer, pos_embed = self.driver.preparer, None
        if embeds is not None and "inputs_embeds" not in preparer.accepts:  # ours to embed
            if self.embed is None:
                raise InputError(
                    f"inputs_embeds: {self.cfg.original_architecture} takes tokens only, and its "
                    "embedding runs as it was written. Give the stream: start_at_layer=0."
                )
            ready = self.hook_embed(self.embed.of_rows(embeds))
            stream, pos_embed = self._positioned(ready, mask, past, told)
        if told is not None:
            others["position_ids"] = told
        prepared = self.driver.prepare(
            stream=stream,
            tokens=tokens,
            mask=mask,
            position_ids=positions,
            cache=cache,
            pos_embed=pos_embed,
            embeds=embeds,
            others=others,
        )
        if stream is None:
            assert prepared.stream is not None, "nothing was embedded"
            if self.embed is not None and prepared.stream.shape[1] != n_new:
                raise InputError(
                    f"{', '.join(others)}: {self.cfg.original_architecture} puts these beside the "
                    f"{n_new} embedded tokens ({prepared.stream.shape[1]} positions in all) behind "
                    "what positions and norms add, not in place of some. That has no uniform form "
                    "yet."
                )
            if self.embed is None:
                stream = self.hook_embed(prepared.stream)
            else:
                ready = self.hook_embed(self.embed.finished(prepared.stream))
                stream, _ = self._positioned(ready, mask, past, told)
        return stream, prepared
