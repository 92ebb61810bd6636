"""The Hub, on a loopback server: convert from it, push to it, load from it, with a network and
without."""

import json
import shutil

import pytest

from helpers import hub_routes
from helpers.hub_client import (
    INDEX,
    READ,
    WEIGHTS,
    WRITE,
    assert_one_line,
    command_lines,
    contents,
    on_server,
    run,
    with_card,
)
from helpers.hub_faults import Fault
from helpers.hub_server import HubServer
from helpers.quantized_models import fp8_blocks, save_pair
from helpers.tiny_models import save_tiny_llama
from helpers.tiny_tokenizer import tiny_tokenizer
from spallm_convert import FormatError, convert, load_sketched, push_to_hub, save_tables

#: Loads models from stdin, by `load_sketched` or by the Auto class, to digests of their logits.
LOADS = """
import hashlib, json, sys
import spallm_convert
from transformers import AutoModelForCausalLM
import torch
loaders = {"load_sketched": spallm_convert.load_sketched,
           "auto": AutoModelForCausalLM.from_pretrained}
digests = {}
for name, (loader, model, options) in json.load(sys.stdin).items():
    try:
        loaded = loaders[loader](model, **options)
    except Exception as error:
        digests[name] = f"{type(error).__name__}: {error}"
        continue
    with torch.no_grad():
        logits = loaded(torch.arange(24).reshape(2, 12)).logits
    assert logits.isfinite().all() and logits.std() > 0
    digests[name] = hashlib.sha256(logits.float().numpy().tobytes()).hexdigest()
print(json.dumps(digests))
"""


@pytest.fixture(scope="module")
def tiny(tiny_llama):
    return with_card(tiny_llama)


@pytest.fixture(scope="module")
def hub(tiny, sharded_llama):
    with HubServer() as server:
        server.add_repo("org/tiny", tiny)
        card = {"README.md": b"---\nlicense: [\n---\nmetadata that cannot be parsed\n"}
        server.add_repo("org/sharded", contents(sharded_llama.folder) | card)
        server.add_repo("org/gated", tiny, gated=True)
        yield server


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return tmp_path_factory.mktemp("work")


@pytest.fixture(scope="module")
def pushed(hub, work):
    """Conversions below `work`, pushed by the command line."""
    tiny = "org/tiny", "--output-dir"
    answers = command_lines(
        hub.environment(home=work / "home"),
        {
            "four": (WRITE, *tiny, work / "four", "--push-to-hub", "org/tiny-spallm"),
            "sharded": (
                *(WRITE, *tiny, work / "sharded", "--bits=3", "--max-shard-size=50KB"),
                *("--push-to-hub", "org/tiny-spallm", "--quiet"),
            ),
            "two": (
                *(WRITE, *tiny, work / "two", "--bits=2", "--json"),
                *("--push-to-hub", "org/secret", "--private"),
            ),
            "shards": ("", "org/sharded", "--output-dir", work / "shards", "--quiet"),
            "push": (WRITE, "push", work / "four", "org/other"),
            "push over": (WRITE, "push", work / "sharded", "org/again"),
            "push back": (WRITE, "push", work / "four", "org/again"),
        },
    )
    for name, answer in answers.items():
        assert answer.code == 0, (name, answer)
    return answers


@pytest.mark.slow
def test_pushed_files_are_those_of_the_folder(hub, work, pushed):
    assert on_server(hub, "org/other") == contents(work / "four")
    assert on_server(hub, "org/secret") == contents(work / "two")
    _, first, second = hub.repos["org/tiny-spallm"].commits
    assert on_server(hub, "org/tiny-spallm", first) == contents(work / "four")
    assert f"pushed to {hub.endpoint}/org/tiny-spallm/commit/{first}" in pushed["four"].out
    assert f"pushed to {hub.endpoint}/org/tiny-spallm/commit/{second}" in pushed["sharded"].out
    assert f"pushed to {hub.endpoint}/org/other/commit/" in pushed["push"].out
    assert pushed["push"].err == ""


@pytest.mark.slow
def test_what_a_conversion_takes_along(hub, work, tiny, pushed):
    written = contents(work / "four")
    extra = {"tokenizer_config.json", "chat_template.jinja", "generation_config.json"}
    assert set(written) == {"README.md", "config.json", "conversion.json", WEIGHTS} | extra
    assert {name: written[name] for name in extra} == {name: tiny[name] for name in extra}
    assert not any(path.endswith("optimizer.pt") for _, path in hub.requests)


@pytest.mark.slow
def test_sharded_source_whose_card_cannot_be_parsed(hub, work, pushed):
    source = json.loads((work / "shards" / "conversion.json").read_text())["source"]
    shards = {name for name in hub.files("org/sharded") if name.endswith(".safetensors")}
    assert len(shards) > 1
    assert source["files"].keys() >= shards
    assert source["license"] is None
    assert pushed["shards"].out == ""


@pytest.mark.slow
def test_a_push_replaces_the_weights_of_the_one_before(hub, work, pushed):
    """Else transformers takes a `model.safetensors` left there before it looks at the shards."""
    assert INDEX in contents(work / "sharded")
    assert on_server(hub, "org/tiny-spallm") == contents(work / "sharded")
    assert on_server(hub, "org/again") == contents(work / "four")


def test_weights_that_the_report_is_not_about_are_not_pushed(tiny_llama, tmp_path):
    convert(tiny_llama.folder, tmp_path / "out")
    model = load_sketched(tmp_path / "out")
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data *= 1.5
    model.save_pretrained(tmp_path / "out")
    problem = r"not uploaded: model.safetensors: its SHA-256 .*; if you saved a trained model there"
    with pytest.raises(FormatError, match=problem):
        push_to_hub(tmp_path / "out", "org/model", token="hf_token")


@pytest.mark.slow
def test_private_makes_the_repository_private(hub, pushed):
    private = {name for name, repo in hub.repos.items() if repo.private}
    assert private == {"org/secret"}


@pytest.mark.slow
def test_json_output_stays_json_with_a_push(hub, pushed):
    report = json.loads(pushed["two"].out)
    assert report["source"]["model"] == "org/tiny"
    assert report["source"]["revision"] == hub.repos["org/tiny"].head
    assert f"pushed to {hub.endpoint}/org/secret" in pushed["two"].err


@pytest.mark.slow
def test_card_on_the_server(hub, work, pushed, tmp_path):
    from huggingface_hub import metadata_load

    text = on_server(hub, "org/other")["README.md"].decode()
    (tmp_path / "README.md").write_text(text)
    metadata = metadata_load(tmp_path / "README.md")
    assert metadata == {
        "library_name": "transformers",
        "base_model": "org/tiny",
        "base_model_relation": "quantized",
        "license": "apache-2.0",
        "pipeline_tag": "text-generation",
        "tags": metadata["tags"],
    }
    assert "4-bit" in metadata["tags"]
    report = json.loads((work / "four" / "conversion.json").read_text())
    assert hub.repos["org/tiny"].head[:12] in text
    assert "| bits per code | 4 |" in text
    assert f"| {report['totals']['relative_error']:.4f} |" in text
    assert "from spallm_convert import load_sketched" in text


@pytest.mark.slow
def test_loaded_from_the_hub_and_from_the_folder_alike(hub, work, pushed):
    first = {"revision": list(hub.repos["org/tiny-spallm"].commits)[1]}
    four, sharded = str(work / "four"), str(work / "sharded")
    cases = {
        "auto, first commit": ("auto", "org/tiny-spallm", first),
        "auto, latest": ("auto", "org/tiny-spallm", {}),
        "auto, other": ("auto", "org/other", {}),
        "four": ("load_sketched", four, {}),
        "sharded": ("load_sketched", sharded, {}),
        "first commit": ("load_sketched", "org/tiny-spallm", first),
        "latest": ("load_sketched", "org/tiny-spallm", {}),
        "other": ("load_sketched", "org/other", {}),
        "two": ("load_sketched", str(work / "two"), {}),
        "private, no token": ("load_sketched", "org/secret", {}),
        "private": ("load_sketched", "org/secret", {"token": READ}),
        "missing": ("load_sketched", "org/missing", {}),
        "gated": ("load_sketched", "org/gated", {}),
        "refused": ("load_sketched", "org/refused", {}),
        "no such revision": ("load_sketched", "org/other", {"revision": "v9"}),
        "dense": ("load_sketched", "org/tiny", {}),
    }
    hub.faults.set(Fault("head", 403, suffix="org/refused/resolve/main/config.json"))
    found, _ = run(LOADS, cases, hub.environment(home=work / "fresh"))
    hub.faults.set()
    digests = {name: found[name] for name in ("four", "sharded", "two")}
    assert {len(digest) for digest in digests.values()} == {64}, digests
    assert len(set(digests.values())) == 3
    assert found["first commit"] == found["auto, first commit"] == found["four"]
    assert found["other"] == found["auto, other"] == found["four"]
    assert found["latest"] == found["auto, latest"] == found["sharded"]
    assert found["private"] == found["two"]
    assert found["private, no token"].startswith("SourceError: org/secret: no such repository")
    assert found["missing"].startswith("SourceError: org/missing: no such repository")
    assert found["gated"].startswith("SourceError: org/gated is gated")
    assert found["refused"].startswith(
        "SourceError: org/refused: config.json: the Hub answered 403"
    )
    assert found["no such revision"].startswith("SourceError: org/other: no such revision")
    assert found["dense"].startswith("FormatError: org/tiny: ")


@pytest.mark.slow
def test_tables_from_the_hub_and_from_a_folder_alike(hub, work, pushed, tmp_path):
    four, tuned = str(work / "four"), tmp_path / "tuned"
    model = load_sketched(four)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data *= 1.5
    save_tables(model, tuned)
    first = hub.add_repo("user/tuned-tables", contents(tuned))
    hub.add_repo("user/tuned-tables", contents(work / "two"))
    cases = {
        "base": {},
        "folder": {"tables": str(tuned)},
        "hub": {"tables": "user/tuned-tables", "tables_revision": first},
        "not tables": {"tables": "user/tuned-tables"},
        "missing": {"tables": "user/missing"},
    }
    cases = {name: ("load_sketched", four, options) for name, options in cases.items()}
    cases["both"] = ("load_sketched", "org/other", cases["hub"][2])
    found, _ = run(LOADS, cases, hub.environment(home=tmp_path / "home"))
    assert found["hub"] == found["folder"] == found["both"] != found["base"]
    assert {len(found[name]) for name in ("base", "folder")} == {64}, found
    assert found["not tables"].startswith("FormatError: user/tuned-tables holds no sketch tables")
    assert found["missing"].startswith("SourceError: user/missing: no such repository")


@pytest.mark.slow
def test_eval_from_the_hub_and_from_the_folder_alike(hub, work, pushed, tiny, tmp_path):
    tokenizer = tmp_path / "tokenizer"
    tiny_tokenizer().save_pretrained(tokenizer)
    repos = {"dense": tiny, "sketched": contents(work / "two")}
    for name, files in repos.items():
        hub.add_repo(f"org/with-{name}", files | contents(tokenizer))
        for file, data in (files | contents(tokenizer)).items():
            (tmp_path / name).mkdir(exist_ok=True)
            (tmp_path / name / file).write_bytes(data)
    options = "--text=builtin", "--tokens=200", "--dtype=float32", "--json"
    revision = hub.repos["org/with-dense"].head
    answers = command_lines(
        hub.environment(home=tmp_path / "home"),
        {
            "dense": ("", "eval", "org/with-dense", *options, f"--revision={revision}"),
            "dense here": ("", "eval", tmp_path / "dense", *options),
            "sketched": ("", "eval", "org/with-sketched", *options),
            "sketched here": ("", "eval", tmp_path / "sketched", *options),
            "missing": ("", "eval", "org/missing", *options),
            "gated": ("", "eval", "org/gated", *options),
            "no such revision": ("", "eval", "org/with-dense", "--revision=v9", *options),
            "no tokenizer": ("", "eval", "org/tiny", *options),
        },
    )
    found = {}
    for name in ("dense", "dense here", "sketched", "sketched here"):
        assert (answers[name].code, answers[name].err) == (0, ""), (name, answers[name])
        found[name] = json.loads(answers[name].out)["perplexity"]
    assert found["dense"] == found["dense here"] != found["sketched"] == found["sketched here"]
    assert_one_line(answers["missing"], "org/missing: no such repository")
    assert_one_line(answers["gated"], "org/gated is gated")
    assert_one_line(answers["no such revision"], "org/with-dense: no such revision")
    assert_one_line(answers["no tokenizer"], "org/tiny: its tokenizer cannot be loaded")


@pytest.mark.slow
def test_dry_run_reads_headers_alone(hub, work, pushed, tmp_path, monkeypatch):
    dense = save_tiny_llama(tmp_path / "dense").folder
    blocks = {"quant_method": "fp8", "weight_block_size": [16, 16]}
    hub.add_repo("org/fp8", contents(save_pair(dense, fp8_blocks((16, 16)), blocks)))
    weights = {
        f"/{repo}/resolve/{hub.repos[repo].head}/{name}": len(data)
        for repo in ("org/tiny", "org/sharded", "org/fp8")
        for name, data in hub.files(repo).items()
        if name.endswith(".safetensors")
    }
    ranges = []

    def spy(data, wanted, headers):
        if len(data) in weights.values():
            ranges.append(wanted)
        return ranged(data, wanted, headers)

    ranged = hub_routes.ranged
    monkeypatch.setattr(hub_routes, "ranged", spy)
    before = len(hub.requests)
    home, output = tmp_path / "home", tmp_path / "output"
    answers = command_lines(
        hub.environment(home=home),
        {
            "table": ("", "org/tiny", "--dry-run", "--output-dir", output),
            "json": ("", "org/tiny", "--dry-run", "--json", "--output-dir", output),
            "sharded": ("", "org/sharded", "--dry-run", "--json", "--output-dir", output),
            "fp8": ("", "org/fp8", "--dry-run", "--output-dir", output),
        },
    )
    for name, answer in answers.items():
        assert (answer.code, answer.err) == (0, ""), (name, answer)
    asked = [path for method, path in hub.requests[before:] if method == "GET" and path in weights]
    assert len(asked) == len(weights) + 1
    assert [wanted for wanted in ranges if wanted] == ["bytes=0-99999"] * len(asked)
    assert not output.exists()
    assert {path.name for path in home.rglob("snapshots/*/*")} == {"config.json", INDEX}
    cached = [path for path in home.rglob("*") if path.is_file()]
    assert max(path.stat().st_size for path in cached) < min(weights.values())
    for name, folder in {"json": "four", "sharded": "shards"}.items():
        converted = json.loads((work / folder / "conversion.json").read_text())["totals"]
        del converted["relative_error"]
        assert json.loads(answers[name].out)["totals"] == converted
    sizes = json.loads(answers["json"].out)["totals"]
    for size in (sizes["source_bytes"], sizes["sketched_bytes"]):
        assert f"{size / 1e6:,.1f} MB" in answers["table"].out
    assert "the source is quantized (FP8 in blocks of 16 x 16)" in answers["fp8"].out


@pytest.mark.slow
def test_offline_with_a_warm_cache(hub, work, pushed, tmp_path):
    before = len(hub.requests)
    head = hub.repos["org/tiny"].head
    answers = command_lines(
        hub.environment(home=work / "home") | {"HF_HUB_OFFLINE": "1"},
        {
            "convert": ("", "org/tiny", "--output-dir", tmp_path / "main"),
            "commit": ("", "org/tiny", "--revision", head, "--output-dir", tmp_path / "commit"),
            "dry run": ("", "org/tiny", "--dry-run"),
            "sharded": ("", "org/sharded", "--output-dir", tmp_path / "shards"),
            "push": (WRITE, "push", work / "four", "org/offline"),
        },
    )
    assert len(hub.requests) == before
    assert_one_line(answers.pop("push"), "org/offline")
    for name, answer in answers.items():
        assert answer.code == 0, (name, answer)
    assert contents(tmp_path / "main") == contents(work / "four")
    assert contents(tmp_path / "commit") == contents(work / "four")
    assert contents(tmp_path / "shards") == contents(work / "shards")


@pytest.mark.slow
def test_offline_with_an_index_beside_the_weights(hub, work, pushed, tmp_path):
    """As transformers caches it: where both are there, the single file is the one that counts."""
    shutil.copytree(work / "home", tmp_path / "home", symlinks=True)
    tiny = tmp_path / "home" / "hub" / "models--org--tiny"
    (weights,) = tiny.rglob(f"snapshots/*/{WEIGHTS}")
    stale = {"metadata": {}, "weight_map": {"lm_head.weight": "model-00001-of-00002.safetensors"}}
    (weights.parent / INDEX).write_text(json.dumps(stale))
    cases = {
        "convert": ("", "org/tiny", "-o", tmp_path / "offline", "-q"),
        "dry run": ("", "org/tiny", "--dry-run", "-q"),
    }
    offline = hub.environment(home=tmp_path / "home") | {"HF_HUB_OFFLINE": "1"}
    answers = command_lines(offline, cases)
    assert [answer.code for answer in answers.values()] == [0, 0], answers
    assert contents(tmp_path / "offline") == contents(work / "four")


def test_offline_with_a_cold_cache(hub, tmp_path):
    before = len(hub.requests)
    answers = command_lines(
        hub.environment(home=tmp_path / "home") | {"HF_HUB_OFFLINE": "1"},
        {
            "convert": ("", "org/tiny", "--output-dir", tmp_path / "output"),
            "dry run": ("", "org/tiny", "--dry-run"),
        },
    )
    assert_one_line(answers["convert"], "org/tiny: not in the local cache")
    assert_one_line(answers["dry run"], "org/tiny: not in the local cache")
    assert not (tmp_path / "output").exists()
    assert len(hub.requests) == before
