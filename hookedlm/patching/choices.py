"""What a grid goes through along one axis."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from jaxtyping import Int
from torch import Tensor

from hookedlm.errors import InputError

Label: TypeAlias = int | str
Choice: TypeAlias = Any
"""True or "all" | int (its axis goes) | slice, range or several ints. Of positions also one or
several for each example, ``[batch]`` or ``[batch, n]``, or several of these by name."""

CALLED = {"pos": "positions", "key_pos": "key positions", "head": "heads", "dim": "dimensions"}


@dataclass(frozen=True, eq=False)
class Axis:
    """One axis of a grid. ``single``: one index was given, and the result has no such axis."""

    name: str
    labels: tuple[Label, ...]
    places: Int[Tensor, "n"] | Int[Tensor, "n batch"]
    single: bool = False

    def __len__(self) -> int:
        return len(self.labels)


def is_all(choice: Any) -> bool:
    """Whether everything is chosen."""
    return choice is True or (isinstance(choice, str) and choice == "all")


def chosen(name: str, choice: Any, n: int, n_examples: int) -> Axis:
    """What ``choice`` means of an axis of length ``n``. Raises InputError on what is no choice, and
    on indices that are not there."""
    if name == "pos":
        if isinstance(choice, Mapping):
            rows = [_position(f"pos[{key!r}]", one, n, n_examples) for key, one in choice.items()]
            if not rows:
                raise InputError("pos={}: name at least one position")
            return Axis(name, tuple(map(str, choice)), torch.stack(rows))
        if isinstance(choice, Tensor) and choice.ndim == 1:
            return Axis(name, ("each",), _position(name, choice, n, n_examples)[None], single=True)
        if isinstance(choice, Tensor) and choice.ndim == 2:
            columns = [_position(name, one, n, n_examples) for one in choice.unbind(1)]
            return Axis(name, tuple(range(len(columns))), torch.stack(columns))
    if is_all(choice):
        indices: list[int] = list(range(n))
    elif isinstance(choice, slice):
        indices = list(range(n))[choice]
    elif _is_int(choice):
        indices = [int(choice)]
    elif isinstance(choice, (Sequence, Tensor)) and not isinstance(choice, str):
        indices = choice.tolist() if isinstance(choice, Tensor) else list(choice)
    else:
        raise _no_choice(name, choice)
    if not indices or not all(map(_is_int, indices)):
        raise _no_choice(name, choice)
    _check_range(name, indices, n)
    indices = [int(i) % n for i in indices]
    if len(set(indices)) < len(indices):
        raise InputError(f"{name}={indices}: one stands there twice")
    return Axis(name, tuple(indices), torch.tensor(indices), single=_is_int(choice))


def _position(name: str, choice: Any, n: int, n_examples: int) -> Int[Tensor, "batch"]:
    """A position for each example."""
    at = torch.as_tensor(choice).cpu()
    if at.is_floating_point() or at.dtype == torch.bool or at.ndim > 1:
        raise _no_choice(name, choice)
    at = at.long().reshape(-1)
    if len(at) not in (1, n_examples):
        raise InputError(f"{name} is given for {len(at)} examples, and there are {n_examples}")
    _check_range(name, at.tolist(), n)
    return (at % n).expand(n_examples)


def _is_int(x: Any) -> bool:
    whole = isinstance(x, int) and not isinstance(x, bool)
    return whole or (isinstance(x, Tensor) and x.ndim == 0 and not x.is_floating_point())


def _check_range(name: str, chosen: Sequence[int], n: int) -> None:
    bad = [int(i) for i in chosen if not -n <= int(i) < n]
    if bad:
        called = CALLED.get(name.split("[")[0], f"{name}s")
        raise InputError(f"{name}={bad[0]}: there are {n} {called}, 0 to {n - 1} (or {-n} to -1)")


def _no_choice(name: str, choice: Any) -> InputError:
    more = (
        ", or for each example [batch] or [batch, n], or several by name" if name == "pos" else ""
    )
    return InputError(
        f"{name}={choice!r}: expected True (all), an int, a slice, or several ints{more}"
    )
