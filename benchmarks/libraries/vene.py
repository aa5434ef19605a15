"""pyvene: a sweep is, for each layer, one batch whose rows are the patches of that layer."""

from __future__ import annotations

from typing import Any

import pyvene
import torch
from torch import Tensor

from libraries.given import Given, Run, last
from libraries.plain import load

PACKAGE = "pyvene"
__all__ = ["PACKAGE", "TASKS", "load"]


def at_layer(model: Any, layer: int, component: str, unit: str, **intervention: Any) -> Any:
    """The model with an intervention at a component of a layer."""
    where = pyvene.RepresentationConfig(layer, component, unit, **intervention)
    return pyvene.IntervenableModel(pyvene.IntervenableConfig([where]), model)


def cache_one(model: Any, given: Given) -> Run:
    collect = pyvene.CollectIntervention
    options = dict(intervention_type=collect, max_number_of_units=given.shape[1])
    collecting = at_layer(model, given.layer, "block_input", "pos", **options)
    where = {"base": list(range(given.shape[1]))}

    def result(answer: Any) -> Tensor:
        return answer[0][1][0].reshape(*given.shape, -1)

    return Run(lambda: collecting({"input_ids": given.tokens}, unit_locations=where), result)


def one_hook(model: Any, given: Given) -> Run:
    add = lambda base, source: base + 1  # noqa: E731
    adding = at_layer(model, given.layer, "block_input", "pos", intervention=add)
    where = {"base": list(range(given.shape[1]))}
    call = lambda: adding({"input_ids": given.tokens}, unit_locations=where)  # noqa: E731
    return Run(call, lambda answer: last(answer[1].logits))


def sweep(component: str, unit: str) -> Any:
    lengths = {"pos": ("pos",), "h": ("head",), "h.pos": ("pos", "head")}[unit]

    def make(model: Any, given: Given) -> Run:
        sizes = {"pos": given.shape[1], "head": given.n_heads}
        rows = list(torch.cartesian_prod(*(torch.arange(sizes[each]) for each in lengths)))
        rows = [row.reshape(-1).tolist() for row in rows]
        columns = [[[row[i]] for row in rows] for i in range(len(lengths))]
        # One list for each intervention, in it one for each row; of two units, heads come first.
        places = [(columns[1], columns[0])] if unit == "h.pos" else columns
        where = {"sources->base": (places, places)}
        layers = [
            at_layer(model, layer, component, unit, intervention_type=pyvene.VanillaIntervention)
            for layer in range(given.n_layers)
        ]
        base = {"input_ids": given.tokens.repeat(len(rows), 1)}
        source = {"input_ids": given.clean.repeat(len(rows), 1)}

        def call() -> Tensor:
            found = []
            for layer in layers:
                _, patched = layer(base, [source], where)
                found.append(given.differences(patched.logits[:, -1]))
            return torch.cat(found)

        return Run(call)

    return make


TASKS = {
    "cache_one": cache_one,
    "one_hook": one_hook,
    "resid_sweep": sweep("block_input", "pos"),
    "head_sweep": sweep("head_attention_value_output", "h"),
    "head_by_position": sweep("head_attention_value_output", "h.pos"),
}
