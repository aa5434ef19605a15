"""`Edit`: one intervention at one hook point of one model, as a hook that knows what it needs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from hookedlm.errors import HookReturnError, InputError
from hookedlm.hooks import HookPoint
from hookedlm.interventions.intervention import Intervention
from hookedlm.interventions.sources import Supply
from hookedlm.interventions.where import Where


@dataclass(eq=False)
class Edit:
    """``sizes``: how long the point's axes are, None where only a run can tell."""

    intervention: Intervention
    point: HookPoint
    where: Where
    sizes: Sequence[int | None]
    supply: Supply

    def __call__(
        self, x: Float[Tensor, "batch ..."], hook: HookPoint
    ) -> Float[Tensor, "batch ..."] | None:
        """The activation with the intervention made; None where it has no position of it.

        Raises InputError on what could not be checked before the run.
        """
        offset = self._offset(hook.pos_offset)
        source = self.supply(x, offset)
        picked = self.where.pick(x, offset, source)
        if picked is None:
            return None
        part = picked.read(x)
        self._check_part(part.shape)
        new = self.intervention.of(part, None if source is None else picked.read_source(source.x))
        if new.shape != part.shape or new.dtype != part.dtype:
            raise HookReturnError(
                f"{self.intervention!r} made {new.dtype} {list(new.shape)} of {part.dtype} "
                f"{list(part.shape)} at {self.point.name!r}: What.of must keep both"
            )
        return picked.write(x, new)

    def _offset(self, offset: int) -> int:
        return 0 if self.where.grows is None else offset

    def check(
        self,
        rows: int | None,
        offset: int,
        n: int | None,
        last: bool,
        device: torch.device | None = None,
    ) -> None:
        """Raise InputError on what will not fit a run of ``rows`` that goes on for ``n`` positions
        at ``offset`` (None: not known yet). ``last``: no later run will be longer."""
        offset, axes = self._offset(offset), self.where.axes
        total = None if n is None else offset + n
        run = {"batch": rows, "pos": n, "key_pos": total}
        sizes = [run.get(axis, size) for axis, size in zip(axes, self.sizes, strict=True)]
        for a in self.where.alongs:
            if rows is not None and a.rows not in (1, rows):
                raise InputError(
                    f"{a.field} is given for {a.rows} examples, and the run has {rows}"
                )
            size = total if a.dim == self.where.grows else sizes[a.dim]
            if size is not None:
                a.places(size, may_grow=a is self.where.position and not last)
        self._check_part(self.where.part(sizes))
        whole = [size for size in sizes if size is not None]
        if self.supply.found is not None and rows is not None and len(whole) == len(sizes):
            like = torch.empty((), device=device).expand(whole)  # nothing in it but its shape
            self.where.pick(like, offset, self.supply(like, offset))

    def _check_part(self, part: Sequence[int | None]) -> None:
        """Raise InputError if what is to stand there has not the shape of the part."""
        what, basis = self.intervention.what, self.intervention.basis
        here = f"the selected part of {self.point.name}"
        wanted = ["any" if size is None else size for size in part]
        for width in (what.width, None if basis is None else basis.shape[-1]):
            if width is not None and part and part[-1] not in (None, width):
                raise InputError(
                    f"{self.intervention!r}: directions of width {width}, but {here} is {wanted}: "
                    f"its last axis has {part[-1]}"
                )
        if what.value is None:
            return
        given = list(what.value.shape)
        fits = [
            size in (1, there) or there is None
            for size, there in zip(reversed(given), reversed(part), strict=False)
        ]
        if len(given) > len(part) or not all(fits):
            raise InputError(
                f"{self.intervention!r}: a tensor {given} does not broadcast over {wanted}, {here}"
            )
