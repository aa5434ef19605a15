"""Lend: build, place and check the blocks of a model that keeps Hugging Face's own loop."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from hookedlm.axes import STREAM, STREAMS
from hookedlm.convert import hf
from hookedlm.convert.assembled import assemble
from hookedlm.convert.build import Block
from hookedlm.convert.check import (
    Truth,
    check_block,
    compare,
    listen_to_all,
    run_truth,
    within,
)
from hookedlm.convert.convert import (
    Conversion,
    NotDrivenError,
    argument_names,
    checked_block,
)
from hookedlm.convert.guess import rows_of
from hookedlm.convert.hf import ConfigReads
from hookedlm.convert.interface import show_heads
from hookedlm.convert.lent import LentLoop, Slot
from hookedlm.convert.prepare import BlockCall
from hookedlm.convert.report import Agreement, Fidelity, PartReport, worse
from hookedlm.convert.text_model import readable, text_config
from hookedlm.families import Row
from hookedlm.hooks import HookPoint, attached
from hookedlm.layers.lent import LentBlock
from hookedlm.layers.opaque import OpaqueBlock
from hookedlm.spec import OpaqueSpec

Built = tuple[Block, BlockCall, PartReport]

EXACT = Agreement(0.0, True)


@dataclass
class Lending:
    """What is known of a model that is to keep its loop."""

    own: Any
    row: Row
    config: ConfigReads
    paths: list[str]
    modules: list[nn.Module]
    truths: list[Truth]
    reason: str

    @property
    def order(self) -> list[int]:
        """Which block each layer is a visit of."""
        return self.truths[0].order


@torch.no_grad()
def lend(model: nn.Module, why: str, row: Row | None = None) -> Conversion:
    """A conversion in which Hugging Face's forward runs, over our blocks.

    Blocks that have a uniform form on every visit are uniform; the others run as they were written,
    with hooks at both ends. ``why`` says what stands against a loop of ours, ``row`` where the
    blocks are, if the type's own or a guess is not to. Raises NotDrivenError where the same logits
    do not come out.
    """
    try:
        return _lent(model, why, row, uniform=True)
    except NotDrivenError:
        return _lent(model, why, row, uniform=False)


def _lent(model: nn.Module, why: str, given: Row | None, uniform: bool) -> Conversion:
    own = hf.skeleton(readable(model)).eval()
    config = ConfigReads(text_config(own))
    rows, family = rows_of(own, given)
    row = rows[0]
    assemble(own, row)
    paths = _paths(own, row)
    modules = [hf.at(own, path) for path in paths]
    d_vocab = hf.rows_of_tokens(own, row.embed)
    start = hf.first_position(hf.find(own, row.pos_embed))
    truths = [run_truth(own, modules, d_vocab, padded, start) for padded in (True, False)]
    lending = Lending(own, row, config, paths, modules, truths, why)
    if not lending.order or lending.order != truths[1].order:
        raise NotDrivenError("its blocks do not run in one and the same order")
    model_type = str(hf.find(own, "config.model_type") or "no config")
    fidelity = Fidelity(model_type, type(model).__name__, str(truths[0].logits.dtype)[6:], family)
    fidelity.notes.append(f"Hugging Face's own loop runs the blocks lent to it: {why}")
    loop = LentLoop(own, row, paths, lending.order)
    loop.first_position = start
    continued = _continued(loop, [], truths[1])  # by Hugging Face's blocks, still in their places
    blocks, loop.calls, parts = _unrolled(lending, uniform)
    for number in set(lending.order):
        block = blocks[loop.layers_of[number][0]]
        opaque = isinstance(block, OpaqueBlock)
        slot = Slot(modules[number], loop, truths[0].returned, number, opaque)
        slot.show(modules[number], row.asked)
        hf.replace_at(own, paths[number], slot)
    embed, logits = _checked(loop, blocks, truths)
    fidelity.parts = [embed, *parts, logits]
    _check_cache(loop, continued, _continued(loop, blocks, truths[1]), fidelity)
    width = truths[0].calls[0].hidden.shape[-1]
    return Conversion(
        own, row, None, None, blocks, None, None, None, loop, fidelity, width=width
    )  # fmt: skip


def _paths(own: Any, row: Row) -> list[str]:
    """Where every block is: those of the row, else all in lists of modules of the same class."""
    lists = [row.blocks, *row.more_blocks]
    if not row.more_blocks:
        kind = type(hf.at(own, row.blocks)[0])
        lists += [
            name
            for name, module in own.named_modules()
            if isinstance(module, nn.ModuleList)
            and name != row.blocks
            and any(type(item) is kind for item in module)
        ]
    return [f"{place}.{i}" for place in lists for i in range(len(hf.at(own, place)))]


# Blocks -------------------------------------------------------------------------------------------


def _unrolled(
    lending: Lending, uniform: bool
) -> tuple[list[Block], list[BlockCall], list[PartReport]]:
    """One block for every visit, those of one module on the same parameters."""
    order, first_visit = lending.order, dict[int, Built]()
    seen, built = Counter[int](), list[Built]()
    for layer, number in enumerate(order):
        if number not in first_visit:
            layers = [i for i, other in enumerate(order) if other == number]
            first_visit[number] = _block(lending, number, layers, uniform)
        block, call, part = first_visit[number]
        if seen[number]:
            block = another(block)
        seen[number] += 1
        where = lending.paths[number]
        if order.count(number) > 1:
            where += f", visit {seen[number]} of {order.count(number)}"
        reason = "; ".join(filter(None, [where.rpartition(".")[0] and _listed(where), part.reason]))
        built.append((block, call, replace(part, where=f"blocks.{layer}", reason=reason)))
    blocks, calls, parts = zip(*built, strict=True)
    return list(blocks), list(calls), list(parts)


def _listed(where: str) -> str:
    """The list a block is of, without its number, so that neighbours read the same."""
    path, comma, visit = where.partition(",")
    return path.rpartition(".")[0] + comma + visit


def another(block: Block) -> Block:
    """The same block with hook points of its own: every parameter is shared."""
    memo: dict[int, Any] = {id(x): x for x in (*block.parameters(), *block.buffers())}
    return copy.deepcopy(block, memo)


def _block(lending: Lending, number: int, layers: list[int], uniform: bool) -> Built:
    """One block: uniform if it is on every visit, else as it was written."""
    module, truths, config = lending.modules[number], lending.truths, lending.config
    if uniform and _plain(lending, number, layers):
        block, call, part = checked_block(module, lending.row, config, truths, layers[0])
        same = not isinstance(block, OpaqueBlock)
        for layer in layers[1:] if same else []:
            quiet, listening = check_block(block, call, truths, layer)
            dtype = truths[0].calls[layer].hidden.dtype
            same = same and within(quiet, dtype) and within(listening, dtype)
            part = replace(
                part,
                quiet=worse(part.quiet, quiet),
                listening=worse(part.listening, listening),
            )
        if same:
            return block, call, show_heads(part, block, call, truths, layers[0])
    axes, moved = _axes(lending, layers[0])
    lent = LentBlock(OpaqueSpec("block", lending.reason), module, axes, moved)
    call = BlockCall(argument_names(module), opaque=True)
    report = PartReport("", "opaque block", EXACT, EXACT)
    report = show_heads(report, lent, call, truths, layers[0])
    if "patch" in axes:
        for point in points_in(lent):
            own = point.axes or ()
            point.axes = tuple("patch" if axis == "pos" else axis for axis in own)
    return lent, call, report


def points_in(module: nn.Module) -> list[HookPoint]:
    """All hook points of a module."""
    return [point for point in module.modules() if isinstance(point, HookPoint)]


def _plain(lending: Lending, number: int, layers: list[int]) -> bool:
    """Whether a block takes one stream and returns nothing else."""
    truth = lending.truths[0]
    streams = [truth.calls[layer].hidden.shape[:-1] for layer in layers]
    return number not in truth.hands_on and all(s == truth.real.shape for s in streams)


def _axes(lending: Lending, layer: int) -> tuple[str, tuple[int, int] | None]:
    """(axes of what a block reads, batch first; which axis of the model's is elsewhere in them),
    from its sizes on the check's batch. Raises NotDrivenError on a stream of unknown shape."""
    shape = tuple(lending.truths[0].calls[layer].hidden.shape)
    here = tuple(lending.truths[0].real.shape)
    if len(shape) == 4 and here in (shape[:2], shape[1:3]):
        return STREAMS, None if shape[:2] == here else (0, 2)
    if len(shape) == 3 and here in (shape[:2], shape[1::-1]):
        return STREAM, None if shape[:2] == here else (0, 1)
    if len(shape) == 3 and shape[0] == here[0]:
        return "batch patch d_model", None
    raise NotDrivenError(f"a block reads {shape}: no shape that a stream is known to have")


# Checking -----------------------------------------------------------------------------------------


def _checked(
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
    dtype = truths[0].logits.dtype
    spread = len(blocks)  # longhand rounds otherwise in every block
    each = Agreement(listening.error / spread, False, listening.typical / spread)
    if not (within(quiet, dtype) and within(each, dtype, reroutes=True)):
        error = max(quiet.error, listening.error)
        raise NotDrivenError(f"in its own loop the logits are {error:.1e} away")
    shown = [
        len(seen) == 1 and seen[0].shape[:2] == truth.real.shape
        for seen, truth in zip(embeds, truths, strict=True)
    ]
    loop.shows_embed = all(shown)
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


def _check_cache(
    loop: LentLoop, theirs: Tensor | str, ours: Tensor | str, fidelity: Fidelity
) -> None:
    """Whether the model can be continued from a cache, as Hugging Face's own blocks can."""
    if isinstance(theirs, str) or isinstance(ours, str):
        loop.no_cache = theirs if isinstance(theirs, str) else str(ours)
    else:
        agreement = compare(ours, theirs, torch.ones_like(ours[..., 0]).bool())
        if within(agreement, theirs.dtype):
            return
        loop.no_cache = f"continued logits are {agreement.error:.1e} away"
    loop.remembers = False
    fidelity.notes.append(f"no key-value cache: {loop.no_cache}")


def _continued(loop: LentLoop, blocks: list[Block], truth: Truth) -> Tensor | str:
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
