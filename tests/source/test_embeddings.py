"""Which embeddings and heads may be sketched, and what their classes do with rows."""

import pytest
import torch
from torch import nn

from helpers.architectures import ARCHITECTURES
from spallm_convert import OptionError
from spallm_convert.source.embeddings import EMBEDDINGS, LM_HEAD, find_token_weights
from spallm_convert.source.lookups import Finish, find_finish


class Scaled(nn.Embedding):
    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.embed_scale = 6.3

    def forward(self, input):
        return super().forward(input) * self.embed_scale


class Rounded(nn.Embedding):
    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.scalar_embed_scale = 6.3
        self.register_buffer("embed_scale", torch.tensor(6.3), persistent=False)

    def forward(self, input):
        return super().forward(input) * self.embed_scale.to(self.weight.dtype)


class Normed(nn.Embedding):
    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.embed_norm = nn.LayerNorm(sizes[1])

    def forward(self, input):
        return self.embed_norm(super().forward(input))


class Divided(Scaled):
    def forward(self, input):
        return nn.Embedding.forward(self, input) / self.embed_scale


class Replaced(Scaled):
    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.special = 4000


class Offset(nn.Embedding):
    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.offset = nn.Parameter(torch.zeros(sizes[1]))


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (nn.Embedding, Finish()),
        (Scaled, Finish(6.3)),
        (Rounded, Finish(6.3, is_rounded=True)),
        (Normed, Finish(is_normed=True)),
        (Divided, "Divided does more than look rows up"),
        (Replaced, "Replaced does more than look rows up"),
        (Offset, "Offset does more than look rows up"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_models_own_code_decides(kind, expected, dtype):
    """Whatever the default dtype is while transformers loads a model."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            assert find_finish(kind(50, 12)) == expected
    finally:
        torch.set_default_dtype(default)


@pytest.mark.parametrize("option", ["max_norm", "scale_grad_by_freq", "sparse"])
def test_options_of_embeddings_are_named(option):
    embedding = nn.Embedding(50, 12, **{option: True})
    assert find_finish(embedding) == f"its embedding has the option {option}"


def empty(name):
    """Return a model of `ARCHITECTURES` without weights."""
    import transformers

    config, options = ARCHITECTURES[name]
    with torch.device("meta"):
        return getattr(transformers, name)(getattr(transformers, config)(**options))


def found(name, *asked):
    return find_token_weights(empty(name), set(asked))


def test_tied_weights_are_one():
    (weight,) = found("Gemma2ForCausalLM", EMBEDDINGS, LM_HEAD)
    assert weight.paths == ("model.embed_tokens", "lm_head")
    assert weight.reason is None
    assert (weight.weight.out_features, weight.weight.in_features) == (64, 32)
    assert weight.note({EMBEDDINGS, LM_HEAD}) is None
    for option in (EMBEDDINGS, LM_HEAD):
        note = weight.note({option})
        assert note == "model.embed_tokens and lm_head are tied, so both are sketched"


def test_weights_that_are_not_tied_are_two():
    weights = found("PhiForCausalLM", EMBEDDINGS, LM_HEAD)
    assert {weight.paths: weight.note({*weight.uses}) for weight in weights} == {
        ("model.embed_tokens",): None,
        ("lm_head",): None,
    }


def test_a_head_whose_dtype_the_model_asks_for_stays_dense():
    (weight,) = found("MambaForCausalLM", LM_HEAD)
    assert weight.reason == "the model's code reads its weight (MambaForCausalLM.forward)"
    note = weight.note({LM_HEAD})
    assert note.startswith(" and ".join(weight.paths) + ": not sketched, because the model's code")
    assert "lm_head" in weight.paths


@pytest.mark.parametrize(
    ("name", "option", "what"),
    [
        ("LlamaModel", LM_HEAD, "LlamaModel has no output head; leave out --lm-head"),
        ("Dinov2Model", EMBEDDINGS, "Dinov2Model has no input embedding of tokens; leave out --em"),
    ],
)
def test_what_a_model_lacks_is_named(name, option, what):
    with pytest.raises(OptionError, match=f"^{option}: {what}"):
        found(name, option)
