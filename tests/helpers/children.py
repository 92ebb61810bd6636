"""Run a function in a forked child, to measure or to limit what it takes."""

import os
import pickle
import signal
from collections.abc import Callable
from typing import Any


def in_child(work: Callable[[], Any], *, seconds: int = 60) -> Any:
    """Return what a function returns in a forked child, or raise what it raises there."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(read)
            signal.alarm(seconds)
            try:
                answer = (True, work())
            except BaseException as error:  # whatever it is, the parent gets it
                answer = (False, error)
            with os.fdopen(write, "wb") as pipe:
                pickle.dump(answer, pipe)
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        data = pipe.read()
    _, status = os.waitpid(child, 0)
    assert os.WIFEXITED(status), f"the child was ended by signal {os.WTERMSIG(status)}"
    returned, value = pickle.loads(data)
    if not returned:
        raise value
    return value
