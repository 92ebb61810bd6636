"""Files of a work folder that nobody of us wrote count as missing, and are made again."""

import json
import shutil

import pytest
from safetensors.numpy import load_file, save

from helpers.calibration import calibrated, contents
from spallm_convert import convert
from spallm_convert.calibration.healing import tuning
from spallm_convert.calibration.store import CalibratedModules, write_sound
from spallm_formats.work_folder import PARTIAL_FOLDER


def options(text, **changes):
    return calibrated(text, samples=8, seqlen=32, max_shard_size="30KB", **changes)


def metadata_of(path):
    length = int.from_bytes(path.read_bytes()[:8], "little")
    return json.loads(path.read_bytes()[8 : 8 + length])["__metadata__"]


def write_again(path, change):
    """Replace a file by a changed one, with the right digest in its name."""
    tensors, metadata = load_file(path), metadata_of(path)
    change(tensors, metadata)
    name = path.name.rpartition("-")[0]
    write_sound(path.parent, name, save(tensors, metadata=metadata))


def set_sums(value):
    def change(tensors, metadata):
        sums = json.loads(metadata["sums"])
        sums[next(iter(sums))] = "THE VALUE"
        metadata["sums"] = json.dumps(sums).replace('"THE VALUE"', value)

    return change


def set_part(key, value):
    return lambda tensors, metadata: metadata.update({key: value})


def drop_tensor(tensors, metadata):
    tensors.pop(next(iter(tensors)))


def other_dtype(tensors, metadata):
    name = next(name for name in tensors if name.endswith("_table"))
    tensors[name] = tensors[name].astype("float64")


def other_shape(tensors, metadata):
    name = next(name for name in tensors if name.endswith("_table"))
    tensors[name] = tensors[name][:-1]


def no_metadata(tensors, metadata):
    metadata.clear()


ODD = [
    *map(
        set_sums,
        ["null", "[]", "[1, 2, 3]", '["a", 1, 2, 3]', "[1, 2, 3, NaN]", "[1, 2, 3, 1e999]"],
    ),
    set_sums("[1, 2, 3, true]"),
    set_sums("[1, 2, 3, " + "9" * 400 + "]"),
    *(set_part("sums", value) for value in ("[]", "7", "not JSON", "[" * 10_000, '{"a": 1}')),
    drop_tensor,
    other_dtype,
    other_shape,
    no_metadata,
]


@pytest.fixture(scope="module")
def stopped(source, text, tmp_path_factory):
    """Folders of a conversion with healed tables that stopped before it wrote shards."""
    root = tmp_path_factory.mktemp("odd")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(tuning, "LEARNING_RATE", 0.1)

        def interrupt(*arguments):
            raise KeyboardInterrupt

        convert(source, root / "whole", options(text, heal=2), device="cpu")
        patched.setattr("spallm_convert.conversion.job._write_shards", interrupt)
        with pytest.raises(KeyboardInterrupt):
            convert(source, root / "out", options(text, heal=2), device="cpu")
    return root


def copied(stopped, tmp_path):
    return shutil.copytree(stopped / "out", tmp_path / "out")


@pytest.mark.parametrize("kind", ["block-00000", "healed"])
@pytest.mark.parametrize("number", range(len(ODD)))
def test_odd_files_count_as_missing(stopped, tmp_path, number, kind):
    out = copied(stopped, tmp_path)
    (file,) = out.rglob(f"{kind}-*.safetensors")
    whole = CalibratedModules(file.parent)
    assert whole.healing is not None
    write_again(file, ODD[number])
    store = CalibratedModules(file.parent)
    assert store.healing is None
    if kind == "block-00000" and ODD[number] not in {other_dtype, other_shape}:
        assert len(store._kept) == 7  # the other block


@pytest.mark.parametrize("change", [other_dtype, set_part("healing", '{"kl_before": NaN}')])
def test_they_are_made_again(stopped, source, text, tmp_path, change, monkeypatch):
    monkeypatch.setattr(tuning, "LEARNING_RATE", 0.1)
    out = copied(stopped, tmp_path)
    kind = "block-00000" if change is other_dtype else "healed"
    (file,) = out.rglob(f"{kind}-*.safetensors")
    write_again(file, change)
    convert(source, out, options(text, heal=2), device="cpu", resume=True)
    assert contents(out) == contents(stopped / "whole")


@pytest.mark.parametrize("value", [None, 7, [], {"a": [1, 2]}, "x"])
def test_odd_records_of_shards(source, text, tmp_path, value):
    config = options(text)
    with pytest.MonkeyPatch.context() as patched:

        def interrupt(*arguments):
            raise KeyboardInterrupt

        patched.setattr("spallm_convert.conversion.convert._publish", interrupt)
        with pytest.raises(KeyboardInterrupt):
            convert(source, tmp_path / "out", config, device="cpu")
    for path in (tmp_path / "out" / PARTIAL_FOLDER).glob("*.record.json"):
        record = json.loads(path.read_text())
        record["modules"] = value
        path.write_text(json.dumps(record))
    convert(source, tmp_path / "out", config, device="cpu", resume=True)
    convert(source, tmp_path / "whole", config, device="cpu")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
