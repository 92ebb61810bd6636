"""A source that is written to while it is converted: no checkpoint, and nothing of it is kept."""

import os
import shutil

import pytest

from helpers.calibration import StopAt, calibrated, contents
from helpers.tiny_models import save_tiny_llama
from spallm_convert import FormatError, SketchConfig, SourceError, SpallmError, convert
from spallm_formats import SketchedCheckpoint

MODES = {
    "plain": {},
    "calibrated": {"samples": 8, "seqlen": 32},
    "healed": {"samples": 8, "seqlen": 32, "heal": 2},
    "chosen": {"samples": 8, "seqlen": 32, "target_bits": 9},
}


class Change(StopAt):
    """Change a file after the first module, or at the first line of a text if there is one."""

    def __init__(self, change, *, at_line=False):
        super().__init__()
        self.change, self.at_line = change, at_line

    def advance(self, weights, tensor):
        super().advance(weights, tensor)
        if not self.at_line and len(self.done) == 1:
            self.change()

    def say(self, line):
        super().say(line)
        if self.at_line and len(self.said) == 1:
            self.change()


def flip(path):
    """Change the last bit of a file in place; its size stays."""
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)[0]
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last ^ 1]))


def options(mode, text):
    given = {"max_shard_size": "30KB"} | MODES[mode]
    return SketchConfig(effort="fast", **given) if mode == "plain" else calibrated(text, **given)


def refused(source, output, config, progress):
    with pytest.raises(SourceError, match="changed during the conversion"):
        convert(
            source,
            output,
            config,
            device="cpu" if config.level.reads_text else "auto",
            progress=progress,
        )
    with pytest.raises(FormatError):
        SketchedCheckpoint.open(output)


@pytest.mark.parametrize("mode", MODES)
def test_weights_that_change_are_noticed_and_nothing_made_of_them_is_kept(
    source, text, tmp_path, mode
):
    own = shutil.copytree(source, tmp_path / "model")
    config, weights = options(mode, text), own / "model.safetensors"
    at_line = mode in {"healed", "chosen"}
    progress = Change(lambda: flip(weights), at_line=at_line)
    refused(own, tmp_path / "out", config, progress)
    flip(weights)  # as it was
    kept = (tmp_path / "out").exists()
    convert(own, tmp_path / "out", config, resume=kept, device="cpu")
    convert(own, tmp_path / "whole", config, device="cpu")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize("name", ["config.json", "chat_template.jinja", "tokenizer_config.json"])
def test_other_files_are_noticed(source, tmp_path, name):
    own = shutil.copytree(source, tmp_path / "model")
    refused(own, tmp_path / "out", SketchConfig(effort="fast"), Change(lambda: flip(own / name)))


def test_a_file_that_is_gone_or_replaced(tmp_path):
    for change in ("unlink", "replace"):
        own = save_tiny_llama(tmp_path / change).folder
        file, other = own / "chat_template.jinja", own / "other"
        other.write_text("other")
        act = (
            file.unlink
            if change == "unlink"
            else lambda file=file, other=other: other.replace(file)
        )
        with pytest.raises((SourceError, OSError)):
            convert(own, tmp_path / "out", progress=Change(act))
        assert not (tmp_path / "out/config.json").exists()


def test_the_same_contents_written_again_are_no_change(tiny_llama, tmp_path):
    own = shutil.copytree(tiny_llama.folder, tmp_path / "model")
    weights = own / "model.safetensors"

    def rewrite():
        copy = own / "copy"
        copy.write_bytes(weights.read_bytes())
        copy.replace(weights)

    convert(own, tmp_path / "out", progress=Change(rewrite))
    convert(own, tmp_path / "whole")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "README.md"])
def test_one_flipped_bit_of_a_finished_conversion(tiny_llama, tmp_path, name):
    convert(tiny_llama.folder, tmp_path / "out")
    flip(tmp_path / "out" / name)
    with pytest.raises(SpallmError, match=f"{name} is missing or has changed"):
        convert(tiny_llama.folder, tmp_path / "out", resume=True)
