"""Send requests to a faulty `hub_server` in one process, and tell how each of them ended.

Importing the client takes seconds, so one process goes through all cases. The server runs in it
too: the client reads its address when it is imported.
"""

import contextlib
import io
import json
import logging
import os
import sys
import tempfile
import time
import traceback
from pathlib import Path

from .hub_faults import Fault
from .hub_server import HubServer

#: Cases from stdin to outcomes; see `outcomes`.
SCRIPT = "from helpers.hub_fault_client import main; main()"
TOKEN = "write-token"


def main() -> None:
    """Read cases from stdin, by name, and print their outcomes."""
    wanted = json.load(sys.stdin)
    with HubServer() as hub, HubServer() as other, tempfile.TemporaryDirectory() as home:
        os.environ |= hub.environment(TOKEN, home=home)
        client = _Client(hub, other, Path(wanted["pushed"]), Path(wanted["model"]), Path(home))
        print(json.dumps({name: client.run(case) for name, case in wanted["cases"].items()}))


class _Client:
    """Run cases: an action, and the faults that happen during it."""

    def __init__(
        self, hub: HubServer, other: HubServer, pushed: Path, model: Path, home: Path
    ) -> None:
        self.hub, self.other, self.pushed, self.home = hub, other, pushed, home
        self.model = {path.name: path.read_bytes() for path in model.iterdir() if path.is_file()}
        self.waits: list[float] = []
        self.log = io.StringIO()
        logging.basicConfig(stream=self.log)
        time.sleep = self.waits.append  # no test waits
        self.count = 0

    def run(self, case: dict) -> dict:
        """Return how a case ended: its error, waits, log, and the requests that were sent."""
        self.count += 1
        repo = f"org/case-{self.count}"
        self.waits.clear()
        self.log.seek(0)
        self.log.truncate()
        self.hub.objects.clear()
        self.hub.faults.set()
        if case["action"] != "push" or case.get("exists"):
            files = self._files(case)
            self.hub.add_repo(repo, files, private=case.get("private", False))
            self.other.add_repo(repo, files)
        os.environ["HF_TOKEN"] = case.get("token", TOKEN)
        self.folder = Path(case.get("folder", self.pushed))
        self.hub.faults.set(*(self._fault(fault) for fault in case.get("faults", [])))
        before, before_other = len(self.hub.kinds), len(self.other.kinds)
        outcome = {"repo": repo, "error": "", "text": "", "result": ""}
        try:
            outcome["result"] = getattr(self, case["action"])(repo)
        except Exception as error:  # whatever it is, the test decides
            outcome |= {"error": type(error).__name__, "text": str(error)}
            outcome["traceback"] = "".join(traceback.format_exception(error))
        return outcome | {
            "waits": list(self.waits),
            "log": self.log.getvalue(),
            "files": sorted(self.hub.files(repo)) if repo in self.hub.repos else [],
            "asked": [[kind, path] for kind, path, _ in self.hub.kinds[before:]],
            "elsewhere": [[kind, sent] for kind, _, sent in self.other.kinds[before_other:]],
        }

    def _files(self, case: dict) -> dict[str, bytes]:
        """Return the files of the case's repository: the model's, and what the case says."""
        own = {name: text.encode("latin-1") for name, text in case.get("files", {}).items()}
        return {n: d for n, d in self.model.items() if n not in case.get("without", ())} | own

    def _fault(self, fault: dict) -> Fault:
        port = self.other.endpoint.rpartition(":")[2]
        headers = {
            name: value.replace("OTHER", f"http://localhost:{port}").replace(
                "SELF", self.hub.endpoint
            )
            for name, value in fault.get("headers", {}).items()
        }
        return Fault(**fault | {"headers": headers})

    def download(self, repo: str) -> object:
        from spallm_convert.source.hub import download

        return str(download(repo, None)[0])

    def dry_run(self, repo: str) -> object:
        from spallm_convert.source.hub import remote_checkpoint

        return sorted(remote_checkpoint(repo, None).tensors)

    def plan(self, repo: str) -> object:
        from spallm_convert import plan_conversion

        return sorted(plan_conversion(repo).layers)

    def push(self, repo: str) -> object:
        from spallm_convert.conversion.push import push_to_hub

        return push_to_hub(self.folder, repo, private=True)

    def convert(self, repo: str) -> object:
        from spallm_convert.cli import main

        err = io.StringIO()
        output = self.home / repo
        with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()):
            try:
                main([repo, "-o", str(output), "-q"])
            except SystemExit as stop:
                return [stop.code, err.getvalue(), output.exists()]
