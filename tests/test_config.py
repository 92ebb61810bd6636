"""Options: defaults, every refusal, and the automatic number of groups."""

import json

import pytest

from spallm_convert import CalibrationConfig, OptionError, SketchConfig
from spallm_convert.config import parse_size


@pytest.mark.parametrize(
    ("columns", "groups"),
    [
        (576, 1),
        (1024, 1),
        (1536, 1),
        (2048, 2),
        (3072, 3),
        (4096, 4),
        (11008, 4),
        (14336, 4),
        (4099, 1),
    ],
)
def test_auto_groups_keep_1024_columns_each(columns, groups):
    assert SketchConfig(effort="fast").groups_for(columns) == groups


def test_every_bad_option_is_named_at_once():
    bad = {
        "bits": 5,
        "groups_per_row": 0,
        "mapping": "guess",
        "table_dtype": "int8",
        "seed": -1,
        "embeddings": "yes",
        "lm_head": 1,
        "include": "*.k_proj",
        "ignore": "*.q_proj",
        "recipe": {"*.q_proj": {"bits": 3}},
        "strict": 1,
        "max_shard_size": "many",
        "calibration": "text.txt",
    }
    with pytest.raises(OptionError) as caught:
        SketchConfig(**bad)
    assert all(f"found {value!r}" in str(caught.value) for value in bad.values())


def test_every_bad_option_of_calibration_is_named_at_once():
    bad = {
        "text": None,
        "samples": 0,
        "seqlen": 1,
        "without": ([],),
        "heal": -1,
        "fallback": "yes",
        "target_bits": -2,
    }
    with pytest.raises(OptionError) as caught:
        CalibrationConfig(**bad)
    assert all(f"found {value!r}" in str(caught.value) for value in bad.values())


@pytest.mark.parametrize(
    ("kind", "bad"),
    [
        (SketchConfig, {"ignore": None}),
        (SketchConfig, {"ignore": (1,)}),
        (SketchConfig, {"max_shard_size": True}),
        (CalibrationConfig, {"without": None}),
    ],
)
def test_options_of_other_types_are_refused(kind, bad):
    with pytest.raises(OptionError, match=next(iter(bad))):
        kind(**bad)


def test_options_stand_in_a_report_side_by_side():
    nested = CalibrationConfig(text="a.txt", samples=7, without=["descent"])
    config = SketchConfig(bits=3, ignore=["a", "b"], max_shard_size=10**6, calibration=nested)
    document = config.to_json()
    assert json.loads(json.dumps(document)) == document
    assert document["calibration"] == "a.txt"
    assert (document["samples"], document["without"]) == (7, ["descent"])
    assert (document["bits"], document["ignore"]) == (3, ["a", "b"])
    plain = SketchConfig(effort="fast").to_json()
    assert plain["calibration"] is None
    assert plain.keys() == document.keys()


@pytest.mark.parametrize(
    ("size", "expected"), [("5GB", 5 * 10**9), ("500MB", 5 * 10**8), ("1.5kb", 1500), (7, 7)]
)
def test_sizes(size, expected):
    assert parse_size(size) == expected


@pytest.mark.parametrize("size", ["0GB", "5XB", "", "-1MB", -3])
def test_sizes_that_are_none(size):
    with pytest.raises(OptionError, match="expected a size"):
        parse_size(size)
