"""What TransformerLens 2 and 4 have in common, which is nearly everything."""

from __future__ import annotations

from typing import Any

import pandas as pd
import torch
from torch import Tensor
from transformer_lens import ActivationCache, patching

from libraries.given import BATCH, NEW_TOKENS, Given, Run, TooLargeError, last

PACKAGE = "transformer-lens"


def forward(model: Any, given: Given) -> Run:
    return Run(lambda: model(given.tokens), last)


def cache_all(model: Any, given: Given) -> Run:
    def result(answer: Any) -> Tensor:
        cache = answer[1]
        return torch.stack([cache["resid_pre", i][:, -1] for i in range(given.n_layers)])

    return Run(lambda: model.run_with_cache(given.tokens), result)


def cache_all_read(model: Any, given: Given) -> Run:
    """Everything is there once it is cached."""

    def result(answer: Any) -> Tensor:
        cache = answer[1]
        return torch.stack([cache["pattern", i][:, :, -1] for i in range(given.n_layers)])

    return Run(lambda: model.run_with_cache(given.tokens), result)


def stream_at(model: Any, given: Given, tokens: Tensor) -> Tensor:
    """What enters the middle block; the run stops there."""
    name = f"blocks.{given.layer - 1}.hook_resid_post"
    options = dict(return_type=None, names_filter=name, stop_at_layer=given.layer)
    return model.run_with_cache(tokens, **options)[1][name]


def cache_one(model: Any, given: Given) -> Run:
    return Run(lambda: stream_at(model, given, given.tokens))


def one_hook(model: Any, given: Given) -> Run:
    hooks = [(f"blocks.{given.layer}.hook_resid_pre", lambda x, hook: x + 1)]
    return Run(lambda: model.run_with_hooks(given.tokens, fwd_hooks=hooks), last)


def sweep(activation: str, setter: Any, *axes: str) -> Any:
    def make(model: Any, given: Given) -> Run:
        names = lambda name: name.endswith(f"hook_{activation}")  # noqa: E731
        cache = model.run_with_cache(given.clean, names_filter=names)[1]
        sizes = {"pos": given.shape[1], "head": given.n_heads}
        cells = given.cells(*(sizes[axis] for axis in axes))
        rows = pd.DataFrame(cells, columns=["layer", *axes])
        arguments = (model, given.tokens, cache, given.metric, setter, activation)
        call = lambda: patching.generic_activation_patch(*arguments, index_df=rows)  # noqa: E731
        return Run(call, every=given.every)

    return make


def attribution(stack: Any) -> Any:
    def make(model: Any, given: Given) -> Run:
        found: dict[str, Any] = {}

        def before() -> None:
            if "cache" not in found:
                found["cache"] = model.run_with_cache(given.tokens)[1]
            # What is stacked is kept in the cache, and would be there the next time.
            found["fresh"] = ActivationCache(dict(found["cache"].cache_dict), model)

        return Run(lambda: stack(found["fresh"], given), lambda x: x, before)

    return make


def heads(cache: Any, given: Given) -> Tensor:
    """What each head adds to the difference of two logits at the last position."""
    right, wrong = given.answers
    stack = cache.stack_head_results(layer=-1, pos_slice=-1)
    return cache.logit_attrs(stack, right, incorrect_tokens=wrong, pos_slice=-1)


def neuron_attribution(model: Any, given: Given) -> Run:
    batch, pos = given.shape
    size = given.n_layers * model.cfg.d_mlp * batch * pos * model.cfg.d_model * 4
    if 2 * size > given.room:
        raise TooLargeError(f"its stack alone takes {size / 1e9:.1f} GB")

    def neurons(cache: Any, given: Given) -> Tensor:
        right, wrong = given.answers
        return cache.logit_attrs(cache.stack_neuron_results(-1), right, incorrect_tokens=wrong)

    return attribution(neurons)(model, given)._replace(result=lambda found: found[..., -1])


def gradients(model: Any, given: Given) -> Run:
    names = [f"blocks.{i}.hook_resid_pre" for i in range(given.n_layers)]
    options = dict(return_type="loss", names_filter=lambda name: name in names, incl_bwd=True)
    return Run(
        lambda: model.run_with_cache(given.tokens, **options)[1],
        lambda cache: torch.stack([cache[f"{name}_grad"] for name in names]),
        model.zero_grad,
    )


def generate(model: Any, given: Given) -> Run:
    options = dict(do_sample=False, max_new_tokens=NEW_TOKENS, stop_at_eos=False, verbose=False)
    return Run(lambda: model.generate(given.tokens, **options))


def stream(model: Any, given: Given) -> Run:
    def call() -> Tensor:
        sums = [stream_at(model, given, rows).sum((0, 1)) for rows in given.tokens.split(BATCH)]
        return torch.stack(sums).sum(0)

    return Run(call)


Z, RESID = patching.layer_head_vector_patch_setter, patching.layer_pos_patch_setter

TASKS = {
    "forward": forward,
    "cache_all": cache_all,
    "cache_all_read": cache_all_read,
    "cache_one": cache_one,
    "one_hook": one_hook,
    "resid_sweep": sweep("resid_pre", RESID, "pos"),
    "head_sweep": sweep("z", Z, "head"),
    "head_by_position": sweep("z", patching.layer_pos_head_vector_patch_setter, "pos", "head"),
    "head_attribution": attribution(heads),
    "neuron_attribution": neuron_attribution,
    "gradients": gradients,
    "generate": generate,
    "stream": stream,
}
