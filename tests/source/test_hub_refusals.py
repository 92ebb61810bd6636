"""What the Hub, on a loopback server, refuses: each in one line, and nothing is left behind."""

import json
import socket
from pathlib import Path

import pytest

from helpers.hub_client import (
    INDEX,
    READ,
    WEIGHTS,
    WRITE,
    assert_one_line,
    command_lines,
    on_server,
    with_card,
)
from helpers.hub_server import HubServer

GPTQ = {"quant_method": "gptq", "bits": 4}


@pytest.fixture(scope="module")
def tiny(tiny_llama):
    return with_card(tiny_llama)


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return tmp_path_factory.mktemp("work")


@pytest.fixture(scope="module")
def sketched():
    """A sketched checkpoint, to push."""
    return Path(__file__).parents[2] / "formats" / "golden" / "cluster-4bit"


#: Name: token, arguments, words of the error. Pushes are refused at their last step.
REFUSED = {
    "missing": ("", ["org/missing"], ["org/missing: no such repository"]),
    "missing, dry run": ("", ["org/missing", "--dry-run"], ["org/missing: no such repository"]),
    "missing, with a token": (READ, ["org/missing"], ["org/missing: no such repository"]),
    "private": ("", ["org/private"], ["org/private: no such repository", "private"]),
    "gated": ("", ["org/gated"], ["org/gated is gated", "HF_TOKEN"]),
    "gated, dry run": ("", ["org/gated", "--dry-run"], ["org/gated is gated", "HF_TOKEN"]),
    "gated, other account": (READ, ["org/gated"], ["org/gated is gated", "HF_TOKEN"]),
    "wrong token": ("stale", ["org/tiny"], ["org/tiny", "401"]),
    "pickle": ("", ["org/pickle"], ["org/pickle: no model.safetensors", "pytorch_model.bin"]),
    "pickle, dry run": ("", ["org/pickle", "--dry-run"], ["org/pickle: no model.safetensors"]),
    "no config": ("", ["org/no-config"], ["org/no-config: no config.json"]),
    "revision": ("", ["org/tiny", "--revision=v9"], ["org/tiny: no such revision"]),
    "revision, dry run": (
        "",
        ["org/tiny", "--dry-run", "--revision=v9"],
        ["org/tiny: no such revision"],
    ),
    "quantized": ("", ["org/quantized"], ["org--quantized", "already quantized (gptq)"]),
    "broken index": ("", ["org/broken-index"], ["org/broken-index", INDEX]),
    "broken index, dry run": ("", ["org/broken-index", "--dry-run"], ["org/broken-index"]),
    "broken header": ("", ["org/broken-header"], [WEIGHTS]),
    "broken header, dry run": ("", ["org/broken-header", "--dry-run"], ["org/broken-header"]),
    "push, no token": ("", ["push", "SKETCHED", "org/new"], ["org/new", "HF_TOKEN"]),
    "convert and push, no token": (
        "",
        ["org/tiny", "--push-to-hub=org/new"],
        ["org/new", "HF_TOKEN"],
    ),
    "push, read-only": (READ, ["push", "SKETCHED", "org/new"], ["org/new", "403"]),
    "push over, read-only": (READ, ["push", "SKETCHED", "org/mine"], ["org/mine", "403"]),
    "push over, private": (
        WRITE,
        ["push", "SKETCHED", "org/mine", "--private"],
        ["org/mine", "public"],
    ),
    "push, refused": (WRITE, ["push", "SKETCHED", "org/mine"], ["org/mine", "over the limit"]),
    "push, bad name": (WRITE, ["push", "SKETCHED", "org//x"], ["org//x: not a repository id"]),
    "push, dense": (WRITE, ["push", "DENSE", "org/new"], ["config.json"]),
}


@pytest.fixture(scope="module")
def refusals(tiny, sketched, work):
    """The answers to REFUSED, with output below `work`; then the server."""
    dense = work / "dense"
    dense.mkdir()
    (dense / "config.json").write_bytes(tiny["config.json"])
    (dense / WEIGHTS).write_bytes(tiny[WEIGHTS])
    places = {"SKETCHED": sketched, "DENSE": dense}
    config, card = {"config.json": tiny["config.json"]}, {"README.md": b"# no metadata\n"}
    with HubServer() as hub:
        hub.add_repo("org/tiny", tiny)
        hub.add_repo("org/private", tiny, private=True)
        hub.add_repo("org/gated", tiny, gated=True)
        hub.add_repo("org/pickle", {**config, "pytorch_model.bin": b"\0"})
        hub.add_repo("org/no-config", {WEIGHTS: tiny[WEIGHTS]})
        quantized = json.loads(tiny["config.json"]) | {"quantization_config": GPTQ}
        hub.add_repo("org/quantized", {**tiny, "config.json": json.dumps(quantized).encode()})
        hub.add_repo("org/broken-index", {**config, INDEX: b"[]"})
        hub.add_repo("org/broken-header", {**config, **card, WEIGHTS: b"\xff" * 64})
        hub.add_repo("org/mine", card)
        hub.refuse_push = "This account is over the limit.\nSee the page of plans…"
        cases = {}
        for name, (token, words, _) in REFUSED.items():
            output = [] if words[0] == "push" else ["--output-dir", work / "refused" / name]
            cases[name] = (token, *(places.get(word, word) for word in words), *output)
        yield command_lines(hub.environment(home=work / "refused-home"), cases), hub


@pytest.mark.parametrize("name", REFUSED)
def test_refusal_is_one_line(refusals, work, name):
    answers, _ = refusals
    assert_one_line(answers[name], *REFUSED[name][2])
    assert not (work / "refused" / name).exists()


def test_refusals_leave_no_trace(refusals):
    _, hub = refusals
    assert "org/new" not in hub.repos
    assert on_server(hub, "org/mine").keys() == {"README.md"}
    weights = [path for _, path in hub.requests if "quantized" in path and path.endswith(WEIGHTS)]
    assert weights == []


def test_no_network(sketched, tmp_path):
    """Also that what can be refused without a request is: here a request would fail otherwise."""
    (tmp_path / "empty").mkdir()
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # not listening, so connections are refused
        environment = {
            "HF_ENDPOINT": f"http://127.0.0.1:{closed.getsockname()[1]}",
            "HF_HOME": str(tmp_path / "home"),
            "HF_HUB_CACHE": str(tmp_path / "home" / "hub"),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "no_proxy": "127.0.0.1",
        }
        answers = command_lines(
            environment,
            {
                "convert": ("", "org/tiny", "--output-dir", tmp_path / "output"),
                "dry run": ("", "org/tiny", "--dry-run"),
                "push": (WRITE, "push", sketched, "org/new"),
                "no token": ("", "push", sketched, "org/new"),
                "not a checkpoint": (WRITE, "push", tmp_path / "empty", "org/new"),
                "not there": (WRITE, "push", tmp_path / "missing", "org/new"),
            },
        )
    assert_one_line(
        answers["convert"], "org/tiny: the list of its files: the Hub cannot be reached"
    )
    assert_one_line(
        answers["dry run"], "org/tiny: the list of its files: the Hub cannot be reached"
    )
    assert_one_line(
        answers["push"], "org/new: creation of the repository: the Hub cannot be reached"
    )
    assert_one_line(answers["no token"], "org/new", "HF_TOKEN")
    assert_one_line(answers["not a checkpoint"], str(tmp_path / "empty"))
    assert_one_line(answers["not there"], str(tmp_path / "missing"))
    assert not (tmp_path / "output").exists()
