"""Reports with odd values are refused as a whole: everything that is read of one can be shown."""

import json

import pytest

from helpers.calibration import calibrated
from spallm_convert import FormatError, Report, convert
from spallm_convert.cli.printing import print_report

HUGE = 10**400


@pytest.fixture(scope="module")
def document(source, text, tmp_path_factory):
    """A report with all parts that a report may have."""
    out = tmp_path_factory.mktemp("report") / "out"
    convert(source, out, calibrated(text, samples=8, seqlen=32, heal=1), device="cpu")
    losses = {"chosen": 0.1, "2": 0.2, "3": 0.1, "4": 0.0}
    return json.loads((out / "conversion.json").read_text()) | {"predicted_loss": losses}


def read(folder, text):
    (folder / "conversion.json").write_text(text)
    return Report.read(folder)


def changed(document, path, value):
    """Return the report's JSON with another value at a path; `value` is JSON, which may be odd."""
    copy = json.loads(json.dumps(document))
    *parents, last = path
    place = copy
    for key in parents:
        place = place[key]
    place[last] = "THE VALUE"
    return json.dumps(copy).replace('"THE VALUE"', value)


NUMBERS = [
    ("totals", "sketched_weights"),
    ("totals", "kept_weights"),
    ("totals", "bits_per_weight"),
    ("totals", "source_bytes"),
    ("totals", "sketched_bytes"),
    ("totals", "ratio"),
    ("totals", "relative_error"),
    ("totals", "relative_output_error"),
    ("modules", 0, "bits"),
    ("modules", 0, "groups_per_row"),
    ("modules", 0, "bits_per_weight"),
    ("modules", 0, "relative_error"),
    ("modules", 0, "relative_output_error"),
    ("modules", 0, "shape", 0),
    ("predicted_loss", "chosen"),
    ("predicted_loss", "2"),
    ("healing", "kl_before"),
    ("healing", "kl_after"),
]


@pytest.mark.parametrize("path", NUMBERS, ids=lambda path: ".".join(map(str, path)))
def test_numbers_that_cannot_be_shown(document, tmp_path, path):
    values = ["1e999", "-1e999", "NaN", "true", "null", '"1"', "[]", "{}", str(HUGE)]
    if path[0] not in {"predicted_loss", "healing"}:
        values.append("-1")
    for value in values:
        with pytest.raises(FormatError, match="not a report"):
            read(tmp_path, changed(document, path, value))


@pytest.mark.parametrize("name", ["sketched_weights", "bits_per_weight", "ratio"])
def test_numbers_that_may_not_be_zero(document, tmp_path, name):
    with pytest.raises(FormatError):
        read(tmp_path, changed(document, ("totals", name), "0"))


@pytest.mark.parametrize(
    "path",
    [
        ("source",),
        ("source", "model"),
        ("options",),
        ("versions",),
        ("totals",),
        ("files",),
        ("files", "config.json"),
        ("files", "config.json", "sha256"),
        ("left_dense",),
        ("modules",),
        ("modules", 0),
        ("modules", 0, "name"),
        ("modules", 0, "shape"),
        ("predicted_loss",),
        ("healing",),
        ("device",),
        ("not_calibrated",),
    ],
    ids=lambda path: ".".join(map(str, path)),
)
def test_parts_of_other_types(document, tmp_path, path):
    for value in ["null", "true", "7", "[7]", str(HUGE), '{"a": {"b": 1}}']:
        if value.startswith("{") and path in {("source",), ("options",), ("versions",)}:
            continue
        with pytest.raises(FormatError):
            read(tmp_path, changed(document, path, value))


@pytest.mark.parametrize("name", [r'"\ud800"', '"' + "x" * 100_000 + '"'])
def test_odd_names_are_refused_or_shown(document, tmp_path, name, capsys):
    for path in (("modules", 0, "name"), ("left_dense", "layer"), ("source", "model")):
        try:
            report = read(tmp_path, changed(document, path, name))
        except FormatError:
            continue
        assert report is not None
        print_report(report)
        assert capsys.readouterr().out


def test_what_is_left_can_be_printed(document, tmp_path, capsys):
    large = changed(document, ("totals", "source_bytes"), "1e300")
    for text in (json.dumps(document), large, changed(document, ("totals", "ratio"), "1e-300")):
        report = read(tmp_path, text)
        assert report is not None
        print_report(report)
    assert capsys.readouterr().out
