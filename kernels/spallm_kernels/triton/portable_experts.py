"""Run the Triton kernel of experts without assembly (see `portable.py`)."""

from __future__ import annotations

import functools

from . import experts

can_decode = functools.partial(experts.can_decode, portable=True)
decode = functools.partial(experts.decode, portable=True)
