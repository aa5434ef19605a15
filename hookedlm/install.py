"""`install_as`: code that imports TransformerLens runs on hookedlm, its imports unchanged.

TransformerLens 2.x has modules that share the name of the class in them:
``transformer_lens.HookedTransformer`` is the class, and ``from transformer_lens.HookedTransformer
import Output`` reads the module. Python looks modules up in ``sys.modules`` and attributes on the
package, and the two are told apart as long as no import ever runs: an import sets the module as an
attribute of its package, over the class. So all modules are made at once and put where an import
finds them done.
"""

from __future__ import annotations

import keyword
import sys
import warnings
from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec, module_from_spec
from types import ModuleType
from typing import Any

from hookedlm.errors import InputError

PACKAGE = "hookedlm.transformer_lens"
ORIGINALS = ("transformer_lens", "easy_transformer")
"""The packages that ours stands in for, even where they are installed."""

Content = str | Mapping[str, str]
"""A module itself, or the names that one is made of: module -> "name, name as other_name"."""


def install_as(name: str = "transformer_lens") -> ModuleType:
    """Make ``import name`` and ``import name.anything`` mean hookedlm, in this whole process.

    What is imported so are hookedlm's own objects under TransformerLens 2.x' module paths, and
    pickles that name them by those paths load. Returns the package. Calling it again changes
    nothing. If TransformerLens itself is imported already, it is replaced with a warning: whoever
    holds objects of it keeps them.

    Raises InputError unless ``name`` is one plain name that no other package has.
    """
    package = import_module(PACKAGE)
    _check(name, package)
    if sys.modules.get(name, package) is not package:
        warnings.warn(
            f"{name} was imported before and is replaced: from now on `import {name}` gives "
            "hookedlm. What was imported from it earlier stays as it was and does not mix with "
            "hookedlm's objects: call install_as before the first import.",
            stacklevel=2,
        )
        for module in [key for key in sys.modules if _is_within(key, name)]:
            del sys.modules[module]
    ours = [key for key in sys.modules if _is_within(key, PACKAGE)]
    sys.modules.update({name + key.removeprefix(PACKAGE): sys.modules[key] for key in ours})
    for finder in sys.meta_path:
        if isinstance(finder, Absent):
            finder.packages.add(name)
    return package


def _is_within(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


def _check(name: str, package: ModuleType) -> None:
    if not name.isidentifier() or keyword.iskeyword(name):
        raise InputError(
            f"install_as({name!r}): expected one plain name, such as 'transformer_lens'"
        )
    if name in ORIGINALS or sys.modules.get(name) is package:
        return
    if name in sys.modules or find_spec(name) is not None:
        raise InputError(f"install_as({name!r}): there is a package of that name already")


# Making the modules -------------------------------------------------------------------------------


def make_modules(
    package: ModuleType, contents: Mapping[str, Content], absent: Mapping[str, str]
) -> None:
    """Make and register the modules below ``package``, parents first; explain absent ones.

    A name that the package has already, a class, keeps its meaning there.
    """
    finder = Absent({package.__name__}, absent)
    for path, content in contents.items():
        name = f"{package.__name__}.{path}"
        module = import_module(content) if isinstance(content, str) else _made(name, content)
        if not isinstance(content, str):
            vars(module)["__getattr__"] = finder.attribute_of(path)
        sys.modules[name] = module
        parent, _, last = name.rpartition(".")
        vars(sys.modules[parent]).setdefault(last, module)
    vars(package)["__getattr__"] = finder.attribute_of("")
    sys.meta_path[:] = [old for old in sys.meta_path if not isinstance(old, Absent)] + [finder]


def _made(name: str, content: Mapping[str, str]) -> ModuleType:
    # As a package without a place, every module takes part in `from module import name`: a name
    # that it lacks is looked for as a module below it, where `Absent` says what is there instead.
    module = module_from_spec(ModuleSpec(name, None, is_package=True))
    module.__doc__ = f"{', '.join(content)} under TransformerLens' names."
    for source, names in content.items():
        for item in names.split(","):
            original, _, renamed = item.strip().partition(" as ")
            vars(module)[renamed or original] = getattr(import_module(source), original)
    return module


class Absent(MetaPathFinder):
    """Explains what TransformerLens has and hookedlm has not; finds nothing."""

    def __init__(self, packages: set[str], reasons: Mapping[str, str]):
        self.packages = packages
        self.reasons = reasons

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> None:
        """Raise ImportError with the reason for a name below one of the packages that has one."""
        for package in self.packages:
            below = fullname.removeprefix(package + ".")
            if below != fullname and below in self.reasons:
                raise ImportError(f"no {fullname}: {self.reasons[below]}", name=fullname)

    def attribute_of(self, path: str) -> Callable[[str], Any]:
        """``__getattr__`` for the module at ``path`` below a package."""

        def __getattr__(name: str) -> Any:
            below = f"{path}.{name}" if path else name
            reason = self.reasons.get(below)
            where = f"module 'transformer_lens{'.' if path else ''}{path}'"
            raise AttributeError(
                f"{where} has no attribute {name!r}" + (f": {reason}" if reason else "")
            )

        return __getattr__
