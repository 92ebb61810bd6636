"""Define the command `spallm-convert inspect DIR`."""

from __future__ import annotations

import json
from pathlib import Path

import click

from .lines import say


@click.command("inspect")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print config and report as JSON.")
def command(folder: Path, as_json: bool) -> None:
    """Show the layers of the sketched checkpoint in FOLDER. Only headers are read."""
    from spallm_convert.conversion.report import Report
    from spallm_formats import SketchedCheckpoint

    checkpoint = SketchedCheckpoint.open(folder)
    report = Report.read(folder)
    if as_json:
        document = {
            "quantization_config": checkpoint.metadata.to_json(),
            "conversion": report.document if report else None,
        }
        say(json.dumps(document, indent=2))
        return
    metadata = checkpoint.metadata
    named = checkpoint.config.get("architectures")
    architecture = named[0] if isinstance(named, list) and named else "unknown architecture"
    widths = sorted({module.bits for module in metadata.modules.values()})
    say(
        f"{architecture}: {len(metadata.modules)} sketched layers, "
        f"{', '.join(map(str, widths))} bits, "
        f"mapping {metadata.mapping}, tables in {metadata.table_dtype}"
    )
    if report is None:
        size = sum(tensor.nbytes for tensor in checkpoint.tensors.values())
        say(f"{size / 1e6:,.1f} MB of tensors; no conversion.json, so errors are unknown")
        return
    from .printing import print_report

    say(f"converted from {report.source['model']}")
    print_report(report)
