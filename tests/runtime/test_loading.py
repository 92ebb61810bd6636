"""Loading: the logits of the decoded weights, generation, what trains, saving again."""

import json
import shutil
import subprocess
import sys
from importlib.metadata import version

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers.tiny_models import save_tiny_llama
from spallm_convert import (
    FormatError,
    SketchConfig,
    SketchedLinear,
    SourceError,
    convert,
    load_sketched,
)
from spallm_convert.evaluation.opening import load_any

TOKENS = torch.arange(2, 40).reshape(2, 19)


@pytest.fixture(scope="module")
def sketched_folder(tiny_llama, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sketched") / "out"
    convert(tiny_llama.folder, folder, SketchConfig(effort="fast", groups_per_row=2))
    return folder


@pytest.mark.parametrize("mapping", ["cluster", "hash"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_are_those_of_the_decoded_weights(tiny_llama, tmp_path, mapping, dtype):
    from transformers import LlamaForCausalLM

    convert(tiny_llama.folder, tmp_path / "out", SketchConfig(effort="fast", mapping=mapping))
    model = load_sketched(tmp_path / "out", dtype=dtype)
    dense = LlamaForCausalLM.from_pretrained(tiny_llama.folder, dtype=dtype)
    for name, module in model.named_modules():
        if isinstance(module, SketchedLinear):
            dense.get_submodule(name).weight.data = module.dense_weight().to(dtype)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype]
    torch.testing.assert_close(
        model(TOKENS).logits, dense(TOKENS).logits, rtol=tolerance, atol=tolerance
    )


def test_tables_train_and_nothing_else(sketched_folder):
    model = load_sketched(sketched_folder, dtype=torch.float32)
    assert not model.training
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(trainable) == 14
    assert all(name.endswith(".weight_table") for name in trainable)
    model.train()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    losses = []
    for _ in range(10):
        loss = model(TOKENS, labels=TOKENS).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.8 * losses[0]
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) == (name not in trainable)


def test_float32_tables_stay_float32_in_a_bfloat16_model(tiny_llama, tmp_path):
    convert(tiny_llama.folder, tmp_path / "out", SketchConfig(effort="fast", table_dtype="float32"))
    model = load_sketched(tmp_path / "out", dtype=torch.bfloat16)
    layer = model.model.layers[0].self_attn.q_proj
    assert layer.weight_table.dtype == torch.float32
    assert layer.bias.dtype == model.lm_head.weight.dtype == torch.bfloat16
    stored = load_file(tmp_path / "out/model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight_table"
    assert torch.equal(layer.weight_table, stored[name])
    model.train()
    model(TOKENS, labels=TOKENS).loss.backward()
    assert layer.weight_table.grad.dtype == torch.float32


def test_generation_is_deterministic(sketched_folder):
    model = load_sketched(sketched_folder)
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    first = model.generate(TOKENS, **options)
    assert first.shape == (2, 27)
    assert torch.equal(first, model.generate(TOKENS, **options))


def test_saving_gives_the_same_tensors(sketched_folder, tmp_path):
    model = load_sketched(sketched_folder)
    model.save_pretrained(tmp_path / "saved")
    saved = load_file(tmp_path / "saved/model.safetensors")
    original = load_file(sketched_folder / "model.safetensors")
    assert saved.keys() == original.keys()
    assert all(torch.equal(saved[name], original[name]) for name in saved)
    again = load_sketched(tmp_path / "saved")
    assert torch.equal(again(TOKENS).logits, model(TOKENS).logits)


@pytest.mark.parametrize("stored", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("loaded", [torch.bfloat16, torch.float16, torch.float32, "auto"])
def test_saved_at_another_dtype_it_loads_again(tiny_llama, tmp_path, stored, loaded):
    convert(tiny_llama.folder, tmp_path / "out", SketchConfig(effort="fast", table_dtype=stored))
    model = load_sketched(tmp_path / "out", dtype=loaded)
    model.save_pretrained(tmp_path / "saved")
    again = load_sketched(tmp_path / "saved", dtype=loaded)
    for name, parameter in model.named_parameters():
        other = again.get_parameter(name)
        assert other.dtype == parameter.dtype
        assert torch.equal(other, parameter)


def test_autocast_trains_float32_tables_in_bfloat16(sketched_folder):
    model = load_sketched(sketched_folder, dtype=torch.float32).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(TOKENS, labels=TOKENS).loss
    loss.backward()
    layer = model.model.layers[0].mlp.up_proj
    gradient = layer.weight_table.grad
    assert gradient.dtype == torch.float32
    model.zero_grad()
    model(TOKENS, labels=TOKENS).loss.backward()
    exact = layer.weight_table.grad
    assert ((gradient - exact).norm() / exact.norm()).item() < 0.05


def test_dequantize_gives_a_dense_model(sketched_folder):
    model = load_sketched(sketched_folder, dtype=torch.float32)
    expected = model(TOKENS).logits
    dense = model.dequantize()
    assert not any(isinstance(module, SketchedLinear) for module in dense.modules())
    torch.testing.assert_close(dense(TOKENS).logits, expected, rtol=1e-5, atol=1e-5)


AUTO = """
import sys
{imports}
import torch
tokens = torch.arange(2, 40).reshape(2, 19)
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
print(type(model.model.layers[0].mlp.up_proj).__name__, model(tokens).logits.double().sum().item())
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "imports",
    [
        "import spallm_convert\nfrom transformers import AutoModelForCausalLM",
        "from transformers import AutoModelForCausalLM\nimport spallm_convert",
        "import transformers.quantizers.auto\nimport spallm_convert\n"
        "from transformers import AutoModelForCausalLM",
    ],
)
def test_auto_classes_load_it_in_either_order_of_imports(sketched_folder, imports):
    result = subprocess.run(
        [sys.executable, "-c", AUTO.format(imports=imports), sketched_folder],
        capture_output=True,
        text=True,
        check=True,
    )
    name, total = result.stdout.split()
    assert name == "SketchedLinear"
    logits = load_sketched(sketched_folder, dtype=torch.float32)(TOKENS).logits
    assert float(total) == pytest.approx(logits.double().sum().item(), rel=1e-6)


def test_code_in_the_folder_is_found_by_the_auto_class_that_names_it(tiny_llama, tmp_path):
    """Which may be another than that of causal language models."""
    theirs = shutil.copytree(tiny_llama.folder, tmp_path / "theirs")
    tensors = load_file(theirs / "model.safetensors")
    save_file(
        {name.removeprefix("model."): tensor for name, tensor in tensors.items()},
        theirs / "model.safetensors",
        metadata={"format": "pt"},
    )
    (theirs / "theirs.py").write_text(
        "from transformers import LlamaConfig, LlamaModel\n"
        "class Config(LlamaConfig):\n    model_type = 'theirs'\n"
        "class Model(LlamaModel):\n    config_class = Config\n"
    )
    config = json.loads((theirs / "config.json").read_text()) | {
        "architectures": ["Model"],
        "model_type": "theirs",
        "auto_map": {"AutoConfig": "theirs.Config", "AutoModel": "theirs.Model"},
    }
    (theirs / "config.json").write_text(json.dumps(config))
    report = convert(theirs, tmp_path / "out", trust_remote_code=True)
    model = load_sketched(tmp_path / "out", trust_remote_code=True)
    assert type(model).__name__ == "Model"
    assert sum(isinstance(m, SketchedLinear) for m in model.modules()) == len(report.modules)
    with pytest.raises(SourceError, match="transformers cannot load it"):
        load_any(str(tmp_path / "out"))  # not trusted


def test_the_base_model_loads_from_a_causal_checkpoint(sketched_folder):
    from transformers import AutoModel

    base = AutoModel.from_pretrained(sketched_folder)
    full = load_sketched(sketched_folder)
    expected = full.model(TOKENS).last_hidden_state
    assert torch.equal(base(TOKENS).last_hidden_state, expected)


def test_what_from_pretrained_takes_too(sketched_folder):
    model = load_sketched(sketched_folder.parent, subfolder="out", torch_dtype=torch.float32)
    assert model.dtype == torch.float32


def test_the_default_dtype_of_torch_is_left_out_of_it(sketched_folder):
    model = load_sketched(sketched_folder, dtype=torch.float32)
    expected = model(TOKENS[:1]).logits
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert torch.equal(model(TOKENS[:1]).logits, expected)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.skipif(
    version("transformers").startswith("5.0."),
    reason="Llama of transformers 5.0 asks torch for autocast on the meta device, which has none",
)
def test_shapes_on_the_meta_device(sketched_folder):
    model = load_sketched(sketched_folder).to("meta")
    assert model(TOKENS.to("meta")).logits.shape == (2, 19, 128)


def test_tied_embeddings(tmp_path):
    model = save_tiny_llama(tmp_path / "source", tie_word_embeddings=True)
    convert(model.folder, tmp_path / "out")
    sketched = load_sketched(tmp_path / "out")
    assert sketched.lm_head.weight is sketched.model.embed_tokens.weight


@pytest.mark.parametrize("mapping", ["cluster", "hash"])
def test_inputs_of_another_width_are_refused(tiny_llama, tmp_path, mapping):
    """Rows of packed codes are as long for some of them, and hashed ones have no length."""
    convert(tiny_llama.folder, tmp_path / "out", SketchConfig(effort="fast", mapping=mapping))
    layer = load_sketched(tmp_path / "out").model.layers[0].self_attn.q_proj
    x = torch.zeros(2, 64, dtype=torch.bfloat16)
    assert layer(x).shape == (2, 64)
    for width in (62, 66):
        with pytest.raises(ValueError, match=f"must be 64, found the shape .2, {width}."):
            layer(x.new_zeros(2, width))


@pytest.mark.parametrize("architectures", [None, []])
def test_a_config_that_names_no_architecture(sketched_folder, tmp_path, architectures):
    folder = shutil.copytree(sketched_folder, tmp_path / "out")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": architectures}))
    with pytest.raises(FormatError, match="no architectures are named"):
        load_sketched(folder)


def test_refusals(sketched_folder, tiny_llama, tmp_path):
    with pytest.raises(SourceError, match="no such folder"):
        load_sketched(tmp_path / "nowhere")
    with pytest.raises(FormatError, match="no quantization_config, so this is not a sketched"):
        load_sketched(tiny_llama.folder)
    import shutil

    broken = shutil.copytree(sketched_folder, tmp_path / "broken")
    config = json.loads((broken / "config.json").read_text())
    config["num_hidden_layers"] = 1
    (broken / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        FormatError, match=r"'model.layers.1.*' is not a linear layer of LlamaForCausalLM"
    ):
        load_sketched(broken)
