"""Multiple choice: MMLU (arXiv 2009.03300), or questions of one's own."""

from __future__ import annotations

import string
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from hookedlm.errors import InputError, TokenizerError
from hookedlm.evals.answers import continuation, last_logits
from hookedlm.evals.corpora import load_dataset
from hookedlm.model import HookedTransformer
from hookedlm.tokens import encode, with_bos

Question = Mapping[str, Any]
"""``question``, ``choices`` (texts), ``answer`` (the index of the right one), ``subject``."""


def make_mmlu_data_loader(
    subjects: str | Sequence[str] | None = None, split: str = "test", num_samples: int | None = None
) -> list[dict[str, Any]]:
    """Questions of MMLU, for `mmlu_eval`: the first ``num_samples`` of each subject, or all.

    Raises ImportError without ``datasets``, LoadError offline, InputError on unknown subjects.
    """
    wanted = [subjects] if isinstance(subjects, str) else subjects
    by_subject: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for question in load_dataset("cais/mmlu", "all", split=split):
        by_subject[question["subject"]].append(dict(question))
    unknown = [subject for subject in wanted or () if subject not in by_subject]
    if unknown:
        raise InputError(f"MMLU has no subjects {unknown}; it has {sorted(by_subject)}")
    return [q for subject in wanted or by_subject for q in by_subject[subject][:num_samples]]


def mmlu_eval(
    model: HookedTransformer,
    tokenizer: Any = None,
    subjects: str | Sequence[str] | None = None,
    split: str = "test",
    num_samples: int | None = None,
    *,
    questions: Sequence[Question] | None = None,
    batch_size: int = 1,
) -> dict[str, Any]:
    """{"accuracy", "num_correct", "num_total", "subject_scores"} on multiple choice, zero-shot.

    The answer is the choice whose letter has the largest logit after "Answer:"; scores are
    fractions. ``questions`` are of your own (see `Question`), by default `make_mmlu_data_loader`'s.

    Raises InputError for malformed questions and for those longer than ``cfg.n_ctx``.
    """
    tokenizer = model.tokenizer if tokenizer is None else tokenizer
    if tokenizer is None:
        raise TokenizerError("questions are texts, and neither you nor the model has a tokenizer")
    if questions is None:
        questions = make_mmlu_data_loader(subjects, split, num_samples)
    if not questions:
        raise InputError("there are no questions")
    prompts = [mmlu_prompt(question) for question in questions]
    prepend = model.cfg.default_prepend_bos if tokenizer.bos_token_id is not None else None
    rows = [with_bos(tokenizer, row, prepend) for row in encode(tokenizer, prompts, special=False)]
    n_long = sum(len(row) > model.cfg.n_ctx for row in rows)
    if n_long:
        raise InputError(
            f"{n_long} of {len(rows)} questions are longer than the {model.cfg.n_ctx} tokens this "
            "model reads: leave them out"
        )
    letters = [continuation(tokenizer, "Answer:", f" {x}")[0] for x in string.ascii_uppercase]
    right: dict[str, list[bool]] = defaultdict(list)
    for question, logits in zip(questions, last_logits(model, rows, batch_size), strict=True):
        guess = int(logits[letters[: len(question["choices"])]].argmax())
        right[question.get("subject", "")].append(guess == question["answer"])
    num_correct = sum(map(sum, right.values()))
    return {
        "accuracy": num_correct / len(rows),
        "num_correct": num_correct,
        "num_total": len(rows),
        "subject_scores": {subject: sum(r) / len(r) for subject, r in right.items()},
    }


def mmlu_prompt(question: Question) -> str:
    """A question as the benchmark's authors put it, up to "Answer:"; InputError if malformed."""
    missing = {"question", "choices", "answer"} - set(question)
    if missing:
        raise InputError(f"a question needs {sorted(missing)}: {dict(question)}")
    choices, letters = question["choices"], string.ascii_uppercase
    if not 2 <= len(choices) <= len(letters) or question["answer"] not in range(len(choices)):
        raise InputError(
            f"answer={question['answer']!r} must be the index of one of 2 to {len(letters)} "
            f"choices, and there are {len(choices)}: {question['question']!r}"
        )
    subject = question.get("subject", "").replace("_", " ")
    about = f" about {subject}" if subject else ""
    lines = [f"{letter}. {text}" for letter, text in zip(letters, choices, strict=False)]
    head = f"The following are multiple choice questions (with answers){about}.\n\n"
    return head + "\n".join([question["question"], *lines, "Answer:"])
