"""Which rows of stored tensors the parameters of a model consist of."""

import pytest
import torch
import transformers
from safetensors.torch import load_file

from helpers.architectures import available, build_tiny, save_tiny
from spallm_convert.source.stored_names import loaded_names, matrix_rows

ERNIE = "Ernie4_5_VLMoeForConditionalGeneration"


def rows_of(stored):
    return matrix_rows((name, tuple(tensor.shape)) for name, tensor in stored.items())


@pytest.mark.parametrize(
    "name", ["MixtralForCausalLM", "GptOssForCausalLM", "LongcatFlashForCausalLM", ERNIE]
)
def test_parameters_have_the_values_of_their_rows(name, tmp_path):
    """Compare them with what transformers loads."""
    if not available(name):
        pytest.skip(f"transformers has no {name}")
    stored = load_file(save_tiny(name, tmp_path / "model") / "model.safetensors")
    model = getattr(transformers, name).from_pretrained(tmp_path / "model")
    names = loaded_names(model, rows_of(stored))
    expected = model.state_dict()
    for parameter, pieces in names.pieces.items():
        flat = [
            stored[piece.tensor].reshape(rows_of(stored)[piece.tensor], -1)[
                piece.first : piece.first + piece.rows
            ]
            for piece in pieces
        ]
        assert torch.equal(torch.cat(flat).reshape(expected[parameter].shape), expected[parameter])
    for parameter, piece in names.turned.items():
        assert torch.equal(stored[piece.tensor].mT, expected[parameter])
        assert "Transpose" in names.changed[piece.tensor]
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    assert names.pieces.keys() | names.turned.keys() | tied.keys() == expected.keys()
    assert names.changed.keys() == {piece.tensor for piece in names.turned.values()}


def test_sets_of_experts_that_are_not_all_stored(tmp_path):
    """ERNIE stores the experts for images after those for text."""
    if not available(ERNIE):
        pytest.skip(f"transformers has no {ERNIE}")
    rows = rows_of(load_file(save_tiny(ERNIE, tmp_path / "model") / "model.safetensors"))
    lost = "model.layers.1.mlp.experts.7.up_proj.weight"
    del rows[lost]
    names = loaded_names(build_tiny(ERNIE), rows)
    others = lost.replace("up_proj", "gate_proj"), lost.replace("7.up_proj", "0.up_proj")
    assert {names.changed[name] for name in others} == {
        "the experts of its block are not all stored"
    }
    assert lost.replace("up_proj", "down_proj") not in names.changed
