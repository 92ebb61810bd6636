"""Find the part of a model that reads the text, and the list of blocks that the text enters first.

Most models read the text as they are. CLIP's forward needs an image too, but its tower for texts is
a model of its own, which runs on the text alone.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from spallm_convert.devices import is_out_of_memory
from spallm_convert.errors import CalibrationError, one_line

from .stand_ins import StopForward, replaced, run_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_TEXT = "input_ids"


@torch.no_grad()
def find_reader(
    model: PreTrainedModel, lists: Mapping[str, Sequence[nn.Module]], tokens: Tensor
) -> tuple[PreTrainedModel, str]:
    """Return the model that reads the text, and the path of the list that the text enters first.

    Args:
        model: The whole model, with weights around its blocks.
        lists: The blocks of each list, by path of the list in the whole model.
        tokens: Some tokens, int64 [batch, seqlen]; one sample is enough.

    Returns:
        The whole model if it runs on text alone, else the outermost model in it that does and that
        has blocks.

    Raises:
        CalibrationError: There is no such model, or the text runs through none of the lists.
    """
    failed: Exception | None = None
    for reader in (model, *_inner_readers(model, lists)):
        try:
            first = _first_list(reader, lists, tokens)
        except Exception as error:  # a model's code may raise anything
            if is_out_of_memory(error):
                raise
            failed = failed or error
            continue
        if first is not None:
            return reader, first
        if reader is model:
            break
    if failed is None:
        raise CalibrationError(
            f"{type(model).__name__}: the text runs through none of the lists of blocks "
            f"{', '.join(lists)}"
        )
    raise CalibrationError(
        f"{type(model).__name__} cannot be run on text alone "
        f"({type(failed).__name__}: {one_line(failed)})"
    ) from failed


def _first_list(
    model: PreTrainedModel, lists: Mapping[str, Sequence[nn.Module]], tokens: Tensor
) -> str | None:
    """Return the path of the list of blocks that a model calls first for a text, if any."""
    found: list[str] = []

    def stand_in(path: str, *args: object, **kwargs: object) -> None:
        found.append(path)
        raise StopForward

    blocks = [
        (block, functools.partial(stand_in, path))
        for path, modules in lists.items()
        for block in modules
    ]
    with replaced(blocks), contextlib.suppress(StopForward):
        run_model(model, tokens)
    return found[0] if found else None


def _inner_readers(
    model: PreTrainedModel, lists: Mapping[str, Sequence[nn.Module]]
) -> Iterator[PreTrainedModel]:
    """Yield the models in a model that read text and have blocks, outer ones first.

    A decoder alone would not get what its encoder finds, so encoder-decoders have none.
    """
    from transformers import PreTrainedModel

    if model.config.is_encoder_decoder:
        return
    for path, inner in model.named_modules():
        if (
            inner is not model
            and isinstance(inner, PreTrainedModel)
            and inner.main_input_name == _TEXT
            and _TEXT in inspect.signature(type(inner).forward).parameters
            and any(listed.startswith(path + ".") for listed in lists)
        ):
            yield inner
