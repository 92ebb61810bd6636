"""Folders that look like models and cannot be converted: adapters, other layouts of weights."""

import json
import shutil

import pytest

from spallm_convert import SourceError, convert, load_any, plan_conversion
from spallm_convert.source.checkpoint import no_weights, refuse_adapter

ADAPTER = json.dumps({"base_model_name_or_path": "org/base", "peft_type": "LORA"})


def test_an_adapter_next_to_weights_is_refused(tiny_llama, tmp_path):
    source = shutil.copytree(tiny_llama.folder, tmp_path / "source")
    (source / "adapter_config.json").write_text(ADAPTER)
    for use in (lambda: convert(source, tmp_path / "out"), lambda: load_any(source)):
        with pytest.raises(
            SourceError,
            match=r"adapter_config.json lies next to the weights, .*; merge .*merge_and_unload\(\)",
        ):
            use()
    assert not (tmp_path / "out").exists()


def test_an_adapter_alone_is_refused_with_the_way_to_merge_it(tmp_path):
    (tmp_path / "adapter_config.json").write_text(ADAPTER)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(SourceError, match=r"only an adapter .* load it with peft on the base"):
        plan_conversion(tmp_path)


def test_an_adapter_in_a_repository_is_refused():
    refuse_adapter(["config.json", "model.safetensors"], "org/name")
    with pytest.raises(SourceError, match="org/name: only an adapter"):
        refuse_adapter(["adapter_config.json", "adapter_model.safetensors"], "org/name")
    with pytest.raises(SourceError, match=r"org/name: adapter_config.json lies next to"):
        refuse_adapter(["adapter_config.json", "config.json", "model.safetensors"], "org/name")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], r"\(found no weights\); only safetensors weights are read: load"),
        (["pytorch_model.bin"], r"\(found pytorch_model.bin\); only safetensors weights are read"),
        (["consolidated.safetensors"], r"\(found consolidated.safetensors\); only weights as"),
        (["sub/model.safetensors"], r"\(found sub/model.safetensors\); .*: pass the folder that"),
        (["diffusion_pytorch_model.safetensors", "a.bin"], r"\(found diffusion\S+, a.bin\); only"),
        (
            [f"model-0000{i}-of-00004.safetensors" for i in range(1, 5)],
            r"\(found model-00001\S+, \S+, \S+, and 1 more\); get the index of the shards",
        ),
    ],
)
def test_weights_of_another_layout_are_named(tiny_llama, tmp_path, files, message):
    shutil.copy(tiny_llama.folder / "config.json", tmp_path)
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(SourceError, match=message):
        plan_conversion(tmp_path)
    assert str(no_weights(files, "org/name")).startswith("org/name: no model.safetensors and no")


@pytest.mark.parametrize("architectures", [[1], [], "LlamaForCausalLM", [None], None, [["a"]]])
def test_architectures_that_are_not_names_are_refused(tiny_llama, tmp_path, architectures):
    source = shutil.copytree(tiny_llama.folder, tmp_path / "source")
    config = tiny_llama.config | {"architectures": architectures}
    (source / "config.json").write_text(json.dumps(config))
    for use in (plan_conversion, load_any):
        with pytest.raises(SourceError, match="no architectures are named, expected a list"):
            use(source)
