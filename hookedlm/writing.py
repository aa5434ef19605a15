"""Files that are there whole or not at all."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor


def write_whole(path: str | os.PathLike[str], write: Callable[[Path], Any]) -> None:
    """What ``write(file)`` writes, at ``path``: what was there is replaced when it is complete, and
    is left as it was by an exception."""
    path = Path(path)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    unfinished = Path(name)
    try:
        write(unfinished)
        os.replace(unfinished, path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


def write_tensors(
    path: str | os.PathLike[str], tensors: Mapping[str, Float[Tensor, "..."]], told: Any
) -> None:
    """A safetensors file, with ``told`` as JSON in its header; whole or not at all."""
    header = {"hookedlm": json.dumps(told)}
    write_whole(path, lambda file: save_file(dict(tensors), file, header))
