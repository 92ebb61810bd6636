"""Spoiled files of all kinds: refused in one line, or read as they are; never a hang or a crash.

`catalogue.py` lists the kinds and `invariants.py` what must hold. Every case runs in a child of its
own. Cases are replayed, and other seeds tried, with

    SPALLM_FUZZ_CASES='work/lock/3;tables/fingerprint/0' pytest tests/fuzz/test_fuzz.py -k test_case
    SPALLM_FUZZ_SEED=1000 pytest tests/fuzz/test_fuzz.py -k thousands
"""

import collections
import os

import pytest

from fuzz.cases import SHARES
from fuzz.catalogue import KINDS, Case, all_kinds, cases
from fuzz.children import Result, run_cases

REPLAY = "pytest tests/fuzz/test_fuzz.py -k test_case"
FIRST_SEED = int(os.environ.get("SPALLM_FUZZ_SEED", "0"))
THOUSANDS = cases(3_000, FIRST_SEED)


def some_cases() -> list[Case]:
    """Return the cases that are named in the environment, or 150 whose kinds are spread evenly."""
    if named := os.environ.get("SPALLM_FUZZ_CASES"):
        return [Case.parse(name) for name in named.split(";")]
    first = [
        Case(family, kind, 0)
        for family, kind in all_kinds()
        if not kind.endswith(("many tensors", "sparse"))  # they take seconds
    ]
    return [first[i * len(first) // 150] for i in range(150)]


SOME = some_cases()


@pytest.fixture(scope="module")
def results(request) -> dict[Case, Result]:
    """Run every case that the selected tests need once, because a server takes long to start."""
    needed = dict.fromkeys(SOME)
    if any(item.function is test_thousands_of_cases for item in request.session.items):
        needed |= dict.fromkeys(THOUSANDS)
    return {result.case: result for result in run_cases(list(needed))}


def test_there_are_kinds_of_every_family():
    assert len(all_kinds()) >= 60
    assert all(len(KINDS[family]) >= 10 for family in SHARES)
    assert len(set(SOME)) == len(SOME)


@pytest.mark.parametrize("case", SOME, ids=str)
def test_case(results, case):
    fail_if_broken([results[case]])


@pytest.mark.slow
@pytest.mark.apart
def test_thousands_of_cases(results):
    assert len(set(THOUSANDS)) == 3_000
    found = [results[case] for case in THOUSANDS]
    print(times(found))
    fail_if_broken(found)
    outcomes = collections.Counter((result.case.family, result.outcome) for result in found)
    for family in SHARES:  # if all were refused, or none, the cases would say little
        count = sum(result.case.family == family for result in found)
        for outcome in ("accepted", "refused"):
            assert outcomes[family, outcome] >= count // 20, (family, outcome, outcomes)


def fail_if_broken(results: list[Result]) -> None:
    """Fail with the whole list, which pytest would cut in an assertion."""
    if broken := report(results):
        pytest.fail(broken, pytrace=False)


def report(results: list[Result]) -> str:
    """List every broken rule once for each place, with a case that shows it."""
    groups = collections.defaultdict(list)
    for result in results:
        for rule, what in result.broken:
            groups[result.case.family, rule, what.rpartition(" at ")[2][:40]].append((result, what))
    lines = []
    for (family, rule, _), shown in sorted(groups.items()):
        result, what = min(shown, key=lambda pair: len(pair[1]))
        kinds = collections.Counter(other.case.kind for other, _ in shown)
        often = ", ".join(f"{kind} ({count})" for kind, count in kinds.most_common(4))
        lines.append(
            f"{family}: {rule}: {len(shown)} cases, such as {often}\n    {what}\n"
            f"    SPALLM_FUZZ_CASES={str(result.case)!r} {REPLAY}"
        )
    return "\n".join(lines)


def times(results: list[Result]) -> str:
    """Say how long the cases of each family took."""
    seconds = collections.defaultdict(list)
    for result in results:
        seconds[result.case.family].append(result.seconds)
    means = (f"{f}: {len(s)} x {1e3 * sum(s) / len(s):.0f} ms" for f, s in seconds.items())
    slowest = sorted(results, key=lambda result: -result.seconds)[:5]
    return "\n".join([*means, *(f"{result.seconds:.1f} s: {result.case}" for result in slowest)])
