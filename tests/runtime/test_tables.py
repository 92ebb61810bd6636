"""Tables apart from their index maps: saved alone, and tied to their base."""

import gc
import hashlib
import json
import weakref

import pytest
import torch
from safetensors.torch import load_file

from helpers.tiny_models import save_tiny_llama
from helpers.tuning import TOKENS, logits, train
from spallm_convert import (
    OptionError,
    SketchConfig,
    SketchedLinear,
    convert,
    load_sketched,
    load_tables,
    perplexity,
    save_tables,
    set_trainable,
    table_sets,
)
from spallm_convert.runtime.stored_modules import StoredModules
from spallm_formats import TABLES_FILE, TABLES_METADATA_FILE


@pytest.fixture(scope="module", params=["cluster", "hash"])
def folder(request, tiny_llama, tmp_path_factory):
    out = tmp_path_factory.mktemp("base") / "out"
    convert(
        tiny_llama.folder, out, SketchConfig(effort="fast", groups_per_row=2, mapping=request.param)
    )
    return out


@pytest.fixture
def model(folder):
    return load_sketched(folder)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_base_and_tables_give_the_tuned_models_logits_bit_for_bit(folder, tmp_path, dtype):
    tuned = load_sketched(folder, dtype=dtype)
    before = logits(tuned)
    train(tuned)
    after = logits(tuned)
    assert not torch.equal(before, after)
    saved = save_tables(tuned, tmp_path / "tuned")
    assert sorted(p.name for p in saved.iterdir()) == [TABLES_METADATA_FILE, TABLES_FILE]
    tables = sum(p.nbytes for p in tuned.parameters() if p.requires_grad)
    assert sum(path.stat().st_size for path in saved.iterdir()) < 1.02 * tables + 4096

    assert torch.equal(logits(load_sketched(folder, dtype=dtype, tables=saved)), after)
    live = load_sketched(folder, dtype=dtype)
    load_tables(live, saved)
    assert torch.equal(logits(live), after)
    live.set_tables("base")
    assert torch.equal(logits(live), before)


def test_norms_of_the_active_set_travel_on(folder, tmp_path):
    """Tuned with norms once, then tables alone: both are in what is saved."""
    first = load_sketched(folder, dtype=torch.float32)
    set_trainable(first, norms=True)
    train(first)
    save_tables(first, tmp_path / "first")
    second = load_sketched(folder, dtype=torch.float32, tables=tmp_path / "first")
    set_trainable(second)
    train(second)
    save_tables(second, tmp_path / "second")
    again = load_sketched(folder, dtype=torch.float32, tables=tmp_path / "second")
    assert torch.equal(logits(again), logits(second))


def test_norms_take_the_dtype_of_the_model_that_they_are_for(folder, tmp_path):
    tuned = load_sketched(folder, dtype=torch.float32)
    set_trainable(tuned, norms=True)
    train(tuned)
    save_tables(tuned, tmp_path / "tuned")
    live = load_sketched(folder, dtype=torch.bfloat16, tables=tmp_path / "tuned")
    assert live.model.norm.weight.dtype == torch.bfloat16
    torch.testing.assert_close(logits(live).float(), logits(tuned), rtol=5e-2, atol=5e-2)


def test_a_model_is_freed_when_it_is_no_longer_used(folder):
    model = load_sketched(folder)
    alive = weakref.ref(model)
    gc.collect()
    gc.disable()
    try:
        del model
        assert alive() is None
    finally:
        gc.enable()


def test_where_the_base_lies_is_not_told(folder, model, tmp_path):
    saved = save_tables(model, tmp_path / "tuned")
    description = json.loads((saved / TABLES_METADATA_FILE).read_text())
    assert description["base_model"] == folder.name


def test_wrappers_are_seen_through(model, tmp_path):
    wrapped = torch.compile(torch.nn.DataParallel(model), backend="eager")
    save_tables(wrapped, tmp_path / "tuned")
    load_tables(wrapped, tmp_path / "tuned")
    assert table_sets(model) == ["tuned", "base"]


def test_names_in_a_compiled_model_are_those_of_the_model(model, tmp_path):
    set_trainable(model, norms=True)
    model.model.layers[0] = torch.compile(model.model.layers[0], backend="eager")
    compiled = torch.compile(model, backend="eager")
    train(model)
    save_tables(compiled, tmp_path / "tuned")
    assert not any("_orig_mod" in name for name in load_file(tmp_path / "tuned" / TABLES_FILE))


def test_offloaded_models_run_and_their_tables_are_refused(folder, model, tmp_path):
    parts = dict.fromkeys(
        ["model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"], "cpu"
    )
    places = parts | {"model.layers.0": "cpu", "model.layers.1": "disk"}
    offloaded = load_sketched(folder, device_map=places, offload_folder=tmp_path / "offloaded")
    assert torch.equal(logits(offloaded), logits(model))
    assert perplexity(offloaded, TOKENS[0]) == perplexity(model, TOKENS[0])
    with pytest.raises(
        OptionError, match=r"model.layers.1.* is offloaded \(device_map\), but tables"
    ):
        save_tables(offloaded, tmp_path / "tables")
    assert not (tmp_path / "tables").exists()
    save_tables(model, tmp_path / "tables")
    with pytest.raises(OptionError, match="is offloaded"):
        load_tables(offloaded, tmp_path / "tables")


def test_the_fingerprint_is_the_one_of_the_specification(folder, model):
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    stored = load_file(folder / "model.safetensors")
    whole = hashlib.sha256()
    for name, shape in sorted(config["modules"].items()):
        digest = hashlib.sha256(stored[name + ".weight"].numpy().tobytes()).hexdigest()
        if config["mapping"] == "hash":
            digest = f"hash:{config['hash_seed']}"
        numbers = (shape[k] for k in ("out_features", "in_features", "bits", "groups_per_row"))
        whole.update(" ".join([name, *map(str, numbers), digest]).encode() + b"\n")
    assert StoredModules.of(model).fingerprint() == whole.hexdigest()


def test_a_changed_index_map_changes_the_fingerprint(tiny_llama, tmp_path):
    convert(tiny_llama.folder, tmp_path / "out")
    model = load_sketched(tmp_path / "out")
    before = StoredModules.of(model).fingerprint()
    assert StoredModules.of(model).fingerprint() == before
    layer = next(module for module in model.modules() if isinstance(module, SketchedLinear))
    with torch.no_grad():
        layer.weight[0, 0] ^= 1
    assert StoredModules.of(model).fingerprint() != before


def test_a_set_takes_the_bytes_of_its_tables(tmp_path):
    """In bfloat16, rows x groups x 2^bits x 2 bytes, and at most 5 % more."""
    source = save_tiny_llama(tmp_path / "source", hidden_size=256, intermediate_size=1024)
    convert(source.folder, tmp_path / "out", SketchConfig(effort="fast", groups_per_row=1))
    model = load_sketched(tmp_path / "out")
    folder = save_tables(model, tmp_path / "set")
    rows = sum(m.out_features for m in model.modules() if isinstance(m, SketchedLinear))
    taken = sum(file.stat().st_size for file in folder.iterdir())
    assert rows * 2**4 * 2 < taken <= 1.05 * rows * 2**4 * 2


def test_dense_models_are_refused():
    with pytest.raises(OptionError, match="Linear has no sketched layers"):
        save_tables(torch.nn.Linear(2, 2), "nowhere")
