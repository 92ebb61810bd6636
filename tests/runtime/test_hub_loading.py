"""Checkpoints on the Hub are checked like those in folders, whatever loads them."""

import json

import pytest

from helpers.hub_client import INDEX, READ, WEIGHTS, contents, run
from helpers.hub_server import HubServer
from spallm_convert import SketchConfig, convert

#: Loads each repository by `load_sketched` and by the Auto class, with a token: all from the Hub,
#: then all from the cache.
LOADS = """
import json, sys
import spallm_convert
from transformers import AutoModelForCausalLM
ways = {"load_sketched": spallm_convert.load_sketched,
        "auto": AutoModelForCausalLM.from_pretrained}
tokens = json.load(sys.stdin)
answers = [{}, {}]
for cached in (False, True):
    for name, token in tokens.items():
        for way, load in ways.items():
            try:
                answer = type(load(name, token=token, local_files_only=cached)).__name__
            except Exception as error:
                answer = f"{type(error).__name__}: {error}"
            answers[cached][f"{name} {way}"] = answer
print(json.dumps(answers))
"""
WAYS = ["load_sketched", "auto"]
TWO_KINDS = f"found both {WEIGHTS} and {INDEX}"

#: Repository: words of the error of both ways to load it.
REFUSED = {
    "org/two-kinds": TWO_KINDS,
    "org/repeated": "config.json: repeated keys in JSON",
    "org/unlisted": "is a sketch table, but config.json lists no such module",
    "org/truncated": "truncated or overlong",
    "org/unknown-key": "unknown key",
    "org/integers": "cannot compute in dtype torch.int8",
}


@pytest.fixture(scope="module")
def sketched(tiny_llama, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sketched") / "out"
    convert(tiny_llama.folder, folder, SketchConfig(effort="fast", groups_per_row=2))
    files = contents(folder)
    return {name: files[name] for name in ("config.json", WEIGHTS)}


def repositories(sketched):
    """Return the files of damaged repositories, and of one that is not damaged."""
    config = json.loads(sketched["config.json"])
    modules = config["quantization_config"]["modules"]
    fewer = dict(list(modules.items())[1:])
    index = json.dumps({"metadata": {}, "weight_map": {"lm_head.weight": WEIGHTS}}).encode()

    def with_config(**changes):
        return {**sketched, "config.json": json.dumps(config | changes).encode()}

    def with_quantization(**changes):
        return with_config(quantization_config=config["quantization_config"] | changes)

    repeated = sketched["config.json"].rstrip()[:-1] + b', "dtype": "float16"}'
    return {
        "org/whole": sketched,
        "org/two-kinds": {**sketched, INDEX: index},
        "org/repeated": {**sketched, "config.json": repeated},
        "org/unlisted": with_quantization(modules=fewer),
        "org/truncated": {**sketched, WEIGHTS: sketched[WEIGHTS][:-7]},
        "org/unknown-key": with_quantization(surprise=1),
        "org/integers": with_config(dtype="int8"),
        "org/no-config": {WEIGHTS: sketched[WEIGHTS]},
        "org/bad-value": with_config(num_attention_heads=0),
    }


@pytest.fixture(scope="module")
def answers(sketched, tmp_path_factory):
    """The answers from the Hub, those from the cache, and the requests."""
    with HubServer() as hub:
        for name, files in repositories(sketched).items():
            hub.add_repo(name, files)
        hub.add_repo("org/secret", repositories(sketched)["org/two-kinds"], private=True)
        tokens = dict.fromkeys(hub.repos) | {"org/secret": READ}
        environment = hub.environment(home=tmp_path_factory.mktemp("home"))
        (online, cached), _ = run(LOADS, tokens, environment)
        yield online, cached, hub.requests


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_a_whole_checkpoint_loads(answers, way):
    online, cached, requests = answers
    assert online[f"org/whole {way}"] == cached[f"org/whole {way}"] == "LlamaForCausalLM"
    asked = [path for _, path in requests if "org/whole" in path and path.endswith(INDEX)]
    assert len(asked) == 1


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", REFUSED)
def test_damage_is_refused(answers, name, way):
    online, cached, _ = answers
    for answer in (online, cached):
        assert answer[f"{name} {way}"].startswith("FormatError: ")
        assert REFUSED[name] in answer[f"{name} {way}"]


@pytest.mark.slow
def test_what_stops_transformers_first_is_clear_too(answers):
    online, cached, _ = answers
    for name, message in {
        "org/no-config": "org/no-config: no config.json in the repository",
        "org/bad-value": "org/bad-value: transformers cannot build the model of config.json",
    }.items():
        assert online[f"{name} load_sketched"].startswith("FormatError: ")
        assert message in online[f"{name} load_sketched"]
        assert cached[f"{name} load_sketched"].count("\n") == 0


@pytest.mark.slow
def test_a_private_repository_is_asked_with_the_token(answers):
    online, _, _ = answers
    assert TWO_KINDS in online["org/secret load_sketched"]
