"""llama.cpp in the quality benchmark, with stand-ins for its programs."""

import json
import stat
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from gguf.quants import quantize

from benchmarks.quality import llamacpp
from helpers.tiny_models import save_tiny_llama
from helpers.tiny_tokenizer import tiny_tokenizer
from spallm_convert.source.gguf import load_gguf

WORDS = "the river runs to the sea and the rain comes back to the hills. "
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
TYPES = gguf.GGMLQuantizationType
#: A program that says what it was called with, if called as `PROGRAM ... FILE` or `--version`.
PROGRAM = """#!{python}
import json, shutil, sys
from pathlib import Path
if sys.argv[1:] == ["--version"]:
    print("version: 12 (abc)")
    sys.exit()
here = Path(__file__)
shown = [Path(a).read_text() for a in sys.argv if a.endswith(".txt")]
here.with_suffix(".json").write_text(json.dumps([sys.argv[1:], shown]))
{then}
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = save_tiny_llama(tmp_path_factory.mktemp("model") / "tiny", attention_bias=False).folder
    tiny_tokenizer().save_pretrained(folder)
    return folder


def dense_model(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def permuted(rows, heads):
    """Interleave the halves of every head, a row at a time."""
    size = len(rows) // heads
    order = [
        head * size + half + i
        for head in range(heads)
        for i in range(size // 2)
        for half in (0, size // 2)
    ]
    return rows[order]


def write_gguf(path, folder, types, architecture="llama"):
    """Write a model as llama.cpp does. types: by the layer's name in llama.cpp; others are F32."""
    model = dense_model(folder)
    config = model.config
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads["attn_q"])
    writer.add_head_count_kv(heads["attn_k"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    whole = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    for name, weight in model.state_dict().items():
        values, layer = weight.numpy(), name.removesuffix(".weight")
        if layer in whole:
            writer.add_tensor(f"{whole[layer]}.weight", values)
            continue
        number, _, rest = layer.removeprefix("model.layers.").partition(".")
        theirs = NAMES[rest]
        if theirs in heads:
            values = permuted(values, heads[theirs])
        kind = types.get(theirs, TYPES.F32)
        writer.add_tensor(f"blk.{number}.{theirs}.weight", quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def linears(folder):
    found = dense_model(folder).named_modules()
    return [
        name for name, module in found if isinstance(module, torch.nn.Linear) and "layers" in name
    ]


MIXED = {name: TYPES.Q4_0 for name in NAMES.values() if "norm" not in name} | {
    "attn_q": TYPES.Q8_0,
    "ffn_down": TYPES.Q5_1,
}


def test_layers_are_read_as_transformers_reads_them(tmp_path, model):
    path = write_gguf(tmp_path / "mixed.gguf", model, MIXED)
    found = dict(llamacpp.weights(llamacpp.read(path, linears(model))))
    theirs = load_gguf(path, torch.float32)
    for name, weight in found.items():
        torch.testing.assert_close(weight, theirs.get_submodule(name).weight, rtol=0, atol=0)
    assert len(found) == 14


def test_rows_are_in_the_order_of_the_dense_model(tmp_path, model):
    path = write_gguf(tmp_path / "full.gguf", model, {})
    dense = dense_model(model)
    for name, weight in llamacpp.weights(llamacpp.read(path, linears(model))):
        torch.testing.assert_close(weight, dense.get_submodule(name).weight, rtol=0, atol=0)


@pytest.mark.parametrize(("rows", "heads"), [(8, 1), (8, 2), (48, 3)])
def test_the_permutation_is_undone(rows, heads):
    weights = np.random.default_rng(rows).standard_normal((rows, 5)).astype(np.float32)
    there = permuted(weights, heads)
    assert (there != weights).any()
    np.testing.assert_array_equal(llamacpp.undo_permutation(there, heads), weights)


def test_stored_bits_are_those_of_the_types(tmp_path, model):
    found = llamacpp.read(write_gguf(tmp_path / "mixed.gguf", model, MIXED), linears(model))
    bits = {"Q4_0": 4.5, "Q8_0": 8.5, "Q5_1": 6.0}
    assert {layer.type for layer in found.values()} == set(bits)
    for layer in found.values():
        assert 8 * layer.nbytes == layer.size * bits[layer.type]
    # Two blocks of hidden size 64, 32 rows of keys and values, 160 of the MLP.
    assert llamacpp.sizes_by_type(found) == {
        "Q4_0": 2 * 64 * (32 + 32 + 64 + 160 + 160),
        "Q5_1": 2 * 64 * 160,
        "Q8_0": 2 * 64 * 64,
    }


def test_another_architecture_is_refused(tmp_path, model):
    from spallm_convert.errors import OptionError

    path = write_gguf(tmp_path / "other.gguf", model, {}, architecture="qwen3")
    with pytest.raises(OptionError, match="architecture 'qwen3'; accepted is 'llama'"):
        llamacpp.read(path, linears(model))


@pytest.fixture
def programs(tmp_path, model, monkeypatch):
    """A folder with stand-ins for llama.cpp's programs: the last one copies a file of Q8_0."""
    folder = tmp_path / "llama.cpp"
    (folder / "build" / "bin").mkdir(parents=True)
    types = dict.fromkeys(MIXED, TYPES.Q8_0)
    write_gguf(folder / "build" / "bin" / "ready.gguf", model, types)
    copy = 'shutil.copy(here.with_name("ready.gguf"), sys.argv[-3])'
    for name, then in {
        "convert_hf_to_gguf.py": "",
        "build/bin/llama-imatrix": "",
        "build/bin/llama-quantize": copy,
    }.items():
        path = folder / name
        path.write_text(PROGRAM.format(python=sys.executable, then=then))
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv(llamacpp.FOLDER, str(folder))
    return folder


def called(programs, name):
    arguments, shown = json.loads((programs / name).with_suffix(".json").read_text())
    return [Path(argument).name for argument in arguments], shown


def run(tmp_path, model, monkeypatch, *names):
    from benchmarks.quality import __main__ as quality
    from benchmarks.quality import one_run

    text = tmp_path / "text.txt"
    text.write_text(WORDS * 8)
    monkeypatch.setattr(
        quality, "run_job", lambda job, _: json.loads(json.dumps(one_run.measure(job)))
    )
    options = {"model": model, "text": text, "samples": 4, "seqlen": 16, "eval-tokens": 64}
    options |= {"window": 32, "output": tmp_path / "quality.json", "cache": tmp_path / "cache"}
    arguments = [str(part) for name, value in options.items() for part in (f"--{name}", value)]
    arguments += [part for name in names for part in ("--method", name)]
    return CliRunner().invoke(quality.main, arguments)


def test_the_programs_are_called_and_what_they_store_is_measured(
    tmp_path, model, monkeypatch, programs
):
    from spallm_convert.calibration.windows import CalibrationText

    result = run(tmp_path, model, monkeypatch, "dense", "llamacpp-q4_0")
    assert result.exit_code == 0, result.output
    dense, row = json.loads((tmp_path / "quality.json").read_text())["runs"]
    assert row["bits_per_weight"] == 8.5
    assert row["stored_types"] == {"Q8_0": row["quantized_weights"]}
    assert row["calibrated"]
    assert row["peers"] == {"gguf": gguf_version(), "llama.cpp": "12 (abc)"}
    assert row["perplexity"] != dense["perplexity"]
    assert row["perplexity"] == pytest.approx(dense["perplexity"], rel=0.01)

    arguments, _ = called(programs, "convert_hf_to_gguf.py")
    assert arguments[1:] == ["--outtype", "f32", "--outfile", "dense.gguf"]
    arguments, (shown,) = called(programs, "build/bin/llama-imatrix")
    options = dict(zip(arguments[::2], arguments[1::2], strict=False))
    assert (options["--ctx-size"], options["--chunks"]) == ("16", "4")
    tokenizer = tiny_tokenizer()
    half = tmp_path / "half.txt"
    half.write_text(WORDS * 4)
    windows = CalibrationText(tokenizer, str(half)).draw(samples=4, seqlen=16, seed=0)
    assert shown == "".join(tokenizer.decode(window) for window in windows)
    arguments, _ = called(programs, "build/bin/llama-quantize")
    assert arguments[:-1] == [
        *("--imatrix", "dense.imatrix", "dense.gguf", "quantized.gguf", "Q4_0")
    ]


def gguf_version():
    import importlib.metadata

    return importlib.metadata.version("gguf")


def test_decoded_windows_leave_special_tokens_to_llamacpp():
    tokenizer = tiny_tokenizer(adds_bos=True)
    windows = torch.tensor(
        [tokenizer("the sea ")["input_ids"], tokenizer("the rain")["input_ids"]][:1]
    )
    assert windows[0, 0] == tokenizer.bos_token_id
    assert llamacpp.decoded(tokenizer, windows.repeat(2, 1)) == "the sea the sea "


def test_a_program_that_fails_is_told_with_its_output(tmp_path, programs, model):
    (programs / "build/bin/llama-imatrix").write_text("#!/bin/sh\necho too few tokens\nexit 3\n")
    with pytest.raises(RuntimeError, match=r"llama-imatrix.* ended with 3: too few tokens"):
        llamacpp.quantize(model, "text", (4, 16), "Q4_0", tmp_path)


def test_missing_programs_are_named(tmp_path, model, monkeypatch, programs):
    (programs / "build/bin/llama-quantize").unlink()
    result = run(tmp_path, model, monkeypatch, "llamacpp-q4_0")
    assert result.exit_code == 2
    assert f"not installed: {programs}/build/bin/llama-quantize; pip" in result.output
    monkeypatch.delenv(llamacpp.FOLDER)
    result = run(tmp_path, model, monkeypatch, "llamacpp-q4_0")
    assert "llama.cpp (the environment variable LLAMA_CPP is not set)" in result.output
    assert run(tmp_path, model, monkeypatch, "dense").exit_code == 0
