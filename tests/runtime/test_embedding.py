"""Sketched embeddings and heads: the numbers of dense ones, ties, training, saving."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers.architectures import save_tiny
from helpers.remarks import Remarks
from helpers.tiny_models import save_tiny_llama
from spallm_convert import (
    OptionError,
    SketchConfig,
    convert,
    load_sketched,
    load_tables,
    save_tables,
    set_trainable,
)
from spallm_convert.runtime.embedding import SketchedEmbedding
from spallm_convert.runtime.parameters import sketched_pairs
from spallm_formats import SketchedCheckpoint

IDS = torch.tensor([[5, 9, 5, 0, 17, 3]])
BOTH = SketchConfig(effort="fast", embeddings=True, lm_head=True)
EMBEDDING, HEAD = "model.embed_tokens", "lm_head"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Sources and sketches of a model whose head is tied, and of one whose head is not."""
    root = tmp_path_factory.mktemp("embeddings")
    for name, tied in (("tied", True), ("untied", False)):
        save_tiny_llama(root / f"{name}-source", tie_word_embeddings=tied, dtype=torch.float32)
        convert(root / f"{name}-source", root / name, BOTH)
    return root


def dense_twin(model, source):
    """Return the dense model of a source, with the decoded weights of a sketched one."""
    twin = type(model).from_pretrained(source, dtype=torch.float32)
    for name, module in model.named_modules():
        if hasattr(module, "weight_table"):
            twin.get_submodule(name).weight.data = module.dense_weight().detach().float()
    return twin


def stored(folder):
    return load_file(folder / "model.safetensors")


def is_tied(model):
    embedding, head = model.get_submodule(EMBEDDING), model.get_submodule(HEAD)
    both = (head.weight is embedding.weight, head.weight_table is embedding.weight_table)
    assert len(set(both)) == 1
    return both[0]


def assert_reloads(model, folder, inputs=None):
    """Check that a saved model keeps the format and gives the same bits when loaded again."""
    inputs = inputs or {"input_ids": IDS}
    model.save_pretrained(folder)
    assert list(SketchedCheckpoint.open(folder).deep_problems()) == []
    again = load_sketched(folder)
    assert again.dtype == model.dtype
    assert torch.equal(again(**inputs)[0], model(**inputs)[0])
    return again


@pytest.mark.parametrize("name", ["tied", "untied"])
def test_the_model_computes_what_its_decoded_weights_do(folders, name):
    model = load_sketched(folders / name)
    assert is_tied(model) == (name == "tied")
    twin = dense_twin(model, folders / f"{name}-source")
    torch.testing.assert_close(model(IDS).logits, twin(IDS).logits, rtol=1e-5, atol=1e-5)
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(IDS, **options), twin.generate(IDS, **options))


def test_a_tied_weight_is_stored_once(folders):
    names = set(stored(folders / "tied"))
    assert f"{EMBEDDING}.weight_table" in names
    assert not any(name.startswith(HEAD) for name in names)
    untied = set(stored(folders / "untied"))
    assert {f"{EMBEDDING}.weight_table", f"{HEAD}.weight_table"} <= untied


@pytest.mark.parametrize("name", ["tied", "untied"])
def test_saving_gives_the_same_tensors(folders, tmp_path, name):
    model = load_sketched(folders / name)
    model.tie_weights()
    assert is_tied(model) == (name == "tied")
    again = assert_reloads(model, tmp_path)
    assert is_tied(again) == (name == "tied")
    before, after = stored(folders / name), stored(tmp_path)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_gradients_are_those_of_the_dense_weight_and_of_both_uses(folders):
    """The gradient of an entry is the sum of those of the weights that use it."""
    for name in ("tied", "untied"):
        model = load_sketched(folders / name)
        twin = dense_twin(model, folders / f"{name}-source").requires_grad_(True)
        for each in (model, twin):
            each(IDS, labels=IDS).loss.backward()
        stored = {pair.sketch.spans[0].name: pair.table.module for pair in sketched_pairs(model)}
        assert (HEAD in stored) == (name == "untied")
        for path in {EMBEDDING, HEAD} & stored.keys():
            layer = stored[path]
            grad = torch.zeros_like(layer.weight_table)
            marks = torch.arange(layer.weight_table[0].numel()).float().view(1, 1, -1)
            codes = layer.weight_table.detach().clone()
            layer.weight_table.data = marks.expand_as(codes).contiguous()
            found = layer.dense_weight().long()[:, None]
            layer.weight_table.data = codes
            grad.scatter_add_(2, found, twin.get_submodule(path).weight.grad[:, None])
            torch.testing.assert_close(layer.weight_table.grad, grad, rtol=1e-4, atol=1e-6)


def test_a_padding_row_gets_no_gradient_from_its_lookup(tmp_path):
    save_tiny_llama(tmp_path / "source", pad_token_id=0, dtype=torch.float32)
    convert(tmp_path / "source", tmp_path / "out", SketchConfig(effort="fast", embeddings=True))
    embedding = load_sketched(tmp_path / "out").get_submodule(EMBEDDING)
    assert embedding.padding_idx == 0
    embedding(IDS).sum().backward()
    touched = embedding.weight_table.grad.abs().sum((1, 2)).nonzero().flatten()
    assert touched.tolist() == [3, 5, 9, 17]


def test_a_tied_table_is_one_parameter_to_count_train_and_carry(folders, tmp_path):
    model = load_sketched(folders / "tied")
    summary = set_trainable(model, [EMBEDDING])
    assert summary.trained_tables == 128 * 16
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    assert len(optimizer.param_groups[0]["params"]) == 1
    before = model(IDS).logits
    model(IDS, labels=IDS).loss.backward()
    optimizer.step()
    assert is_tied(model)
    assert not torch.equal(model(IDS).logits, before)
    save_tables(model, tmp_path / "tables")
    assert not [name for name in load_file(tmp_path / "tables/sketch_tables.safetensors")
                if name.startswith(HEAD)]  # fmt: skip
    other = load_sketched(folders / "tied")
    load_tables(other, tmp_path / "tables")
    assert is_tied(other)
    assert torch.equal(other(IDS).logits, model(IDS).logits)
    other.set_tables("base")
    assert torch.equal(other(IDS).logits, before)
    assert_reloads(model, tmp_path / "saved")


@pytest.mark.parametrize("name", ["tied", "untied"])
def test_wide_tables_in_a_narrow_model(folders, tmp_path, name):
    """The activations, and the config of a saved model, keep the dtype of the model."""
    model = load_sketched(folders / name, dtype=torch.bfloat16)
    set_trainable(model)
    assert model.get_submodule(EMBEDDING).weight_table.dtype == torch.float32
    assert model.get_submodule(EMBEDDING)(IDS).dtype == model.dtype == torch.bfloat16
    assert model(IDS).logits.dtype == torch.bfloat16
    assert_reloads(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    assert config["quantization_config"]["table_dtype"] == "float32"


def test_a_copied_model_is_tied_too(folders):
    model = load_sketched(folders / "tied")
    twin = copy.deepcopy(model)
    assert is_tied(twin)
    assert twin.lm_head.weight_table is not model.lm_head.weight_table
    assert torch.equal(twin(IDS).logits, model(IDS).logits)


def test_compiles_as_one_graph(folders):
    model = load_sketched(folders / "tied")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    found = compiled(IDS, use_cache=False).logits
    torch.testing.assert_close(found, model(IDS).logits, rtol=1e-5, atol=1e-5)


def test_a_dense_model_of_it_stays_tied(folders, tmp_path):
    model = load_sketched(folders / "tied")
    expected = model(IDS).logits
    dense = model.dequantize(dtype=torch.float32)
    assert dense.lm_head.weight is dense.model.embed_tokens.weight
    torch.testing.assert_close(dense(IDS).logits, expected, rtol=1e-5, atol=1e-5)
    dense.tie_weights()
    dense.resize_token_embeddings(130)
    assert dense.lm_head.weight.shape == (130, 64)


@pytest.mark.parametrize("name", ["tied", "untied"])
def test_resizing_is_refused_in_one_line(folders, name):
    model = load_sketched(folders / name)
    with pytest.raises(OptionError, match=r"of 128 tokens cannot be resized to 192: it is sketch"):
        model.resize_token_embeddings(130, pad_to_multiple_of=64)
    assert model.config.vocab_size == 128
    assert model.resize_token_embeddings(128).num_embeddings == 128


def test_a_head_alone(folders, tmp_path):
    convert(folders / "untied-source", tmp_path / "out", SketchConfig(effort="fast", lm_head=True))
    model = load_sketched(tmp_path / "out")
    assert type(model.model.embed_tokens) is torch.nn.Embedding
    twin = dense_twin(model, folders / "untied-source")
    torch.testing.assert_close(model(IDS).logits, twin(IDS).logits, rtol=1e-5, atol=1e-5)
    with pytest.raises(OptionError, match="cannot be resized"):
        model.resize_token_embeddings(130)


def test_either_option_sketches_a_tied_weight_and_says_so(folders, tmp_path):
    for options in ({"embeddings": True}, {"lm_head": True}):
        told = Remarks()
        folder = tmp_path / next(iter(options))
        convert(
            folders / "tied-source", folder, SketchConfig(effort="fast", **options), progress=told
        )
        assert told.lines[-1] == f"{EMBEDDING} and {HEAD} are tied, so both are sketched"
        one, both = stored(folder), stored(folders / "tied")
        assert all(torch.equal(one[key], both[key]) for key in both)
    told = Remarks()
    convert(folders / "tied-source", tmp_path / "both", BOTH, progress=told)
    assert not [line for line in told.lines if "tied" in line]


def test_a_tied_weight_that_is_stored_as_the_heads(folders, tmp_path):
    source = tmp_path / "source"
    save_tiny_llama(source, tie_word_embeddings=True, dtype=torch.float32)
    tensors = stored(source)
    tensors[f"{HEAD}.weight"] = tensors.pop(f"{EMBEDDING}.weight")
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    convert(source, tmp_path / "out", BOTH)
    assert f"{HEAD}.weight_table" in stored(tmp_path / "out")
    model = load_sketched(tmp_path / "out")
    assert is_tied(model)
    assert torch.equal(model(IDS).logits, load_sketched(folders / "tied")(IDS).logits)
    again = assert_reloads(model, tmp_path / "saved")
    assert is_tied(again)
    assert stored(tmp_path / "saved").keys() == stored(tmp_path / "out").keys()


def test_a_tied_weight_that_is_stored_twice_stays_two(folders, tmp_path):
    source = tmp_path / "source"
    save_tiny_llama(source, tie_word_embeddings=True, dtype=torch.float32)
    tensors = stored(source)
    tensors[f"{HEAD}.weight"] = tensors[f"{EMBEDDING}.weight"].clone()
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    convert(source, tmp_path / "out", BOTH)
    model = load_sketched(tmp_path / "out")
    assert not is_tied(model)
    assert torch.equal(model(IDS).logits, load_sketched(folders / "tied")(IDS).logits)
    model.tie_weights()
    assert not is_tied(model)
    assert_reloads(model, tmp_path / "saved")


@pytest.mark.parametrize("mapping", ["cluster", "hash"])
def test_embeddings_that_scale_their_rows(tmp_path, mapping):
    """Gemma 3 multiplies by a number that it rounds to the dtype of the weight."""
    source = save_tiny("Gemma3ForCausalLM", tmp_path / "source")
    convert(source, tmp_path / "out", SketchConfig(effort="fast", mapping=mapping, embeddings=True))
    for dtype in (torch.float32, torch.bfloat16):
        model = load_sketched(tmp_path / "out", dtype=dtype)
        embedding = model.get_submodule(EMBEDDING)
        assert isinstance(embedding, SketchedEmbedding)
        dense = type(model).from_pretrained(source, dtype=dtype).get_submodule(EMBEDDING)
        dense.weight.data = embedding.dense_weight().detach().to(dtype)
        assert torch.equal(embedding(IDS), dense(IDS))
    assert_reloads(model, tmp_path / "saved")


def test_an_encoder_and_a_decoder_share_one_table(tmp_path):
    source = save_tiny("T5ForConditionalGeneration", tmp_path / "source")
    report = convert(source, tmp_path / "out", SketchConfig(effort="fast", embeddings=True))
    model = load_sketched(tmp_path / "out")
    assert "shared" in {module["name"] for module in report.modules}
    parts = (model.shared, model.encoder.embed_tokens, model.decoder.embed_tokens, model.lm_head)
    assert len({id(part.weight_table) for part in parts}) == 1
    inputs = {"input_ids": IDS, "decoder_input_ids": IDS}
    twin = dense_twin(model, source)
    torch.testing.assert_close(model(**inputs)[0], twin(**inputs)[0], rtol=1e-4, atol=1e-4)
    assert_reloads(model, tmp_path / "saved", inputs)
