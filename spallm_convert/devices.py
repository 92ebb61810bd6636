"""What computes: the device that a user names, its precision, memory and threads."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from .errors import OptionError, SpallmError, one_line

if TYPE_CHECKING:
    import torch

AUTO_DEVICE = "auto"
CPU = "cpu"


def find_device(name: str) -> torch.device:
    """The device of a name: cpu, cuda, cuda:N, or auto for a GPU if there is one.

    Raises OptionError for a name that torch does not know, a GPU that is not there, and other kinds
    of devices: they lack float64, or nothing here has been tried on them.
    """
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == AUTO_DEVICE:
        return torch.device("cuda" if count else CPU)
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError):
        device = torch.device("meta")  # refused below, as that is
    if device.type == CPU or (device.type == "cuda" and (device.index or 0) < count):
        return device
    found = "no device that is known here"
    if device.type == "cuda":
        found = f"torch finds {count or 'no'} GPU{'s' if count > 1 else ''} here"
    gpus = ["cuda", *(f"cuda:{number}" for number in range(count))] if count else []
    accepted = ", ".join([CPU, *gpus])
    raise OptionError(f"device {name}: {found}; accepted are {accepted} and {AUTO_DEVICE}")


def device_name(device: torch.device) -> str:
    """What computes: the model of a GPU, whichever of several it is, or the kind of another
    device."""
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


@contextlib.contextmanager
def clear_memory_errors(device: torch.device) -> Iterator[None]:
    """What torch and NumPy say where memory is not enough, as an error of ours."""
    remedy = "" if device.type == CPU else "; --device cpu needs none of it, and takes longer"
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise SpallmError(f"device {device}: {one_line(error)}{remedy}") from error


def is_out_of_memory(error: Exception) -> bool:
    """Whether torch or NumPy has failed for want of memory; torch has no error of its own for it
    on the CPU."""
    import torch

    kinds = (torch.OutOfMemoryError, MemoryError)
    return isinstance(error, kinds) or "can't allocate memory" in str(error)


@contextlib.contextmanager
def full_float32() -> Iterator[None]:
    """Products of float32 tensors keep its precision in here, not TF32's or bfloat16's, whatever
    was allowed before and is again afterwards."""
    import torch

    kinds: Any = torch.backends
    backends = kinds.cuda.matmul, kinds.mkldnn.matmul
    before = [backend.fp32_precision for backend in backends]
    try:
        older = torch.get_float32_matmul_precision()
    except RuntimeError:  # set by the newer names alone, which the older one cannot express
        older = None
    torch.set_float32_matmul_precision("highest")  # both names
    try:
        yield
    finally:
        if older is not None:
            torch.set_float32_matmul_precision(older)
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision


def has_fast_bfloat16(device: torch.device) -> bool:
    """Whether a device is built to multiply in bfloat16: there that is some five times as fast as
    in float32."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type != CPU:
        return False
    from llvmlite.binding import get_host_cpu_features

    features = get_host_cpu_features()
    return any(features.get(name, False) for name in ("avx512bf16", "amx-bf16"))


def fast_products(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """In here torch multiplies in bfloat16 what it has in float32, where that is fast. Sums over
    many products stay in float32, as do tensors that are only added to."""
    import torch

    fast = has_fast_bfloat16(device)
    return torch.autocast(device.type, torch.bfloat16) if fast else contextlib.nullcontext()


def peak_memory(device: torch.device) -> int | None:
    """Most bytes that this process has had so far, of a GPU's memory if `device` is one; None where
    the system does not tell."""
    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


@contextlib.contextmanager
def cpu_threads(threads: int | None) -> Iterator[None]:
    """Runs numba's loops, and torch's, on that many threads inside the block; None: numba's on all,
    torch's on as many as before."""
    import numba
    import torch

    most: int = numba.config.NUMBA_NUM_THREADS  # type: ignore[attr-defined]
    if threads is not None and not 1 <= threads <= most:
        raise OptionError(f"threads must be 1 to {most} on this machine, found {threads}")
    before = numba.get_num_threads(), torch.get_num_threads()
    numba.set_num_threads(threads or most)
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        yield
    finally:
        numba.set_num_threads(before[0])
        torch.set_num_threads(before[1])
