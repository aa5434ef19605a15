"""Trained subspaces on disk: a safetensors file with JSON in its header."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from hookedlm.errors import CacheFileError
from hookedlm.patching.rotated import SPACES, Space
from hookedlm.writing import write_tensors

FORMAT = "hookedlm rotated interchange 1"
DTYPES = {"float32": torch.float32, "float64": torch.float64}


def save_space(space: Space, where: dict[str, Any], path: Path) -> None:
    """Write a space and JSON on where it belongs; in place of what was there when complete."""
    told = {
        "format": FORMAT,
        "space": type(space).__name__,
        "options": space.options() | {"seed": space.seed},
        "dtype": str(space.rows.dtype).removeprefix("torch."),
        "where": where,
    }
    state = space.state_dict()
    tensors = {name: x.detach().cpu().clone().contiguous() for name, x in state.items()}
    write_tensors(path, tensors, told)


def load_space(path: Path) -> tuple[Space, dict[str, Any]]:
    """The space and where it belongs. Raises CacheFileError on what `save_space` did not write, and
    on a damaged file."""
    if not path.is_file():
        raise CacheFileError(f"{path}: no such file")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        told = json.loads(metadata.get("hookedlm", "{}"))
        if told.get("format") != FORMAT:
            raise CacheFileError(f"{path} was not written by RotatedInterchange.save")
        space = SPACES[told["space"]](**told["options"], dtype=DTYPES[told["dtype"]])
        space.load_state_dict(tensors)
        return space, dict(told["where"])
    except (SafetensorError, KeyError, ValueError, TypeError, RuntimeError) as error:
        raise CacheFileError(f"{path} is damaged: {error}") from error
