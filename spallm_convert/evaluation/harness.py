"""Accuracy on tasks of EleutherAI's lm-evaluation-harness, which is an optional package."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

from spallm_convert.errors import EvaluationError, OptionError, one_line

#: Requests that the harness hands to the model at once: enough to keep a GPU from idling, and
#: logits of a long prompt still fit. Results do not depend on it, but for rounding.
_BATCH = 8


def run_tasks(model: Any, tokenizer: Any, tasks: Sequence[str]) -> dict[str, dict[str, float]]:
    """Runs tasks of the harness on a loaded model: for every task its metrics by name.

    A metric behind a filter carries its name, as in "exact_match (strict-match)", and one with a
    standard error is followed by "... stderr". Groups of tasks come with their members.
    Raises OptionError when the harness is not installed, EvaluationError when it fails.
    """
    lm_eval, huggingface = load_harness()
    try:
        wrapped = huggingface.HFLM(pretrained=model, tokenizer=tokenizer, batch_size=_BATCH)
        answer = lm_eval.simple_evaluate(model=wrapped, tasks=list(tasks), log_samples=False)
    except Exception as error:  # unknown tasks, datasets that cannot be had, all else of its own
        reason = one_line(error)
        raise EvaluationError(
            f"lm-evaluation-harness, tasks {', '.join(tasks)}: {type(error).__name__}: {reason}"
        ) from error
    return {name: _metrics(values) for name, values in answer["results"].items()}


def load_harness() -> tuple[Any, Any]:
    """The harness's modules. Raises OptionError saying how to install it when it is missing."""
    try:
        modules = [
            importlib.import_module(f"lm_eval{part}") for part in ("", ".models.huggingface")
        ]
    except ImportError as error:
        raise OptionError(
            f"tasks are run by EleutherAI's lm-evaluation-harness, which cannot be imported "
            f"({error}): pip install 'spallm-convert[eval]'"
        ) from error
    return modules[0], modules[1]


def _metrics(values: dict[str, Any]) -> dict[str, float]:
    """The numbers among a task's results, whose keys are "metric,filter"."""
    found = {}
    for key, value in values.items():
        metric, comma, chosen = key.partition(",")
        if comma and isinstance(value, int | float):
            name = metric.removesuffix("_stderr")
            name += f" ({chosen})" if chosen != "none" else ""
            found[name + (" stderr" if metric.endswith("_stderr") else "")] = float(value)
    return found
