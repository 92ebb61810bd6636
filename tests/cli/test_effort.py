"""The effort on the command line: each level, what implies a level, refusals, and the help."""

import json
import re

import pytest

from spallm_convert.effort import EFFORTS, tokens_of

SMALL = ["--samples", "4", "--seqlen", "16"]


@pytest.fixture
def configs(monkeypatch):
    """Return a list of the configs that conversions get, which are not carried out."""
    found = []

    def plan(model, config, **how):
        found.append(config)
        raise KeyboardInterrupt

    monkeypatch.setattr("spallm_convert.conversion.convert.plan_conversion", plan)
    return found


@pytest.mark.parametrize(
    ("effort", "options", "calibrated"),
    [
        ("fast", [], False),
        ("normal", SMALL, True),
        ("high", SMALL, True),
        ("best", [*SMALL, "--heal", "2"], True),
    ],
)
def test_each_level_converts(run, source, text, tmp_path, effort, options, calibrated):
    words = ["--calibration", text] if calibrated else []
    out = tmp_path / "out"
    report = json.loads(
        run(source, "-o", out, "--effort", effort, "--json", *options, *words, "--bits", "2")
    )
    assert report["options"]["effort"] == effort
    assert ("relative_output_error" in report["totals"]) == calibrated
    assert ("healing" in report) == (effort == "best")
    assert "not_calibrated" not in report
    card = (out / "README.md").read_text()
    assert card.count("| effort |") == 1
    assert f"| effort | {effort} |" in card
    assert ("| calibration |" in card) == calibrated


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], "normal"),
        (SMALL, "normal"),
        (["--fallback"], "normal"),
        (["--heal", "0"], "high"),
        (["--heal", "2"], "best"),
        (["--target-bits", "3.5"], "high"),
        (["--without", "descent"], "high"),
        (["--calibration", "builtin"], "high"),
        (["--calibration", "builtin", "--effort", "normal"], "normal"),
        (["--heal", "2", "--effort", "high"], "high"),
        (["--mapping", "hash"], "fast"),
        (["--mapping", "hash", "--calibration", "builtin"], "high"),
        *((["--effort", effort], effort) for effort in EFFORTS),
    ],
)
def test_options_imply_a_level(run, configs, options, expected):
    run("model", "--dry-run", "-q", *options, code=130)
    (config,) = configs
    assert config.level.name == expected


def test_options_reach_the_config(run, configs):
    options = ["--samples", "5", "--seqlen", "7", "--without", "descent", "--without", "correction"]
    run("m", "--dry-run", "--calibration", "a.txt", "--heal", "3", *options, code=130)
    run("m", "--dry-run", "--effort", "normal", "--samples", "5", code=130)
    run("m", "--dry-run", "--effort", "high", "--fallback", code=130)
    first, second, third = (config.text_options for config in configs)
    assert (first.text, first.samples, first.seqlen, first.heal) == ("a.txt", 5, 7, 3)
    assert first.without == ("descent", "correction")
    assert first.fallback is False
    assert (second.text, second.samples, second.seqlen) == ("builtin", 5, 256)
    assert third.fallback is True


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--samples", "4"], "--samples"),
        (["--seqlen", "16", "--samples", "4"], "--samples, --seqlen"),
        (["--calibration", "builtin"], "--calibration"),
        (["--target-bits", "3"], "--target-bits"),
        (["--heal", "2"], "--heal"),
        (["--fallback"], "--fallback"),
    ],
)
def test_fast_refuses_options_of_a_text(run, configs, options, named):
    error = run("model", "--dry-run", "--effort", "fast", *options, code=2)
    said = f"--effort fast reads no text, so {named} cannot be used: leave them out, or choose"
    assert said in " ".join(error.split())
    assert not configs


@pytest.mark.parametrize("options", [["--samples", "4"], ["--seqlen", "16"], ["--fallback"]])
def test_a_hashed_index_map_refuses_options_of_a_text_without_an_effort(run, configs, options):
    error = " ".join(run("model", "--dry-run", "--mapping", "hash", *options, code=2).split())
    assert (
        f"--mapping hash means --effort fast, which reads no text, so {options[0]} cannot be used: "
        f"leave them out, or add --effort high or --effort best"
    ) in error
    assert not configs
    run("model", "--dry-run", "--mapping", "hash", "--effort", "high", *options, code=130)
    assert configs[0].level.name == "high"


@pytest.mark.parametrize(
    ("effort", "options", "advice"),
    [
        ("fast", [], "; --effort high takes longer"),
        ("high", SMALL, ""),
        ("best", [*SMALL, "--heal", "2"], ""),
    ],
)
def test_a_hashed_index_map_has_every_level_but_normal(
    run, source, text, tmp_path, effort, options, advice
):
    words = ["--calibration", text] if options else []
    chosen = ["--mapping", "hash", "--effort", effort, *options, *words]
    said = run(source, "-o", tmp_path / "out", *chosen).splitlines()[-1]
    assert "written to" in said
    assert advice in said
    assert ("--effort" in said) == bool(advice)
    report = json.loads((tmp_path / "out/conversion.json").read_text())
    assert (report["options"]["mapping"], report["options"]["effort"]) == ("hash", effort)
    assert ("relative_output_error" in report["totals"]) == (effort != "fast")
    assert ("healing" in report) == (effort == "best")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--effort", "most"], "'most' is not one of 'fast', 'normal', 'high', 'best'"),
        (["--effort", "normal", "--heal", "2"], "heal is for the efforts 'high' and 'best'"),
        (["--effort", "normal", "--target-bits", "3"], "target_bits is for the efforts 'high'"),
        (["--effort", "best", "--heal", "0"], "effort 'best' heals"),
        (["--effort", "best", "--fallback"], "effort 'best' heals: not with fallback"),
        (["--effort", "normal", "--mapping", "hash"], "is for the mapping 'cluster'"),
    ],
)
def test_contradictions_are_refused(run, configs, options, message):
    assert message in " ".join(run("model", "--dry-run", *options, code=2).split())
    assert not configs


def test_the_help_names_what_each_level_does(run):
    shown = " ".join(run("convert", "--help").split())
    entry = re.search(r"--effort \[fast\|normal\|high\|best\] (.*?) --calibration SRC", shown)[1]
    for effort in EFFORTS:
        assert f"{effort}: " in entry
    assert f"{tokens_of('normal'):,} tokens" in entry
    assert f"{tokens_of('high'):,} tokens" in entry
    assert "[default: normal; high with --calibration" in entry
    for name in ("samples", "seqlen"):
        normal, high = (getattr(EFFORTS[effort], name) for effort in ("normal", "high"))
        assert f"[default: {normal}; {high} for high and best]" in shown
