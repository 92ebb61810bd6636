"""What `convert`, `verify`, `load_sketched` and the Auto classes refuse alike."""

import json
import shutil
from unittest.mock import patch

import pytest
from transformers import AutoModelForCausalLM

from spallm_convert import FormatError, SourceError, SpallmError, convert, load_sketched, verify
from spallm_convert.source.layer_count import layer_count_problem
from spallm_formats.work_folder import PARTIAL_FOLDER


@pytest.fixture(scope="module")
def sketched(tiny_llama, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sketched") / "out"
    convert(tiny_llama.folder, folder)
    return folder


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def adapter(folder):
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "elsewhere"}')
    return r"adapter_config.json lies (beside|next to)"


def generation_config(folder):
    (folder / "generation_config.json").write_text("[]")
    return r"generation_config.json is \[\], expected an object"


def architecture(folder):
    edit(folder / "config.json", architectures=["LlamaForCausalL"])
    return r"does not know the architecture 'LlamaForCausalL'"


def layers(folder):
    edit(folder / "config.json", num_hidden_layers=10**9)
    return r"num_hidden_layers is 1000000000, but the checkpoint has only \d+ "


def integers(folder):
    path = folder / "model.safetensors"
    data = path.read_bytes()
    at = data.index(b'"BF16"', data.index(b'"model.norm.weight"'))
    path.write_bytes(data[:at] + b'"I16" ' + data[at + 6 :])
    return r"tensor 'model.norm.weight' has the dtype torch.int(16|32), the model expects floats"


@pytest.mark.parametrize("spoil", [adapter, generation_config, architecture, layers, integers])
def test_refused_alike(tiny_llama, sketched, tmp_path, spoil):
    source = shutil.copytree(tiny_llama.folder, tmp_path / "source")
    message = spoil(source)
    with pytest.raises(SourceError, match=message):
        convert(source, tmp_path / "converted")
    folder = shutil.copytree(sketched, tmp_path / "out")
    message = spoil(folder)
    with pytest.raises(FormatError, match=message):
        load_sketched(folder)
    others = [problem for problem in verify(folder) if "SHA-256" not in problem]
    with pytest.raises(AssertionError, match=message):  # the message is among the problems
        assert others == []
    if spoil in (generation_config, integers):
        with pytest.raises(FormatError, match=message):
            AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        ({"num_hidden_layers": 61}, None),
        ({"num_hidden_layers": 1001}, "num_hidden_layers is 1001"),
        ({"text_config": {"n_layer": 10**30}}, "n_layer is 1000000000000000000000000000000"),
        ({"vision_config": {"depth": 1e300}}, "depth is 1e+300"),
        ({"a": {"b": {"c": {"d": {"n_layer": 10**6}}}}}, None),
        ({"num_layers": "many"}, None),
    ],
)
def test_layer_counts(config, problem):
    found = layer_count_problem(config, 500)
    assert (found is None) if problem is None else found.startswith(f"config.json: {problem}, but")


def test_an_interrupted_conversion_whose_report_is_gone(tiny_llama, tmp_path):
    out = tmp_path / "out"
    with (
        patch("spallm_formats.publishing.finish_publishing", side_effect=KeyboardInterrupt),
        pytest.raises(KeyboardInterrupt),
    ):
        convert(tiny_llama.folder, out)
    marker = out / PARTIAL_FOLDER / "complete.json"
    names = json.loads(marker.read_text())["names"]
    edit(marker, names=[name for name in names if name != "conversion.json"])
    with pytest.raises(SpallmError, match=r"conversion.json of the interrupted conversion is miss"):
        convert(tiny_llama.folder, out, resume=True)


def test_a_link_that_leads_to_itself(tiny_llama, tmp_path):
    source = shutil.copytree(tiny_llama.folder, tmp_path / "source")
    (source / "vocab.json").symlink_to("vocab.json")
    with pytest.raises(SourceError, match=r"vocab.json is a link out of the folder"):
        convert(source, tmp_path / "out")


def test_a_file_of_another_size_is_not_hashed(sketched, tmp_path):
    folder = shutil.copytree(sketched, tmp_path / "out")
    with (folder / "README.md").open("r+b") as file:
        file.truncate(1 << 43)  # 8 TiB of holes
    assert verify(folder) == ["README.md: its SHA-256 is not the one in conversion.json"]
