"""The benchmark of whole calibrated conversions: both sides do the same, by other means."""

import json

import pytest
from click.testing import CliRunner

from helpers.calibration import save_source


@pytest.mark.slow  # starts processes for scikit-learn
def test_loops_arrive_at_about_the_same_error(tmp_path, monkeypatch):
    from benchmarks.cpu import calibrated_model

    source, output = save_source(tmp_path / "model"), tmp_path / "results.json"
    clustered = []
    make_kmeans = calibrated_model.cluster_by_scikit_learn

    def spied(workers):
        kmeans = make_kmeans(workers)

        def counted(weights, importance, groups, entries):
            table, none = kmeans(weights, importance, groups, entries)
            clustered.append(table.shape)
            return table, none

        return counted

    monkeypatch.setattr(calibrated_model, "cluster_by_scikit_learn", spied)
    size = ["--blocks", "1", "--samples", "4", "--seqlen", "16", "--groups-per-row", "2"]
    arguments = [f"--model={source}", f"--output={output}", "--bits", "2", *size]
    result = CliRunner().invoke(calibrated_model.main, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    # Seven layers, each clustered with two kinds of weights.
    assert len(clustered) == 14
    assert set(clustered) == {(rows, 2, 4) for rows in (16, 32, 48)}
    document = json.loads(output.read_text())
    assert document["settings"]["blocks"] == 1
    assert document["whole_model"]["bits"] == 2
    assert document["whole_model"]["seconds"] > 0
    (found,) = document["results"]
    errors = found["relative_output_error"]
    assert errors["ours"] == pytest.approx(errors["loops"], rel=0.1)
    assert errors["ours"] != errors["loops"]
    ours, loops = (found["seconds"][name] for name in ("ours", "loops"))
    assert len(ours) == len(loops) == 1
    assert found["times_faster"] == loops[0] / ours[0]
