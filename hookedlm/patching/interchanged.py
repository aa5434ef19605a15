"""`InterchangeResult`: what the model said after each swap, as a table and as figures."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hookedlm.errors import InputError
from hookedlm.patching.pairs import Positions
from hookedlm.patching.result import Label, SweepResult

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

Value: TypeAlias = Literal["probability", "logit"]


@dataclass(frozen=True, eq=False)
class Said:
    """Logits and log-probabilities, the two along the last axis."""

    both: Float[Tensor, "*cells example token 2"]

    @property
    def logit(self) -> Float[Tensor, "*cells example token"]:
        """Logits."""
        return self.both[..., 0]

    @property
    def probability(self) -> Float[Tensor, "*cells example token"]:
        """Probabilities among the whole vocabulary."""
        return self.both[..., 1].exp()

    def of(self, value: Value) -> Float[Tensor, "*cells example token"]:
        """One of the two; raises InputError on another name."""
        if value not in ("probability", "logit"):
            raise InputError(f"value={value!r}: expected 'probability' or 'logit'")
        return self.probability if value == "probability" else self.logit


@dataclass(frozen=True, eq=False, repr=False)
class InterchangeResult:
    """``values``: [layer, head, position, example, token]; an axis that was swapped all at once has
    length 1, and ``heads`` or ``positions`` is then None. ``base``, ``source``: [example, token] of
    the runs as they are. ``tokens``: of each example, as text. After an interruption what was not
    reached is NaN.
    """

    unit: str
    layers: list[int]
    heads: list[int] | None
    positions: Positions | None
    values: Said
    base: Said
    source: Said
    tokens: list[list[str]]
    names: tuple[str, ...] | None = None
    text: list[list[str]] | None = None
    real: Bool[Tensor, "example pos"] | None = None

    @property
    def probabilities(self) -> Float[Tensor, "layer head position example token"]:
        """Of each token after each swap."""
        return self.values.probability

    @property
    def logits(self) -> Float[Tensor, "layer head position example token"]:
        """Of each token after each swap."""
        return self.values.logit

    def __repr__(self) -> str:
        layer, head, position, example, token = self.probabilities.shape
        inside = f"{layer} layers"
        inside += "" if self.heads is None else f" x {head} heads"
        inside += "" if self.positions is None else f" x {position} positions"
        rest = f"{example} example{'s' * (example > 1)}, {token} token{'s' * (token > 1)}"
        return f"InterchangeResult({self.unit}; {inside}; {rest})"

    # Tables ---------------------------------------------------------------------------------------

    @property
    def df(self) -> pd.DataFrame:
        """One row for each layer, head, position, example and token, with its ``probability`` and
        ``logit``; columns of what there is one of, or what was swapped all at once, are left out.
        ``text``: the base's token at the position. Padding has no rows. Raises ImportError without
        pandas.
        """
        try:
            import pandas
        except ImportError as error:
            raise ImportError(
                "tables need pandas: pip install hookedlm[plots]. Without it, "
                "result.probabilities and result.logits have the numbers."
            ) from error
        shape = self.probabilities.shape
        numbers = zip(
            self.probabilities.flatten().tolist(), self.logits.flatten().tolist(), strict=True
        )
        rows = [
            self._labels(*cell) | {"probability": p, "logit": logit}
            for cell, (p, logit) in zip(product(*map(range, shape)), numbers, strict=True)
            if self._is_real(cell[2], cell[3])
        ]
        return pandas.DataFrame(rows)

    def _labels(
        self, layer: int, head: int, position: int, example: int, token: int
    ) -> dict[str, Any]:
        row: dict[str, Any] = {"layer": self.layers[layer]}
        if self.heads is not None:
            row["head"] = self.heads[head]
        if self.positions is not None:
            label = self.positions.labels[position]
            at = int(self.positions.base[position, example])
            if isinstance(label, str) and label not in ("each", "last"):
                row["place"] = label
            row["position"] = at
            if self.positions.differ:
                row["source_position"] = int(self.positions.source[position, example])
            if self.text is not None:
                row["text"] = self.text[example][at]
        if self.probabilities.shape[3] > 1:
            row["example"] = example
        if self.names is not None:
            row["answer"] = self.names[token]
        return row | {"token": self.tokens[example][token]}

    def _is_real(self, position: int, example: int) -> bool:
        if self.real is None or self.positions is None:
            return True
        return bool(self.real[example, self.positions.base[position, example]])

    # One token ------------------------------------------------------------------------------------

    def of(self, token: int | str = 0, value: Value = "probability") -> SweepResult:
        """One token's numbers (by place, text or name), the mean over examples, as a `SweepResult`
        between the base run (its ``corrupted``) and the source run (its ``clean``): with ``at``,
        ``top``, ``plot``, ``normalised``, ``save``.

        Raises InputError on a token that was not read.
        """
        column = self._column(token)
        axes: dict[str, list[Label]] = {"layer": list(self.layers)}
        if self.heads is not None:
            axes["head"] = list(self.heads)
        if self.positions is not None:
            axes["pos"] = list(self.positions.labels)
        numbers = self.values.of(value)[..., column]
        if self.positions is not None and self.real is not None:
            examples = torch.arange(numbers.shape[-1])
            real = self.real[examples, self.positions.base]
            numbers = numbers.masked_fill(~real, torch.nan)
        shape = [len(labels) for labels in axes.values()]
        text = self.text[0] if self.text is not None and len(self.text) == 1 else None
        return SweepResult(
            values=numbers.nanmean(-1).reshape(shape),
            axes=axes,
            metric=f"{value} of {self._token_name(column)}",
            clean=self.source.of(value)[:, column].mean(),
            corrupted=self.base.of(value)[:, column].mean(),
            fixed={"unit": self.unit, "direction": "denoise"},
            tokens=text,
            complete=not bool(self.values.both.isnan().any()),
        )

    def top(
        self, k: int = 10, token: int | str = 0, value: Value = "probability"
    ) -> list[dict[str, Any]]:
        """The ``k`` swaps that move a token furthest from the base run, either way."""
        return self.of(token, value).top(k)

    def plot(self, token: int | str = 0, value: Value = "probability", **layout: Any) -> go.Figure:
        """A heatmap of one token's probability (or logit), the mean over examples: see
        `SweepResult.plot`. Raises ImportError without plotly."""
        options = {"title": f"{value} of {self._token_name(self._column(token))}: {self.unit}"}
        return self.of(token, value).plot(**(options | layout))

    def _token_name(self, column: int) -> str:
        return repr(self.tokens[0][column]) if self.names is None else self.names[column]

    def _column(self, token: int | str) -> int:
        names = list(self.names or self.tokens[0])
        if isinstance(token, str) and token in names:
            return names.index(token)
        if isinstance(token, int) and -len(names) <= token < len(names):
            return token % len(names)
        raise InputError(f"token={token!r}: read were {', '.join(map(repr, names))}")
