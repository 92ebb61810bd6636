"""The model card of a source with a hostile name."""

import os
import shutil

import pytest

from helpers.calibration import save_text
from spallm_convert import CalibrationConfig, SketchConfig, SourceError, convert


def test_a_name_cannot_write_into_the_card(tiny_llama, tmp_path):
    name = "a\n---\n# b|`c`<img src=x>[d](e) f"
    source = shutil.copytree(tiny_llama.folder, tmp_path / name)
    assert convert(source, tmp_path / "out").source["model"] == name
    card = (tmp_path / "out/README.md").read_text()
    shown = r"a\n---\n# b&#124;&#96;c&#96;&#60;img src=x&#62;&#91;d&#93;(e) f"
    assert f"| source | {shown} |" in card
    assert f"# {shown}, sketched to 4 bits\n" in card


def test_names_that_are_not_utf8_are_published_as_text(source, tmp_path):
    text = save_text(tmp_path / os.fsdecode(b"text|\xff.txt"))
    calibration = CalibrationConfig(text=str(text), samples=2, seqlen=16)
    report = convert(source, tmp_path / "out", SketchConfig(calibration=calibration))
    assert report.document["options"]["calibration"] == r"text|\xff.txt"
    assert r"| calibration | text&#124;\xff.txt, 2 samples" in (
        tmp_path / "out/README.md"
    ).read_text(encoding="utf-8")
    odd = shutil.copytree(source, tmp_path / os.fsdecode(b"model-\xff"))
    with pytest.raises(SourceError, match=r"the path of its folder is not UTF-8, .*; rename it"):
        convert(odd, tmp_path / "out-2", SketchConfig(calibration=calibration))
