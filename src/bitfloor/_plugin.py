"""Registers bitfloor with transformers without importing it.

Transformers has no entry points for quantizers: a package must call its registration functions. Importing transformers
costs seconds, which a command line that only prints help must not pay. So ``import bitfloor`` leaves a finder on
``sys.meta_path`` that waits for the one module the registration needs and registers right after it was executed; if
transformers is there already, that happens at once.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType

TARGET = "transformers.quantizers.auto"
REGISTRATION = "bitfloor.runtime.hf"


class _RegisteringLoader(Loader):
    """Executes the module with its own loader, then registers."""

    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self.loader
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        self.loader.exec_module(module)
        importlib.import_module(REGISTRATION)


class _Finder(MetaPathFinder):
    """Finds ``TARGET`` once, through the finders that come after it, and wraps its loader."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != TARGET:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _RegisteringLoader(spec.loader)
        return spec


def register_with_transformers() -> None:
    """Register now if transformers' quantizers are imported, otherwise as soon as they are. Safe to call twice."""
    if TARGET in sys.modules:
        importlib.import_module(REGISTRATION)
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
