"""Regenerate docs/families.md: every family of the tests' table, compared with Hugging Face.

python scripts/families_table.py            # write docs/families.md
python scripts/families_table.py --check    # exit 1 if what it says (errors aside) has changed
"""

from __future__ import annotations

import argparse
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import hf_truth
from tiny import TINIES, VOCAB, Tiny

import hookedlm
from hookedlm.convert.check import compare

PAGE = ROOT / "docs" / "families.md"
HEAD = """# Families

Every configuration of `tests/tiny.py` (tiny random models, all parameters perturbed), loaded by
`hookedlm.load` and compared with plain Hugging Face on a batch padded on the left. Errors are the
largest difference of a logit over the largest logit, worst over a type's configurations.

- **exact**: the logits equal Hugging Face's in every bit. Why others differ in the last digits
  stands in `tests/test_parity.py` (`NOT_EXACT`).
- **listening**: the same with a listener on every hook point, so that longhand code runs.
- **generation**: greedy generation with a key-value cache equals Hugging Face's, token by token.
- **uniform**: parts written in this library's own layers; blocks with their layouts.
- **opaque**: parts that run as Hugging Face wrote them, in which configurations, and why. Model
  types without a row here load too, some or all of their parts opaque: see [design](design.md).

torch {torch}, transformers {transformers}. Regenerate with `make docs`.

| type | tried | uniform | float32 | listening | bfloat16 | generation | opaque |
| --- | --- | --- | --- | --- | --- | --- | --- |
"""


@dataclass
class Result:
    """What one type's configurations came to."""

    variants: list[str] = field(default_factory=list)
    errors: dict[str, list[float]] = field(default_factory=dict)
    exact: dict[str, list[bool]] = field(default_factory=dict)
    same_text: list[bool] = field(default_factory=list)
    uniform: set[str] = field(default_factory=set)
    opaque: dict[tuple[str, str], list[str]] = field(default_factory=dict)

    def row(self, model_type: str) -> str:
        """One line of the table."""
        cells = [f"`{model_type}`", str(len(self.variants)), ", ".join(sorted(self.uniform))]
        cells += [self.error(kind) for kind in ("float32", "listening", "bfloat16")]
        cells.append("equal" if all(self.same_text) else "differs")
        opaque = [
            f"{what} ({', '.join(dict.fromkeys(names))}): {why}"
            for (what, why), names in self.opaque.items()
        ]
        return "| " + " | ".join([*cells, "; ".join(opaque) or "none"]) + " |"

    def error(self, kind: str) -> str:
        """Exact, or the worst error with how many configurations are exact all the same."""
        exact, worst = self.exact[kind], max(self.errors[kind])
        if all(exact):
            return "exact"
        if any(exact):
            return f"{worst:.0e} ({sum(exact)} of {len(exact)} exact)"
        return f"{worst:.0e}"


@torch.no_grad()
def measure(tiny: Tiny, result: Result) -> None:
    """Add one configuration's figures."""
    result.variants.append(tiny.variant)
    tokens, mask = hf_truth.padded_batch(VOCAB, [11, 6, 9], "left", 0, seed=7)
    for kind, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        theirs = tiny.build(dtype=dtype)
        ours = hookedlm.load(theirs)
        expected = hf_truth.logits_of(theirs, tokens, mask)
        runs = {kind: ours(tokens, attention_mask=mask)}
        if dtype is torch.float32:
            runs["listening"], _ = ours.run_with_cache(
                tokens, attention_mask=mask, names_filter=list(ours.hook_dict)
            )
            told(ours, theirs, tiny, result)
        for name, got in runs.items():
            agreement = compare(got, expected, mask.bool())
            result.errors.setdefault(name, []).append(agreement.error)
            result.exact.setdefault(name, []).append(agreement.exact)


def told(ours: hookedlm.HookedTransformer, theirs, tiny: Tiny, result: Result) -> None:
    """Generation and opaque parts."""
    prompt = torch.randint(3, VOCAB, (2, 6), generator=torch.Generator().manual_seed(3))
    expected = hf_truth.greedy(theirs, prompt, torch.ones_like(prompt), 6)
    got = ours.generate(prompt, max_new_tokens=6, do_sample=False, stop_at_eos=False)
    result.same_text.append(torch.equal(got[:, -6:], expected[:, -6:]))
    for part in ours.fidelity().parts:
        if part.opaque:
            why = re.sub(r", but .* away", ", but its numbers differ", part.reason)
            kind = (part.form.removeprefix("opaque "), why)
            result.opaque.setdefault(kind, []).append(tiny.variant)
        elif part.where.startswith("blocks."):
            result.uniform.add(f"{part.form.removeprefix('uniform, ')} blocks")
        else:
            result.uniform.add(part.where)


def page() -> str:
    """The whole page."""
    results: dict[str, Result] = {}
    for tiny in TINIES:
        measure(tiny, results.setdefault(tiny.model_type, Result()))
    head = HEAD.format(torch=torch.__version__, transformers=transformers.__version__)
    return head + "\n".join(result.row(name) for name, result in results.items()) + "\n"


def stable(text: str) -> str:
    """The page without figures and versions, which machines may differ in."""
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    return "\n".join(re.sub(r"(exact|\de[-+]\d+)( \(\d+ of \d+ exact\))?", "", row) for row in rows)


def main() -> int:
    """Write the page, or compare it with what stands there."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="compare, write nothing")
    new = page()
    if parser.parse_args().check:
        same = stable(new) == stable(PAGE.read_text())
        print("docs/families.md is up to date" if same else "docs/families.md is out of date")
        return 0 if same else 1
    PAGE.write_text(new)
    print(f"wrote {PAGE.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
