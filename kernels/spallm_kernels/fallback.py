"""Choose the first backend whose kernels pass their check on a GPU.

The check runs when a layer with codes of some width is first used on a device, if the cache has no
verdict for the device, the versions of Triton and torch, and the kernels. Layers are operators to
torch.compile, so they run after tracing and before a CUDA graph is captured; a first call in eager
mode is not needed. A call that cannot wait for a check, in a captured graph or a function that is
being traced, takes the fastest backend as it is. Later calls run the check.
"""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable

import torch

from .self_check import Fault, Kernels, describe, find_fault
from .verdicts import describe_device, forget_verdict, keep_verdict, key_of, read_verdicts

#: Set to 0, it turns the check off.
SWITCH = "SPALLM_GPU_CHECK"
Load = Callable[[str], Kernels]


class _NotNowError(Exception):
    """Say that the check cannot run in this call. `functools.cache` does not keep exceptions."""


def first_passing(device: torch.device, bits: int, candidates: tuple[str, ...], load: Load) -> str:
    """Return the first backend whose kernels are right on a device, or `reference`.

    The check of a device and a width runs once per process. If a backend fails, a RuntimeWarning
    says which kernel of it, and how.

    Args:
        device: The GPU.
        bits: Bits of a code.
        candidates: Names of backends, the fastest first.
        load: Function that returns the module of a backend.

    Returns:
        One of the candidates, or `reference`.
    """
    if torch.compiler.is_compiling():
        return candidates[0]
    try:
        return _decide(device, bits, candidates, load)
    except _NotNowError:
        return candidates[0]


def check_device(
    device: torch.device, bits: int, candidates: tuple[str, ...], load: Load
) -> dict[str, str | None]:
    """Run the check again, whatever the cache says, until a candidate passes; keep the verdicts.

    Args:
        device: The GPU.
        bits: Bits of a code.
        candidates: Names of backends, the fastest first.
        load: Function that returns the module of a backend.

    Returns:
        By backend that was checked, what is wrong with it; None if nothing is.

    Raises:
        torch.OutOfMemoryError: If the device has no memory left.
    """
    _decide.cache_clear()
    faults = {}
    for name in candidates:
        faults[name] = _check(device, bits, name, load)
        if faults[name] is None:
            break
    return faults


@functools.cache
def _decide(device: torch.device, bits: int, candidates: tuple[str, ...], load: Load) -> str:
    if os.environ.get(SWITCH) == "0" or _is_interpreted(candidates[0], load):
        return candidates[0]
    words = describe_device(device)
    kept = read_verdicts()
    faults = {}
    for name in candidates:
        key = key_of(words, name, bits)
        fault = kept[key] if key in kept else _check_now(device, bits, name, load)
        if fault is None:
            break
        faults[name] = fault
    else:
        name = "reference"
    if faults:
        _warn(words, faults, name)
    return name


def _check_now(device: torch.device, bits: int, name: str, load: Load) -> str | None:
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise _NotNowError
    try:
        return _check(device, bits, name, load)
    except torch.OutOfMemoryError as error:
        raise _NotNowError from error


def _check(device: torch.device, bits: int, name: str, load: Load) -> str | None:
    """Return what is wrong with a backend, and keep it.

    An exception may be due to a full disk or a missing compiler, so it is no verdict, and the next
    process tries again. Except if it has brought the device down: then the next process must not.
    """
    words = describe_device(device)
    try:
        kernels = load(name)
    except Exception as error:
        fault: Fault | None = Fault(text=describe(error), raised=True)
    else:
        fault = find_fault(kernels, device, bits)
    lost = fault is not None and fault.raised and _is_lost(device)
    text = None if fault is None else fault.text
    key = key_of(words, name, bits)
    if key is not None and fault is not None and fault.raised and not lost:
        forget_verdict(key)
    elif key is not None:
        keep_verdict(key, text)
    if lost:
        raise RuntimeError(
            f"the GPU kernels of backend {name!r} failed their check ({text}), and this process "
            f"cannot use {device} any more; start it again: another backend will be used"
        )
    return text


def _is_lost(device: torch.device) -> bool:
    """Return whether a device accepts no more work from this process, as after a bad access."""
    try:
        torch.ones(1, device=device).cpu()
    except torch.OutOfMemoryError:
        return False
    except RuntimeError:
        return True
    return False


def _is_interpreted(name: str, load: Load) -> bool:
    try:
        return bool(getattr(load(name), "INTERPRETED", False))
    except Exception:
        return False  # the check says why it cannot be loaded


def _warn(words: str, faults: dict[str, str], chosen: str) -> None:
    slow = "slow reference code" if chosen == "reference" else f"the slower backend {chosen!r}"
    found = "; ".join(f"{name!r} failed in {fault}" for name, fault in faults.items())
    warnings.warn(
        f"sketched layers run on {slow}: GPU kernels failed their check on {words}: {found}; "
        f"`spallm-convert doctor` checks again, {SWITCH}=0 turns the check off",
        RuntimeWarning,
        stacklevel=2,
    )
