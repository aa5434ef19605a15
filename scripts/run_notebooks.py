"""Execute the notebooks from top to bottom, without a network, and say which cell fails.

    python scripts/run_notebooks.py                      # all of notebooks/
    python scripts/run_notebooks.py notebooks/a.ipynb    # only this one
    python scripts/run_notebooks.py --write              # and keep the outputs in the files

The kernel is the interpreter that runs this script; none needs to be registered. Files stay as
they are unless --write is given. Exits 1 if any notebook fails, after having run them all.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

ROOT = Path(__file__).resolve().parent.parent
KERNEL = "hookedlm-this-interpreter"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("notebooks", nargs="*", type=Path, help="default: all of notebooks/")
    parser.add_argument("--write", action="store_true", help="keep the outputs in the files")
    parser.add_argument("--timeout", type=int, default=600, help="seconds allowed for one cell")
    options = parser.parse_args()

    paths = options.notebooks or sorted((ROOT / "notebooks").glob("*.ipynb"))
    if not paths:
        print("no notebooks")
    with tempfile.TemporaryDirectory() as folder:
        isolate(Path(folder))
        passed = [run(path, options.timeout, options.write) for path in paths]
    return 0 if all(passed) else 1


def isolate(folder: Path) -> None:
    """Let kernels started from here use this interpreter, no user's settings and no network."""
    spec = folder / "kernels" / KERNEL
    spec.mkdir(parents=True)
    command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    command.append("--log-level=ERROR")  # without its remark that a local socket is not encrypted
    described = {"argv": command, "display_name": KERNEL, "language": "python"}
    (spec / "kernel.json").write_text(json.dumps(described))
    os.environ["JUPYTER_PATH"] = str(folder)
    os.environ["IPYTHONDIR"] = str(folder / "ipython")
    os.environ["HF_HUB_OFFLINE"] = "1"


def run(path: Path, timeout: int, write: bool) -> bool:
    """Whether all cells of one notebook ran; what went wrong is printed."""
    notebook = nbformat.read(path, as_version=4)
    metadata = dict(notebook.metadata)
    client = NotebookClient(
        notebook,
        kernel_name=KERNEL,
        timeout=timeout,
        resources={"metadata": {"path": str(path.resolve().parent)}},
    )
    print(f"{path.name} ... ", end="", flush=True)
    start = time.perf_counter()
    try:
        client.execute()
    except (CellExecutionError, CellTimeoutError, DeadKernelError) as error:
        print(f"FAILED after {time.perf_counter() - start:.1f} s")
        print(f"{error}\n")  # holds the cell's source and the traceback
        return False
    print(f"{time.perf_counter() - start:.1f} s")
    if write:
        notebook.metadata = nbformat.from_dict(metadata)  # the kernel leaves its version there
        nbformat.write(notebook, path)
    return True


if __name__ == "__main__":
    sys.exit(main())
