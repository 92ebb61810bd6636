"""Which parameters hold the weights of experts, as the model's own code shows."""

import pytest

from helpers.architectures import available, build_tiny
from spallm_convert.source.experts import find_experts
from spallm_convert.source.linear_weights import LinearWeight


def test_parameters_of_experts_are_found_with_their_direction():
    found, unfit = find_experts(build_tiny("MixtralForCausalLM"))
    assert not unfit
    experts = {weight.experts for weight in found.values()}
    assert experts == {4}
    found, unfit = find_experts(build_tiny("GptOssForCausalLM"))
    assert found
    assert not unfit
    assert all(weight.transposed for weight in found.values())


def test_experts_that_pass_their_input_on():
    """LongCat's code fails for tokens that choose one expert each."""
    name = "LongcatFlashForCausalLM"
    if not available(name):
        pytest.skip(f"transformers has no {name}")
    found, unfit = find_experts(build_tiny(name))
    assert not unfit
    start = "model.layers.0.mlp.experts."
    assert found == {
        f"{start}gate_up_proj": LinearWeight(32, 32, experts=6),
        f"{start}down_proj": LinearWeight(32, 16, experts=4),
    }
