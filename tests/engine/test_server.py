"""The HTTP server: sets are loaded, used and unloaded by name, and bad ones are refused."""

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import openai
import psutil
import pytest

from helpers.engine_models import check_answers, prompts
from helpers.engine_runs import ENVIRONMENT

KIND = "mixed"


class Server:
    """A running server and its client."""

    def __init__(self, url, process, log):
        self.process, self.log = process, log
        self.client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)

    def complete(self, prompt, model, asked=8):
        done = self.client.completions.create(
            model=model,
            prompt=prompt,
            max_tokens=asked,
            temperature=0,
            logprobs=1,
            extra_body={"return_token_ids": True, "ignore_eos": True},
        )
        (choice,) = done.choices
        return {
            "prompt": prompt,
            "set": None if model == "base" else model,
            "tokens": choice.token_ids,
            "logprobs": choice.logprobs.token_logprobs,
            "asked": asked,
        }

    def load(self, name, folder, **more):
        body = {"lora_name": name, "lora_path": str(folder)} | more
        return self.client.post("/load_lora_adapter", body=body, cast_to=str)

    def unload(self, name):
        return self.client.post("/unload_lora_adapter", body={"lora_name": name}, cast_to=str)


@pytest.fixture(scope="module")
def server(sketched, sets, tmp_path_factory):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("server") / "log"
    command = [
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server"),
        *("--model", sketched(KIND), "--served-model-name", "base"),
        *("--host", "127.0.0.1", "--port", str(port)),
        *("--enable-lora", "--max-loras", "2", "--max-cpu-loras", "3"),
        *("--lora-modules", f"A={sets(KIND)['A']}"),
        *("--dtype", "float32", "--enforce-eager"),
        *("--max-model-len", "128", "--max-num-seqs", "16"),
    ]
    environment = os.environ | ENVIRONMENT | {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}
    del environment["VLLM_ENABLE_V1_MULTIPROCESSING"]
    with log.open("w") as output:
        process = subprocess.Popen(
            list(map(str, command)), env=environment, stdout=output, stderr=output
        )
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            assert process.poll() is None, log.read_text()[-4000:]
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/health"):
                break
            time.sleep(0.5)
        else:
            pytest.fail(log.read_text()[-4000:])
        yield Server(url, process, log)
    finally:
        process.terminate()
        process.wait(timeout=60)


def test_base_and_sets_answer_as_in_transformers(server, sketched, sets):
    server.load("B", sets(KIND)["B"])
    asked = [(prompt, name) for prompt in prompts() for name in ("base", "A", "B")]
    with ThreadPoolExecutor(len(asked)) as pool:
        answers = list(pool.map(lambda request: server.complete(*request), asked))
    check_answers(sketched(KIND), answers, sets(KIND))
    server.unload("B")
    with pytest.raises(openai.NotFoundError):
        server.complete(prompts(1)[0], "B")


def test_missing_folders_are_404(server, tmp_path):
    for folder in (tmp_path / "none", tmp_path):
        with pytest.raises(openai.NotFoundError):
            server.load("missing", folder)


def truncated(folder):
    file = folder / "sketch_tables.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def not_safetensors(folder):
    (folder / "sketch_tables.safetensors").write_bytes(b"no header here, but some bytes")


@pytest.mark.parametrize(
    ("damage", "reason"), [(truncated, "sketch_tables.safetensors"), (not_safetensors, "header")]
)
def test_damaged_sets_are_400_with_the_reason(server, sets, tmp_path, damage, reason):
    folder = shutil.copytree(sets(KIND)["B"], tmp_path / "damaged")
    damage(folder)
    with pytest.raises(openai.BadRequestError, match=f"sketch tables refused.*{reason}"):
        server.load("damaged", folder)
    assert server.complete(prompts(1)[0], "base")["tokens"]


def test_foreign_sets_are_400_with_the_reason(server, sets):
    with pytest.raises(openai.BadRequestError, match="made for index maps"):
        server.load("foreign", sets("tied")["A"])


def test_sets_with_norms_are_400_with_the_reason(server, sketched, tmp_path):
    from spallm_convert import load_sketched, save_tables, set_trainable

    model = load_sketched(sketched(KIND))
    set_trainable(model, norms=True)
    folder = save_tables(model, tmp_path / "norms")
    with pytest.raises(openai.BadRequestError) as found:
        server.load("norms", folder)
    assert str(found.value).count("only tables are served by request") == 1
    assert "stack trace" not in str(found.value)


def test_a_set_that_vanished_is_still_served(server, sketched, sets, tmp_path):
    folder = shutil.copytree(sets(KIND)["C"], tmp_path / "vanishing")
    server.load("C", folder)
    for name in "xyz":  # vLLM keeps three sets, and forgets C
        server.load(name, sets(KIND)["B"])
    shutil.rmtree(folder)
    check_answers(sketched(KIND), [server.complete(p, "C") for p in prompts()], sets(KIND))
    for name in ("C", *"xyz"):
        server.unload(name)


def test_a_set_that_was_damaged_later_leaves_the_others_alone(server, sketched, sets, tmp_path):
    folder = shutil.copytree(sets(KIND)["C"], tmp_path / "damaged-later")
    server.load("later", folder)
    for name in "xyz":
        server.load(name, sets(KIND)["B"])
    os.truncate(folder / "sketch_tables.safetensors", 1000)
    assert "nonsense" not in server.log.read_text()
    server.complete(prompts(1)[0], "later")
    assert "the answers of later are nonsense from now on" in server.log.read_text()
    check_answers(sketched(KIND), [server.complete(p, "A") for p in prompts()], sets(KIND))
    for name in ("later", *"xyz"):
        server.unload(name)


def test_loading_while_requests_run(server, sketched, sets):
    stop, answers = threading.Event(), []

    def ask(name):
        while not stop.is_set():
            answers.extend(server.complete(prompt, name, asked=4) for prompt in prompts())

    with ThreadPoolExecutor(2) as pool:
        asking = [pool.submit(ask, name) for name in ("base", "A")]
        for number in range(20):
            name = f"new-{number}"
            server.load(name, sets(KIND)["BC"[number % 2]])
            own = server.complete(prompts(1)[0], name, asked=4)
            answers.append(own | {"set": "BC"[number % 2]})
            server.unload(name)
        stop.set()
        for future in asking:
            future.result()
    assert len(answers) > 20
    check_answers(sketched(KIND), answers, sets(KIND))


def test_a_thousand_sets_leave_nothing_behind(server, sets):
    def state():
        first = psutil.Process(server.process.pid)
        processes = [first, *first.children(recursive=True)]
        return [(p.memory_info().rss, p.num_fds()) for p in processes]

    def cycle(count):
        for number in range(count):
            server.load(f"many-{number}", sets(KIND)["B"])
            server.unload(f"many-{number}")

    cycle(300)  # until as many files are open as may be
    before = state()
    cycle(700)
    size = (sets(KIND)["B"] / "sketch_tables.safetensors").stat().st_size
    for (memory, files), (memory_before, files_before) in zip(state(), before, strict=True):
        assert memory - memory_before < 100 * size
        assert files - files_before < 20
