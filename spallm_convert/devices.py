"""Find the device to compute on, and set its precision, memory errors and threads."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import OptionError, SpallmError, one_line

if TYPE_CHECKING:
    import torch

AUTO_DEVICE = "auto"
CPU = "cpu"

#: Files with the limit of a container's memory and what it uses, of the two versions of cgroups.
_CGROUPS = tuple(
    (Path("/sys/fs/cgroup") / limit, Path("/sys/fs/cgroup") / used)
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    )
)


class TooLittleMemoryError(SpallmError):
    """Report that memory does not suffice.

    Attributes:
        lasting: The message without what changes from run to run, such as the free memory.
    """

    def __init__(self, message: str, lasting: str) -> None:
        super().__init__(message)
        self.lasting = lasting


def find_device(name: str) -> torch.device:
    """Return the device with this name: cpu, cuda, cuda:N, or auto for a GPU if there is one.

    Raise OptionError for a name that torch does not know, a GPU that does not exist, and other
    kinds of devices: they have no float64, or this package has not been tested on them.
    """
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == AUTO_DEVICE:
        return torch.device("cuda" if count else CPU)
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError):
        device = torch.device("meta")  # refused below
    if device.type == CPU or (device.type == "cuda" and (device.index or 0) < count):
        return device
    found = "unknown or unsupported"
    if device.type == "cuda":
        found = f"torch finds {count or 'no'} GPU{'s' if count > 1 else ''} here"
    gpus = ["cuda", *(f"cuda:{number}" for number in range(count))] if count else []
    accepted = ", ".join([CPU, *gpus])
    raise OptionError(f"device {name}: {found}; accepted are {accepted} and {AUTO_DEVICE}")


def device_name(device: torch.device) -> str:
    """Return the model of a GPU, without its number, or the kind of another device."""
    import torch

    known = device.type == "cuda" and torch.cuda.is_available()
    return torch.cuda.get_device_name(device) if known else device.type


@contextlib.contextmanager
def clear_memory_errors(device: torch.device) -> Iterator[None]:
    """Turn errors of torch and NumPy about too little memory into a TooLittleMemoryError."""
    remedy = "" if device.type == CPU else "; --device cpu needs no GPU memory, and takes longer"
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise TooLittleMemoryError(
            f"device {device}: {one_line(error)}{remedy}",
            f"the memory of {device_name(device)} does not suffice",
        ) from error


def is_out_of_memory(error: Exception) -> bool:
    """Return whether torch or NumPy ran out of memory.

    On the CPU torch raises a plain RuntimeError, so its message decides.
    """
    import torch

    kinds = (torch.OutOfMemoryError, MemoryError)
    return isinstance(error, kinds) or "can't allocate memory" in str(error)


@contextlib.contextmanager
def full_float32() -> Iterator[None]:
    """Compute products of float32 tensors in float32 inside the block, not in TF32 or bfloat16.

    Restore the earlier settings afterwards.
    """
    import torch

    kinds: Any = torch.backends
    backends = kinds.cuda.matmul, kinds.mkldnn.matmul
    before = [backend.fp32_precision for backend in backends]
    try:
        older = torch.get_float32_matmul_precision()
    except (
        RuntimeError
    ):  # set through the newer names, to a state that the older name cannot express
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
    """Return whether a device has bfloat16 multiplication: about five times as fast as float32."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type != CPU:
        return False
    from llvmlite.binding import get_host_cpu_features

    features = get_host_cpu_features()
    return any(features.get(name, False) for name in ("avx512bf16", "amx-bf16"))


def fast_products(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Multiply float32 tensors in bfloat16 inside the block, if the device is fast at it.

    Sums over many products stay in float32, and so do tensors that are only added.
    """
    import torch

    fast = has_fast_bfloat16(device)
    return torch.autocast(device.type, torch.bfloat16) if fast else contextlib.nullcontext()


def peak_memory(device: torch.device) -> int | None:
    """Return the peak memory of this process in bytes, or None if the system does not tell.

    If the device is a GPU, return the peak of the GPU's memory.
    """
    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def free_memory(device: torch.device) -> int | None:
    """Return the bytes that this process may still take, or None if the system does not tell.

    If the device is a GPU, return those of the GPU. Limits of containers count (cgroups).
    """
    import torch

    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] if torch.cuda.is_available() else None
    found = []
    with contextlib.suppress(OSError, ValueError):  # no Linux
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        found += [1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable")]
    for limit, used in _CGROUPS:
        with contextlib.suppress(OSError, ValueError):  # not limited, or another version
            found.append(int(limit.read_text()) - int(used.read_text()))
    return min(found, default=None)


@contextlib.contextmanager
def cpu_threads(threads: int | None) -> Iterator[None]:
    """Run the loops of numba and torch on this number of threads inside the block.

    None: numba uses all threads, and torch keeps its number.
    """
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
