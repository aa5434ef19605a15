"""The environments that the libraries are measured in, one each, versions pinned.

    python benchmarks/environments.py [NAME ...] [--torch torch==2.13.0]

They are made under ``.cache/benchmarks/`` (a few hundred MB each) from the package index that pip
is set up for. An environment that is there and holds what is pinned is left alone.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / ".cache" / "benchmarks"

TORCH = "torch==2.13.0"
REQUIREMENTS: dict[str, list[str]] = {
    "hookedlm": ["transformers==5.23.0", "-e", str(ROOT)],
    "transformers": ["transformers==5.23.0", "numpy", "accelerate"],
    "transformer_lens_4": ["transformers==5.23.0", "transformer-lens==4.3.0"],
    "transformer_lens_2": [
        "transformers==4.57.6",
        "transformer-lens==2.18.0",
        "datasets==4.0.0",
        "pyarrow==20.0.0",  # newer ones want a newer numpy than this TransformerLens allows
    ],
    "nnsight": ["transformers==5.23.0", "nnsight==0.8.1", "accelerate"],
    "pyvene": ["transformers==4.57.6", "pyvene==0.1.8"],
}
"""What pip installs into each environment, beside torch."""


def python_of(name: str) -> Path:
    """The interpreter of an environment, whether it exists or not."""
    return FOLDER / name / "bin" / "python"


def make(name: str, torch: str) -> None:
    """Make an environment, or bring it to what is pinned. Raises CalledProcessError."""
    folder = FOLDER / name
    wanted = "\n".join([torch, *REQUIREMENTS[name]])
    stamp = folder / "installed.txt"
    if stamp.exists() and stamp.read_text() == wanted:
        print(f"{name}: is there")
        return
    print(f"{name}: installing {', '.join(wanted.splitlines())}", flush=True)
    if not python_of(name).exists():
        venv.create(folder, with_pip=True)
    # torch goes first and by itself, so that no package's own wish decides which build is taken.
    for some in ([torch], [torch, *REQUIREMENTS[name]]):
        command = [str(python_of(name)), "-m", "pip", "install", "--quiet", *some]
        subprocess.run(command, check=True)
    stamp.write_text(wanted)


def main() -> None:
    """Make the environments that are named, by default all; one that fails stops no other."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help=", ".join(REQUIREMENTS))
    parser.add_argument("--torch", default=TORCH, help="what pip is asked for, or a wheel's path")
    arguments = parser.parse_args()
    unknown = set(arguments.names) - set(REQUIREMENTS)
    if unknown:
        parser.error(f"{', '.join(sorted(unknown))}: expected {', '.join(REQUIREMENTS)}")
    failed = []
    for name in arguments.names or REQUIREMENTS:
        try:
            make(name, arguments.torch)
        except subprocess.CalledProcessError as error:
            failed.append(f"{name}: pip ended with {error.returncode}")
    if failed:
        sys.exit("\n".join(failed))


if __name__ == "__main__":
    main()
