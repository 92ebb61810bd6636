"""Linear layers that transformers joins of stored ones, or splits a stored one into."""

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import conversion_mapping
from transformers.core_model_loading import Chunk, Concatenate, WeightConverter

from helpers.architectures import save_tiny
from helpers.decoded import fingerprint, modules_of, save_decoded, tensors_of
from helpers.tuning import logits, train
from spallm_convert import (
    OptionError,
    SketchConfig,
    convert,
    load_sketched,
    save_tables,
    set_trainable,
)

#: The type of a model, and a conversion of its own with which it is saved and loaded here.
KINDS = {
    "joined": ("Phi3ForCausalLM", "phi3", ["gate", "up"], "gate_up_proj", Concatenate),
    "split": ("LlamaForCausalLM", "llama", "gate_up", ["gate_proj", "up_proj"], Chunk),
}


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    name, model_type, stored, loaded, operation = KINDS[request.param]
    sources = [f"mlp.{part}.weight" for part in ([stored] if isinstance(stored, str) else stored)]
    targets = [f"mlp.{part}.weight" for part in ([loaded] if isinstance(loaded, str) else loaded)]
    change = WeightConverter(sources, targets, operations=[operation(dim=0)])
    conversion_mapping.get_checkpoint_conversion_mapping(model_type)  # fills the cache
    with pytest.MonkeyPatch.context() as patch:
        cache = conversion_mapping._checkpoint_conversion_mapping_cache
        patch.setitem(cache, model_type, [change])
        yield request.param, name


@pytest.fixture(scope="module", params=["cluster", "hash"])
def made(request, kind, tmp_path_factory):
    _, name = kind
    folder = tmp_path_factory.mktemp("joined")
    source = save_tiny(name, folder / "source")
    convert(
        source,
        folder / "out",
        SketchConfig(effort="fast", groups_per_row=2, mapping=request.param, table_dtype="float32"),
    )
    decoded = save_decoded(folder / "out", source, folder / "decoded")
    dense = getattr(transformers, name).from_pretrained(decoded)
    return folder / "out", dense


def test_outputs_are_those_of_the_decoded_weights(made):
    folder, dense = made
    assert any(".mlp.gate" in name and "proj" not in name for name, *_ in modules_of(folder))
    found, expected = logits(load_sketched(folder, dtype=torch.float32)), logits(dense)
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


def test_checkpoints_and_tables_keep_the_stored_layers(made, tmp_path):
    folder, _ = made
    model = load_sketched(folder)
    model.save_pretrained(tmp_path / "again")
    found, expected = tensors_of(tmp_path / "again"), tensors_of(folder)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    save_tables(model, tmp_path / "tables")
    tables = load_file(tmp_path / "tables" / "sketch_tables.safetensors")
    assert tables.keys() == {name for name in expected if name.endswith("_table")}
    assert all(torch.equal(expected[name], value) for name, value in tables.items())
    if any(index_map.numel() for *_, index_map, _ in modules_of(folder)):
        described = (tmp_path / "tables" / "sketch_tables.json").read_text()
        assert fingerprint(folder) in described


@pytest.mark.parametrize("affine", [False, True])
def test_trained_tables_are_loaded_again(made, tmp_path, affine):
    model = load_sketched(made[0], dtype=torch.float32).train()
    set_trainable(model, affine=affine)
    before = logits(model)
    train(model, steps=1)
    save_tables(model, tmp_path)
    again = load_sketched(made[0], dtype=torch.float32, tables=tmp_path)
    assert torch.equal(logits(again), logits(model))
    again.set_tables("base")
    assert torch.equal(logits(again), before)


def test_patterns_are_those_of_the_stored_layers(made, kind):
    model = load_sketched(made[0], dtype=torch.float32)
    set_trainable(model, "*.mlp.gate*") if kind[0] == "split" else set_trainable(model, "*.mlp.*")
    trained = {name.split(".")[-2] for name, p in model.named_parameters() if p.requires_grad}
    assert trained >= ({"gate_proj", "up_proj"} if kind[0] == "split" else {"gate_up_proj"})
    if kind[0] == "joined":
        with pytest.raises(OptionError, match="are one parameter of the model"):
            set_trainable(model, "*.mlp.gate")
