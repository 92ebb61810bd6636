"""Answer 400 with the reason when vLLM's HTTP server is asked to load tables that are refused."""

from __future__ import annotations

import functools
from http import HTTPStatus
from typing import Any

from .set_file import REFUSED

#: What vLLM puts behind the error of a worker process.
_TAIL = "', please check the stack trace"


def install() -> None:
    """Change vLLM's answer to `/v1/load_lora_adapter` for refused tables, which is 500."""
    from vllm.entrypoints.openai.models.serving import OpenAIServingModels

    stock = OpenAIServingModels.load_lora_adapter
    if getattr(stock, "serves_sketches", False):
        return

    @functools.wraps(stock)
    async def load_lora_adapter(self: Any, *arguments: Any, **options: Any) -> Any:
        answer = await stock(self, *arguments, **options)
        error = getattr(answer, "error", None)
        if error is not None and REFUSED in error.message:
            reason = error.message[error.message.index(REFUSED) :]
            error.message = reason.partition(_TAIL)[0]
            error.code, error.type = HTTPStatus.BAD_REQUEST.value, "BadRequestError"
        return answer

    load_lora_adapter.serves_sketches = True  # type: ignore[attr-defined]
    OpenAIServingModels.load_lora_adapter = load_lora_adapter
