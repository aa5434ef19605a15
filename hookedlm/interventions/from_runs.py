"""What is put in an activation's place when it comes from a run, or is drawn."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor

from hookedlm.cache import ActivationCache
from hookedlm.errors import InputError
from hookedlm.interventions.what import Part, What, short
from hookedlm.interventions.where import Index

Tokens = Int[Tensor, "batch pos"] | Int[Tensor, "pos"]
Run = ActivationCache | Mapping[str, Tensor] | str | Sequence[str] | Tokens
"""Where activations come from: recorded ones, or a prompt (text, texts or tokens) to run."""
Examples = Tokens | Iterable[Int[Tensor, "..."] | str | Sequence[str]]
"""Tokens of several examples, or batches of tokens or texts, which may differ in length."""


@dataclass(frozen=True, eq=False, repr=False)
class Patch(What):
    """The same part of another run: activation patching (arXiv 2202.05262, 2004.12265).

    ``source``: an `ActivationCache`, a dictionary of activations by full name, a prompt (text,
    texts, tokens), or a float tensor that broadcasts over the selected part. A source of one row
    serves every row of the batch. ``position``: where in the source, if elsewhere: as many as the
    intervention has. Raises InputError on other sources.
    """

    source: Run | Float[Tensor, "..."]
    position: Index = None

    def __post_init__(self) -> None:
        check_run(self.source, "Patch")
        if self.value is not None and self.position is not None:
            raise InputError("Patch: position= is that in a source run, and a tensor is none")

    @property
    def needs_source(self) -> bool:
        """Whether a run is wanted: not if the source is a float tensor."""
        return self.value is None

    @property
    def value(self) -> Part | None:
        """The float tensor, if that is the source."""
        return value_of(self.source)

    def of(self, x: Part, source: Part | None = None) -> Part:
        """The source."""
        return instead(x, self.value, source)


class FromRun(What):
    """What another run has there."""

    @property
    def needs_source(self) -> bool:
        """Always."""
        return True

    def of(self, x: Part, source: Part | None = None) -> Part:
        """The source."""
        return instead(x, None, source)


@dataclass(frozen=True, eq=False, repr=False)
class Freeze(FromRun):
    """Values of the same run without other interventions, or of another run.

    With frozen attention patterns and norm scales, attention is linear in the stream ("A
    Mathematical Framework for Transformer Circuits", 2021). ``source``: None, or as in `Patch`.
    """

    source: Run | None = None

    def __post_init__(self) -> None:
        if self.source is not None:
            check_run(self.source, "Freeze")
        if value_of(self.source) is not None:
            raise InputError("Freeze wants a run; Patch puts a tensor in")


@dataclass(frozen=True, eq=False, repr=False)
class Mean(What):
    """The mean over a dataset: mean ablation (arXiv 2211.00593).

    ``examples``: tokens ``[example, pos]``, an iterable of batches (tokens or texts; re-iterable),
    or a float tensor, the mean itself, that broadcasts over the selected part. The mean is over
    examples and positions (padding left out), or with ``per_position`` over examples alone, which
    must then be of one length. Raises InputError on anything else.
    """

    examples: Examples | Float[Tensor, "..."]
    per_position: bool = False

    def __post_init__(self) -> None:
        check_examples(self.examples, "Mean")

    @property
    def needs_source(self) -> bool:
        """Whether the dataset must be run: not if the mean is given."""
        return self.value is None

    @property
    def value(self) -> Part | None:
        """The mean, if that was given."""
        return value_of(self.examples)

    def of(self, x: Part, source: Part | None = None) -> Part:
        """The mean."""
        return instead(x, self.value, source)


@dataclass(frozen=True, eq=False, repr=False)
class Resample(FromRun):
    """The same part on other examples, drawn at random: resampling ablation (causal scrubbing).

    ``examples``: as for `Mean`, all of one length; None: the other rows of the run's own batch,
    without interventions. Each row gets one example. ``seed`` is that of a generator of its own:
    interventions with one seed and dataset get the same examples, so do repeated runs.
    """

    examples: Examples | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.examples is not None:
            check_examples(self.examples, "Resample")
        if value_of(self.examples) is not None:
            raise InputError("Resample draws from tokens or texts, not from a float tensor")


@dataclass(frozen=True, eq=False, repr=False)
class Noise(What):
    """The activation plus Gaussian noise of standard deviation ``std`` (causal tracing).

    ``seed`` is that of a generator of its own: each hook point, row and position has its own noise,
    the same in every run, also when positions come one by one.
    """

    std: float
    seed: int = 0

    @property
    def needs_source(self) -> bool:
        """Always: the source is noise of standard deviation 1."""
        return True

    def of(self, x: Part, source: Part | None = None) -> Part:
        """``x + std * source``."""
        assert source is not None, "Noise.of wants unit noise as its source"
        return x + self.std * source.to(x)


def instead(x: Part, value: Part | None, source: Part | None) -> Part:
    """``value`` or ``source``, as it must be to stand in the place of ``x``."""
    new = source if value is None else value
    assert new is not None, "this What wants a source"
    return new.to(x).expand_as(x)


def value_of(x: Any) -> Tensor | None:
    """``x`` if it is a float tensor."""
    return x if isinstance(x, Tensor) and x.is_floating_point() else None


def is_tokens(x: Any) -> bool:
    """Whether ``x`` is a tensor of token ids."""
    return isinstance(x, Tensor) and not x.is_floating_point() and x.ndim in (1, 2)


def check_run(source: Any, whose: str) -> None:
    """Raise InputError unless ``source`` is a `Run` or a float tensor."""
    texts = isinstance(source, (list, tuple)) and all(isinstance(x, str) for x in source)
    if not (
        (isinstance(source, (str, ActivationCache, Mapping)) or (texts and len(source)))
        or is_tokens(source)
        or value_of(source) is not None
    ):
        raise InputError(
            f"{whose}({short(source)}): expected an ActivationCache, a dictionary of activations, "
            "text, texts, tokens [batch, pos], or a float tensor"
        )


def check_examples(examples: Any, whose: str) -> None:
    """Raise InputError unless ``examples`` are `Examples` or a float tensor."""
    if isinstance(examples, Tensor):
        if examples.is_floating_point() or examples.ndim in (1, 2):
            return
    elif isinstance(examples, Iterable) and not isinstance(examples, (str, Mapping, Iterator)):
        return
    raise InputError(
        f"{whose}({short(examples)}): expected tokens [example, pos], or batches of tokens or "
        "texts that can be gone through again (a list, a DataLoader)"
    )
