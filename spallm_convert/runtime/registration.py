"""Makes transformers load sketched checkpoints, without importing it.

transformers finds quantizers in a registry and has no entry points for others to join it. So this
waits until the registry's module has been imported, by whomever, and registers then: a finder on
`sys.meta_path` that lets the import run as usual and is removed after it.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType

_REGISTRY = "transformers.quantizers.auto"


def register_with_transformers() -> None:
    """Registers the quantizer now if transformers is there already, else once it is imported."""
    if _REGISTRY in sys.modules:
        _register()
    elif not any(isinstance(finder, _WaitForRegistry) for finder in sys.meta_path):
        sys.meta_path.insert(0, _WaitForRegistry())


def _register() -> None:
    importlib.import_module("spallm_convert.runtime.quantizer")


class _WaitForRegistry(importlib.abc.MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != _REGISTRY:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _RegisterAfter(spec.loader)
        return spec


class _RegisterAfter(importlib.abc.Loader):
    """Runs a module as its own loader does, then registers."""

    def __init__(self, loader: importlib.abc.Loader) -> None:
        self._loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self._loader
        self._loader.exec_module(module)
        _register()
