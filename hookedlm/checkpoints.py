"""The training steps whose weights were published, and where they are kept."""

from __future__ import annotations

import re
from typing import Any

from huggingface_hub import list_repo_refs
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

from hookedlm.aliases import official_name
from hookedlm.classic_files import find_classic
from hookedlm.errors import InputError, LoadError
from hookedlm.loading import resolve

PYTHIA_STEPS = [0, *(2**i for i in range(10)), *range(1000, 143_001, 1000)]
"""Of the Pythia models (arXiv 2304.01373); the first version, -v0, has only the thousands."""

STANFORD_STEPS = [
    *range(0, 100, 10), *range(100, 2000, 50), *range(2000, 20_000, 100),
    *range(20_000, 400_001, 1000),
]  # fmt: skip
"""Of Stanford CRFM's GPT-2 models."""

BRANCH = re.compile(r"(?:step|checkpoint)[-_]?(\d+)")
"""Branches on the hub that hold the weights of a training step."""


def get_checkpoint_labels(model_name: str, **kwargs: Any) -> tuple[list[int], str]:
    """(what ``checkpoint_value`` may be, in rising order; "step" or "token").

    Known for Pythia and Stanford's models; of others the branches are looked up on the hub, and of
    checkpoints in TransformerLens' format the files. Raises LoadError where there are none, or no
    network.
    """
    name = official_name(model_name)
    if name.startswith("EleutherAI/pythia"):
        return [step for step in PYTHIA_STEPS if not (name.endswith("-v0") and step < 1000)], "step"
    if name.startswith("stanford-crfm/"):
        return list(STANFORD_STEPS), "step"
    place, local = resolve(model_name)
    try:
        classic = find_classic(place, local, kwargs)
        if classic is not None:
            steps = classic.steps()
        elif local:
            steps = []
        else:
            branches = list_repo_refs(place, **kwargs).branches
            found = [BRANCH.fullmatch(branch.name) for branch in branches]
            steps = sorted(int(match[1]) for match in found if match is not None)
    except (HfHubHTTPError, OfflineModeIsEnabled, OSError, ValueError) as error:
        why = " ".join(str(error).split())
        raise LoadError(f"can't list the checkpoints of {model_name!r}: {why}") from error
    if not steps:
        raise LoadError(f"{model_name!r} has no weights of single training steps")
    return steps, "token" if steps[-1] > 1e9 else "step"


def checkpoint_fields(model_name: str, index: int | None, value: int | None) -> dict[str, Any]:
    """The config's fields for a checkpoint, by its place in `get_checkpoint_labels` or its label.

    Raises InputError when there is no such checkpoint.
    """
    labels, kind = get_checkpoint_labels(model_name)
    if value is None:
        assert index is not None
        if not -len(labels) <= index < len(labels):
            raise InputError(f"checkpoint_index={index}: {model_name!r} has {len(labels)}")
        value = labels[index]
    elif value not in labels:
        raise InputError(f"checkpoint_value={value}: not among the {len(labels)} of {model_name!r}")
    return {
        "from_checkpoint": True,
        "checkpoint_index": labels.index(value),
        "checkpoint_value": value,
        "checkpoint_label_type": kind,
    }


def where_kept(model_name: str, value: int) -> dict[str, Any]:
    """What `hookedlm.loading.load_layers` takes to load a step: a branch of the hub, or a file."""
    place, local = resolve(model_name)
    if find_classic(place, local, {}) is not None:
        return {"checkpoint": value}
    stanford = place.startswith("stanford-crfm/")
    return {"revision": f"checkpoint-{value}" if stanford else f"step{value}"}
