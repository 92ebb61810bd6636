"""Run conversions that are killed:

    python killed_conversion.py SOURCE OUTPUT KILL_AT [--resume] [--overwrite] [--calibration=FILE]

Before its KILL_AT-th write, flush or rename below OUTPUT, the process sends itself SIGKILL. Nothing
is cleaned up, and data that was not flushed may be written in part. With KILL_AT 0 the conversion
runs to the end and prints the number of such moments.
"""

import io
import os
import signal
import sys
from pathlib import Path

from spallm_convert import CalibrationConfig, SketchConfig, convert
from spallm_formats.work_folder import PARTIAL_FOLDER

moments = 0
kill_at = int(sys.argv[3])


def moment() -> None:
    global moments  # noqa: PLW0603  one process, one count
    moments += 1
    if moments == kill_at:
        os.kill(os.getpid(), signal.SIGKILL)


def before(original):
    def wrapped(*arguments, **options):
        moment()
        return original(*arguments, **options)

    return wrapped


class MomentousFile(io.BufferedRandom):
    """Count every write to a file as a moment, and write it to disk in two halves."""

    def write(self, data):
        moment()
        middle = len(memoryview(data).cast("B")) // 2
        super().write(memoryview(data).cast("B")[:middle])
        self.flush()
        moment()
        return middle + super().write(memoryview(data).cast("B")[middle:])


original_open = Path.open


def open_(self, mode="r", *arguments, **options):
    if mode == "wb" and PARTIAL_FOLDER in self.parts:
        return MomentousFile(io.FileIO(self, "w+"))
    return original_open(self, mode, *arguments, **options)


Path.open = open_
Path.replace = before(Path.replace)
Path.unlink = before(Path.unlink)
Path.rmdir = before(Path.rmdir)
os.fsync = before(os.fsync)

texts = [option.partition("=")[2] for option in sys.argv if option.startswith("--calibration=")]
calibration = CalibrationConfig(text=texts[0], samples=16, seqlen=32) if texts else None

convert(
    sys.argv[1],
    sys.argv[2],
    SketchConfig(max_shard_size="30KB", calibration=calibration),
    device="cpu",
    resume="--resume" in sys.argv,
    overwrite="--overwrite" in sys.argv,
)
print(moments)
