"""Define the command `spallm-convert doctor`."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from .lines import say

if TYPE_CHECKING:
    from spallm_convert.runtime.diagnosis import Diagnosis

EXIT_PROBLEMS = 1


@click.command("doctor")
@click.option("--json", "as_json", is_flag=True, help="Print what was found as JSON.")
def command(as_json: bool) -> None:
    """Show what runs where on this machine, and check that the kernels are right there.

    Takes some seconds. The exit code is 1 if kernels fail their check or a device gets slow
    reference code. A machine without a GPU is fine.
    """
    from spallm_convert.runtime.diagnosis import diagnose

    found = diagnose()
    if as_json:
        say(json.dumps(asdict(found), indent=2))
    else:
        _print(found)
        for problem in found.problems:
            say(f"spallm-convert: {problem}", err=True)
    if found.problems:
        raise click.exceptions.Exit(EXIT_PROBLEMS)
    if not as_json:
        say("no problems found")


def _print(found: Diagnosis) -> None:
    versions = (f"{name} {version or 'missing'}" for name, version in found.versions.items())
    say(", ".join(versions))
    features = ", ".join(found.cpu["features"]) or "no AVX2, AVX-512 or NEON"
    threads = found.cpu["threads"]
    say(f"CPU: {found.cpu['name']}, {features}, {threads} thread{'s' * (threads > 1)}")
    for gpu in found.gpus:
        memory = f"{gpu.memory_bytes / 1e9:.0f} GB"
        say(f"{gpu.device}: {gpu.name}, capability {gpu.capability}, {memory}")
    if not found.gpus:
        say("no GPU")
    _print_checks(found)
    _print_routes(found)
    for speed in found.throughput:
        say(
            f"{speed.device}: a layer of 4096 x 4096, 4 bits, 1 token: {speed.sketched_ms:.3g} ms; "
            f"dense {speed.dense_float32_ms:.3g} ms in float32, {speed.dense_bfloat16_ms:.3g} ms "
            "in bfloat16"
        )


def _print_checks(found: Diagnosis) -> None:
    widths: dict[tuple[str, str, str], list[str]] = {}
    for check in found.checks:
        verdict = "right" if check.fault is None else "wrong"
        widths.setdefault((check.device, check.backend, verdict), []).append(str(check.bits))
    for (device, backend, verdict), bits in widths.items():
        say(f"{device}: backend {backend!r} checked with {', '.join(bits)} bits: {verdict}")
    if not found.check_is_on:
        say("SPALLM_GPU_CHECK=0: outside of this command, kernels are used without a check")


def _print_routes(found: Diagnosis) -> None:
    for route in found.routes:
        code = f" ({found.cpu['path']})" if route.backend == "cpu" else ""
        tokens = f"{route.tokens} token{'s' * (route.tokens > 1)}"
        say(f"{route.device}: {tokens}: backend {route.backend!r}{code}, path {route.path!r}")
