"""`RotatedInterchange`: interchange in a subspace that is trained to have the effect one expects.

Source: distributed alignment search, "Finding Alignments Between Interpretable Causal Variables and
Distributed Neural Representations" (arXiv 2303.02536). Its score is the interchange intervention
accuracy; what it must be compared with stands beside it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import trange

from hookedlm.errors import InputError
from hookedlm.hooks import HookPoint, HookRequest
from hookedlm.interventions import Intervention, Patch
from hookedlm.interventions.from_runs import Run
from hookedlm.interventions.sizes import sizes_of
from hookedlm.interventions.sources import recorded
from hookedlm.interventions.where import Index, Where
from hookedlm.model import HookedTransformer
from hookedlm.patching.choices import chosen
from hookedlm.patching.counterfactuals import Counterfactuals, logits_at
from hookedlm.patching.frozen import frozen
from hookedlm.patching.interchange import chosen_layers
from hookedlm.patching.metric import wide
from hookedlm.patching.rotated import Space, random_space
from hookedlm.patching.rotated_files import load_space, save_space
from hookedlm.patching.units import full_name, unit_of

Swap: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""(part of the base run, the same of the source run) -> what is put there."""
EVALUATED_AT_ONCE = 64


@dataclass(frozen=True)
class InterchangeAccuracy:
    """How often the label was the likeliest token, and what else would have done.

    ``random``: random subspaces of the same rank, on average. ``shuffled``: a subspace trained in
    the same way on labels of other examples; None where there was no training. ``nothing``: no
    interchange. ``whole``: interchange of the whole activation.
    """

    accuracy: float
    random: float
    shuffled: float | None
    nothing: float
    whole: float
    rank: int
    n_examples: int


@dataclass(frozen=True)
class Training:
    """What `RotatedInterchange.fit` was called with."""

    data: Counterfactuals
    epochs: int
    lr: float
    batch_size: int
    seed: int


class RotatedInterchange:
    """Interchange of a subspace of one unit's activation in one layer (and head).

    Raises InputError on a unit or layer that the model lacks, on a unit with heads and none chosen,
    and on a space of another width.
    """

    def __init__(
        self,
        model: HookedTransformer,
        space: Space,
        *,
        unit: str,
        layer: int,
        head: int | None = None,
    ):
        if not isinstance(layer, int):
            raise InputError(f"layer={layer!r}: expected one layer")
        [self.layer] = chosen_layers(model, unit, layer)
        self.unit, self.hook = unit, unit_of(unit).hook
        self.model, self.space = model, space.to(model.device)
        [self.point] = model.select([full_name(self.hook, self.layer)])
        self.head = self._checked_head(head)
        width = sizes_of(model, self.point)[-1]
        if width not in (None, space.width):
            raise InputError(
                f"a space of width {space.width} for {unit}, {self.point.name} "
                f"[{self.point.axes_text}]: it has {width}"
            )
        self._training: Training | None = None
        self._control: Space | None = None

    def _checked_head(self, head: int | None) -> int | None:
        axes = self.point.axes or ()
        heads = [axis for axis in axes if axis in ("head", "kv_head")]
        if len(axes) != 3 + len(heads) or axes[:2] != ("batch", "pos"):
            raise InputError(
                f"{self.unit} is [{self.point.axes_text}]: expected one vector a position"
            )
        if not heads:
            if head is not None:
                raise InputError(f"head={head}: {self.unit} has none ({self.point.axes_text})")
            return None
        n = sizes_of(self.model, self.point)[axes.index(heads[0])]
        if head is None:
            raise InputError(f"{self.unit} has heads: choose one, head=0 to {(n or 1) - 1}")
        return head if n is None else int(chosen("head", head, n, 1).labels[0])

    def __repr__(self) -> str:
        head = "" if self.head is None else f", head={self.head}"
        kind = f"{type(self.space).__name__} {self.space.extra_repr()}"
        return f"RotatedInterchange({kind}; unit={self.unit!r}, layer={self.layer}{head})"

    def intervention(
        self, source: Run, position: Index = None, source_position: Index = None
    ) -> Intervention:
        """The same as an `Intervention`, to compose with others and to save."""
        return Intervention(
            self.hook,
            Patch(source, position=source_position),
            layer=self.layer,
            position=position,
            head=self.head,
            subspace=self.space.directions,
        )

    # Runs -----------------------------------------------------------------------------------------

    def logits(
        self, data: Counterfactuals, space: Space | None = None
    ) -> Float[Tensor, "example d_vocab"]:
        """Those after the interchange, where they are read, of examples run all at once.

        ``space``: another one in place of the own. Gradients flow into it where they are enabled.
        """
        space = self.space if space is None else space
        return self._run(data, self._source(data), space.swapped)

    def _source(self, data: Counterfactuals) -> Float[Tensor, "example position width"]:
        """The part of the source runs."""
        name, source = self.point.name or "", data.pair.source
        found = recorded(self.model, [name], source.tokens, attention_mask=source.mask)[name]
        picked = self._where(data.positions.source).pick(found, 0)
        assert picked is not None
        return picked.read(found)

    def _where(self, places: Int[Tensor, "n example"]) -> Where:
        given: dict[str, Index] = {"position": places.t(), "head": self.head}
        return Where(self.point.name or "", self.point.axes or (), given)

    def _run(
        self, data: Counterfactuals, source: Tensor, swapped: Swap
    ) -> Float[Tensor, "example d_vocab"]:
        where = self._where(data.positions.base)

        def swap(x: Tensor, hook: HookPoint) -> Tensor:
            picked = where.pick(x, 0)
            assert picked is not None
            return picked.write(x, swapped(picked.read(x), source))

        with self.model.listening([HookRequest(self.point, swap)], {self.point.name or ""}):
            return logits_at(self.model, data)

    # Training -------------------------------------------------------------------------------------

    def fit(
        self,
        data: Counterfactuals,
        *,
        epochs: int = 10,
        lr: float = 1e-2,
        batch_size: int = 32,
        seed: int = 0,
        progress: bool = True,
    ) -> list[float]:
        """The mean loss of each epoch. The space is trained until the labels are likely: on their
        cross-entropy, by Adam (arXiv 1412.6980) with a rate that falls from ``lr`` to 0.

        ``seed`` is that of the generator that orders examples. Only the space changes: the model is
        frozen meanwhile, and left as it was found, also by an exception.
        """
        if epochs < 1 or batch_size < 1:
            raise InputError(f"epochs={epochs}, batch_size={batch_size}: expected 1 or more")
        space, generator = self.space, torch.Generator().manual_seed(seed)
        parameters = list(space.parameters())
        optimizer = torch.optim.Adam(parameters, lr=lr)
        n_steps = epochs * -(-len(data) // batch_size)
        losses, step = [], 0
        with frozen(self.model), _training(space), torch.enable_grad():
            source = self._sources(data, batch_size)
            for _ in trange(epochs, desc="fit", leave=False, disable=not progress):
                total = torch.zeros((), device=source.device)
                order = torch.randperm(len(data), generator=generator)
                for index in order.split(batch_size):
                    space.anneal(step / max(1, n_steps - 1))
                    for group in optimizer.param_groups:
                        group["lr"] = lr * (1 - step / n_steps)
                    loss = self._loss(data.rows(index), source[index.to(source.device)])
                    # Not backward: nothing but these may be given a gradient.
                    grads = torch.autograd.grad(loss + space.penalty(), parameters)
                    for parameter, grad in zip(parameters, grads, strict=True):
                        parameter.grad = grad
                    optimizer.step()
                    optimizer.zero_grad()
                    total = total + len(index) * loss.detach()
                    step += 1
                losses.append(float(total) / len(data))
        self._training = Training(data, epochs, lr, batch_size, seed)
        self._control = None
        return losses

    def _sources(self, data: Counterfactuals, batch_size: int) -> Tensor:
        """The source parts of all examples, which training leaves as they are."""
        indices = torch.arange(len(data)).split(batch_size)
        return torch.cat([self._source(data.rows(index)) for index in indices])

    def _loss(self, data: Counterfactuals, source: Tensor) -> Float[Tensor, ""]:
        logits = wide(self._run(data, source, self.space.swapped))
        return F.cross_entropy(logits, data.labels.to(logits.device))

    # Score ----------------------------------------------------------------------------------------

    @torch.no_grad()
    def evaluate(
        self, data: Counterfactuals, *, draws: int = 8, seed: int = 0, control: bool = True
    ) -> InterchangeAccuracy:
        """The share of examples in which the label is the likeliest token, with what to compare it
        with: give examples that were held out of training.

        ``draws``: random subspaces, of a generator seeded with ``seed``. ``control``: whether a
        subspace is trained on shuffled labels too (once; as long as `fit` took).
        """
        space = self.space
        shuffled = None
        if control and self._training is not None:
            shuffled = self._accuracy(data, self._trained_on_shuffled(self._training).swapped)
        at_random = [
            self._accuracy(data, random_space(space, seed + draw).swapped) for draw in range(draws)
        ]
        return InterchangeAccuracy(
            accuracy=self._accuracy(data, space.swapped),
            random=sum(at_random) / max(1, draws),
            shuffled=shuffled,
            nothing=self._accuracy(data, lambda x, source: x),
            whole=self._accuracy(data, lambda x, source: source.to(x)),
            rank=space.rank,
            n_examples=len(data),
        )

    def _accuracy(self, data: Counterfactuals, swapped: Swap) -> float:
        right = 0
        with frozen(self.model):
            for index in torch.arange(len(data)).split(EVALUATED_AT_ONCE):
                some = data.rows(index)
                logits = self._run(some, self._source(some), swapped)
                right += int((logits.argmax(-1).cpu() == some.labels).sum())
        return right / len(data)

    def _trained_on_shuffled(self, training: Training) -> Space:
        if self._control is None:
            space = self.space.fresh(self.space.seed)
            twin = RotatedInterchange(
                self.model, space, unit=self.unit, layer=self.layer, head=self.head
            )
            options = {
                name: vars(training)[name] for name in ("epochs", "lr", "batch_size", "seed")
            }
            twin.fit(training.data.shuffled(training.seed), **options, progress=False)
            self._control = space
        return self._control

    # Files ----------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the space and where it belongs to a safetensors file, with JSON in its header. What
        was there before is replaced only when the new file is complete."""
        where = {"unit": self.unit, "layer": self.layer, "head": self.head}
        save_space(self.space, where, Path(path))

    @classmethod
    def load(cls, path: str | os.PathLike[str], model: HookedTransformer) -> RotatedInterchange:
        """What `save` wrote, in a model of the same shape. Raises CacheFileError on another file,
        or a damaged one; InputError on a model that lacks the unit."""
        space, where = load_space(Path(path))
        return cls(model, space, **where)


@contextmanager
def _training(space: Space) -> Iterator[None]:
    space.train()
    try:
        yield
    finally:
        space.eval()
