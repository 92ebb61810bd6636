"""Levels of effort: which one a config gets, what it reads, and what contradicts it."""

from dataclasses import replace

import pytest

from spallm_convert import CalibrationConfig, OptionError, SketchConfig
from spallm_convert.effort import EFFORTS, tokens_of


def text(**options):
    return CalibrationConfig(**options)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, "normal"),
        ({"mapping": "hash"}, "fast"),
        ({"calibration": text()}, "high"),
        ({"calibration": text(samples=4, seqlen=8)}, "high"),
        ({"calibration": text(without=["descent"])}, "high"),
        ({"calibration": text(target_bits=3.5)}, "high"),
        ({"calibration": text(heal=0)}, "high"),
        ({"calibration": text(heal=7)}, "best"),
        ({"calibration": text(heal=7, target_bits=3.5)}, "best"),
        ({"calibration": text(), "mapping": "hash"}, "high"),
        ({"calibration": text(heal=7), "mapping": "hash"}, "best"),
        ({"calibration": text(heal=7), "effort": "high"}, "high"),
        *(({"effort": effort}, effort) for effort in EFFORTS),
        *(({"effort": effort, "mapping": "hash"}, effort) for effort in ("fast", "high", "best")),
        *(({"effort": e, "calibration": text()}, e) for e in ("normal", "high", "best")),
    ],
)
def test_the_effort_follows_from_the_options(given, expected):
    config = SketchConfig(**given)
    assert config.level is EFFORTS[expected]
    assert config.level.name == expected
    assert (config.text_options is not None) == config.level.reads_text == (expected != "fast")
    assert replace(config, seed=1).level is config.level
    assert SketchConfig(**given) == config
    assert {name: getattr(config, name) for name in given} == given  # nothing is put in its place


@pytest.mark.parametrize(
    ("effort", "samples", "seqlen", "heal", "fallback"),
    [("normal", 8, 256, 0, True), ("high", 128, 512, 0, False), ("best", 128, 512, 300, False)],
)
def test_what_is_not_chosen_follows_from_the_effort(effort, samples, seqlen, heal, fallback):
    for given in (None, text()):
        found = SketchConfig(effort=effort, calibration=given).text_options
        assert found.text == "builtin"
        assert (found.samples, found.seqlen, found.heal) == (samples, seqlen, heal)
        assert found.drawn == (samples, seqlen)
        assert found.fallback is fallback
        assert found.without == ()
        assert found.target_bits is None
    assert tokens_of(effort) == samples * seqlen


@pytest.mark.parametrize("effort", ["normal", "high", "best"])
def test_what_is_chosen_stays(effort):
    healed = {"heal": 5} if effort == "best" else {}
    chosen = text(text="a.txt", samples=3, seqlen=9, fallback=effort == "high", **healed)
    found = SketchConfig(effort=effort, calibration=chosen).text_options
    assert (found.text, found.samples, found.seqlen) == ("a.txt", 3, 9)
    assert found.fallback is (effort == "high")
    assert found.heal == healed.get("heal", 0)
    assert chosen.heal == healed.get("heal")  # what was given is not changed


@pytest.mark.parametrize("former", [None, *EFFORTS])
@pytest.mark.parametrize("later", [None, *EFFORTS])
def test_another_effort_is_as_if_it_had_been_given_at_first(former, later):
    changed = replace(SketchConfig(effort=former, bits=3), effort=later)
    expected = SketchConfig(effort=later, bits=3)
    assert changed == expected
    assert changed.to_json() == expected.to_json()


def test_another_effort_keeps_what_was_chosen_for_the_text():
    config = SketchConfig(effort="normal", calibration=text(text="a.txt", samples=3))
    for effort in ("high", "best"):
        found = replace(config, effort=effort).text_options
        level = EFFORTS[effort]
        assert (found.text, found.samples, found.seqlen) == ("a.txt", 3, level.seqlen)
        assert (found.heal, found.fallback) == (level.heal, False)
    with pytest.raises(OptionError, match="'fast' reads no text"):
        replace(config, effort="fast")


def test_what_is_implied_follows_other_options_that_are_changed():
    assert replace(SketchConfig(), mapping="hash").level.name == "fast"
    assert replace(SketchConfig(), calibration=text()).level.name == "high"
    assert replace(SketchConfig(calibration=text()), calibration=text(heal=2)).level.name == "best"


def test_fast_reads_nothing_and_each_level_reads_at_least_as_much_as_the_one_before():
    assert tokens_of("fast") == 0
    tokens = [tokens_of(effort) for effort in EFFORTS]
    assert tokens == sorted(tokens)
    assert list(EFFORTS) == ["fast", "normal", "high", "best"]


ONLY_MORE = "is for the efforts 'high' and 'best'"


@pytest.mark.parametrize(
    ("given", "messages"),
    [
        ({"effort": "fast", "calibration": text()}, ["'fast' reads no text"]),
        ({"effort": "fast", "calibration": text(heal=2)}, ["'fast' reads no text"]),
        (
            {"effort": "normal", "mapping": "hash"},
            [
                "'normal' is for the mapping 'cluster', found 'hash'",
                "choose effort 'fast', 'high' or 'best'",
            ],
        ),
        ({"effort": "normal", "calibration": text(heal=2)}, [f"heal {ONLY_MORE}"]),
        ({"effort": "normal", "calibration": text(without=["descent"])}, [f"without {ONLY_MORE}"]),
        ({"effort": "normal", "calibration": text(target_bits=3)}, [f"target_bits {ONLY_MORE}"]),
        (
            {"effort": "best", "calibration": text(fallback=True), "bits": 7},
            ["'best' heals: not with fallback", "leave fallback out", "found 7"],
        ),
        ({"calibration": text(fallback=True, heal=3)}, ["'best' heals: not with fallback"]),
        (
            {"effort": "high", "calibration": text(fallback=True, heal=3)},
            ["heal 3: not with fallback", "'high' without heal"],
        ),
        ({"effort": "best", "calibration": text(heal=0)}, ["'best' heals", "at least 1 step"]),
        (
            {
                "effort": "normal",
                "mapping": "hash",
                "bits": 7,
                "calibration": text(heal=2, without=["correction"], target_bits=3),
            },
            [
                "bits must be 2, 3 or 4, found 7",
                "'normal' is for the mapping 'cluster'",
                *(f"{name} {ONLY_MORE}" for name in ("heal", "without", "target_bits")),
                "target_bits is for the mapping 'cluster', found 'hash'",
            ],
        ),
        ({"effort": "most", "bits": 7}, ["bits must be", "must be one of", "found 'most'"]),
        ({"effort": []}, ["effort must be one of", "found []"]),
        ({"effort": True}, ["effort must be one of", "found True"]),
    ],
)
def test_every_contradiction_is_named(given, messages):
    with pytest.raises(OptionError) as caught:
        SketchConfig(**given)
    assert all(message in str(caught.value) for message in messages), caught.value
    fallback = given.get("calibration", text()).fallback
    assert ("fallback" in str(caught.value)) == bool(fallback)  # named if it was set


def test_the_effort_stands_in_the_report():
    for effort, level in EFFORTS.items():
        document = SketchConfig(effort=effort).to_json()
        assert document["effort"] == effort
        assert document["calibration"] == ("builtin" if level.reads_text else None)
        assert document["samples"] == (level.samples or None)
        assert document["seqlen"] == (level.seqlen or None)
