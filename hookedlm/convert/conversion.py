"""What converting a model yields: the layers, and everything needed to run them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from hookedlm.axes import STREAM
from hookedlm.convert.build import Block
from hookedlm.convert.report import Fidelity
from hookedlm.convert.tail import OpaqueTail
from hookedlm.errors import ConversionError
from hookedlm.families import Row
from hookedlm.layers.bert import BertMLMHead
from hookedlm.layers.embed import Embed, PosEmbed, TokenTypeEmbed, Unembed
from hookedlm.layers.norm import Norm


class NotDrivenError(ConversionError):
    """Why a loop of ours can't stand in for Hugging Face's."""


@dataclass
class Conversion:
    """The layers of a converted model, and everything needed to run them."""

    own: Any
    """Our copy of Hugging Face's modules: positions, masks and opaque parts live here."""
    row: Row
    embed: Embed | None
    pos_embed: PosEmbed | None
    blocks: list[Block]
    ln_final: nn.Module | None
    unembed: Unembed | None
    tail: OpaqueTail | None
    preparer: Any
    """An `HFPreparer`, or the `LentLoop` to which the blocks are lent."""
    fidelity: Fidelity
    type_embed: TokenTypeEmbed | None = None
    embed_ln: Norm | None = None
    mlm_head: BertMLMHead | None = None
    width: int | None = None
    """Width of the stream, where neither an embedding nor a norm of ours tells it."""
    stream_axes: str = STREAM
    """Axes of the stream: in some models it has other positions than the tokens."""
