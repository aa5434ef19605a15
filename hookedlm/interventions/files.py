"""Interventions on disk: a JSON file, and what it refers to as safetensors."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from hookedlm.cache import ActivationCache
from hookedlm.errors import CacheFileError, InputError
from hookedlm.interventions.from_runs import Freeze, Mean, Noise, Patch, Resample
from hookedlm.interventions.intervention import Intervention
from hookedlm.interventions.sources import of_run
from hookedlm.interventions.what import Add, ProjectOut, Scale, What, Zero, options, short
from hookedlm.writing import write_whole

FORMAT = "hookedlm interventions 1"
INDEX = "interventions.json"
KINDS: dict[str, type[What]] = {
    kind.__name__: kind
    for kind in (Add, Freeze, Mean, Noise, Patch, ProjectOut, Resample, Scale, Zero)
}


def save(interventions: Sequence[Intervention], folder: str | os.PathLike[str]) -> None:
    """Write interventions to a folder, made if need be: ``interventions.json`` and its tensors.

    Prompts, tokens and datasets are written as they are, of an `ActivationCache` the activations
    that are used. What was there before is replaced only when all is written. Raises InputError on
    a `What` of another library.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {}
    keys: dict[int, str] = {}

    def keep(x: Tensor) -> dict[str, str]:
        if id(x) not in keys:
            keys[id(x)] = f"{len(keys)}"
            tensors[keys[id(x)]] = x.detach().cpu().clone(memory_format=torch.contiguous_format)
        return {"tensor": keys[id(x)]}

    listed = [_plain(each, keep) for each in interventions]
    checksum = 0
    for x in tensors.values():
        checksum = zlib.crc32(x.flatten().view(torch.uint8).numpy().tobytes(), checksum)
    beside = f"tensors-{checksum:08x}.safetensors"
    index = {"format": FORMAT, "tensors": beside, "interventions": listed}
    write_whole(folder / beside, lambda path: save_file(tensors, path))
    write_whole(folder / INDEX, lambda path: path.write_text(json.dumps(index, indent=1), "utf-8"))
    for old in folder.glob("tensors-*.safetensors"):  # of what was there before
        if old.name != beside:
            old.unlink()


def load(folder: str | os.PathLike[str]) -> list[Intervention]:
    """The interventions that `save` wrote; raises CacheFileError on a folder that it did not, or
    that is damaged."""
    path = Path(folder) / INDEX
    if not path.is_file():
        raise CacheFileError(f"{path}: no such file")
    try:
        index = json.loads(path.read_text("utf-8"))
        if not isinstance(index, dict) or index.get("format") != FORMAT:
            raise CacheFileError(f"{path} was not written by hookedlm.patching.save")
        tensors = load_file(path.parent / index["tensors"])
        return [_intervention(each, tensors) for each in index["interventions"]]
    except (SafetensorError, KeyError, ValueError, TypeError, FileNotFoundError) as error:
        raise CacheFileError(f"{path.parent} is damaged: {error}") from error


def _plain(intervention: Intervention, keep: Callable[[Tensor], Any]) -> dict[str, Any]:
    """An intervention as JSON has it."""
    what = intervention.what
    if KINDS.get(type(what).__name__) is not type(what):
        raise InputError(f"{what!r} can't be saved: only {', '.join(KINDS)} can")
    given = {name: value for name, value, _ in options(intervention) if name != "what"}
    parts: dict[str, Any] = {"kind": type(what).__name__}
    for name, value, _ in options(what):
        if isinstance(value, ActivationCache):
            names = [point.name or "" for point in intervention.points(value.model)]
            value = of_run(value.model, value, names)
        parts[name] = _encoded(value, keep)
    return {name: _encoded(value, keep) for name, value in given.items()} | {"what": parts}


def _encoded(value: Any, keep: Callable[[Tensor], Any]) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Tensor):
        return keep(value)
    if isinstance(value, slice):
        return {"slice": [value.start, value.stop, value.step]}
    if isinstance(value, Mapping):
        return {"activations": {name: keep(x) for name, x in value.items()}}
    if isinstance(value, Iterable):
        return [_encoded(each, keep) for each in value]
    raise InputError(f"{short(value)} can't be saved")


def _decoded(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_decoded(each, tensors) for each in value]
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        return tensors[value["tensor"]]
    if "slice" in value:
        return slice(*value["slice"])
    return {name: _decoded(x, tensors) for name, x in value["activations"].items()}


def _intervention(stored: dict[str, Any], tensors: Mapping[str, Tensor]) -> Intervention:
    what = dict(stored.pop("what"))
    kind = KINDS[what.pop("kind")]
    made = kind(**{name: _decoded(value, tensors) for name, value in what.items()})
    return Intervention(
        what=made, **{name: _decoded(value, tensors) for name, value in stored.items()}
    )
