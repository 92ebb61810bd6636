"""Define the command `spallm-convert [convert] MODEL`."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from spallm_convert.config import SketchConfig
from spallm_convert.devices import AUTO_DEVICE
from spallm_convert.effort import BEST, FAST, HIGH, NORMAL
from spallm_convert.errors import HubError
from spallm_convert.paths import user_path
from spallm_convert.recipe import AUTO, BITS, Recipe
from spallm_formats.dtypes import TABLE_DTYPES
from spallm_formats.metadata import MAPPINGS

from .effort_options import effort_options, read_effort
from .lines import hide_bars, say

_DEFAULTS = SketchConfig()


def _groups(ctx: click.Context, param: click.Parameter, value: str) -> int | str:
    if value == AUTO:
        return AUTO
    try:
        return int(value)
    except ValueError:
        raise click.BadParameter(f"expected a number or {AUTO!r}, found {value!r}") from None


@click.command("convert", context_settings={"show_default": True})
@click.argument("model")
@click.option(
    "-o",
    "--output-dir",
    type=click.Path(path_type=Path),
    help="Folder to write.  [default: ./<name>-spallm-<bits>bit]",
)
@effort_options
@click.option(
    "--bits",
    type=click.Choice([str(bits) for bits in BITS]),
    default=str(_DEFAULTS.bits),
    help="Bits per code: 2^bits table entries.",
)
@click.option(
    "--groups-per-row",
    metavar="N|auto",
    callback=_groups,
    default=_DEFAULTS.groups_per_row,
    help="Tables per row; auto: up to 4, with at least 1,024 columns each.",
)
@click.option(
    "--mapping",
    type=click.Choice(MAPPINGS),
    default=_DEFAULTS.mapping,
    help="Index map from clustering, or computed by a hash. A hashed index map keeps only the mean "
    "of the weights that collide: without training, perplexity is above 10,000 at any width.",
)
@click.option(
    "--table-dtype",
    type=click.Choice(list(TABLE_DTYPES)),
    default=_DEFAULTS.table_dtype,
    help="Dtype of the tables on disk.",
)
@click.option(
    "--seed",
    type=click.IntRange(0, 2**32 - 1),
    default=_DEFAULTS.seed,
    help="Seed of the hash mapping and of everything that calibration and healing draw at random.",
)
@click.option(
    "--embeddings",
    is_flag=True,
    help="Sketch the input embedding of tokens too, from its weights alone. If the model ties the "
    "output head to it, both are one weight, and this option or --lm-head sketches it for both.",
)
@click.option(
    "--lm-head",
    is_flag=True,
    help="Sketch the output head too, from its weights alone; see --embeddings for tied weights.",
)
@click.option(
    "--include",
    multiple=True,
    metavar="PATTERN",
    help="Sketch only layers that match, for example '*.mlp.*'; may be repeated.",
)
@click.option(
    "--ignore",
    multiple=True,
    metavar="PATTERN",
    help="Layers to leave dense, for example '*.down_proj'; may be repeated.",
)
@click.option(
    "--recipe",
    metavar="FILE",
    help="TOML or JSON file with bits, groups or dense for patterns of layers.",
)
@click.option(
    "--strict",
    is_flag=True,
    help="Refuse a model if more than 5 % of its linear weights would stay dense unasked.",
)
@click.option(
    "--max-shard-size", default=_DEFAULTS.max_shard_size, help="Largest size of a weight file."
)
@click.option("--revision", help="Branch, tag or commit of a model on the Hub.")
@click.option("--trust-remote-code", is_flag=True, help="Allow model code from the repository.")
@click.option(
    "--threads", type=click.IntRange(min=1), help="CPU threads.  [default: all]", show_default=False
)
@click.option(
    "--device",
    metavar="auto|cpu|cuda|cuda:N",
    default=AUTO_DEVICE,
    help="Where to calibrate; auto: a GPU if there is one. Everything else runs on the CPU.",
)
@click.option(
    "--dry-run",
    is_flag=True,
    help="Show what would be sketched, the sizes and the ratio from headers alone, and estimate "
    "time and memory on this machine.",
)
@click.option("--resume", is_flag=True, help="Continue an interrupted conversion.")
@click.option("--overwrite", is_flag=True, help="Replace the checkpoint in the output folder.")
@click.option("--push-to-hub", metavar="ORG/NAME", help="Upload the result to the Hub.")
@click.option("--private", is_flag=True, help="Make the repository on the Hub private.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
@click.option("-q", "--quiet", is_flag=True, help="No progress, no table.")
def command(
    model: str,
    output_dir: Path | None,
    effort: str | None,
    bits: str,
    groups_per_row: int | str,
    mapping: str,
    table_dtype: str,
    seed: int,
    embeddings: bool,
    lm_head: bool,
    include: tuple[str, ...],
    ignore: tuple[str, ...],
    recipe: str | None,
    strict: bool,
    max_shard_size: str,
    revision: str | None,
    trust_remote_code: bool,
    threads: int | None,
    device: str,
    dry_run: bool,
    resume: bool,
    overwrite: bool,
    push_to_hub: str | None,
    private: bool,
    as_json: bool,
    quiet: bool,
    **text: Any,
) -> None:
    """Sketch MODEL: an id on the Hub, a folder, or a GGUF file."""
    if resume and overwrite:
        raise click.UsageError("--resume and --overwrite cannot be combined; choose one")
    if private and not push_to_hub:
        raise click.UsageError("--private needs --push-to-hub ORG/NAME")
    target_bits = text["target_bits"]
    if target_bits is not None and _is_given("bits"):
        raise click.UsageError("--bits and --target-bits cannot be combined; choose one")
    effort, calibration = read_effort(effort, mapping, **text)
    config = SketchConfig(
        effort=effort,
        bits=int(bits),
        groups_per_row=groups_per_row,
        mapping=mapping,
        table_dtype=table_dtype,
        seed=seed,
        embeddings=embeddings,
        lm_head=lm_head,
        include=include,
        ignore=ignore,
        recipe=None if recipe is None else Recipe.read(recipe),
        strict=strict,
        max_shard_size=max_shard_size,
        calibration=calibration,
    )
    hide_bars(quiet or as_json)
    from spallm_convert.conversion.convert import convert, plan_conversion
    from spallm_convert.conversion.estimate import estimate_conversion

    from .printing import print_plan, print_report
    from .terminal import ConversionProgress, quiet_libraries

    if push_to_hub and not dry_run:
        from spallm_convert.conversion.push import check_can_push

        check_can_push(push_to_hub)
    quiet_libraries(downloads=not quiet)
    if not (quiet or as_json):
        _advise(config)
    if dry_run:
        plan = plan_conversion(
            model, config, revision=revision, trust_remote_code=trust_remote_code, device=device
        )
        estimate = None
        if as_json or not quiet:
            estimate = estimate_conversion(
                model,
                plan,
                config,
                revision=revision,
                trust_remote_code=trust_remote_code,
                threads=threads,
                device=device,
            )
        print_plan(plan, estimate, as_json=as_json, totals_alone=quiet)
        return
    begin = time.perf_counter()
    output = output_dir or default_output(model, target_bits or config.bits)
    with ConversionProgress(hidden=quiet or as_json) as progress:
        report = convert(
            model,
            output,
            config,
            revision=revision,
            resume=resume,
            overwrite=overwrite,
            trust_remote_code=trust_remote_code,
            threads=threads,
            device=device,
            progress=progress,
        )
    if as_json:
        say(json.dumps(report.document | {"output": str(output)}, indent=2))
    elif not quiet:
        print_report(report)
        more = "" if "not_calibrated" in report.document else _more(config)
        say(f"written to {output} in {time.perf_counter() - begin:,.0f} s{more}")
    if push_to_hub:
        from spallm_convert.conversion.push import push_to_hub as push

        try:
            url = push(output, push_to_hub, private=private)
        except HubError as error:
            again = f"spallm-convert push {output} {push_to_hub}"
            raise HubError(f"{error}; {output} is complete, upload it later: {again}") from error
        say(f"pushed to {url}", err=as_json)


def _more(config: SketchConfig) -> str:
    """Return what would give better quality, empty for levels that take long already."""
    # Effort normal weights clusters, so it is not for hashed index maps.
    after_fast = HIGH if config.mapping == "hash" else NORMAL
    higher = {FAST: after_fast, NORMAL: HIGH}.get(config.level.name)
    return f"; --effort {higher} takes longer and keeps more of the quality" if higher else ""


def _advise(config: SketchConfig) -> None:
    """Advise more effort for few bits before the conversion (figures: docs/quality.md)."""
    from .terminal import stderr

    hashed = config.mapping == "hash"
    rules = () if config.recipe is None else config.recipe.rules
    bits = min([config.bits, *(rule.bits for rule in rules if rule.bits is not None)])
    if config.level.name in (FAST, NORMAL) and (hashed or bits < _DEFAULTS.bits):
        what = "hashed index maps" if hashed else f"{bits} bits"
        stderr.print(
            f"{what} lose much of the model's quality with effort {config.level.name}: consider "
            f"--effort {BEST}, and --calibration with a text of your own",
            soft_wrap=True,
        )


def _is_given(option: str) -> bool:
    source = click.get_current_context().get_parameter_source(option)
    return source is not ParameterSource.DEFAULT


def default_output(model: str, bits: float) -> Path:
    """Return ./<name>-spallm-<bits>bit."""
    name = user_path(model.rstrip("/")).resolve().name
    return Path(f"{name.removesuffix('.gguf')}-spallm-{bits:g}bit")
