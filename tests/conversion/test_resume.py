"""A killed conversion: never taken for a whole one, and resumed to the same bytes."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import pytest

from spallm_convert import SketchConfig, SpallmError, convert
from spallm_formats import SketchedCheckpoint, Staging
from spallm_formats.work_folder import PARTIAL_FOLDER


def contents(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_overwriting_removes_what_belonged_to_the_old_checkpoint(tiny_llama, tmp_path):
    source = shutil.copytree(tiny_llama.folder, tmp_path / "source")
    convert(source, tmp_path / "out")
    (tmp_path / "out" / "notes.txt").write_text("the user's own")
    (source / "chat_template.jinja").unlink()
    convert(source, tmp_path / "out", overwrite=True)
    convert(source, tmp_path / "fresh")
    expected = contents(tmp_path / "fresh")
    assert "chat_template.jinja" not in expected
    assert contents(tmp_path / "out") == expected | {"notes.txt": b"the user's own"}


def test_a_source_that_changed_is_not_resumed(tiny_llama, tmp_path):
    source = shutil.copytree(tiny_llama.folder, tmp_path / "source")
    convert(source, tmp_path / "out")
    (source / "chat_template.jinja").write_text("another")
    with pytest.raises(SpallmError, match="not empty"):
        convert(source, tmp_path / "out", resume=True)


SHARDED = SketchConfig(effort="fast", max_shard_size="30KB")


@pytest.fixture
def unfinished(sharded_llama, tmp_path):
    """An output folder whose conversion stopped after the first shard."""

    class Stop:
        def start(self, weights):
            self.seen = set()

        def advance(self, weights, tensor):
            self.seen.add(tensor)
            if len(self.seen) > 9:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(
            sharded_llama.folder,
            tmp_path / "out",
            SketchConfig(effort="fast", max_shard_size="30KB"),
            progress=Stop(),
        )
    assert list((tmp_path / "out" / PARTIAL_FOLDER / "files").glob("*.safetensors"))
    return tmp_path / "out"


def test_whole_shards_are_not_sketched_again(sharded_llama, unfinished, monkeypatch):
    done = set((unfinished / PARTIAL_FOLDER / "files").glob("*.safetensors"))
    before = {path: path.stat().st_mtime_ns for path in done}
    from spallm_formats import Staging

    finished = {}
    publish = Staging.publish

    def spy(self, names, older):
        finished.update({path: path.stat().st_mtime_ns for path in done})
        publish(self, names, older)

    monkeypatch.setattr(Staging, "publish", spy)
    convert(sharded_llama.folder, unfinished, SHARDED, resume=True)
    assert finished == before


def test_a_damaged_shard_is_written_again(sharded_llama, unfinished, tmp_path):
    shard = next((unfinished / PARTIAL_FOLDER / "files").glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"\xff")
    convert(sharded_llama.folder, unfinished, SHARDED, resume=True)
    convert(sharded_llama.folder, tmp_path / "whole", SHARDED)
    assert contents(unfinished) == contents(tmp_path / "whole")


def test_a_record_that_was_changed_counts_as_missing(sharded_llama, unfinished, tmp_path):
    path = next((unfinished / PARTIAL_FOLDER).glob("*.record.json"))
    record = json.loads(path.read_text())
    name = next(iter(record["modules"]))
    record["modules"][name] = [1.0, 2.0]  # errors that nobody measured
    path.write_text(json.dumps(record))
    convert(sharded_llama.folder, unfinished, SHARDED, resume=True)
    convert(sharded_llama.folder, tmp_path / "whole", SHARDED)
    assert contents(unfinished) == contents(tmp_path / "whole")


def test_an_unfinished_folder_needs_a_decision(sharded_llama, unfinished):
    with pytest.raises(SpallmError, match="holds an unfinished conversion: use --resume"):
        convert(
            sharded_llama.folder, unfinished, SketchConfig(effort="fast", max_shard_size="30KB")
        )
    convert(sharded_llama.folder, unfinished, SketchConfig(effort="fast", bits=2), overwrite=True)
    assert SketchedCheckpoint.open(unfinished).metadata.bits == 2
    assert not (unfinished / PARTIAL_FOLDER).exists()


def test_other_options_or_another_source_are_not_resumed(sharded_llama, tiny_llama, unfinished):
    before = contents(unfinished)
    with pytest.raises(SpallmError, match=r"something else \(bits was 4, now 3\)"):
        convert(
            sharded_llama.folder,
            unfinished,
            SketchConfig(effort="fast", bits=3, max_shard_size="30KB"),
            resume=True,
        )
    with pytest.raises(SpallmError, match="something else"):
        convert(
            tiny_llama.folder,
            unfinished,
            SketchConfig(effort="fast", max_shard_size="30KB"),
            resume=True,
        )
    assert contents(unfinished) == before


def test_resuming_what_is_finished_changes_nothing(tiny_llama, tmp_path):
    first = convert(tiny_llama.folder, tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    again = convert(tiny_llama.folder, tmp_path / "out", resume=True)
    assert again.document == first.document
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before
    with pytest.raises(SpallmError, match="not empty"):
        convert(
            tiny_llama.folder, tmp_path / "out", SketchConfig(effort="fast", bits=2), resume=True
        )
    assert (
        json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]["bits"] == 4
    )


@pytest.mark.parametrize("change", [Path.unlink, lambda path: path.write_bytes(b"another")])
def test_what_is_not_whole_any_more_is_not_called_finished(tiny_llama, tmp_path, change):
    convert(tiny_llama.folder, tmp_path / "out")
    change(tmp_path / "out/model.safetensors")
    with pytest.raises(SpallmError, match=r"model.safetensors is missing or has changed"):
        convert(tiny_llama.folder, tmp_path / "out", resume=True)


def moved_in_part(folder, lost):
    """A conversion that stopped before its files moved up, with one of them gone."""

    with Staging(folder, {}) as staging:
        for name in ("model.safetensors", "config.json"):
            staging.write_file(name, b"{}")
        with patch("spallm_formats.publishing.finish_publishing"):
            staging.publish(["model.safetensors", "config.json"], {})
    (folder / PARTIAL_FOLDER / "files" / lost).unlink()


def test_files_that_were_lost_while_they_moved_are_named(tmp_path):
    moved_in_part(tmp_path, lost="model.safetensors")
    with Staging(tmp_path, {}, resume=True) as staging:
        assert staging.is_published
        with pytest.raises(SpallmError, match=r"model.safetensors .* cannot be found"):
            staging.finish_publishing()
    assert not (tmp_path / "config.json").exists()


def test_plans_are_read_as_they_were_written_whatever_the_locale(tmp_path, monkeypatch):
    plan = {"model": "модель"}
    with Staging(tmp_path, plan) as staging:  # left before anything is published
        staging.write_file("config.json", b"{}")
    read_text = Path.read_text
    monkeypatch.setattr(
        Path, "read_text", lambda path, encoding="cp1252": read_text(path, encoding)
    )
    with Staging(tmp_path, plan, resume=True):
        pass


def test_what_was_being_written_when_killed_is_removed(unfinished):
    half = unfinished / PARTIAL_FOLDER / "model-00002-of-00009.safetensors.tmp"
    half.write_bytes(b"half of a shard")
    plan = json.loads((unfinished / PARTIAL_FOLDER / "plan.json").read_text(encoding="utf-8"))
    with Staging(unfinished, plan, resume=True):
        assert not half.exists()


def test_two_conversions_into_one_folder_exclude_each_other(tiny_llama, tmp_path):
    with (
        Staging(tmp_path / "out", {}),
        pytest.raises(SpallmError, match="another process is writing"),
    ):
        convert(tiny_llama.folder, tmp_path / "out", resume=True)


def test_a_lock_of_a_killed_process_does_not_block(tmp_path):
    script = (
        "import os, pathlib, signal, sys\n"
        "from spallm_formats import Staging\n"
        "with Staging(pathlib.Path(sys.argv[1]), {}):\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    killed = subprocess.run([sys.executable, "-c", script, tmp_path / "out"], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert (tmp_path / "out" / PARTIAL_FOLDER / "lock").exists()
    with Staging(tmp_path / "out", {}, resume=True) as staging:
        staging.write_file("config.json", b"{}")
        staging.publish(["config.json"], {})
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["config.json"]


@pytest.mark.skipif(os.name == "nt", reason="locks of Windows are no flock")
@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK])
def test_a_disk_without_locks_is_written_to_all_the_same(tmp_path, monkeypatch, code):
    import fcntl

    def refuse(*arguments):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with Staging(tmp_path / "out", {}) as staging:
        staging.write_file("config.json", b"{}")
        staging.publish(["config.json"], {})
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["config.json"]
