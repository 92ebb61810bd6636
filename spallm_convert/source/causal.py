"""Whether a model is a causal language model, and takes the tokens that it is to be given."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from spallm_convert.errors import OptionError

if TYPE_CHECKING:
    import torch

#: Losses that transformers gives to classes which predict the next token; None is an older name.
_CAUSAL_LOSSES = {"ForCausalLM", "ForConditionalGeneration", None}


def predicts_next_token(model: Any) -> bool:
    """Whether a transformers model is a causal language model, by its class."""
    causal = getattr(model, "loss_type", None) in _CAUSAL_LOSSES
    return causal and not model.config.is_encoder_decoder


def check_tokens(model: Any, tokens: torch.Tensor, length: int, option: str) -> None:
    """Raises OptionError for tokens that a model has no embeddings for, or for more of them at once
    than it has positions. length: tokens at once; option: what asks for so many."""
    name = type(model).__name__
    text_config = model.config.get_text_config()
    positions = getattr(text_config, "max_position_embeddings", None)
    if positions and 0 < positions < length:
        raise OptionError(f"{option} is more than the {positions} positions of {name}")
    vocabulary = getattr(text_config, "vocab_size", None)
    least, most = (int(value) for value in tokens.aminmax())
    if least < 0 or (vocabulary and most >= vocabulary):
        raise OptionError(
            f"token {least if least < 0 else most} is not in the vocabulary of {name}, which has "
            f"{vocabulary}: is the tokenizer the model's own?"
        )
