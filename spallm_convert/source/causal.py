"""Check that a model is a causal language model, and that a text fits it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from spallm_convert.errors import OptionError

if TYPE_CHECKING:
    import torch

#: Losses of the classes in transformers that predict the next token.
_CAUSAL_LOSSES = {"ForCausalLM", "ForConditionalGeneration"}


def predicts_next_token(model: Any) -> bool:
    """Return whether a transformers model is a causal language model, judged by its class.

    The base model of one, such as LlamaModel, counts too: its blocks see only earlier tokens.

    Args:
        model: The model.
    """
    from transformers.models.auto import modeling_auto

    if model.config.is_encoder_decoder:
        return False
    loss = getattr(model, "loss_type", None)
    if loss is not None:
        return loss in _CAUSAL_LOSSES
    if model.can_generate() or "LMHead" in type(model).__name__:  # older classes: GPT2LMHeadModel
        return True
    family = model.config.model_type
    has_causal = family in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    # Families such as BERT have a causal class too, but their base model sees the whole text.
    return has_causal and family not in modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES


def check_tokens(model: Any, tokens: torch.Tensor, length: int, option: str) -> None:
    """Check that a model has an embedding for every token, and enough positions.

    Args:
        model: A transformers model.
        tokens: Token ids of any shape.
        length: Number of tokens that go through the model at once.
        option: Option that sets this number, with its value, for the message.

    Raises:
        OptionError: If a token is not in the vocabulary, or there are too few positions.
    """
    name = type(model).__name__
    text_config = model.config.get_text_config()
    positions = getattr(text_config, "max_position_embeddings", None)
    if positions and 0 < positions < length:
        raise OptionError(
            f"{option} is more than the {positions} positions of {name}; choose {positions} or less"
        )
    vocabulary = getattr(text_config, "vocab_size", None)
    least, most = (int(value) for value in tokens.aminmax())
    if least < 0 or (vocabulary and most >= vocabulary):
        raise OptionError(
            f"token {least if least < 0 else most} is not in the vocabulary of {name}, which has "
            f"{vocabulary} tokens; use the model's own tokenizer"
        )
