"""Figures: what they show, and what is said when they can't be drawn."""

from __future__ import annotations

import sys

import pytest
import torch

from hookedlm import plots
from hookedlm.errors import InputError


def test_a_heatmap_shows_the_values_with_zero_in_the_middle():
    values = torch.tensor([[1.0, -2.0, 0.0], [0.5, 0.0, 3.0]], requires_grad=True)
    figure = plots.heatmap(
        values, x=["The", " to", " to"], y=["L0", "L1"], title="t", xaxis="token", yaxis="layer"
    )
    (trace,) = figure.data
    assert trace.zmid == 0.0
    assert [list(row) for row in trace.z] == values.tolist()
    assert list(trace.x) == ["0: The", "1: to", "2: to"]
    assert list(trace.y) == ["L0", "L1"]
    assert figure.layout.title.text == "t"
    assert figure.layout.xaxis.title.text == "token"
    assert figure.layout.yaxis.autorange == "reversed"


def test_lines():
    figure = plots.line(torch.arange(6).reshape(2, 3), names=["a", "b"], x=["0", "1", "2"])
    assert [trace.name for trace in figure.data] == ["a", "b"]
    assert list(figure.data[1].y) == [3, 4, 5]
    assert len(plots.line(torch.arange(3.0)).data) == 1


def test_labels_become_unique_only_where_they_must():
    assert plots.unique_labels(["a", " b"]) == ["a", " b"]
    assert plots.unique_labels([" to", "\n", " to", " "]) == ["0: to", "1: \\n", "2: to", "3: ' '"]
    assert plots.unique_labels(range(3)) == ["0", "1", "2"]
    assert plots.unique_labels([]) == []


def test_an_html_file_needs_no_network(tmp_path):
    path = plots.save_html(plots.heatmap(torch.eye(2)), tmp_path / "figure.html")
    text = path.read_text("utf-8")
    assert "<html>" in text
    assert len(text) > 1_000_000  # plotly's own code is in it
    assert 'src="http' not in text


def test_sizes_that_do_not_match_are_refused():
    with pytest.raises(InputError, match="3 labels for 2"):
        plots.heatmap(torch.eye(2), x=["a", "b", "c"])
    with pytest.raises(InputError, match="row, column"):
        plots.heatmap(torch.zeros(3))
    with pytest.raises(InputError, match="1 labels for 2"):
        plots.line(torch.eye(2), names=["a"])
    with pytest.raises(InputError, match="series"):
        plots.line(torch.zeros(1, 2, 3))


def test_without_plotly_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "plotly", None)
    monkeypatch.setitem(sys.modules, "plotly.graph_objects", None)
    with pytest.raises(ImportError, match=r"pip install hookedlm\[plots\]"):
        plots.heatmap(torch.eye(2))
