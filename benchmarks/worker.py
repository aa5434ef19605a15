"""One library, in its own environment: does what the driver says, line by line.

    python benchmarks/worker.py LIBRARY          # JSON lines in, JSON lines out

`compare.py` starts it; nobody else needs to.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import importlib
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from libraries import LIBRARIES
from models import MODELS
from tasks import TASKS

WARM_SECONDS, SAMPLE_SECONDS, MOST_SECONDS = 0.15, 0.3, 2.0
"""In each round calls shorter than the first are repeated so long untimed, as the process before
has left caches, clock and threads as it liked; then calls are timed for so long, and their median
taken. With all that a call needs beforehand neither takes longer than the third."""
CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def resident(field: str) -> int:
    """``VmRSS`` or ``VmHWM`` of this process, in bytes."""
    lines = dict(line.split(":", 1) for line in STATUS.read_text().splitlines())
    return int(lines[field].split()[0]) * 1024


def held() -> int | None:
    """What this process holds, what is free given back before; None where nobody tells."""
    if not CLEAR.exists():
        return None
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return resident("VmRSS")


def with_peak(call: Callable[[], Any], device: str) -> tuple[Any, int | None]:
    """What a call returns, and by how much memory grew at its peak; None where nobody tells."""
    import torch

    if device != "cpu":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        answer = call()
        torch.cuda.synchronize()
        return answer, torch.cuda.max_memory_allocated() - before
    before = held()
    if before is None:
        return call(), None
    CLEAR.write_text("5")  # the peak starts from here
    answer = call()
    return answer, resident("VmHWM") - before


class Worker:
    """A library's model, and the task it was made ready for."""

    def __init__(self, name: str):
        self.name = name
        self.device = "cpu"
        self.clock = CLOCKS["wall"]
        self.model: Any = None
        self.module: Any = None
        self.run: Any = None
        self.title = ""
        self.grad = False

    def do_start(self, device: str, threads: int, clock: str) -> dict[str, Any]:
        """Import the library; its versions."""
        import torch

        self.clock = CLOCKS[clock]
        if threads:
            torch.set_num_threads(threads)
        self.device = device
        self.module = importlib.import_module(f"libraries.{LIBRARIES[self.name].file}")
        packages = ("torch", "transformers", self.module.PACKAGE)
        return {
            "versions": {package: version(package) for package in packages},
            "threads": torch.get_num_threads(),
            "processor": torch.cuda.get_device_name() if device != "cpu" else "",
        }

    def do_load(self, model: str, folder: str) -> dict[str, Any]:
        """The model that tasks are done with."""
        self.title, self.run = model, None
        self.model = None  # one at a time
        self.model = self.module.load(folder, self.device)
        return {}

    def do_prepare(self, task: str, room: float, path: str) -> dict[str, Any]:
        """Make a task ready, do it once, and write down what it came to."""
        import torch
        from libraries.given import Given, TooLargeError

        what, model = TASKS[task], MODELS[self.title]
        self.run, self.grad = None, what.grad
        make = self.module.TASKS.get(what.kind)
        if make is None:
            return {"not": "not offered"}
        given = Given(
            model.n_layers, model.n_heads, model.d_vocab, what.shape, self.device,
            what.every, room,
        )  # fmt: skip
        try:
            with torch.set_grad_enabled(what.grad):
                self.run = make(self.model, given)
                seconds, answer = self._once()
        except TooLargeError as error:
            self.run = None
            return {"not": str(error)}
        found = self.run.result(answer).detach().float().cpu().numpy()
        np.save(path, found)
        del answer
        return {"seconds": seconds, "every": self.run.every}

    def do_memory(self) -> dict[str, Any]:
        """By how much a call lets memory grow; from then on, how often a sample repeats it."""
        import torch

        with torch.set_grad_enabled(self.grad):
            self.run.before()
            return {"memory": with_peak(self.run.call, self.device)[1]}

    def do_time(self) -> dict[str, Any]:
        """Seconds of one call, and of all of them."""
        import torch

        with torch.set_grad_enabled(self.grad):
            untimed, times = 0.0, [self._once()[0]]
            if times[0] < WARM_SECONDS:
                untimed = times[0] + sum(self._repeated(WARM_SECONDS))
                times = self._repeated(SAMPLE_SECONDS)
        return {"seconds": statistics.median(times), "spent": untimed + sum(times)}

    def _repeated(self, seconds: float) -> list[float]:
        """Times of calls that together take so long."""
        times: list[float] = []
        end = time.perf_counter() + MOST_SECONDS
        while not times or (sum(times) < seconds and time.perf_counter() < end):
            times.append(self._once()[0])
        return times

    def do_process(self, task: str, folder: str, small: str) -> dict[str, Any]:
        """Time and memory of ``convert`` or ``load``, after the same of a model of no size."""
        from transformers import AutoModelForCausalLM

        convert = vars(self.module).get("convert")
        if task == "convert" and convert is None:
            return {"not": "not offered"}

        def once(path: str) -> dict[str, Any]:
            given = None
            if task == "convert":
                given = AutoModelForCausalLM.from_pretrained(path).eval()
                for parameter in given.parameters():
                    parameter.data = parameter.data.clone()  # no longer mapped from the file
                call = lambda: convert(given, path)  # noqa: E731
            else:
                call = lambda: self.module.load(path, "cpu")  # noqa: E731
            before = held()
            start = self.clock()
            made, memory = with_peak(call, "cpu")
            seconds = self.clock() - start
            after = held()
            del made
            kept = None if before is None or after is None else after - before
            return {"seconds": seconds, "memory": memory, "held": kept}

        once(small)
        return once(folder)

    def _once(self) -> tuple[float, Any]:
        self.run.before()
        self._wait()
        start = self.clock()
        answer = self.run.call()
        self._wait()
        return self.clock() - start, answer

    def _wait(self) -> None:
        if self.device != "cpu":
            import torch

            torch.cuda.synchronize()


def main() -> None:
    """Answer commands until there are no more. What a library prints goes to stderr."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("library", choices=LIBRARIES)
    worker = Worker(parser.parse_args().library)
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    for line in sys.stdin:
        command = json.loads(line)
        try:
            answer = getattr(worker, "do_" + command.pop("do"))(**command)
        except Exception as error:  # whatever a library raises is told, and the others go on
            import traceback

            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"}
        answers.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main()
