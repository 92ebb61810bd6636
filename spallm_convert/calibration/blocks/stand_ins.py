"""Run a model without its blocks, to see how it calls them and what follows them.

The `forward` of every block is replaced by a function that records its arguments. The function
returns the hidden states as they came, or other hidden states.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from spallm_convert.devices import is_out_of_memory
from spallm_convert.errors import CalibrationError, SpallmError, one_line

from .calls import Call

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class StandIns:
    """Functions that take the place of the blocks of one list.

    Tokens passed to the methods are int64 [batch, seqlen] on the model's device.

    Args:
        model: The model. Its config is changed so that it asks blocks for hidden states alone.
        modules: The blocks.
        path: Path of the list of blocks, for error messages.
        owner: The module that has the list, whose code calls the blocks.
        before: The stand-ins of the lists that the text runs through first.

    Attributes:
        path: Path of the list of blocks.
        rest: What a block returns after the hidden states, as the first block did for the first
            batch, in a tuple or a list. None: a block returns the hidden states alone.
        before: The stand-ins of the lists that the text runs through first.
        final: Hidden states after the last block that are returned in place of those that came.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        modules: Sequence[nn.Module],
        path: str,
        owner: nn.Module,
        before: Sequence[StandIns] = (),
    ) -> None:
        _return_hidden_states_alone(model)
        self._model, self._modules, self.path, self._owner = model, modules, path, owner
        self.rest: tuple[Any, ...] | list[Any] | None = None
        self.before = before
        self.final: Tensor | None = None

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
                    f"{self.path} directly to the next, so they cannot be run one by one"
                )
            calls.append(call)
            entered.append(hidden)
            if len(calls) == count:
                raise StopForward
            return self._output(hidden)

        with (
            self._passing_before(),
            self._instead_of_blocks(stand_in),
            contextlib.suppress(StopForward),
            self.clear_errors(),
        ):
            run_model(self._model, tokens)
        if len(calls) != count or entered[0].is_meta:
            why = f"the model calls only {len(calls)} of {count}"
            if calls and entered[0].is_meta:
                why = "weights before them are missing in the checkpoint"
            raise CalibrationError(
                f"{type(self._model).__name__}: the blocks {self.path} cannot be run: {why}"
            )
        return calls, entered[0]

    def find_next(
        self, tokens: Tensor, others: Mapping[str, Sequence[nn.Module]]
    ) -> tuple[str | None, list[int]]:
        """Find the list whose blocks the model calls after these blocks, and blocks that it skips.

        Blocks may be skipped without images, for example. Those after the last block that is called
        are noticed only if the module that has the list runs to its end.

        Args:
            tokens: Some tokens; few are enough.
            others: The blocks of other lists, by path of the list.

        Returns:
            The path of the next list, None if there is none, and the numbers of skipped blocks.

        Raises:
            CalibrationError: The model calls these blocks again after the last one.
        """
        calls: list[int] = []
        found: list[str] = []
        has_ended = False

        def end(*_: Any) -> None:
            nonlocal has_ended
            has_ended = True

        def stand_in(number: int, *args: Any, **kwargs: Any) -> Any:
            calls.append(number)
            if calls.index(number) < len(calls) - 1:
                raise StopForward
            _, hidden = Call.taken_apart(args, kwargs)
            return self._output(hidden)

        def other(path: str, *args: Any, **kwargs: Any) -> Any:
            found.append(path)
            raise StopForward

        # Modules after the blocks may fail, because their weights have not been read.
        with (
            self._passing_before(),
            contextlib.ExitStack() as stack,
            self._instead_of_blocks(stand_in),
            contextlib.suppress(Exception),
        ):
            for path, modules in others.items():
                stopping = ((block, functools.partial(other, path)) for block in modules)
                stack.enter_context(replaced(stopping))
            stack.callback(self._owner.register_forward_hook(end).remove)
            run_model(self._model, tokens)
        if len(set(calls)) < len(calls):
            raise CalibrationError(
                f"{type(self._model).__name__} runs the blocks {self.path} more than once, but "
                f"calibration runs each block once"
            )
        last = len(self._modules) - 1
        past_last = has_ended or last in calls
        if found and not has_ended and calls[-1:] != [last]:
            raise CalibrationError(
                f"{type(self._model).__name__} runs the blocks {self.path} and {found[0]} by "
                f"turns, but calibration runs one list of blocks after the other"
            )
        skipped = [number for number in range(last + 1) if number not in calls]
        return found[0] if found else None, skipped if past_last else []

    def skip(self, numbers: Sequence[int]) -> None:
        """Leave out blocks that the model does not call."""
        kept = [block for number, block in enumerate(self._modules) if number not in numbers]
        self._modules = kept

    def logits(self, tokens: Tensor, final: Tensor) -> Tensor:
        """Return the logits [batch, seqlen, vocab] of hidden states after the last block."""

        def stand_in(number: int, *args: Any, **kwargs: Any) -> Any:
            return self._output(final)

        with self._instead_of_blocks(stand_in), self.clear_errors():
            logits: Tensor = run_model(self._model, tokens).logits
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
                f"{type(self._model).__name__}: the blocks {self.path} cannot be run one by one "
                f"({reason})"
            ) from error

    def _output(self, hidden: Tensor) -> Any:
        """Return hidden states in the form in which a block returns them."""
        return hidden if self.rest is None else type(self.rest)((hidden, *self.rest))

    @contextlib.contextmanager
    def _passing_before(self) -> Iterator[None]:
        """Let the blocks of earlier lists pass hidden states through, or return their `final`."""
        with contextlib.ExitStack() as stack:
            for earlier in self.before:
                stack.enter_context(earlier._passing())
            yield

    @contextlib.contextmanager
    def _passing(self) -> Iterator[None]:
        def stand_in(number: int, *args: Any, **kwargs: Any) -> Any:
            hidden = Call.taken_apart(args, kwargs)[1] if self.final is None else self.final
            return self._output(hidden)

        with self._instead_of_blocks(stand_in):
            yield

    @contextlib.contextmanager
    def _instead_of_blocks(self, stand_in: Callable[..., Any]) -> Iterator[None]:
        """Call `stand_in` in place of the blocks, with a block's number and its arguments."""
        numbered = enumerate(self._modules)
        with replaced((block, functools.partial(stand_in, number)) for number, block in numbered):
            yield


def run_model(model: PreTrainedModel, tokens: Tensor) -> Any:
    """Run a model on a text. A decoder behind an encoder gets the same text, as if to repeat it.

    Args:
        model: The model.
        tokens: The text, int64 [batch, seqlen].
    """
    accepted = inspect.signature(type(model).forward).parameters
    given: dict[str, Any] = {}
    if "use_cache" in accepted or any(p.kind is p.VAR_KEYWORD for p in accepted.values()):
        given["use_cache"] = False
    if model.config.is_encoder_decoder and "decoder_input_ids" in accepted:
        config: Any = model.config
        first = getattr(config, "decoder_start_token_id", None)
        first = config.pad_token_id if first is None else first
        given["decoder_input_ids"] = tokens.roll(1, 1)
        given["decoder_input_ids"][:, 0] = 0 if first is None else first
    return model(tokens, **given)


@contextlib.contextmanager
def replaced(forwards: Iterable[tuple[nn.Module, Callable[..., Any]]]) -> Iterator[None]:
    """Call other functions in place of the `forward` of modules during a `with` block.

    Args:
        forwards: The modules and the functions.
    """
    changed = []
    try:
        for module, forward in forwards:
            module.__dict__["forward"] = forward
            changed.append(module)
        yield
    finally:
        for module in changed:
            del module.__dict__["forward"]


def _return_hidden_states_alone(model: PreTrainedModel) -> None:
    """Turn off other outputs in the config, such as router logits: stand-ins do not return them."""
    for config in (model.config, model.config.get_text_config()):
        for name in ("output_attentions", "output_hidden_states", "output_router_logits"):
            if getattr(config, name, False):
                setattr(config, name, False)


class StopForward(Exception):  # noqa: N818  nothing went wrong
    """Raised by a hook to end a run that has recorded all that is needed."""
