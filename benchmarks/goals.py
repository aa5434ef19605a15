"""What this library is to reach, as ratios of what one run measured: a table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Goal:
    """hookedlm's figure of ``task`` is at most ``most`` times that of ``other``.

    ``other``: a library, at the same task or at ``other_task``; or None, and ``most`` is a number
    of bytes, or of copies of the weights. Speed-ups are written as `faster` writes them.
    """

    task: str
    model: str
    other: str | None
    most: float
    other_task: str = ""
    what: Literal["seconds", "memory", "memory / weights", "held / weights"] = "seconds"
    devices: tuple[str, ...] = ("cpu", "cuda")

    @property
    def told(self) -> str:
        """As a person says it."""
        if self.other is None:
            unit = "GB" if self.what == "memory" else "x the weights"
            scale = 1e9 if self.what == "memory" else 1
            when = "kept afterwards" if self.what.startswith("held") else "at the peak"
            return f"<= {self.most / scale:g} {unit} {when}"
        than = self.other + (f", {self.other_task}" if self.other_task else "")
        memory = " of memory" if self.what == "memory" else ""
        if self.most < 0.35 and not memory:
            return f">= {1 / self.most:g} x faster than {than}"
        return f"<= {self.most:g} x {than}{memory}"


def faster(times: float, task: str, model: str, *others: str, devices=("cpu", "cuda")):
    """At least ``times`` faster than each of the others."""
    return [Goal(task, model, other, 1 / times, devices=devices) for other in others]


OURS, HF = "hookedlm", "transformers"
TL4, TL2, SIGHT = "transformer_lens_4", "transformer_lens_2", "nnsight"
GPT2, SMALL = "gpt2-small", "small"

GOALS: list[Goal] = [
    *(Goal(f"forward {shape}", GPT2, HF, 1.0) for shape in ("1x16", "8x64", "1x1024")),
    Goal("forward 1x16", SMALL, HF, 0.65),
    Goal("cache all 8x64", GPT2, OURS, 1.1, "forward 8x64"),
    Goal("cache all 1x1024", GPT2, OURS, 1.1, "forward 1x1024"),
    Goal("cache all 8x64", SMALL, TL4, 0.5),
    Goal("cache all 1x1024", SMALL, TL4, 0.5),
    Goal("cache one layer", GPT2, HF, 1.0),
    Goal("cache one layer", GPT2, HF, 1.0, what="memory"),
    *faster(15, "resid sweep", GPT2, TL4, TL2, devices=("cpu",)),
    *faster(40, "resid sweep", GPT2, TL4, TL2, devices=("cuda",)),
    *faster(4, "resid sweep", GPT2, SIGHT),
    *faster(25, "resid sweep", SMALL, TL4),
    *faster(4, "resid sweep", SMALL, SIGHT),
    *faster(10, "head sweep", GPT2, TL4, TL2),
    *faster(3, "head sweep", GPT2, SIGHT),
    *faster(10, "head by position", GPT2, TL4, TL2),
    *faster(10, "head attribution", GPT2, TL4),
    *faster(500, "head attribution", GPT2, TL2),
    *faster(200, "neuron attribution 1x16", GPT2, TL4),
    Goal("neuron attribution 8x64", GPT2, None, 1e9, what="memory"),
    Goal("gradients", GPT2, HF, 0.8),
    Goal("generate", GPT2, HF, 1.0),
    Goal("stream", GPT2, HF, 1.0),
    Goal("stream", GPT2, HF, 1.0, what="memory"),
    Goal("convert", GPT2, None, 0.05, what="held / weights"),
    Goal("load", GPT2, None, 1.15, what="memory / weights"),
]

Figures = Mapping[tuple[str, str, str], Mapping[str, float | None]]
"""(model, task, library) -> "seconds", "memory", "held", "weights"."""


def measured(goal: Goal, figures: Figures) -> float | None:
    """What stands beside ``goal.most``; None if it was not measured in this run."""
    ours = figures.get((goal.model, goal.task, OURS), {})
    of = goal.what.split(" / ")[0]
    found = ours.get(of)
    if goal.other is None:
        by = ours.get("weights") if "weights" in goal.what else 1.0
    else:
        by = figures.get((goal.model, goal.other_task or goal.task, goal.other), {}).get(of)
    if found is None or by is None:
        return None
    return found / by if by else float("inf")


def goal_lines(figures: Figures, device: str) -> list[str]:
    """A Markdown table: each goal, what was measured, and whether it is met."""
    lines = ["| model | task | goal | measured | |", "| --- | --- | --- | --- | --- |"]
    models = {model for model, _, _ in figures}
    for goal in GOALS:
        if device not in goal.devices or goal.model not in models:
            continue
        ratio = measured(goal, figures)
        verdict = "not measured" if ratio is None else "met" if ratio <= goal.most else "**missed**"
        lines.append(
            f"| {goal.model} | {goal.task} | {goal.told} | {_said(goal, ratio)} | {verdict} |"
        )
    return lines


def _said(goal: Goal, ratio: float | None) -> str:
    if ratio is None:
        return ""
    if goal.what == "memory" and goal.other is None:
        return f"{ratio / 1e9:.2f} GB"
    if goal.other is not None and goal.most < 0.35:
        return f"{1 / ratio:.1f} x faster"
    return f"{ratio:.3f} x"
