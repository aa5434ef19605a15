"""What is measured: a table. How each library does it stands in its file under ``libraries/``."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Task:
    """``kind``: the function of a library's table that does it. ``every``: of a grid of patches, a
    library that runs them one by one runs each ``every``-th, and its time is scaled up."""

    title: str
    kind: str
    shape: tuple[int, int] = (0, 0)
    grad: bool = False
    tolerance: float = 1e-4
    """Largest difference between libraries, in units of the largest value."""
    every: int = 1
    process: bool = False
    """Whether each measurement is a process of its own."""


SWEEP = (1, 15)

TASKS = {
    "import": Task("import", "import", process=True),
    "convert": Task("convert a loaded model", "convert", process=True),
    "load": Task("load from disk", "load", process=True),
    "forward 1x16": Task("forward, 1 x 16", "forward", (1, 16)),
    "forward 8x64": Task("forward, 8 x 64", "forward", (8, 64)),
    "forward 1x1024": Task("forward, 1 x 1024", "forward", (1, 1024)),
    "cache all 8x64": Task("cache everything, 8 x 64", "cache_all", (8, 64)),
    "cache all 1x1024": Task("cache everything, 1 x 1024", "cache_all", (1, 1024)),
    "cache and read all 8x64": Task(
        "cache everything and read all of it, 8 x 64", "cache_all_read", (8, 64)
    ),
    "cache one layer": Task("cache a middle layer's stream, 8 x 64", "cache_one", (8, 64)),
    "one hook": Task("add to a middle layer's stream, 8 x 64", "one_hook", (8, 64)),
    "resid sweep": Task("residual sweep, layers x 15 positions", "resid_sweep", SWEEP),
    "head sweep": Task("head sweep, layers x heads", "head_sweep", SWEEP),
    "head by position": Task(
        "head by position, layers x heads x 15", "head_by_position", SWEEP, every=12
    ),
    "head attribution": Task(
        "logit attribution of all heads, 8 x 64, last position", "head_attribution", (8, 64)
    ),
    "neuron attribution 1x16": Task(
        "logit attribution of all neurons, 1 x 16", "neuron_attribution", (1, 16)
    ),
    "neuron attribution 8x64": Task(
        "logit attribution of all neurons, 8 x 64", "neuron_attribution", (8, 64)
    ),
    "gradients": Task("gradients at every stream, 8 x 64", "gradients", (8, 64), grad=True),
    "gradients frozen": Task(
        "gradients at every stream, weights frozen, 8 x 64", "gradients_frozen", (8, 64), grad=True
    ),
    "generate": Task("generate 32 tokens after 16", "generate", (1, 16), tolerance=0.0),
    "stream": Task("stream a middle layer, 64 x 128 tokens", "stream", (64, 128)),
}
