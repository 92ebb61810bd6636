"""The files of a model that are copied: all that transformers reads, and nothing else."""

import ast
import json
import os
import shutil
from pathlib import Path

import pytest
import transformers

from helpers.remarks import Remarks
from spallm_convert import SketchConfig, SourceError, convert
from spallm_convert.source import extra_files as module
from spallm_convert.source.extra_files import extra_files, is_extra_file, left_behind
from spallm_convert.source.locate import locate
from spallm_convert.source.model_code import code_files

FAST = SketchConfig(effort="fast")
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 7\n"


@pytest.fixture
def model(tmp_path):
    """A function that writes files of a model, and returns its folder."""

    def write(**files):
        for name, content in ({"config.json": {}} | files).items():
            path = tmp_path / "model" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content if isinstance(content, str) else json.dumps(content))
        return tmp_path / "model"

    return write


def vocabulary_names():
    """Values of every `vocab_files_names` in transformers, read from its sources."""
    found = set()
    for path in Path(transformers.__file__).parent.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        if "vocab_files_names" not in text.lower():
            continue
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(node.value, ast.Dict):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                if "vocab_files_names" in {getattr(t, "id", "").lower() for t in targets}:
                    values = (v for v in node.value.values if isinstance(v, ast.Constant))
                    found |= {value.value for value in values if value.value}
    return found


def test_every_vocabulary_of_transformers_is_copied(model):
    names = vocabulary_names()
    assert {"tokenizer.json", "spiece.model", "bpe.codes", "emoji.json"} <= names
    assert len(names) > 20
    folder = model(**dict.fromkeys(names, "{}"))
    assert set(extra_files(folder)) == names


def test_every_config_of_transformers_is_copied(model):
    from transformers import utils

    names = {getattr(utils, name) for name in dir(utils) if name.endswith("_NAME")}
    configs = {name for name in names if isinstance(name, str) and name.endswith("_config.json")}
    configs -= {"adapter_config.json"}
    assert len(configs) > 4
    assert set(extra_files(model(**dict.fromkeys(configs, "{}")))) == configs


KNOWN = [
    *("tekken.json", "qwen.tiktoken", "source.spm", "chat_template.jinja", "chat_template.json"),
    *("additional_chat_templates/tools.jinja", "modules.json", "1_Pooling/config.json"),
    *("LICENSE", "LICENSE.md", "LICENCE-2", "NOTICE", "USE_POLICY.md", "COPYING", "license.txt"),
]
FOREIGN = [
    *("my_api_keys.json", "notes.txt", "train.py", "my.model", "deepspeed.json", "tokenizer.py"),
    *("requirements.txt", "vocab.json.bak", "run.sh", "a b.csv"),
]
SILENT = [
    *(".env.json", ".gitattributes", "README.md", "optimizer.pt", "pytorch_model.bin", "x.gguf"),
    *("model.safetensors", "model.safetensors.index.json", "trainer_state.json", "sub/keys.json"),
    *("sub/tokenizer.json", ".git/config"),
]


def test_only_known_files_are_copied_and_the_others_are_named(model):
    folder = model(**dict.fromkeys([*KNOWN, *FOREIGN, *SILENT], "{}"))
    assert extra_files(folder) == sorted(KNOWN)
    assert left_behind(folder, extra_files(folder)) == sorted(FOREIGN)
    assert all(map(is_extra_file, KNOWN))
    assert not any(map(is_extra_file, SILENT))


def test_a_conversion_says_once_what_is_not_copied(tiny_llama, tmp_path):
    source = shutil.copytree(tiny_llama.folder, tmp_path / "source")
    for name in ("my_api_keys.json", "notes.txt", "a.py", "b.py", "LICENSE"):
        (source / name).write_text("{}")
    remarks = Remarks()
    files = convert(source, tmp_path / "out", FAST, progress=remarks).files
    assert remarks.lines == ["not copied: a.py, b.py, my_api_keys.json, and 1 more"]
    assert "LICENSE" in files
    assert {path.name for path in (tmp_path / "out").iterdir()} == {*files, "conversion.json"}
    assert "my_api_keys.json" not in files
    (tmp_path / "clean").mkdir()
    convert(tiny_llama.folder, tmp_path / "clean", FAST, progress=(silent := Remarks()))
    assert silent.lines == []


def test_code_is_copied_if_a_config_names_it(model):
    folder = model(
        **{
            "config.json": {"auto_map": {"AutoModel": "modeling_own.Own", "AutoConfig": 3}},
            "tokenizer_config.json": {
                "auto_map": {"AutoTokenizer": ["own_tokenizer.T", None, "org/x--foreign.F"]}
            },
            "processor_config.json": {"auto_map": {"AutoProcessor": "../out.P"}},
            "modeling_own.py": "from .layers import A\n  from .more import (\n    B)\nimport torch",
            "layers.py": "from .modeling_own import Own\nfrom ..parent import x\nfrom t import y",
            "more.py": "from .missing import C",
            "own_tokenizer.py": "FILES = {'vocab_file': 'own_vocab_v1.txt', 'b': './own.model'}",
            **dict.fromkeys(["own_vocab_v1.txt", "own.model", "other_vocab.txt"], "x"),
            **dict.fromkeys(["foreign.py", "train.py", "parent.py", "out.py"], ""),
        }
    )
    code = ["layers.py", "modeling_own.py", "more.py", "own_tokenizer.py"]
    data = ["own.model", "own_vocab_v1.txt", "processor_config.json", "tokenizer_config.json"]
    assert extra_files(folder) == sorted(code + data)
    assert left_behind(folder, extra_files(folder)) == sorted(
        ["foreign.py", "train.py", "parent.py", "out.py", "other_vocab.txt"]
    )


def test_imports_that_never_end_are_bounded(model):
    config = {"auto_map": {"AutoModel": "m0.M"}}
    files = {f"m{i}.py": f"from .m{i + 1} import *\n{' ' * 99}\n" for i in range(300)}
    found, _ = code_files(model(**files | {"config.json": config}))
    assert len(found) == 256


@pytest.mark.parametrize("target", ["file", "folder", "missing"])
def test_a_link_out_of_the_folder_is_refused(model, tmp_path, target):
    folder = model()
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret/tools.jinja").write_text("key")
    if target == "folder":
        (folder / "additional_chat_templates").symlink_to(tmp_path / "secret")
        name = "additional_chat_templates/tools.jinja"
    else:
        to = "secret/tools.jinja" if target == "file" else "nowhere"
        (folder / (name := "vocab.json")).symlink_to(Path("..") / to)
    with pytest.raises(SourceError, match=rf"{name} is a link out of the folder, .* \(cp -L\)"):
        extra_files(folder)


def test_a_config_that_is_a_link_out_of_the_folder_is_refused(model, tmp_path):
    folder = model()
    (folder / "config.json").rename(tmp_path / "elsewhere.json")
    (folder / "config.json").symlink_to(tmp_path / "elsewhere.json")
    with pytest.raises(SourceError, match=r"config.json is a link out of the folder"):
        left_behind(folder, extra_files(folder))


def test_other_links_are_fine(model, tmp_path, tiny_llama):
    folder = model(**{"tokenizer.json": "{}"})
    (folder / "vocab.json").symlink_to("tokenizer.json")
    (tmp_path / "link").symlink_to(folder)
    names = ["tokenizer.json", "vocab.json"]
    assert extra_files(folder) == extra_files(tmp_path / "link") == names
    cache = tmp_path / "hub/models--org--name"
    snapshot = cache / "snapshots/abc"
    for number, path in enumerate(sorted(tiny_llama.folder.iterdir())):
        (cache / "blobs").mkdir(parents=True, exist_ok=True)
        shutil.copy(path, cache / f"blobs/{number}")
        snapshot.mkdir(parents=True, exist_ok=True)
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    (snapshot / "additional_chat_templates").mkdir()
    (snapshot / "additional_chat_templates/a.jinja").symlink_to("../../../blobs/0")
    (tmp_path / "snapshot").symlink_to(snapshot)
    files = convert(tmp_path / "snapshot", tmp_path / "out").files
    assert {"tokenizer_config.json", "additional_chat_templates/a.jinja"} <= files.keys()


def test_what_is_no_ordinary_file_is_refused(model, monkeypatch):
    folder = model(**{"tokenizer.json": POINTER})
    with pytest.raises(SourceError, match=r"tokenizer.json: a git-lfs pointer .*`git lfs pull`"):
        extra_files(folder)
    (folder / "tokenizer.json").unlink()
    os.mkfifo(folder / "tokenizer.json")
    with pytest.raises(SourceError, match=r"tokenizer.json: a pipe, expected a regular file"):
        extra_files(folder)
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.txt").write_text("x" * 100)
    monkeypatch.setattr(module, "_MOST_BYTES", 99)
    with pytest.raises(SourceError, match=r"vocab.txt has 100 bytes, expected at most 99"):
        extra_files(folder)
    (folder / "vocab.txt").unlink()
    (folder / os.fsdecode(b"LICENSE-\xff")).write_text("")
    with pytest.raises(SourceError, match=r"the name LICENSE-\\udcff is not UTF-8; rename"):
        extra_files(folder)


def test_a_folder_whose_name_is_not_utf8_is_converted(tiny_llama, tmp_path):
    source = tmp_path / os.fsdecode(b"caf\xe9")
    shutil.copytree(tiny_llama.folder, source)
    (source / os.fsdecode(b"notes \xff.txt")).write_text("")
    assert locate(str(source)).name == r"caf\xe9"
    report = convert(source, tmp_path / "out", FAST, progress=(remarks := Remarks()))
    assert report.source["model"] == r"caf\xe9"
    assert remarks.lines == [r"not copied: notes \udcff.txt"]
    assert r"| source | caf\xe9 |" in (tmp_path / "out/README.md").read_text()
