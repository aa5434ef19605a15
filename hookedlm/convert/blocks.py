"""Every block of a model: read, built, compared with Hugging Face's; opaque where that fails."""

from __future__ import annotations

import inspect

import torch
from torch import nn

from hookedlm.convert import hf
from hookedlm.convert.build import Block, build_read_block
from hookedlm.convert.check import HALVES, Truth, check_block, precision_of, within
from hookedlm.convert.check_rounding import AGREES, only_rounds
from hookedlm.convert.hf import ConfigReads
from hookedlm.convert.interface import show_heads
from hookedlm.convert.prepare import BlockCall
from hookedlm.convert.read import (
    AttentionReading,
    BlockReading,
    MoEReading,
    OpaqueReading,
    read_block,
)
from hookedlm.convert.read_latent import LatentReading
from hookedlm.convert.report import Agreement, Fidelity, PartReport
from hookedlm.convert.temperature import Temperature
from hookedlm.families import Row
from hookedlm.layers.opaque import OpaqueBlock
from hookedlm.spec import OpaqueSpec


def best_row(
    rows: list[Row], layers: list[nn.Module], config: ConfigReads, truths: list[Truth]
) -> Row:
    """The row that leaves least of the first block opaque; the first of those."""
    if len(rows) == 1:
        return rows[0]
    forms = [checked_block(layers[0], row, config, truths, 0)[2].form for row in rows]
    ranks = [
        2 * ("opaque block" in form) + form.count(" and ") + ("opaque" in form) for form in forms
    ]
    return rows[ranks.index(min(ranks))]


def checked_blocks(
    layers: list[nn.Module],
    row: Row,
    config: ConfigReads,
    truths: list[Truth],
    fidelity: Fidelity,
) -> tuple[list[Block], list[BlockCall]]:
    """The blocks, and how each is called; what became of each is added to ``fidelity``."""
    blocks, calls = [], []
    for layer, module in enumerate(layers):
        block, call, part = checked_block(module, row, config, truths, layer)
        part = show_heads(part, block, call, truths, layer)
        blocks.append(block)
        calls.append(call)
        fidelity.parts.append(part)
    return blocks, calls


def checked_block(
    module: nn.Module, row: Row, config: ConfigReads, truths: list[Truth], layer: int
) -> tuple[Block, BlockCall, PartReport]:
    """One block: uniform if it can be read completely and computes the same both ways."""
    where = f"blocks.{layer}"
    if layer in truths[0].skipped:
        reason = "text alone does not pass through it"
        whole = OpaqueBlock(OpaqueSpec("block", reason), module)
        call = BlockCall(argument_names(module), opaque=True, may_skip=True)
        return whole, call, PartReport(where, "opaque block", Agreement(0.0, True), None, reason)
    given = BlockCall(argument_names(module), opaque=True).bound(truths[0].calls[layer])
    if given.get(row.rotary_given, row) is None:
        row = row.but(rotary=None)  # the loop gives this layer no tables
    try:
        reading = read_block(module, row, config)
        block, call = _built(module, row, reading)
        quiet, listening = check_block(block, call, truths, layer)
        dtype = precision_of([module], truths[0].calls[layer].hidden)
        routed = isinstance(reading.mlp, MoEReading)
        agrees = within(quiet, dtype) and within(listening, dtype, reroutes=routed)
        if not agrees and dtype in HALVES:

            def read(module: nn.Module) -> tuple[Block, BlockCall]:
                return _built(module, row, read_block(module, row, config))

            if agrees := only_rounds(module, read, truths, layer, routed):
                reading.notes.append(AGREES)
        if agrees:
            reason = "; ".join([*reading.notes, *_opaque_reasons(reading)])
            return block, call, PartReport(where, form_of(reading), quiet, listening, reason)
        reason = f"read as a uniform block, but {max(quiet.error, listening.error):.1e} away"
    except (
        AssertionError,
        AttributeError,
        LookupError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:
        reason = f"not read: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
    opaque = OpaqueBlock(OpaqueSpec("block", reason), module)
    call = BlockCall(argument_names(module), opaque=True)
    quiet, listening = check_block(opaque, call, truths, layer)
    return opaque, call, PartReport(where, "opaque block", quiet, listening, reason)


def _built(module: nn.Module, row: Row, reading: BlockReading) -> tuple[Block, BlockCall]:
    return build_read_block(reading), _call_of(module, row, reading)


def form_of(reading: BlockReading) -> str:
    """How a block is told of in a report: uniform with its layout, or with which opaque parts."""
    opaque = [
        what
        for what, part in (
            ("attention", reading.attn),
            ("MLP", reading.mlp),
            ("mixer", reading.mixer),
            *reading.opaque_norms.items(),
        )
        if isinstance(part, OpaqueReading)
    ]
    if opaque:
        return f"opaque {' and '.join(opaque)} in uniform block"
    return f"uniform, {reading.spec.layout}"


def _opaque_reasons(reading: BlockReading) -> list[str]:
    parts = (reading.attn, reading.mlp, reading.mixer, *reading.opaque_norms.values())
    return [part.spec.reason for part in parts if isinstance(part, OpaqueReading)]


def argument_names(module: nn.Module) -> tuple[str, ...]:
    """What a block takes besides the stream, in order."""
    parameters = list(inspect.signature(module.forward).parameters.values())[1:]
    return tuple(p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD)


def _call_of(module: nn.Module, row: Row, reading: BlockReading) -> BlockCall:
    table = hf.find(module, row.mask_table)
    attn = reading.attn if isinstance(reading.attn, AttentionReading) else None
    opaque = any(isinstance(p, OpaqueReading) for p in (reading.attn, reading.mlp, reading.mixer))
    sparse = isinstance(attn, LatentReading) and attn.spec.sparse
    rotary = None if attn is None else attn.rotary_style
    return BlockCall(
        argument_names(module),
        opaque=opaque or sparse,
        picks=row.picks_given if sparse else None,
        mask_hides=row.mask_hides,
        bias=row.bias if isinstance(row.bias, str) else None,
        n_heads=0 if attn is None else attn.spec.n_heads,
        rotary=rotary,
        attn=attn.module if attn is not None and rotary == "pairs" else None,
        mask_table=None if table is None else table.bool(),
        table_is_causal=table is not None and bool((table == torch.ones_like(table).tril()).all()),
        tables_given=row.rotary_given,
        tables=None if rotary is None else hf.find(module, row.rotary_tables),
        temperature=None
        if attn is None or attn.spec.temperature is None
        else Temperature(attn.spec.temperature, attn.module),
    )
