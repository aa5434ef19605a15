"""Single files of the Hugging Face hub, and its cache."""

from __future__ import annotations

import json
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import huggingface_hub
import torch
from huggingface_hub import constants
from huggingface_hub.errors import CacheNotFound, EntryNotFoundError, HFValidationError

from hookedlm.errors import LoadError

CACHE_DIR = constants.HF_HUB_CACHE
"""Where files of the hub are kept."""


def download_file_from_hf(
    repo_name: str,
    file_name: str,
    subfolder: str = ".",
    cache_dir: str | Path | None = CACHE_DIR,
    force_is_torch: bool = False,
    **kwargs: Any,
) -> Any:
    """A file of the hub: the content of .json, the tensors of .pth, else the path to it.

    ``force_is_torch`` reads any name as .pth. Other keywords go to
    ``huggingface_hub.hf_hub_download``. Raises LoadError when it can't be had, or when it holds
    Python objects, which could run code as they are read.
    """
    folder = None if subfolder in (".", "") else subfolder
    try:
        path = huggingface_hub.hf_hub_download(
            repo_name, file_name, subfolder=folder, cache_dir=cache_dir, **kwargs
        )
    except (OSError, EntryNotFoundError, HFValidationError) as error:
        raise LoadError(
            f"{file_name!r} of {repo_name!r} is neither cached nor reachable: {error}"
        ) from error
    if force_is_torch or path.endswith(".pth"):
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except UnpicklingError as error:
            raise LoadError(
                f"{path} holds more than tensors. If you trust it: torch.load(path, "
                "weights_only=False)"
            ) from error
    return json.loads(Path(path).read_text("utf-8")) if path.endswith(".json") else path


def clear_huggingface_cache() -> int:
    """Deletes every model, data set and file that the hub's cache holds; returns the bytes freed.

    Only what ``huggingface_hub`` put there: other files in the folder stay.
    """
    try:
        cache = huggingface_hub.scan_cache_dir(constants.HF_HUB_CACHE)
    except CacheNotFound:
        return 0
    commits = [revision.commit_hash for repo in cache.repos for revision in repo.revisions]
    deletion = cache.delete_revisions(*commits)
    deletion.execute()
    return deletion.expected_freed_size
