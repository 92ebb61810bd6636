"""Converts pretrained Hugging Face models into sketched ones: small, and trainable as they are.

Importing this package registers sketched checkpoints with transformers, but imports neither
transformers nor torch nor Triton by itself: that happens when a name is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from . import registration
from .version import __version__ as __version__

if TYPE_CHECKING:
    from .config import SketchConfig
    from .conversion import convert, plan_conversion
    from .errors import (
        CalibrationError,
        EvaluationError,
        FormatError,
        HubError,
        OptionError,
        SourceError,
        SpallmError,
    )
    from .evaluation import perplexity
    from .hub import push_to_hub
    from .linear import SketchedLinear
    from .loading import load_sketched
    from .report import Report
    from .tables import load_tables, save_tables, set_tables, table_sets
    from .trainable import TrainableSummary, set_trainable, trainable_summary
    from .verification import verify

__all__ = [
    "CalibrationError",
    "EvaluationError",
    "FormatError",
    "HubError",
    "OptionError",
    "Report",
    "SketchConfig",
    "SketchedLinear",
    "SourceError",
    "SpallmError",
    "TrainableSummary",
    "convert",
    "load_sketched",
    "load_tables",
    "perplexity",
    "plan_conversion",
    "push_to_hub",
    "save_tables",
    "set_tables",
    "set_trainable",
    "table_sets",
    "trainable_summary",
    "verify",
]

_HOMES = {
    "CalibrationError": "errors",
    "EvaluationError": "errors",
    "FormatError": "errors",
    "HubError": "errors",
    "OptionError": "errors",
    "Report": "report",
    "SketchConfig": "config",
    "SketchedLinear": "linear",
    "SourceError": "errors",
    "SpallmError": "errors",
    "TrainableSummary": "trainable",
    "convert": "conversion",
    "load_sketched": "loading",
    "load_tables": "tables",
    "perplexity": "evaluation",
    "plan_conversion": "conversion",
    "push_to_hub": "hub",
    "save_tables": "tables",
    "set_tables": "tables",
    "set_trainable": "trainable",
    "table_sets": "tables",
    "trainable_summary": "trainable",
    "verify": "verification",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)


registration.register_with_transformers()
