"""Hold the weights of a model outside of its blocks in memory, while they are needed."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from spallm_convert.errors import CalibrationError
from spallm_convert.source.stored_names import loaded_names, matrix_rows
from spallm_formats import StoredTensor

from .weights import Weights, forget, make_computed

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Surroundings:
    """The weights outside of the blocks: embeddings, norms, and the output layer.

    Args:
        model: The model, built without weights.
        tensors: The tensors of its checkpoint, by name.
        lists: Paths of the lists of blocks.
        dtype: The dtype to compute in.
        device: The device to compute on.

    Attributes:
        weights: All weights of the checkpoint.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tensors: dict[str, StoredTensor],
        lists: Collection[str],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._model, self._lists = model, lists
        self._dtype, self._device = dtype, device
        self._around: list[nn.Module] = []
        names = loaded_names(model, matrix_rows((n, t.shape) for n, t in tensors.items()))
        tied: dict[str, str] = dict(getattr(model, "all_tied_weights_keys", None) or {})
        if (head := self._head()) is not None:  # tied heads are tied when they are filled
            inside = {id(module) for module in head.modules()}
            paths = [path for path, m in model.named_modules() if id(m) in inside]
            tied = {n: to for n, to in tied.items() if n.rpartition(".")[0] not in paths}
        self.weights = Weights(tensors, names, dtype, device, tied)

    def fill(self) -> None:
        """Read all weights but the blocks' and the output layer's, whose result is not used."""
        inside = {
            id(module)
            for path in self._lists
            for block in self._model.get_submodule(path).children()
            for module in block.modules()
        }
        if (head := self._head()) is not None:
            inside.add(id(head))
        self._around = [m for m in self._model.modules() if id(m) not in inside]
        for path, module in self._model.named_modules():
            if id(module) not in inside:
                self.weights.fill_own(module, path)
                make_computed(module, self._dtype, self._device)
        for module in self._model.modules():  # in blocks too: no later step moves them
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.to(self._device))

    def forget(self) -> None:
        """Free these weights, and those of the output layer."""
        for module in self._around:
            forget(module)
        if (head := self._head()) is not None:
            for module in head.modules():
                forget(module)

    def fill_head(self) -> None:
        """Read the output layer, then check that no weight outside of the blocks is missing.

        A missing weight is on the meta device, where a product raises no error.

        Raises:
            CalibrationError: The model has no output layer, or the checkpoint lacks a weight.
        """
        model: Any = self._model
        if model.get_output_embeddings() is None:
            raise CalibrationError(
                f"{type(self._model).__name__} has no output layer, so it predicts no tokens; "
                f"calibrate it without --heal and --target-bits"
            )
        head = self._head()
        if head is not None:
            path = next(path for path, m in self._model.named_modules() if m is head)
            self.weights.fill(head, path)
            if self.weights.missing(head, path):
                self._model.tie_weights()
        inside = tuple(path + "." for path in self._lists)
        around = ((n, p) for n, p in self._model.named_parameters() if not n.startswith(inside))
        if missing := [name for name, parameter in around if parameter.is_meta]:
            raise CalibrationError(
                f"{type(self._model).__name__} cannot predict: the checkpoint has no tensor for "
                f"{', '.join(missing[:3])}; calibrate it without --heal and --target-bits"
            )

    def _head(self) -> nn.Module | None:
        """Return the output layer, None if there is none or it is the embedding itself."""
        model: Any = self._model
        try:
            head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
        except NotImplementedError:  # raised for models that read more than one kind of input
            return None
        return None if head is embedding else head
