"""`FileMethods`: caches on disk, as safetensors that know which model they are of."""

from __future__ import annotations

import json
import os
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from typing_extensions import Self

from hookedlm.cache.dictionary import CacheDictionary
from hookedlm.derive import Activations
from hookedlm.errors import CacheFileError
from hookedlm.root import NamesFilter, names_given
from hookedlm.writing import write_tensors

if TYPE_CHECKING:
    from hookedlm.model import HookedTransformer

FORMAT = "hookedlm activation cache 1"


class FileMethods(CacheDictionary):
    """`save` and `load`."""

    def save(self, path: str | os.PathLike[str], names: NamesFilter = None) -> None:
        """Write activations (all listed ones, or those ``names`` selects) to a safetensors file.

        What was not recorded is computed. The file keeps the model's dimensions, a fingerprint of
        its weights, and each activation's axes and checksum. An existing file is replaced only when
        the new one is complete.
        """
        chosen = self._chosen(names)
        tensors = {name: self[name].detach().cpu().contiguous() for name in chosen}
        # Tensors that share storage (a stream leaving one layer and entering the next) are refused
        # by the format.
        seen: set[int] = set()
        for name, x in tensors.items():
            if x.untyped_storage().data_ptr() in seen:
                tensors[name] = x.clone()
            seen.add(tensors[name].untyped_storage().data_ptr())
        described = {
            "format": FORMAT,
            "has_batch_dim": self.has_batch_dim,
            "model": describe(self.model),
            "weights": fingerprint(self.model),
            "order": chosen,
            "axes": {name: self._axes(name) for name in chosen},
            "checksums": {name: checksum(x) for name, x in tensors.items()},
        }
        write_tensors(path, tensors, described)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        model: HookedTransformer,
        device: torch.device | str | None = None,
        check_weights: bool = True,
    ) -> Self:
        """Read a cache that `save` wrote, of the same model.

        Raises CacheFileError on a file that is damaged or of another kind, and on one whose model
        has other dimensions, hook points or (unless ``check_weights=False``) weights than
        ``model``.
        """
        tensors, described = _read(Path(path))
        _check_model(Path(path), described, model, check_weights)
        cache = Activations()
        for name in described["order"]:
            if checksum(tensors[name]) != described["checksums"][name]:
                raise CacheFileError(f"{path}: {name!r} is damaged (its checksum differs)")
            cache[name] = tensors[name].to(model.device if device is None else device)
        return cls(cache, model, has_batch_dim=described["has_batch_dim"])

    def _chosen(self, names: NamesFilter) -> list[str]:
        if names is None:
            return list(self)
        for name in names_given(names) & set(self.model.hook_dict):
            self[name]  # computes it if need be, and says why it is not there
        points = {point.name for point in self.model.select(names)}
        return [name for name in self if name.removesuffix("_grad") in points]

    def _axes(self, name: str) -> list[str]:
        point = self.model.hook_dict.get(name.removesuffix("_grad"))
        axes = [] if point is None else list(point.axes or ())
        return axes if self.has_batch_dim else axes[1:]


def describe(model: HookedTransformer) -> dict[str, Any]:
    """What must agree between a file and a model before their numbers can be used together."""
    cfg = model.cfg
    return {
        "name": cfg.model_name,
        "n_layers": cfg.n_layers,
        "n_heads": cfg.n_heads,
        "d_model": cfg.d_model,
        "d_head": cfg.d_head,
        "d_mlp": cfg.d_mlp,
        "d_vocab": cfg.d_vocab,
        "normalization_type": cfg.normalization_type,
    }


@torch.no_grad()
def fingerprint(model: HookedTransformer) -> str:
    """A checksum over a few numbers of every weight: folded or trained on, it differs."""
    crc = 0
    for name, weight in sorted(model.named_parameters()):
        flat = weight.detach().flatten()
        few = flat[:: max(1, flat.numel() // 16)].double().cpu()
        crc = zlib.crc32(few.numpy().tobytes(), zlib.crc32(name.encode(), crc))
    return f"{crc:08x}"


def checksum(x: Tensor) -> str:
    """CRC-32 of a tensor's bytes."""
    return f"{zlib.crc32(x.contiguous().flatten().view(torch.uint8).numpy().tobytes()):08x}"


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    if not path.is_file():
        raise CacheFileError(f"{path}: no such file")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CacheFileError(f"{path} is damaged or no safetensors file: {error}") from error
    try:
        described = json.loads(metadata.get("hookedlm", "{}"))
    except ValueError as error:
        raise CacheFileError(f"{path} is damaged: its description can't be read") from error
    if described.get("format") != FORMAT:
        raise CacheFileError(f"{path} is a safetensors file, but not of `ActivationCache.save`")
    return tensors, described


def _check_model(
    path: Path, described: dict[str, Any], model: HookedTransformer, check_weights: bool
) -> None:
    ours = describe(model)
    wrong = [
        f"{key} is {theirs!r} there, {ours[key]!r} here"
        for key, theirs in described["model"].items()
        if key != "name" and theirs != ours[key]
    ]
    points = {name.removesuffix("_grad") for name in described["order"]}
    if odd := sorted(points - set(model.hook_dict)):
        wrong.append(f"this model has no {', '.join(odd[:3])}")
    if not wrong and check_weights and described["weights"] != fingerprint(model):
        wrong.append("the weights differ (processing and training count; check_weights=False)")
    if wrong:
        raise CacheFileError(
            f"{path} is a cache of {described['model']['name']!r}, not of this model "
            f"({ours['name']!r}): {'; '.join(wrong)}"
        )
