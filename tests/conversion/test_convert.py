"""Conversion: what is written, that it is the best sketch of the weights, and is repeatable."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from helpers.tiny_models import save_tiny_llama
from spallm_convert import SketchConfig, convert, load_sketched, plan_conversion
from spallm_convert.conversion.shards import BLOCK_WEIGHTS
from spallm_formats import SketchedCheckpoint, read_bytes, unpack
from spallm_kernels.reference import kmeans as reference


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_sketches_are_the_exact_clustering_of_each_row(tmp_path, bits):
    # In float32 no two partitions tie, so there is one right answer.
    tiny_llama = save_tiny_llama(tmp_path / "source", dtype=torch.float32, num_hidden_layers=1)
    report = convert(
        tiny_llama.folder,
        tmp_path / "out",
        SketchConfig(effort="fast", bits=bits, groups_per_row=2),
    )
    checkpoint = SketchedCheckpoint.open(tmp_path / "out")
    dense = load_file(tiny_llama.folder / "model.safetensors")
    assert len(checkpoint.metadata.modules) == 7
    for module in report.modules:
        name = module["name"]
        weight = dense[name + ".weight"].float().numpy()
        ones = np.ones((1, weight.shape[1]), np.float32)
        some = slice(None, None, 16)  # the reference is slow
        tables, _ = reference.kmeans(weight[some], ones, 2, 1 << bits)
        expected = torch.from_numpy(tables).to(torch.bfloat16).float().numpy()
        stored = checkpoint.table(name)
        np.testing.assert_array_equal(stored[some], expected)
        codes = unpack(checkpoint.index_map(name), bits, weight.shape[1])
        np.testing.assert_array_equal(codes, reference.assign(weight, stored))
        grouped = codes.reshape(len(weight), 2, -1).astype(int)
        approximate = np.take_along_axis(stored, grouped, axis=2).reshape(weight.shape)
        error = np.linalg.norm(weight - approximate) / np.linalg.norm(weight)
        assert module["relative_error"] == pytest.approx(error, rel=1e-5)


def test_everything_else_is_kept_bit_for_bit(tiny_llama, tmp_path):
    report = convert(tiny_llama.folder, tmp_path / "out")
    checkpoint = SketchedCheckpoint.open(tmp_path / "out")
    dense = load_file(tiny_llama.folder / "model.safetensors")
    sketched = {module["name"] + ".weight" for module in report.modules}
    for name, tensor in dense.items():
        if name not in sketched:
            stored = checkpoint.tensors[name]
            expected = tensor.contiguous().view(torch.uint8).numpy().tobytes()
            assert bytes(read_bytes(stored, 0, stored.nbytes)) == expected
    assert {"lm_head.weight", "model.embed_tokens.weight"} <= set(dense) - sketched
    written = contents(tmp_path / "out")
    assert set(written) == {
        "README.md",
        "chat_template.jinja",
        "config.json",
        "conversion.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer_config.json",
    }
    config = json.loads(written["config.json"])
    quantization = config.pop("quantization_config")
    assert config == tiny_llama.config
    assert quantization["modules"] == {
        name: module.to_json() for name, module in checkpoint.metadata.modules.items()
    }


def test_report_has_the_figures(tiny_llama, tmp_path):
    report = convert(tiny_llama.folder, tmp_path / "out", SketchConfig(effort="fast", bits=4))
    size = (tmp_path / "out/model.safetensors").stat().st_size
    totals = report.totals
    assert report.document["files"]["model.safetensors"]["bytes"] == size
    assert 0 < totals["relative_error"] < 0.2
    # 64 columns: 32 bytes of codes and 16 bf16 entries; 160 columns: 80 bytes and as many entries.
    narrow, wide = 2 * (64 + 32 + 32 + 64 + 160 + 160), 2 * 64
    bits = 8 * (narrow * (32 + 32) + wide * (80 + 32))
    assert totals["bits_per_weight"] == pytest.approx(bits / (narrow * 64 + wide * 160))
    assert report.source["model"] == tiny_llama.folder.name
    assert len(report.source["files"]["model.safetensors"]) == 64
    card = (tmp_path / "out/README.md").read_text()
    assert "library_name: transformers" in card
    assert f"{totals['relative_error']:.4f}" in card
    assert "base_model" not in card  # a local folder is no base model that the Hub knows


def test_hash_stores_no_index_map(tiny_llama, tmp_path):
    config = SketchConfig(effort="fast", bits=2, mapping="hash", seed=9, table_dtype="float32")
    report = convert(tiny_llama.folder, tmp_path / "out", config)
    checkpoint = SketchedCheckpoint.open(tmp_path / "out")
    name = report.modules[0]["name"]
    assert checkpoint.tensors[name + ".weight"].shape == (report.modules[0]["shape"][0], 0)
    model = load_sketched(tmp_path / "out")
    dense = load_file(tiny_llama.folder / "model.safetensors")[name + ".weight"].float()
    approximate = model.get_submodule(name).dense_weight().float()
    error = ((dense - approximate).norm() / dense.norm()).item()
    assert error == pytest.approx(report.modules[0]["relative_error"], rel=1e-4)
    assert error < 1  # colliding weights share their mean: better than nothing, by little


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_other_source_dtypes(tmp_path, dtype):
    model = save_tiny_llama(tmp_path / "source", dtype=dtype)
    report = convert(
        model.folder, tmp_path / "out", SketchConfig(effort="fast", table_dtype="float16")
    )
    assert report.totals["relative_error"] < 0.2
    tables = [
        t for t in SketchedCheckpoint.open(tmp_path / "out").tensors.values() if "table" in t.name
    ]
    assert {table.dtype for table in tables} == {"F16"}


def test_same_bytes_whatever_the_threads_and_shards_of_the_source(
    sharded_llama, tiny_llama, tmp_path
):
    assert (sharded_llama.folder / "model.safetensors.index.json").exists()
    config = SketchConfig(effort="fast", max_shard_size="40KB")
    for name, threads in [("one", 1), ("all", None), ("again", None)]:
        convert(sharded_llama.folder, tmp_path / name, config, threads=threads)
    first = contents(tmp_path / "one")
    assert len([name for name in first if name.endswith(".safetensors")]) > 3
    assert contents(tmp_path / "all") == first
    assert contents(tmp_path / "again") == first
    convert(tiny_llama.folder, tmp_path / "whole")
    convert(sharded_llama.folder, tmp_path / "from-shards")
    whole, from_shards = contents(tmp_path / "whole"), contents(tmp_path / "from-shards")
    assert whole["model.safetensors"] == from_shards["model.safetensors"]


def test_blocks_of_rows_do_not_change_the_result(tiny_llama, tmp_path, monkeypatch):
    assert BLOCK_WEIGHTS > 160 * 64  # so that the first run takes each weight in one block
    for mapping in ("cluster", "hash"):
        config = SketchConfig(effort="fast", mapping=mapping)
        convert(tiny_llama.folder, tmp_path / f"{mapping}-whole", config)
        monkeypatch.setattr("spallm_convert.conversion.shards.BLOCK_WEIGHTS", 1000)
        convert(tiny_llama.folder, tmp_path / f"{mapping}-blocks", config)
        monkeypatch.undo()
        assert contents(tmp_path / f"{mapping}-whole") == contents(tmp_path / f"{mapping}-blocks")


def test_shards_respect_their_limit(tiny_llama, tmp_path):
    convert(tiny_llama.folder, tmp_path / "out", SketchConfig(effort="fast", max_shard_size="20KB"))
    shards = sorted((tmp_path / "out").glob("*.safetensors"))
    assert shards[0].name == f"model-00001-of-{len(shards):05d}.safetensors"
    for shard in shards:
        tensors = load_file(shard)
        assert sum(tensor.nbytes for tensor in tensors.values()) <= 20_000 or len(tensors) <= 2
    for name in SketchedCheckpoint.open(tmp_path / "out").metadata.modules:
        files = [shard for shard in shards if name + ".weight" in load_file(shard)]
        assert name + ".weight_table" in load_file(files[0])


def test_ignored_layers_stay_dense_and_are_reported(tiny_llama, tmp_path):
    report = convert(
        tiny_llama.folder,
        tmp_path / "out",
        SketchConfig(effort="fast", ignore=("*.down_proj", "*.0.*")),
    )
    names = {module["name"] for module in report.modules}
    assert len(names) == 6
    assert not any(".0." in name or "down_proj" in name for name in names)
    assert "'*.down_proj'" in report.left_dense["model.layers.1.mlp.down_proj"]
    model = load_sketched(tmp_path / "out")
    assert type(model.model.layers[0].mlp.up_proj) is torch.nn.Linear


def test_narrow_layers_stay_dense(tmp_path):
    model = save_tiny_llama(
        tmp_path / "source", hidden_size=16, num_attention_heads=2, num_key_value_heads=2
    )
    report = convert(model.folder, tmp_path / "out")
    assert {module["name"].rsplit(".", 1)[1] for module in report.modules} == {"down_proj"}
    assert "tables would be larger" in report.left_dense["model.layers.0.self_attn.q_proj"]


def test_plan_is_what_the_conversion_does(tiny_llama, tmp_path):
    plan = plan_conversion(tiny_llama.folder)
    report = convert(tiny_llama.folder, tmp_path / "out")
    totals = report.totals
    assert plan.totals() == {key: totals[key] for key in plan.totals()}
    for shard in plan.shards:
        assert report.files[shard.filename]["bytes"] == shard.nbytes


def test_progress_counts_every_weight(tiny_llama, tmp_path):
    class Counter:
        def start(self, weights):
            self.total, self.done = weights, 0

        def advance(self, weights, tensor):
            self.done += weights

    counter = Counter()
    config = SketchConfig(effort="fast")
    report = convert(tiny_llama.folder, tmp_path / "out", config, progress=counter)
    assert counter.done == counter.total == report.totals["sketched_weights"]
    assert counter.total == sum(math.prod(module["shape"]) for module in report.modules)


def test_layers_whose_weight_the_model_reads_stay_dense(tmp_path):
    """T5 casts activations to the dtype of `wo.weight`, which codes do not have."""
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    sizes = {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 1, "num_heads": 4}
    dense = T5ForConditionalGeneration(T5Config(**sizes, vocab_size=99)).eval()
    dense.save_pretrained(tmp_path / "t5")
    report = convert(tmp_path / "t5", tmp_path / "out")
    assert report.left_dense["encoder.block.0.layer.1.DenseReluDense.wo"].startswith("the model's")
    sketched = load_sketched(tmp_path / "out")
    tokens = torch.arange(12)[None]
    logits = sketched(input_ids=tokens, decoder_input_ids=tokens).logits
    assert torch.isfinite(logits).all()


def test_layers_that_scans_always_read_stay_dense(tmp_path):
    from transformers import MambaConfig, MambaForCausalLM

    config = MambaConfig(vocab_size=99, hidden_size=32, state_size=8, num_hidden_layers=1)
    MambaForCausalLM(config).save_pretrained(tmp_path / "source")
    report = convert(tmp_path / "source", tmp_path / "out")
    mixer = "backbone.layers.0.mixer."
    names = {module["name"].removeprefix(mixer) for module in report.modules}
    assert names == {"in_proj", "x_proj", "out_proj"}
    assert report.left_dense[mixer + "dt_proj"].startswith("the model's code reads its weight")
    with torch.no_grad():
        assert load_sketched(tmp_path / "out")(torch.arange(12)[None]).logits.isfinite().all()


@pytest.mark.parametrize("strict", ["", "_strict"])
def test_layers_that_are_kept_in_float32_are_sketched(tiny_llama, monkeypatch, strict):
    from transformers import LlamaForCausalLM

    monkeypatch.setattr(LlamaForCausalLM, f"_keep_in_fp32_modules{strict}", ["mlp.gate_proj"])
    assert plan_conversion(tiny_llama.folder).left_dense == {}


def test_layers_whose_weights_are_tied_stay_dense(tmp_path):
    from transformers import Zamba2Config, Zamba2ForCausalLM

    config = Zamba2Config(
        vocab_size=99,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        layers_block_type=["mamba", "hybrid"] * 2,
        num_attention_heads=4,
        num_key_value_heads=4,
        n_mamba_heads=8,
        mamba_headdim=16,
        mamba_d_state=16,
        mamba_ngroups=1,
        num_mem_blocks=1,
        adapter_rank=8,
        chunk_size=8,
    )
    Zamba2ForCausalLM(config).save_pretrained(tmp_path / "source")
    report = convert(tmp_path / "source", tmp_path / "out")
    shared = [name for name in report.left_dense if ".shared_transformer." in name]
    assert len(shared) > 4
    assert all("ties its weight" in report.left_dense[name] for name in shared)
    assert len(report.modules) == 10
    with torch.no_grad():
        assert load_sketched(tmp_path / "out")(torch.arange(8)[None]).logits.isfinite().all()


@pytest.mark.parametrize("pattern", ["transformer.h.0.*", "h.0.*"])
def test_layers_are_ignored_by_either_of_their_names(tmp_path, pattern):
    """Names with the prefix of the base model, as the model has them, or without, as stored."""
    from transformers import BloomConfig, BloomModel

    config = BloomConfig(vocab_size=99, hidden_size=64, n_layer=2, n_head=4)
    BloomModel(config).save_pretrained(tmp_path / "source")
    path = tmp_path / "source/config.json"
    config = json.loads(path.read_text()) | {"architectures": ["BloomForCausalLM"]}
    path.write_text(json.dumps(config))
    plan = plan_conversion(tmp_path / "source", SketchConfig(effort="fast", ignore=(pattern,)))
    assert {name.split(".")[1] for name in plan.metadata.modules} == {"1"}
    assert len(plan.left_dense) == 4


def test_what_belongs_to_a_model_is_taken_along_and_nothing_else(tiny_llama, tmp_path):
    source = shutil.copytree(tiny_llama.folder, tmp_path / "source")
    taken, left = {"source.spm", "bpe.codes"}, {".env.json", "trainer_state.json"}
    for name in taken | left:
        (source / name).write_text("{}")
    files = convert(source, tmp_path / "out").files.keys()
    assert taken <= files
    assert not left & files


def test_experts_are_sketched_and_the_router_is_not(tmp_path):
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        hidden_size=64,
        intermediate_size=64,
        moe_intermediate_size=32,
        num_experts=2,
        num_experts_per_tok=1,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=32,
        vocab_size=99,
    )
    Qwen3MoeForCausalLM(config).save_pretrained(tmp_path / "moe")
    plan = plan_conversion(tmp_path / "moe")
    experts = [name for name in plan.metadata.modules if ".experts." in name]
    assert len(experts) == 2 * 3
    assert len(plan.metadata.modules) == 4 + 2 * 3
    assert plan.left_dense == {"model.layers.0.mlp.gate.weight": "it chooses the experts"}


def test_an_encoder_is_sketched_too(tmp_path):
    from transformers import BertConfig, BertModel

    config = BertConfig(
        hidden_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=128,
        vocab_size=99,
    )
    torch.manual_seed(0)
    dense = BertModel(config).eval()
    dense.save_pretrained(tmp_path / "bert")
    report = convert(tmp_path / "bert", tmp_path / "out")
    assert len(report.modules) == 6
    sketched = load_sketched(tmp_path / "out")
    tokens = torch.arange(12)[None]
    expected, found = dense(tokens).last_hidden_state, sketched(tokens).last_hidden_state
    assert ((expected - found).norm() / expected.norm()).item() < 0.1
