"""The documentation: its Python runs, its tables are true, its links lead somewhere."""

from __future__ import annotations

import io
import re
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
from tiny import quiet_transformers, registered, tinies
from transformers import AutoConfig, AutoModelForCausalLM

import hookedlm
from hookedlm import HookedTransformer, HookedTransformerConfig

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)

WHOLE = ("families", "toy")
"""Folders that docs/design.md names as one."""

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


@each_page
def test_python_blocks_run(page):
    names: dict = {"__name__": "docs"}
    text = page.read_text("utf-8")
    for found in BLOCK.finditer(text):
        line = text[: found.start()].count("\n") + 1
        code = "\n" * line + found[1]  # so that a traceback names the line of the page
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            exec(compile(code, str(page), "exec"), names)


@each_page
def test_links_lead_somewhere(page):
    text = re.sub(r"^```.*?^```$", "", page.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
    targets = [target.split("#")[0] for target in re.findall(r"\]\(([^)]+)\)", text)]
    local = [target for target in targets if target and "://" not in target]
    assert [target for target in local if not (page.parent / target).exists()] == []


def test_every_page_is_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text("utf-8")
    listed = set(re.findall(r"(\S+\.md)$", navigation, flags=re.MULTILINE))
    assert {page.name for page in PAGES[1:]} <= listed
    assert [name for name in listed if not (ROOT / "docs" / name).exists()] == []


def test_the_design_names_every_file_of_the_package():
    design = (ROOT / "docs" / "design.md").read_text("utf-8")
    files = design.split("## Files")[1].split("\n## ")[0]
    for path in sorted((ROOT / "hookedlm").rglob("*.py")):
        place = path.relative_to(ROOT / "hookedlm")
        named = f"`{place.parts[0]}/" in files if place.parts[0] in WHOLE else path.name in files
        assert named or path.name == "__init__.py", f"{place} is not in docs/design.md"


# docs/hooks.md -----------------------------------------------------------------------------

FAMILIES = "gpt2 llama gemma3_text olmo2 bloom mixtral opt gptj".split()
TOYS = [
    dict(act_fn="solu_ln", use_hook_tokens=True),
    dict(act_fn="relu", positional_embedding_type="rotary", rotary_dim=4),
    dict(attn_only=True),
]


def documented() -> dict[str, set[str]]:
    """Name -> the axes that the tables give it."""
    table = {}
    for line in (ROOT / "docs" / "hooks.md").read_text("utf-8").splitlines():
        row = re.match(r"\| `([\w.]*hook_\w+)` \| ([^|]+) \|", line)
        if row:
            assert row[1] not in table, f"{row[1]} stands there twice"
            table[row[1]] = {axes.strip() for axes in row[2].split(",")}
    return table


def models():
    for tiny in tinies(*FAMILIES):
        if tiny.variant in ("base", tinies(tiny.model_type)[0].variant):
            yield hookedlm.load(tiny.build())
    for kind in ("deepseek_v3", "gemma4_text", "afmoe", "bitnet", "bert"):
        yield hookedlm.load(registered([kind])[-1].build())
    with quiet_transformers():
        sizes = dict(vocab_size=50, hidden_size=16, num_hidden_layers=2, state_size=4)
        mamba = AutoModelForCausalLM.from_config(AutoConfig.for_model("mamba", **sizes))
        yield hookedlm.load(mamba.eval())
        sizes |= dict(intermediate_size=24, num_attention_heads=4, num_key_value_heads=2)
        hybrid = AutoConfig.for_model("lfm2", layer_types=["conv", "full_attention"], **sizes)
        yield hookedlm.load(AutoModelForCausalLM.from_config(hybrid).eval())
    for options in TOYS:
        sizes = dict(n_layers=2, d_model=8, n_ctx=8, d_head=4, d_vocab=10)
        yield HookedTransformer(HookedTransformerConfig(**sizes, **options))


def test_the_tables_of_hook_points_are_those_of_the_models():
    found: dict[str, set[str]] = {}
    on_demand, always = set(), set()
    for model in models():
        for name, point in model.hook_dict.items():
            key = re.sub(r"^blocks\.\d+\.", "blocks.L.", name)
            found.setdefault(key, set()).add(point.axes_text)
            (on_demand if point.on_demand else always).add(key)
    table = documented()
    assert sorted(set(table) - set(found)) == []
    assert sorted(set(found) - set(table)) == []
    for name, axes in found.items():
        assert axes <= table[name], name
    section = (ROOT / "docs" / "hooks.md").read_text("utf-8").split("## On demand")[1]
    section = section.split("\n## ")[0]
    assert on_demand - always == set(re.findall(r"^\| `([\w.]+)`", section, flags=re.MULTILINE))


def test_the_readme_picture_has_the_names_of_the_block():
    picture = (ROOT / "README.md").read_text("utf-8").split("## The block")[1].split("\n## ")[0]
    short = {name.rsplit(".", 1)[-1] for name in documented() if name.startswith("blocks.L.")}
    assert set(re.findall(r"hook_\w+", picture)) <= short
