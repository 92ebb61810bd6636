"""Resume calibrated conversions that were killed or damaged: the result has the same bytes."""

import shutil
from contextlib import nullcontext
from pathlib import Path

import pytest

from helpers.calibration import StopAt, calibrated, contents
from spallm_convert import SpallmError, convert
from spallm_convert.calibration.healing import tuning


def options(text, **changes):
    """Return the options of all tests here."""
    return calibrated(text, **{"max_shard_size": "30KB", "samples": 16, "seqlen": 32} | changes)


def stopped(source, output, config, count):
    """Stop a conversion after `count` modules; return the files of the blocks that it kept."""
    with pytest.raises(KeyboardInterrupt):
        convert(source, output, config, device="cpu", progress=StopAt(count))
    return sorted(output.rglob("block-*.safetensors"))


@pytest.mark.parametrize("mapping", ["cluster", "hash"])
@pytest.mark.parametrize("damage", ["shorter", "changed", "empty"])
def test_a_damaged_block_is_sketched_again(source, text, tmp_path, damage, mapping):
    config = options(text, mapping=mapping)
    convert(source, tmp_path / "whole", config, device="cpu")
    (block,) = stopped(source, tmp_path / "out", config, 10)
    data = bytearray(block.read_bytes())
    if damage == "changed":
        data[-1] ^= 1  # in the last table: only the digest shows this
    block.write_bytes({"shorter": data[:-100], "changed": data, "empty": b""}[damage])
    convert(source, tmp_path / "out", config, device="cpu", resume=True)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_blocks_that_are_whole_are_not_sketched_again(source, text, tmp_path, monkeypatch):
    from spallm_convert.calibration import calibrate

    assert len(stopped(source, tmp_path / "out", options(text), 10)) == 1
    sketched = []
    sketch_block = calibrate.sketch_block

    def spied(blocks, number, *arguments):
        sketched.append(number)
        return sketch_block(blocks, number, *arguments)

    monkeypatch.setattr(calibrate, "sketch_block", spied)
    convert(source, tmp_path / "out", options(text), device="cpu", resume=True)
    assert sketched == [1]


def test_blocks_that_are_there_need_no_more_space(source, text, tmp_path, monkeypatch):
    whole = convert(source, tmp_path / "whole", options(text), device="cpu")
    (block,) = stopped(source, tmp_path / "out", options(text), 10)
    usage = shutil.disk_usage(tmp_path)
    # Space for all shards and the other block, which has the same size.
    free = whole.totals["sketched_bytes"] + block.stat().st_size
    for less, outcome in (
        (20000, pytest.raises(SpallmError, match="more bytes")),
        (0, nullcontext()),
    ):
        left = usage._replace(free=free - less)
        monkeypatch.setattr(shutil, "disk_usage", lambda path, left=left: left)
        with outcome:
            convert(source, tmp_path / "out", options(text), device="cpu", resume=True)


def test_healed_tables_need_space_too(source, text, tmp_path, monkeypatch):
    monkeypatch.setattr(tuning, "LEARNING_RATE", 0.1)  # large enough to improve the tables
    config = options(text, heal=2)
    whole = convert(source, tmp_path / "whole", config, device="cpu")
    tables = 2 * 16 * sum(module["shape"][0] for module in whole.modules)
    shards_and_blocks = whole.totals["sketched_bytes"] + sum(
        module.stat().st_size for module in stopped(source, tmp_path / "out", config, 14)
    )
    usage = shutil.disk_usage(tmp_path)._replace(free=shards_and_blocks + tables // 2)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(SpallmError, match="more bytes"):
        convert(source, tmp_path / "other", config, device="cpu")


@pytest.mark.parametrize("mapping", ["cluster", "hash"])
def test_healed_tables_go_with_their_blocks(source, text, tmp_path, mapping, monkeypatch):
    """Check that healed tables are reused, but made again if they or a block are damaged."""
    monkeypatch.setattr(tuning, "LEARNING_RATE", 0.1)
    config = options(text, heal=5, mapping=mapping, bits=2, table_dtype="float32")
    whole = convert(source, tmp_path / "whole", config, device="cpu")
    healing = whole.document["healing"]
    assert healing["kl_after"] < healing["kl_before"]
    expected = contents(tmp_path / "whole")

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("spallm_convert.conversion.job._write_shards", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            convert(source, tmp_path / "stopped", config, device="cpu", progress=StopAt())
    for damaged in (None, "block-00000-", "block-00001-", "healed-"):
        output = Path(shutil.copytree(tmp_path / "stopped", tmp_path / f"out-{damaged}"))
        (file,) = output.rglob(f"{damaged or 'healed-'}*.safetensors")
        if damaged:
            file.write_bytes(file.read_bytes()[:-1] + b"\xff")
        progress = StopAt()
        convert(source, output, config, device="cpu", resume=True, progress=progress)
        assert bool(progress.said) == bool(damaged)
        assert contents(output) == expected

    output = tmp_path / "stopped at once"
    with pytest.raises(KeyboardInterrupt):
        convert(source, output, config, device="cpu", progress=StopAt(lines=1))
    assert not list(output.rglob("healed-*.safetensors"))
    convert(source, output, config, device="cpu", resume=True)
    assert contents(output) == expected


def _interrupt(*arguments):
    raise KeyboardInterrupt
