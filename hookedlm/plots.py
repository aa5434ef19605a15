"""Figures: heatmaps of what patching or attribution found, and lines over layers.

Needs plotly, which is not installed with the library: ``pip install hookedlm[plots]``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from hookedlm.errors import InputError

if TYPE_CHECKING:
    import plotly.graph_objects as go

Labels = Sequence[str | int]


def heatmap(
    values: Float[Tensor, "row column"],
    x: Labels | None = None,
    y: Labels | None = None,
    title: str = "",
    xaxis: str = "",
    yaxis: str = "",
    zmid: float | None = 0.0,
    colorbar: str = "",
    **layout: Any,
) -> go.Figure:
    """A plotly heatmap with diverging colours around ``zmid``, the first row on top.

    ``x`` labels the columns, ``y`` the rows; labels that occur twice get their place in front
    (``3: to``), because plotly would draw them as one. Other keywords go to ``update_layout``.
    Raises InputError when sizes do not match, ImportError without plotly.
    """
    grid = _numbers(values)
    if grid.ndim != 2:
        raise InputError(f"a heatmap shows [row, column], got shape {tuple(grid.shape)}")
    columns = unique_labels(_of_length("x", x, grid.shape[1]))
    rows = unique_labels(_of_length("y", y, grid.shape[0]))
    figure = _graph_objects().Figure(
        _graph_objects().Heatmap(
            z=grid.tolist(),
            x=columns,
            y=rows,
            zmid=zmid,
            colorscale="RdBu",
            colorbar={"title": {"text": colorbar}},
            hovertemplate="%{y}<br>%{x}<br>%{z:.4f}<extra></extra>",
        )
    )
    figure.update_yaxes(title=yaxis, autorange="reversed", type="category")
    figure.update_xaxes(title=xaxis, type="category", tickangle=-45 if _long(columns) else 0)
    return figure.update_layout(title=title, template="plotly_white", **layout)


def heatmaps(
    values: Float[Tensor, "panel row column"],
    names: Labels,
    x: Labels | None = None,
    y: Labels | None = None,
    title: str = "",
    xaxis: str = "",
    yaxis: str = "",
    zmid: float | None = 0.0,
    colorbar: str = "",
    **layout: Any,
) -> go.Figure:
    """Several heatmaps side by side, on one scale of colours. ``names`` stand above them; the rest
    is as in `heatmap`."""
    grids = _numbers(values)
    if grids.ndim != 3:
        raise InputError(f"heatmaps show [panel, row, column], got shape {tuple(grids.shape)}")
    titles = [str(name) for name in _of_length("names", names, len(grids))]
    figure = _make_subplots()(1, len(grids), subplot_titles=titles, shared_yaxes=True)
    for column, grid in enumerate(grids, start=1):
        panel = heatmap(grid, x, y, xaxis=xaxis, yaxis=yaxis if column == 1 else "")
        trace = panel.data[0].update(coloraxis="coloraxis", colorbar=None)
        figure.add_trace(trace, row=1, col=column)
        figure.update_xaxes(panel.layout.xaxis, row=1, col=column)
        figure.update_yaxes(panel.layout.yaxis, row=1, col=column)
    bar = {"title": {"text": colorbar}}
    figure.update_layout(coloraxis={"colorscale": "RdBu", "cmid": zmid, "colorbar": bar})
    return figure.update_layout(title=title, template="plotly_white", **layout)


def line(
    values: Float[Tensor, "*series x"],
    x: Labels | None = None,
    names: Sequence[str] | None = None,
    title: str = "",
    xaxis: str = "",
    yaxis: str = "",
    **layout: Any,
) -> go.Figure:
    """One line, or one for each row of ``[series, x]`` with its name in the legend.

    Raises InputError when sizes do not match, ImportError without plotly.
    """
    series = _numbers(values)
    series = series[None] if series.ndim == 1 else series
    if series.ndim != 2:
        raise InputError(f"lines are [x] or [series, x], got shape {tuple(series.shape)}")
    places = unique_labels(_of_length("x", x, series.shape[1])) if x is not None else None
    labels = _of_length("names", names, series.shape[0])
    figure = _graph_objects().Figure()
    for label, row in zip(labels, series.tolist(), strict=True):
        figure.add_scatter(x=places, y=row, name=label, mode="lines+markers")
    figure.update_xaxes(title=xaxis)
    figure.update_yaxes(title=yaxis)
    return figure.update_layout(
        title=title, template="plotly_white", showlegend=series.shape[0] > 1, **layout
    )


def save_html(fig: go.Figure, path: str | Path) -> Path:
    """Write a figure as one HTML file that needs no network to be seen; returns its path."""
    path = Path(path)
    fig.write_html(path, include_plotlyjs=True)
    return path


def unique_labels(labels: Labels) -> list[str]:
    """Labels as text; if any occurs twice, all get their index in front: ``0: The``, ``3: to``."""
    texts = [str(label).replace("\n", "\\n") for label in labels]
    if max(Counter(texts).values(), default=1) == 1:
        return texts
    return [f"{i}: {text.strip(' ') or repr(text)}" for i, text in enumerate(texts)]


def _graph_objects() -> Any:
    try:
        import plotly.graph_objects
    except ImportError as error:
        raise ImportError("figures need plotly: pip install hookedlm[plots]") from error
    return plotly.graph_objects


def _make_subplots() -> Any:
    _graph_objects()
    from plotly.subplots import make_subplots

    return make_subplots


def _numbers(values: Any) -> Tensor:
    return torch.as_tensor(values).detach().float().cpu()


def _of_length(what: str, labels: Labels | None, n: int) -> Labels:
    if labels is None:
        return range(n)
    if len(labels) != n:
        raise InputError(f"{what} has {len(labels)} labels for {n} values")
    return labels


def _long(labels: Sequence[str]) -> bool:
    return max(map(len, labels), default=0) > 4
