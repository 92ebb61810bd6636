"""Rows that labels name are the stored ones, wherever they are placed and however they are cut."""

import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

from spallm_convert.serving.labels import StoredWeights, split_columns
from spallm_convert.serving.products import dense_weight, make_products, multiply
from spallm_convert.serving.stream import WeightStream
from spallm_formats import SketchedCheckpoint, SketchedModule, SketchMetadata, pack, row_bytes
from spallm_kernels import dequantize, hash_codes

CPU = torch.device("cpu")


@dataclasses.dataclass
class Memory:
    """Stand in for a checkpoint on disk."""

    metadata: SketchMetadata
    tensors: dict
    values: dict

    def index_map(self, name):
        return self.values[self.metadata.modules[name].index_map_name(name)].numpy()


def memory(monkeypatch, modules, mapping="cluster", dense=()):
    """Return stored weights in memory, and their dense values by name."""
    metadata = SketchMetadata(mapping=mapping, table_dtype="float32", modules=modules, hash_seed=7)
    generator = np.random.default_rng(0)
    values, weights = {}, {}
    for name, module in modules.items():
        if mapping == "hash":
            codes = hash_codes(module.rows, module.in_features, module.bits, 7)
        else:
            shape = (module.rows, module.in_features)
            codes = generator.integers(0, module.entries, shape, dtype=np.uint8)
        packed = torch.from_numpy(pack(codes, module.bits))
        table = torch.from_numpy(generator.standard_normal(module.table_shape, dtype=np.float32))
        flat = table.reshape(module.rows, module.groups_per_row, module.entries)
        leading = module.table_shape[:-2]
        weights[module.index_map_name(name)] = dequantize(packed, flat, module.in_features).view(
            *leading, module.in_features
        )
        stored = packed if mapping == "cluster" else packed[:, :0]
        values[module.index_map_name(name)] = stored.reshape(*leading, -1)
        values[module.table_name(name)] = table
    for name in dense:
        weights[name] = values[name] = torch.randn(4, 24)
    tensors = {
        spec.name: spec for n, m in modules.items() for spec in m.tensors(n, mapping, "float32")
    } | {name: torch.empty(4, 24) for name in dense}
    monkeypatch.setattr(StoredWeights, "_tensor", lambda self, name: values[name])
    return StoredWeights(Memory(metadata, tensors, values), dense), weights


def module(rows=8, columns=24, bits=3, groups=2, **more):
    return SketchedModule(
        in_features=columns, out_features=rows, bits=bits, groups_per_row=groups, **more
    )


def rows_of(stored, labels, columns=24):
    layer = nn.Module()
    products = make_products(layer, labels, stored, range(columns), torch.float32, CPU)
    return layer, products


@pytest.mark.parametrize("mapping", ["cluster", "hash"])
def test_rows_in_any_order(monkeypatch, mapping):
    stored, weights = memory(monkeypatch, {"a": module(), "b": module(rows=5)}, mapping)
    a, b = stored.labels("a.weight").flatten(), stored.labels("b.weight").flatten()
    labels = torch.cat([b[3:], a[:4], b[:1], a[5:6], a[2:3]])
    layer, products = rows_of(stored, labels)
    A, B = weights["a.weight"], weights["b.weight"]
    assert len(products) == 1  # they are alike
    found = dense_weight(layer, products, 24)
    assert torch.equal(found, torch.cat([B[3:], A[:4], B[:1], A[5:6], A[2:3]]))


def test_kinds_are_products_of_their_own(monkeypatch):
    modules = {"a": module(bits=4), "b": module(bits=2), "c": module(bits=2, groups=4)}
    stored, weights = memory(monkeypatch, modules, dense=["d.weight"])
    names = [f"{name}.weight" for name in "abdc"]
    labels = torch.cat([stored.labels(name).flatten() for name in names])
    layer, products = rows_of(stored, labels)
    assert [product.table for product in products] == [
        "weight_table",
        "weight_table_1",
        None,
        "weight_table_3",
    ]
    expected = torch.cat([weights[name] for name in names])
    assert torch.equal(dense_weight(layer, products, 24), expected)
    x, bias = torch.randn(3, 24), torch.randn(len(expected))
    torch.testing.assert_close(multiply(layer, products, x, bias), x @ expected.T + bias)


def test_absent_rows_give_zeros(monkeypatch):
    stored, weights = memory(monkeypatch, {"a": module()})
    a = stored.labels("a.weight").flatten()
    nothing = torch.zeros(3, dtype=torch.int64)
    layer, products = rows_of(stored, torch.cat([nothing, a, nothing]))
    (product,) = products
    assert product.rows == 14
    found = dense_weight(layer, products, 24)
    assert torch.equal(found[3:11], weights["a.weight"])
    assert not found[:3].any()
    assert not found[11:].any()


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize(("groups", "ranks"), [(1, 2), (2, 2), (2, 3), (4, 3), (3, 4), (8, 8)])
@pytest.mark.parametrize("mapping", ["cluster", "hash"])
def test_columns_are_cut_at_any_place(monkeypatch, bits, groups, ranks, mapping):
    whole = module(bits=bits, groups=groups)
    stored, weights = memory(monkeypatch, {"a": whole}, mapping)
    (run,) = stored.runs(stored.labels("a.weight").flatten())
    width = 24 // ranks
    for rank in range(ranks):
        columns = range(rank * width, (rank + 1) * width)
        packed, table = stored.read_sketched(run, columns)
        assert table.shape == (8, split_columns(whole, width), 1 << bits)
        assert packed.shape == (8, row_bytes(width, bits))
        found = dequantize(packed, table, width)
        assert torch.equal(found, weights["a.weight"][:, columns.start : columns.stop])
        again = stored.read_tables(run, columns, stored.table("a.weight"))
        assert torch.equal(again, table)


@pytest.mark.parametrize("transposed", [False, True])
def test_labels_have_the_shape_of_the_source(monkeypatch, transposed):
    fused = module(experts=3, transposed=transposed)
    stored, weights = memory(monkeypatch, {"mlp.experts.down_proj": fused})
    labels = stored.labels("mlp.experts.down_proj")
    assert labels.shape == ((3, 1, 8) if transposed else (3, 8, 1))
    rows = (labels.mT if transposed else labels)[1:].flatten()
    layer, products = rows_of(stored, rows)
    expected = weights["mlp.experts.down_proj"][1:].flatten(0, 1)
    assert torch.equal(dense_weight(layer, products, 24), expected)


def test_what_no_layer_asks_for_is_looked_up(monkeypatch):
    modules = {
        "asked": module(),
        "not.asked": module(bits=2),
        "experts.up": module(experts=2, transposed=True),
        "elsewhere": module(),
    }
    stored, weights = memory(monkeypatch, modules)
    stored.elsewhere = frozenset(["elsewhere.weight"])
    stream = WeightStream(stored, {"asked.weight"}, torch.float32)
    norm = torch.ones(4)
    given = [(name, stored._tensor(name)) for name in stored._checkpoint.tensors]
    found = dict(stream.weights([*given, ("norm.weight", norm)]))
    assert found.keys() == {"asked.weight", "not.asked.weight", "experts.up", "norm.weight"}
    assert torch.equal(found["asked.weight"], stored.labels("asked.weight"))
    assert torch.equal(found["not.asked.weight"], weights["not.asked.weight"])
    assert torch.equal(found["experts.up"], weights["experts.up"].mT)
    assert found["norm.weight"] is norm
    assert stream.dense == ["not.asked", "experts.up"]


def test_fingerprint_is_that_of_saved_tables(tmp_path, tiny_llama):
    from spallm_convert import SketchConfig, convert, load_sketched, save_tables
    from spallm_convert.runtime.tables_file import open_tables

    for mapping in ("cluster", "hash"):
        folder = tmp_path / mapping
        convert(tiny_llama.folder, folder, SketchConfig(effort="fast", mapping=mapping))
        saved = save_tables(load_sketched(folder), tmp_path / f"{mapping}-tables")
        with open_tables(saved) as tables:
            own = StoredWeights(SketchedCheckpoint.open(folder)).fingerprint
            assert tables.metadata.fingerprint == own
