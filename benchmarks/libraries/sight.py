"""nnsight: traces of Hugging Face's model; a sweep is one trace whose rows are the patches."""

from __future__ import annotations

from typing import Any

import nnsight
import torch
from nnsight import TransformersModel
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from libraries.given import BATCH, NEW_TOKENS, Given, Run, last
from libraries.plain import blocks, loss, out_projection

PACKAGE = "nnsight"
ROWS = 180
"""Patches in one trace, at most."""


def load(folder: str, device: str) -> Any:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return convert(model.to(device), folder)


def convert(model: Any, folder: str) -> Any:
    return TransformersModel(model, tokenizer=AutoTokenizer.from_pretrained(folder))


def forward(model: Any, given: Given) -> Run:
    def call() -> Tensor:
        with model.trace(given.tokens):
            logits = model.output.logits.save()
        return logits

    return Run(call, last)


def cache_all(model: Any, given: Given) -> Run:
    """Every module's output; patterns and what stands between modules are not among them."""

    def call() -> Any:
        with model.trace(given.tokens) as tracer:
            cache = tracer.cache(device=None, include_inputs=True)
        return cache

    def result(cache: Any) -> Tensor:
        path = (
            "model.transformer.h.{}" if "transformer" in model._modules else "model.model.layers.{}"
        )
        entering = [cache[path.format(i)].inputs for i in range(given.n_layers)]
        return torch.stack([(*args, *named.values())[0][:, -1] for args, named in entering])

    return Run(call, result)


def stream_at(model: Any, given: Given, tokens: Tensor) -> Tensor:
    """What enters the middle block; the run stops there."""
    block = blocks(model)[given.layer]
    with model.trace(tokens) as tracer:
        kept = block.input.save()
        tracer.stop()
    return kept


def cache_one(model: Any, given: Given) -> Run:
    return Run(lambda: stream_at(model, given, given.tokens))


def one_hook(model: Any, given: Given) -> Run:
    block = blocks(model)[given.layer]

    def call() -> Tensor:
        with model.trace(given.tokens):
            block.input = block.input + 1
            logits = model.output.logits.save()
        return logits

    return Run(call, last)


def sweep(module_of: Any, *lengths: str) -> Any:
    """Batch rows are patches: each layer's rows get their part of the clean run's activation."""

    def make(model: Any, given: Given) -> Run:
        sizes = {"pos": given.shape[1], "head": given.n_heads}
        modules = [module_of(block) for block in blocks(model)]
        with model.trace(given.clean):
            clean = nnsight.save([])
            for module in modules:
                clean.append(module.input.detach())
        cells = torch.cartesian_prod(
            torch.arange(given.n_layers), *(torch.arange(sizes[length]) for length in lengths)
        )

        def patched(x: Tensor, source: Tensor, rows: Tensor, where: Tensor) -> Tensor:
            x = x.clone()
            shape = (*x.shape[:2], given.n_heads, -1) if "head" in lengths else x.shape
            new, source = x.view(shape), source.view(1, *shape[1:])
            if lengths == ("head",):
                new[rows, :, where[:, 0]] = source[0, :, where[:, 0]].transpose(0, 1)
            else:
                index = where.unbind(1)
                new[(rows, *index)] = source[(0, *index)]
            return x

        def run(some: Tensor) -> Tensor:
            here = [(some[:, 0] == layer).nonzero()[:, 0] for layer in range(given.n_layers)]
            with model.trace(given.tokens.expand(len(some), -1)):
                for layer, module in enumerate(modules):
                    if len(here[layer]):
                        where = some[here[layer], 1:]
                        module.input = patched(module.input, clean[layer], here[layer], where)
                found = given.differences(model.output.logits[:, -1]).save()
            return found

        return Run(lambda: torch.cat([run(some) for some in cells.split(ROWS)]))

    return make


def gradients(model: Any, given: Given, frozen: bool = False) -> Run:
    streams = blocks(model)

    def call() -> Tensor:
        with model.trace(given.tokens):
            entering, grads = [], nnsight.save([])
            for i, block in enumerate(streams):
                if i == 0 and frozen:
                    block.input = block.input.detach().requires_grad_()
                entering.append(block.input)
            with loss(model.output.logits, given.tokens).backward():
                for x in reversed(entering):
                    grads.append(x.grad)
        return torch.stack(grads[::-1])

    def before() -> None:
        model.zero_grad()
        for parameter in model.parameters():
            parameter.requires_grad_(not frozen)

    return Run(call, before=before)


def gradients_frozen(model: Any, given: Given) -> Run:
    return gradients(model, given, frozen=True)


def generate(model: Any, given: Given) -> Run:
    options = dict(do_sample=False, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS)

    def call() -> Tensor:
        with model.generate(given.tokens, **options) as tracer:
            found = tracer.result.save()
        return found

    return Run(call)


def stream(model: Any, given: Given) -> Run:
    def call() -> Tensor:
        sums = [stream_at(model, given, rows).sum((0, 1)) for rows in given.tokens.split(BATCH)]
        return torch.stack(sums).sum(0)

    return Run(call)


TASKS = {
    "forward": forward,
    "cache_all": cache_all,
    "cache_one": cache_one,
    "one_hook": one_hook,
    "resid_sweep": sweep(lambda block: block, "pos"),
    "head_sweep": sweep(out_projection, "head"),
    "head_by_position": sweep(out_projection, "pos", "head"),
    "gradients": gradients,
    "gradients_frozen": gradients_frozen,
    "generate": generate,
    "stream": stream,
}
