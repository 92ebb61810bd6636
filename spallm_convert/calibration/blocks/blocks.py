"""Run a dense model block by block, with the weights of one block in memory at a time.

Nothing here depends on an architecture. transformers builds the model without weights. Its blocks
are the list of modules that contains the linear layers to sketch. To record the arguments that each
block is called with, the model is run on the text with its embeddings in memory and with stand-ins
in place of the blocks. All samples have the same length, so these arguments must be the same for
all batches.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from spallm_convert.errors import CalibrationError
from spallm_convert.source.skeleton import by_model_name
from spallm_formats import StoredTensor

from .calls import Call
from .stand_ins import StandIns
from .weights import Weights, forget

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Blocks:
    """The blocks of a model, which are loaded and run one after the other.

    Args:
        model: The model, built without weights (`build_empty`).
        tensors: The tensors of its checkpoint, by name.
        linears: Paths in the model of the layers to sketch.
        tokens: The text, int64 [samples, seqlen].
        batch: Samples that run at once, a divisor of the number of samples.
        dtype: The dtype to compute in.
        device: The device to compute on.

    Attributes:
        path: Path of the list of blocks in the model.
        inputs: Hidden states [batch, seqlen, hidden] that enter the first block, by batch, on the
            CPU.

    Raises:
        CalibrationError: The layers lie in no list of blocks or in several, the checkpoint has no
            fitting tensor for a weight of a block, or the model passes its blocks arguments other
            than hidden states that depend on the text.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tensors: dict[str, StoredTensor],
        linears: Iterable[str],
        tokens: Tensor,
        *,
        batch: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self.path = find_blocks(model, linears)
        nn.Module.eval(model)
        self._model = model
        self._dtype, self._device = dtype, torch.device(device)
        self._weights = Weights(by_model_name(model, tensors), dtype, self._device)
        listed = dict(model.get_submodule(self.path).named_children())
        self._paths = [f"{self.path}.{name}" for name in listed]
        self._modules = list(listed.values())
        self._stand_ins = StandIns(model, self._modules, self.path)
        self._check_stored()
        self._fill_surroundings()
        self._calls, self.inputs = self._enter(torch.split(tokens, batch))
        self._forget_surroundings()

    def __len__(self) -> int:
        return len(self._modules)

    @property
    def device(self) -> torch.device:
        return self._device

    def take_inputs(self) -> list[Tensor]:
        """Return `inputs` and forget them, so that the caller can free them batch by batch."""
        taken, self.inputs = self.inputs, []
        return taken

    def load(self, number: int) -> nn.Module:
        """Return a block with its dense weights. `unload` frees them."""
        self._weights.fill(self._modules[number], self._paths[number])
        return self._modules[number]

    def unload(self, number: int) -> None:
        """Free the weights of a block."""
        for module in self._modules[number].modules():
            forget(module)

    def run(self, number: int, block: nn.Module, hidden: Tensor) -> Tensor:
        """Run a block.

        Args:
            number: Number of the block, whose recorded arguments are passed.
            block: The block, or another module in its place.
            hidden: Hidden states that enter the block, [batch, seqlen, hidden].

        Returns:
            Hidden states after the block, of the same shape, in the dtype of this object on its
            device.
        """
        output = self._invoke(block, self._calls[number], hidden)
        return output[0] if isinstance(output, tuple) else output  # type: ignore[no-any-return]

    def pull_back(self, number: int, block: nn.Module, hidden: Tensor, gradient: Tensor) -> Tensor:
        """Propagate a gradient back through a block.

        The block is run forward first. Hooks on the outputs of its layers get their gradients.

        Args:
            number: Number of the block.
            block: The block, loaded.
            hidden: Hidden states that enter the block.
            gradient: Gradient with respect to the hidden states after the block.

        Returns:
            Gradient with respect to the hidden states that enter the block.
        """
        entered = hidden.detach().to(self._device, self._dtype).requires_grad_()
        left = self.run(number, block, entered)
        with self._stand_ins.clear_errors():
            (result,) = torch.autograd.grad(left, entered, gradient.to(left))
        return result

    def assemble(self, replace: Callable[[str, nn.Linear], nn.Module | None]) -> PreTrainedModel:
        """Load all weights, replace layers of the blocks, and return the whole model.

        No block can be run on its own afterwards.

        Args:
            replace: Takes the path of a linear layer and the layer. It returns the layer to put in
                its place, or None to keep the dense one.

        Raises:
            CalibrationError: The model has no output layer, or the checkpoint lacks a weight.
        """
        self._fill_surroundings()
        for number in range(len(self)):
            block = self.load(number)
            for name, layer in list(block.named_modules()):
                path = f"{self.path_of(number)}.{name}"
                if isinstance(layer, nn.Linear) and (other := replace(path, layer)) is not None:
                    self._model.set_submodule(path, other)
        self._fill_head()
        return self._model

    @contextlib.contextmanager
    def predicting(self) -> Iterator[None]:
        """Hold all weights outside of the blocks in memory during a `with` block, for `logits`."""
        self._fill_surroundings()
        self._fill_head()
        try:
            yield
        finally:
            self._forget_surroundings()
            if (head := self._head()) is not None:
                for module in head.modules():
                    forget(module)

    def logits(self, tokens: Tensor, hidden: Tensor) -> Tensor:
        """Apply the final norm and the head to hidden states after the last block.

        Call this for an assembled model, or within `predicting`. Gradients are computed if `hidden`
        requires them.

        Args:
            tokens: The tokens that the states belong to, int64 [batch, seqlen].
            hidden: Hidden states after the last block, [batch, seqlen, hidden].

        Returns:
            The logits, [batch, seqlen, vocab].
        """
        final = hidden.to(self._device, self._dtype)
        with torch.set_grad_enabled(hidden.requires_grad):
            return self._stand_ins.logits(tokens.to(self._device), final)

    def check_predictions(self) -> None:
        """Check that `logits` can be computed, before there is work that would be lost.

        Raises:
            CalibrationError: The model has no output layer, or the checkpoint lacks a weight.
        """
        with self.predicting():
            pass

    def path_of(self, number: int) -> str:
        """Return the path of a block in the model."""
        return self._paths[number]

    @torch.no_grad()
    def _enter(self, batches: Sequence[Tensor]) -> tuple[list[Call], list[Tensor]]:
        """Return the call of every block, and the inputs of the first block by batch."""
        stand_ins, batches = self._stand_ins, [tokens.to(self._device) for tokens in batches]
        (first,), hidden = stand_ins.record(batches[0], 1)
        stand_ins.as_tuple = isinstance(self._invoke(self.load(0), first, hidden), tuple)
        self.unload(0)
        stand_ins.check_run_once(
            batches[0][:1, :2]
        )  # few tokens, because a head may compute logits
        calls: list[Call] = []
        inputs = []
        for tokens in batches:
            found, hidden = stand_ins.record(tokens, len(self))
            calls = calls or found
            if not all(map(Call.same_as, found, calls)):
                raise CalibrationError(
                    f"{type(self._model).__name__} passes its blocks arguments other than hidden "
                    f"states that depend on the text, so they cannot be run one by one"
                )
            inputs.append(hidden.cpu())
        return calls, inputs

    def _head(self) -> nn.Module | None:
        """Return the output layer, None if there is none or it is the embedding itself."""
        model: Any = self._model
        head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
        return None if head is embedding else head

    def _fill_head(self) -> None:
        """Read the output layer, then check that no weight outside of the blocks is missing.

        A missing weight is on the meta device, where a product raises no error.
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
            self._weights.fill(head, path)
            if self._weights.missing(head, path):
                self._model.tie_weights()
        around = (
            (n, p) for n, p in self._model.named_parameters() if not n.startswith(self.path + ".")
        )
        if missing := [name for name, parameter in around if parameter.is_meta]:
            raise CalibrationError(
                f"{type(self._model).__name__} cannot predict: the checkpoint has no tensor for "
                f"{', '.join(missing[:3])}; calibrate it without --heal and --target-bits"
            )

    def _invoke(self, block: nn.Module, call: Call, hidden: Tensor) -> Any:
        with self._stand_ins.clear_errors():
            return call.repeat(block, hidden.to(self._device, self._dtype))

    def _check_stored(self) -> None:
        """Raise CalibrationError if the checkpoint lacks a block's weight, before any run."""
        for path, block in zip(self._paths, self._modules, strict=True):
            if missing := self._weights.missing(block, path):
                raise CalibrationError(
                    f"{path}: the checkpoint has no tensor for {', '.join(missing[:3])}, so the "
                    f"block cannot be run"
                )

    def _fill_surroundings(self) -> None:
        """Read all weights but the blocks' and the output layer's, whose result is not used."""
        inside = {id(module) for block in self._modules for module in block.modules()}
        if (head := self._head()) is not None:
            inside.add(id(head))
        self._around = [m for m in self._model.modules() if id(m) not in inside]
        for path, module in self._model.named_modules():
            if id(module) not in inside:
                self._weights.fill_own(module, path)
        for module in self._model.modules():  # in blocks too: no later step moves them
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.to(self._device))

    def _forget_surroundings(self) -> None:
        """Free the weights outside of blocks: they are not needed until the model is assembled."""
        for module in self._around:
            forget(module)


def find_blocks(model: nn.Module, linears: Iterable[str]) -> str:
    """Return the path of the one list of modules that contains all the linear layers.

    Args:
        model: The model, with or without weights.
        linears: Paths of the linear layers in the model.

    Raises:
        CalibrationError: The layers lie in several lists, or outside of any list.
    """
    lists = [path for path, m in model.named_modules() if isinstance(m, nn.ModuleList)]
    owners: dict[str | None, str] = {}
    for linear in linears:
        owner = next((path for path in lists if linear.startswith(path + ".")), None)
        owners.setdefault(owner, linear)
    path, *others = owners
    if others or path is None:
        lying = ", ".join(f"{linear} in {owner or 'no list'}" for owner, linear in owners.items())
        raise CalibrationError(
            f"{type(model).__name__}: for calibration, the layers to sketch must lie in one list "
            f"of blocks, found {lying}; --ignore leaves layers dense"
        )
    return path
