"""Metrics: of the right answer beside a wrong one, of one answer, of the whole distribution."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias, overload

import torch
from jaxtyping import Float, Int
from torch import Tensor
from typing_extensions import Self

from hookedlm.errors import InputError
from hookedlm.patching.metric import (
    Function,
    Logits,
    Metric,
    Positions,
    check_range,
    check_rows,
    integers,
    wide,
)

if TYPE_CHECKING:
    from hookedlm.model import HookedTransformer

Answer: TypeAlias = int | Sequence[int] | Int[Tensor, "batch"]
"""A token: one for all examples, or one for each."""


@dataclass(frozen=True, eq=False)
class OfAnswers(Metric):
    """A metric of which all arguments are answers."""

    @classmethod
    def of(
        cls,
        model: HookedTransformer,
        *answers: str | Sequence[str] | Answer,
        positions: Positions = -1,
    ) -> Self:
        """With answers as text, each one token: ``LogitDiff.of(model, " Mary", " John")``; a list
        of texts has one for each example. Raises NotOneTokenError on other texts."""
        return cls(*(_token_ids(model, answer) for answer in answers), positions=positions)


@dataclass(frozen=True, eq=False)
class LogitDiff(OfAnswers):
    """The answer's logit less that of a wrong answer (arXiv 2211.00593)."""

    NAME = "logit difference"
    answer: Answer
    wrong: Answer

    def __post_init__(self) -> None:
        super().__post_init__()
        pair = torch.broadcast_tensors(_ids("answer", self.answer), _ids("wrong", self.wrong))
        for name, ids in zip(("answer", "wrong"), pair, strict=True):
            object.__setattr__(self, name, ids)

    def tokens(self) -> Int[Tensor, "batch 2"]:
        """The answer and the wrong answer."""
        assert isinstance(self.answer, Tensor)
        assert isinstance(self.wrong, Tensor)
        return torch.stack([self.answer, self.wrong], dim=-1)

    def per_example(self, logits: Float[Tensor, "rows batch 2"]) -> Float[Tensor, "rows batch"]:
        """The difference."""
        return logits[..., 0] - logits[..., 1]


@dataclass(frozen=True, eq=False)
class OfOneAnswer(OfAnswers):
    """A metric of one answer, for which the logits of all tokens are read."""

    answer: Answer

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "answer", _ids("answer", self.answer))

    def logit(self, logits: Float[Tensor, "rows batch vocab"]) -> Float[Tensor, "rows batch"]:
        """The answer's."""
        assert isinstance(self.answer, Tensor)
        return logits.gather(-1, self.answer[:, None].expand(*logits.shape[:-1], 1))[..., 0]

    def check(self, n_examples: int, length: int, d_vocab: int, mask: Any = None) -> None:
        """As `Metric.check`."""
        super().check(n_examples, length, d_vocab, mask)
        assert isinstance(self.answer, Tensor)
        check_range("tokens", self.answer.cpu(), 0, d_vocab)
        check_rows(self, "answers", len(self.answer), n_examples)


@dataclass(frozen=True, eq=False)
class LogProb(OfOneAnswer):
    """The natural logarithm of the answer's probability."""

    NAME = "log probability"

    def per_example(self, logits: Float[Tensor, "rows batch vocab"]) -> Float[Tensor, "rows batch"]:
        """The log-probability."""
        return self.logit(logits) - logits.logsumexp(-1)


@dataclass(frozen=True, eq=False)
class AnswerRank(OfOneAnswer):
    """How many tokens are likelier than the answer: 0 when it comes first."""

    NAME = "rank of the answer"

    def per_example(self, logits: Float[Tensor, "rows batch vocab"]) -> Float[Tensor, "rows batch"]:
        """The rank."""
        return (logits > self.logit(logits)[..., None]).sum(-1).to(logits.dtype)


@dataclass(frozen=True, eq=False)
class KL(Metric):
    """KL(reference || run), in nats: what is lost when the run's next-token distribution stands in
    for that of a reference run, ``sum_t p_ref(t) (log p_ref(t) - log p_run(t))``.

    ``reference_logits``: whole logits of the reference run ``[batch, pos, d_vocab]``, of which
    ``positions`` are taken, or just these, ``[batch, d_vocab]``. One row serves all examples.
    Raises InputError on other shapes.
    """

    NAME = "KL divergence"
    reference_logits: Float[Tensor, "batch pos d_vocab"] | Float[Tensor, "batch d_vocab"]

    def __post_init__(self) -> None:
        super().__post_init__()
        logits = self.reference_logits.detach()
        if logits.ndim == 3:
            at = torch.as_tensor(self.positions)
            check_range("positions", at, -logits.shape[1], logits.shape[1])
            rows = max(len(logits), at.numel())
            columns = (at % logits.shape[1]).to(logits.device)
            logits = logits.expand(rows, -1, -1)[range(rows), columns]
        if logits.ndim != 2:
            raise InputError(
                f"reference_logits of shape {tuple(logits.shape)}: expected [batch, pos, d_vocab] "
                "or [batch, d_vocab]"
            )
        object.__setattr__(self, "reference_logits", logits)

    def per_example(self, logits: Float[Tensor, "rows batch vocab"]) -> Float[Tensor, "rows batch"]:
        """The divergence."""
        reference = wide(self.reference_logits).log_softmax(-1)
        each = reference.exp() * (reference - logits.log_softmax(-1))
        return torch.where(reference.isneginf(), 0.0, each).sum(-1)

    def check(self, n_examples: int, length: int, d_vocab: int, mask: Any = None) -> None:
        """As `Metric.check`; the reference must have this vocabulary."""
        super().check(n_examples, length, d_vocab, mask)
        rows, width = self.reference_logits.shape
        if rows not in (1, n_examples) or width != d_vocab:
            raise InputError(
                f"reference_logits [{rows}, {width}] for runs of {n_examples} examples and "
                f"{d_vocab} tokens of vocabulary"
            )


# Normalised ---------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Normalised(Metric):
    """Another metric on a scale where the corrupted run is 0 and the clean run is 1."""

    metric: Metric
    clean: float
    corrupted: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "positions", self.metric.positions)
        super().__post_init__()

    @property
    def label(self) -> str:
        """That of the metric, normalised."""
        return f"normalised {self.metric.label}"

    def tokens(self) -> Int[Tensor, "batch n"] | None:
        """Those of the metric."""
        return self.metric.tokens()

    def per_example(self, logits: Float[Tensor, "rows batch n"]) -> Float[Tensor, "rows batch"]:
        """``(metric - corrupted) / (clean - corrupted)``."""
        return (self.metric.per_example(logits) - self.corrupted) / (self.clean - self.corrupted)

    def check(self, n_examples: int, length: int, d_vocab: int, mask: Any = None) -> None:
        """As the metric's."""
        self.metric.check(n_examples, length, d_vocab, mask)


Number: TypeAlias = float | Float[Tensor, ""] | Logits


@overload
def normalised(metric: Metric, *, clean: Number, corrupted: Number) -> Metric: ...
@overload
def normalised(metric: Function, *, clean: Number, corrupted: Number) -> Function: ...
def normalised(metric: Metric | Function, *, clean: Number, corrupted: Number) -> Metric | Function:
    """The metric on a scale where the corrupted run is 0 and the clean run is 1.

    ``clean``, ``corrupted``: what the metric is in these runs, or their logits. Raises InputError
    if it is the same in both.
    """

    def number(x: Number) -> float:
        found = metric(x) if isinstance(x, Tensor) and x.ndim == 3 else x
        return float(torch.as_tensor(found).detach())

    top, bottom = number(clean), number(corrupted)
    if top == bottom:
        raise InputError(f"the metric is {top} in the clean run and in the corrupted one")
    if isinstance(metric, Metric):
        return Normalised(metric, top, bottom)

    def scaled(logits: Logits) -> Any:
        return (metric(logits) - bottom) / (top - bottom)

    return scaled


def _ids(what: str, answer: Any) -> Int[Tensor, "n"]:
    texts = [answer] if isinstance(answer, str) else answer
    if isinstance(texts, Sequence) and any(isinstance(text, str) for text in texts):
        raise InputError(f"{what}={answer!r} is text: use .of(model, ...), which tokenizes it")
    single = isinstance(answer, int) or (isinstance(answer, Tensor) and answer.ndim == 0)
    return integers(what, [int(answer)] if single else answer)


def _token_ids(model: HookedTransformer, answer: Any) -> Any:
    if isinstance(answer, str):
        return model.to_single_token(answer)
    if isinstance(answer, Sequence) and all(isinstance(each, str) for each in answer):
        return [model.to_single_token(each) for each in answer]
    return answer
