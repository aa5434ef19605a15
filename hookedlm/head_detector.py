"""Heads found by what they attend to: attention patterns compared with a pattern one looks for.

A head that copies ("In-context Learning and Induction Heads", Olsson et al. 2022) or marks
duplicates ("Interpretability in the Wild", arXiv 2211.00593) shows it in its pattern on a suitable
text: for induction, random tokens that repeat.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hookedlm.cache import ActivationCache
from hookedlm.errors import InputError
from hookedlm.model import HookedTransformer

HeadName = Literal["previous_token_head", "duplicate_token_head", "induction_head"]
HEAD_NAMES: list[HeadName] = list(get_args(HeadName))
ErrorMeasure = Literal["abs", "mul"]

LayerHeadTuple = tuple[int, int]
LayerToHead = Mapping[int, Sequence[int]]
Pattern = Float[Tensor, "pos key_pos"]

POINT = "blocks.{}.attn.hook_pattern"
UNMEASURED = -1.0
"""The score of heads that were not asked for, and of layers that have no attention."""


# What to look for ---------------------------------------------------------------------------------


def get_previous_token_head_detection_pattern(tokens: Int[Tensor, "*one pos"]) -> Pattern:
    """1 where a position attends to the one before it. One sequence, [pos] or [1, pos]."""
    n = len(_one_sequence(tokens))
    return torch.ones(n - 1).diag(-1) if n > 1 else torch.zeros(n, n)


def get_duplicate_token_head_detection_pattern(tokens: Int[Tensor, "*one pos"]) -> Pattern:
    """1 where a position attends to an earlier occurrence of its own token."""
    ids = _one_sequence(tokens)
    return (ids[:, None] == ids[None, :]).float().tril(-1)


def get_induction_head_detection_pattern(tokens: Int[Tensor, "*one pos"]) -> Pattern:
    """1 where a position attends to what came right after an earlier occurrence of its token.

    The current token itself counts where it follows its like: in "a a", the second looks at itself.
    """
    duplicates = get_duplicate_token_head_detection_pattern(tokens)
    return torch.nn.functional.pad(duplicates[:, :-1], (1, 0))


DETECTION_PATTERNS: dict[str, Callable[[Tensor], Pattern]] = {
    "previous_token_head": get_previous_token_head_detection_pattern,
    "duplicate_token_head": get_duplicate_token_head_detection_pattern,
    "induction_head": get_induction_head_detection_pattern,
}


def get_supported_heads() -> list[HeadName]:
    """The names `detect_head` knows a detection pattern for."""
    return list(HEAD_NAMES)


# How alike two patterns are -----------------------------------------------------------------------


def compute_head_attention_similarity_score(
    attention_pattern: Pattern,
    detection_pattern: Pattern,
    *,
    exclude_bos: bool,
    exclude_current_token: bool,
    error_measure: ErrorMeasure,
) -> float:
    """How alike the attention pattern of one head and a detection pattern are; both are left alone.

    "mul": the share of all attention that lies on the pattern, 0 to 1 for a pattern of zeros and
    ones (0 if no attention is left to share). "abs": 1 minus the absolute difference summed over
    keys and averaged over queries, -1 to 1 for rows that sum to one. ``exclude_bos`` leaves out
    attention to the first position, ``exclude_current_token`` the diagonal.

    Raises InputError unless both are square and of one size, and the detection pattern is lower
    triangular with values from 0 to 1.
    """
    _check_choice("error_measure", error_measure, get_args(ErrorMeasure))
    _check_square("attention_pattern", attention_pattern, attention_pattern.shape[-1])
    _check_detection(detection_pattern, len(attention_pattern))
    kept = _kept(len(attention_pattern), exclude_bos, exclude_current_token)
    return float(_scores(attention_pattern, detection_pattern, kept, error_measure))


def _kept(n: int, exclude_bos: bool, exclude_current_token: bool) -> Pattern:
    """1 at the (query, key) pairs that count."""
    kept = torch.ones(n, n)
    if exclude_current_token:
        kept.fill_diagonal_(0.0)
    if exclude_bos:
        kept[:, 0] = 0.0
    return kept


def _scores(
    patterns: Float[Tensor, "*head pos key_pos"], detection: Pattern, kept: Pattern, measure: str
) -> Float[Tensor, "*head"]:
    detection, kept = detection.to(patterns.device), kept.to(patterns.device)
    wide = patterns.to(torch.promote_types(patterns.dtype, torch.float32))
    if measure == "abs":
        return 1.0 - ((wide - detection).abs() * kept).sum((-2, -1)) / len(kept)
    attention = wide * kept
    total = attention.sum((-2, -1))
    return (attention * detection).sum((-2, -1)) / total.where(total > 0, torch.ones_like(total))


# Detection ----------------------------------------------------------------------------------------


@torch.no_grad()
def detect_head(
    model: HookedTransformer,
    seq: str | Sequence[str] | Int[Tensor, "*batch pos"],
    detection_pattern: Pattern | HeadName,
    heads: Sequence[LayerHeadTuple] | LayerToHead | None = None,
    cache: ActivationCache | Mapping[str, Tensor] | None = None,
    *,
    exclude_bos: bool = False,
    exclude_current_token: bool = False,
    error_measure: ErrorMeasure = "mul",
) -> Float[Tensor, "layer head"]:
    """How much each head attends as a pattern says, averaged over the sequences; -1 if not asked.

    ``seq``: a text, several, or tokens (all real). ``detection_pattern``: a name of `HEAD_NAMES`,
    or a lower-triangular [pos, key_pos] for sequences of just that length. ``heads``: pairs (layer,
    head) or {layer: heads}; by default all of every layer that has attention patterns. ``cache``:
    activations of a run on ``seq``, with or without batch dimension; it is read, never changed.
    Keywords are those of `compute_head_attention_similarity_score`. Only patterns that are needed
    are recorded.

    Raises InputError for patterns, heads and caches that don't fit, HookNameError for a layer
    without patterns that was named.
    """
    _check_choice("error_measure", error_measure, get_args(ErrorMeasure))
    tokens, mask = _read(model, seq)
    places = [real.nonzero().flatten() for real in mask]
    wanted = [
        _detection_for(row[place].cpu(), detection_pattern)
        for row, place in zip(tokens, places, strict=True)
    ]
    selected = _selected(model, heads)
    names = {layer: POINT.format(layer) for layer in selected}
    if cache is None:
        _, cache = model.run_with_cache(
            tokens, attention_mask=mask, return_type=None, names_filter=list(names.values())
        )
    scores = torch.full((model.cfg.n_layers, model.cfg.n_heads), UNMEASURED)
    for layer, chosen in selected.items():
        patterns = _patterns(cache, names[layer], tuple(tokens.shape))[:, chosen]
        each = [
            _scores(
                pattern[:, place.to(pattern.device)][:, :, place.to(pattern.device)],
                detection,
                _kept(len(place), exclude_bos, exclude_current_token),
                error_measure,
            )
            for pattern, place, detection in zip(patterns, places, wanted, strict=True)
        ]
        scores[layer, chosen] = torch.stack(each).mean(0).to(scores)
    return scores


def _read(model: HookedTransformer, seq: Any) -> tuple[Int[Tensor, "batch pos"], Tensor]:
    """Tokens, short rows filled up as in any run of this model, and the mask of what is real."""
    if isinstance(seq, Tensor):
        tokens = (seq if seq.ndim == 2 else seq[None]).to(model.device)
        return tokens, torch.ones_like(tokens)
    return model.to_tokens_and_mask(seq)


def _detection_for(row: Int[Tensor, "pos"], detection_pattern: Pattern | str) -> Pattern:
    """The pattern to look for in one sequence."""
    if len(row) < 2:
        raise InputError("a sequence of one token has no pattern: give at least two")
    if isinstance(detection_pattern, str):
        _check_choice("detection_pattern", detection_pattern, HEAD_NAMES)
        return DETECTION_PATTERNS[detection_pattern](row)
    _check_detection(detection_pattern, len(row))
    return detection_pattern


def _selected(
    model: HookedTransformer, heads: Sequence[LayerHeadTuple] | LayerToHead | None
) -> dict[int, list[int]]:
    """Layer -> heads, checked."""
    n_layers, n_heads = model.cfg.n_layers, model.cfg.n_heads
    if heads is None:
        every = list(range(n_heads))
        with_patterns = [
            layer
            for layer in range(n_layers)
            if f"blocks.{layer}.attn.hook_pattern" in model.hook_dict
        ]
        return dict.fromkeys(with_patterns or range(n_layers), every)
    pairs = (
        [(layer, head) for layer, chosen in heads.items() for head in chosen]
        if isinstance(heads, Mapping)
        else [(layer, head) for layer, head in heads]
    )
    selected: dict[int, list[int]] = {}
    for layer, head in pairs:
        if not (0 <= layer < n_layers and 0 <= head < n_heads):
            raise InputError(
                f"heads: there is no ({layer}, {head}); layers are 0 to {n_layers - 1} and heads 0 "
                f"to {n_heads - 1}"
            )
        selected.setdefault(layer, []).append(head)
    return selected


def _patterns(
    cache: ActivationCache | Mapping[str, Tensor], name: str, shape: tuple[int, ...]
) -> Float[Tensor, "batch head pos key_pos"]:
    """The patterns of one layer, with a batch dimension; raises InputError if of another run."""
    if name not in cache:
        raise InputError(f"cache has no {name!r}: record it, or leave cache out")
    patterns = cache[name]
    patterns = patterns if patterns.ndim == 4 else patterns[None]
    n_rows, n_positions = shape
    if patterns.shape[0] != n_rows or patterns.shape[2:] != (n_positions, n_positions):
        raise InputError(
            f"cache was made of another input: {name!r} is {tuple(patterns.shape)}, and seq has "
            f"{n_rows} rows of {n_positions} tokens"
        )
    return patterns


def _one_sequence(tokens: Int[Tensor, "*one pos"]) -> Int[Tensor, "pos"]:
    if tokens.ndim not in (1, 2) or (tokens.ndim == 2 and tokens.shape[0] != 1):
        raise InputError(f"one sequence at a time, [pos] or [1, pos]: got {tuple(tokens.shape)}")
    return tokens.reshape(-1).cpu()


def _check_square(name: str, pattern: Tensor, n: int) -> None:
    if pattern.shape != (n, n):
        raise InputError(
            f"{name} has shape {tuple(pattern.shape)}: expected [{n}, {n}], a row for each position"
        )


def _check_detection(pattern: Tensor, n: int) -> None:
    _check_square("detection_pattern", pattern, n)
    if not bool(((pattern >= 0) & (pattern <= 1)).all()):
        raise InputError("detection_pattern must have values from 0 (not there) to 1 (there)")
    if bool(pattern.triu(1).any()):
        raise InputError(
            "detection_pattern must be lower triangular, because no position attends to later "
            "ones: detection_pattern.tril() drops them"
        )


def _check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise InputError(f"{name}={value!r}: expected one of {tuple(choices)}")
