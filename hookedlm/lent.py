"""`LentMethods`: a pass of a model whose loop is Hugging Face's own, with our blocks lent to it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from jaxtyping import Float, Int
from torch import Tensor

from hookedlm.convert.lent import LentLoop
from hookedlm.errors import InputError
from hookedlm.hooks import HookPoint

if TYPE_CHECKING:
    from hookedlm.model import HookedTransformer

HOW_ELSE = (
    "its blocks run in Hugging Face's own loop, which begins with the embedding. Give tokens (or "
    "inputs_embeds), and edit what enters a layer with a hook at its hook_resid_pre."
)


def loop_of(model: Any) -> LentLoop | None:
    """The loop to which a model's blocks are lent; None for one that drives its blocks itself."""
    preparer = vars(vars(model).get("driver") or object).get("preparer")
    return preparer if isinstance(preparer, LentLoop) else None


def why_no_sum(model: Any) -> str:
    """Why a model's stream is no sum of an embedding and what blocks add; "" if it is one."""
    loop = loop_of(model)
    return "" if loop is None else loop.no_sum


def demand_one_stream(model: Any) -> None:
    """Raise InputError where the stream has other axes in some layers than in others."""
    points = {n: p for n, p in model.hook_dict.items() if n.endswith("hook_resid_pre")}
    first = next(iter(points.values()), HookPoint())
    odd = {name: point for name, point in points.items() if point.axes != first.axes}
    if odd:
        name, point = next(iter(odd.items()))
        raise InputError(
            f"the stream of this model is [{point.axes_text}] at {name} and [{first.axes_text}] at "
            f"{first.name}: layers can't be stacked. Take them from the cache one by one."
        )


class LentMethods:
    """`forward` where the blocks are called by somebody else."""

    def _check_lent(
        self: HookedTransformer, start_at_layer: int | None, shortformer_pos_embed: Any
    ) -> None:
        if start_at_layer is not None:
            raise InputError(f"start_at_layer={start_at_layer}: {HOW_ELSE}")
        if shortformer_pos_embed is not None:
            raise InputError("shortformer_pos_embed: this is no shortformer model")

    def _until(self: HookedTransformer, return_type: Any, cache: Any) -> int | None:
        """The layer a pass may stop before (their number: after the last) when nobody said which;
        None: logits are wanted."""
        if return_type is not None or self.hook_logits.wanted:
            return None
        if cache is not None:
            return len(self.blocks)
        last = self._last_needed()
        return last + int(last < len(self.blocks) and self._entering[last].wanted)

    def _run_lent(
        self: HookedTransformer,
        loop: LentLoop,
        tokens: Int[Tensor, "batch pos"] | None,
        embeds: Float[Tensor, "batch pos d_embed"] | None,
        mask: Int[Tensor, "batch pos"] | None,
        past: int,
        cache: Any,
        others: Mapping[str, Any],
        stop: int | None,
    ) -> Float[Tensor, "..."]:
        """The logits, or the stream entering layer ``stop``."""
        given = tokens if embeds is None else embeds
        assert given is not None
        n_new, others = given.shape[1], dict(others)
        mask = self.driver.full_mask(mask, n_new, past, cache)
        places = others.pop("position_ids", None)
        if places is None and (mask is not None or past):
            places = self.driver.positions(mask, n_new, past, given.device)
        found, contexts = loop.run(
            list(self.blocks),
            tokens=tokens,
            embeds=embeds,
            attention_mask=mask,
            position_ids=places,
            cache=cache,
            others=others,
            stop=stop,
            embed=self.hook_embed if loop.shows_embed else None,
        )
        self.driver.latest = [] if cache is not None else contexts
        return found
