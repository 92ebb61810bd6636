"""Run the Triton kernel of sets of tables without assembly (see `portable.py`)."""

from __future__ import annotations

import functools

from . import tenants

can_decode = tenants.can_decode
counts_first = tenants.counts_first
most_tokens = functools.partial(tenants.most_tokens, portable=True)
decode = functools.partial(tenants.decode, portable=True)
