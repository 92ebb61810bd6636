"""Which models predict the next token."""

import pytest

from helpers.meta_models import meta_model
from spallm_convert.source.causal import predicts_next_token


@pytest.mark.parametrize(
    "name",
    [
        "LlamaForCausalLM",
        "LlamaModel",
        "GPT2LMHeadModel",
        "GPT2Model",
        "LlavaForConditionalGeneration",
    ],
)
def test_causal_language_models_and_their_base_models_predict(name):
    assert predicts_next_token(meta_model(name))


@pytest.mark.parametrize(
    "name",
    [
        "CLIPModel",
        "SiglipModel",
        "DINOv3ViTModel",
        "Dinov2Model",
        "ViTModel",
        "BertModel",
        "BertForPreTraining",
        "BertForMaskedLM",
        "LlamaForSequenceClassification",
        "T5ForConditionalGeneration",
    ],
)
def test_other_models_do_not(name):
    assert not predicts_next_token(meta_model(name))
