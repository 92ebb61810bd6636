"""A dense model gone through block by block, with the weights of one block in memory at a time.

Nothing here knows an architecture. transformers builds the model without weights; its blocks are
the list of modules that holds the linear layers to sketch. What a block is called with is seen by
running the model on the text with its embeddings in memory and stand-ins for all blocks. All
samples are equally long, so those arguments have to be the same for all.
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
    """The blocks of a model, to be loaded and run one after the other.

    model: built without weights (`build_empty`); tensors: those of its checkpoint; linears: paths
    in the model of the layers to sketch; tokens: int64 [samples, seqlen]; batch: samples that run
    at once, a divisor of their number. Computes in `dtype` on `device`.

    path: of the list of blocks; inputs: hidden states [batch, seqlen, hidden] that enter the first
    block, by batch, on the CPU. Raises CalibrationError when the layers lie in no list of blocks or
    in several, when the checkpoint stores a block's weights otherwise than the model has them, or
    when the model calls its blocks with more that depends on the text than hidden states.
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
        """A block with its dense weights, to be given back by `unload`."""
        self._weights.fill(self._modules[number], self._paths[number])
        return self._modules[number]

    def unload(self, number: int) -> None:
        """Forgets the weights of a block."""
        for module in self._modules[number].modules():
            forget(module)

    def run(self, number: int, block: nn.Module, hidden: Tensor) -> Tensor:
        """Hidden states [batch, seqlen, hidden] after a block, of `dtype` on `device`."""
        output = self._invoke(block, self._calls[number], hidden)
        return output[0] if isinstance(output, tuple) else output  # type: ignore[no-any-return]

    def pull_back(self, number: int, block: nn.Module, hidden: Tensor, gradient: Tensor) -> Tensor:
        """A gradient by the hidden states that leave a block as one by those that enter it.

        hidden: what enters. Runs the block, so that hooks on its layers' outputs get theirs.
        """
        entered = hidden.detach().to(self._device, self._dtype).requires_grad_()
        left = self.run(number, block, entered)
        with self._stand_ins.clear_errors():
            (result,) = torch.autograd.grad(left, entered, gradient.to(left))
        return result

    def assemble(self, replace: Callable[[str, nn.Linear], nn.Module | None]) -> PreTrainedModel:
        """The whole model with its weights, layers of blocks replaced; no block can be run after.

        replace: gives the layer in place of the linear one at a path, None to leave that.
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
        """Has what is not in blocks in memory while the `with` block runs, for `logits`."""
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
        """What norm and head make of hidden states after the last block, [batch, seqlen, vocab].

        tokens: those that the states belong to. For a model that has been assembled, or within
        `predicting`. Differentiable if the states are to have a gradient.
        """
        final = hidden.to(self._device, self._dtype)
        with torch.set_grad_enabled(hidden.requires_grad):
            return self._stand_ins.logits(tokens.to(self._device), final)

    def check_predictions(self) -> None:
        """Raises CalibrationError for a model that `logits` cannot be had of, before there is work
        that would be lost."""
        with self.predicting():
            pass

    def path_of(self, number: int) -> str:
        """The path of a block in the model."""
        return self._paths[number]

    @torch.no_grad()
    def _enter(self, batches: Sequence[Tensor]) -> tuple[list[Call], list[Tensor]]:
        """How every block is called, and what enters the first, by batch."""
        stand_ins, batches = self._stand_ins, [tokens.to(self._device) for tokens in batches]
        (first,), hidden = stand_ins.record(batches[0], 1)
        stand_ins.as_tuple = isinstance(self._invoke(self.load(0), first, hidden), tuple)
        self.unload(0)
        stand_ins.check_run_once(batches[0][:1, :2])  # few logits, should there be any
        calls: list[Call] = []
        inputs = []
        for tokens in batches:
            found, hidden = stand_ins.record(tokens, len(self))
            calls = calls or found
            if not all(map(Call.same_as, found, calls)):
                raise CalibrationError(
                    f"{type(self._model).__name__} calls its blocks with more that depends on the "
                    f"text than hidden states, so they cannot be run one by one"
                )
            inputs.append(hidden.cpu())
        return calls, inputs

    def _head(self) -> nn.Module | None:
        """The output layer, where it is not the embedding itself."""
        model: Any = self._model
        head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
        return None if head is embedding else head

    def _fill_head(self) -> None:
        """Reads the output layer too, after which nothing may be missing but blocks: a weight on
        the meta device would be multiplied by as if it were there."""
        model: Any = self._model
        if model.get_output_embeddings() is None:
            raise CalibrationError(
                f"{type(self._model).__name__} has no output layer, so it predicts no tokens: it "
                f"can be calibrated, but without healing or bits by layer"
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
                f"{', '.join(missing[:3])}"
            )

    def _invoke(self, block: nn.Module, call: Call, hidden: Tensor) -> Any:
        with self._stand_ins.clear_errors():
            return call.repeat(block, hidden.to(self._device, self._dtype))

    def _check_stored(self) -> None:
        """Refuses, before anything is run, a block with weights that the checkpoint lacks."""
        for path, block in zip(self._paths, self._modules, strict=True):
            if missing := self._weights.missing(block, path):
                raise CalibrationError(
                    f"{path}: the checkpoint has no tensor for {', '.join(missing[:3])}, so the "
                    f"block cannot be run"
                )

    def _fill_surroundings(self) -> None:
        """Reads what is neither in a block nor the output layer, whose result nobody looks at."""
        inside = {id(module) for block in self._modules for module in block.modules()}
        if (head := self._head()) is not None:
            inside.add(id(head))
        self._around = [m for m in self._model.modules() if id(m) not in inside]
        for path, module in self._model.named_modules():
            if id(module) not in inside:
                self._weights.fill_own(module, path)
        for module in self._model.modules():  # those in blocks too: they are never read again
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.to(self._device))

    def _forget_surroundings(self) -> None:
        """Until the model is assembled nobody needs them, and an embedding can be large."""
        for module in self._around:
            forget(module)


def find_blocks(model: nn.Module, linears: Iterable[str]) -> str:
    """Path of the one list of modules that all the linear layers lie in."""
    lists = [path for path, m in model.named_modules() if isinstance(m, nn.ModuleList)]
    owners: dict[str | None, str] = {}
    for linear in linears:
        owner = next((path for path in lists if linear.startswith(path + ".")), None)
        owners.setdefault(owner, linear)
    path, *others = owners
    if others or path is None:
        lying = ", ".join(f"{linear} in {owner or 'none'}" for owner, linear in owners.items())
        raise CalibrationError(
            f"{type(model).__name__}: the layers to sketch must lie in one list of blocks to be "
            f"calibrated, found {lying}; --ignore leaves layers dense"
        )
    return path
