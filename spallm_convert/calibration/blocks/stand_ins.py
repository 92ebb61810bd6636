"""A model run without its blocks: how it calls them, and what it makes of what they would give.

In place of every block's `forward` is a function that notes its arguments and gives the hidden
states back as they came, or others.
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
    """What can be put in the place of a model's blocks, which lie in the list at `path`.

    as_tuple: whether a block gives its hidden states as the first of a tuple. Tokens are int64
    [batch, seqlen] on the model's device.
    """

    def __init__(self, model: PreTrainedModel, modules: Sequence[nn.Module], path: str) -> None:
        _return_hidden_states_alone(model)
        self._model, self._modules, self._path = model, modules, path
        self.as_tuple = False

    def record(self, tokens: Tensor, count: int) -> tuple[list[Call], Tensor]:
        """How the first `count` blocks are called, and the hidden states that enter them."""
        calls: list[Call] = []
        entered: list[Tensor] = []

        def stand_in(number: int, *args: Any, **kwargs: Any) -> Any:
            call, hidden = Call.taken_apart(args, kwargs)
            passed = not calls or hidden is entered[0] or torch.equal(hidden, entered[0])
            if number != len(calls) or not passed:
                raise CalibrationError(
                    f"{type(self._model).__name__} does not pass what leaves a block of "
                    f"{self._path} to the next one as it is, so they cannot be run one by one"
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
            why = f"only {len(calls)} of {count} were run"
            if calls and entered[0].is_meta:
                why = "weights that come before them are missing"
            raise CalibrationError(
                f"{type(self._model).__name__}: the blocks {self._path} cannot be run: {why}"
            )
        return calls, entered[0]

    def check_run_once(self, tokens: Tensor) -> None:
        """Refuses a model that goes through its blocks again after the last of them."""
        calls = 0

        def stand_in(number: int, *args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls > len(self._modules):
                raise StopForward
            _, hidden = Call.taken_apart(args, kwargs)
            return (hidden,) if self.as_tuple else hidden

        # What comes after the blocks may fail, as its weights have not been read.
        with self._instead_of_blocks(stand_in), contextlib.suppress(Exception):
            self._model(tokens, use_cache=False)
        if calls > len(self._modules):
            raise CalibrationError(
                f"{type(self._model).__name__} runs the blocks {self._path} more than once, and "
                f"calibration goes through them once"
            )

    def logits(self, tokens: Tensor, final: Tensor) -> Tensor:
        """What norm and head make of hidden states after the last block, [batch, seqlen, vocab]."""

        def stand_in(number: int, *args: Any, **kwargs: Any) -> Any:
            return (final,) if self.as_tuple else final

        with self._instead_of_blocks(stand_in), self.clear_errors():
            logits: Tensor = self._model(tokens, use_cache=False).logits
        return logits

    @contextlib.contextmanager
    def clear_errors(self) -> Iterator[None]:
        """What a model's own code makes of being run like this, as an error of ours."""
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
        """stand_in: called with the block's number and what the block is called with."""
        for number, block in enumerate(self._modules):
            block.forward = functools.partial(stand_in, number)
        try:
            yield
        finally:
            for block in self._modules:
                del block.forward


def _return_hidden_states_alone(model: PreTrainedModel) -> None:
    """What else a config asks of a model, as routers' logits, blocks that are stood in for lack."""
    for config in (model.config, model.config.get_text_config()):
        for name in ("output_attentions", "output_hidden_states", "output_router_logits"):
            if getattr(config, name, False):
                setattr(config, name, False)


class StopForward(Exception):  # noqa: N818  nothing went wrong
    """Ends a run of which all is known that is wanted."""
