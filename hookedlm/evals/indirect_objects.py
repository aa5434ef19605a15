"""Indirect objects: of two names, the one that is not the subject again.

Source: "Interpretability in the Wild" (arXiv 2211.00593).
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from math import prod
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from torch.utils.data import Dataset

from hookedlm.errors import InputError
from hookedlm.evals.answers import continuation, last_logits
from hookedlm.model import HookedTransformer
from hookedlm.tokens import encode, with_bos

IOI_TEMPLATES = (
    "When [A] and [B] went to the [LOCATION], [B] gave the [OBJECT] to [A]",
    "When [B] and [A] went to the [LOCATION], [B] gave the [OBJECT] to [A]",
    "Then, [A] and [B] went to the [LOCATION]. [B] handed the [OBJECT] to [A]",
    "Then, [B] and [A] went to the [LOCATION]. [B] handed the [OBJECT] to [A]",
    "After [A] and [B] met at the [LOCATION], [B] decided to give the [OBJECT] to [A]",
    "After [B] and [A] met at the [LOCATION], [B] decided to give the [OBJECT] to [A]",
)
IOI_NAMES = tuple("Mary John Tom James Michael Robert David Anna Emma Sarah Laura Kate".split())
IOI_NOUNS = {
    "LOCATION": tuple("store school garden hospital park office station restaurant".split()),
    "OBJECT": tuple("book ring drink bag ball letter picture key".split()),
}


class IOIDataset(Dataset):
    """Sentences that end with the indirect object: " Mary" where [A] is Mary.

    Items are {"prompt", "IO", "S"}, tokens [pos]. The prompt contains its answer, the tokens of IO,
    at the end; S are those of the other name in the same place. ``samples`` has the texts.
    Templates contain [A] (the indirect object), [B] (the subject, named last), and any keys of
    ``nouns`` in brackets; where [A] does not end one, it is put there. Samples are drawn under
    ``seed`` without touching global random state, none twice before every combination was used.
    ``symmetric`` draws pairs that differ in who is who; ``num_samples`` is then even.

    Raises InputError for templates, names and nouns from which no sample can be made.
    """

    def __init__(
        self,
        tokenizer: Any,
        templates: Sequence[str] | None = None,
        names: Sequence[str] | None = None,
        nouns: Mapping[str, Sequence[str]] | None = None,
        num_samples: int = 1000,
        symmetric: bool = False,
        prepend_bos: bool = True,
        *,
        seed: int = 0,
    ):
        self.tokenizer, self.prepend_bos = tokenizer, prepend_bos
        self.templates = list(dict.fromkeys(IOI_TEMPLATES if templates is None else templates))
        self.names = list(dict.fromkeys(IOI_NAMES if names is None else names))
        nouns = IOI_NOUNS if nouns is None else nouns
        self.nouns = {kind: list(dict.fromkeys(words)) for kind, words in nouns.items()}
        self._check(num_samples, symmetric)
        self.samples: list[dict[str, str]] = []
        for template, (a, b), words in islice(
            self._combinations(random.Random(seed), symmetric), num_samples // (1 + symmetric)
        ):
            for io, s in [(a, b), (b, a)][: 1 + symmetric]:
                text = _filled(template, {**words, "A": io, "B": s})
                self.samples.append({"text": text, "IO": " " + io, "S": " " + s})

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Int[Tensor, "pos"]]:
        sample = self.samples[index]
        before = sample["text"].removesuffix(sample["IO"])
        prompt = encode(self.tokenizer, [sample["text"]], special=False)[0]
        rows = {
            "prompt": with_bos(self.tokenizer, prompt, self.prepend_bos),
            "IO": continuation(self.tokenizer, before, sample["IO"]),
            "S": continuation(self.tokenizer, before, sample["S"]),
        }
        return {name: torch.tensor(row, dtype=torch.long) for name, row in rows.items()}

    def _check(self, num_samples: int, symmetric: bool) -> None:
        if num_samples < 1 or (symmetric and num_samples % 2):
            wanted = "an even number, because samples come in pairs" if symmetric else "1 or more"
            raise InputError(f"num_samples={num_samples}: expected {wanted}")
        if len(self.names) < 2 or not self.templates or not all(self.nouns.values()):
            raise InputError("two names, a template and a word for every kind of noun are needed")
        for template in self.templates:
            unknown = set(re.findall(r"\[(\w+)\]", template)) - {"A", "B", *self.nouns}
            if unknown:
                raise InputError(f"template {template!r}: there are no nouns for {sorted(unknown)}")
            after = template.rpartition("[B]")[2].removesuffix("[A]")
            if "[A]" not in template or "[B]" not in template or "[A]" in after:
                raise InputError(
                    f"template {template!r} needs [A] and [B], and after the last [B] no [A] but "
                    "at the very end, where the model is asked for it"
                )

    def _combinations(
        self, rng: random.Random, unordered: bool
    ) -> Iterator[tuple[str, list[str], dict[str, str]]]:
        """(template, names, nouns) without end; every combination once before any comes again."""
        kinds = {t: [kind for kind in self.nouns if f"[{kind}]" in t] for t in self.templates}
        n_pairs = len(self.names) * (len(self.names) - 1) // (1 + unordered)
        n_all = sum(n_pairs * prod(len(self.nouns[k]) for k in kinds[t]) for t in self.templates)
        seen: set[tuple[str, ...]] = set()
        while True:
            template, names = rng.choice(self.templates), rng.sample(self.names, 2)
            words = {kind: rng.choice(self.nouns[kind]) for kind in kinds[template]}
            pair = sorted(names) if unordered else names
            combination = (template, *pair, *words.values())
            if combination in seen:
                continue
            seen.add(combination)
            if len(seen) == n_all:
                seen.clear()
            yield template, names, words


def _filled(template: str, words: Mapping[str, str]) -> str:
    if not template.endswith("[A]"):
        template = template.rstrip() + " [A]"
    for kind, word in words.items():
        template = template.replace(f"[{kind}]", word)
    return template


def ioi_eval(
    model: HookedTransformer,
    dataset: Any = None,
    batch_size: int = 8,
    num_samples: int = 1000,
    tokenizer: Any = None,
    symmetric: bool = False,
) -> dict[str, float]:
    """{"Logit Difference", "Accuracy"}: how much and how often IO is preferred to S.

    Read from the logits before the first token in which IO and S differ. ``dataset`` has items as
    those of `IOIDataset` (made from the other arguments by default). Raises InputError for items
    that leave unclear where to read.
    """
    tokenizer = model.tokenizer if tokenizer is None else tokenizer
    if dataset is None:
        dataset = IOIDataset(tokenizer, num_samples=num_samples, symmetric=symmetric)
    items = [_question_of(dataset[i]) for i in range(len(dataset))]
    if not items:
        raise InputError("the dataset is empty")
    rows = [row for row, _, _ in items]
    differences = [
        float(logits[io] - logits[s])
        for logits, (_, io, s) in zip(last_logits(model, rows, batch_size), items, strict=True)
    ]
    n = len(differences)
    right = sum(difference > 0 for difference in differences)
    return {"Logit Difference": sum(differences) / n, "Accuracy": right / n}


def _question_of(item: Mapping[str, Int[Tensor, "pos"]]) -> tuple[list[int], int, int]:
    """(tokens up to where IO and S part, the next token of IO, that of S)."""
    prompt, io, s = (item[name].tolist() for name in ("prompt", "IO", "S"))
    shared = next((i for i, (a, b) in enumerate(zip(io, s, strict=False)) if a != b), None)
    if shared is None:
        raise InputError(f"IO {io} and S {s}: one is the beginning of the other")
    if prompt[-len(io) :] == io:
        return prompt[: len(prompt) - len(io) + shared], io[shared], s[shared]
    if shared > 0:
        raise InputError(f"the prompt {prompt} must end with IO {io}, which begins like S {s}")
    return prompt, io[0], s[0]
