"""Properties of the format library for any input, against torch, safetensors and the system."""

import json
import os
import struct
from pathlib import Path

import numpy as np
import pytest
import safetensors
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spallm_convert import Report
from spallm_formats import (
    ITEM_BYTES,
    FormatError,
    SketchMetadata,
    TablesMetadata,
    TensorSpec,
    build_header,
    from_float32,
    pack,
    pack_reference,
    read_header,
    row_bytes,
    to_float32,
    unpack,
    unpack_reference,
)
from spallm_formats.packing import padding_is_zero
from spallm_formats.work_folder import is_inside

SAME_EVERY_TIME = settings(derandomize=True, deadline=5_000, max_examples=100, database=None)

NAMES = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)
ATOMS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["spallm", "cluster", "hash", "bfloat16", "spallm-tables", "a" * 64])
)
ANY_JSON = st.recursive(
    ATOMS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)
SKETCH = {
    "quant_method": "spallm",
    "format_version": 1,
    "bits": 3,
    "mapping": "cluster",
    "hash_seed": 0,
    "table_dtype": "bfloat16",
    "modules": {
        "a": {"in_features": 8, "out_features": 4, "bits": 3, "groups_per_row": 2},
        "b.w": {
            "in_features": 6,
            "out_features": 2,
            "bits": 2,
            "groups_per_row": 1,
            "experts": 5,
            "transposed": True,
        },
    },
}
TABLES = {
    "format": "spallm-tables",
    "format_version": 1,
    "base_model": None,
    "base_revision": None,
    "fingerprint": "a" * 64,
}
REPORT = {
    "source": {"model": "model", "revision": None, "license": None, "files": {}},
    "options": {},
    "versions": {},
    "totals": {
        "sketched_weights": 1,
        "kept_weights": 1,
        "bits_per_weight": 4.5,
        "source_bytes": 2,
        "sketched_bytes": 1,
        "ratio": 2.0,
        "relative_error": 0.1,
    },
    "files": {"config.json": {"sha256": "a" * 64, "bytes": 2}},
    "modules": [],
    "left_dense": {"lm_head": "not in a block"},
}


def changed(sound):
    """Return documents like a sound one: with one part replaced by anything, or anything."""

    def put(place, value):
        document = json.loads(json.dumps(sound))
        container = document
        for key in place[:-1]:
            container = container[key]
        container[place[-1]] = value
        return document

    places = list(_places(sound, ()))
    return ANY_JSON | st.builds(put, st.sampled_from(places), ANY_JSON)


def _places(document, above):
    if isinstance(document, dict):
        yield (*above, "surprise")
        for key, value in document.items():
            yield (*above, key)
            yield from _places(value, (*above, key))


def parsed_or_refused(parse):
    """Return what is parsed; None if it is refused in one line that can be printed."""
    try:
        return parse()
    except FormatError as error:
        lines = str(error).splitlines()
        refused = error.problems and len(lines) == 1 and len(lines[0]) < 2_000
    assert refused, lines
    return None


@st.composite
def codes(draw):
    bits = draw(st.integers(1, 8))
    rows, columns = draw(st.integers(0, 6)), draw(st.integers(0, 300))
    seed = draw(st.integers(0, 2**32 - 1))
    made = np.random.default_rng(seed).integers(0, 1 << bits, (rows, columns))
    return made.astype(np.uint8), bits


@SAME_EVERY_TIME
@given(codes())
def test_codes_are_unpacked_as_they_were_packed(drawn):
    made, bits = drawn
    packed = pack(made, bits)
    assert packed.shape == (len(made), row_bytes(made.shape[1], bits))
    np.testing.assert_array_equal(packed, pack_reference(made, bits))
    assert padding_is_zero(packed, bits, made.shape[1])
    for function in (unpack, unpack_reference):
        np.testing.assert_array_equal(function(packed, bits, made.shape[1]), made)


@SAME_EVERY_TIME
@given(codes(), st.integers(0, 2**32 - 1))
def test_any_bytes_unpack_alike(drawn, seed):
    made, bits = drawn
    columns = made.shape[1]
    packed = np.random.default_rng(seed).integers(0, 256, (len(made), row_bytes(columns, bits)))
    packed = packed.astype(np.uint8)
    found = unpack(packed, bits, columns)
    np.testing.assert_array_equal(found, unpack_reference(packed, bits, columns))
    assert padding_is_zero(packed, bits, columns) == (pack(found, bits) == packed).all()


@SAME_EVERY_TIME
@given(st.lists(st.integers(0, 2**32 - 1), max_size=40))
def test_any_float_is_rounded_as_torch_does(patterns):
    values = np.array(patterns, np.uint32).view(np.float32)
    for dtype, torchs in (
        ("BF16", torch.bfloat16),
        ("F16", torch.float16),
        ("F32", torch.float32),
    ):
        ours = to_float32(from_float32(values, dtype).tobytes(), dtype)
        theirs = torch.from_numpy(values.copy()).to(torchs).float().numpy()
        np.testing.assert_array_equal(ours, theirs)
        finite = ~np.isnan(theirs)
        assert (np.signbit(ours) == np.signbit(theirs))[finite].all()


@SAME_EVERY_TIME
@given(st.sampled_from(["BF16", "F16", "F32"]), st.binary(max_size=64))
def test_any_stored_float_is_read_as_torch_reads_it(dtype, data):
    data = data[: len(data) // 4 * 4]
    if not data:
        return
    torchs = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}[dtype]
    theirs = torch.frombuffer(bytearray(data), dtype=torchs).float().numpy()
    np.testing.assert_array_equal(to_float32(data, dtype), theirs)


SPECS = st.lists(
    st.builds(
        TensorSpec,
        NAMES.filter(lambda name: name != "__metadata__"),
        st.sampled_from(["U8", "BF16", "F16", "F32", "I64", "F64", "BOOL"]),
        st.lists(st.integers(0, 4), max_size=3).map(tuple),
    ),
    max_size=6,
    unique_by=lambda spec: spec.name,
)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("properties") / "file.safetensors"


def shown_by_safetensors(path):
    """Return dtype and shape by name, as the safetensors library reads them."""
    with safetensors.safe_open(path, framework="numpy") as file:
        parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        return {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in parts.items()}


@SAME_EVERY_TIME
@given(SPECS)
def test_the_safetensors_library_reads_every_header_that_is_built(path, specs):
    header, offsets = build_header(specs)
    body = os.urandom(sum(spec.nbytes for spec in specs))
    path.write_bytes(header + body)
    expected = {spec.name: (spec.dtype, spec.shape) for spec in specs}
    assert shown_by_safetensors(path) == expected
    found = read_header(path)
    assert {name: (tensor.dtype, tensor.shape) for name, tensor in found.items()} == expected
    assert {name: tensor.offset for name, tensor in found.items()} == offsets


@st.composite
def spoiled_headers(draw):
    """Return a safetensors file whose header is a little wrong, or not wrong at all."""
    specs = draw(SPECS)
    header, _ = build_header(specs)
    document = json.loads(header[8:])
    names = [name for name in document if name != "__metadata__"]
    for _ in range(draw(st.integers(0, 2))):
        if not names:
            break
        entry = document[draw(st.sampled_from(names))]
        key = draw(st.sampled_from(["dtype", "shape", "data_offsets", "surprise"]))
        sizes = st.lists(st.integers(-1, 40) | st.just(2**63), max_size=3)
        entry[key] = draw(sizes | st.sampled_from([*ITEM_BYTES, "F4", None]) | ATOMS)
    if draw(st.booleans()):
        document["__metadata__"] = draw(ANY_JSON)
    text = json.dumps(document).encode("utf-8", "replace")
    length = len(text) + draw(st.sampled_from([0, 0, 0, 0, -1, 1, 2**40]))
    body = bytes(sum(spec.nbytes for spec in specs) + draw(st.sampled_from([0, 0, 0, 1])))
    return struct.pack("<Q", length) + text + body


@settings(SAME_EVERY_TIME, max_examples=150)
@given(spoiled_headers())
def test_the_safetensors_library_reads_every_header_that_is_accepted(path, data):
    path.write_bytes(data)
    try:
        found = read_header(path)
    except FormatError:
        return
    shapes = {name: (tensor.dtype, tensor.shape) for name, tensor in found.items()}
    assert shown_by_safetensors(path) == shapes


@pytest.mark.parametrize(
    ("parse", "sound"), [(SketchMetadata.from_json, SKETCH), (TablesMetadata.from_json, TABLES)]
)
@settings(SAME_EVERY_TIME, max_examples=200)
@given(data=st.data())
def test_any_json_is_metadata_or_an_error_of_the_format(parse, sound, data):
    assert parse(sound).to_json() == sound
    document = data.draw(changed(sound))
    parsed = parsed_or_refused(lambda: parse(document))
    assert parsed is None or parse(parsed.to_json()) == parsed


MODULES = st.fixed_dictionaries(
    {
        "in_features": st.just(12),
        "out_features": st.integers(1, 3),
        "bits": st.just(3),
        "groups_per_row": st.sampled_from([1, 2, 3, 4, 6, 12]),
    },
    optional={"experts": st.integers(1, 3), "transposed": st.just(True)},
)
ALIKE = st.lists(st.sampled_from(["", ".weight", "_table"]), max_size=3).map("".join)


@SAME_EVERY_TIME
@given(st.dictionaries(ALIKE.map("a{}".format), MODULES, min_size=1, max_size=4))
def test_modules_are_refused_if_and_only_if_names_of_tensors_clash(modules):
    document = SKETCH | {"modules": modules}
    names = [name if "experts" in m else name + ".weight" for name, m in modules.items()]
    clash = len({*names, *(name + "_table" for name in names)}) < 2 * len(names)
    reserved = any(name.endswith(".weight_table") for name in names)
    parsed = parsed_or_refused(lambda: SketchMetadata.from_json(document))
    assert (parsed is None) == (clash or reserved)
    if parsed is not None:
        assert parsed.to_json() == document
        stored = parsed.tensors()
        assert [*stored] == [part for name in names for part in (name, name + "_table")]
        for (name, module), index_map in zip(modules.items(), names, strict=True):
            leading = (module["experts"],) if "experts" in module else ()
            rows = (*leading, module["out_features"])
            assert stored[index_map].shape == (*rows, row_bytes(12, 3))
            assert stored[index_map + "_table"].shape == (*rows, module["groups_per_row"], 8)
            assert parsed.modules[name].weights == 12 * np.prod(rows)


@settings(SAME_EVERY_TIME, max_examples=200)
@given(changed(REPORT))
def test_any_json_is_a_report_or_an_error_of_the_format(path, document):
    (path.parent / "conversion.json").write_text(json.dumps(document))
    found = parsed_or_refused(lambda: Report.read(path.parent))
    if found is not None:
        assert all(is_inside(name) for name in found.files)
        assert isinstance(found.source["model"], str)
        assert found.totals["sketched_weights"] > 0


PARTS = st.sampled_from(["a", "b.json", "..", ".", "", "...", "..a", " ", "C:", "~", "é"])


@SAME_EVERY_TIME
@given(st.lists(PARTS, min_size=1, max_size=5).map("/".join))
def test_what_is_inside_stays_below_the_folder(name):
    folder = "/folder/of/output"
    joined = os.path.normpath(Path(folder) / name)
    stays = joined == folder or joined.startswith(folder + "/")
    assert not is_inside(name) or stays
    if is_inside(name):
        assert not Path(name).is_absolute()


@SAME_EVERY_TIME
@given(st.lists(st.sampled_from(["a", "b.json", "...", "..a", "é"]), min_size=1, max_size=5))
def test_ordinary_names_are_inside(parts):
    assert is_inside("/".join(parts))
