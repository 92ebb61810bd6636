"""Compare the speed and loss of our calibrated sketching with LeanQuant's recipe on one machine.

Both cluster every row with weights from the Cholesky factor, and then choose codes column by column
with error compensation. The recipe is LeanQuant's (arXiv 2407.10032): scikit-learn's k-means, a
process per core and a task per row, then GPTQ's loop over columns in torch, all rows of the layer
at once. Clustering takes the same time per row for any number of rows, so the recipe's is timed on
a few rows; its loop gets all rows, with our tables. `fit` is all of ours: clustering twice with
different weights, compensation, then rounds of least squares, compensation and descent.

Columns are correlated and of different size, like the inputs of a layer. Losses are quadratic
losses on the rows that the recipe has clustered, by the damped Hessian that both use.

    python -m benchmarks.cpu.calibrated            writes benchmarks/results/calibrated.json
    python -m benchmarks.cpu.calibrated --quick    checks in seconds that everything runs
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
import numpy.typing as npt
import torch

from benchmarks.shared.machine import RESULTS, machine, quantiles, versions, write_results
from spallm_kernels import (
    compensate,
    fit,
    importance,
    kmeans,
    look_up,
    prepare_hessian,
    quadratic_loss,
)
from spallm_kernels.cpu.hessian import PreparedHessian

from .clustering import bf16_rows, fit_row, started_workers

Singles = npt.NDArray[np.float32]

_PACKAGES = ("numpy", "numba", "torch", "scikit-learn", "spallm-convert")
_POWER, _DAMPING, _BLOCK = 3.0, 0.1, 128  # LeanQuant's


def layer_inputs(columns: int, seed: int) -> npt.NDArray[np.float64]:
    """Return X^T X of inputs with a common part and columns of very different size."""
    rng = np.random.default_rng([seed, 2])
    x = rng.standard_normal((2 * columns, columns), np.float32)
    x += rng.standard_normal((2 * columns, columns // 8), np.float32) @ rng.standard_normal(
        (columns // 8, columns), np.float32
    )
    x *= rng.lognormal(size=columns).astype(np.float32)
    return (x.T @ x).astype(np.float64)


def column_loop(weights: Singles, table: Singles, hessian: PreparedHessian) -> Singles:
    """Return sketched weights by GPTQ's loop; table: [rows, entries], one group per row."""
    order = torch.from_numpy(hessian.order)
    upper = torch.linalg.cholesky(
        torch.linalg.inv(torch.from_numpy(hessian.full)[order][:, order]), upper=True
    ).float()
    left, entries = torch.from_numpy(weights)[:, order], torch.from_numpy(table)
    dense = torch.empty_like(left)
    for first in range(0, left.shape[1], _BLOCK):
        block = left[:, first : first + _BLOCK].clone()
        near, errors = (
            upper[first : first + _BLOCK, first : first + _BLOCK],
            torch.empty_like(block),
        )
        for i in range(block.shape[1]):
            column = block[:, i]
            nearest = (column[:, None] - entries).abs().argmin(dim=1, keepdim=True)
            dense[:, first + i] = entries.gather(1, nearest)[:, 0]
            errors[:, i] = (column - dense[:, first + i]) / near[i, i]
            block[:, i:] -= errors[:, i, None] * near[i, None, i:]
        left[:, first + _BLOCK :] -= errors @ upper[first : first + _BLOCK, first + _BLOCK :]
    found: Singles = dense[:, order.argsort()].numpy()
    return found


def measure(
    weights: Singles, prepared: PreparedHessian, bits: int, few: int, repeats: int
) -> dict[str, Any]:
    """Return weights per second of both, step by step, and our loss divided by the recipe's."""
    mass, entries = importance(prepared, _POWER), 2**bits
    seconds: dict[str, list[float]] = {}

    def timed(name: str, run: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        result = run()
        seconds.setdefault(name, []).append(time.perf_counter() - start)
        return result

    with started_workers() as workers:
        tasks = [(row[:, None], mass[0], entries) for row in weights[:few]]
        for turn in range(repeats + 1):
            if turn == 1:
                seconds.clear()  # the first turn compiles
            theirs = timed("scikit-learn", lambda: list(workers.processes.imap(fit_row, tasks)))
            table = timed("k-means", lambda: kmeans(weights, mass, 1, entries)[0])
            table = table.astype(np.float32)
            timed("column loop", lambda t=table: column_loop(weights, t[:, 0], prepared))
            codes = timed("compensate", lambda t=table: compensate(weights, t, prepared))
            fitted = timed("fit", lambda: fit(weights, prepared, 1, entries))
    rows = weights[:few]
    recipe = column_loop(rows, np.sort(np.stack(theirs), axis=1).astype(np.float32), prepared)
    base = quadratic_loss(rows, recipe, prepared.full).sum()
    ours, best = look_up(table[:few], codes[:few]), look_up(fitted.table[:few], fitted.codes[:few])
    size = {"scikit-learn": rows.size}
    rates = {
        name: [size.get(name, weights.size) / s for s in took] for name, took in seconds.items()
    }
    per_weight = {name: 1 / float(np.median(rate)) for name, rate in rates.items()}
    same_steps = per_weight["scikit-learn"] + per_weight["column loop"]
    return {
        "bits": bits,
        "weights_per_second": {name: quantiles(rate) for name, rate in rates.items()},
        "same_steps_times_faster": same_steps / (per_weight["k-means"] + per_weight["compensate"]),
        "fit_times_faster": same_steps / per_weight["fit"],
        "loss_relative": float(quadratic_loss(rows, ours, prepared.full).sum() / base),
        "fit_loss_relative": float(quadratic_loss(rows, best, prepared.full).sum() / base),
    }


def print_result(result: dict[str, Any]) -> None:
    """Print speeds in millions of weights per second, then the ratios."""
    click.echo(f"\n{result['bits']} bits, M weights/s (p20, p50, p80)")
    for name, rate in result["weights_per_second"].items():
        click.echo(f"  {name:14}" + "".join(f"{speed / 1e6:9.2f}" for speed in rate.values()))
    click.echo(
        f"  the same steps: {result['same_steps_times_faster']:.1f} times faster, "
        f"loss x {result['loss_relative']:.3f}\n"
        f"  fit:            {result['fit_times_faster']:.1f} times faster, "
        f"loss x {result['fit_loss_relative']:.3f}"
    )


@click.command(context_settings={"show_default": True})
@click.option("--bits", multiple=True, type=click.IntRange(2, 4), default=(4, 3, 2))
@click.option("--rows", type=click.IntRange(min=1), default=2048, help="Rows of the layer.")
@click.option("--few", type=click.IntRange(min=1), default=32, help="Rows for scikit-learn.")
@click.option("--columns", type=click.IntRange(min=64), default=2048, help="Weights per row.")
@click.option("--repeats", type=click.IntRange(min=1), default=3, help="Timed turns.")
@click.option("--seed", type=click.IntRange(min=0), default=0, help="Seed of weights and inputs.")
@click.option("--quick", is_flag=True, help="Use a small layer and one turn, and write no results.")
@click.option(
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    default=RESULTS / "calibrated.json",
    show_default="benchmarks/results/calibrated.json",
)
def main(
    bits: tuple[int, ...],
    rows: int,
    few: int,
    columns: int,
    repeats: int,
    seed: int,
    quick: bool,
    output: Path,
) -> None:
    """Compare calibrated sketching with scikit-learn and GPTQ's loop over columns."""
    if quick:
        rows, few, columns, repeats = 16, 4, 128, 1
    prepared = prepare_hessian(layer_inputs(columns, seed), _DAMPING)
    weights = bf16_rows(rows, columns, seed)
    results = []
    for width in bits:
        results.append(measure(weights, prepared, width, min(few, rows), repeats))
        print_result(results[-1])
    if not quick:
        settings = {"rows": rows, "few": few, "columns": columns, "repeats": repeats, "seed": seed}
        document = {
            "benchmark": "calibrated",
            "machine": machine(),
            "versions": versions(*_PACKAGES),
            "settings": settings | {"power": _POWER, "damping": _DAMPING},
            "results": results,
        }
        write_results(output, document)
        click.echo(f"\nwritten to {output}")


if __name__ == "__main__":
    main()
