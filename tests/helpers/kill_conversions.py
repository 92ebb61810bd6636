"""Kill conversions before their changes on disk, and look at what each kill leaves:

    python kill_conversions.py SOURCE TEXT ROOT COUNT MODE...

After every kill, the folder holds the older checkpoint, or nothing that loads, or the whole new
one. Until files move up, it holds the older one. The same command with `resume` ends in the bytes
of an undisturbed run. MODE is one of `MODES`, or "replaced" for a conversion that replaces an older
checkpoint, or "again" for one that is killed again and again, each time a little later. COUNT
changes of the work, as many while files move up, and as many moments are drawn at random; with 0,
every change is taken. Prints a line for every MODE, with the number of kills.

This is a process of its own, because OpenMP's threads do not survive a fork. Here, neither numba
nor torch uses them, so kernels are loaded once, before the first fork.
"""

import itertools
import json
import os
import random
import shutil
import sys
import time
from pathlib import Path

os.environ |= {"NUMBA_THREADING_LAYER": "workqueue", "OMP_NUM_THREADS": "1"}

from helpers.calibration import calibrated, contents
from helpers.kills import count_changes, kill_after, kill_at_change
from spallm_convert import FormatError, SketchConfig, convert
from spallm_convert.calibration.healing import distillation, heal, tuning
from spallm_formats import SketchedCheckpoint, is_unfinished
from spallm_formats.work_folder import MARKER, PARTIAL_FOLDER

SHORT = {"samples": 4, "seqlen": 16}
MODES = {
    "plain": {},
    "normal": SHORT | {"effort": "normal"},
    "calibrated": SHORT,
    "healed": SHORT | {"heal": 1},
    "chosen": SHORT | {"target_bits": 9},
}


def options(mode, text, **changes):
    given = {"max_shard_size": "30KB"} | MODES[mode] | changes
    return calibrated(text, **given) if MODES[mode] else SketchConfig(effort="fast", **given)


def run(source, output, config, **how):
    def work():
        convert(source, output, config, device="cpu", threads=1, **how)

    return work


def complete(source, output, config, **how):
    """Convert to the end, in a forked child."""
    assert not kill_at_change(0, run(source, output, config, **how), output.parent)


def visible(folder):
    """Return the files of a folder, without those of unfinished work."""
    if not folder.exists():
        return {}
    return {
        path.name: path.read_bytes()
        for path in folder.iterdir()
        if path.is_file() and path.name != PARTIAL_FOLDER
    }


def check_folder(folder, older, whole):
    """Check what a kill left: the older checkpoint, no checkpoint at all, or the new one."""
    found = visible(folder)
    if found in (older, whole) and found:
        SketchedCheckpoint.open(folder)
        return
    assert (folder / PARTIAL_FOLDER / MARKER).exists() or found == older == {}, sorted(found)
    try:
        SketchedCheckpoint.open(folder)
    except FormatError:
        return
    raise AssertionError(f"{folder} opens, but is not whole: {sorted(found)}")


def check_kills(source, config, root, numbers, older=None):
    """Kill at some of the changes of a conversion; `numbers` chooses them from their count."""
    run(source, root / "whole", config)()
    whole = contents(root / "whole")
    report = json.loads(whole["conversion.json"])
    assert "not_calibrated" not in report  # no fallback
    if healing := report.get("healing"):
        assert healing["kl_after"] < healing["kl_before"]
    template = root / "template"
    if older is not None:
        complete(source, template, older)
        (template / "notes.md").write_text("the user's own")
        whole["notes.md"] = b"the user's own"
    before, out = visible(template), root / "out"

    def prepare():
        shutil.rmtree(out, ignore_errors=True)
        if older is not None:
            shutil.copytree(template, out)

    how = {"overwrite": True} if older is not None else {}
    prepare()
    begin = time.monotonic()
    total = count_changes(run(source, out, config, **how), root)
    seconds = time.monotonic() - begin
    assert contents(out) == whole
    chosen = numbers(total)
    moments = [random.uniform(0, seconds) for _ in range(len(chosen) // 3)]
    kills = [lambda work, n=n: kill_at_change(n, work, root) for n in chosen]
    kills += [lambda work, t=t: kill_after(t, work) for t in moments]
    for kill in kills:
        prepare()
        killed = kill(run(source, out, config, **how))
        if not killed:
            continue  # a moment after the end
        check_folder(out, before, whole)
        complete(source, out, config, **again(out, whole, how))
        assert contents(out) == whole
    return len(kills)


def again(out, whole, how):
    """Return how to go on: before anything is worth keeping, there is nothing to resume."""
    return {"resume": True} if is_unfinished(out) or visible(out) == whole else how


def check_again_and_again(source, config, root):
    """Kill every run a little later than the one before it, until one gets to the end."""
    complete(source, root / "whole", config)
    whole, out = contents(root / "whole"), root / "out"
    for kills in itertools.count():
        how = again(out, whole, {}) if out.exists() else {}
        if not kill_at_change(20 + 10 * kills, run(source, out, config, **how), root):
            assert contents(out) == whole
            return kills
    raise AssertionError("not reached")


def some(count):
    """Return a function that chooses changes at random, and the last one; all if count is 0."""

    def choose(total):
        if not count:
            return list(range(1, total + 1))
        early = random.Random(0).sample(range(1, total - 30), count)
        late = random.Random(1).sample(range(total - 30, total + 1), count)
        return sorted({*early, *late, total})

    return choose


def main():
    source, text, root = map(Path, sys.argv[1:4])
    tuning.LEARNING_RATE = 0.1  # large enough to change the tables
    # A run heals in 16 steps, not 64: healing changes nothing on disk before its end.
    distillation.STEP_TOKENS = heal.STEP_TOKENS = 256
    for mode in sys.argv[5:]:
        older = options("plain", text, bits=2) if mode == "replaced" else None
        config = options(mode if mode in MODES else "plain", text)
        (root / mode).mkdir()
        if mode == "again":
            kills = check_again_and_again(source, config, root / mode)
        else:
            kills = check_kills(source, config, root / mode, some(int(sys.argv[4])), older)
        print(mode, kills, flush=True)


if __name__ == "__main__":
    main()
