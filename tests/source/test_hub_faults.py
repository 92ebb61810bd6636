"""A Hub that fails, on a loopback server: every status at every kind of request, and connections
that break. Each ends in one line, or goes on after a wait."""

import huggingface_hub
import pytest
from packaging.version import Version

from helpers.hub_fault_cases import assert_clear, run_cases

#: Kind of request: action, fault, what the error names.
REQUESTS = {
    "list": ("download", {"kind": "info"}, "the list of its files"),
    "config head": ("download", {"kind": "head", "suffix": "/config.json"}, "config.json"),
    "config": ("download", {"kind": "get", "suffix": "/config.json"}, "config.json"),
    "weights head": ("download", {"kind": "head", "suffix": ".safetensors"}, "model.safetensors"),
    "weights": ("download", {"kind": "get", "suffix": ".safetensors"}, "model.safetensors"),
    "header": ("dry_run", {"kind": "range"}, "model.safetensors"),
    "create": ("push", {"kind": "create"}, "creation of the repository"),
    "visibility": ("push", {"kind": "info"}, "visibility of the repository"),
    "preupload": ("push", {"kind": "preupload"}, "upload"),
    "batch": ("push", {"kind": "batch"}, "upload"),
    "upload": ("push", {"kind": "upload"}, "upload"),
    "verify": ("push", {"kind": "verify"}, "upload"),
    "commit": ("push", {"kind": "commit"}, "commit"),
}
#: Requests that are repeated here. huggingface_hub repeats the others, and these are not repeated
#: for its answers a second time.
REPEATED_HERE = {"list", "header", "create", "visibility", "commit"}
#: Steps of an upload whose broken connections only newer versions of huggingface_hub repeat.
UPLOADS = {"preupload", "batch", "upload", "verify"}
REPEATS_UPLOADS = Version(huggingface_hub.__version__) >= Version("2")
STATUSES = (400, 401, 403, 404, 408, 409, 412, 413, 429, 500, 502, 503, 504)
#: Answers that may differ a moment later. Old versions of huggingface_hub give up at a 408.
PASSING = (429, 500, 502, 503, 504)
#: Requests without a body in the answer, which cannot break in the middle.
NO_BODY = {"config head", "weights head", "upload", "verify"}


def cases():
    """Cases by (request, fault, times): faults that stay, and faults that happen once or twice."""
    for name, (action, fault, _) in REQUESTS.items():
        for status in STATUSES:
            yield (name, status, "always"), action, fault | {"status": status}
        for status in PASSING:
            yield (name, status, "twice"), action, fault | {"status": status, "times": 2}
        for effect in ("close",) if name in NO_BODY else ("close", "cut"):
            yield (name, effect, "always"), action, fault | {"effect": effect}
            yield (name, effect, "once"), action, fault | {"effect": effect, "times": 1}
    convert = {"kind": "get", "suffix": ".safetensors"}
    yield ("convert", 503), "convert", convert | {"status": 503}
    yield ("convert", "close"), "convert", convert | {"effect": "close"}
    yield ("convert", "cut"), "convert", convert | {"effect": "cut"}


@pytest.fixture(scope="module")
def outcomes(tiny_llama):
    cases_by_name = {
        " ".join(map(str, key)): {"action": action, "faults": [fault]}
        for key, action, fault in cases()
    }
    cases_by_name["push exists"] = {"action": "push", "exists": True, "private": True}
    return run_cases(cases_by_name, tiny_llama.folder)


@pytest.mark.parametrize("status", STATUSES)
@pytest.mark.parametrize("name", REQUESTS)
def test_a_status_that_stays_is_one_line(outcomes, name, status):
    action, fault, named = REQUESTS[name]
    outcome = outcomes[f"{name} {status} always"]
    if (name, status) == ("create", 409):  # "exists already": a success, but no address comes here
        assert "the answer of http" in outcome["text"]
        return
    assert_clear(outcome, "HubError" if action == "push" else "SourceError", named, str(status))
    asked = [
        kind
        for kind, path in outcome["asked"]
        if fault["kind"] == kind and path.endswith(fault.get("suffix", ""))
    ]
    if status not in (408, *PASSING):
        assert outcome["waits"] == []
        assert len(asked) == 1
    elif name in REPEATED_HERE:
        assert len(outcome["waits"]) == 3
    assert sum(outcome["waits"]) < 40


@pytest.mark.parametrize("effect", ["close", "cut"])
@pytest.mark.parametrize("name", REQUESTS)
def test_a_connection_that_breaks_again_and_again_is_one_line(outcomes, name, effect):
    if effect == "cut" and name in NO_BODY:
        return
    action, _, named = REQUESTS[name]
    outcome = outcomes[f"{name} {effect} always"]
    kind = "HubError" if action == "push" else "SourceError"
    assert_clear(outcome, kind, named, "the Hub cannot be reached")
    assert outcome["waits"] != [] or (name in UPLOADS and not REPEATS_UPLOADS)
    assert sum(outcome["waits"]) < 40


def test_what_passes_is_waited_for(outcomes):
    passing = {
        name: outcome for name, outcome in outcomes.items() if name.endswith(("twice", "once"))
    }
    assert len(passing) > 80
    for name, outcome in passing.items():
        request, fault, _ = name.rsplit(" ", 2)
        if request in UPLOADS and fault in ("close", "cut") and not REPEATS_UPLOADS:
            continue  # a clear error, as if it happened again and again
        assert outcome["error"] == "", (name, outcome["text"])
        assert outcome["result"] != ""
        assert outcome["waits"] != []
        assert sum(outcome["waits"]) < 10
        if name.split()[0] in REPEATED_HERE:
            said = [line for line in outcome["log"].splitlines() if "next try in" in line]
            assert len(said) == len(outcome["waits"]), (name, outcome["log"])


def test_a_commit_whose_answer_was_lost_is_not_an_error(outcomes):
    """The second commit removes nothing, because the first one has done that."""
    assert outcomes["commit cut once"]["result"].startswith("http")
    asked = outcomes["commit cut once"]["asked"]
    assert [kind for kind, _ in asked].count("commit") == 2


def test_a_repository_that_exists_is_pushed_to(outcomes):
    assert outcomes["push exists"]["result"].startswith("http")


@pytest.mark.parametrize("fault", [503, "close", "cut"])
def test_a_conversion_that_cannot_download_leaves_no_folder(outcomes, fault):
    code, err, exists = outcomes[f"convert {fault}"]["result"]
    assert (code, exists) == (1, False)
    assert "Traceback" not in err
    last = err.splitlines()[-1]
    assert last.startswith("spallm-convert: error: org/case-")
    assert "model.safetensors" in last
