"""Register sketched checkpoints with transformers, without importing transformers.

transformers keeps quantizers in a registry, and other packages cannot join it by an entry point. So
a finder on `sys.meta_path` waits until any code imports the module of the registry. It lets the
import run as usual, then registers the quantizer and removes itself.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import warnings
from collections.abc import Sequence
from types import ModuleType

from spallm_convert.errors import one_line

_REGISTRY = "transformers.quantizers.auto"


def register_with_transformers() -> None:
    """Register the quantizer now if transformers is imported, otherwise when it is imported."""
    if _REGISTRY in sys.modules:
        _register()
    elif not any(isinstance(finder, _WaitForRegistry) for finder in sys.meta_path):
        sys.meta_path.insert(0, _WaitForRegistry())


def _register() -> None:
    """Import the quantizer; if that fails, warn, because transformers works without it."""
    try:
        importlib.import_module("spallm_convert.runtime.quantizer")
    except Exception as error:  # a missing or unsuitable package may raise anything
        warnings.warn(
            f"transformers cannot load sketched checkpoints in this process: "
            f"{type(error).__name__}: {one_line(error)}",
            RuntimeWarning,
            stacklevel=2,
        )


class _WaitForRegistry(importlib.abc.MetaPathFinder):
    """Find the registry's module as usual, but with a loader that registers afterwards."""

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
    """Load a module with its own loader, then register."""

    def __init__(self, loader: importlib.abc.Loader) -> None:
        self._loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self._loader
        self._loader.exec_module(module)
        _register()
