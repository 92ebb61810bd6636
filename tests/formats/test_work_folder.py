"""An output folder: nothing of the user's is emptied, overwritten, or reached through a link."""

import json
import os
import subprocess
import sys

import pytest

from spallm_formats import SpallmError, Staging, check_output_folder, check_replaceable, is_inside
from spallm_formats.publishing import finish_publishing
from spallm_formats.work_folder import PARTIAL_FOLDER


@pytest.fixture
def mine(tmp_path):
    """A folder of the user's, which must never change."""
    folder = tmp_path / "mine"
    (folder / "sub").mkdir(parents=True)
    (folder / "notes.txt").write_text("my own")
    (folder / "sub" / "lock").write_text("my own, too")
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    yield folder
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    assert (folder / "notes.txt").read_text() == "my own"
    assert (folder / "sub" / "lock").read_text() == "my own, too"


def write(folder, names, older=None, **options):
    with Staging(folder, {}, **options) as staging:
        for name in names:
            staging.write_file(name, name.encode())
        staging.publish(names, older or {})


def unfinished(folder):
    with Staging(folder, {}) as staging:
        staging.write_file("model.safetensors", b"")
    return folder / PARTIAL_FOLDER


@pytest.mark.parametrize("options", [{"resume": True}, {"overwrite": True}, {}])
@pytest.mark.parametrize("place", ["", "files", "scratch", "scratch/source", "lock", "plan.json"])
def test_links_in_the_work_folder_are_refused(tmp_path, mine, options, place):
    partial = tmp_path / "out" / PARTIAL_FOLDER
    path = partial / place
    path.parent.mkdir(parents=True, exist_ok=True)
    if place == "":
        path.parent.mkdir(exist_ok=True)
    path.symlink_to(mine / "sub" / "lock" if place == "lock" else mine)
    with pytest.raises(SpallmError, match=rf"is a link, .*: remove .*{PARTIAL_FOLDER}"):
        write(tmp_path / "out", ["config.json"], **options)


@pytest.mark.parametrize("place", ["lock", "plan.json", "complete.json", "files"])
def test_pipes_in_the_work_folder_do_not_wait(tmp_path, place):
    partial = tmp_path / PARTIAL_FOLDER
    partial.mkdir()
    os.mkfifo(partial / place)
    for option in ("resume", "overwrite"):
        with pytest.raises(SpallmError, match="not a plain file"):
            write(tmp_path, ["config.json"], **{option: True})


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("plan.json", "[]"),
        ("plan.json", "{"),
        ("plan.json", "null"),
        ("plan.json", "[" * 100_000),
        ("complete.json", "[]"),
        ("complete.json", '{"names": 1, "obsolete": {}}'),
        ("complete.json", '{"names": [1], "obsolete": {}}'),
        ("complete.json", '{"names": ["config.json"], "obsolete": ["a"]}'),
        ("complete.json", '{"names": ["../x"], "obsolete": {}}'),
        ("complete.json", '{"names": ["a\\u0000"], "obsolete": {}}'),
        ("complete.json", json.dumps({"names": ["a" * 256], "obsolete": {}})),
        ("complete.json", '{"names": [], "obsolete": {"C:\\\\x": ""}}'),
    ],
)
def test_odd_json_in_the_work_folder_is_one_clear_line(tmp_path, name, text):
    partial = unfinished(tmp_path)
    (partial / name).write_text(text)
    with (
        pytest.raises(SpallmError, match="use --overwrite to start again"),
        Staging(tmp_path, {}, resume=True) as staging,
    ):
        staging.finish_publishing()
    write(tmp_path, ["config.json"], overwrite=True)


def hashed(folder, name):
    import hashlib

    return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest()}


def test_only_unchanged_files_of_the_older_checkpoint_are_removed(tmp_path, mine):
    out = tmp_path / "out"
    write(out, ["model.safetensors", "vocab.json", "merges.txt", "sub/a.jinja", "config.json"])
    names = ["vocab.json", "merges.txt", "sub/a.jinja"]
    older = {name: digest for n in names for name, digest in hashed(out, n).items()}
    (out / "merges.txt").write_text("edited by the user")
    (out / "sub").rename(tmp_path / "elsewhere")
    (out / "sub").symlink_to(tmp_path / "elsewhere")
    (out / "link").symlink_to(mine / "notes.txt")
    older |= hashed(mine, "notes.txt") | {"link": hashed(mine, "notes.txt")["notes.txt"]}
    write(out, ["model.safetensors", "config.json"], older, overwrite=True)
    left = {path.name for path in out.iterdir()}
    assert left == {"model.safetensors", "config.json", "merges.txt", "sub", "link"}
    assert (tmp_path / "elsewhere" / "a.jinja").exists()


def test_a_file_that_only_the_list_calls_ours_stays(tmp_path):
    write(tmp_path, ["model.safetensors", "config.json"])
    (tmp_path / "notes.txt").write_text("my own")
    older = {"notes.txt": "0" * 64}
    write(tmp_path, ["model.safetensors", "config.json"], older, overwrite=True)
    assert (tmp_path / "notes.txt").read_text() == "my own"


@pytest.mark.parametrize(
    "name", ["model-00001-of-00002.safetensors", "model.safetensors.index.json"]
)
def test_weights_of_others_are_neither_removed_nor_mixed_with_ours(tmp_path, name):
    (tmp_path / name).write_text("weights of the user's")
    with pytest.raises(SpallmError, match=rf"cannot be overwritten: {name} there.*move that away"):
        write(tmp_path, ["model.safetensors", "config.json"], overwrite=True)
    assert (tmp_path / name).read_text() == "weights of the user's"
    assert not (tmp_path / "config.json").exists()
    (tmp_path / name).unlink()
    with Staging(tmp_path, {}, resume=True) as staging:
        staging.publish(["model.safetensors", "config.json"], {})
    assert {path.name for path in tmp_path.iterdir()} == {"model.safetensors", "config.json"}


@pytest.mark.parametrize("through", ["link", "file"])
def test_nothing_is_written_through_a_linked_folder(tmp_path, mine, through):
    out = tmp_path / "out"
    out.mkdir()
    if through == "link":
        (out / "sub").symlink_to(mine / "sub")
    else:
        (out / "sub").write_text("a file")
    with pytest.raises(SpallmError, match="'sub' is a link or a file, expected a folder"):
        write(out, ["sub/lock", "config.json"], overwrite=True)


def test_a_link_in_the_place_of_a_file_is_replaced_and_not_followed(tmp_path, mine):
    out = tmp_path / "out"
    out.mkdir()
    for name in ("config.json", "vocab.json"):
        (out / name).symlink_to(mine / "notes.txt")
    write(out, ["vocab.json", "config.json"], overwrite=True)
    assert not (out / "config.json").is_symlink()
    assert (out / "vocab.json").read_bytes() == b"vocab.json"


def test_a_folder_in_the_place_of_a_file_is_refused_before_anything_moves(tmp_path):
    write(tmp_path, ["vocab.json", "config.json"])
    (tmp_path / "merges.txt").mkdir()
    with pytest.raises(SpallmError, match=r"'merges.txt' is a folder, expected a file"):
        write(tmp_path, ["merges.txt", "vocab.json", "config.json"], overwrite=True)
    assert (tmp_path / "config.json").exists()
    with pytest.raises(SpallmError, match=r"'merges.txt' is a folder"):
        check_replaceable(tmp_path, ["merges.txt"], {})


def test_moving_up_again_looks_again(tmp_path, mine):
    """Links may appear between an interrupted run and the next one."""
    from unittest.mock import patch

    with patch("spallm_formats.publishing.finish_publishing"):
        write(tmp_path / "out", ["sub/a.jinja", "config.json"])
    (tmp_path / "out" / "sub").symlink_to(mine / "sub")
    with pytest.raises(SpallmError, match="'sub' is a link"):
        finish_publishing(tmp_path / "out")


def test_a_first_run_elsewhere_is_named(tmp_path):
    """Another process has begun: there is work, but nothing that a user could resume."""
    script = (
        "import pathlib, sys\n"
        "from spallm_formats import Staging\n"
        "with Staging(pathlib.Path(sys.argv[1]), {}) as staging:\n"
        "    staging.write_file('config.json', b'{}')\n"
        "    print('ready', flush=True)\n"
        "    sys.stdin.read()\n"
    )
    command = [sys.executable, "-c", script, tmp_path / "out"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"ready\n"
        with pytest.raises(SpallmError, match="another process is writing to"):
            check_output_folder(tmp_path / "out", resume=False, overwrite=False)
        other.communicate()
    with pytest.raises(SpallmError, match="unfinished conversion: use --resume"):
        check_output_folder(tmp_path / "out", resume=False, overwrite=False)


@pytest.mark.parametrize(
    "name", ["", "/a", "../a", "a/../../b", "C:\\a", "a\0", "a" * 256, "é" * 128, "a/" * 600]
)
def test_names_that_are_not_inside_a_folder(name):
    assert not is_inside(name)
    assert is_inside("sub/ä" + "b" * 250)
