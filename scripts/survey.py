"""Survey of every causal-LM type in the installed transformers: writes docs/families.md.

    python scripts/survey.py                 # every type, three configurations of each
    python scripts/survey.py llama gemma2    # only these, printed; the page stays as it is
    python scripts/survey.py --jobs 4        # with so many processes
    python scripts/survey.py --check         # exit 1 if a registered row is missing on the page

Models are tiny and random (tests/sizes.py, tests/measuring.py): nothing is downloaded.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import transformers
from measuring import Result, measure, nats, options_of
from sizes import NOT_BUILT, variants_of
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from hookedlm.families import FAMILIES

PAGE = ROOT / "docs" / "families.md"
HEAD = """# Families

Every causal-LM type of transformers {transformers}, as tiny random models with all parameters
perturbed (`tests/sizes.py`): a base configuration of each, one with its options turned over, and
one with other sizes, multipliers and positions, as far as transformers builds them. Loaded by
`hookedlm.load` and measured against plain Hugging Face (`tests/measuring.py`). Of {n} types,
{failed} do not load, {uniform} are uniform in every part of every configuration, {clean} have
nothing in the last column.

- **blocks**: how blocks run. *uniform*: in this library's own layers, with the layout; *opaque*:
  what runs as Hugging Face wrote it. Every type's stream has its hooks.
- **float32**, **padded**, **bfloat16**: the largest difference of a logit over the largest logit,
  worst over a type's configurations; padded on the left; in bfloat16 at the median position.
- **hooks**: how many hook points the base configuration has. Each was fired and edited, and the
  edit changed the logits, or it stands in the last column.
- **remarks**: what is opaque and why, and whatever is not as it should be: an error above 1e-5, a
  decomposition that does not add up, logits that move by more than 1e-5 while every point is
  observed, or log-probabilities by more than 1e-4 nats when the model is processed (in both cases:
  and by more than twice what rounding does to Hugging Face's own: from float64 to float32, or in
  the last digit of each weight of its embedding), generation (greedy, with and without a key-value
  cache) that differs from Hugging Face's.

torch {torch}. Regenerate with `make survey`.

| type | tried | blocks | float32 | padded | bfloat16 | hooks | remarks |
| --- | --- | --- | --- | --- | --- | --- | --- |
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("kinds", nargs="*", help="types; default: all, and the page is written")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--base", action="store_true", help="only the base configurations")
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    if options.check:
        return check()
    kinds = options.kinds or sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    tasks = [
        (kind, v) for kind in kinds for v in ("base", *(() if options.base else variants(kind)))
    ]
    results: dict[str, list[Result]] = defaultdict(list)
    with ProcessPoolExecutor(
        options.jobs, initializer=torch.set_num_threads, initargs=(1,)
    ) as pool:
        for result in pool.map(measured, tasks):
            results[result.kind].append(result)
            said = "; ".join(result.troubles()) or "as it should be"
            print(f"{result.kind} {result.variant}: {said}", flush=True)
    if not options.kinds:
        PAGE.write_text(page(results), "utf-8")
    return 0


def variants(kind: str) -> list[str]:
    """The other configurations of a type that transformers runs."""
    if kind in NOT_BUILT:
        return []
    return [variant for variant in variants_of(kind) if options_of(kind, variant)]


def measured(task: tuple[str, str]) -> Result:
    """One configuration, in a process of the pool."""
    kind, variant = task
    if kind in NOT_BUILT:
        return Result(kind, variant, crash=NOT_BUILT[kind])
    return measure(kind, variant)


def page(results: dict[str, list[Result]]) -> str:
    """docs/families.md."""
    rows = [row(kind, found) for kind, found in results.items()]
    head = HEAD.format(
        transformers=transformers.__version__,
        torch=torch.__version__.split("+")[0],
        n=len(results),
        failed=sum(any(r.crash for r in found) for found in results.values()),
        uniform=sum(all(r.uniform for r in found) for found in results.values()),
        clean=sum(not remarks(found) for found in results.values()),
    )
    return head + "\n".join(rows) + "\n"


def row(kind: str, found: list[Result]) -> str:
    """One line of the table."""
    forms = sorted({form for result in found for form in result.forms})
    worst = [
        nats(max(values, key=lambda v: v if isinstance(v, float) else float("inf")))
        if (values := [r.numbers[what] for r in found if what in r.numbers])
        else ""
        for what in ("float32", "padded", "bfloat16")
    ]
    told = [name if not name.count(":") else "see remarks" for name in worst]
    n_points = str(len(found[0].points)) if found[0].points else ""
    cells = [f"`{kind}`", str(len(found)), ", ".join(forms), *told, n_points, remarks(found)]
    return "| " + " | ".join(cells) + " |"


def remarks(found: list[Result]) -> str:
    """What is opaque, and what is wrong, each with the configurations it holds for."""
    where: dict[str, list[str]] = defaultdict(list)
    for result in found:
        refused = [
            f"{what}: {said}" for what, said in result.numbers.items() if isinstance(said, str)
        ]
        wrong = result.troubles()
        for text in (*result.opaque, *(t for t in refused if t not in wrong), *wrong):
            where[text].append(result.variant)
    shown = [
        text if len(variants) == len(found) else f"{text} ({', '.join(variants)})"
        for text, variants in where.items()
    ]
    return "; ".join(shown).replace("|", "/")


def check() -> int:
    """Whether every registered row stands on the page."""
    text = PAGE.read_text("utf-8")
    kinds = [k for k in FAMILIES if k in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES]
    missing = [kind for kind in kinds if f"| `{kind}` |" not in text]
    if missing:
        print(f"not on {PAGE.relative_to(ROOT)}: {', '.join(missing)}. Run make survey.")
    return bool(missing)


if __name__ == "__main__":
    sys.exit(main())
