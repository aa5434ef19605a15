"""What was measured, as tables."""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from libraries import LIBRARIES
from models import MODELS
from tasks import TASKS


@dataclass
class Figure:
    """One library at one task."""

    samples: list[float] = field(default_factory=list)
    """Seconds of each round, of the whole task."""
    memory: float | None = None
    """Extra bytes at the peak."""
    held: float | None = None
    """Extra bytes afterwards."""
    weights: float | None = None
    every: int = 1
    """It did each ``every``-th cell; the samples are scaled up."""
    off: float | None = None
    """Its largest difference from the library that is compared with, relative to the largest."""
    note: str = ""
    spent: float = 0.0

    def add(self, seconds: float, spent: float | None = None) -> None:
        """A round's time; ``spent``: what it took to find out."""
        self.spent += seconds if spent is None else spent
        self.samples.append(seconds * self.every)

    def enough(self, budget: float) -> bool:
        """Whether its time is used up; two rounds are the least, unless one takes longer."""
        return self.spent > budget and (len(self.samples) >= 2 or self.spent > 2 * budget)

    @property
    def seconds(self) -> float | None:
        """The median."""
        return statistics.median(self.samples) if self.samples else None

    def numbers(self) -> dict[str, float | None]:
        """What goals are compared with."""
        return {
            "seconds": self.seconds,
            "memory": self.memory,
            "held": self.held,
            "weights": self.weights,
        }

    def cell(self, ours: float | None) -> str:
        """Median and, for another library, how many times this one's time it is."""
        if self.seconds is None:
            return "–" if self.note in ("", "not offered") else "see below"
        scaled = "~" if self.every > 1 else ""
        ratio = "" if ours is None else f" ({self.seconds / ours:.2f})"
        return f"{scaled}{milliseconds(self.seconds)}{ratio}"


def milliseconds(seconds: float) -> str:
    """With as many digits as mean anything."""
    value = seconds * 1e3
    return f"{value:,.2f}" if value < 100 else f"{value:,.0f}"


def megabytes(figure: Figure) -> str:
    """Peak, and in brackets what remains, as numbers of MB; empty if nobody measured it."""
    if figure.memory is None:
        return ""
    remains = "" if figure.held is None else f" ({figure.held / 1e6:,.0f})"
    return f"{figure.memory / 1e6:,.0f}{remains}"


@dataclass
class Table:
    """All tasks of a model: milliseconds, and in brackets the ratio to this library's."""

    model: str
    libraries: list[str]
    rows: dict[str, dict[str, Figure]] = field(default_factory=dict)
    unable: dict[str, str] = field(default_factory=dict)

    def heading(self) -> str:
        """The first two lines."""
        titles = [LIBRARIES[name].title for name in self.libraries]
        return f"| task | {' | '.join(titles)} |\n|{' --- |' * (len(titles) + 1)}"

    def line(self, task: str) -> str:
        """Milliseconds of a task."""
        row = self.rows[task]
        ours = row["hookedlm"].seconds if "hookedlm" in row else None
        cells = [row[name].cell(None if name == "hookedlm" else ours) for name in self.libraries]
        return f"| {TASKS[task].title} | {' | '.join(cells)} |"

    def memory_line(self, task: str) -> str:
        """Extra megabytes of a task."""
        cells = [megabytes(self.rows[task][name]) for name in self.libraries]
        return f"| {TASKS[task].title} | {' | '.join(cells)} |"

    def notes(self) -> list[str]:
        """What did not run, and why."""
        return [
            f"- {LIBRARIES[name].title}, {TASKS[task].title}: {figure.note}"
            for task, row in self.rows.items()
            for name, figure in row.items()
            if figure.note not in ("", "not offered")
        ]


def machine(told: Mapping[str, Mapping[str, Any]], device: str, clock: str) -> str:
    """Date, machine and versions, as lines of Markdown."""
    if not told:
        raise SystemExit("no library could be started")
    first = next(iter(told.values()))
    processor = first["processor"] or processor_name()
    lines = [
        f"{time.strftime('%Y-%m-%d')}, {processor}, {first['threads']} threads, "
        f"Python {platform.python_version()}, float32, {device}, {clock} time.",
        "",
    ]
    for name, one in told.items():
        versions = ", ".join(f"{package} {v}" for package, v in one["versions"].items())
        lines.append(f"- {LIBRARIES[name].title}: {versions}")
    return "\n".join(lines)


def processor_name() -> str:
    """What kind of processor this is, as far as the system tells."""
    told = Path("/proc/cpuinfo")
    if told.is_file():
        for line in told.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


INTRODUCTION = """# Benchmarks

Speed and memory are claimed from here only, as ratios against peers measured side by side. This
page is written by

    python benchmarks/environments.py
    python benchmarks/compare.py --goals --markdown docs/benchmarks.md

Run it on your machine; figures differ. Each library runs in an environment and a process of its
own, one at a time; all load the same random weights and the same tokens; what they come to is
compared before anything is timed (to 1e-4 of the largest value); rounds are interleaved. Numbers
are medians in milliseconds; in brackets, how many times this library's. A ~ marks a grid of patches
that was run one by one for each twelfth cell only, and scaled up.
"""

HOW = """## How each library does it

- Plain transformers: PyTorch's own hooks; a sweep is one pass for each patch.
- TransformerLens: `generic_activation_patch` and its kin; heads' and neurons' attribution by
  `stack_head_results`, `stack_neuron_results` and `logit_attrs`.
- nnsight: a sweep is one trace whose batch rows are the patches; pyvene: a batch of the patches of
  a layer, one layer after the other.
- "Cache everything" is one call of `run_with_cache`. Here patterns, scores and norms are computed
  when they are first read; the line that reads everything includes that.
- "Gradients": the loss' gradient at what enters every block. The weights' gradients are computed
  too, unless frozen.
- Memory is the peak over what the process held before the call.
"""


def markdown(
    about: str, tables: list[Table], goals: list[str], arguments: argparse.Namespace
) -> str:
    """The whole page."""
    parts = [INTRODUCTION, about + "\n"]
    for table in tables:
        parts.append(f"## {MODELS[table.model].title}\n")
        parts.append("\n".join([table.heading(), *map(table.line, table.rows)]) + "\n")
        parts.append("Extra memory at the peak (in brackets: afterwards), MB:\n")
        with_memory = [
            task
            for task, row in table.rows.items()
            if any(figure.memory is not None for figure in row.values())
        ]
        parts.append("\n".join([table.heading(), *map(table.memory_line, with_memory)]) + "\n")
        if table.notes():
            parts.append("\n".join(["Not measured:\n", *table.notes()]) + "\n")
    if goals:
        parts.append("\n".join(["## Goals\n", *goals]) + "\n")
    return "\n".join([*parts, HOW])
