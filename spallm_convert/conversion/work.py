"""Count the operations that a conversion needs, from its plan."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from spallm_convert.calibration.healing.distillation import STEP_TOKENS
from spallm_convert.calibration.healing.heal import samples_for
from spallm_convert.calibration_config import CalibrationConfig
from spallm_convert.effort import NORMAL
from spallm_convert.sketch.layer import Layer
from spallm_convert.sketch.plan import Plan
from spallm_convert.source.linears import is_in_block

from .expected import model_config

#: Runs of a block per token at the effort high. `sketch_block` runs the dense block and the
#: sketched one up to each stage, then the sketched one to its end. Llama's four stages lie behind
#: 0.07, 0.17, 0.45 and all of its weights (Llama-3.2-1B): 2 x 1.69 + 1.
_RUNS = 4.4
#: Runs per token of a step of healing: forward, gradients of inputs, gradients of weights.
_RUNS_OF_STEP = 3
#: Runs of a block per token of the healing text, for `reconstruct`: each stream once, a step of
#: training for 7 of 8 batches, and two measurements of the others: 2 + 3 x 7/8 + 2/8.
_RUNS_OF_TEXT = 4.9
#: Names of the number of experts of a layer in configs of transformers.
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")


@dataclass(frozen=True)
class Work:
    """Count the operations of a conversion.

    Attributes:
        clustered: Weights that k-means sketches.
        weighted: Whether it weights them by their inputs.
        products: Multiplications in matrix products of float32.
        fast_products: Multiplications in products that may be of bfloat16.
        fitted: Rows x columns^2 of layers that are fitted to their inputs.
        factored: Columns^3 of the matrices of inputs.
        without: Steps of the fit that are left out.
    """

    clustered: float
    weighted: bool = False
    products: float = 0
    fast_products: float = 0
    fitted: float = 0
    factored: float = 0
    without: tuple[str, ...] = ()


def count_work(plan: Plan, effort: str, text: CalibrationConfig | None) -> Work:
    """Count the operations that a plan needs at a level of effort.

    Args:
        plan: The plan.
        effort: The level that will run.
        text: Options of the text. None: the level reads none.
    """
    if text is None:
        return Work(plan.sketched_weights)
    used = _used_share(plan)
    layers = [layer for layer in plan.layers.values() if is_in_block(layer.path)]
    shares = [used if _is_expert(layer) else 1.0 for layer in layers]
    weights = sum(s * layer.module.weights for s, layer in zip(shares, layers, strict=True))
    samples, seqlen = text.drawn
    tokens = samples * seqlen
    if effort == NORMAL:
        return Work(plan.sketched_weights, weighted=True, products=tokens * weights)
    # Layers with the same parent and the same number of columns mostly read the same tensor.
    inputs = {(x.name.rpartition(".")[0], x.module.in_features): x for x in layers}
    squares = factored = 0.0
    for (_, columns), layer in inputs.items():
        several = layer.module.experts or 1
        factored += several * columns**3
        # Experts have no second sum over inputs of the dense model.
        squares += columns**2 * (used * several if _is_expert(layer) else 2)
    healed = 0.0
    if text.heal:
        healing = samples_for(text.heal, seqlen) * seqlen
        healed = text.heal * max(STEP_TOKENS, seqlen) * _RUNS_OF_STEP + healing * _RUNS_OF_TEXT
    return Work(
        plan.sketched_weights - sum(layer.module.weights for layer in layers),
        products=tokens * (_RUNS * weights + squares),
        fast_products=healed * weights,
        fitted=sum(layer.module.weights * layer.module.in_features for layer in layers),
        factored=factored,
        without=text.without,
    )


def _is_expert(layer: Layer) -> bool:
    return layer.module.experts is not None or "experts" in layer.name.split(".")


def _used_share(plan: Plan) -> float:
    """Return the share of the experts that a token uses, 1 if the config does not tell."""
    _, config = model_config(plan) or (None, {})
    text: Any = config.get("text_config")
    text = text if isinstance(text, dict) else config
    chosen, *counts = (text.get(key) for key in ("num_experts_per_tok", *_EXPERTS))
    count = next((n for n in counts if isinstance(n, int) and n > 0), 0)
    return min(1.0, chosen / count) if isinstance(chosen, int) and chosen > 0 and count else 1.0
