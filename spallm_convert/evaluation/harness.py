"""Measure accuracy on tasks of EleutherAI's lm-evaluation-harness, an optional package."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

from spallm_convert.errors import EvaluationError, OptionError, one_line

#: Requests per batch: enough to keep a GPU busy, and few enough that the logits of long prompts fit
#: into memory. Results do not depend on it, except for rounding.
_BATCH = 8


def run_tasks(model: Any, tokenizer: Any, tasks: Sequence[str]) -> dict[str, dict[str, float]]:
    """Run tasks of the harness on a loaded model.

    Args:
        model: The model, on the device that it should run on.
        tokenizer: The tokenizer of the model.
        tasks: Names of tasks or of groups of tasks.

    Returns:
        The metrics of every task, by name. A metric of a filter has the filter's name in
        parentheses, for example "exact_match (strict-match)". A standard error has the name of its
        metric and " stderr". The result for a group also has the group's tasks.

    Raises:
        OptionError: If the harness is not installed.
        EvaluationError: If the harness fails, for example because a task is unknown.
    """
    lm_eval, huggingface = load_harness()
    try:
        wrapped = huggingface.HFLM(pretrained=model, tokenizer=tokenizer, batch_size=_BATCH)
        answer = lm_eval.simple_evaluate(model=wrapped, tasks=list(tasks), log_samples=False)
    except Exception as error:  # unknown tasks, missing datasets, errors of its own
        reason = one_line(error)
        raise EvaluationError(
            f"lm-evaluation-harness, tasks {', '.join(tasks)}: {type(error).__name__}: {reason}"
        ) from error
    return {name: _metrics(values) for name, values in answer["results"].items()}


def load_harness() -> tuple[Any, Any]:
    """Import the harness. If it is missing, raise an OptionError that says how to install it."""
    try:
        modules = [
            importlib.import_module(f"lm_eval{part}") for part in ("", ".models.huggingface")
        ]
    except ImportError as error:
        raise OptionError(
            f"--tasks needs EleutherAI's lm-evaluation-harness, which cannot be imported "
            f"({error}): pip install 'spallm-convert[eval]'"
        ) from error
    return modules[0], modules[1]


def _metrics(values: dict[str, Any]) -> dict[str, float]:
    """Return the numbers among a task's results, whose keys are "metric,filter"."""
    found = {}
    for key, value in values.items():
        metric, comma, chosen = key.partition(",")
        if comma and isinstance(value, int | float):
            name = metric.removesuffix("_stderr")
            name += f" ({chosen})" if chosen != "none" else ""
            found[name + (" stderr" if metric.endswith("_stderr") else "")] = float(value)
    return found
