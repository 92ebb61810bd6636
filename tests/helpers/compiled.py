"""Compile Triton kernels for GPUs that are not present, as a launcher would, to read the code.

with recorded(module, "decode_kernel") as launches:
    module.decode(...)                  # tensors on the CPU; nothing runs
code = compile_launch(launches[0], 90)  # for compute capability 9.0
(instructions,) = disassemble([code], 90)
"""

from __future__ import annotations

import contextlib
import itertools
import re
import struct
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

_POINTERS = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.uint8: "*u8",
    torch.int16: "*i16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
_INSTRUCTION_BYTES = 16
_OPTIONS = {"num_warps", "num_stages", "maxnreg", "enable_fp_fusion"}


@dataclass(frozen=True)
class Launch:
    kernel: triton.runtime.JITFunction
    grid: tuple
    arguments: tuple
    options: dict


@dataclass(frozen=True)
class Code:
    registers: int
    spilled_bytes: int  # stack and local memory of a thread
    shared_bytes: int  # of a program
    cubin: bytes


@dataclass(frozen=True)
class AmdCode:
    spilled: int  # vector registers, and bytes of a thread in memory of its own
    shared_bytes: int  # of a program
    matrix_instructions: int


def disassemble(codes: list[Code], capability: int) -> list[list[str]]:
    """Return the instructions of kernels, each with its address.

    Starting the disassembler takes 0.4 s of CPU time, as long as 20 kernels. So it gets all kernels
    as one piece of machine code.
    """
    pieces = [_machine_code(code.cubin) for code in codes]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernels.bin")
        path.write_bytes(b"".join(pieces))
        text = _run("nvdisasm", "--binary", f"SM{capability}", path)
    lines = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;", text, re.MULTILINE)
    assert len(lines) * _INSTRUCTION_BYTES == sum(map(len, pieces))
    instructions = (f"{address} {line}" for address, line in lines)
    return [list(itertools.islice(instructions, len(p) // _INSTRUCTION_BYTES)) for p in pieces]


def loop(instructions: list[str], containing: str) -> list[str]:
    """Return the instructions of the innermost loop that holds an instruction."""
    addressed = [(int(a, 16), text) for a, text in (i.split(" ", 1) for i in instructions)]
    loops = []
    for address, text in addressed:
        jump = re.search(r"BRA.*?0x([0-9a-f]+)", text)
        if jump and (start := int(jump.group(1), 16)) < address:
            body = [text for at, text in addressed if start <= at <= address]
            if any(containing in text for text in body):
                loops.append(body)
    return min(loops, key=len)


def count(instructions: list[str], operation: str) -> int:
    return sum(bool(re.match(rf"(@!?U?P\w+ )?{operation}\b", text)) for text in instructions)


@contextlib.contextmanager
def recorded(module, *names):
    """Record launches of the named kernels of a module, instead of running them."""
    launches = []

    class Recorder:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            def launch(*arguments, **options):
                launches.append(Launch(self.kernel, grid, arguments, options))

            return launch

    originals = {name: getattr(module, name) for name in names}
    try:
        for name, kernel in originals.items():
            setattr(module, name, Recorder(kernel))
        yield launches
    finally:
        for name, kernel in originals.items():
            setattr(module, name, kernel)


def compile_launch(launch: Launch, capability: int) -> Code:
    """Compile a launch for an NVIDIA GPU with the specialisations that it would get there."""
    compiled = _compile(launch, GPUTarget("cuda", capability, 32), [["tt.divisibility", 16]])
    return _read(compiled.asm["cubin"], compiled.metadata.shared)


def compile_for_amd(launch: Launch, chip: str, threads_of_a_warp: int) -> AmdCode:
    """Compile a launch for an AMD GPU with the specialisations that it would get there."""
    attributes = [["tt.divisibility", 16], ["tt.pointer_range", 32]]
    compiled = _compile(launch, GPUTarget("hip", chip, threads_of_a_warp), attributes)
    text = compiled.asm["amdgcn"]
    # Scalar registers are spilled to vector registers, which costs little.
    fields = r"\.(?:vgpr_spill_count|private_segment_fixed_size): +(\d+)"
    spilled = [int(number) for number in re.findall(fields, text)]
    assert len(spilled) == 2
    return AmdCode(
        spilled=sum(spilled),
        shared_bytes=compiled.metadata.shared,
        matrix_instructions=len(re.findall(r"\bv_s?w?mf?ma", text)),
    )


def _compile(launch: Launch, target: GPUTarget, of_pointers: list):
    kernel = launch.kernel
    values = dict(zip(kernel.arg_names, launch.arguments, strict=False)) | launch.options
    signature, constants, attributes = {}, {}, {}
    for position, parameter in enumerate(kernel.params):
        name, value = parameter.name, values[parameter.name]
        specialised = not parameter.do_not_specialize and not parameter.is_constexpr
        if (
            parameter.is_constexpr
            or value is None
            or (specialised and value is not None and _is_one(value))
        ):
            signature[name], constants[name] = "constexpr", value
            continue
        signature[name] = (
            _POINTERS[value.dtype] if isinstance(value, torch.Tensor) else _integer(value)
        )
        if specialised and (isinstance(value, torch.Tensor) or value % 16 == 0):
            tensor = isinstance(value, torch.Tensor)
            attributes[(position,)] = of_pointers if tensor else [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constexprs=constants, attrs=attributes)
    known = _OPTIONS - ({"maxnreg"} if target.backend == "hip" else set())  # see `linear.py`
    options = {name: value for name, value in launch.options.items() if name in known}
    return triton.compile(source, target=target, options=options)


def _is_one(value) -> bool:
    return isinstance(value, int) and value == 1


def _integer(value: int) -> str:
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def _read(cubin: bytes, shared: int) -> Code:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        text = _run("cuobjdump", "-res-usage", path)
    usage = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}
    return Code(
        registers=usage["REG"],
        spilled_bytes=usage["STACK"] + usage["LOCAL"],
        shared_bytes=shared,
        cubin=cubin,
    )


def _machine_code(cubin: bytes) -> bytes:
    """Return the only section of an ELF file whose name begins with ".text."."""
    (table,), (size, number, names) = (
        struct.unpack_from("<Q", cubin, 40),
        struct.unpack_from("<3H", cubin, 58),
    )
    sections = [struct.unpack_from("<2I4Q", cubin, table + i * size) for i in range(number)]
    start_of_names = sections[names][4]
    (code,) = (
        cubin[offset : offset + length]
        for name, _, _, _, offset, length in sections
        if cubin.startswith(b".text.", start_of_names + name)
    )
    return code


def _run(tool: str, *arguments: str | Path) -> str:
    command = [Path(triton.__file__).parent / "backends/nvidia/bin" / tool, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
