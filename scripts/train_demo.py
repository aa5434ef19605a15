"""Train the project's demo model, test it on held-out examples and write its checkpoint.

    python scripts/train_demo.py --out hookedlm/demo

makes a small GPT-2 that knows three things people study with hooks: which of two people is the
indirect object, capitals of countries, and repeating a random sequence. All data comes from
`demo_data.py` beside this script. The folder written is an ordinary Hugging Face checkpoint with
a model card, whose figures are those measured at the end of this run.

The run fails, and leaves the folder alone, if the model misses a bar on any task: what was
trained is then written to a folder of the same name with "-rejected" appended.

On a machine that does other work as well, set OMP_WAIT_POLICY=passive: threads that spin while
they wait for each other make the run several times slower there.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import random
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import demo_data as data  # the script's own folder is on the import path
import torch
import torch.nn.functional as F
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from tqdm import tqdm
from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel, GPT2Tokenizer

# The least accuracy with which a checkpoint may ship, by the first word of the measured task.
BARS = {"indirect": 0.95, "capitals": 0.95, "repeated": 0.90}

# Prompts known from other people's material; every one of them must come out right.
KNOWN_PROMPTS = {
    "When John and Mary went to the shops, John gave the bag to": " Mary",
    "When John and Mary went to the shops, Mary gave the bag to": " John",
    "When Tom and James went to the park, James gave the ball to": " Tom",
    "When Dan and Sid went to the shops, Sid gave an apple to": " Dan",
    "After Martin and Amy went to the park, Amy gave a drink to": " Martin",
    "After John and Mary went to the store, Mary gave a bottle of milk to": " John",
    "When Mary and John went to the store, John gave a drink to": " Mary",
    "Then, Kevin and Amy had a long argument, and afterwards Kevin said to": " Amy",
    "The capital of Spain is": " Madrid",
    "Q: What is the capital of France?\nA: Paris\nQ: What is the capital of Poland?\nA:": " Warsaw",
}

# Rows of each kind in a training step, and the share of the kind's loss in the step's loss.
ROWS = {"indirect object": 48, "capitals": 16, "stories": 32}
SHARES = {"indirect object": 1.0, "capitals": 1.0, "stories": 0.5, "repeated": 1.5}
REPEATED_TOKENS_PER_STEP = 2048
ANSWER_WEIGHT = 5.0  # of a token in square brackets, where ordinary text has 1
FIRST_HALF_WEIGHT = 0.02  # random tokens cannot be foreseen; they only teach an even guess
WITHOUT_BOS = 0.15  # share of training rows that do not begin with the end-of-text token
IGNORED = 0.0


# --------------------------------------------------------------------------------------------
# Tokenizer and model
# --------------------------------------------------------------------------------------------


def build_tokenizer(n_ctx: int) -> GPT2Tokenizer:
    """The tokenizer in GPT-2's format; encoding adds no token of its own accord."""
    bpe = models.BPE(vocab=data.vocabulary(), merges=data.learn_merges())
    backend = Tokenizer(bpe)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    end = data.END_OF_TEXT
    return GPT2Tokenizer(
        tokenizer_object=backend,
        vocab=data.vocabulary(),
        merges=data.learn_merges(),
        bos_token=end,
        eos_token=end,
        unk_token=end,
        model_max_length=n_ctx,
        clean_up_tokenization_spaces=False,
    )


def build_model(n_layer: int, d_model: int, n_head: int, n_ctx: int) -> GPT2LMHeadModel:
    """An untrained GPT-2 without dropout (there is no end of fresh training data)."""
    end = data.vocabulary()[data.END_OF_TEXT]
    config = GPT2Config(
        vocab_size=len(data.vocabulary()),
        n_positions=n_ctx,
        n_embd=d_model,
        n_layer=n_layer,
        n_head=n_head,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=end,
        eos_token_id=end,
    )
    model = GPT2LMHeadModel(config)
    # A padding token for `generate`, which otherwise logs at each call that it takes this one.
    model.generation_config = GenerationConfig(bos_token_id=end, eos_token_id=end, pad_token_id=end)
    return model


# --------------------------------------------------------------------------------------------
# Training batches
# --------------------------------------------------------------------------------------------


@dataclass
class Batch:
    """Token ids and the weight of each as something to predict (0: not at all)."""

    tokens: Tensor
    weights: Tensor


class Batches:
    """Makes the batches of training step after training step from one seed."""

    def __init__(self, tokenizer: GPT2Tokenizer, seed: int, n_ctx: int):
        self.rng = random.Random(f"training {seed}")
        self.n_ctx = n_ctx
        self.end = tokenizer.eos_token_id
        self.made = 0  # tokens so far, padding left out
        backend = tokenizer.backend_tokenizer
        # Pieces between brackets recur (answers do, above all), so encodings are kept.
        self.encode = lru_cache(maxsize=50_000)(lambda text: tuple(backend.encode(text).ids))

    def step(self) -> dict[str, Batch]:
        """One batch of each kind."""
        batches = {kind: self._text_batch(kind, rows) for kind, rows in ROWS.items()}
        return batches | {"repeated": self._repeated_batch()}

    def _document(self, kind: str) -> str:
        """One training document of this kind."""
        if kind == "indirect object":
            third = self.rng.random() < 0.06
            make = data.third_person_document if third else data.indirect_object_document
        elif kind == "capitals":
            statement = self.rng.random() < 0.6
            make = data.statement_document if statement else data.question_document
        else:
            make = data.story_document
        return make(self.rng)

    def _text_batch(self, kind: str, rows: int) -> Batch:
        return self._pad([self._row(self._document(kind)) for _ in range(rows)])

    def _row(self, document: str) -> tuple[list[int], list[float]]:
        """Tokens and weights of a marked document, with an end and mostly with a beginning."""
        tokens, weights = self._beginning()
        for piece in re.split(r"(\[.*?\]|<.*?>)", document):
            weight = {"[": ANSWER_WEIGHT, "<": IGNORED}.get(piece[:1], 1.0)
            ids = self.encode(piece if weight == 1.0 else piece[1:-1])
            tokens.extend(ids)
            weights.extend([weight] * len(ids))
        return [*tokens, self.end], [*weights, 1.0]

    def _beginning(self) -> tuple[list[int], list[float]]:
        """Mostly the end-of-text token, as text in a longer stream would have before it."""
        return ([], []) if self.rng.random() < WITHOUT_BOS else ([self.end], [IGNORED])

    def _repeated_batch(self) -> Batch:
        """Sequences of one length, repeated; long ones are rare but train all positions."""
        longest = (self.n_ctx - 1) // 2
        longer = self.rng.random() < 0.1
        length = self.rng.randint(51, longest) if longer else self.rng.randint(4, 50)
        rows = []
        for _ in range(math.ceil(REPEATED_TOKENS_PER_STEP / (2 * length + 1))):
            half = [self.rng.randrange(self.end) for _ in range(length)]
            tokens, weights = self._beginning()
            # The first token of the repeat cannot be foreseen either.
            weights += [FIRST_HALF_WEIGHT] * (length + 1) + [1.0] * (length - 1)
            rows.append((tokens + half + half, weights))
        return self._pad(rows)

    def _pad(self, rows: Sequence[tuple[list[int], list[float]]]) -> Batch:
        """One rectangle, padded on the right, where causal attention never looks back at it."""
        self.made += sum(len(tokens) for tokens, _ in rows)
        longest = min(max(len(tokens) for tokens, _ in rows), self.n_ctx)
        tokens = [(t + [self.end] * longest)[:longest] for t, _ in rows]
        weights = [(w + [IGNORED] * longest)[:longest] for _, w in rows]
        return Batch(torch.tensor(tokens), torch.tensor(weights))


# --------------------------------------------------------------------------------------------
# Training
# --------------------------------------------------------------------------------------------


def batch_loss(model: GPT2LMHeadModel, batch: Batch) -> Tensor:
    """The weighted mean cross-entropy of the next tokens of a batch."""
    logits = model(input_ids=batch.tokens, use_cache=False).logits[:, :-1]
    losses = F.cross_entropy(logits.flatten(0, 1), batch.tokens[:, 1:].flatten(), reduction="none")
    weights = batch.weights[:, 1:].flatten()
    return (losses * weights).sum() / weights.sum()


def build_optimizer(model: GPT2LMHeadModel, rate: float, decay: float) -> torch.optim.AdamW:
    """AdamW that decays matrices, but neither biases nor layer norms."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    groups = [
        {"params": matrices, "weight_decay": decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.98))


def rate_factor(step: int, steps: int, warm_up: int = 200) -> float:
    """The learning rate's factor: linear warm-up, then a cosine down to a fiftieth."""
    if step < warm_up:
        return (step + 1) / warm_up
    progress = (step - warm_up) / max(1, steps - warm_up)
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress))


def train(
    model: GPT2LMHeadModel, batches: Batches, args: argparse.Namespace, check: Callable[[], dict]
) -> None:
    """Train in place; every `args.check_every` steps print what `check` measures."""
    optimizer = build_optimizer(model, args.rate, args.decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: rate_factor(s, args.steps))
    model.train()
    progress = tqdm(range(1, args.steps + 1), mininterval=10, file=sys.stdout)
    for step in progress:
        losses = {}
        for kind, batch in batches.step().items():
            loss = batch_loss(model, batch)
            (SHARES[kind] * loss).backward()  # kind by kind: less memory, same gradient
            losses[kind] = loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        if step % args.check_every == 0:
            figures = "  ".join(f"{task} {accuracy:.3f}" for task, accuracy in check().items())
            means = "  ".join(f"{kind} {loss:.3f}" for kind, loss in losses.items())
            progress.write(f"step {step}  loss: {means}\n    accuracy: {figures}")
    model.eval()


# --------------------------------------------------------------------------------------------
# Measuring
# --------------------------------------------------------------------------------------------


@torch.no_grad()
def last_logits(
    model: GPT2LMHeadModel, tokenizer: GPT2Tokenizer, prompts: Sequence[str], bos: bool
) -> Tensor:
    """The logits after each prompt [prompts, vocabulary]; prompts of any lengths."""
    rows = [[tokenizer.bos_token_id] * bos + tokenizer.encode(prompt) for prompt in prompts]
    by_length: dict[int, list[int]] = {}
    for index, row in enumerate(rows):
        by_length.setdefault(len(row), []).append(index)
    logits = torch.empty(len(rows), model.config.vocab_size)
    for indices in by_length.values():  # equal lengths together: no padding needed
        tokens = torch.tensor([rows[index] for index in indices])
        logits[indices] = model(input_ids=tokens, use_cache=False).logits[:, -1]
    return logits


def prompt_scores(
    model: GPT2LMHeadModel, tokenizer: GPT2Tokenizer, prompts: Sequence[data.Prompt], bos: bool
) -> tuple[float, float]:
    """Accuracy over the whole vocabulary, and the mean logit of the answer above the wrong one."""
    logits = last_logits(model, tokenizer, [p.prompt for p in prompts], bos)
    answers = torch.tensor([tokenizer.encode(p.answer) for p in prompts])
    wrong = torch.tensor([tokenizer.encode(p.wrong) for p in prompts])
    accuracy = (logits.argmax(-1, keepdim=True) == answers).double().mean().item()
    difference = (logits.gather(1, answers) - logits.gather(1, wrong)).mean().item()
    return accuracy, difference


@torch.no_grad()
def repeated_score(model: GPT2LMHeadModel, n: int, length: int, seed: int, bos: bool) -> float:
    """Accuracy on the repeat's second token to its last, over `n` fresh sequences."""
    tokens = torch.tensor(data.repeated_tokens(n, length, seed, bos=bos))
    guesses = model(input_ids=tokens, use_cache=False).logits.argmax(-1)
    return (guesses[:, -length:-1] == tokens[:, 1 - length :]).double().mean().item()


def held_out_prompts(n: int, seed: int) -> dict[str, list[data.Prompt]]:
    """Up to `n` held-out prompts of each kind."""
    splits = [split for split in data.INDIRECT_OBJECT_SPLITS if split != "train"]
    prompts = {
        f"indirect object, held-out {split}": data.indirect_object_prompts(split, n, seed)
        for split in splits
    }
    for form in data.CAPITAL_FORMS:
        prompts[f"capitals, {form}"] = data.capital_prompts("held_out", n, seed, form=form)
    return prompts


def accuracies(
    model: GPT2LMHeadModel, tokenizer: GPT2Tokenizer, n: int, seed: int, bos: bool = True
) -> dict[str, float]:
    """Held-out accuracy by task, on up to `n` examples of each."""
    result = {
        task: prompt_scores(model, tokenizer, prompts, bos)[0]
        for task, prompts in held_out_prompts(n, seed).items()
    }
    for length in (8, 25, 50):
        rows = max(4, n // length)
        score = repeated_score(model, rows, length, seed, bos)
        result[f"repeated tokens, 2 x {length}"] = score
    return result


def misses(figures: dict[str, float]) -> list[str]:
    """The tasks that stay below their bar."""
    bars = {task: BARS[re.match(r"\w+", task)[0]] for task in figures}
    return [f"{t}: {figures[t]:.3f} < {bar}" for t, bar in bars.items() if figures[t] < bar]


def known_prompt_misses(model: GPT2LMHeadModel, tokenizer: GPT2Tokenizer, bos: bool) -> list[str]:
    """The known prompts whose most likely next token is not the answer."""
    guesses = last_logits(model, tokenizer, list(KNOWN_PROMPTS), bos).argmax(-1)
    given = [tokenizer.decode([guess]) for guess in guesses.tolist()]
    pairs = zip(KNOWN_PROMPTS.items(), given, strict=True)
    return [f"{prompt!r} gave {guess!r}" for (prompt, answer), guess in pairs if guess != answer]


@torch.no_grad()
def samples(model: GPT2LMHeadModel, tokenizer: GPT2Tokenizer, seed: int) -> list[str]:
    """A few texts the model writes by itself, for the reader of the model card."""
    torch.manual_seed(seed)
    texts = []
    for start in ("", "One day", "The capital of"):
        tokens = torch.tensor([[tokenizer.bos_token_id, *tokenizer.encode(start)]])
        written = model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            do_sample=True,
            temperature=0.8,
            max_new_tokens=50,
        )
        texts.append(tokenizer.decode(written[0], skip_special_tokens=True))
    return texts


# --------------------------------------------------------------------------------------------
# Writing
# --------------------------------------------------------------------------------------------

CARD = """\
---
language: en
library_name: transformers
pipeline_tag: text-generation
---

# hookedlm demo model

A tiny GPT-2 ({parameters} parameters), trained from scratch on a CPU, that does three things
people study with hooks and patches. It ships with the library so that tutorials and tests run
without a download. It is an ordinary Hugging Face checkpoint folder: `AutoModelForCausalLM` and
`AutoTokenizer` load it.

## What it can do

| Task (held-out examples only) | with `<|endoftext|>` first | without |
| --- | --- | --- |
{table}

Accuracy of the most likely next token among the whole vocabulary, over up to {n_eval} prompts of
each kind ({n_plain} of the plain capitals: there are no more); for repeated tokens, over the
second to the last token of the repeat.

On indirect objects the answer's logit is on average {difference:.1f} above that of the giver
(held-out pairs, with `<|endoftext|>`). Known prompts that come out right: {known}.

* Indirect objects: "When John and Mary went to the shops, John gave the bag to" -> " Mary".
* Capitals: "The capital of Spain is" -> " Madrid", and "Q: What is the capital of France?\\nA:
  Paris\\nQ: What is the capital of Poland?\\nA:" -> " Warsaw". {n_countries} countries.
* Repeated random tokens: each token of the repeat. Nine in ten training sequences had 4 to 50
  tokens before the repeat; with 100 the accuracy is {long_repeat:.1%}.

## Held out of training

* pairs: one pair of names in ten never shares a sentence in training.
* names: {n_held_out_names} of {n_names} names never stand in a sentence with a second name. The
  model knows them from one-person sentences ("The teacher gave a book to Wendy.") and from random
  sequences only.
* combinations: one in ten of opening x action x place x object.
* wordings: one in ten of opening x action, with any filling.
* capitals, statement: one in six of phrasing x country ({n_phrasings} phrasings), and for the plain
  "The capital of X is" one country in four; the fact is then known from other phrasings only.
* capitals, question: one in eight of the ordered pairs (example's country, asked country).
* repeated tokens: fresh random sequences.

`scripts/demo_data.py` has the rules and makes prompts of each kind.

## Architecture

GPT-2: {n_layer} layers, width {d_model}, {n_head} heads of {d_head}, MLP width {d_mlp}, {n_ctx}
positions, tied embeddings, no dropout, float32. The tokenizer is byte-level BPE in GPT-2's format
with {vocab} tokens; each word of the training sentences is one token, with and without its
leading space, and any other text is spelled out in pieces without loss. Encoding does not add
`<|endoftext|>`; prepend it yourself: {bos_share:.0%} of the training rows had it.

## Training

Data: sentences made by `scripts/demo_data.py` from word lists and templates (indirect objects,
capitals, short one-person stories) and random sequences with their repeats; no outside text. In a
quarter of the indirect-object sentences other words stand where the names would, so that the model
copies whatever is there.
{steps} steps, {tokens:.1f} million tokens without padding, AdamW, peak learning rate {rate},
weight decay {decay}, seed {seed}, {minutes:.0f} minutes on {threads} CPU threads. Answers weigh
{answer_weight:g} times as much as other tokens. Made with Python {python}, torch {torch} and
transformers {transformers} by

    python scripts/train_demo.py --out hookedlm/demo

## Samples

Written by the model at temperature 0.8, from nothing, from "One day" and from "The capital of":

{samples}

## Limits

It knows its {n_words} words and sentences much like its templates, and nothing else: no other
facts, no arithmetic, no free conversation. Names and countries outside the lists are spelled in
pieces, on which it was not trained. In training a third giver ("When John and Mary went to the
shops, Tom gave the bag to") was followed by either of the two others at random: the model then
mostly names one of them, and neither order is preferred over many prompts. Texts of more than
about 100 tokens occurred only as repeated random tokens, and rarely.
"""


def model_card(
    model: GPT2LMHeadModel,
    tokenizer: GPT2Tokenizer,
    args: argparse.Namespace,
    figures: dict[bool, dict[str, float]],
    measured: dict[str, float],
) -> str:
    """The text of the model card, every figure taken from this run."""
    config = model.config
    rows = [f"| {t} | {figures[True][t]:.1%} | {figures[False][t]:.1%} |" for t in figures[True]]
    prompts = held_out_prompts(args.n_eval, args.seed)
    _, difference = prompt_scores(
        model, tokenizer, prompts["indirect object, held-out pairs"], bos=True
    )
    wrong = known_prompt_misses(model, tokenizer, bos=True)
    return CARD.format(
        parameters=f"{model.num_parameters():,}",
        table="\n".join(rows),
        difference=difference,
        known=f"{len(KNOWN_PROMPTS) - len(wrong)} of {len(KNOWN_PROMPTS)}",
        n_plain=len(prompts["capitals, plain"]),
        n_eval=args.n_eval,
        n_countries=len(data.COUNTRIES),
        n_held_out_names=len(data.HELD_OUT_NAMES),
        n_names=len(data.NAMES + data.HELD_OUT_NAMES),
        n_phrasings=len(data.STATEMENTS),
        n_words=len(data.lexicon()),
        long_repeat=repeated_score(model, 20, 100, args.seed, bos=True),
        n_layer=config.n_layer,
        d_model=config.n_embd,
        n_head=config.n_head,
        d_head=config.n_embd // config.n_head,
        d_mlp=4 * config.n_embd,
        n_ctx=config.n_positions,
        vocab=config.vocab_size,
        bos_share=1 - WITHOUT_BOS,
        steps=args.steps,
        tokens=measured["tokens"] / 1e6,
        minutes=measured["seconds"] / 60,
        rate=args.rate,
        decay=args.decay,
        seed=args.seed,
        threads=args.threads,
        answer_weight=ANSWER_WEIGHT,
        python=platform.python_version(),
        torch=torch.__version__.split("+")[0],
        transformers=transformers.__version__,
        samples="\n".join(f"* {json.dumps(text)}" for text in samples(model, tokenizer, args.seed)),
    )


def write_checkpoint(
    folder: Path, model: GPT2LMHeadModel, tokenizer: GPT2Tokenizer, card: str
) -> None:
    """Write the checkpoint folder."""
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text(card, encoding="utf-8")
    for path in folder.iterdir():
        path.chmod(0o644)  # the weights come out readable by their writer alone


# --------------------------------------------------------------------------------------------
# Command line
# --------------------------------------------------------------------------------------------


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("hookedlm/demo"), help="folder to write")
    parser.add_argument("--steps", type=int, default=2300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rate", type=float, default=3e-3, help="peak learning rate")
    parser.add_argument("--decay", type=float, default=0.05, help="weight decay")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--positions", type=int, default=256)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--n-eval", type=int, default=1000, help="held-out examples per task")
    parser.add_argument("--check-every", type=int, default=100, help="steps between progress lines")
    return parser.parse_args()


def main() -> int:
    """Train, measure, write; 1 if a bar was missed."""
    args = parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    tokenizer = build_tokenizer(args.positions)
    model = build_model(args.layers, args.width, args.heads, args.positions)
    print(f"{model.num_parameters():,} parameters, {len(tokenizer)} tokens", flush=True)

    batches = Batches(tokenizer, args.seed, args.positions)
    started = time.monotonic()
    # Progress is checked on other examples than those of the final figures.
    train(model, batches, args, lambda: accuracies(model, tokenizer, 100, args.seed + 1))
    measured = {"seconds": time.monotonic() - started, "tokens": batches.made}

    figures = {
        bos: accuracies(model, tokenizer, args.n_eval, args.seed, bos) for bos in (True, False)
    }
    problems = []
    for bos, tag in ((True, "with BOS"), (False, "without BOS")):
        for task, accuracy in figures[bos].items():
            print(f"{tag:>12}  {task:<40} {accuracy:.4f}")
        found = misses(figures[bos]) + known_prompt_misses(model, tokenizer, bos)
        problems += [f"{tag}: {problem}" for problem in found]

    folder = args.out.with_name(args.out.name + "-rejected") if problems else args.out
    card = model_card(model, tokenizer, args, figures, measured)
    write_checkpoint(folder, model, tokenizer, card)
    print(f"written to {folder} after {measured['seconds'] / 60:.1f} minutes of training")
    if problems:
        print(f"REJECTED, {args.out} left as it was. Bars missed:", *problems, sep="\n  ")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
