"""The driver's end of a worker."""

from __future__ import annotations

import json
import select
import subprocess
from pathlib import Path
from typing import Any

from environments import FOLDER
from libraries import LIBRARIES


class LibraryError(Exception):
    """A worker failed, or took too long."""


class Client:
    """A worker's process, started when it is first asked something."""

    def __init__(self, name: str, python: str, limit: float):
        self.name, self.python, self.limit = name, python, limit
        self.process: subprocess.Popen[str] | None = None

    @property
    def pid(self) -> int:
        """The process' number; 0 if there is none."""
        return 0 if self.process is None else self.process.pid

    def ask(self, what: str, **options: Any) -> dict[str, Any]:
        """Have the worker do something. Raises LibraryError when it fails or exceeds the limit."""
        process = self._started()
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(json.dumps({"do": what} | options) + "\n")
            process.stdin.flush()
        except BrokenPipeError:
            raise LibraryError(f"its process ended; see {self._log()}") from None
        if not select.select([process.stdout], [], [], self.limit)[0]:
            self.close()
            raise LibraryError(f"over {self.limit:g} s")
        line = process.stdout.readline()
        if not line:
            raise LibraryError(f"its process ended; see {self._log()}")
        answer = json.loads(line)
        if "error" in answer:
            raise LibraryError(answer["error"])
        return answer

    def import_seconds(self, clock: str) -> float:
        """Seconds that the import takes in a fresh process, Python's own start not counted."""
        now = {"wall": "time.perf_counter()", "processor": "time.process_time()"}[clock]
        statement = LIBRARIES[self.name].statement
        code = f"import time; start = {now}; {statement}; print({now} - start)"
        try:
            done = subprocess.run(
                [self.python, "-c", code], capture_output=True, text=True, timeout=self.limit
            )
        except subprocess.TimeoutExpired:
            raise LibraryError(f"over {self.limit:g} s") from None
        if done.returncode:
            raise LibraryError(done.stderr.strip().splitlines()[-1])
        return float(done.stdout.split()[-1])

    def close(self) -> None:
        """End the process."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def _started(self) -> subprocess.Popen[str]:
        if self.process is None or self.process.poll() is not None:
            self.process = subprocess.Popen(
                [self.python, str(Path(__file__).with_name("worker.py")), self.name],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._log().open("a"),
                text=True,
                bufsize=1,
            )
        return self.process

    def _log(self) -> Path:
        (FOLDER / "logs").mkdir(parents=True, exist_ok=True)
        return FOLDER / "logs" / f"{self.name}.log"
