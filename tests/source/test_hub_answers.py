"""Answers that are none of the Hub's, on a loopback server: other text, redirects in a circle or to
other hosts, requests to wait, texts that hold a token."""

import pytest

from helpers.hub_fault_cases import assert_clear, run_cases

BODIES = {
    "empty": "",
    "html": "<html><body>Please log in to this network.</body></html>",
    "truncated": '{"id": "org/na',
    "null": "null",
    "list": "[]",
    "object": "{}",
    "text": '"yes"',
    "numbers": '{"id": 1, "sha": 2, "siblings": [{"rfilename": 3}], "files": [4], "objects": [5]}',
    "deep": "[" * 100_000,
}
#: Kind of request: action, and the name in the error.
TALKS = {
    "info": ("download", "the list of its files"),
    "head": ("download", ".json"),
    "create": ("push", "creation of the repository"),
    "preupload": ("push", "upload"),
    "batch": ("push", "upload"),
    "commit": ("push", "commit"),
}
FILES = {"get": "download", "range": "dry_run"}
ACTIONS = {kind: action for kind, (action, _) in TALKS.items()} | FILES
LOOP = {"status": 307, "headers": {"Location": "SELFPATH"}}
AWAY = {"status": 307, "headers": {"Location": "OTHERPATH"}}
WAITS = {
    "seconds": ({"Retry-After": "7"}, 7, 9),
    "for ever": ({"Retry-After": "99999999999"}, 60, 60),
    "past": ({"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}, 0, 0),
    "future": ({"Retry-After": "Fri, 31 Dec 2100 23:59:59 GMT"}, 60, 60),
    "nonsense": ({"Retry-After": "soon"}, 1, 1.25),
    "limit": ({"ratelimit": '"api";r=0;t=11'}, 11, 14),
    "not at the limit": ({"ratelimit": '"api";r=5;t=11'}, 1, 1.25),
}


def cases():
    for name, body in BODIES.items():
        for kind, (action, _) in TALKS.items():
            yield f"{kind} {name}", action, {"kind": kind, "status": 200, "body": body}
    for kind, action in ACTIONS.items():
        yield f"{kind} loop", action, {"kind": kind} | LOOP
        yield f"{kind} away", action, {"kind": kind} | AWAY
    for name, (headers, _, _) in WAITS.items():
        once = {"kind": "info", "status": 429, "headers": headers, "times": 1}
        yield f"wait {name}", "download", once
    echo = '{"error": "You sent: Authorization: Bearer write-token, hf_abcdefghij"}'
    yield "echo", "download", {"kind": "info", "status": 400, "body": echo}
    yield (
        "long",
        "download",
        {"kind": "info", "status": 400, "body": '{"error": "' + "\\u001b[2J x" * 9999 + '"}'},
    )
    yield "file of another size", "download", {"kind": "get", "status": 200, "body": "hello"}
    yield "no part", "dry_run", {"kind": "range", "status": 206, "body": "hello"}
    yield (
        "no size",
        "dry_run",
        {"kind": "range", "status": 206, "headers": {"Content-Range": "bytes 0-4/*"}},
    )


@pytest.fixture(scope="module")
def outcomes(tiny_llama):
    wanted = {name: {"action": action, "faults": [fault]} for name, action, fault in cases()}
    wanted["not a token"] = {"action": "download", "token": "hf_s\u00e9cret-write-token"}
    return run_cases(wanted, tiny_llama.folder)


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("kind", TALKS)
def test_an_answer_of_the_wrong_type_is_one_line(outcomes, kind, body):
    action, named = TALKS[kind]
    outcome = outcomes[f"{kind} {body}"]
    assert_clear(outcome, "HubError" if action == "push" else "SourceError", named)
    assert "cannot be used" in outcome["text"]


def test_redirects_in_a_circle_are_one_line(outcomes):
    for kind, action in ACTIONS.items():
        outcome = outcomes[f"{kind} loop"]
        assert_clear(outcome, "HubError" if action == "push" else "SourceError")
        assert "cannot be used" in outcome["text"]


def test_a_token_stays_with_its_host(outcomes):
    """Requests that a redirect leads to another host go there without it."""
    for kind in ACTIONS:
        outcome = outcomes[f"{kind} away"]
        assert kind == "head" or outcome["elsewhere"] != [], kind
        assert {sent for _, sent in outcome["elsewhere"]} <= {None}, kind
    for kind in ("info", "get", "range"):
        assert outcomes[f"{kind} away"]["error"] == ""


@pytest.mark.parametrize("name", WAITS)
def test_the_wait_that_the_hub_asks_for(outcomes, name):
    _, least, most = WAITS[name]
    outcome = outcomes[f"wait {name}"]
    assert outcome["error"] == ""
    (wait,) = outcome["waits"]
    assert least <= wait <= most
    assert f"429 Too Many Requests; next try in {wait:.0f} s" in outcome["log"]


def test_a_token_in_an_answer_is_not_shown(outcomes):
    assert_clear(outcomes["echo"], "SourceError", "400", "Bearer ***")
    assert "abcdefghij" not in outcomes["echo"]["text"]
    assert_clear(outcomes["not a token"], "SourceError", "HF_TOKEN holds characters")


def test_a_long_answer_is_cut_and_escaped(outcomes):
    assert_clear(outcomes["long"], "SourceError", "400", r"\x1b[2J x", "...)")


@pytest.mark.parametrize("name", ["file of another size", "no part", "no size"])
def test_a_file_that_is_not_the_one_asked_for(outcomes, name):
    assert_clear(outcomes[name], "SourceError", ".json" if name.startswith("file") else "model")
    assert "cannot be used" in outcomes[name]["text"]
