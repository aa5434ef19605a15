"""Outline: what a Hugging Face config's model is, in the words of ours, without any weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from hookedlm.convert import hf
from hookedlm.convert.assembled import assemble
from hookedlm.convert.blocks import form_of
from hookedlm.convert.build import Block, build_read_block
from hookedlm.convert.conversion import Conversion
from hookedlm.convert.describe import config_fields
from hookedlm.convert.ends import reading_out
from hookedlm.convert.guess import row_of
from hookedlm.convert.hf import ConfigReads
from hookedlm.convert.read import read_block
from hookedlm.convert.report import Fidelity, PartReport
from hookedlm.convert.text_model import auto_class, text_config
from hookedlm.errors import ConversionError
from hookedlm.families import Row
from hookedlm.layers.embed import Embed, PosEmbed
from hookedlm.layers.opaque import OpaqueBlock
from hookedlm.spec import OpaqueSpec


def outline_fields(hf_config: Any, name: str) -> dict[str, Any]:
    """The config fields of the model that transformers would build from ``hf_config``.

    The model is built on torch's meta device, which has shapes and no numbers: what a row reads is
    read, and nothing is checked by running it. Raises ConversionError where no model can be built
    or its blocks can't be found.
    """
    try:
        with torch.device("meta"):
            own = auto_class(hf_config).from_config(hf_config).eval()
        return config_fields(_outlined(own), name)
    except (AttributeError, LookupError, NotImplementedError, RuntimeError, ValueError) as error:
        if isinstance(error, ConversionError):
            raise
        raise ConversionError(
            f"a config of type {type(hf_config).__name__} could not be read without weights: "
            f"{type(error).__name__}: {error}"
        ) from error


def _outlined(own: Any) -> Conversion:
    config = ConfigReads(text_config(own))
    row, family = row_of(own)
    assemble(own, row)
    fidelity = Fidelity(own.config.model_type, type(own).__name__, "", family)
    blocks = []
    for layer, module in enumerate(hf.at(own, row.blocks)):
        block, form = _block(module, row, config)
        blocks.append(block)
        fidelity.parts.append(PartReport(f"blocks.{layer}", form))
    position = hf.find(own, row.pos_embed)
    ln_final, unembed = reading_out(own, row, config)
    return Conversion(
        own,
        row,
        Embed(hf.at(own, row.embed).weight),
        None if position is None else PosEmbed(hf.rows_of(position, row.pos_offset)),
        blocks,
        ln_final,
        unembed,
        tail=None,
        preparer=None,
        fidelity=fidelity,
    )


def _block(module: nn.Module, row: Row, config: ConfigReads) -> tuple[Block, str]:
    try:
        reading = read_block(module, row, config)
        return build_read_block(reading), form_of(reading)
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        return OpaqueBlock(OpaqueSpec("block", str(error)), module), "opaque block"
