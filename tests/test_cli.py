"""The command line: what it prints, what it writes, and its exit codes."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import quiet_transformers, tinies
from torch import nn

from hookedlm import cli
from hookedlm.layers.block import SequentialBlock


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where tiny checkpoints are."""
    path = tmp_path_factory.mktemp("checkpoints")
    with quiet_transformers():
        for family in ("gpt2", "llama"):
            tinies(family)[0].build().save_pretrained(path / family)
    return path


def refused(capsys, *arguments) -> str:
    """The one line on stderr of a call that must exit with 2."""
    assert cli.main(list(map(str, arguments))) == 2
    err = capsys.readouterr().err
    lines = [line for line in err.splitlines() if line.strip() and "patching" not in line]
    assert len(lines) == 1, err
    assert lines[0].startswith("hookedlm: ")
    return lines[0]


# demo ------------------------------------------------------------


def test_the_demo_finds_where_the_name_is(capsys, tmp_path):
    out = tmp_path / "figure.html"
    assert cli.main(["demo", "--out", str(out)]) == 0
    text = capsys.readouterr().out
    shown = text.split("The same as a figure")[0]
    assert max(map(len, shown.splitlines())) <= cli.WIDTH
    clean, corrupted = (
        float(re.search(rf"([+-]\d+\.\d+)  {which} ", text)[1]) for which in ("clean", "corrupted")
    )
    assert clean > 0 > corrupted
    assert "bit-identical" in text
    assert len(re.findall(r"\[\d\.\d\d\]", text)) == 1
    # At the second name the first layer's input is all that differs, so it restores everything.
    row = next(
        line for line in text.splitlines() if re.match(r"\d+: Mary", line) and "1.00" in line
    )
    assert float(re.findall(r"-?\d+\.\d\d", row)[0]) == 1.0
    assert out.stat().st_size > 1_000_000


def test_without_plotly_the_demo_says_how_to_get_it(capsys, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "plotly", None)
    monkeypatch.setitem(sys.modules, "plotly.graph_objects", None)
    out = tmp_path / "figure.html"
    assert cli.main(["demo", "--out", str(out)]) == 0
    assert "pip install hookedlm[plots]" in capsys.readouterr().out
    assert not out.exists()


def test_where_the_figure_goes_is_checked_first(capsys, tmp_path):
    assert "folder" in refused(capsys, "demo", "--out", tmp_path)
    assert "folder" in refused(capsys, "demo", "--out", tmp_path / "nowhere" / "x.html")


def test_a_model_without_the_words_is_refused(capsys, folder, tmp_path):
    refused(capsys, "demo", "--model", folder / "gpt2", "--out", tmp_path / "x.html")


def test_tables_fit_and_mark_the_largest():
    values = torch.linspace(-1, 1, 60).reshape(2, 30)
    text = cli.table(values, ["a token far too long to be shown", " the"])
    assert max(map(len, text.splitlines())) <= cli.WIDTH
    assert text.count("[1.00]") == text.count("[") == 1
    assert len(text.split("\n\n")) == 3
    for part in text.split("\n\n"):  # numbers stand in columns
        ends = [{m.end() for m in re.finditer(r"\d+\.\d\d", row)} for row in part.splitlines()[1:]]
        assert ends[0] == ends[1]


# info and verify ------------------------------------------------------------


def test_info_lists_sizes_fidelity_and_hooks(capsys, folder):
    assert cli.main(["info", str(folder / "llama")]) == 0
    text = capsys.readouterr().out
    for expected in ("n_layers=3", "read as llama", "blocks.L.attn.hook_k", "batch pos kv_head"):
        assert expected in text


@pytest.mark.usefixtures("one_gelu")
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_verify_agrees(capsys, folder, family):
    assert cli.main(["verify", str(folder / family)]) == 0
    text = capsys.readouterr().out
    assert "agrees with Hugging Face" in text
    assert "logits        bit-identical" in text


def test_verify_in_another_dtype(capsys, folder):
    assert cli.main(["verify", str(folder / "llama"), "--dtype", "bfloat16"]) == 0
    assert "bfloat16" in capsys.readouterr().out


def test_verify_sees_a_wrong_weight(capsys, folder, monkeypatch):
    def tampered(model):
        hooked = loaded(model)
        unembed = hooked.unembed  # not in place: the tensor is also Hugging Face's
        unembed._parameters["W_U"] = nn.Parameter(unembed.W_U.detach() * 1.01)
        return hooked

    loaded = cli.load
    monkeypatch.setattr(cli, "load", tampered)
    assert cli.main(["verify", str(folder / "gpt2")]) == 1
    assert "DIFFERS from Hugging Face, first at logits" in capsys.readouterr().out


def test_verify_sees_a_wrong_block(capsys, folder, monkeypatch):
    def tampered(model):
        hooked = loaded(model)
        forward = SequentialBlock.forward

        def wrong(self, resid, ctx):
            out = forward(self, resid, ctx)
            return self.hook_resid_post(out + 0.01) if self is hooked.blocks[1] else out

        monkeypatch.setattr(SequentialBlock, "forward", wrong)
        return hooked

    loaded = cli.load
    monkeypatch.setattr(cli, "load", tampered)
    assert cli.main(["verify", str(folder / "llama")]) == 1
    assert "first at blocks.1" in capsys.readouterr().out


# Bad input ------------------------------------------------------------


def test_bad_models_and_options_are_one_line(capsys, folder, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    (tmp_path / "cut").mkdir()
    for file in (folder / "gpt2").iterdir():
        (tmp_path / "cut" / file.name).write_bytes(file.read_bytes()[:1000])
    for command in ("info", "verify"):
        assert "no folder" in refused(capsys, command, tmp_path / "nowhere")
        for name in ("empty", "broken", "cut"):
            assert name in refused(capsys, command, tmp_path / name)
    assert "float32" in refused(capsys, "verify", folder / "gpt2", "--dtype", "floaty")


def test_bad_arguments_exit_with_two(capsys):
    for arguments in ([], ["demo", "--colour"], ["fly"]):
        with pytest.raises(SystemExit) as stopped:
            cli.main(arguments)
        assert stopped.value.code == 2
    assert "usage: hookedlm" in capsys.readouterr().err


def test_interrupted(capsys, monkeypatch):
    def stop(model):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "load", stop)
    assert cli.main(["info", "demo"]) == 130
    assert capsys.readouterr().err == "hookedlm: interrupted\n"


def test_python_m_hookedlm():
    done = subprocess.run(
        [sys.executable, "-m", "hookedlm", "--help"],
        cwd=Path(cli.__file__).parent.parent,
        capture_output=True,
        text=True,
        check=True,
    )
    for word in ("demo", "info", "verify", "MODEL"):
        assert word in done.stdout
