"""The retrievers by name: one per file of this folder (`base`)."""

import pkgutil
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

from cacheslide.errors import ConfigError
from harness.rag.retrievers.base import Retriever

DEFAULT = "bm25"
_OTHERS = ("base", "registry")


@cache
def retrievers() -> dict[str, ModuleType]:
    """Every retriever's file by its name, sorted; importing the files imports none of what they need."""
    names = [m.name for m in pkgutil.iter_modules([str(Path(__file__).parent)]) if m.name not in _OTHERS]
    files = [import_module(f"{__package__}.{name}") for name in names]
    return {file.NAME: file for file in sorted(files, key=lambda file: file.NAME)}


def missing(name: str) -> list[str]:
    """The modules that retriever `name` needs and that are not installed."""
    return [module for module in retrievers()[name].NEEDS if find_spec(module) is None]


def availability() -> str:
    """One line: which retrievers are installed, and which are not, with the command that installs them."""
    there = [name for name in retrievers() if not missing(name)]
    absent = [f"{name} ({retrievers()[name].INSTALL})" for name in retrievers() if missing(name)]
    return f"retrievers installed: {', '.join(there)}; not installed: {', '.join(absent) or 'none'}"


def open_retriever(name: str, model: Path | None = None) -> Retriever:
    """The retriever `name`; ConfigError in one line if it is unknown, not installed, or lacks its model."""
    if name not in retrievers():
        raise ConfigError(f"unknown retriever {name!r} (known: {', '.join(retrievers())})")
    if lacking := missing(name):
        raise ConfigError(f"retriever {name} needs {', '.join(lacking)}: {retrievers()[name].INSTALL}")
    return retrievers()[name].open_retriever(model)
