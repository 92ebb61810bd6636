"""Tables apart from their index maps: saved alone, tied to their base, several sets at once."""

import copy
import gc
import hashlib
import json
import weakref

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers.tiny_models import save_tiny_llama
from spallm_convert import (
    FormatError,
    OptionError,
    SketchConfig,
    SketchedLinear,
    SourceError,
    convert,
    load_sketched,
    load_tables,
    perplexity,
    save_tables,
    set_tables,
    set_trainable,
    table_sets,
)
from spallm_convert.runtime.tables import model_fingerprint
from spallm_formats import TABLES_FILE, TABLES_METADATA_FILE

TOKENS = torch.arange(2, 40).reshape(2, 19)


@pytest.fixture(scope="module", params=["cluster", "hash"])
def folder(request, tiny_llama, tmp_path_factory):
    out = tmp_path_factory.mktemp("base") / "out"
    convert(tiny_llama.folder, out, SketchConfig(groups_per_row=2, mapping=request.param))
    return out


@pytest.fixture
def model(folder):
    return load_sketched(folder)


def train(model, steps=3, seed=0):
    torch.manual_seed(seed)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        model(TOKENS, labels=TOKENS.roll(seed)).loss.backward()
        optimizer.step()


def logits(model):
    with torch.no_grad():
        return model(TOKENS).logits


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


def test_tables_keep_the_dtype_they_were_trained_in(folder, tmp_path):
    tuned = load_sketched(folder, dtype=torch.float32)
    train(tuned)
    save_tables(tuned, tmp_path / "tuned")
    live = load_sketched(folder, dtype=torch.bfloat16, tables=tmp_path / "tuned")
    layers = [module for module in live.modules() if isinstance(module, SketchedLinear)]
    assert {layer.weight_table.dtype for layer in layers} == {torch.float32}
    live.set_tables("base")
    assert {layer.weight_table.dtype for layer in layers} == {torch.bfloat16}


def test_several_sets_are_kept_and_the_base_is_untouched(folder, model, tmp_path):
    before, found = logits(model), {}
    for seed, name in enumerate(["first", "second"], 1):
        tuned = load_sketched(folder)
        train(tuned, seed=seed)
        found[name] = logits(tuned)
        save_tables(tuned, tmp_path / name)
    parameters = {name: id(p) for name, p in model.named_parameters()}
    load_tables(model, tmp_path / "first", name="first")
    load_tables(model, tmp_path / "second", name="second", activate=False)
    assert table_sets(model) == ["first", "base", "second"]
    for name, expected in [*found.items(), ("base", before), ("first", found["first"])]:
        set_tables(model, name)
        assert torch.equal(logits(model), expected)
    assert {name: id(p) for name, p in model.named_parameters()} == parameters


def test_training_an_active_set_changes_that_set_only(model, tmp_path):
    before = logits(model)
    save_tables(model, tmp_path / "same")
    load_tables(model, tmp_path / "same", name="mine")
    train(model)
    mine = logits(model)
    model.set_tables("base")
    assert torch.equal(logits(model), before)
    model.set_tables("mine")
    assert torch.equal(logits(model), mine)


def test_a_set_of_the_same_name_is_replaced(model, tmp_path):
    save_tables(model, tmp_path / "old")
    before = logits(model)
    train(model)
    after = logits(model)
    save_tables(model, tmp_path / "new")
    load_tables(model, tmp_path / "new")
    load_tables(model, tmp_path / "old")
    assert torch.equal(logits(model), before)
    model.set_tables("base")
    assert torch.equal(logits(model), after)
    assert table_sets(model) == ["base", "tuned"]


def test_norms_that_were_trained_travel_with_the_tables(folder, tmp_path):
    tuned = load_sketched(folder)
    set_trainable(tuned, norms=True)
    train(tuned)
    save_tables(tuned, tmp_path / "tuned")
    plain = load_sketched(folder)
    train(plain, seed=1)
    save_tables(plain, tmp_path / "plain")

    live = load_sketched(folder)
    before = logits(live)
    load_tables(live, tmp_path / "plain", name="plain")
    load_tables(live, tmp_path / "tuned", name="tuned")
    assert torch.equal(logits(live), logits(tuned))
    live.set_tables("plain")  # which has no norms: those of the base
    assert torch.equal(logits(live), logits(plain))
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


@pytest.mark.parametrize("order", ["norms first", "set first"])
def test_norms_trained_with_a_set_are_of_that_set_alone(folder, tmp_path, order):
    model = load_sketched(folder, dtype=torch.float32)
    save_tables(model, tmp_path / "plain")
    with_norms = load_sketched(folder, dtype=torch.float32)
    set_trainable(with_norms, norms=True)
    train(with_norms, seed=1)
    save_tables(with_norms, tmp_path / "other")

    before = logits(model)
    load_tables(model, tmp_path / "other", name="other", activate=False)
    if order == "norms first":
        set_trainable(model, norms=True)
        load_tables(model, tmp_path / "plain", name="mine")
    else:
        load_tables(model, tmp_path / "plain", name="mine")
        set_trainable(model, norms=True)
    train(model, seed=2)
    mine = logits(model)
    for name, expected in [("base", before), ("other", logits(with_norms)), ("mine", mine)]:
        model.set_tables(name)
        assert torch.equal(logits(model), expected)
    save_tables(model, tmp_path / "mine")
    again = load_sketched(folder, dtype=torch.float32, tables=tmp_path / "mine")
    assert torch.equal(logits(again), mine)


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


def test_copies_have_sets_of_their_own(model, tmp_path):
    save_tables(model, tmp_path / "same")
    load_tables(model, tmp_path / "same")
    other = copy.deepcopy(model)
    other.set_tables("base")
    assert table_sets(model)[0] == "tuned"
    assert table_sets(other)[0] == "base"


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


def test_changing_sets_through_a_compiled_model(folder, tmp_path):
    model = load_sketched(folder)
    before = logits(model)
    train(model)
    save_tables(model, tmp_path / "tuned")
    model = load_sketched(folder)
    compiled = torch.compile(model, backend="eager")
    load_tables(compiled, tmp_path / "tuned")
    assert not torch.equal(logits(model), before)
    compiled.set_tables("base")
    assert torch.equal(logits(model), before)


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
    assert model_fingerprint(model) == whole.hexdigest()


def test_a_changed_index_map_changes_the_fingerprint(tiny_llama, tmp_path):
    convert(tiny_llama.folder, tmp_path / "out")
    model = load_sketched(tmp_path / "out")
    before = model_fingerprint(model)
    assert model_fingerprint(model) == before
    layer = next(module for module in model.modules() if isinstance(module, SketchedLinear))
    with torch.no_grad():
        layer.weight[0, 0] ^= 1
    assert model_fingerprint(model) != before


def test_the_wrong_base_is_refused_and_the_model_left_as_it_was(model, tmp_path):
    other = save_tiny_llama(tmp_path / "other", rms_norm_eps=1e-5, intermediate_size=192)
    convert(other.folder, tmp_path / "base", SketchConfig(groups_per_row=2))
    save_tables(load_sketched(tmp_path / "base"), tmp_path / "tuned")
    before = logits(model)
    with pytest.raises(
        FormatError, match=r"made for .*base with the index maps \w{12}, but this model has"
    ):
        load_tables(model, tmp_path / "tuned")
    assert table_sets(model) == ["base"]
    assert torch.equal(logits(model), before)


def test_every_problem_of_a_tables_file_is_listed(model, tmp_path):
    saved = save_tables(model, tmp_path / "tuned")
    tensors = load_file(saved / TABLES_FILE)
    names = sorted(tensors)
    del tensors[names[0]]
    tensors[names[1]] = tensors[names[1]][:1]
    tensors[names[2]] = torch.full_like(tensors[names[2]], torch.nan)
    tensors[names[3]] = tensors[names[3]].double()
    tensors["model.extra"] = torch.zeros(1)
    save_file(tensors, saved / TABLES_FILE)
    with pytest.raises(FormatError) as caught:
        load_tables(model, saved)
    expected = [
        f"{names[0]} is missing",
        f"{names[1]} has the shape [1, ",
        f"{names[2]} has values that are not finite",
        "tables have several dtypes, expected one: torch.bfloat16, torch.float64",
        "model.extra: the model has no such parameter",
    ]
    assert len(caught.value.problems) == len(expected)
    for problem in expected:
        assert problem in str(caught.value)
    assert table_sets(model) == ["base"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "other"}, "format is 'other', expected 'spallm-tables'"),
        ({"format_version": 2}, "format_version is 2, this version of spallm-convert reads 1"),
        ({"fingerprint": "short"}, "fingerprint is 'short', expected 64 hexadecimal digits"),
        ({"base_model": 3}, "base_model is 3, expected text"),
        ({"surprise": 1}, "unknown key 'surprise'"),
    ],
)
def test_a_damaged_description_is_refused(model, tmp_path, change, message):
    saved = save_tables(model, tmp_path / "tuned")
    path = saved / TABLES_METADATA_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(FormatError, match=message):
        load_tables(model, saved)


def test_folders_without_tables_are_refused(model, folder, tmp_path):
    with pytest.raises(SourceError, match="no such folder"):
        load_tables(model, tmp_path / "nothing")
    with pytest.raises(FormatError, match=r"holds no sketch tables: sketch_tables\.json, "):
        load_tables(model, folder)
    saved = save_tables(model, tmp_path / "tuned")
    (saved / TABLES_FILE).write_bytes(b"short")
    with pytest.raises(FormatError, match="cannot be read"):
        load_tables(model, saved)


def test_nothing_is_overwritten_unasked(model, tmp_path):
    saved = save_tables(model, tmp_path / "tuned")
    with pytest.raises(OptionError, match="already holds sketch tables; overwrite=True replaces"):
        save_tables(model, saved)
    train(model)
    save_tables(model, saved, overwrite=True)
    live = copy.deepcopy(model)
    load_tables(live, saved)
    assert torch.equal(logits(live), logits(model))


def test_names_of_sets_are_checked(model, tmp_path):
    with pytest.raises(
        OptionError, match="no set of tables is called 'tuned', the model has base; load it"
    ):
        model.set_tables("tuned")
    with pytest.raises(OptionError, match="'base' is reserved for the tables"):
        load_tables(model, tmp_path, name="base")


def test_dense_models_are_refused():
    with pytest.raises(OptionError, match="Linear has no sketched layers"):
        save_tables(torch.nn.Linear(2, 2), "nowhere")
