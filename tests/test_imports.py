"""The rules that keep the package in floors, light to import and honest, read off its source.

Each rule is a function from source text to the offences in it; the tests at the end of each part
show that it still sees one.
"""

from __future__ import annotations

import ast
import io
import os
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "hookedlm"


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}

each_module = pytest.mark.parametrize("module", FILES)


def is_within(module: str, prefix: str) -> bool:
    return module == prefix or module.startswith(prefix + ".")


# --------------------------------------------------------------------------------------------
# Imports go down only
# --------------------------------------------------------------------------------------------

# A name stands for the module and everything below it.
FLOORS = {
    name: floor
    for floor, names in {
        0: "axes errors",
        1: "names hooks parts slices root spec config factored_matrix aliases tensors",
        2: "layers families",
        3: "convert",
        4: "model driver lent toy cache caching derive missing tokens loss weights placing "
        "generation transforms loading pretrained processing encoder encoder_decoder audio "
        "sampling data encoders hub reach inputs embeds samples interventions "
        "state_dicts past_key_values model_configs classic_files checkpoints "
        "streaming shards single writing",
        5: "load patching circuits lenses steering utils prompts head_detector evals train "
        "svd_interpreter components plots",
        6: "cli transformer_lens install __main__",
    }.items()
    for name in names.split()
}
TOP = max(FLOORS.values())

# Other people's packages that a floor must not know.
FORBIDDEN = {
    "layers": {"transformers"},
    "families": {"torch", "transformers"},
}


def floor_of(module: str) -> int | None:
    """The floor of a module of the package; None if the table lacks it."""
    if module == "hookedlm":
        return TOP  # the package itself re-exports from everywhere
    return FLOORS.get(module.split(".")[1])


def imported(module: str, source: str, is_package: bool) -> Iterator[tuple[int, str]]:
    """Line and dotted name of everything imported, except for the type checker's eyes only."""
    nodes: list[ast.AST] = [ast.parse(source)]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            nodes.extend(node.orelse)
            continue
        nodes.extend(ast.iter_child_nodes(node))
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = module.split(".") if is_package else module.split(".")[:-1]
                package = package[: len(package) - node.level + 1]
                base = ".".join([*package, base] if base else package)
            for alias in node.names:
                # `from hookedlm import hooks` imports a module, `... .hooks import X` a name.
                child = f"{base}.{alias.name}"
                is_module = child in FILES or (base == "hookedlm" and alias.name in FLOORS)
                yield node.lineno, child if is_module else base


def wrong_imports(module: str, source: str, is_package: bool = False) -> list[str]:
    floor = floor_of(module)
    if floor is None:
        return [f"{module}: not in the table; add it to FLOORS in tests/test_imports.py"]
    forbidden = {
        package
        for prefix, packages in FORBIDDEN.items()
        if is_within(module, f"hookedlm.{prefix}")
        for package in packages
    }
    wrong = []
    for line, name in imported(module, source, is_package):
        if name.split(".")[0] in forbidden:
            wrong.append(f"{module}:{line} imports {name}, which this floor must not know")
        elif is_within(name, "hookedlm"):
            target = floor_of(name)
            if target is None:
                wrong.append(f"{module}:{line} imports {name}, which is not in the table")
            elif target > floor:
                wrong.append(f"{module}:{line} (floor {floor}) imports {name} (floor {target})")
    return wrong


@each_module
def test_imports_go_down_only(module):
    path = FILES[module]
    wrong = wrong_imports(module, path.read_text("utf-8"), path.name == "__init__.py")
    assert wrong == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("hookedlm.hooks", "from hookedlm.cache import ActivationCache"),
        ("hookedlm.hooks", "from hookedlm import cache"),
        ("hookedlm.hooks", "from . import cache"),
        ("hookedlm.hooks", "def late():\n    import hookedlm.model"),
        ("hookedlm.hooks", "import hookedlm"),
        ("hookedlm.hooks", "if TYPE_CHECKING:\n    pass\nelse:\n    import hookedlm.model"),
        ("hookedlm.layers.block", "from ..convert.read import read"),
        ("hookedlm.layers.block", "from transformers.cache_utils import Cache"),
        ("hookedlm.families.llama", "import torch.nn as nn"),
        ("hookedlm.families.llama", "from transformers import AutoConfig"),
        ("hookedlm.nowhere", ""),
        ("hookedlm.cli", "import hookedlm.nowhere"),
    ],
)
def test_an_import_that_goes_up_is_seen(module, source):
    assert len(wrong_imports(module, source)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("hookedlm.hooks", "import torch\nfrom hookedlm import errors\nfrom .axes import BATCH"),
        ("hookedlm.hooks", "from hookedlm.names import act_name"),
        ("hookedlm.cache", "if TYPE_CHECKING:\n    from hookedlm.load import load"),
        ("hookedlm.cache", "if typing.TYPE_CHECKING:\n    from hookedlm.load import load"),
        ("hookedlm.layers.block", "from .norms import RMSNorm\nfrom ..hooks import HookPoint"),
        ("hookedlm.cli", "from hookedlm import __version__"),
    ],
)
def test_an_import_that_goes_down_is_left_alone(module, source):
    assert wrong_imports(module, source) == []


# --------------------------------------------------------------------------------------------
# Importing the package is quiet and light
# --------------------------------------------------------------------------------------------

HEAVY = {"pandas", "plotly", "datasets", "sklearn", "matplotlib", "IPython"}

IMPORT_ALONE = f"""
import sys

reached = []

def watch(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo"):
        reached.append((event, arguments))
        raise OSError("no network while importing")

sys.addaudithook(watch)
import hookedlm

heavy = sorted({HEAVY!r} & sys.modules.keys())
if heavy or reached:
    sys.exit(f"import hookedlm pulled in {{heavy}} and reached for {{reached}}")
"""


def test_import_is_quiet_and_light():
    # Without the user's settings: an offline switch would hide a connection.
    environment = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(("HF_", "TRANSFORMERS_", "PYTHONWARNINGS"))
    }
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_ALONE],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# --------------------------------------------------------------------------------------------
# The code knows what it is holding
# --------------------------------------------------------------------------------------------

ALL_RULES = {"hasattr", "getattr with a default", "except Exception", "print", "type: ignore"}

# Where something is there to print: the commands, test_prompt, print_gpu_mem and check_structure.
PRINTING = {"hookedlm.cli", "hookedlm.prompts", "hookedlm.tensors"}


def rules_for(module: str) -> set[str]:
    if is_within(module, "hookedlm.convert"):
        return set()  # the border to objects that nobody typed
    return ALL_RULES - {"print"} if module in PRINTING else ALL_RULES


def names_exception(expression: ast.expr | None) -> bool:
    """`Exception` itself or a tuple with it; None is a bare `except`."""
    parts = expression.elts if isinstance(expression, ast.Tuple) else [expression]
    return any(p is None or (isinstance(p, ast.Name) and p.id == "Exception") for p in parts)


def offences(source: str) -> Iterator[tuple[str, int]]:
    """Rule and line of everything that guesses, swallows, prints or silences the type checker."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ExceptHandler) and names_exception(node.type):
            yield "except Exception", node.lineno
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if called in ("hasattr", "print"):
                yield called, node.lineno
            elif called == "getattr" and len(node.args) == 3:
                yield "getattr with a default", node.lineno
            elif called.split(".")[-1] == "suppress" and any(map(names_exception, node.args)):
                yield "except Exception", node.lineno
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT and re.search(r"#\s*type:\s*ignore", token.string):
            yield "type: ignore", token.start[0]


@each_module
def test_the_code_knows_what_it_is_holding(module):
    rules = rules_for(module)
    found = offences(FILES[module].read_text("utf-8"))
    assert [f"{module}:{line} {rule}" for rule, line in found if rule in rules] == []


@pytest.mark.parametrize(
    ("rule", "source"),
    [
        ("hasattr", "hasattr(x, 'y')"),
        ("getattr with a default", "getattr(x, 'y', None)"),
        ("except Exception", "try: f()\nexcept Exception: pass"),
        ("except Exception", "try: f()\nexcept (KeyError, Exception) as e: pass"),
        ("except Exception", "try: f()\nexcept: pass"),
        ("except Exception", "with contextlib.suppress(Exception): f()"),
        ("print", "print('hello')"),
        ("type: ignore", "x = f()  # type: ignore[attr-defined]"),
    ],
)
def test_an_offence_is_seen(rule, source):
    assert [found for found, _ in offences(source)] == [rule]


def test_what_only_looks_like_an_offence_is_left_alone():
    source = '''
    """>>> print(hasattr(x, "y"))  # type: ignore"""
    getattr(x, "y")
    try:
        f()
    except (KeyError, ValueError):
        model.print()
    '''
    assert list(offences(source.replace("\n    ", "\n"))) == []


# --------------------------------------------------------------------------------------------
# Nothing in the repository belongs to one machine
# --------------------------------------------------------------------------------------------

MACHINE_PATH = re.compile(r"(?<![A-Za-z])/(?:root|home|work|farm)/")


def tracked_files() -> list[Path]:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return [path for name in listed.stdout.split("\0") if name and (path := ROOT / name).is_file()]


def test_no_file_mentions_a_path_of_one_machine():
    found = []
    for path in tracked_files():
        content = path.read_bytes()
        if b"\0" in content:
            continue  # binary
        for number, line in enumerate(content.decode("utf-8").splitlines(), start=1):
            if MACHINE_PATH.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:80]}")
    assert found == []


def test_a_path_of_one_machine_is_seen():
    places = ("root", "home", "work", "farm")
    assert all(MACHINE_PATH.search(f"open('/{place}/me/x')") for place in places)
    assert not MACHINE_PATH.search("https://example.org/home/page, src/work/x, /homework/x")
