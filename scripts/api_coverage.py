"""Compare hookedlm with TransformerLens 2.x, name by name.

python scripts/api_coverage.py              # a table, and a summary
python scripts/api_coverage.py --check      # exit 1 if anything is missing without a reason
python scripts/api_coverage.py --markdown   # write docs/api_coverage.md

api_surface.json holds TransformerLens' public names ("module" or "module:name.in.it") with their
signatures. Names are looked up below `hookedlm.transformer_lens`. Why some are absent stands in its
`paths.ABSENT`, why a signature is another in the data under "different". A signature is compatible
if every argument is taken in the same place and by the same name, may be left out where it might,
and nothing else must be given.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import json
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from hookedlm.transformer_lens.paths import ABSENT

SURFACE = Path(__file__).with_name("api_surface.json")
PAGE = ROOT / "docs" / "api_coverage.md"
HEAD = """# Coverage of TransformerLens' API

Every public name of {source}, as found below `hookedlm.transformer_lens`. *Present*:
with a signature that takes every call TransformerLens' took; where a default is another, both stand
there. What the same call gives differently stands in [differences](differences.md). Regenerate with
`python scripts/api_coverage.py --markdown`.

{summary}
"""
BOTH = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
REQUIRED = inspect.Parameter.empty


@dataclass(frozen=True)
class Finding:
    """What became of one name."""

    name: str
    status: str
    """present, different or absent (both explained), or what is wrong, in capitals."""
    note: str = ""

    @property
    def unexplained(self) -> bool:
        """Whether a check fails on it."""
        return self.status.isupper()


# Signatures ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Argument:
    """One argument of a signature in the data."""

    name: str
    positional: bool
    default: str | None
    """Its source; None if the argument must be given."""


@dataclass(frozen=True)
class Signature:
    """A signature in the data."""

    arguments: list[Argument]
    args: bool
    """Whether it takes ``*args``."""
    kwargs: bool


def parsed(signature: str) -> Signature:
    """A signature from its source, such as ``(x, y=1, **kwargs)``."""
    [function] = ast.parse(f"def f{signature}: ...").body
    assert isinstance(function, ast.FunctionDef)
    found = function.args
    defaults = [None] * (len(found.args) - len(found.defaults)) + [*found.defaults]
    arguments = [*zip(found.args, defaults, strict=True)]
    keywords = [*zip(found.kwonlyargs, found.kw_defaults, strict=True)]
    return Signature(
        [
            Argument(arg.arg, positional, None if default is None else ast.unparse(default))
            for group, positional in ((arguments, True), (keywords, False))
            for arg, default in group
        ],
        found.vararg is not None,
        found.kwarg is not None,
    )


def parameters_of(thing: Any, is_method: bool) -> list[inspect.Parameter]:
    """The parameters that a caller of ``thing`` gives."""
    parameters = list(inspect.signature(thing).parameters.values())
    is_bound = inspect.ismethod(thing) or inspect.isclass(thing)
    return parameters[1:] if is_method and not is_bound else parameters


def incompatibilities(theirs: Signature, ours: list[inspect.Parameter]) -> list[str]:
    """Calls that TransformerLens takes and we do not, in words."""
    in_order = [p for p in ours if p.kind in BOTH]
    by_name = {p.name: p for p in ours if p.kind is not inspect.Parameter.POSITIONAL_ONLY}
    takes_args = any(p.kind is inspect.Parameter.VAR_POSITIONAL for p in ours)
    takes_kwargs = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in ours)
    wrong = []
    for place, argument in enumerate(theirs.arguments):
        name, parameter = argument.name, by_name.get(argument.name)
        if parameter is None and not takes_kwargs:
            wrong.append(f"no argument {name}")
            continue
        if argument.positional:
            there = in_order[place].name if place < len(in_order) else None
            if there != name and not (there is None and takes_args):
                wrong.append(f"{name} is not argument {place + 1}")
        if argument.default is not None and parameter is not None and parameter.default is REQUIRED:
            wrong.append(f"{name} must be given")
    known = {argument.name for argument in theirs.arguments}
    wrong += [
        f"{p.name} must be given too"
        for p in by_name.values()
        if p.name not in known
        and p.default is REQUIRED
        and p.kind in (*BOTH, inspect.Parameter.KEYWORD_ONLY)
    ]
    if theirs.args and not takes_args:
        wrong.append("no *args")
    if theirs.kwargs and not takes_kwargs:
        wrong.append("no **kwargs")
    return wrong


def other_defaults(theirs: Signature, ours: list[inspect.Parameter]) -> list[str]:
    """Arguments whose default is another here."""
    by_name = {p.name: p.default for p in ours if p.default is not REQUIRED}
    return [
        f"{argument.name}={shown(by_name[argument.name])} (was {argument.default})"
        for argument in theirs.arguments
        if argument.default is not None
        and argument.name in by_name
        and not same_default(argument.default, by_name[argument.name])
    ]


def same_default(theirs: str, ours: Any) -> bool:
    """Whether a default is the one that the source ``theirs`` means."""
    try:
        expected = ast.literal_eval(theirs)
    except ValueError:  # a constant by its name
        return True if theirs.isupper() else shown(ours) == theirs
    if expected == [] and ours == ():  # a default that can't be changed by accident
        return True
    return type(expected) is type(ours) and expected == ours


def shown(default: Any) -> str:
    """A default as one would write it."""
    return str(default) if type(default).__module__ == "torch" else repr(default)


# Names --------------------------------------------------------------------------------------------


def looked_up(name: str) -> Any:
    """The object at ``module`` or ``module:name.in.it`` below `hookedlm.transformer_lens`.

    Raises ImportError or AttributeError if there is none.
    """
    module, _, inside = name.partition(":")
    found = import_module(f"hookedlm.{module}")
    for attribute in inside.split(".") if inside else ():
        found = getattr(found, attribute)
    return found


def finding(name: str, signature: str | None, explained: Mapping[str, str]) -> Finding:
    """What became of one name of the data."""
    reason = explained.get(name)
    try:
        found = looked_up(name)
    except (ImportError, AttributeError) as error:
        return Finding(name, "absent", reason) if reason else Finding(name, "MISSING", str(error))
    wrong, defaults = [], []
    if signature is not None:
        theirs, ours = parsed(signature), parameters_of(found, "." in name.partition(":")[2])
        wrong, defaults = incompatibilities(theirs, ours), other_defaults(theirs, ours)
    if wrong:
        return (
            Finding(name, "different", reason)
            if reason
            else Finding(name, "INCOMPATIBLE", "; ".join(wrong))
        )
    if reason:
        return Finding(name, "STALE", f"it is there, and still explained away: {reason}")
    return Finding(name, "present", "; ".join(defaults))


def findings() -> list[Finding]:
    """What became of every name of the data."""
    data = json.loads(SURFACE.read_text("utf-8"))
    surface, different = data["surface"], data["different"]
    absent = {f"transformer_lens.{path}": why for path, why in ABSENT.items()}
    explained = different | {name: absent[at] for name in surface if (at := dotted(name)) in absent}
    unknown = [Finding(name, "STALE", "no such name") for name in different.keys() - surface.keys()]
    return [finding(name, signature, explained) for name, signature in surface.items()] + unknown


def dotted(name: str) -> str:
    """A name of the data as `ABSENT` has it."""
    return name.replace(":", ".")


# Output -------------------------------------------------------------------------------------------


def summary(found: list[Finding]) -> str:
    """How many names have which status."""
    counts = Counter(finding.status for finding in found)
    return f"{len(found)} names: " + ", ".join(f"{n} {status}" for status, n in counts.items())


def table(found: list[Finding]) -> str:
    """One line for each name."""
    width = max(len(finding.name) for finding in found)
    return "\n".join(f"{f.name:<{width}}  {f.status:<12}  {f.note}".rstrip() for f in found)


def page(found: list[Finding]) -> str:
    """docs/api_coverage.md."""
    source = json.loads(SURFACE.read_text("utf-8"))["source"]
    lines = [HEAD.format(source=source, summary=summary(found) + ".")]
    for module in dict.fromkeys(finding.name.partition(":")[0] for finding in found):
        rows = [f for f in found if f.name.partition(":")[0] == module]
        lines += [f"## `{module}`\n", "| name | | |", "| --- | --- | --- |"]
        for f in rows:
            inside = f.name.partition(":")[2]
            note = f.note.replace("|", "\\|")
            lines.append(f"| {f'`{inside}`' if inside else 'the module'} | {f.status} | {note} |")
        lines.append("")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Print the table, write the page, or check."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="exit 1 on what has no reason")
    parser.add_argument("--markdown", action="store_true", help=f"write {PAGE.name}")
    options = parser.parse_args(arguments)
    found = findings()
    wrong = [finding for finding in found if finding.unexplained]
    if options.markdown:
        PAGE.write_text(page(found), "utf-8")
        print(f"wrote {PAGE.relative_to(ROOT)}")
    elif not options.check:
        print(table(found))
    elif wrong:
        print(table(wrong))
    print(summary(found))
    return 1 if options.check and wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
