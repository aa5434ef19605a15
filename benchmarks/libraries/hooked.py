"""This library."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import hookedlm
from hookedlm import patching
from libraries.given import BATCH, NEW_TOKENS, Given, Run, last

PACKAGE = "hookedlm"


def load(folder: str, device: str) -> Any:
    return hookedlm.load(folder, device=device)


def convert(model: Any, folder: str) -> Any:
    return hookedlm.load(model)


def forward(model: Any, given: Given) -> Run:
    return Run(lambda: model(given.tokens), last)


def cache_all(model: Any, given: Given) -> Run:
    def result(answer: Any) -> Tensor:
        cache = answer[1]
        return torch.stack([cache["resid_pre", i][:, -1] for i in range(given.n_layers)])

    return Run(lambda: model.run_with_cache(given.tokens), result)


def cache_all_read(model: Any, given: Given) -> Run:
    def call() -> Any:
        _, cache = model.run_with_cache(given.tokens)
        return [cache[name] for name in cache], cache

    def result(answer: Any) -> Tensor:
        cache = answer[1]
        return torch.stack([cache["pattern", i][:, :, -1] for i in range(given.n_layers)])

    return Run(call, result)


def cache_one(model: Any, given: Given) -> Run:
    name = f"blocks.{given.layer}.hook_resid_pre"
    return Run(lambda: model.cache(given.tokens, name), lambda cache: cache[name])


def one_hook(model: Any, given: Given) -> Run:
    hooks = [(f"blocks.{given.layer}.hook_resid_pre", lambda x, hook: x + 1)]
    return Run(lambda: model.run_with_hooks(given.tokens, fwd_hooks=hooks), last)


def sweep(of: Any, activation: str) -> Any:
    def make(model: Any, given: Given) -> Run:
        cache = model.cache(given.clean, f"*.hook_{activation}")
        return Run(lambda: of(model, given.tokens, cache, given.metric), Tensor.flatten)

    return make


def head_attribution(model: Any, given: Given) -> Run:
    cache = {}

    def before() -> None:
        cache["of"] = model.run_with_cache(given.tokens)[1]

    call = lambda: cache["of"].head_logit_attrs(*given.answers, pos_slice=-1)  # noqa: E731
    return Run(call, before=before)


def neuron_attribution(model: Any, given: Given) -> Run:
    cache = {}

    def before() -> None:
        cache["of"] = model.run_with_cache(given.tokens)[1]

    call = lambda: cache["of"].neuron_logit_attrs(*given.answers)  # noqa: E731
    return Run(call, lambda found: found[..., -1], before)


def gradients(model: Any, given: Given, frozen: bool = False) -> Run:
    names = [f"blocks.{i}.hook_resid_pre" for i in range(given.n_layers)]
    options = dict(return_type="loss", names_filter=names, incl_bwd=True)

    def call() -> Any:
        return model.run_with_cache(given.tokens, **options)[1]

    def before() -> None:
        model.zero_grad()
        model.requires_grad_(not frozen)

    return Run(call, lambda cache: torch.stack([cache[f"{name}_grad"] for name in names]), before)


def gradients_frozen(model: Any, given: Given) -> Run:
    return gradients(model, given, frozen=True)


def generate(model: Any, given: Given) -> Run:
    options = dict(do_sample=False, max_new_tokens=NEW_TOKENS, stop_at_eos=False, verbose=False)
    return Run(lambda: model.generate(given.tokens, **options))


def stream(model: Any, given: Given) -> Run:
    name = f"blocks.{given.layer}.hook_resid_pre"

    def call() -> Tensor:
        batches = model.stream(given.tokens, name, BATCH, progress=False)
        return torch.stack([batch[name].sum(0) for batch in batches]).sum(0)

    return Run(call)


TASKS = {
    "forward": forward,
    "cache_all": cache_all,
    "cache_all_read": cache_all_read,
    "cache_one": cache_one,
    "one_hook": one_hook,
    "resid_sweep": sweep(patching.get_act_patch_resid_pre, "resid_pre"),
    "head_sweep": sweep(patching.get_act_patch_attn_head_out_all_pos, "z"),
    "head_by_position": sweep(patching.get_act_patch_attn_head_out_by_pos, "z"),
    "head_attribution": head_attribution,
    "neuron_attribution": neuron_attribution,
    "gradients": gradients,
    "gradients_frozen": gradients_frozen,
    "generate": generate,
    "stream": stream,
}
