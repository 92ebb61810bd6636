"""Write the model card of a sketched checkpoint from its report."""

from __future__ import annotations

import json
import re
from typing import Any

from spallm_convert.effort import FAST
from spallm_convert.errors import one_line
from spallm_formats import printable

from .report import Report

CARD_FILE = "README.md"
_WORST_SHOWN = 5
_ENTRIES_SHOWN = 8


def model_card(report: Report, config: dict[str, Any]) -> str:
    """Write the model card: metadata for the Hub, the figures, and how to load the model.

    Args:
        report: Report of the conversion.
        config: `config.json` of the source.

    Returns:
        The text of README.md.
    """
    totals, options, source = report.totals, report.document["options"], report.source
    is_decoder = any("ForCausalLM" in name for name in config["architectures"])
    name = _plain(source["model"].rsplit("/", 1)[-1])
    groups = sorted({module["groups_per_row"] for module in report.modules})
    worst = sorted(report.modules, key=lambda module: -module["relative_error"])[:_WORST_SHOWN]
    rows = "\n".join(
        f"| `{_plain(module['name'])}` | {module['relative_error']:.4f} |" for module in worst
    )
    widths = _listed(report.widths)
    rest = _recipe(report) + _effort(report) + _calibration(report)
    share = "Some" if options.get("include") else "Most" if report.left_dense else "All"
    return f"""{_front_matter(report, is_decoder)}
# {name}, sketched to {_joined(_sizes(report))} bits

{share} linear layers of this model's blocks are **sketches**: a small trainable table per row and
group, and a frozen index map of {widths} bits per weight that says which entry each weight
is. The model is fine-tuned by training the tables themselves: no adapter.

| | |
| --- | --- |
| source | {_plain(source["model"])}{_at_revision(source)} |{_quantized(report)}
| bits per code | {widths}{_chosen(report)} |
| groups per row | {_listed(groups)} |
| mapping | {options["mapping"]} |
| bits per sketched weight, tables included | {totals["bits_per_weight"]:.3f} |
| size | {totals["sketched_bytes"] / 1e6:,.1f} MB, was {_was(report)} |
| relative error of the weights (Frobenius) | {totals["relative_error"]:.4f} |{rest}

## How to load it

```python
# needs the package spallm-convert
from spallm_convert import load_sketched

model = load_sketched("path or Hub id of this model")
```

The tables are the only trainable parameters. With `import spallm_convert`, the Auto classes of
transformers load it too.

## Layers with the largest error

| layer | relative error |
| --- | --- |
{rows}

All layers, options, versions and hashes: `conversion.json`. Method: SpaLLM (arXiv 2410.06364),
published as SketchTune at ICML 2025. Made with spallm-convert
{report.document["versions"]["spallm-convert"]}.
"""


def _front_matter(report: Report, is_decoder: bool) -> str:
    source = report.source
    lines = ["---", "library_name: transformers"]
    if source["revision"]:
        lines += [f"base_model: {source['model']}", "base_model_relation: quantized"]
    for key, value in (source["license"] or {}).items():
        lines.append(f"{key}: {json.dumps(value)}")  # JSON is YAML
    if is_decoder:
        lines.append("pipeline_tag: text-generation")
    lines += [
        "tags:",
        "- spallm",
        "- sketched",
        *(f"- {size}-bit" for size in _sizes(report)),
        "---",
    ]
    return "\n".join(lines)


def _quantized(report: Report) -> str:
    """Return the row of the table about a quantized source, empty if it is dense."""
    about = report.document.get("source_quantization")
    if about is None:
        return ""
    return f"\n| weights of the source | {_plain(about['scheme'])}, dequantized before sketching |"


def _was(report: Report) -> str:
    """Return the size of the source; of a quantized one, also its dense size."""
    dense = f"{report.totals['source_bytes'] / 1e6:,.1f} MB"
    about = report.document.get("source_quantization")
    if about is None:
        return dense
    return f"{about['stored_bytes'] / 1e6:,.1f} MB quantized, dense {dense}"


def _effort(report: Report) -> str:
    """Return the row of the table about the effort: the one that was run, and the one asked for."""
    asked = report.document["options"]["effort"]
    done = f"{FAST} in place of {asked}" if "not_calibrated" in report.document else asked
    return f"\n| effort | {done} |"


def _calibration(report: Report) -> str:
    """Return the rows of the table about calibration, empty without it."""
    error, options = report.totals.get("relative_output_error"), report.document["options"]
    if (reason := report.document.get("not_calibrated")) is not None:
        return f"\n| calibration | none: {_plain(one_line(reason))} |"
    if error is None:
        return ""
    when = ", before healing" if "healing" in report.document else ""
    return (
        f"\n| calibration | {_plain(options['calibration'])}, {options['samples']} samples of "
        f"{options['seqlen']} tokens |"
        f"\n| relative error of the layers' outputs on it{when} | {error:.4f} |{_healing(report)}"
    )


def _healing(report: Report) -> str:
    healing = report.document.get("healing")
    if healing is None:
        return ""
    return (
        f"\n| divergence from the dense model on samples left out, before and after "
        f"{report.document['options']['heal']} steps of healing | {healing['kl_before']:.4f}, "
        f"{healing['kl_after']:.4f} nats per token |"
    )


def _recipe(report: Report) -> str:
    """Return the row of the table about the recipe, empty without one."""
    entries = [
        f"`{_plain(rule['pattern'])}`: "
        + ", ".join(f"{key} {_said(value)}" for key, value in rule.items() if key != "pattern")
        for rule in report.document["options"].get("recipe") or []
    ]
    if len(entries) > _ENTRIES_SHOWN:
        entries[_ENTRIES_SHOWN:] = [f"and {len(entries) - _ENTRIES_SHOWN} more"]
    return f"\n| recipe | {'; '.join(entries)} |" if entries else ""


def _said(value: object) -> str:
    return str(value).lower()  # true, as in a recipe


def _sizes(report: Report) -> list[str]:
    """Return the bits per code that occur, or the target in bits per weight if there was one."""
    options = report.document["options"]
    target = options.get("target_bits")
    if target is not None:
        return [f"{target:g}"]
    return [str(bits) for bits in (report.widths if options.get("recipe") else [options["bits"]])]


def _joined(words: list[str]) -> str:
    return " and ".join([", ".join(words[:-1])] * (len(words) > 1) + words[-1:])


def _chosen(report: Report) -> str:
    predicted = report.document.get("predicted_loss")
    if predicted is None:
        return ""
    return f", by layer; predicted to lose {predicted['chosen']:.4f} nats per token"


def _listed(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers))


def _at_revision(source: dict[str, Any]) -> str:
    return f" at {json.dumps(source['revision'][:12])}" if source["revision"] else ""


def _plain(text: str) -> str:
    """Return a name as it can stand in a cell of a table: on one line, without active Markdown."""
    return re.sub(r"[|`<>\[\]]", lambda mark: f"&#{ord(mark[0])};", printable(text))
