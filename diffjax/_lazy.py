"""Modules of a package that are imported when they are first named."""

import importlib
import pkgutil
from collections.abc import Callable, Iterable
from types import ModuleType


def modules_of(
    package: str, path: Iterable[str]
) -> tuple[Callable[[str], ModuleType], Callable[[], list[str]]]:
    """`__getattr__` and `__dir__` of a package, which know all of its modules.

    path: the package's __path__. Modules whose names begin with an underscore are left out.
    """
    names = [found.name for found in pkgutil.iter_modules(path) if not found.name.startswith("_")]

    def get(name: str) -> ModuleType:
        if name in names:
            return importlib.import_module(f"{package}.{name}")
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    def listed() -> list[str]:
        inside = vars(importlib.import_module(package))
        return sorted({*names, *(name for name in inside if name.startswith("__"))})

    return get, listed
