"""What a dry run reads of files on the Hub gets the checks of files on this machine, and an index
cannot name more than its own files."""

import json
import struct

import pytest
from safetensors.torch import load_file, save

from helpers.hub_client import INDEX, WEIGHTS
from helpers.hub_fault_cases import assert_clear, run_cases
from spallm_formats import FormatError, read_header


def tensor(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def header_file(header, data=8, length=None):
    """A safetensors file with any header, as JSON or text, and zeros as its data."""
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + bytes(data)


HOSTILE = {
    "negative shape": header_file({"a": tensor(shape=[-2])}),
    "fractional shape": header_file({"a": tensor(shape=[2.0])}),
    "true in a shape": header_file({"a": tensor(shape=[True, 2])}),
    "text as shape": header_file({"a": tensor(shape="2")}),
    "dtype 5": header_file({"a": tensor(dtype=5)}),
    "unknown dtype": header_file({"a": tensor(dtype="F5")}),
    "huge shape": header_file({"a": tensor(shape=[1 << 40, 1 << 40])}),
    "negative offsets": header_file({"a": tensor(offsets=[-8, 0])}),
    "overlap": header_file({"a": tensor(), "b": tensor(offsets=[4, 12])}, data=12),
    "hole": header_file({"a": tensor(offsets=[4, 12])}, data=12),
    "too short": header_file({"a": tensor()}, data=7),
    "too long": header_file({"a": tensor()}, data=9),
    "deep": header_file("[" * 50_000),
    "deep in the second part": header_file(" " * 99_000 + "[" * 50_000),
    "list": header_file("[]"),
    "repeated": header_file('{"a": 1, "a": 2}'),
    "not JSON": header_file("{"),
    "beyond the file": header_file({"a": tensor()}, length=1 << 20),
    "beyond all": header_file({"a": tensor()}, length=(1 << 64) - 1),
    "empty": b"",
    "seven bytes": b"1234567",
    "pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 1\n",
}
NAMES = {
    "all": {"a": "*"},
    "outside": {"a": "../x.safetensors"},
    "below": {"a": "a/b.safetensors"},
    "hidden": {"a": ".x.safetensors"},
    "other": {"a": "notes.txt"},
    "absent": {"a": "model-00001-of-00002.safetensors"},
    "many": {f"t{n}": f"model-{n}.safetensors" for n in range(100_000)},
}
#: Changes of a model's config, tensors to leave out, and what is said of them.
INCOMPLETE = {
    "no norm": ({}, ("model.norm.weight",), "no tensor for model.norm.weight, expected by"),
    "no head": ({}, ("lm_head.weight",), "no tensor for lm_head.weight, expected by"),
    "vocabulary": ({"vocab_size": 256}, (), "[256, 64]"),
    "more blocks": ({"num_hidden_layers": 3}, (), "no tensor for model.layers.2.input_layernorm"),
    "fewer blocks": ({"num_hidden_layers": 1}, (), "has no block for model.layers.1.input_layer"),
}
SHARDS = ("one.safetensors", "two.safetensors")


def index(weight_map):
    return json.dumps({"metadata": {}, "weight_map": weight_map})


def incomplete(model, changes, lost):
    """A dry run of a model with other values in its config, and without some tensors."""
    tensors = load_file(model.folder / WEIGHTS)
    weights = save({name: value for name, value in tensors.items() if name not in lost})
    config = json.dumps(model.config | changes)
    files = {"config.json": config, WEIGHTS: weights.decode("latin-1")}
    return {"action": "plan", "files": files}


@pytest.fixture(scope="module")
def outcomes(tiny_llama):
    wanted = {}
    for name, data in HOSTILE.items():
        wanted[name] = {"action": "dry_run", "files": {WEIGHTS: data.decode("latin-1")}}
    long = header_file({"__metadata__": {"x": "y" * 150_000}, "a": tensor()})
    whole = {"action": "dry_run", "files": {WEIGHTS: long.decode("latin-1")}}
    short = header_file({"__metadata__": {"x": "y" * 150_000}})[:100_000].decode("latin-1")
    wanted["long"] = whole
    fault = {"kind": "range", "status": 200, "body": short, "headers": {"Content-Type": "x"}}
    wanted["cut short"] = whole | {"faults": [fault]}
    for name, weight_map in NAMES.items():
        files = {INDEX: index(weight_map), "secret.bin": "x", "x.safetensors": "x"}
        for action in ("download", "dry_run"):
            case = {"action": action, "files": files, "without": [WEIGHTS]}
            wanted[f"{action} {name}"] = case
    for name, (changes, lost, _) in INCOMPLETE.items():
        wanted[f"incomplete {name}"] = incomplete(tiny_llama, changes, lost)
    shards = {name: header_file({name[:3]: tensor()}).decode("latin-1") for name in SHARDS}
    maps = {
        "whole": {"one": SHARDS[0], "two": SHARDS[1]},
        "swapped": {"one": SHARDS[1], "two": SHARDS[0]},
        "more": {"one": SHARDS[0], "two": SHARDS[1], "three": SHARDS[1]},
    }
    for name, weight_map in maps.items():
        files = shards | {INDEX: index(weight_map)}
        wanted[f"index {name}"] = {"action": "dry_run", "files": files, "without": [WEIGHTS]}
    return run_cases(wanted, tiny_llama.folder)


@pytest.mark.parametrize("name", HOSTILE)
def test_a_header_gets_the_checks_of_a_local_file(outcomes, tmp_path, name):
    (tmp_path / WEIGHTS).write_bytes(HOSTILE[name])
    with pytest.raises(FormatError) as local:
        read_header(tmp_path / WEIGHTS)
    outcome = outcomes[name]
    assert outcome["error"] == "SourceError"
    assert outcome["text"] == f"{outcome['repo']}: {local.value}"
    assert outcome["text"].isprintable()


def test_a_long_header_takes_a_second_request(outcomes):
    assert outcomes["long"]["result"] == ["a"]
    assert [kind for kind, _ in outcomes["long"]["asked"]].count("range") == 2


def test_a_server_that_ignores_ranges_is_not_trusted(outcomes):
    assert_clear(outcomes["cut short"], "SourceError", WEIGHTS)


@pytest.mark.parametrize("action", ["download", "dry_run"])
@pytest.mark.parametrize("name", NAMES)
def test_an_index_names_files_of_the_repository_alone(outcomes, action, name):
    outcome = outcomes[f"{action} {name}"]
    assert_clear(outcome, "SourceError", INDEX)
    asked = [path for kind, path in outcome["asked"] if kind in {"get", "range", "head"}]
    assert not any(path.endswith((".safetensors", ".bin")) for path in asked)


def test_an_index_agrees_with_the_headers(outcomes):
    assert outcomes["index whole"]["result"] == ["one", "two"]
    assert_clear(outcomes["index swapped"], "SourceError", "'two' is in the index, but not in")
    assert_clear(outcomes["index more"], "SourceError", "'three' is in the index, but not in")


@pytest.mark.parametrize("name", INCOMPLETE)
def test_weights_that_do_not_fit_the_config_are_refused(outcomes, name):
    outcome = outcomes[f"incomplete {name}"]
    assert outcome["error"] == "SourceError", outcome
    assert INCOMPLETE[name][2] in outcome["text"]
    assert "use the config.json that belongs to these weights" in outcome["text"]
    assert "\n" not in outcome["text"]
