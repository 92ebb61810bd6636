"""Say where a step that generates one token takes its time, by timing modules and kernels.

A step is one call of the model. Its parts are what linear layers inside blocks take, of which
kernels are a part; what the output head takes; and what remains: attention, norms, rotary
embeddings, and transformers' Python. `generate` takes some time between steps.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from statistics import median
from typing import Any
from unittest import mock

import torch
from torch import nn

from spallm_kernels.cpu import vectorized

_FIRST = 4  # steps that are not counted
_PROMPT = 504  # which token it is does not matter

Row = dict[str, float]


class Parts:
    """Time the parts of the steps of a model."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._seconds = dict.fromkeys(("step", "layers", "kernels", "head"), 0.0)

    def measure(self, tokens: int) -> Row:
        """Return the medians of milliseconds over the steps that generate tokens."""
        steps: list[Row] = []
        forward = self._timed("step", self._model.forward)

        @wraps(self._model.forward)
        def one_step(*args: Any, **kwargs: Any) -> Any:
            self._seconds = dict.fromkeys(self._seconds, 0.0)
            found = forward(*args, **kwargs)
            steps.append(dict(self._seconds))
            return found

        count = tokens + _FIRST
        prompt = torch.tensor([[min(_PROMPT, self._model.config.vocab_size - 1)]])
        with (
            self._patched(),
            mock.patch.object(self._model, "forward", one_step),
            torch.inference_mode(),
        ):
            start = time.perf_counter()
            self._model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                pad_token_id=0,
                max_new_tokens=count,
                min_new_tokens=count,
                do_sample=False,
            )
            whole = (time.perf_counter() - start) / count
        kept = steps[_FIRST:]
        times = {name: 1000 * median(step[name] for step in kept) for name in self._seconds}
        return {
            "layers": times["layers"],
            "kernels of the layers": times["kernels"],
            "head": times["head"],
            "rest": times["step"] - times["layers"] - times["head"],
            "between steps": max(0.0, 1000 * whole - times["step"]),
        }

    @contextmanager
    def _patched(self) -> Iterator[None]:
        """Time the head, the other linear layers and the compiled products."""
        head = self._model.get_output_embeddings()
        with ExitStack() as stack:
            for module in self._model.modules():
                if isinstance(module, nn.Linear) or module is head:
                    timed = self._timed("head" if module is head else "layers", module.forward)
                    stack.enter_context(mock.patch.object(module, "forward", timed))
            compiled = vectorized._product

            def product(*kind: Any) -> Callable[..., None]:
                return self._timed("kernels", compiled(*kind))

            stack.enter_context(mock.patch.object(vectorized, "_product", product))
            yield

    def _timed(self, part: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function that adds its seconds to a part."""

        @wraps(call)
        def timed(*args: Any, **kwargs: Any) -> Any:
            kernels, start = self._seconds["kernels"], time.perf_counter()
            found = call(*args, **kwargs)
            self._seconds[part] += time.perf_counter() - start
            if part == "head":
                self._seconds["kernels"] = kernels  # of a sketched head: not of the layers
            return found

        return timed
