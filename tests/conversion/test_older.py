"""What `--overwrite` may remove: files that a conversion writes, whatever the report lists."""

import hashlib
import json

from spallm_convert import convert


def test_a_report_that_lists_files_of_the_user(tiny_llama, tmp_path):
    out = tmp_path / "out"
    convert(tiny_llama.folder, out)
    report = json.loads((out / "conversion.json").read_text())
    (out / "sub").mkdir()
    mine = {"notes.md": b"", ".gitkeep": b"", "sub/data.csv": b"", "photo.png": b"not empty"}
    for name, data in mine.items():
        (out / name).write_bytes(data)
        report["files"][name] = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    (out / "conversion.json").write_text(json.dumps(report))
    convert(tiny_llama.folder, out, overwrite=True)
    assert {name: (out / name).read_bytes() for name in mine} == mine


def test_files_of_the_older_checkpoint_that_the_user_changed_stay(tiny_llama, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for path in tiny_llama.folder.iterdir():
        (source / path.name).write_bytes(path.read_bytes())
    (source / "vocab.txt").write_text("a\n")
    (source / "merges.txt").write_text("a b\n")
    convert(source, tmp_path / "out")
    (source / "vocab.txt").unlink()
    (source / "merges.txt").unlink()
    (tmp_path / "out/merges.txt").write_text("mine")
    convert(source, tmp_path / "out", overwrite=True)
    assert not (tmp_path / "out/vocab.txt").exists()
    assert (tmp_path / "out/merges.txt").read_text() == "mine"
