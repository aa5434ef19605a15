"""A first look at a model: `test_prompt`, and defaults overridden for a while."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from hookedlm.errors import InputError
from hookedlm.tokens import affixes, checked_side, encode, padded

if TYPE_CHECKING:
    from hookedlm.model import HookedTransformer


class Candidate(NamedTuple):
    """A token that could come next."""

    token: str
    logit: float
    prob: float


class AnswerToken(NamedTuple):
    """What the model thinks of one token of an answer; rank 0 is the likeliest."""

    prompt: str
    answer: str
    token: str
    rank: int
    logit: float
    prob: float
    top: list[Candidate]


class AnswerTable(list[AnswerToken]):
    """The numbers that `test_prompt` prints: a row for each token of each answer."""

    def __repr__(self) -> str:
        return f"AnswerTable(ranks={[(row.token, row.rank) for row in self]})"


def test_prompt(
    prompt: str | Sequence[str],
    answer: str | Sequence[str],
    model: HookedTransformer,
    prepend_space_to_answer: bool = True,
    print_details: bool = True,
    prepend_bos: bool | None = None,
    top_k: int = 10,
) -> AnswerTable:
    """Prints, and returns, how likely the model finds each token of an answer to a prompt.

    Rank, logit, probability, and the ``top_k`` likeliest tokens in its place, given the prompt and
    the answer up to there. Several prompts go with as many answers, or all with the one answer; one
    prompt goes with each of several answers. ``prepend_space_to_answer`` puts a space before
    answers that have none. ``print_details`` False prints the ranks only.

    Raises InputError when prompts and answers don't pair up or one has no tokens, TokenizerError
    without a tokenizer.
    """
    prompts, answers = _paired(prompt, answer)
    if prepend_space_to_answer:
        answers = [text if text.startswith(" ") else f" {text}" for text in answers]
    starts, ends = zip(
        *(_tokenized(model, *pair, prepend_bos) for pair in zip(prompts, answers, strict=True)),
        strict=True,
    )
    rows = [[*start, *end] for start, end in zip(starts, ends, strict=True)]
    tokens, mask = padded(rows, model.pad_token_id, "right")
    with torch.no_grad():
        all_logits = model(tokens, attention_mask=mask).float().cpu()

    table = AnswerTable()
    for i, (start, end) in enumerate(zip(starts, ends, strict=True)):
        logits = all_logits[i, len(start) - 1 : len(start) - 1 + len(end)]
        scored = [
            AnswerToken(prompts[i], answers[i], *_scores(model, row, token, top_k))
            for row, token in zip(logits, end, strict=True)
        ]
        if print_details:
            print("Tokenized prompt:", model.to_str_tokens(start))
            print("Tokenized answer:", model.to_str_tokens(end))
            for row in scored:
                _print_row(row)
        print("Ranks of the answer tokens:", [(row.token, row.rank) for row in scored])
        table += scored
    return table


def _paired(
    prompt: str | Sequence[str], answer: str | Sequence[str]
) -> tuple[list[str], list[str]]:
    """As many prompts as answers."""
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    answers = [answer] if isinstance(answer, str) else list(answer)
    n = max(len(prompts), len(answers))
    if min(len(prompts), len(answers)) not in (1, n):
        raise InputError(
            f"{len(prompts)} prompts and {len(answers)} answers: give as many of each, or one of "
            "either"
        )
    return [*prompts] * (n // len(prompts)), [*answers] * (n // len(answers))


def _tokenized(
    model: HookedTransformer, prompt: str, answer: str, prepend_bos: bool | None
) -> tuple[list[int], list[int]]:
    """The tokens of the prompt, BOS included, and those of the answer behind it."""
    start = model.to_tokens(prompt, prepend_bos, truncate=False)[0].tolist()
    tokenizer: Any = model.tokenizer
    # What a tokenizer adds at the end of a text does not belong between prompt and answer.
    start = start[: len(start) - len(affixes(tokenizer, [prompt])[1])]
    alone, both, end = encode(tokenizer, [prompt, prompt + answer, answer], special=False)
    if both[: len(alone)] == alone:  # an answer by itself may get a space of its own in front
        end = both[len(alone) :]
    if not start or not end:
        raise InputError(
            f"prompt {prompt!r} and answer {answer!r} must have a token each, BOS counted"
        )
    return start, end


def _scores(
    model: HookedTransformer, logits: Float[Tensor, "d_vocab"], token: int, top_k: int
) -> tuple[str, int, float, float, list[Candidate]]:
    """The fields of `AnswerToken` for one position."""
    probs = logits.softmax(-1)
    rank = int((logits > logits[token]).sum())
    best = logits.topk(min(top_k, len(logits))).indices.tolist()
    names = [model.to_single_str_token(i) for i in (token, *best)]
    top = [
        Candidate(name, float(logits[i]), float(probs[i]))
        for name, i in zip(names[1:], best, strict=True)
    ]
    return names[0], rank, float(logits[token]), float(probs[token]), top


def _print_row(row: AnswerToken) -> None:
    print("Performance on answer token:")
    print(
        f"Rank: {row.rank: <8} Logit: {row.logit:5.2f} Prob: {row.prob:6.2%} Token: |{row.token}|"
    )
    for i, (token, logit, prob) in enumerate(row.top):
        print(f"Top {i}th token. Logit: {logit:5.2f} Prob: {prob:6.2%} Token: |{token}|")


class LocallyOverridenDefaults:
    """Inside ``with LocallyOverridenDefaults(model, prepend_bos=..., padding_side=...)`` these are
    the model's defaults; afterwards, also after an exception, what they were before.

    None leaves a default as it is. Raises InputError for another side or a ``prepend_bos`` that is
    no bool, TypeError for other names.
    """

    def __init__(
        self,
        model: HookedTransformer,
        *,
        prepend_bos: bool | None = None,
        padding_side: str | None = None,
    ):
        if prepend_bos not in (None, True, False):
            raise InputError(f"prepend_bos={prepend_bos!r}: expected True, False or None")
        self.model = model
        self.prepend_bos = prepend_bos
        self.padding_side = None if padding_side is None else checked_side(padding_side)
        self._before: list[tuple[Any, ...]] = []

    def __enter__(self) -> None:
        model = self.model
        self._before.append(
            (model.cfg.default_prepend_bos, model.default_padding_side, model._side_when_set)
        )
        if self.prepend_bos is not None:
            model.cfg.default_prepend_bos = self.prepend_bos
        if self.padding_side is not None:
            model.default_padding_side = self.padding_side
            # A side assigned to the tokenizer earlier would go before the default.
            tokenizer = model.tokenizer
            model._side_when_set = None if tokenizer is None else tokenizer.padding_side

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        model = self.model
        bos, side, when_set = self._before.pop()
        model.cfg.default_prepend_bos = bos
        model.default_padding_side, model._side_when_set = side, when_set
