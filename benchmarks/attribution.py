"""Logit attribution of every head and every neuron: time and extra memory, with a direction pulled
back (`neuron_logit_attrs`) and with every component's vector made (`stack_neuron_results`).

    python benchmarks/attribution.py [--shapes 1x16 8x64] [--rounds 5]

Each measurement runs in a process of its own; extra memory is the process's peak over what it held
before the call (Linux). What would need more memory than ``--limit`` GB is not run; the size of its
stack alone is printed.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from transformers import GPT2Config, GPT2LMHeadModel

import hookedlm
from hookedlm import ActivationCache

WAYS: dict[str, Callable[[ActivationCache], torch.Tensor]] = {
    "heads, pulled back": lambda cache: cache.head_logit_attrs(7, 9),
    "heads, stacked": lambda cache: cache.logit_attrs(cache.stack_head_results(), 7, 9),
    "neurons, pulled back": lambda cache: cache.neuron_logit_attrs(7, 9),
    "neurons, stacked": lambda cache: cache.logit_attrs(cache.stack_neuron_results(-1), 7, 9),
}


def memory(field: str) -> int:
    """A field of this process's status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise SystemExit(f"no {field} in /proc/self/status: memory is measured on Linux only")


@torch.no_grad()
def measure(way: str, shape: tuple[int, int], rounds: int) -> None:
    """Print seconds (median) and extra bytes (of the first call) of one way."""
    torch.manual_seed(0)
    model = hookedlm.load(GPT2LMHeadModel(GPT2Config()).eval())
    _, cache = model.run_with_cache(torch.randint(50257, shape))
    cache["scale"]  # computed when first read: not part of the attribution
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
    before = memory("VmRSS")
    attrs = WAYS[way](cache)
    extra = memory("VmHWM") - before
    del attrs
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        WAYS[way](cache)
        seconds.append(time.perf_counter() - start)
    print(statistics.median(seconds), extra)


def main() -> None:
    """Parse, measure, print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", nargs="+", default=["1x16", "8x64"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--limit", type=float, default=8.0, help="GB that a stack may take")
    parser.add_argument("--one", nargs=2, metavar=("WAY", "SHAPE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        way, text = arguments.one
        batch, pos = map(int, text.split("x"))
        return measure(way, (batch, pos), arguments.rounds)
    print(
        f"torch {torch.__version__}, transformers {transformers.__version__}, "
        f"hookedlm {hookedlm.__version__}, Python {platform.python_version()}, "
        f"{torch.get_num_threads()} threads\n\n"
        "| what | batch x pos | ms | extra memory, MB |\n| --- | --- | --- | --- |"
    )
    for text in arguments.shapes:
        batch, pos = map(int, text.split("x"))
        for way in WAYS:
            components = 12 * (12 if "heads" in way else 3072)
            stack = components * batch * pos * 768 * 4
            cells = f"| {way} | {batch} x {pos} |"
            if "stacked" in way and 2 * stack > arguments.limit * 1e9:
                print(f"{cells} not run | its stack alone: {stack / 1e6:,.0f} |", flush=True)
                continue
            command = [sys.executable, __file__, "--rounds", str(arguments.rounds)]
            done = subprocess.run(
                [*command, "--one", way, text], capture_output=True, text=True, check=True
            )
            seconds, extra = map(float, done.stdout.split())
            print(f"{cells} {seconds * 1e3:.1f} | {extra / 1e6:,.0f} |", flush=True)


if __name__ == "__main__":
    main()
