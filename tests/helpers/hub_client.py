"""Run command lines against `hub_server`, each in a new process, and collect what they leave there.

The client reads its settings when it is imported. So everything that talks to the server runs in
subprocesses, several command lines or models in each.
"""

import json
import os
import subprocess
import sys
from dataclasses import dataclass

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
WRITE, READ = "write-token", "read-token"

#: Runs command lines from stdin, each with its token; what escapes them is on this stderr.
COMMAND_LINES = """
import contextlib, io, json, os, sys
from spallm_convert.cli import main
answers = {}
for name, (token, arguments) in json.load(sys.stdin).items():
    os.environ["HF_TOKEN"] = token
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main(arguments)
        except SystemExit as stop:
            code = stop.code
        except Exception as error:
            code = repr(error)
    answers[name] = code, out.getvalue(), err.getvalue()
print(json.dumps(answers))
"""


@dataclass(frozen=True)
class Answer:
    """Hold the results of a command line."""

    code: int | str
    out: str
    err: str


def run(script, stdin, environment):
    """Run a script in a new process; it must succeed and write nothing to stderr."""
    done = subprocess.run(
        [sys.executable, "-c", script],
        input=json.dumps(stdin),
        env=os.environ | {"TRANSFORMERS_VERBOSITY": "error"} | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), done.stderr


def command_lines(environment, cases):
    """Run command lines, each a token and arguments, one after another in one process."""
    cases = {name: (token, [*map(str, words)]) for name, (token, *words) in cases.items()}
    answers, escaped = run(COMMAND_LINES, cases, environment)
    assert escaped == ""
    return {name: Answer(*answer) for name, answer in answers.items()}


def assert_one_line(answer, *wanted):
    """Check for an error: exit code 1 and exactly one line, with these words in it."""
    assert answer.code == 1, answer
    assert answer.err.count("\n") == 1, answer.err
    assert answer.err.startswith("spallm-convert: error: ")
    for words in wanted:
        assert words in answer.err


def contents(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and not path.name.startswith(".")
    }


def on_server(hub, repo_id, revision="main"):
    files = hub.files(repo_id, revision)
    return {name: data for name, data in files.items() if name != ".gitattributes"}


def with_card(tiny_llama):
    """Return the files of a small random Llama with a card."""
    card = b"---\nlicense: apache-2.0\n---\n# tiny\n"
    return contents(tiny_llama.folder) | {"README.md": card}
