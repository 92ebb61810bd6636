"""Estimate how long a conversion will take on this machine, and how much memory.

A few rows of the most common layer are sketched, multiplied and fitted with random weights. The
times are scaled by the number of operations that the plan needs. Time to read and hash the source,
attention, and everything else that is not done to weights is left out, so the estimate is rough.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numba
import torch

from spallm_convert.calibration.healing.heal import samples_for
from spallm_convert.calibration.layers import prepare_inputs, sketch_layer
from spallm_convert.calibration_config import CalibrationConfig
from spallm_convert.config import SketchConfig
from spallm_convert.devices import (
    AUTO_DEVICE,
    CPU,
    cpu_threads,
    device_name,
    fast_products,
    find_device,
    full_float32,
)
from spallm_convert.effort import EFFORTS, NORMAL
from spallm_convert.sketch.plan import Plan
from spallm_convert.sketch.rows import sketch_rows
from spallm_convert.source.linears import is_in_block
from spallm_convert.source.locate import find_here
from spallm_formats import SketchedModule

from .expected import expected_effort
from .memory import block_bytes, other_bytes
from .work import Work, count_work

#: Peak memory of the effort fast in bytes (benchmarks/results/memory_experts.json).
_FAST_BYTES = 7 * 10**8
#: Matrices [columns, columns] in float64 that the sums over a layer's inputs are in: X^T X, X^T Z,
#: the damped Hessian, its factor, the change of the target, and one while they are computed.
_SQUARES = 6
#: float32 tensors of a table's size while it is healed: table, gradient, two moments and the best.
_TABLES = 5
#: While transformers dequantizes a GGUF file, memory holds the model and 3.2 times its largest
#: tensor in float32: 0.63 GB for SmolLM2-135M (Q4_1), 2.68 GB for Gemma 3 270M (Q4_K_M), whose
#: embedding is six times as large.
_COPIES_OF_GGUF = 3.2
_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16}
#: Size of what is measured: weights that are sketched, tokens and weights of a product, columns of
#: a fit. Rows of a fit: with fewer, starting threads takes most of the time; a GPU fits thousands
#: at once.
_WEIGHTS, _TOKENS, _FACTORS, _COLUMNS = 1 << 20, 256, 1 << 22, 512
_ROWS, _ROWS_ON_GPU = 256, 4096


@dataclass(frozen=True)
class Estimate:
    """Say what a conversion will probably take.

    Attributes:
        asked: The level of effort of the options.
        effort: The level that will run.
        reason: Why it is not the level of the options. None: it is.
        seconds: Time on this machine.
        memory_bytes: Peak memory, that of the GPU included.
        threads: CPU threads.
        device: Where the model is run: "cpu", or the model of the GPU.
    """

    asked: str
    effort: str
    reason: str | None
    seconds: float
    memory_bytes: int
    threads: int
    device: str


def estimate_conversion(
    model: str,
    plan: Plan,
    config: SketchConfig,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    threads: int | None = None,
    device: str = AUTO_DEVICE,
) -> Estimate:
    """Estimate time and memory of a planned conversion, with short measurements.

    Args:
        model: The model, as `convert` takes it.
        plan: What `plan_conversion` returned for it.
        config: Options of the conversion.
        revision: Branch, tag or commit on the Hub.
        trust_remote_code: Whether to run Python code that comes with the model.
        threads: Number of CPU threads.
        device: The device that `convert` would get.
    """
    place = find_device(device if config.level.reads_text else CPU)
    effort, reason = expected_effort(
        model, plan, config, place, revision=revision, trust_remote_code=trust_remote_code
    )
    text = config.text_options if EFFORTS[effort].reads_text else None
    if text is None:
        place = torch.device(CPU)
    with cpu_threads(threads), full_float32(), torch.no_grad():
        work = count_work(plan, effort, text)
        seconds = sum(_measured(plan, work, place).values())
        found = numba.get_num_threads()
    memory = _memory(plan, effort, text)
    source = find_here(model, revision)
    if source is not None and source.is_gguf:
        memory = max(memory, _gguf_memory(plan))
    asked = config.level.name
    return Estimate(asked, effort, reason, seconds, memory, found, device_name(place))


def _measured(plan: Plan, work: Work, place: torch.device) -> dict[str, float]:
    """Return the seconds of each kind of work, from the most common shape of the plan."""
    sizes: Counter[SketchedModule] = Counter()
    for layer in plan.layers.values():
        sizes[layer.module] += layer.module.weights
    module = sizes.most_common(1)[0][0]
    stored = next(x.weight.dtype for x in plan.layers.values() if x.module == module)
    generator = torch.Generator().manual_seed(0)

    def normal(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, generator=generator)

    columns = module.in_features
    found = {}
    if work.clustered:
        # Rows in 16 bits repeat values, which makes k-means faster.
        rows = min(module.rows, max(1, _WEIGHTS // columns))
        weights = normal(rows, columns).to(_DTYPES.get(stored, torch.float32)).float().numpy()
        importance = normal(1, columns).square().numpy() if work.weighted else None

        def cluster() -> None:
            sketch_rows(weights, module, plan.metadata, 0, None, importance)

        found["k-means"] = _timed(cluster, place) * work.clustered / weights.size
    if work.products:
        rows = min(module.rows, max(1, _FACTORS // columns))
        x, y = normal(_TOKENS, columns).to(place), normal(columns, rows).to(place)
        one = work.products / (_TOKENS * y.numel())
        found["products"] = _timed(lambda: x @ y, place) * one
        with fast_products(place):
            one = work.fast_products / (_TOKENS * y.numel())
            found["healing"] = _timed(lambda: x @ y, place) * one if one else 0.0
    if work.fitted:
        columns = min(columns, _COLUMNS)
        rows = min(module.rows, _ROWS if place.type == CPU else _ROWS_ON_GPU)
        # A small fit compiles.
        for height, width in ((min(rows, 4), min(columns, 64)), (rows, columns)):
            groups = module.groups_per_row if width % module.groups_per_row == 0 else 1
            small = replace(
                module, in_features=width, out_features=height, groups_per_row=groups, experts=None
            )
            x, y = normal(2 * width, width).to(place), normal(height, width).to(place)
            hessian = (x.T @ x).double()
            begin = _now(place)
            inputs = prepare_inputs(hessian, hessian, work.without)
            prepared = _now(place)
            sketch_layer(y, inputs, small, plan.metadata, work.without)
            found["inputs"] = (prepared - begin) * work.factored / width**3
            found["fit"] = (_now(place) - prepared) * work.fitted / (height * width**2)
    return found


def _timed(run: Callable[[], Any], place: torch.device) -> float:
    """Return the seconds of a second run. The first one may compile."""
    run()
    begin = _now(place)
    run()
    return _now(place) - begin


def _now(place: torch.device) -> float:
    """Return the time in seconds at which the device has finished its work."""
    if place.type != CPU:
        torch.cuda.synchronize(place)
    return time.perf_counter()


def _memory(plan: Plan, effort: str, text: CalibrationConfig | None) -> int:
    """Return the peak memory in bytes, on the CPU and on a GPU together."""
    if text is None:
        return _FAST_BYTES
    columns = [x.module.in_features for x in plan.layers.values() if is_in_block(x.path)]
    hidden = 4 * Counter(columns).most_common(1)[0][0]  # bytes of a token's hidden state
    samples, seqlen = text.drawn
    needed = block_bytes(plan) + other_bytes(plan) + samples * seqlen * hidden
    if effort == NORMAL:
        return _FAST_BYTES + needed
    needed += block_bytes(plan) + samples * seqlen * hidden + 8 * _SQUARES * max(columns) ** 2
    if text.heal:
        modules = plan.metadata.modules.values()
        tables = sum(m.rows * m.groups_per_row * m.entries for m in modules)
        codes = sum(m.weights * m.bits // 8 for m in modules)
        kept = sum(tensor.elements for tensor in plan.kept.values())
        states = samples_for(text.heal, seqlen) * seqlen * hidden
        needed = max(needed, codes + 4 * (_TABLES * tables + kept) + 2 * states)
    return _FAST_BYTES + needed


def _gguf_memory(plan: Plan) -> int:
    """Return the peak memory in bytes while a GGUF file is dequantized, before the conversion."""
    sizes = [layer.module.weights for layer in plan.layers.values()]
    largest = max([*sizes, *(tensor.elements for tensor in plan.kept.values())])
    dense: int = plan.totals()["source_bytes"]
    return _FAST_BYTES + dense + int(_COPIES_OF_GGUF * 4 * largest)
