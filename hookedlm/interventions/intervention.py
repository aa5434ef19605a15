"""`Intervention`: where, and what is put there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from jaxtyping import Float
from torch import Tensor

from hookedlm.errors import HookNameError, InputError
from hookedlm.hooks import HookPoint
from hookedlm.interventions.from_runs import Patch
from hookedlm.interventions.what import Part, What, component, options, orthonormal, short
from hookedlm.interventions.where import Index, Where, is_int
from hookedlm.names import get_act_name

if TYPE_CHECKING:
    from hookedlm.model import HookedTransformer


@dataclass(frozen=True, eq=False, repr=False)
class Intervention:
    """``what`` is put in the place of a part of an activation.

    ``hook``: a hook point's full name or a glob of them; or, with ``layer`` (or several, negative
    ones from the end), what stands behind ``blocks.L.`` (``"ln1.hook_scale"``) or the shorthand
    that `get_act_name` takes (``"z"``). The rest narrows it down, in any combination; None is all:

    - ``position``: int, slice, several ints, or for each example ``[batch]`` or ``[batch, n]``.
      Columns of the batch, padding included, counted from the prompt's start also while generating
      with a key-value cache; negative ones from the end of what there is in each run.
    - ``head``: query heads, or key/value heads where the activation has these. ``expert``,
      ``neuron``: where it has such an axis.
    - ``dims``: dimensions of its last axis (keys, in a pattern).
    - ``subspace``: directions ``[n, width]`` in the last axis: only the component of the change in
      what they span is made (arXiv 2303.02536).

    The order of interventions at one hook point is that in which they are given.
    """

    hook: str
    what: What
    layer: int | Sequence[int] | None = None
    position: Index = None
    head: Index = None
    neuron: Index = None
    dims: Index = None
    expert: Index = None
    subspace: Float[Tensor, "width"] | Float[Tensor, "n width"] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.hook, str) or not isinstance(self.what, What):
            raise InputError(
                f"Intervention({short(self.hook)}, {short(self.what)}): expected the name of a "
                'hook and what to put there, for instance Intervention("z", Zero(), layer=0)'
            )
        _ = self.basis

    @cached_property
    def basis(self) -> Float[Tensor, "rank width"] | None:
        """An orthonormal basis of ``subspace``, float32; None without one."""
        return None if self.subspace is None else orthonormal(self.subspace, "subspace=")

    def __repr__(self) -> str:
        _, _, *rest = options(self)
        given = [f", {name}={short(value)}" for name, value, _ in rest if value is not None]
        return f"Intervention({self.hook!r}, {self.what!r}{''.join(given)})"

    def points(self, model: HookedTransformer) -> list[HookPoint]:
        """The hook points that are meant, in firing order.

        Raises HookNameError on a hook that the model lacks, InputError on a layer that it lacks.
        """
        if self.layer is None:
            name = get_act_name(self.hook)
            if name not in model.hook_dict and any(
                other.endswith(f".{name}") for other in model.hook_dict
            ):
                n = model.cfg.n_layers
                raise HookNameError(
                    f"{self.hook!r} is there in several layers: say layer=0 to {n - 1}, or "
                    f"layer=range({n})"
                )
            return model.select(name)
        layers = list(self.layer) if isinstance(self.layer, Sequence) else [self.layer]
        return model.select([self._name(layer, model.cfg.n_layers) for layer in layers])

    def _name(self, layer: int, n_layers: int) -> str:
        if not is_int(layer) or not -n_layers <= layer < n_layers:
            raise InputError(
                f"layer={layer}: this model has layers 0 to {n_layers - 1} (or {-n_layers} to -1)"
            )
        layer %= n_layers
        if self.hook.startswith("blocks."):
            raise InputError(f"{self.hook!r} is a full name: give no layer beside it")
        return f"blocks.{layer}.{self.hook}" if "." in self.hook else get_act_name(self.hook, layer)

    def where(self, point: HookPoint) -> Where:
        """The part of an activation at ``point``; raises InputError on a field that makes no sense
        there."""
        given = {
            name: vars(self)[name] for name in ("position", "head", "expert", "neuron", "dims")
        }
        elsewhere = self.what.position if isinstance(self.what, Patch) else None
        return Where(point.name or "", point.axes or (), given, elsewhere)

    def of(self, x: Part, source: Part | None = None) -> Part:
        """`What.of`, kept to the subspace."""
        new = self.what.of(x, source)
        if self.basis is None:
            return new
        return x + component(new - x, self.basis)
