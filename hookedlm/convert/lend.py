"""Lend: build, place and check the blocks of a model that keeps Hugging Face's own loop."""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from hookedlm.axes import PATCHES, STREAM, STREAMS
from hookedlm.convert import hf
from hookedlm.convert.assembled import assemble
from hookedlm.convert.blocks import argument_names, checked_block
from hookedlm.convert.build import Block
from hookedlm.convert.check import Truth, check_block, precision_of, run_truth, within
from hookedlm.convert.check_lent import (
    EXACT,
    check_cache,
    check_pass,
    continued,
)
from hookedlm.convert.conversion import Conversion, NotDrivenError
from hookedlm.convert.guess import rows_of
from hookedlm.convert.hf import ConfigReads
from hookedlm.convert.interface import show_heads
from hookedlm.convert.lent import LentLoop, Slot
from hookedlm.convert.prepare import BlockCall
from hookedlm.convert.report import Fidelity, PartReport, worse
from hookedlm.convert.text_model import readable, text_config
from hookedlm.families import Row
from hookedlm.hooks import HookPoint
from hookedlm.layers.lent import LentBlock
from hookedlm.layers.opaque import OpaqueBlock
from hookedlm.spec import OpaqueSpec

Built = tuple[Block, BlockCall, PartReport]


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
    known = continued(loop, [], truths[1])  # by Hugging Face's blocks, still in their places
    blocks, loop.calls, parts = _unrolled(lending, uniform)
    for number in set(lending.order):
        block = blocks[loop.layers_of[number][0]]
        opaque = isinstance(block, OpaqueBlock)
        slot = Slot(modules[number], loop, truths[0].returned, number, opaque)
        slot.show(modules[number], row.asked)
        hf.replace_at(own, paths[number], slot)
    embed, logits = check_pass(loop, blocks, truths)
    fidelity.parts = [embed, *parts, logits]
    ours = continued(loop, blocks, truths[1])
    stream = truths[0].calls[0].hidden
    check_cache(loop, known, ours, precision_of(blocks, stream), fidelity)
    width = stream.shape[-1]
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
        reason = "; ".join(filter(None, [_listed(where), part.reason]))
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
            dtype = precision_of([module], truths[0].calls[layer].hidden)
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
        return PATCHES, None
    raise NotDrivenError(f"a block reads {shape}: no shape that a stream is known to have")
