"""What `push` uploads: exactly the files that were checked, and nothing if a check fails."""

import hashlib
import json
import os
import shutil
import stat

import pytest

from helpers.hub_client import INDEX, WEIGHTS
from helpers.hub_fault_cases import run_cases
from spallm_convert import FormatError, convert
from spallm_convert.conversion import upload_files
from spallm_convert.conversion.upload_files import UploadFiles
from spallm_formats import read_header

ATTRIBUTES = ".gitattributes"


def list_file(folder, name, content=None):
    """Put a file, or None for one that is there, into the report of a folder."""
    report = json.loads((folder / "conversion.json").read_text())
    data = (folder / name).read_bytes() if content is None else content
    report["files"][name] = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    (folder / "conversion.json").write_text(json.dumps(report))


def damage_table(folder):
    """Set the first values of a table to NaN."""
    header = read_header(folder / WEIGHTS)
    table = next(tensor for name, tensor in header.items() if name.endswith("table"))
    with (folder / WEIGHTS).open("r+b") as file:
        file.seek(table.offset)
        file.write(b"\xff" * 8)


def star(folder):
    list_file(folder, "*", b"x")


def star_that_exists(folder):
    (folder / "*").write_bytes(b"x")
    list_file(folder, "*")


def changed_weights(folder):
    with (folder / WEIGHTS).open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x07")


def changed_everything(folder):
    for path in folder.iterdir():
        if path.name not in {"conversion.json", "config.json", WEIGHTS}:
            path.write_bytes(path.read_bytes() + b" ")


def nan_without_report(folder):
    (folder / "conversion.json").unlink()
    damage_table(folder)


def link_out(folder):
    outside = folder.parent / f"{folder.name}-outside"
    outside.write_bytes((folder / "README.md").read_bytes())
    (folder / "README.md").unlink()
    (folder / "README.md").symlink_to(outside)


def link_to_folder_out(folder):
    outside = folder.parent / f"{folder.name}-outside"
    outside.mkdir()
    (outside / "x.txt").write_text("x")
    (folder / "sub").symlink_to(outside)
    list_file(folder, "sub/x.txt", b"x")


def pipe(folder):
    (folder / "README.md").unlink()
    os.mkfifo(folder / "README.md")


def config_not_listed(folder):
    report = json.loads((folder / "conversion.json").read_text())
    del report["files"]["config.json"]
    (folder / "conversion.json").write_text(json.dumps(report))


def git_name(folder):
    (folder / ".git").mkdir()
    (folder / ".git" / "config").write_text("x")
    list_file(folder, ".git/config")


#: Change to the folder: words of the error.
REFUSED = {
    star: ["not uploaded: *"],
    changed_weights: [WEIGHTS, "if you saved a trained model there, remove conversion.json"],
    changed_everything: ["not uploaded", "and 1 more", "spallm-convert verify"],
    nan_without_report: ["not uploaded", "NaN"],
    link_out: ["'README.md' is a link to a file outside of the folder"],
    link_to_folder_out: ["'sub/x.txt' is a link to a file outside of the folder"],
    pipe: ["README.md"],
    config_not_listed: ["config.json: not listed in conversion.json"],
    git_name: [".git/config"],
}


def trained(folder):
    (folder / "conversion.json").unlink()


def as_it_is(folder):
    """Leave the folder as the conversion wrote it."""


ACCEPTED = (star_that_exists, trained, as_it_is)


@pytest.fixture(scope="module")
def converted(tiny_llama, tmp_path_factory):
    folder = tmp_path_factory.mktemp("push") / "converted"
    convert(tiny_llama.folder, folder)
    for name in (".env", "notes.bin", "README.md~", "model-old.safetensors"):
        (folder / name).write_text("secret")
    return folder


@pytest.fixture(scope="module")
def outcomes(converted, tiny_llama):
    wanted = {}
    for change in (*REFUSED, *ACCEPTED):
        folder = converted.parent / change.__name__
        shutil.copytree(converted, folder)
        change(folder)
        wanted[change.__name__] = {"action": "push", "folder": str(folder)}
    old = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", INDEX]
    kept = ["keep.bin", "other.safetensors", "sub/model-00001-of-00002.safetensors"]
    wanted["over"] = wanted["as_it_is"] | {
        "exists": True,
        "private": True,
        "files": dict.fromkeys([*old, *kept], "x"),
    }
    return run_cases(wanted, tiny_llama.folder)


@pytest.mark.parametrize("change", REFUSED, ids=lambda change: change.__name__)
def test_what_is_not_whole_is_refused_before_anything_is_sent(outcomes, change):
    outcome = outcomes[change.__name__]
    assert outcome["error"] == "FormatError", outcome
    assert outcome["text"].isprintable()
    for words in REFUSED[change]:
        assert words in outcome["text"]
    assert outcome["asked"] == []


def test_the_files_of_the_report_are_uploaded_and_no_others(converted, outcomes):
    report = json.loads((converted / "conversion.json").read_text())
    files = {*report["files"], "conversion.json", ATTRIBUTES}
    assert set(outcomes["as_it_is"]["files"]) == files
    assert set(outcomes["star_that_exists"]["files"]) == files | {"*"}


def test_a_folder_without_a_report_is_uploaded_without_its_other_files(converted, outcomes):
    report = json.loads((converted / "conversion.json").read_text())
    assert set(outcomes["trained"]["files"]) == {*report["files"], ATTRIBUTES}


def test_old_weights_are_removed_and_nothing_else(converted, outcomes, tiny_llama):
    theirs = {path.name for path in tiny_llama.folder.iterdir()}
    kept = {"keep.bin", "other.safetensors", "sub/model-00001-of-00002.safetensors"}
    assert set(outcomes["over"]["files"]) - {ATTRIBUTES} == (
        set(outcomes["as_it_is"]["files"]) - {ATTRIBUTES} | theirs | kept
    )


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "a.txt").write_text("first")
    return tmp_path


def write_again(path):
    path.write_text("other text")


def replace(path):
    other = path.with_name("b.txt")
    other.write_text("other")
    found = path.stat()
    os.utime(other, ns=(found.st_atime_ns, found.st_mtime_ns))
    other.replace(path)


@pytest.mark.parametrize("change", [write_again, replace, os.remove])
def test_a_file_that_changes_after_it_was_checked(folder, change):
    files = UploadFiles(folder, ["a.txt"])
    assert [addition.path_in_repo for addition in files.additions({})] == ["a.txt"]
    change(folder / "a.txt")
    for check in (files.check_unchanged, lambda: files.additions({})):
        with pytest.raises(FormatError, match=r"'a.txt' changed after it was checked"):
            check()


def test_a_file_whose_hash_is_not_the_one_that_was_checked(folder):
    with pytest.raises(FormatError, match=r"'a.txt' changed after it was checked"):
        UploadFiles(folder, ["a.txt"]).additions({"a.txt": "0" * 64})


def test_large_files_stay_on_the_disk(folder, monkeypatch):
    monkeypatch.setattr(upload_files, "_SMALL", 4)
    (addition,) = UploadFiles(folder, ["a.txt"]).additions({})
    assert addition.path_or_fileobj == str(folder / "a.txt")


def test_a_link_inside_the_folder_is_followed(folder):
    (folder / "b.txt").symlink_to("a.txt")
    (addition,) = UploadFiles(folder, ["b.txt"]).additions({})
    assert addition.path_or_fileobj == b"first"
    assert stat.S_ISLNK((folder / "b.txt").lstat().st_mode)
