"""The sweeps everybody runs, under TransformerLens' names: a table."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from hookedlm.cache import ActivationCache
from hookedlm.model import HookedTransformer
from hookedlm.patching.classic import (
    Grid,
    PatchSetter,
    Tokens,
    generic_activation_patch,
    layer_head_dest_src_pos_pattern_patch_setter,
    layer_head_pattern_patch_setter,
    layer_head_pos_pattern_patch_setter,
    layer_head_vector_patch_setter,
    layer_pos_head_vector_patch_setter,
    layer_pos_patch_setter,
)
from hookedlm.patching.metric import Function, Metric


def _sweep(
    name: str, activation: str, setter: PatchSetter, axes: tuple[str, ...]
) -> Callable[..., Any]:
    def sweep(
        model: HookedTransformer,
        corrupted_tokens: Tokens,
        clean_cache: ActivationCache,
        patching_metric: Metric | Function,
        *,
        return_index_df: bool = False,
    ) -> Any:
        return generic_activation_patch(
            model,
            corrupted_tokens,
            clean_cache,
            patching_metric,
            setter,
            activation,
            index_axis_names=axes,
            return_index_df=return_index_df,
        )

    sweep.__name__ = sweep.__qualname__ = f"get_act_patch_{name}"
    sweep.__doc__ = (
        f"``[{', '.join(axes)}]``: the metric with the clean ``{activation}`` patched into the "
        "corrupted run\n    at each index. Arguments and errors as `generic_activation_patch`."
    )
    return sweep


_POS, _HEAD = layer_pos_patch_setter, layer_head_vector_patch_setter
_POS_HEAD, _PATTERN = layer_pos_head_vector_patch_setter, layer_head_pattern_patch_setter
_PATTERN_ROW = layer_head_pos_pattern_patch_setter
_PATTERN_ENTRY = layer_head_dest_src_pos_pattern_patch_setter
_L_P, _L_H, _L_P_H = ("layer", "pos"), ("layer", "head"), ("layer", "pos", "head")
_L_H_D = ("layer", "head_index", "dest_pos")

get_act_patch_resid_pre = _sweep("resid_pre", "resid_pre", _POS, _L_P)
get_act_patch_resid_mid = _sweep("resid_mid", "resid_mid", _POS, _L_P)
get_act_patch_attn_out = _sweep("attn_out", "attn_out", _POS, _L_P)
get_act_patch_mlp_out = _sweep("mlp_out", "mlp_out", _POS, _L_P)

get_act_patch_attn_head_out_by_pos = _sweep("attn_head_out_by_pos", "z", _POS_HEAD, _L_P_H)
get_act_patch_attn_head_q_by_pos = _sweep("attn_head_q_by_pos", "q", _POS_HEAD, _L_P_H)
get_act_patch_attn_head_k_by_pos = _sweep("attn_head_k_by_pos", "k", _POS_HEAD, _L_P_H)
get_act_patch_attn_head_v_by_pos = _sweep("attn_head_v_by_pos", "v", _POS_HEAD, _L_P_H)
get_act_patch_attn_head_pattern_by_pos = _sweep(
    "attn_head_pattern_by_pos", "pattern", _PATTERN_ROW, _L_H_D
)
get_act_patch_attn_head_pattern_dest_src_pos = _sweep(
    "attn_head_pattern_dest_src_pos", "pattern", _PATTERN_ENTRY, (*_L_H_D, "src_pos")
)

get_act_patch_attn_head_out_all_pos = _sweep("attn_head_out_all_pos", "z", _HEAD, _L_H)
get_act_patch_attn_head_q_all_pos = _sweep("attn_head_q_all_pos", "q", _HEAD, _L_H)
get_act_patch_attn_head_k_all_pos = _sweep("attn_head_k_all_pos", "k", _HEAD, _L_H)
get_act_patch_attn_head_v_all_pos = _sweep("attn_head_v_all_pos", "v", _HEAD, _L_H)
get_act_patch_attn_head_pattern_all_pos = _sweep(
    "attn_head_pattern_all_pos", "pattern", _PATTERN, ("layer", "head_index")
)


def get_act_patch_attn_head_all_pos_every(
    model: HookedTransformer,
    corrupted_tokens: Tokens,
    clean_cache: ActivationCache,
    metric: Metric | Function,
) -> Float[Tensor, "5 layer head"]:
    """The sweeps over z, q, k, v and pattern at all positions, stacked in this order.

    Under grouped queries the k and v of a kv head stand at every query head that reads it.
    """
    sweeps = (
        get_act_patch_attn_head_out_all_pos,
        get_act_patch_attn_head_q_all_pos,
        get_act_patch_attn_head_k_all_pos,
        get_act_patch_attn_head_v_all_pos,
        get_act_patch_attn_head_pattern_all_pos,
    )
    grids = [sweep(model, corrupted_tokens, clean_cache, metric) for sweep in sweeps]
    return torch.stack([_per_query_head(grid, model) for grid in grids])


def get_act_patch_attn_head_by_pos_every(
    model: HookedTransformer,
    corrupted_tokens: Tokens,
    clean_cache: ActivationCache,
    metric: Metric | Function,
) -> Float[Tensor, "5 layer pos head"]:
    """The sweeps over z, q, k, v and rows of the pattern at each position, stacked in this order.

    Under grouped queries the k and v of a kv head stand at every query head that reads it.
    """
    sweeps = (
        get_act_patch_attn_head_out_by_pos,
        get_act_patch_attn_head_q_by_pos,
        get_act_patch_attn_head_k_by_pos,
        get_act_patch_attn_head_v_by_pos,
    )
    grids = [sweep(model, corrupted_tokens, clean_cache, metric) for sweep in sweeps]
    rows = get_act_patch_attn_head_pattern_by_pos(model, corrupted_tokens, clean_cache, metric)
    return torch.stack([*(_per_query_head(grid, model) for grid in grids), rows.transpose(1, 2)])


def _per_query_head(grid: Float[Tensor, "... head"], model: HookedTransformer) -> Grid:
    return grid.repeat_interleave(model.cfg.n_heads // grid.shape[-1], dim=-1)


def get_act_patch_block_every(
    model: HookedTransformer,
    corrupted_tokens: Tokens,
    clean_cache: ActivationCache,
    metric: Metric | Function,
) -> Float[Tensor, "3 layer pos"]:
    """The sweeps over resid_pre, attn_out and mlp_out at each position, stacked in this order."""
    sweeps = (get_act_patch_resid_pre, get_act_patch_attn_out, get_act_patch_mlp_out)
    return torch.stack([sweep(model, corrupted_tokens, clean_cache, metric) for sweep in sweeps])
