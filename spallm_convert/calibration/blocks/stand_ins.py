"""Run a model without its blocks, to see how it calls them and what follows them.

The `forward` of every block is replaced by a function that records its arguments. The function
returns the hidden states as they came, or other hidden states.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from spallm_convert.devices import is_out_of_memory
from spallm_convert.errors import CalibrationError, SpallmError, one_line

from .calls import Call

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class StandIns:
    """Functions that take the place of a model's blocks.

    Tokens passed to the methods are int64 [batch, seqlen] on the model's device.

    Args:
        model: The model. Its config is changed so that it asks blocks for hidden states alone.
        modules: The blocks.
        path: Path of the list of blocks, for error messages.

    Attributes:
        as_tuple: Whether a block returns a tuple that starts with the hidden states.
    """

    def __init__(self, model: PreTrainedModel, modules: Sequence[nn.Module], path: str) -> None:
        _return_hidden_states_alone(model)
        self._model, self._modules, self._path = model, modules, path
        self.as_tuple = False

    def record(self, tokens: Tensor, count: int) -> tuple[list[Call], Tensor]:
        """Run the model up to a block, and record the calls of the blocks.

        Args:
            tokens: One batch of the text.
            count: Number of blocks whose calls are recorded, from the first.

        Returns:
            The calls, and the hidden states that enter the first block.

        Raises:
            CalibrationError: The model does not call its blocks in order, each with the output of
                the one before, or a weight before the blocks is missing.
        """
        calls: list[Call] = []
        entered: list[Tensor] = []

        def stand_in(number: int, *args: Any, **kwargs: Any) -> Any:
            call, hidden = Call.taken_apart(args, kwargs)
            passed = not calls or hidden is entered[0] or torch.equal(hidden, entered[0])
            if number != len(calls) or not passed:
                raise CalibrationError(
                    f"{type(self._model).__name__} does not pass the output of each block of "
                    f"{self._path} directly to the next, so they cannot be run one by one"
                )
            calls.append(call)
            entered.append(hidden)
            if len(calls) == count:
                raise StopForward
            return (hidden,) if self.as_tuple else hidden

        with (
            self._instead_of_blocks(stand_in),
            contextlib.suppress(StopForward),
            self.clear_errors(),
        ):
            self._model(tokens, use_cache=False)
        if len(calls) != count or entered[0].is_meta:
            why = f"the model calls only {len(calls)} of {count}"
            if calls and entered[0].is_meta:
                why = "weights before them are missing in the checkpoint"
            raise CalibrationError(
                f"{type(self._model).__name__}: the blocks {self._path} cannot be run: {why}"
            )
        return calls, entered[0]

    def check_run_once(self, tokens: Tensor) -> None:
        """Raise CalibrationError if the model calls its blocks again after the last one."""
        calls = 0

        def stand_in(number: int, *args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls > len(self._modules):
                raise StopForward
            _, hidden = Call.taken_apart(args, kwargs)
            return (hidden,) if self.as_tuple else hidden

        # Modules after the blocks may fail, because their weights have not been read.
        with self._instead_of_blocks(stand_in), contextlib.suppress(Exception):
            self._model(tokens, use_cache=False)
        if calls > len(self._modules):
            raise CalibrationError(
                f"{type(self._model).__name__} runs the blocks {self._path} more than once, but "
                f"calibration runs each block once"
            )

    def logits(self, tokens: Tensor, final: Tensor) -> Tensor:
        """Return the logits [batch, seqlen, vocab] of hidden states after the last block."""

        def stand_in(number: int, *args: Any, **kwargs: Any) -> Any:
            return (final,) if self.as_tuple else final

        with self._instead_of_blocks(stand_in), self.clear_errors():
            logits: Tensor = self._model(tokens, use_cache=False).logits
        return logits

    @contextlib.contextmanager
    def clear_errors(self) -> Iterator[None]:
        """Turn errors of the model's own code into CalibrationError, but not a lack of memory."""
        try:
            yield
        except (StopForward, SpallmError):
            raise
        except Exception as error:
            if is_out_of_memory(error):
                raise
            reason = f"{type(error).__name__}: {one_line(error)}"
            raise CalibrationError(
                f"{type(self._model).__name__}: the blocks {self._path} cannot be run one by one "
                f"({reason})"
            ) from error

    @contextlib.contextmanager
    def _instead_of_blocks(self, stand_in: Callable[..., Any]) -> Iterator[None]:
        """Call `stand_in` in place of the blocks, with a block's number and its arguments."""
        for number, block in enumerate(self._modules):
            block.forward = functools.partial(stand_in, number)
        try:
            yield
        finally:
            for block in self._modules:
                del block.forward


def _return_hidden_states_alone(model: PreTrainedModel) -> None:
    """Turn off other outputs in the config, such as router logits: stand-ins do not return them."""
    for config in (model.config, model.config.get_text_config()):
        for name in ("output_attentions", "output_hidden_states", "output_router_logits"):
            if getattr(config, name, False):
                setattr(config, name, False)


class StopForward(Exception):  # noqa: N818  nothing went wrong
    """Raised by a hook to end a run that has recorded all that is needed."""
