"""The runner of the fuzz suite finds the faults that it looks for, and goes on after each."""

import pytest

from fuzz.catalogue import Case
from fuzz.children import run_cases
from fuzz.faults import FAMILY, FAULTS


@pytest.mark.slow
def test_every_fault_is_found(monkeypatch):
    monkeypatch.setenv("SPALLM_FUZZ_LIMIT", "1")
    cases = [Case(FAMILY, name, 0) for name in FAULTS]
    results = {result.case: result for result in run_cases(cases)}
    assert set(results) == set(cases)
    for case, result in results.items():
        _, rule = FAULTS[case.kind]
        assert [found for found, _ in result.broken] == ([rule] if rule else []), case
