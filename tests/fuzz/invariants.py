"""Say what must hold for a spoiled folder of each family, and check it.

Every function gets the folder of one case, with the spoiled copy in it, and returns what it breaks.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from spallm_convert import SketchConfig, convert, load_sketched, load_tables, set_tables, verify
from spallm_convert.conversion.report import REPORT_FILE
from spallm_formats import INDEX_FILE, TABLES_FILE, FormatError, SketchedCheckpoint, sha256

from .bases import MODEL, Bases
from .faults import FAMILY, check_faults
from .findings import Findings, differences, snapshot
from .reader import read_file, read_folder, same, state_problems


def excused(problem: str) -> bool:
    """Return whether `verify` may report a problem of a checkpoint that loads.

    `load_sketched` checks what decides shapes and bytes; `verify` reads all data as well.
    """
    reasons = (
        REPORT_FILE,  # informative: loading does not read it
        "SHA-256",  # loading does not hash files: it takes as long as reading them twice
        "padding bits",  # they decide nothing
        "NaN or infinite",  # finding them means reading all tables before they are loaded
    )
    return any(reason in problem for reason in reasons)


def ignored_by_auto(problems: list[str]) -> bool:
    """Return whether the Auto classes may load a checkpoint with these problems.

    They choose the model class by `model_type`, whatever `architectures` says. They initialize
    dense tensors that are missing and warn, because a model may get a new head on purpose.
    """
    allowed = re.compile("architecture|^no tensor for .*, expected by")
    return all(allowed.search(problem) for problem in problems)


def transformers_can_read(folder: Path) -> bool:
    """Return whether the Auto classes may be tried: they read the config before our code is asked.

    They open pipes and devices, parse JSON of any size, and build any number of layers.
    """
    path, index = folder / "config.json", folder / INDEX_FILE
    if not path.is_file() or any(p.is_file() and p.stat().st_size > 1 << 20 for p in (path, index)):
        return False
    try:
        layers = json.loads(path.read_bytes()).get("num_hidden_layers")
    except (AttributeError, RecursionError, ValueError):
        return True
    return not isinstance(layers, int | float) or layers < 100


def check_checkpoint(spoiled: Path, rng: random.Random, bases: Bases) -> Findings:
    """Check that what `verify` accepts loads, as the files say, and that the rest does not load."""
    findings = Findings()
    problems, error = findings.attempt("verify", lambda: verify(spoiled))
    if error is not None:
        problems = [str(error)]
    for problem in problems:
        findings.check_message("verify", problem)
    unexcused = [problem for problem in problems if not excused(problem)]
    loads: dict[str, Callable[[], Any]] = {"load_sketched": lambda: load_sketched(spoiled)}
    if rng.random() < 0.5 and transformers_can_read(spoiled):
        loads["AutoModel"] = lambda: AutoModelForCausalLM.from_pretrained(spoiled)
    for name, load in loads.items():
        allowed = (Exception,) if name == "AutoModel" else ()  # it has errors of its own
        model, error = findings.attempt(name, load, allowed)
        if model is None:
            if not problems:
                what = f"{type(error).__name__}: {' '.join(str(error).split())[:300]!a}"
                findings.add(f"verify accepts what {name} refuses", what)
            elif unexcused and name == "load_sketched" and not isinstance(error, FormatError):
                findings.add("load_sketched refuses with another error", type(error).__name__)
        elif unexcused and not (name == "AutoModel" and ignored_by_auto(unexcused)):
            findings.add(f"verify refuses what {name} loads", ascii(unexcused[0]))
        elif not unexcused:
            _check_model(findings, name, model, spoiled, bases)
    if rng.random() < 0.5:
        code = findings.command("verify", spoiled)
        if (code == 0) != (not problems):
            findings.add("verify CLI: exit code", f"{code} for {len(problems)} problems")
        findings.command("inspect", spoiled)
    findings.outcome = "refused" if unexcused else "excused" if problems else "accepted"
    return findings


def _check_model(findings: Findings, name: str, model: Any, folder: Path, bases: Bases) -> None:
    """Compare a loaded model with an independent reading of its files, and run it."""
    wrong, _ = findings.attempt("reader", lambda: state_problems(model, folder))
    if wrong:
        findings.add(f"{name} gives another model", f"{len(wrong)}: {wrong[0]!a}")
    with torch.no_grad():
        findings.attempt(f"forward after {name}", lambda: model(bases.tokens))


def refresh_hashes(folder: Path) -> None:
    """Make the hashes of the report those of the files, so that structure is all that is wrong."""
    path = folder / REPORT_FILE
    try:
        report = json.loads(path.read_bytes()) if path.is_file() else None
        for name, about in report["files"].items():
            file = folder / name
            if file.is_file() and file.stat().st_size < 1 << 24:
                about |= {"sha256": sha256(file), "bytes": file.stat().st_size}
        text = json.dumps(report)
    except (AttributeError, KeyError, OSError, TypeError, ValueError, RecursionError):
        return  # the report is what is spoiled
    path.unlink()
    path.write_text(text)


def check_tables(spoiled: Path, rng: random.Random, bases: Bases) -> Findings:
    """Check that tables load as the file says, or leave the model as it was."""
    findings = Findings()
    model = bases.model
    before = {name: value.clone() for name, value in model.state_dict().items()}
    _, error = findings.attempt("load_tables", lambda: load_tables(model, spoiled))
    after = model.state_dict()
    if error is None:
        stored, _ = findings.attempt("reader", lambda: read_file(spoiled / TABLES_FILE))
        expected = before | (stored or {})
    else:
        expected = before
    wrong = [name for name in after if not same(after[name], expected[name])]
    if wrong:
        state = "loaded" if error is None else "refused"
        findings.add(f"load_tables: {state}, but another model", f"{wrong[0]} and {len(wrong) - 1}")
    if error is None and expected.keys() - after.keys():
        findings.add("load_tables: tensors are ignored", ascii(expected.keys() - after.keys()))
    with torch.no_grad():
        findings.attempt("forward after load_tables", lambda: model(bases.tokens))
    set_tables(model)  # as the next case expects it
    findings.outcome = "accepted" if error is None else "refused"
    return findings


def check_source(spoiled: Path, rng: random.Random, bases: Bases) -> Findings:
    """Check that `convert` refuses and leaves nothing to load, or that the result is sound."""
    findings = Findings()
    out = spoiled.parent / "out"
    if rng.random() < 0.25:
        findings.command("convert", spoiled, "-o", out, "--dry-run")
        if out.exists():
            findings.add("--dry-run writes", str(sorted(out.rglob("*"))[:3]))
    if rng.random() < 0.5:
        code = findings.command("convert", spoiled, "-o", out, "-q", "--bits", rng.choice("234"))
        done = code == 0
    else:
        size = rng.choice(("5GB", "12KB"))
        config = SketchConfig(effort="fast", bits=rng.choice((2, 3, 4)), max_shard_size=size)
        _, error = findings.attempt("convert", lambda: convert(spoiled, out, config), (OSError,))
        done = error is None
    if not done:
        _check_nothing_loads(findings, out)
    else:
        _check_sound(findings, out, bases)
        if spoiled.is_dir():
            _check_kept(findings, spoiled, out)
    findings.outcome = "accepted" if done else "refused"
    return findings


def _check_nothing_loads(findings: Findings, out: Path) -> None:
    if not out.exists():
        return
    try:
        SketchedCheckpoint.open(out)
    except FormatError:
        return
    findings.add("a failed conversion leaves a folder that loads", str(sorted(out.iterdir())))


def _check_sound(findings: Findings, out: Path, bases: Bases) -> None:
    """Check a checkpoint that was just written."""
    problems, _ = findings.attempt("verify", lambda: verify(out))
    if problems:
        findings.add("verify refuses what convert wrote", ascii(problems[0]))
    if links := [path.name for path in out.rglob("*") if path.is_symlink()]:
        findings.add("convert leaves links", ascii(links))
    model, error = findings.attempt("load_sketched", lambda: load_sketched(out), (Exception,))
    if model is None:
        what = f"{type(error).__name__}: {' '.join(str(error).split())[:300]!a}"
        findings.add("convert writes what load_sketched refuses", what)
    else:
        _check_model(findings, "load_sketched", model, out, bases)


def _check_kept(findings: Findings, source: Path, out: Path) -> None:
    """Check that every tensor that is not sketched has the bytes of the source."""
    read, _ = findings.attempt("reader", lambda: (read_folder(source), read_folder(out)))
    if read is None:
        return
    before, after = read
    tables = {name.removesuffix("_table") for name in after if name.endswith(".weight_table")}
    for name in before.keys() - tables:
        if name not in after or before[name].dtype != after[name].dtype:
            findings.add("convert loses a tensor", ascii(name))
        elif not _same_bytes(before[name], after[name]):
            findings.add("convert changes a tensor", ascii(name))


def _same_bytes(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one.shape != other.shape:
        return False
    flat = (tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other))
    return one.numel() == 0 or torch.equal(*flat)


def check_gguf(spoiled: Path, rng: random.Random, bases: Bases) -> Findings:
    """Check a GGUF file as a source."""
    return check_source(spoiled, rng, bases)


def check_work(spoiled: Path, rng: random.Random, bases: Bases) -> Findings:
    """Check that a conversion is continued to the same bytes, or refused; or starts again."""
    findings = Findings()
    out = spoiled.parent
    name = out.parent.name
    how = rng.choice(({"resume": True}, {"resume": True}, {"overwrite": True}, {}))

    def run(options: dict[str, bool]) -> Exception | None:
        config = bases.plans[name]
        _, error = findings.attempt(
            f"convert({', '.join(options)})",
            lambda: convert(bases.source, out, config, device="cpu", **options),
            (OSError,),
        )
        return error

    error = run(how)
    if error is not None:
        _check_nothing_loads(findings, out)
        error_again = run({"overwrite": True})
        if error_again is not None:
            findings.outcome = "refused again"
            return findings
    reference = bases.reference(name)
    before, after = snapshot(reference), snapshot(out)
    expected = {path.removeprefix(str(reference)): about for path, about in before.items()}
    found = {path.removeprefix(str(out)): about for path, about in after.items()}
    if wrong := differences(expected, found):
        after_what = "overwriting" if error is not None or "overwrite" in how else "resuming"
        # Files that are complete are moved up without being hashed again: verify does that.
        moved = after_what == "resuming" and name == "published" and "/.spallm-partial" not in wrong
        if not moved or (wrong != ["/conversion.json"] and not verify(out)):
            findings.add(f"{after_what} gives other files", ascii(wrong[:4]))
    findings.outcome = "accepted" if error is None else "refused"
    return findings


CHECKS: dict[str, Callable[[Path, random.Random, Bases], Findings]] = {
    "checkpoint": check_checkpoint,
    "tables": check_tables,
    "source": check_source,
    "work": check_work,
    "gguf": check_gguf,
    FAMILY: check_faults,
}

#: Where the spoiled copy lies in the folder of a case; the folder of a case of `work` has the name
#: of its base.
PLACES = {
    "checkpoint": "checkpoint",
    "tables": "tables",
    "source": MODEL,
    "gguf": "model.gguf",
    FAMILY: "fault",
}
