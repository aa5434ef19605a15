"""Our copy of Hugging Face's model without what our own layers do."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hookedlm.convert import hf
from hookedlm.convert.conversion import Conversion
from hookedlm.layers.embed import Embed


class _Passes(nn.Identity):
    """Stands where a final norm was. Some bases ask that for its weight's dtype."""

    def __init__(self, weight: Tensor | None):
        super().__init__()
        empty = None if weight is None else weight.detach().new_empty(0)
        self.register_buffer("weight", empty, persistent=False)


class _Nothing(nn.Module):
    """Stands where a position embedding was: adds zero to whatever it is added to. Some bases ask
    their first parameter for its dtype: this one."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.weight = nn.Parameter(weight.detach().new_empty(0), requires_grad=False)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return torch.zeros(())


class _Words(nn.Module):
    """Stands where the token embedding was: asks ours, which owns the weights now."""

    def __init__(self, embed: Embed):
        super().__init__()
        self.embed = [embed]  # in a list, so that it is no sub-module

    def forward(self, x: Tensor) -> Tensor:
        return x if x.is_floating_point() else self.embed[0].words(x)


def strip(conversion: Conversion) -> None:
    """Take out of our copy of the base what our own layers do, so that it holds no weights."""
    own, row = conversion.own, conversion.row
    norm = _Passes(getattr(hf.find(own, row.ln_final), "weight", None))
    gone: list[tuple[Any, Any]] = [(row.ln_final, norm), (row.unembed_proj, None)]
    gone += [(place, nn.Identity()) for place in (row.unembed, row.head_dense, row.head_norm)]
    if conversion.embed is not None:
        gone += [(row.embed_proj, None), (row.embed_norm, nn.Identity())]
        W_E = conversion.embed.W_E
        gone += [(row.pos_embed, _Nothing(W_E)), (row.embed, _Words(conversion.embed))]
        gone += [(row.type_embed, _Nothing(W_E)), (row.embed_sum_norm, nn.Identity())]
    for places, stand_in in gone:
        for place in (places,) if isinstance(places, str) else places or ():
            if isinstance(hf.find(own, place), nn.Module):
                hf.replace_at(own, place, stand_in)
