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
from spallm_convert.source.stored_names import loaded_names, matrix_rows
from spallm_formats import StoredTensor

from .calls import Call
from .lists import find_lists, linear_weights, refuse_shared_keys
from .replacing import Replace, put_layers
from .stand_ins import StandIns, first_list
from .targets import Target, all_targets, find_targets
from .weights import Weights, forget

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
            _choose_plain_experts(model)
            self._weights = self._open_weights(tensors)
            self._linears = linear_weights(model)
            self._lists = find_lists(model, linears)
            self.path = self._first_list()
        else:
            assert before._next_path is not None
            self._weights, self._linears = before._weights, before._linears
            self._lists, self.path = before._lists, before._next_path
        listed = dict(model.get_submodule(self.path).named_children())
        self._paths = [f"{self.path}.{name}" for name in listed]
        self._modules = list(listed.values())
        earlier = () if before is None else (*before._stand_ins.before, before._stand_ins)
        self._stand_ins = StandIns(model, self._modules, self.path, earlier)
        self._check_stored()
        self._fill_surroundings()
        self._next_path = self._open()
        calls, self.inputs = self._record()
        self._calls = calls, calls
        self._forget_surroundings()
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
        self._fill_surroundings()
        found = [self._record(stream) for stream in range(2)]
        self._forget_surroundings()
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
        return output[0] if isinstance(output, tuple) else output  # type: ignore[no-any-return]

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
        self._fill_surroundings()
        for number in range(len(self)):
            self.replace_layers(number, self.load(number), replace)
        self._fill_head()
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

    def _open_weights(self, tensors: dict[str, StoredTensor]) -> Weights:
        names = loaded_names(self._model, matrix_rows((n, t.shape) for n, t in tensors.items()))
        tied: dict[str, str] = dict(getattr(self._model, "all_tied_weights_keys", None) or {})
        if (head := self._head()) is not None:  # tied heads are tied when they are filled
            inside = {id(module) for module in head.modules()}
            paths = [path for path, m in self._model.named_modules() if id(m) in inside]
            tied = {n: to for n, to in tied.items() if n.rpartition(".")[0] not in paths}
        return Weights(tensors, names, self._dtype, self._device, tied)

    def _first_list(self) -> str:
        """Return the path of the list of blocks that the text enters first."""
        if len(self._lists) == 1:
            return next(iter(self._lists))
        self._fill_surroundings()
        stand_ins = StandIns(self._model, [], ", ".join(self._lists))
        with stand_ins.clear_errors(), torch.no_grad():
            few = self._batches[0][:1, :2].to(self._device)
            path = first_list(self._model, self._modules_of(self._lists), few)
        self._forget_surroundings()
        if path is None:
            raise CalibrationError(
                f"{type(self._model).__name__}: the text runs through none of the lists of blocks "
                f"{', '.join(self._lists)}"
            )
        return path

    def _modules_of(self, paths: Iterable[str]) -> dict[str, list[nn.Module]]:
        return {path: list(self._model.get_submodule(path).children()) for path in paths}

    @torch.no_grad()
    def _open(self) -> str | None:
        """See what a block returns; return the path of the list that is called after this one."""
        stand_ins, tokens = self._stand_ins, self._batches[0].to(self._device)
        (first,), hidden = stand_ins.record(tokens, 1)
        output = self._invoke(self.load(0), first, hidden)
        stand_ins.rest = tuple(output[1:]) if isinstance(output, tuple) else None
        self.unload(0)
        done = {self.path, *(earlier.path for earlier in stand_ins.before)}
        others = self._modules_of(path for path in self._lists if path not in done)
        return stand_ins.find_next(tokens[:1, :2], others)  # few tokens: heads compute logits

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

    def _head(self) -> nn.Module | None:
        """Return the output layer, None if there is none or it is the embedding itself."""
        model: Any = self._model
        try:
            head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
        except NotImplementedError:  # raised for models that read more than one kind of input
            return None
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
        inside = tuple(path + "." for path in self._lists)
        around = ((n, p) for n, p in self._model.named_parameters() if not n.startswith(inside))
        if missing := [name for name, parameter in around if parameter.is_meta]:
            raise CalibrationError(
                f"{type(self._model).__name__} cannot predict: the checkpoint has no tensor for "
                f"{', '.join(missing[:3])}; calibrate it without --heal and --target-bits"
            )

    def _invoke(self, block: nn.Module, call: Call, hidden: Tensor) -> Any:
        with self._stand_ins.clear_errors():
            call = call.on(self._device, {})
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
        listed = self._modules_of(self._lists).values()
        inside = {id(m) for blocks in listed for block in blocks for m in block.modules()}
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


def _choose_plain_experts(model: PreTrainedModel) -> None:
    """Run experts in the model's own code, which computes the same on every device."""
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
