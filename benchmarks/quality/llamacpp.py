"""Quantize with llama.cpp, whose programs run as tools on GGUF files.

The environment variable LLAMA_CPP names the folder of llama.cpp's source, with its programs in
`build/bin`. PyPI's package llama-cpp-python has the source; `make bench-quality` unpacks and builds
it:

    cmake -B build -DCMAKE_BUILD_TYPE=Release -DBUILD_SHARED_LIBS=OFF
    cmake --build build --target llama-quantize --target llama-imatrix --target llama-bench

`convert_hf_to_gguf.py` writes the dense model in float32. `llama-imatrix` measures the importance
matrix, which is the mean square of every input of every layer. `llama-quantize` quantizes with it.
It may store a layer in another type than the one asked for: it spends more bits on some layers, and
types in blocks of 256 weights do not fit all rows. What it has stored is read back and counted.

llama.cpp takes text, not tokens. So the calibration windows are decoded and written one after the
other, and llama.cpp cuts its tokens of this text into windows of the same length. Where two windows
meet, it may find a token more or less, and then the windows behind it are shifted by that.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from spallm_convert.errors import OptionError

FOLDER = "LLAMA_CPP"
_CONVERT = "convert_hf_to_gguf.py"
_IMATRIX = "build/bin/llama-imatrix"
_QUANTIZE = "build/bin/llama-quantize"
_BENCH = "build/bin/llama-bench"
#: Characters of a program's output that are shown if it fails.
_TAIL = 2000

Singles = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Stored:
    """Hold a layer as it is in a GGUF file.

    type: GGUF's name of its type, such as Q5_0. nbytes: codes and scales. heads: the number of
    attention heads whose rows llama.cpp has permuted, or None.
    """

    type: str
    nbytes: int
    size: int
    heads: int | None
    tensor: Any

    def dense(self) -> Singles:
        """Return the weight, float32 [out_features, in_features], with rows in the dense order."""
        from gguf.quants import dequantize

        found = np.array(dequantize(self.tensor.data, self.tensor.tensor_type), np.float32)
        return found if self.heads is None else undo_permutation(found, self.heads)


def missing_programs(*, speed: bool = False) -> list[str]:
    """Return the programs of llama.cpp that are missing, or the variable that names its folder.

    speed: whether `tokens_per_second` will be called, and not `quantize`.
    """
    folder = os.environ.get(FOLDER)
    if not folder:
        return [f"llama.cpp (the environment variable {FOLDER} is not set)"]
    needed = (_BENCH, _QUANTIZE) if speed else (_CONVERT, _IMATRIX, _QUANTIZE)
    paths = (Path(folder, name) for name in needed)
    return [str(path) for path in paths if not path.exists()]


def version() -> str:
    """Return the version that llama.cpp's programs tell."""
    program = next(path for path in map(_program, (_IMATRIX, _BENCH)) if path.exists())
    told = _run([program, "--version"])
    return next(line for line in told.splitlines() if line.startswith("version: "))[9:]


def decoded(tokenizer: Any, tokens: torch.Tensor) -> str:
    """Return calibration windows, int64 [samples, seqlen], as one text without special tokens."""
    text: str = tokenizer.decode(
        tokens.flatten(), skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    return text


def quantize(dense: Path, text: str, shape: tuple[int, int], kind: str, scratch: Path) -> Path:
    """Quantize the model in the folder `dense`; return the GGUF file, which is in `scratch`.

    shape: samples and tokens per sample of the text. kind: as llama-quantize names it.
    """
    full, windows, matrix = (scratch / f"dense.{end}" for end in ("gguf", "txt", "imatrix"))
    windows.write_text(text, encoding="utf-8", newline="")
    samples, seqlen = map(str, shape)
    threads = str(torch.get_num_threads())
    _run([sys.executable, _program(_CONVERT), dense, "--outtype", "f32", "--outfile", full])
    _run(
        [
            *(_program(_IMATRIX), "--model", full, "--file", windows, "--output-file", matrix),
            *("--ctx-size", seqlen, "--batch-size", seqlen, "--chunks", samples),
            *("--no-escape", "--no-ppl", "--threads", threads),
        ]
    )
    found = scratch / "quantized.gguf"
    _run([_program(_QUANTIZE), "--imatrix", matrix, full, found, kind, threads])
    return found


def quantize_again(source: Path, kind: str, folder: Path) -> Path:
    """Quantize a GGUF file without an importance matrix; return the file, kept in `folder`.

    It is for speed, not quality: the weights may be quantized already.
    """
    found, unfinished = folder / f"{kind}.gguf", folder / f"{kind}.unfinished"
    if not found.exists():
        folder.mkdir(parents=True, exist_ok=True)
        _run([_program(_QUANTIZE), "--allow-requantize", source, unfinished, kind])
        unfinished.rename(found)
    return found


def tokens_per_second(path: Path, tokens: int, threads: int) -> float:
    """Return the speed at which llama-bench generates tokens, without a prompt."""
    options = ("-p", "0", "-n", str(tokens), "-t", str(threads), "-r", "1", "-o", "json")
    (found,) = json.loads(_run([_program(_BENCH), "-m", path, *options], separate=True))
    return float(found["avg_ts"])


def read(path: Path, layers: Iterable[str]) -> dict[str, Stored]:
    """Open the layers of a GGUF file by their paths in the model, such as
    model.layers.0.mlp.up_proj.

    Raises:
        OptionError: The model is not a Llama. llama.cpp permutes rows in other ways in others.
    """
    import gguf

    reader = gguf.GGUFReader(path)
    architecture = _field(reader, "general.architecture")
    if architecture != "llama":
        raise OptionError(
            f"{path.name} has the architecture {architecture!r}; accepted is 'llama'; use --method "
            f"to name methods that do not need llama.cpp"
        )
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, _field(reader, "llama.block_count"))
    heads = {
        "q_proj": _field(reader, "llama.attention.head_count"),
        "k_proj": _field(reader, "llama.attention.head_count_kv"),
    }
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    found = {}
    for layer in layers:
        tensor = tensors[f"{names.get_name(layer)}.weight"]
        found[layer] = Stored(
            type=tensor.tensor_type.name,
            nbytes=int(tensor.n_bytes),
            size=int(tensor.n_elements),
            heads=heads.get(layer.rpartition(".")[2]),
            tensor=tensor,
        )
    return found


def sizes_by_type(layers: Mapping[str, Stored]) -> dict[str, int]:
    """Return how many weights are stored in which type, the most frequent type first."""
    found: dict[str, int] = {}
    for layer in layers.values():
        found[layer.type] = found.get(layer.type, 0) + layer.size
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def weights(layers: Mapping[str, Stored]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the path in the model and the dense weight of every layer."""
    for path, layer in layers.items():
        yield path, torch.from_numpy(layer.dense())


def undo_permutation(rows: Singles, heads: int) -> Singles:
    """Return the rows of queries or keys in the order of the dense model.

    Rotary embedding turns pairs of rows of a head. The dense model pairs row i with row i + size /
    2, llama.cpp with the row after it: it has interleaved the two halves of every head.
    """
    size = len(rows) // heads
    pairs = rows.reshape(heads, size // 2, 2, -1)
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def _field(reader: Any, name: str) -> Any:
    return reader.get_field(name).contents()


def _program(name: str) -> Path:
    return Path(os.environ[FOLDER], name)


def _run(command: list[Any], *, separate: bool = False) -> str:
    """Run a program and return its output. Raise RuntimeError, which shows its end, if it fails.

    separate: whether to leave out what the program writes to the standard error.
    """
    errors = subprocess.PIPE if separate else subprocess.STDOUT
    process = subprocess.run(command, stdout=subprocess.PIPE, stderr=errors, text=True, check=False)
    if process.returncode:
        output = process.stdout + (process.stderr or "")
        raise RuntimeError(f"{command} ended with {process.returncode}: {output[-_TAIL:]}")
    return process.stdout
