"""Check a model whose blocks are lent: logits, every point once a pass, caches, the sum."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from hookedlm.convert.build import Block
from hookedlm.convert.check import Truth, compare, listen_to_all, precision_of, within
from hookedlm.convert.conversion import NotDrivenError
from hookedlm.convert.lent import LentLoop
from hookedlm.convert.report import Agreement, Fidelity, PartReport, worse
from hookedlm.convert.text_model import text_config
from hookedlm.hooks import attached

EXACT = Agreement(0.0, True)


def check_pass(
    loop: LentLoop, blocks: list[Block], truths: Sequence[Truth]
) -> tuple[PartReport, PartReport]:
    """Reports of the embedding and the logits; raises NotDrivenError if these differ, or if a hook
    point does not fire once a pass."""
    quiet, listening, embeds = EXACT, EXACT, list[list[Tensor]]()
    for truth in truths:
        logits, _ = _run(loop, blocks, truth, None)
        quiet = worse(quiet, compare(logits, truth.logits, truth.real))
        embeds.append([])
        with attached(listen_to_all(nn.ModuleList(blocks))) as hooks:
            logits, _ = _run(loop, blocks, truth, embeds[-1])
            silent = [hook.point for hook in hooks if hook.fired != 1]
        listening = worse(listening, compare(logits, truth.logits, truth.real))
        if silent and not truth.skipped:
            raise NotDrivenError(f"{len(silent)} hook points do not fire once in every pass")
    dtype = precision_of(blocks, truths[0].calls[0].hidden)
    spread = len(blocks)  # longhand rounds otherwise in every block
    each = Agreement(listening.error / spread, False, listening.typical / spread)
    if not (within(quiet, dtype) and within(each, dtype, reroutes=True)):
        error = max(quiet.error, listening.error)
        raise NotDrivenError(f"in its own loop the logits are {error:.1e} away")
    pairs = list(zip(embeds, truths, strict=True))
    shapes = {
        (len(seen) == 1 and tuple(seen[0].shape[:2]), tuple(t.real.shape)) for seen, t in pairs
    }
    loop.positions_first = all(there == here[::-1] for there, here in shapes)
    loop.shows_embed = loop.positions_first or all(there == here for there, here in shapes)
    loop.no_sum = _why_no_sum(truths[0], embeds[0][0] if loop.shows_embed else None)
    reason = "" if loop.shows_embed else "it is not asked for the tokens once a pass: no hook_embed"
    embed = PartReport("embed", "opaque embedding", EXACT, None, reason)
    return embed, PartReport("logits", "opaque head", quiet, listening)


def _run(
    loop: LentLoop, blocks: list[Block], truth: Truth, embeds: list[Tensor] | None
) -> tuple[Tensor, Any]:
    def see(x: Tensor) -> Tensor:
        assert embeds is not None
        embeds.append(x)
        return x

    padded = not bool(truth.real.all())
    return loop.run(
        blocks,
        tokens=truth.tokens,
        attention_mask=truth.real.long() if padded else None,
        position_ids=truth.position_ids if padded else None,
        embed=None if embeds is None else see,
    )


def _why_no_sum(truth: Truth, embed: Tensor | None) -> str:
    """Why the stream is no sum of the embedding and what each block adds; "" if it is."""
    if embed is None:
        return "the embedding is not shown"
    before, name = embed, "the embedding"
    for layer, call in enumerate(truth.calls):
        if call.hidden.shape != before.shape or not torch.equal(call.hidden, before):
            return f"what enters block {layer} is not {name}"
        before, name = truth.outputs[layer], f"what leaves block {layer}"
    return ""


def check_cache(
    loop: LentLoop,
    theirs: Tensor | str,
    ours: Tensor | str,
    dtype: torch.dtype,
    fidelity: Fidelity,
) -> None:
    """Whether the model can be continued from a cache, as Hugging Face's own blocks can."""
    if isinstance(theirs, str) or isinstance(ours, str):
        loop.no_cache = theirs if isinstance(theirs, str) else str(ours)
    else:
        agreement = compare(ours, theirs, torch.ones_like(ours[..., 0]).bool())
        if within(agreement, dtype):
            return
        loop.no_cache = f"continued logits are {agreement.error:.1e} away"
    loop.remembers = False
    fidelity.notes.append(f"no key-value cache: {loop.no_cache}")


def continued(loop: LentLoop, blocks: list[Block], truth: Truth) -> Tensor | str:
    """Logits of a text in three pieces with a cache between them, or why there are none."""
    if not loop.remembers:
        return loop.no_cache
    tokens, n = truth.tokens, truth.tokens.shape[1] - 2
    places = torch.arange(n + 2, device=tokens.device)[None]
    found = list[Tensor]()
    try:
        cache = (
            loop.own_cache() if loop.own_cache else DynamicCache(config=text_config(loop.module))
        )
        for piece in (slice(0, n), slice(n, n + 1), slice(n + 1, n + 2)):
            ids = places[:, piece]
            logits, _ = loop.run(blocks, tokens=tokens[:, piece], position_ids=ids, cache=cache)
            found.append(logits)
    except (AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as e:
        return f"{type(e).__name__}: {str(e).partition(chr(10))[0]}"
    return torch.cat(found, dim=1)
