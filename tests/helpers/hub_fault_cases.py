"""Run cases of a faulty Hub, and check how they ended."""

import os
import sys
from pathlib import Path

from .hub_client import run
from .hub_fault_client import SCRIPT, TOKEN

TESTS = Path(__file__).parents[1]
#: A small sketched checkpoint without a report, to push.
PUSHED = TESTS.parent / "formats" / "golden" / "cluster-4bit"


def run_cases(cases, model):
    """Return the outcomes of cases, by name; `model` is a folder that repositories start from."""
    given = {"pushed": str(PUSHED), "model": str(model), "cases": cases}
    outcomes, err = run(SCRIPT, given, {"PYTHONPATH": python_path()})
    assert TOKEN not in err
    for outcome in outcomes.values():
        assert TOKEN not in outcome["text"]
        assert TOKEN not in outcome["log"]
    return outcomes


def python_path():
    """Return a path for children that import these helpers and what this process imports."""
    return os.pathsep.join([str(TESTS), *filter(None, sys.path)])


def assert_clear(outcome, kind, *wanted):
    """Check for an error of ours: one line with these words, of bounded length."""
    assert outcome["error"] == kind, outcome
    text = outcome["text"]
    assert text.isprintable()
    assert text.startswith(outcome["repo"])
    assert len(text) < 1000
    for words in wanted:
        assert words in text
