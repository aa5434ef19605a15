"""Plain transformers, with PyTorch's own hooks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from libraries.given import BATCH, NEW_TOKENS, Given, Run, last

PACKAGE = "transformers"


def load(folder: str, device: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().to(device)


def blocks(model: Any) -> Any:
    """The list of blocks."""
    return model.transformer.h if model.config.model_type == "gpt2" else model.model.layers


def out_projection(block: Any) -> Any:
    """What the heads' outputs, one beside the other, enter."""
    return block.attn.c_proj if "attn" in block._modules else block.self_attn.o_proj


@contextmanager
def entering(module: Any, edit: Callable[[Tensor], Tensor | None]):
    """Within the context ``edit`` sees, and may replace, a module's input."""

    def hook(module: Any, args: Any, kwargs: Any) -> Any:
        if args:
            new = edit(args[0])
            return None if new is None else ((new, *args[1:]), kwargs)
        new = edit(kwargs["hidden_states"])
        return None if new is None else (args, kwargs | {"hidden_states": new})

    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


class Stop(Exception):
    """Raised where a run need not go on."""


def forward(model: Any, given: Given) -> Run:
    return Run(lambda: model(given.tokens, use_cache=False).logits, last)


def cache_one(model: Any, given: Given) -> Run:
    return Run(lambda: stream_at(model, given, given.tokens))


def stream_at(model: Any, given: Given, tokens: Tensor) -> Tensor:
    """What enters the middle block; the run stops there."""
    kept = []

    def keep(x: Tensor) -> None:
        kept.append(x)
        raise Stop

    with entering(blocks(model)[given.layer], keep):
        try:
            model(tokens, use_cache=False)
        except Stop:
            return kept[0]
    raise AssertionError


def one_hook(model: Any, given: Given) -> Run:
    def call() -> Tensor:
        with entering(blocks(model)[given.layer], lambda x: x + 1):
            return model(given.tokens, use_cache=False).logits

    return Run(call, last)


Put = Callable[[Tensor, Tensor, Sequence[int]], None]
"""(activation, that of the clean run, where) -> nothing: the place is overwritten."""


def one_by_one(module_of: Any, put: Put, *lengths: str) -> Any:
    """A run for each cell of a grid, patched at the input of a module of its layer."""

    def make(model: Any, given: Given) -> Run:
        sizes = {"pos": given.shape[1], "head": given.n_heads}
        clean: dict[int, Tensor] = {}
        for layer, block in enumerate(blocks(model)):
            with entering(module_of(block), lambda x, layer=layer: clean.update({layer: x})):
                model(given.clean)

        def patched(layer: int, *where: int) -> Tensor:
            def edit(x: Tensor) -> Tensor:
                shape = x.shape if "head" not in lengths else (*x.shape[:2], given.n_heads, -1)
                x = x.clone()
                put(x.view(shape), clean[layer].view(shape), where)
                return x

            with entering(module_of(blocks(model)[layer]), edit):
                return given.metric(model(given.tokens, use_cache=False).logits)

        cells = given.cells(*(sizes[length] for length in lengths))
        return Run(lambda: torch.stack([patched(*cell) for cell in cells]), every=given.every)

    return make


def put_first(x: Tensor, clean: Tensor, where: Sequence[int]) -> None:
    """``where``: along the axes behind the batch."""
    here = (slice(None), *where)
    x[here] = clean[here]


def put_head(x: Tensor, clean: Tensor, where: Sequence[int]) -> None:
    """``where``: along the axis of heads, at all positions."""
    x[:, :, where[0]] = clean[:, :, where[0]]


def gradients(model: Any, given: Given, frozen: bool = False) -> Run:
    def call() -> Tensor:
        kept: list[Tensor] = []

        def keep(x: Tensor) -> Tensor:
            if not x.requires_grad:
                x = x.detach().requires_grad_()
            x.retain_grad()
            kept.append(x)
            return x

        handles = [entering(block, keep) for block in blocks(model)]
        for handle in handles:
            handle.__enter__()
        logits = model(given.tokens, use_cache=False).logits
        for handle in handles:
            handle.__exit__(None, None, None)
        loss(logits, given.tokens).backward()
        return torch.stack([x.grad for x in kept])

    def before() -> None:
        model.zero_grad()
        model.requires_grad_(not frozen)

    return Run(call, before=before)


def loss(logits: Tensor, tokens: Tensor) -> Tensor:
    """Mean loss of the next token."""
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def gradients_frozen(model: Any, given: Given) -> Run:
    return gradients(model, given, frozen=True)


def generate(model: Any, given: Given) -> Run:
    mask = torch.ones_like(given.tokens)
    options = dict(do_sample=False, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS)
    return Run(lambda: model.generate(given.tokens, attention_mask=mask, **options))


def stream(model: Any, given: Given) -> Run:
    def call() -> Tensor:
        sums = [stream_at(model, given, rows).sum((0, 1)) for rows in given.tokens.split(BATCH)]
        return torch.stack(sums).sum(0)

    return Run(call)


TASKS = {
    "forward": forward,
    "cache_one": cache_one,
    "one_hook": one_hook,
    "resid_sweep": one_by_one(lambda block: block, put_first, "pos"),
    "head_sweep": one_by_one(out_projection, put_head, "head"),
    "head_by_position": one_by_one(out_projection, put_first, "pos", "head"),
    "gradients": gradients,
    "gradients_frozen": gradients_frozen,
    "generate": generate,
    "stream": stream,
}
