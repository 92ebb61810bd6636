"""Files that are replaced in one step: links are not followed, and failures leave no trace."""

import os

import pytest

from helpers.kills import count_changes, kill_at_change
from spallm_formats.durable import replacing, write_atomic


@pytest.mark.parametrize("name", ["file", "file.tmp"])
def test_a_link_is_replaced_and_not_followed(tmp_path, name):
    victim, folder = tmp_path / "victim", tmp_path / "folder"
    victim.write_bytes(b"theirs")
    folder.mkdir()
    (folder / name).symlink_to(victim)
    write_atomic(folder / "file", b"ours")
    assert victim.read_bytes() == b"theirs"
    assert (folder / "file").read_bytes() == b"ours"
    assert [path.name for path in folder.iterdir()] == ["file"]
    assert not (folder / "file").is_symlink()


def test_a_pipe_under_the_temporary_name_is_replaced(tmp_path):
    os.mkfifo(tmp_path / "file.tmp")
    write_atomic(tmp_path / "file", b"ours")
    assert (tmp_path / "file").read_bytes() == b"ours"


def test_a_block_that_raises_leaves_the_file_as_it_was(tmp_path):
    write_atomic(tmp_path / "file", b"before")

    def write_and_fail():
        with replacing(tmp_path / "file") as file:
            file.write(b"after")
            raise ValueError("on purpose")

    with pytest.raises(ValueError, match="on purpose"):
        write_and_fail()
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_bytes() == b"before"


def test_the_file_has_the_usual_permissions(tmp_path):
    (tmp_path / "usual").write_bytes(b"")
    write_atomic(tmp_path / "file", b"")
    assert (tmp_path / "file").stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_killed_at_any_moment_the_file_is_old_or_new(tmp_path):
    path = tmp_path / "file"

    def write():
        write_atomic(path, b"new")

    found = []
    changes = count_changes(write, tmp_path)
    for number in range(1, changes + 1):
        path.write_bytes(b"old")
        assert kill_at_change(number, write, tmp_path)
        found.append(path.read_bytes())
        write()  # what was left over is no hindrance
    assert len(found) >= 3  # opened, flushed, renamed
    assert set(found) == {b"old"}  # the last change is the rename
    assert not kill_at_change(changes + 1, write, tmp_path)
    assert path.read_bytes() == b"new"
