"""Make transformers and PEFT aware of sketched checkpoints, without importing either.

transformers keeps quantizers in a registry, and other packages cannot join it by an entry point;
PEFT has no place for foreign layers at all. So a finder on `sys.meta_path` waits until any code
imports the module concerned. It lets the import run as usual, then imports our module for it.
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

_QUANTIZERS = "transformers.quantizers.auto"
#: PEFT imports it after the layers of LoRA and what all tuners inherit.
_TUNERS = "peft.tuners.lora.model"


def register() -> None:
    """Import our module for each package now if it is imported, otherwise when it is imported."""
    for awaited in (_QUANTIZERS, _TUNERS):
        if awaited in sys.modules:
            _import_ours(awaited)
        elif not any(getattr(finder, "awaited", None) == awaited for finder in sys.meta_path):
            sys.meta_path.insert(0, _Wait(awaited))


def _import_ours(awaited: str) -> None:
    """Import our module; if that fails, warn, because the package works without it."""
    try:
        if awaited == _TUNERS:
            importlib.import_module("spallm_convert.runtime.adapters")
        else:
            importlib.import_module("spallm_convert.runtime.quantizer")
    except Exception as error:  # a missing or unsuitable package may raise anything
        lost = "PEFT cannot wrap" if awaited == _TUNERS else "transformers cannot load"
        warnings.warn(
            f"{lost} sketched layers in this process: {type(error).__name__}: {one_line(error)}",
            RuntimeWarning,
            stacklevel=2,
        )


class _Wait(importlib.abc.MetaPathFinder):
    """Find a module as usual, once, but with a loader that imports ours afterwards."""

    def __init__(self, awaited: str) -> None:
        self.awaited = awaited

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != self.awaited:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _ImportAfter(spec.loader)
        return spec


class _ImportAfter(importlib.abc.Loader):
    """Load a module with its own loader, then import ours."""

    def __init__(self, loader: importlib.abc.Loader) -> None:
        self._loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self._loader
        self._loader.exec_module(module)
        _import_ours(module.__name__)
