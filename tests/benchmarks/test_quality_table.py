"""What the quality benchmark tells: the table, the picture, the summary."""

import math
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def finished(method, perplexity, bits_per_weight):
    from benchmarks.quality.methods import METHODS

    known = METHODS[method]
    return {
        "method": method,
        "kind": known.kind,
        "bits": known.bits,
        "groups_per_row": known.groups,
        "bits_per_weight": bits_per_weight,
        "model_bytes": 5_000_000,
        "perplexity": perplexity,
        "nats_per_token": math.log(perplexity),
        "conversion_cpu_seconds": 7.4,
        "conversion_peak_bytes": 10**9,
    }


def test_the_table_goes_by_width_and_perplexity():
    from benchmarks.quality.table import table

    runs = [
        finished("rtn-2bit-g128", 2e4, 2.2),
        finished("rtn-4bit-g128", 11.0, 4.2),
        finished("leanquant-4bit", 10.5, 4.4),
        finished("dense", 10.0, 16.0),
    ]
    lines = table(runs).splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == [
        "| dense",
        "| leanquant-4bit",
        "| rtn-4bit-g128",
        "| rtn-2bit-g128",
    ]
    assert lines[4] == "| rtn-4bit-g128 | 4.20 | 5.0 | 11.00 | 0.095 | 7 | 1.00 |"
    assert "over 10,000" in lines[5]


def test_llamacpp_is_in_the_table_where_its_stored_bits_are():
    from benchmarks.quality.table import table

    stored = {"stored_types": {"IQ4_NL": 3, "IQ2_XS": 1}}
    runs = [
        finished("llamacpp-iq2_xs", 10.5, 3.9) | stored,
        finished("rtn-4bit-g128", 11.0, 4.2),
        finished("leanquant-3bit", 10.7, 3.2),
        finished("dense", 10.0, 16.0),
    ]
    assert [line.split(" | ")[0] for line in table(runs).splitlines()[3:]] == [
        "| llamacpp-iq2_xs",
        "| rtn-4bit-g128",
        "| leanquant-3bit",
    ]


def test_types_are_told_by_their_shares_of_weights():
    from benchmarks.quality.table import stored_types

    row = finished("llamacpp-q4_k_m", 11.0, 5.1)
    types = {"Q5_0": 600, "Q4_K": 300, "Q8_0": 100}
    runs = [finished("nf4", 11.0, 4.1), row | {"stored_types": types}]
    assert stored_types(runs) == [
        "llamacpp-q4_k_m stores its weights as 60% Q5_0, 30% Q4_K, 10% Q8_0."
    ]


def test_what_is_beyond_the_picture_is_told_apart():
    from benchmarks.quality.plot import split

    runs = [
        finished("dense", 10.0, 16.0),
        finished("rtn-2bit-g128", 2e4, 2.2),
        finished("rtn-4bit-g128", 11.0, 4.2),
        finished("rtn-3bit-g128", 40.0, 3.2),
    ]
    inside, beyond = split(runs, 40.0)
    assert [row["method"] for row in inside] == ["rtn-3bit-g128", "rtn-4bit-g128"]
    assert [row["method"] for row in beyond] == ["rtn-2bit-g128"]


def test_every_kind_can_be_run_and_drawn():
    from benchmarks.quality.methods import METHODS
    from benchmarks.quality.plot import STYLES
    from benchmarks.quality.quantize import KINDS

    assert {method.kind for method in METHODS.values()} == KINDS.keys()
    drawn = {(method.kind, method.groups) for method in METHODS.values()} - {("dense", 1)}
    assert drawn == STYLES.keys()


def test_a_picture_without_figures_is_refused(tmp_path):
    from benchmarks.quality.plot import read
    from benchmarks.shared.drawing import PlotError

    with pytest.raises(
        PlotError, match=r"does not exist: `python -m benchmarks\.quality` writes it"
    ):
        read(tmp_path / "quality.json")
    (tmp_path / "quality.json").write_text('{"runs": [{"kind": "dense"}]}')
    with pytest.raises(PlotError, match="needs runs of the dense model and of another"):
        read(tmp_path / "quality.json")


def test_the_summary_compares_losses_and_finds_what_is_better_in_both():
    from benchmarks.quality.table import beside_leanquant, better_in_both

    def row(kind, bits, size, perplexity, groups=1):
        return {
            "method": f"{kind}-{bits}",
            "kind": kind,
            "bits": bits,
            "groups_per_row": groups,
            "bits_per_weight": size,
            "perplexity": perplexity,
        }

    runs = [
        row("dense", 16, 16, 20),
        row("leanquant", 4, 4.1, 24),
        row("leanquant", 3, 3.1, 40),
        row("sketch-calibrated", 4, 4.2, 22),
        row("sketch-calibrated", 4, 5.0, 21, groups=4),
        row("sketch-healed", 4, 4.2, 21),
        row("sketch", 4, 4.2, 30),
    ]
    assert beside_leanquant(runs) == [
        "At 4 bits LeanQuant's recipe loses 4.00 of perplexity, the calibrated sketch 2.00 (50% of "
        "that), the healed one 1.00 (25% of that).",
        "At 3 bits LeanQuant's recipe loses 20.00 of perplexity.",
    ]
    better = "Methods of others with fewer bits and less perplexity than a sketch for a text: "
    assert better_in_both(runs) == better + "none."  # leanquant beats the plain sketch alone
    runs += [row("gptq", 4, 4.19, 21.5), row("hqq", 4, 5.1, 20.5)]
    assert better_in_both(runs) == better + "gptq-4 than sketch-calibrated-4."


def test_the_readme_has_the_table_of_the_results():
    from benchmarks.quality.plot import read
    from benchmarks.quality.table import readme_table
    from benchmarks.shared.machine import RESULTS

    lines = [line.strip() for line in (ROOT / "README.md").read_text().splitlines()]
    table = readme_table(read(RESULTS / "quality.json")["runs"]).splitlines()
    first = lines.index(table[0])
    assert lines[first : first + len(table)] == table


def test_the_readme_takes_the_smallest_sketch_of_a_width():
    from benchmarks.quality.table import readme_table

    runs = [
        finished("sketch-normal-4bit-gpr1", 26.0, 4.4),
        finished("sketch-normal-4bit-gpr4", 25.0, 5.5),
        finished("nf4", 29.94, 4.1),
        finished("rtn-4bit-g128", 20.0, 4.2),
        finished("sketch-normal-3bit-gpr1", 2e4, 3.3),
        finished("sketch-normal-2bit-gpr1", 3227.4, 2.1),
    ]
    assert readme_table(runs).splitlines()[2:] == [
        "| 4 | **26.0** | 29.9 |",
        "| 3 | **over 10,000** |  |",
        "| 2 | **3,227** |  |",
    ]
