"""Run a dense model block by block, with the weights of one block in memory at a time.

Nothing here depends on an architecture. transformers builds the model without weights. Its blocks
are a list of modules that contains layers to sketch. To record the arguments that each block is
called with, the model is run on the text with its embeddings in memory and with stand-ins in place
of the blocks. All samples have the same length, so these arguments are nearly always the same for
all batches. If they are not (a decoder reads what the encoder found in the text), those of every
batch are kept.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from spallm_convert.errors import CalibrationError
from spallm_convert.runtime.linear import SketchedLinear
from spallm_convert.sketch.layer import Layer
from spallm_formats import StoredTensor

from .calls import Call
from .lists import choose_plain_experts, find_lists, linear_weights, refuse_shared_keys
from .reader import find_reader
from .replacing import Replace, put_layers
from .stand_ins import StandIns
from .surroundings import Surroundings
from .targets import Target, all_targets, find_targets
from .weights import forget

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Blocks:
    """The blocks of one list of a model, which are loaded and run one after the other.

    Args:
        model: The model, built without weights (`build_empty`).
        tensors: The tensors of its checkpoint, by name.
        linears: Paths in the model of the layers to sketch, or of the parameters of experts.
        tokens: The text, int64 [samples, seqlen].
        batch: Samples that run at once, a divisor of the number of samples.
        dtype: The dtype to compute in.
        device: The device to compute on.
        before: The blocks that the text runs through before these, such as those of an encoder.

    Attributes:
        path: Path of the list of blocks in the model.
        inputs: Hidden states [batch, seqlen, hidden] that enter the first block, by batch, on the
            CPU.
        next: The blocks of another list that the text runs through after these. Call their `enter`
            when these have been run.

    Raises:
        CalibrationError: The text runs through no list of blocks with layers to sketch, the
            checkpoint has no fitting tensor for a weight of a block, or the model runs its blocks
            in another way than one after the other.
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
        before: Blocks | None = None,
    ) -> None:
        self._next_path: str | None
        self._stand_ins: StandIns
        nn.Module.eval(model)
        self._model = model
        self._dtype, self._device = dtype, torch.device(device)
        self._batches = torch.split(tokens, batch)
        self._before = before
        self._finals: tuple[list[Tensor], list[Tensor]] = ([], [])
        if before is None:
            refuse_shared_keys(model)
            choose_plain_experts(model)
            self._linears = linear_weights(model)
            self._lists = find_lists(model, linears)
            self._around = Surroundings(model, tensors, self._lists, dtype, self._device)
            self._around.fill()
            some = self._batches[0][:1].to(self._device)
            self._reader, self.path = find_reader(model, self._modules_of(self._lists), some)
        else:
            assert before._next_path is not None
            self._reader = before._reader
            self._around, self._linears = before._around, before._linears
            self._lists, self.path = before._lists, before._next_path
            self._around.fill()
        self._weights = self._around.weights
        listed = dict(model.get_submodule(self.path).named_children())
        self._paths = [f"{self.path}.{name}" for name in listed]
        self._modules = list(listed.values())
        earlier = () if before is None else (*before._stand_ins.before, before._stand_ins)
        owner = model.get_submodule(self.path.rpartition(".")[0])
        self._stand_ins = StandIns(self._reader, self._modules, self.path, owner, earlier)
        for path, block in zip(self._paths, self._modules, strict=True):
            self._weights.check(block, path)
        self._next_path = self._open()
        calls, self.inputs = self._record()
        self._calls = calls, calls
        self._around.forget()
        self.next = self._open_next(tensors, linears, tokens, batch)

    def __len__(self) -> int:
        return len(self._modules)

    @property
    def lists(self) -> list[Blocks]:
        """Return these blocks, and those of the lists that the text runs through after them."""
        return [self, *(self.next.lists if self.next else [])]

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

    def targets(self, number: int, layers: Iterable[Layer]) -> dict[str, Target]:
        """Return the parameters of a block that are sketched, by name in the block.

        Args:
            number: Number of the block.
            layers: The stored weights to sketch, of this block and of others.
        """
        return find_targets(self._modules[number], self._paths[number], layers, self._linears)

    def weights_of(self, number: int, paths: Collection[str]) -> dict[str, Target]:
        """Return weights of a block by name in the block, whether they are sketched or not.

        Args:
            number: Number of the block.
            paths: Paths in the model of linear layers, or of parameters of experts.
        """
        found = all_targets(self._modules[number], self._paths[number], self._linears)
        return {name: target for name, target in found.items() if target.path in paths}

    def enter(
        self, dense: list[Tensor], sketched: list[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Return the hidden states that enter the first block in both models, by batch, on the CPU.

        Call this after the blocks of `before` were run, whose outputs decide what enters here.

        Args:
            dense: Hidden states after the blocks of `before` in the dense model, by batch.
            sketched: The same in the model with sketched blocks.
        """
        assert self._before is not None
        self._before._finals = dense, sketched
        self._around.fill()
        found = [self._record(stream) for stream in range(2)]
        self._around.forget()
        self._calls = found[0][0], found[1][0]
        return found[0][1], found[1][1]

    def run(
        self,
        number: int,
        block: nn.Module,
        hidden: Tensor,
        batch: int = 0,
        *,
        sketched: bool = False,
    ) -> Tensor:
        """Run a block.

        Args:
            number: Number of the block, whose recorded arguments are passed.
            block: The block, or another module in its place.
            hidden: Hidden states that enter the block, [batch, seqlen, hidden].
            batch: Number of the batch of the text. It matters if the arguments depend on the text.
            sketched: Whether the hidden states are those of the model with sketched blocks. It
                matters if another list of blocks was run before.

        Returns:
            Hidden states after the block, of the same shape, in the dtype of this object on its
            device.
        """
        by_batch = self._calls[sketched]
        call = by_batch[batch if len(by_batch) > 1 else 0][number]
        output = self._invoke(block, call, hidden)
        return output[0] if isinstance(output, tuple | list) else output  # type: ignore[no-any-return]

    def pull_back(
        self, number: int, block: nn.Module, hidden: Tensor, gradient: Tensor, batch: int = 0
    ) -> Tensor:
        """Propagate a gradient back through a block.

        The block is run forward first. Hooks on the outputs of its layers get their gradients.

        Args:
            number: Number of the block.
            block: The block, loaded.
            hidden: Hidden states that enter the block.
            gradient: Gradient with respect to the hidden states after the block.
            batch: Number of the batch of the text.

        Returns:
            Gradient with respect to the hidden states that enter the block.
        """
        entered = hidden.detach().to(self._device, self._dtype).requires_grad_()
        left = self.run(number, block, entered, batch)
        with self._stand_ins.clear_errors():
            (result,) = torch.autograd.grad(left, entered, gradient.to(left))
        return result

    def assemble(self, replace: Replace) -> PreTrainedModel:
        """Load all weights, replace layers of the blocks, and return the whole model.

        No block can be run on its own afterwards.

        Args:
            replace: Returns the layer to put in the place of a layer of a block.

        Raises:
            CalibrationError: The model has no output layer, or the checkpoint lacks a weight.
        """
        self._around.fill()
        for number in range(len(self)):
            self.replace_layers(number, self.load(number), replace)
        self._around.fill_head()
        return self._model

    def replace_layers(
        self, number: int, block: nn.Module, replace: Replace
    ) -> dict[str, SketchedLinear]:
        """Replace layers in a block.

        Args:
            number: Number of the block.
            block: The block, loaded, or a copy of it.
            replace: Returns the layer to put in the place of a layer.

        Returns:
            The layers that `replace` returned, by path in the model.
        """
        return put_layers(block, self._paths[number], self._linears, replace)

    @contextlib.contextmanager
    def predicting(self) -> Iterator[None]:
        """Hold all weights outside of the blocks in memory during a `with` block, for `logits`."""
        self._around.fill()
        self._around.fill_head()
        try:
            yield
        finally:
            self._around.forget()

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
        if self.next is not None or self._model.config.is_encoder_decoder:
            raise CalibrationError(
                f"{type(self._model).__name__} has an encoder and a decoder, which --heal and "
                f"--target-bits cannot tune together; calibrate it without them"
            )
        with self.predicting():
            pass

    def path_of(self, number: int) -> str:
        """Return the path of a block in the model."""
        return self._paths[number]

    def _modules_of(self, paths: Iterable[str]) -> dict[str, list[nn.Module]]:
        return {path: list(self._model.get_submodule(path).children()) for path in paths}

    @torch.no_grad()
    def _open(self) -> str | None:
        """See what a block returns; return the path of the list that is called after this one."""
        stand_ins, tokens = self._stand_ins, self._batches[0].to(self._device)
        (first,), hidden = stand_ins.record(tokens, 1)
        output = self._invoke(self.load(0), first, hidden)
        stand_ins.rest = output[1:] if isinstance(output, tuple | list) else None
        self.unload(0)
        done = {self.path, *(earlier.path for earlier in stand_ins.before)}
        others = self._modules_of(path for path in self._lists if path not in done)
        # Few tokens, because heads may compute logits.
        path, skipped = stand_ins.find_next(tokens[:1, :2], others)
        stand_ins.skip(skipped)
        for number in reversed(skipped):
            del self._modules[number], self._paths[number]
        return path

    @torch.no_grad()
    def _record(self, stream: int | None = None) -> tuple[list[list[Call]], list[Tensor]]:
        """Return the calls of every block by batch, and the inputs of the first block by batch.

        There is one list of calls if they are the same for all batches. stream: 0 for the dense
        model, 1 for the sketched one, None if the blocks before have not been run.
        """
        calls: list[list[Call]] = []
        inputs = []
        is_same = True
        for number, tokens in enumerate(self._batches):
            with self._after_others(stream, number):
                found, hidden = self._stand_ins.record(tokens.to(self._device), len(self))
            is_same = is_same and (not calls or all(map(Call.same_as, found, calls[0])))
            if not is_same:
                moved: dict[int, Tensor] = {}
                found = [call.on(torch.device("cpu"), moved) for call in found]
            while not is_same and len(calls) < number:
                calls.append(calls[0])
            if not is_same or not calls:
                calls.append(found)
            inputs.append(hidden.cpu())
        return calls, inputs

    @contextlib.contextmanager
    def _after_others(self, stream: int | None, batch: int) -> Iterator[None]:
        """Let earlier lists of blocks return what they returned for a batch in a stream."""
        earlier = self._before
        while earlier is not None and stream is not None:
            final = earlier._finals[stream][batch]
            earlier._stand_ins.final = final.to(self._device, self._dtype)
            earlier = earlier._before
        try:
            yield
        finally:
            for stand_ins in self._stand_ins.before:
                stand_ins.final = None

    def _open_next(
        self, tensors: dict[str, StoredTensor], linears: Iterable[str], tokens: Tensor, batch: int
    ) -> Blocks | None:
        if self._next_path is None:
            return None
        how: Any = {"batch": batch, "dtype": self._dtype, "device": self._device, "before": self}
        return Blocks(self._model, tensors, linears, tokens, **how)

    def _invoke(self, block: nn.Module, call: Call, hidden: Tensor) -> Any:
        with self._stand_ins.clear_errors():
            call = call.on(self._device, {})
            return call.repeat(block, hidden.to(self._device, self._dtype))
