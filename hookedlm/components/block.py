"""A whole block from a config."""

from __future__ import annotations

import functools
from typing import Any, get_args

from jaxtyping import Int
from torch import Tensor, nn

from hookedlm.components.part import Config, Part, Stream, become, checked_layer
from hookedlm.config import HookedTransformerConfig
from hookedlm.convert.build import Block
from hookedlm.layers.context import Context
from hookedlm.toy import LayerMaker, ToyPreparer


class TransformerBlock(nn.Module, metaclass=Part):
    """Block ``block_index`` of the model ``cfg`` describes. It runs alone too: ``block(resid)``.

    What it becomes an instance of besides, sequential or parallel, follows from the config.
    """

    stands_for = staticmethod(lambda module: isinstance(module, get_args(Block)))

    def __init__(self, cfg: Config, block_index: int):
        cfg = HookedTransformerConfig.unwrap(cfg)
        layer = checked_layer(block_index, cfg)
        built = LayerMaker(cfg).block(layer)
        layout: type = type(built)
        self.__class__ = with_layout(type(self), layout)
        become(self, built, cfg)
        self.block_index = block_index
        self.prepare = ToyPreparer(cfg)

    def forward(
        self,
        resid_pre: Stream,
        ctx: Context | None = None,
        *,
        attention_mask: Int[Tensor, "batch pos"] | None = None,
        shortformer_pos_embed: Stream | None = None,
    ) -> Stream:
        """The stream that leaves the block. A model passes ``ctx``; without one this is a pass over
        whole texts, padded as ``attention_mask`` (1 at real positions) says."""
        if ctx is None:
            prepared = self.prepare(
                embeds=resid_pre, attention_mask=attention_mask, pos_embed=shortformer_pos_embed
            )
            ctx = prepared.contexts[self.block_index]
        return super().forward(resid_pre, ctx)

    def __reduce__(self) -> tuple[Any, ...]:
        return empty, type(self).__bases__, vars(self)  # the class below has no name to pickle


@functools.cache
def with_layout(kind: type, layout: type) -> Any:
    """The subclass of both: the block of the user's kind with the forward pass of a layout."""
    return Part(kind.__name__, (kind, layout), {"__module__": kind.__module__})


def empty(kind: type, layout: type) -> Any:
    """Such a block without anything in it, for unpickling."""
    made = with_layout(kind, layout)
    return made.__new__(made)
