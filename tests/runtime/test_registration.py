"""What loading leaves behind: transformers with or without the quantizer, and `set_tables`."""

import copy
import gc
import importlib
import io
import pickle
import sys
import weakref

import pytest
import torch

from spallm_convert import (
    OptionError,
    load_sketched,
    load_tables,
    save_tables,
)
from spallm_convert.runtime import registration


@pytest.fixture
def model(sketched_llama):
    return load_sketched(sketched_llama)


@pytest.fixture
def broken(monkeypatch):
    """Make the import of the quantizer fail, and leave PEFT out of it."""
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path])
    monkeypatch.setattr(registration, "_TUNERS", "imported_by_nobody")

    def fail(name):
        assert name == "spallm_convert.runtime.quantizer"
        raise ImportError("no module\ncalled scipy")

    monkeypatch.setattr(registration.importlib, "import_module", fail)


WARNING = r"cannot load sketched layers in this process: ImportError: no module called scipy"


def test_a_quantizer_that_cannot_be_imported_is_a_warning(broken):
    with pytest.warns(RuntimeWarning, match=WARNING) as caught:
        registration.register()
    assert len(caught) == 1


def test_the_import_of_transformers_goes_on(tmp_path, monkeypatch, broken):
    """With a module in the place of transformers' registry, because that is imported already."""
    (tmp_path / "their_registry.py").write_text("value = 7\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(registration, "_QUANTIZERS", "their_registry")
    registration.register()
    with pytest.warns(RuntimeWarning, match=WARNING) as caught:
        exec("import their_registry")
    assert len(caught) == 1
    assert sys.modules.pop("their_registry").value == 7
    assert "their_registry" not in [getattr(f, "awaited", None) for f in sys.meta_path]


def test_dense_models_of_the_class_have_no_tables(model, tiny_llama):
    dense = type(model).from_pretrained(tiny_llama.folder)
    assert hasattr(model, "set_tables")
    assert not hasattr(dense, "set_tables")
    assert not hasattr(type(model), "set_tables")


def table(model):
    return model.model.layers[0].mlp.up_proj.weight_table


def through_pickle(model):
    return pickle.loads(pickle.dumps(model))


def through_torch(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("cloned", [copy.deepcopy, through_pickle, through_torch])
def test_a_clone_switches_its_own_tables(model, tmp_path, cloned):
    with torch.no_grad():
        table(model).add_(1)
    save_tables(model, tmp_path / "tables")
    with torch.no_grad():
        table(model).sub_(1)
    load_tables(model, tmp_path / "tables")
    clone = cloned(model)
    clone.set_tables("base")
    assert torch.equal(table(model), table(clone) + 1)
    clone.set_tables("tuned")
    assert torch.equal(table(model), table(clone))
    model.set_tables("base")
    assert torch.equal(table(model) + 1, table(clone))


def test_memory_is_freed_without_garbage_collection(sketched_llama):
    gc.collect()
    gc.disable()
    try:
        model = load_sketched(sketched_llama)
        seen = weakref.ref(model)
        model.set_tables("base")
        switch = model.set_tables
        del model
        assert seen() is None
    finally:
        gc.enable()
    with pytest.raises(OptionError, match="the model of this set_tables is gone"):
        switch()


def test_importing_again_is_harmless():
    registration.register()
    importlib.import_module("spallm_convert.runtime.quantizer")
