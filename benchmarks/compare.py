"""Every library at every task, side by side: medians of interleaved rounds, and their ratios.

    python benchmarks/environments.py                          # once
    python benchmarks/compare.py --models small --goals        # a few minutes
    python benchmarks/compare.py --goals --markdown docs/benchmarks.md

Each library runs in its own environment and process, only one of them at a time; all load the same
weights, and what they come to is compared before anything is timed. A library whose environment is
missing is left out, with a line that says so. Each task is bounded in time (``--seconds``).
"""

from __future__ import annotations

import argparse
import subprocess
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from client import Client, LibraryError
from environments import FOLDER, python_of
from goals import goal_lines
from libraries import LIBRARIES
from models import MODELS
from report import Figure, Table, machine, markdown
from tasks import TASKS, Task


def checkpoint(name: str, python: str) -> str:
    """The folder of a model's checkpoint, written if it is not there yet."""
    folder = FOLDER / "models" / name
    if not (folder / "tokenizer.json").exists():  # written last
        script = Path(__file__).with_name("models.py")
        subprocess.run([python, str(script), name, str(folder)], check=True)
    return str(folder)


class Comparison:
    """One run of everything that was asked for."""

    def __init__(self, arguments: argparse.Namespace, pythons: dict[str, str]):
        self.arguments, self.pythons = arguments, pythons
        self.clients = {
            name: Client(name, python, arguments.limit) for name, python in pythons.items()
        }
        self.told: dict[str, dict[str, Any]] = {}
        self.tables: list[Table] = []

    def start(self) -> None:
        """Start the libraries; who cannot be started is left out."""
        for name, client in list(self.clients.items()):
            try:
                self.told[name] = self.start_one(client)
            except LibraryError as error:
                print(f"{name}: left out: {error}", flush=True)
                del self.clients[name]

    def start_one(self, client: Client) -> dict[str, Any]:
        """Start a library, or start it again."""
        given = self.arguments
        return client.ask("start", device=given.device, threads=given.threads, clock=given.clock)

    def measure(self, model: str) -> None:
        """All tasks of one model."""
        folder = checkpoint(model, next(iter(self.pythons.values())))
        weights = (Path(folder) / "model.safetensors").stat().st_size
        table = Table(model, list(self.clients))
        self.tables.append(table)
        print(f"\n{MODELS[model].title}\n{table.heading()}", flush=True)
        tasks = {name: TASKS[name] for name in self.arguments.tasks}
        if any(not task.process for task in tasks.values()):
            for name, client in self.clients.items():
                try:
                    client.ask("load", model=model, folder=folder)
                except LibraryError as error:
                    self.restart(client, model)
                    table.unable[name] = str(error)
        for name, task in tasks.items():
            of = self.processes if task.process else self.rounds
            row = of(model, name, task, folder, table)
            for figure in row.values():
                figure.weights = weights
            table.rows[name] = row
            print(table.line(name), flush=True)
        for line in table.notes():
            print(line, flush=True)

    def restart(self, client: Client, model: str) -> None:
        """After a failure or a time-out: a fresh process, with the model."""
        client.close()
        try:
            self.start_one(client)
            client.ask("load", model=model, folder=checkpoint(model, client.python))
        except LibraryError as error:
            print(f"{client.name}: {error}", flush=True)

    # Tasks that a waiting worker does -------------------------------------------------------------

    def rounds(
        self, model: str, name: str, task: Task, folder: str, table: Table
    ) -> dict[str, Figure]:
        """Compare what the libraries come to, then time those that agree, in turns."""
        row = {library: Figure() for library in self.clients}
        found: dict[str, np.ndarray] = {}
        room = self.arguments.memory * 1e9
        for library, client in self.clients.items():
            figure = row[library]
            if library in table.unable:
                figure.note = table.unable[library]
                continue
            path = Path(tempfile.gettempdir()) / f"benchmark-{client.pid}.npy"
            try:
                answer = client.ask("prepare", task=name, room=room, path=str(path))
                if "not" in answer:
                    figure.note = answer["not"]
                    continue
                figure.every = answer["every"]
                found[library] = np.load(path)
            except LibraryError as error:
                figure.note = str(error)
                self.restart(client, model)
            finally:
                path.unlink(missing_ok=True)
        agreeing = self.agreeing(found, row, task)
        taking_part = []
        for library in agreeing:
            try:
                row[library].memory = self.clients[library].ask("memory")["memory"]
                taking_part.append(library)
            except LibraryError as error:
                row[library].note = str(error)
                self.restart(self.clients[library], model)
        self.take_turns(model, taking_part, row)
        return row

    def agreeing(
        self, found: dict[str, np.ndarray], row: dict[str, Figure], task: Task
    ) -> list[str]:
        """Whose answer is that of plain transformers, or of the first library that has one."""
        if not found:
            return []
        truth_of = "transformers" if "transformers" in found else next(iter(found))
        truth, agreeing = found[truth_of].astype(np.float64), []
        truth_every = row[truth_of].every
        for library, answer in found.items():
            every = row[library].every
            a, b = (x.reshape(-1) if max(every, truth_every) > 1 else x for x in (answer, truth))
            if every != truth_every:
                a, b = (
                    a[:: truth_every if every == 1 else 1],
                    b[:: every if truth_every == 1 else 1],
                )
            if a.shape != b.shape:
                row[library].note = f"DISAGREES: shape {a.shape}, {truth_of} has {b.shape}"
                continue
            off = float(np.abs(a - b).max() / max(np.abs(b).max(), 1e-30))
            row[library].off = off
            if off <= task.tolerance * (10 if self.arguments.device != "cpu" else 1):
                agreeing.append(library)
            else:
                row[library].note = f"DISAGREES with {truth_of} by {off:.1e}"
        return agreeing

    def take_turns(self, model: str, names: Iterable[str], row: dict[str, Figure]) -> None:
        """Rounds in which each goes once, another one first each time; who has used up its time
        waits for the others to end."""
        names = list(names)
        for i in range(self.arguments.rounds):
            turn = names[i % len(names) :] + names[: i % len(names)] if names else []
            for library in turn:
                figure = row[library]
                if figure.enough(self.arguments.seconds):
                    continue
                try:
                    answer = self.clients[library].ask("time")
                    figure.add(**answer)
                except LibraryError as error:
                    figure.note = str(error)
                    self.restart(self.clients[library], model)
                    names.remove(library)

    # Tasks with a process for each measurement ----------------------------------------------------

    def processes(
        self, model: str, name: str, task: Task, folder: str, table: Table
    ) -> dict[str, Figure]:
        """Import, conversion, loading: once in each round, in a fresh process."""
        small = checkpoint("small", next(iter(self.pythons.values())))
        row = {library: Figure() for library in self.clients}
        for _ in range(min(self.arguments.rounds, 5)):
            for library, figure in row.items():
                if figure.note or figure.enough(self.arguments.seconds):
                    continue
                client = Client(library, self.pythons[library], self.arguments.limit)
                try:
                    if name == "import":
                        answer = {
                            "seconds": client.import_seconds(self.arguments.clock),
                            "memory": None,
                        }
                    else:
                        self.start_one(client)
                        answer = client.ask("process", task=name, folder=folder, small=small)
                    if "not" in answer:
                        figure.note = answer["not"]
                        continue
                    figure.add(answer["seconds"])
                    figure.memory, figure.held = answer["memory"], answer.get("held")
                except LibraryError as error:
                    figure.note = str(error)
                finally:
                    client.close()
        return row

    def close(self) -> None:
        """End all processes."""
        for client in self.clients.values():
            client.close()

    def figures(self) -> dict[tuple[str, str, str], dict[str, float | None]]:
        """What was measured, by model, task and library."""
        return {
            (table.model, task, library): figure.numbers()
            for table in self.tables
            for task, row in table.rows.items()
            for library, figure in row.items()
        }


def arguments_given() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=["small", "gpt2-small"], choices=MODELS)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=TASKS, metavar="TASK")
    parser.add_argument("--libraries", nargs="+", default=list(LIBRARIES), choices=LIBRARIES)
    parser.add_argument("--rounds", type=int, default=15, help="at most")
    parser.add_argument(
        "--seconds", type=float, default=20,
        help="for each library at each task; 2 rounds are the least (1, where it takes longer)",
    )  # fmt: skip
    parser.add_argument("--limit", type=float, default=300, help="seconds; a call's, at most")
    parser.add_argument("--memory", type=float, default=8, help="GB that a task may take")
    parser.add_argument("--threads", type=int, default=0, help="torch's; 0: as it likes")
    parser.add_argument(
        "--clock", default="wall", choices=["wall", "processor"],
        help="processor time, with --threads 1, says something on a busy machine too",
    )  # fmt: skip
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument(
        "--python", nargs="+", default=[], metavar="LIBRARY=PATH",
        help="another interpreter than that of the environment",
    )  # fmt: skip
    parser.add_argument("--goals", action="store_true", help="compare with the table of goals")
    parser.add_argument("--markdown", type=Path, help="a file to write all tables to")
    return parser.parse_args()


def main() -> None:
    """Measure, print, and write the page."""
    arguments = arguments_given()
    others = dict(pair.split("=", 1) for pair in arguments.python)
    pythons = {}
    for name in arguments.libraries:
        path = others.get(name, str(python_of(name)))
        if Path(path).exists():
            pythons[name] = path
        else:
            print(f"{name}: skipped, there is no {path}: python benchmarks/environments.py {name}")
    comparison = Comparison(arguments, pythons)
    try:
        comparison.start()
        about = machine(comparison.told, arguments.device, arguments.clock)
        print(about, flush=True)
        for model in arguments.models:
            comparison.measure(model)
    finally:
        comparison.close()
    goals = goal_lines(comparison.figures(), arguments.device) if arguments.goals else []
    print("", *goals, sep="\n")
    if arguments.markdown:
        arguments.markdown.write_text(markdown(about, comparison.tables, goals, arguments))


if __name__ == "__main__":
    main()
