"""The comparison with TransformerLens' API, and that it would see a name go."""

from __future__ import annotations

import importlib.util
import inspect
import json
import sys
from pathlib import Path

import pytest

from hookedlm import HookedTransformer, patching
from hookedlm.transformer_lens import hook_points

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def coverage():
    path = ROOT / "scripts" / "api_coverage.py"
    spec = importlib.util.spec_from_file_location("api_coverage", path)
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "api_coverage", module)
        spec.loader.exec_module(module)
        yield module


def unexplained(coverage) -> dict[str, str]:
    return {found.name: found.status for found in coverage.findings() if found.unexplained}


def test_everything_is_there_or_explained(coverage):
    assert [found for found in coverage.findings() if found.unexplained] == []
    assert coverage.main(["--check"]) == 0


def test_the_page_is_up_to_date(coverage):
    page = (ROOT / "docs" / "api_coverage.md").read_text("utf-8")
    assert page == coverage.page(coverage.findings()), "python scripts/api_coverage.py --markdown"


@pytest.mark.parametrize(
    ("owner", "name", "lost"),
    [
        (HookedTransformer, "accumulated_bias", "transformer_lens:HookedTransformer."),
        (patching, "get_act_patch_mlp_out", "transformer_lens.patching:"),
        (hook_points, "HookedRootModule", "transformer_lens.hook_points:"),
    ],
)
def test_a_name_that_goes_is_seen(coverage, monkeypatch, owner, name, lost):
    kinds = owner.__mro__ if inspect.isclass(owner) else [owner]
    monkeypatch.delattr(next(kind for kind in kinds if name in vars(kind)), name)
    assert unexplained(coverage)[lost + name] == "MISSING"
    assert coverage.main(["--check"]) == 1


def test_a_module_that_goes_is_seen(coverage, monkeypatch):
    name = "hookedlm.transformer_lens.past_key_value_caching"
    monkeypatch.delitem(sys.modules, name)
    assert unexplained(coverage) == {name.removeprefix("hookedlm."): "MISSING"}


def test_another_signature_is_seen(coverage, monkeypatch):
    def get_act_patch_mlp_out(model, clean_cache, corrupted_tokens, patching_metric, more):
        pass

    monkeypatch.setattr(patching, "get_act_patch_mlp_out", get_act_patch_mlp_out)
    [found] = [found for found in coverage.findings() if found.unexplained]
    assert found.status == "INCOMPATIBLE"
    assert "corrupted_tokens is not argument 2" in found.note
    assert "more must be given too" in found.note


def test_a_reason_that_no_longer_holds_is_seen(coverage, monkeypatch):
    monkeypatch.setitem(coverage.ABSENT, "patching.get_act_patch_mlp_out", "not built")
    assert unexplained(coverage) == {"transformer_lens.patching:get_act_patch_mlp_out": "STALE"}


@pytest.mark.parametrize(
    ("theirs", "ours", "wrong"),
    [
        ("(x, y=1)", lambda x, y=1: ..., []),
        ("(x, y=1)", lambda x, y=2, z=3: ..., []),
        ("(x, y=1)", lambda *args, x=None, y=None: ..., []),
        ("(x, y=1)", lambda x, **kwargs: ..., ["y is not argument 2"]),
        ("(x, y)", lambda y, x=1: ..., ["x is not argument 1", "y is not argument 2"]),
        ("(x, y=1)", lambda x: ..., ["no argument y"]),
        ("(x, y=1)", lambda x, y: ..., ["y must be given"]),
        ("(x)", lambda x, *, z: ..., ["z must be given too"]),
        ("(x, *, y)", lambda x, *, y: ..., []),
        ("(x, *args, **kwargs)", lambda x: ..., ["no *args", "no **kwargs"]),
        ("(*args, y=1)", lambda *args, y=1: ..., []),
    ],
)  # fmt: skip
def test_compatible(coverage, theirs, ours, wrong):
    parameters = coverage.parameters_of(ours, is_method=False)
    assert coverage.incompatibilities(coverage.parsed(theirs), parameters) == wrong


def test_other_defaults_are_noted(coverage):
    theirs = coverage.parsed("(x, y=1, z=[], dtype=torch.float32, flag=True)")
    ours = coverage.parameters_of(lambda x, y=1.0, z=(), dtype=None, flag=True: ..., False)
    assert coverage.other_defaults(theirs, ours) == [
        "y=1.0 (was 1)",
        "dtype=None (was torch.float32)",
    ]


def test_the_data_is_whole(coverage):
    data = json.loads(coverage.SURFACE.read_text("utf-8"))
    assert len(data["surface"]) > 300
    for signature in filter(None, data["surface"].values()):
        coverage.parsed(signature)
