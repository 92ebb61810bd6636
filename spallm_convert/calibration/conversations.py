"""Write the built-in text as a chat model sees it: as answers, in the template of its tokenizer.

The markers of a template are among the largest inputs of a chat model, and plain text has none of
them. So a model that is calibrated on plain text answers worse.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from spallm_convert.source.text import english_topics

#: Characters of an answer. Short ones make samples that touch many topics.
_ANSWER = 600
#: Templates may put the date into the text, and a conversion must not depend on it.
_DAY = time.struct_time((2024, 7, 26, 0, 0, 0, 4, 208, 0))


def conversations(tokenizer: Any) -> str | None:
    """Return the built-in text as conversations of one question and one answer.

    Args:
        tokenizer: The model's tokenizer.

    Returns:
        All conversations in a random order, always the same. None if the tokenizer has no chat
        template, or one that needs something else than questions and answers.
    """
    if getattr(tokenizer, "chat_template", None) is None:
        return None
    parts = [
        (title, body[start : start + _ANSWER])
        for title, body in english_topics()
        for start in range(0, len(body), _ANSWER)
    ]
    order = np.random.default_rng(0).permutation(len(parts))
    try:
        return "".join(_rendered(tokenizer, *parts[number]) for number in order)
    except Exception:  # a template is a program, and may raise anything
        return None


def _rendered(tokenizer: Any, question: str, answer: str) -> str:
    messages = [
        {"role": "user", "content": question},
        {"role": "assistant", "content": answer},
    ]
    text = tokenizer.apply_chat_template(
        messages,
        tokenize=False,
        date_string=time.strftime("%d %b %Y", _DAY),
        strftime_now=lambda form: time.strftime(form, _DAY),
    )
    return str(text)
