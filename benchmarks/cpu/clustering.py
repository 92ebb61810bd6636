"""Compare the speed and error of our clustering with three other packages on one machine.

A conversion spends most of its time on clustering. Measured are the weights clustered per second,
and the remaining weighted squared error, for rows of bf16 weights with one table each.

* scikit-learn, called as LeanQuant does (lean_quantizer.py at bc8c8ee): Lloyd's algorithm, a
  process per core, a task per row.
* flash1dkmeans: Lloyd's algorithm on sorted rows with prefix sums, in numba, parallel over rows.
* ckmeans: exact like ours, but without weights; compared with ours on uniform weights.

All packages run in turn, repeatedly, so that a slow moment of the machine affects them alike. The
first turn is not timed: it compiles. Its centroids give the errors, each computed in float64 by
assigning every weight to the nearest centroid. Faster packages get more rows per turn, always the
first rows of the same matrix; errors are compared on rows that both have clustered.

    python -m benchmarks.cpu.clustering            writes benchmarks/results/clustering.json
    python -m benchmarks.cpu.clustering --quick    checks in seconds that everything runs
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.pool import Pool
from pathlib import Path
from typing import Any

import ckmeans
import click
import numba
import numpy as np
import numpy.typing as npt
from flash1dkmeans import numba_kmeans_1d_k_cluster

from benchmarks.shared.machine import RESULTS, cores, machine, quantiles, versions, write_results
from spallm_formats import from_float32, to_float32
from spallm_kernels import kmeans

Singles = npt.NDArray[np.float32]
Floats = npt.NDArray[np.float64]

OURS, OURS_UNIFORM = "ours", "ours, uniform weights"
_PACKAGES = ("numpy", "numba", "scikit-learn", "flash1dkmeans", "ckmeans", "spallm-convert")
_FLASH_ITERATIONS = 300  # the default of flash1dkmeans
_QUICK_ROWS, _QUICK_REPEATS = 8, 2


@dataclass(frozen=True)
class Contender:
    """Describe a way to cluster rows.

    run: the timed call. centroids: turns its result into [rows, clusters], not timed. importance:
    [columns], the weights in the error. rival: which of ours it is compared with.
    """

    name: str
    rows: int
    importance: Singles
    run: Callable[[Singles], Any]
    centroids: Callable[[Any], Floats] = np.asarray
    rival: str | None = None


@dataclass(frozen=True)
class Workers:
    """Hold worker processes and threads, started once before anything is timed."""

    processes: Pool
    threads: ThreadPoolExecutor


def bf16_rows(rows: int, columns: int, seed: int) -> Singles:
    """Return Gaussian weights of a usual size, rounded to bf16, as float32 [rows, columns]."""
    normal = np.random.default_rng(seed).standard_normal((rows, columns), np.float32)
    rounded = from_float32(normal * np.float32(0.02), "BF16")
    return to_float32(rounded.tobytes(), "BF16").reshape(rows, columns)


def column_weights(columns: int, seed: int) -> Singles:
    """Return positive weights that differ by orders of magnitude, as activations' do."""
    return np.random.default_rng([seed, 1]).lognormal(size=columns).astype(np.float32)


def contenders(
    clusters: int, importance: Singles, rows: dict[str, int], workers: Workers
) -> list[Contender]:
    """Return all packages that are compared, in the order of their turns."""
    uniform = np.ones_like(importance)
    return [
        Contender(OURS, rows["ours"], importance, _ours(importance, clusters)),
        Contender(
            "scikit-learn",
            rows["scikit-learn"],
            importance,
            _scikit_learn(importance, clusters, workers.processes),
            rival=OURS,
        ),
        Contender(
            "flash1dkmeans",
            rows["flash1dkmeans"],
            importance,
            _flash(importance, clusters),
            rival=OURS,
        ),
        Contender(OURS_UNIFORM, rows["ours"], uniform, _ours(uniform, clusters)),
        Contender(
            "ckmeans",
            rows["ckmeans"],
            uniform,
            _ckmeans(clusters, workers.threads),
            _means,
            rival=OURS_UNIFORM,
        ),
    ]


def _ours(importance: Singles, clusters: int) -> Callable[[Singles], Floats]:
    return lambda weights: kmeans(weights, importance[None], 1, clusters)[0][:, 0]


def _scikit_learn(importance: Singles, clusters: int, pool: Pool) -> Callable[[Singles], Floats]:
    def run(weights: Singles) -> Floats:
        tasks = [(row[:, None], importance, clusters) for row in weights]
        return np.stack(list(pool.imap(fit_row, tasks)))

    return run


def fit_row(task: tuple[Singles, Singles, int]) -> Singles:
    """Return the centroids of one row, called as LeanQuant does. values: [n, 1]."""
    from sklearn.cluster import KMeans

    values, importance, clusters = task
    spread = np.linspace(values.min(), values.max(), num=clusters)[:, None]
    found = KMeans(
        n_clusters=clusters,
        init=spread if clusters <= 8 else "k-means++",
        n_init="auto",
        random_state=0,
        max_iter=100,
        tol=1e-6,
    ).fit(values, sample_weight=importance)
    centroids: Singles = found.cluster_centers_.reshape(-1)
    return centroids


def _flash(importance: Singles, clusters: int) -> Callable[[Singles], Singles]:
    def run(weights: Singles) -> Singles:
        centroids = np.empty((len(weights), clusters), np.float32)
        _flash_rows(weights, importance, centroids)
        return centroids

    return run


@numba.njit(cache=True, parallel=True)
def _flash_rows(weights: Singles, importance: Singles, centroids: Singles) -> None:
    rows, columns = weights.shape
    for row in numba.prange(rows):
        order = np.argsort(weights[row])
        ordered = weights[row][order]
        mass = importance[order].astype(np.float64)
        moment = mass * ordered
        found, _ = numba_kmeans_1d_k_cluster(
            ordered,
            centroids.shape[1],
            _FLASH_ITERATIONS,
            np.cumsum(mass),
            np.cumsum(moment),
            np.cumsum(moment * ordered),
            0,
            columns,
            0,
        )
        centroids[row] = found


def _ckmeans(clusters: int, threads: ThreadPoolExecutor) -> Callable[[Singles], Any]:
    return lambda weights: list(threads.map(lambda row: ckmeans.ckmeans(row, clusters), weights))


def _means(members: list[list[Floats]]) -> Floats:
    return np.array([[cluster.mean() for cluster in row] for row in members])


def row_errors(weights: Singles, importance: Singles, centroids: Floats) -> Floats:
    """Return the weighted squared error of each row, every weight at its nearest centroid."""
    errors = np.empty(len(weights))
    mass = importance.astype(np.float64)
    tables = np.sort(centroids.astype(np.float64), axis=1)
    for row, (values, table) in enumerate(zip(weights.astype(np.float64), tables, strict=True)):
        nearest = table[np.searchsorted((table[1:] + table[:-1]) / 2, values)]
        errors[row] = mass @ (values - nearest) ** 2
    return errors


def measure(weights: Singles, entrants: list[Contender], repeats: int) -> dict[str, Any]:
    """Return weights per second of each contender, and how ours compare with the others."""
    errors = {entrant.name: _errors(weights, entrant) for entrant in entrants}
    rates: dict[str, list[float]] = {entrant.name: [] for entrant in entrants}
    for _ in range(repeats):
        for entrant in entrants:
            rows = weights[: entrant.rows]
            start = time.perf_counter()
            entrant.run(rows)
            rates[entrant.name].append(rows.size / (time.perf_counter() - start))
    methods: dict[str, Any] = {}
    for entrant in entrants:
        name, rival = entrant.name, entrant.rival
        methods[name] = {"rows": entrant.rows, "weights_per_second": quantiles(rates[name])}
        if rival:
            shared = min(len(errors[name]), len(errors[rival]))
            methods[name] |= {
                "compared_with": rival,
                "ours_times_faster": float(np.median(rates[rival]) / np.median(rates[name])),
                "ours_error_relative": float(
                    errors[rival][:shared].sum() / errors[name][:shared].sum()
                ),
                "error_compared_on_rows": shared,
            }
    return methods


def _errors(weights: Singles, entrant: Contender) -> Floats:
    """Return the errors of a first run, which also compiles."""
    rows = weights[: entrant.rows]
    return row_errors(rows, entrant.importance, entrant.centroids(entrant.run(rows)))


@contextlib.contextmanager
def started_workers() -> Iterator[Workers]:
    """Start a process and a thread per core. numba's threads do not survive a fork: spawn."""
    with _one_openmp_thread():
        pool = multiprocessing.get_context("spawn").Pool(cores(), _start_process)
    with pool, ThreadPoolExecutor(cores()) as threads:
        yield Workers(pool, threads)


@contextlib.contextmanager
def _one_openmp_thread() -> Iterator[None]:
    """Let processes started here run OpenMP and BLAS on one thread, as LeanQuant's do."""
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        yield
    finally:
        del os.environ["OMP_NUM_THREADS"]
        if before is not None:
            os.environ["OMP_NUM_THREADS"] = before


def _start_process() -> None:
    import sklearn.cluster  # noqa: F401


def print_table(bits: int, methods: dict[str, Any]) -> None:
    """Print speeds in millions of weights per second, and ours / theirs of speed and error."""
    click.echo(f"\n{bits} bits, M weights/s")
    click.echo(f"{'':22}{'rows':>6}{'p20':>9}{'p50':>9}{'p80':>9}{'ours faster':>13}{'error':>10}")
    for name, method in methods.items():
        speeds = "".join(f"{speed / 1e6:9.2f}" for speed in method["weights_per_second"].values())
        line = f"{name:22}{method['rows']:6}{speeds}"
        if "compared_with" in method:
            line += f"{method['ours_times_faster']:12.2f}x{method['ours_error_relative']:10.6f}"
        click.echo(line)
    click.echo("error: ours / theirs, on the same rows and with the same column weights")


def _rows_option(flag: str, default: int) -> Callable[..., Any]:
    return click.option(flag, type=click.IntRange(min=1), default=default, help="Rows per turn.")


@click.command(context_settings={"show_default": True})
@click.option(
    "--bits",
    multiple=True,
    type=click.IntRange(2, 4),
    default=(4,),
    help="Bits of a code: 2^bits clusters. May be repeated.",
)
@_rows_option("--ours", 2048)
@_rows_option("--scikit-learn", 64)
@_rows_option("--flash1dkmeans", 1024)
@_rows_option("--ckmeans", 256)
@click.option("--columns", type=click.IntRange(min=64), default=4096, help="Weights per row.")
@click.option("--repeats", type=click.IntRange(min=1), default=15, help="Timed turns.")
@click.option("--seed", type=click.IntRange(min=0), default=0, help="Seed of the weights.")
@click.option("--quick", is_flag=True, help="Use few rows and turns, and write no results.")
@click.option(
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    default=RESULTS / "clustering.json",
    show_default="benchmarks/results/clustering.json",
    help="JSON file to write.",
)
def main(
    bits: tuple[int, ...],
    columns: int,
    repeats: int,
    seed: int,
    quick: bool,
    output: Path,
    **rows: int,
) -> None:
    """Compare the speed and error of our clustering with three other packages."""
    rows = {name.replace("_", "-"): count for name, count in rows.items()}
    if quick:
        rows, repeats = dict.fromkeys(rows, _QUICK_ROWS), _QUICK_REPEATS
    weights, importance = (
        bf16_rows(max(rows.values()), columns, seed),
        column_weights(columns, seed),
    )
    results = []
    with started_workers() as workers:
        for width in bits:
            methods = measure(weights, contenders(2**width, importance, rows, workers), repeats)
            print_table(width, methods)
            results.append({"bits": width, "methods": methods})
    if not quick:
        document = {
            "benchmark": "clustering",
            "machine": machine(),
            "versions": versions(*_PACKAGES),
            "settings": {"columns": columns, "repeats": repeats, "seed": seed},
            "results": results,
        }
        write_results(output, document)
        click.echo(f"\nwritten to {output}")


if __name__ == "__main__":
    main()
