"""Convert pretrained Hugging Face models into sketched ones: small, and trainable as they are.

Importing this package registers sketched checkpoints with transformers and PEFT. It does not import
transformers, torch or Triton: that happens when a name is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .runtime import registration
from .version import __version__ as __version__

if TYPE_CHECKING:
    from .calibration_config import CalibrationConfig
    from .config import SketchConfig
    from .conversion.convert import convert, plan_conversion
    from .conversion.push import push_to_hub
    from .conversion.report import Report
    from .conversion.verify import verify
    from .errors import (
        CalibrationError,
        EvaluationError,
        FormatError,
        HubError,
        OptionError,
        SourceError,
        SpallmError,
    )
    from .evaluation.opening import load_any
    from .evaluation.perplexity import evaluate_text, perplexity
    from .progress import Progress
    from .recipe import Recipe, Rule
    from .runtime.linear import SketchedLinear
    from .runtime.loading import load_sketched
    from .runtime.tables import load_tables, save_tables, set_tables, table_sets
    from .runtime.trainable import TrainableSummary, set_trainable, trainable_summary
    from .sketch.layer import Layer
    from .sketch.limits import Limit
    from .sketch.plan import Plan
    from .source.text import read_documents

__all__ = [
    "CalibrationConfig",
    "CalibrationError",
    "EvaluationError",
    "FormatError",
    "HubError",
    "Layer",
    "Limit",
    "OptionError",
    "Plan",
    "Progress",
    "Recipe",
    "Report",
    "Rule",
    "SketchConfig",
    "SketchedLinear",
    "SourceError",
    "SpallmError",
    "TrainableSummary",
    "convert",
    "evaluate_text",
    "load_any",
    "load_sketched",
    "load_tables",
    "perplexity",
    "plan_conversion",
    "push_to_hub",
    "read_documents",
    "save_tables",
    "set_tables",
    "set_trainable",
    "table_sets",
    "trainable_summary",
    "verify",
]

_HOMES = {
    "CalibrationConfig": "calibration_config",
    "CalibrationError": "errors",
    "EvaluationError": "errors",
    "FormatError": "errors",
    "HubError": "errors",
    "Layer": "sketch.layer",
    "Limit": "sketch.limits",
    "OptionError": "errors",
    "Plan": "sketch.plan",
    "Progress": "progress",
    "Recipe": "recipe",
    "Report": "conversion.report",
    "Rule": "recipe",
    "SketchConfig": "config",
    "SketchedLinear": "runtime.linear",
    "SourceError": "errors",
    "SpallmError": "errors",
    "TrainableSummary": "runtime.trainable",
    "convert": "conversion.convert",
    "evaluate_text": "evaluation.perplexity",
    "load_any": "evaluation.opening",
    "load_sketched": "runtime.loading",
    "load_tables": "runtime.tables",
    "perplexity": "evaluation.perplexity",
    "plan_conversion": "conversion.convert",
    "push_to_hub": "conversion.push",
    "read_documents": "source.text",
    "save_tables": "runtime.tables",
    "set_tables": "runtime.tables",
    "set_trainable": "runtime.trainable",
    "table_sets": "runtime.tables",
    "trainable_summary": "runtime.trainable",
    "verify": "conversion.verify",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)


registration.register()
