"""Compute the experts of vLLM's mixture-of-experts layers with sketched weights.

One product multiplies each token with the gate and up projections of its experts, another with the
down projections. The operator takes tokens sorted by expert, and nothing waits for the device.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.fused_moe.activation import (
    ApplyMoEActivationConfig,
    MoEActivation,
    apply_moe_activation,
)
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase

from spallm_formats import INDEX_MAP_SUFFIX, SketchMetadata
from spallm_kernels import lut_experts

from .layer import LayerSketch
from .products import Product

_FUSED = {"gate_proj": "gate_up_proj", "w1": "w13"}  # names of joined gate and up projections


class SketchedExpertsMethod(FusedMoEMethodBase):
    """Compute the experts of a layer.

    Args:
        moe: vLLM's description of the layer.
        sketch: What is known of the layer.
    """

    def __init__(self, moe: FusedMoEConfig, sketch: LayerSketch) -> None:
        super().__init__(moe)
        self.sketch = sketch
        self.products: dict[str, Product] = {}
        self.columns: dict[str, range] = {}

    def create_weights(
        self,
        layer: Any,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra: Any,
    ) -> None:
        """Register parameters for labels, and the biases."""
        self.device = torch.empty(0).device
        self.sketch.dtype = params_dtype
        self.inner = intermediate_size_per_partition
        self.hidden = hidden_size
        joined = (2 if self.moe.is_act_and_mul else 1) * self.inner
        load = extra["weight_loader"]
        split = self.moe.moe_parallel_config.tp_size
        if split > 1 and layer.activation == MoEActivation.SWIGLUOAI:
            raise ValueError(
                f"{self.sketch.prefix}: vLLM splits the inputs of these experts in a way that "
                f"sketched rows do not allow; share whole experts out: --enable-expert-parallel"
            )

        def load_down(
            param: nn.Parameter, loaded_weight: Tensor, *shard: Any, **options: Any
        ) -> Any:
            # vLLM takes its share of the inputs, and labels have a single one.
            shares = loaded_weight.expand(*loaded_weight.shape[:-1], split)
            return load(param, shares, *shard, **options)

        self.sketch.expect(layer, (num_experts, joined), load, "w13_weight")
        self.sketch.expect(layer, (num_experts, hidden_size), load_down, "w2_weight")
        if self.moe.has_bias:
            for name, rows in (("w13_bias", joined), ("w2_bias", hidden_size)):
                bias = nn.Parameter(
                    torch.zeros(num_experts, rows, dtype=params_dtype), requires_grad=False
                )
                bias.weight_loader = load  # type: ignore[attr-defined]
                layer.register_parameter(name, bias)

    def maybe_roundup_sizes(
        self, hidden_size: int, intermediate_size_per_partition: int, *rest: Any
    ) -> tuple[int, int]:
        return hidden_size, intermediate_size_per_partition

    def get_fused_moe_quant_config(self, layer: Any) -> None:
        return None

    def process_weights_after_loading(self, layer: Any) -> None:
        """Read the rows that the labels name, those of all experts as one product."""
        start = self.moe.moe_parallel_config.tp_rank * self.inner
        for name, columns in (
            ("w13", range(self.hidden)),
            ("w2", range(start, start + self.inner)),
        ):
            labels = getattr(layer, f"{name}_weight").data
            delattr(layer, f"{name}_weight")
            part = nn.Module()
            layer.register_module(name, part)
            self.sketch.columns = columns
            (product,) = self.sketch.read_rows(part, labels.flatten(), self.device)
            assert product.table is not None
            for parameter in (product.weight, product.table):
                values = getattr(part, parameter).data
                getattr(part, parameter).data = values.view(*labels.shape[:2], *values.shape[1:])
            self.products[name] = product
            self.columns[name] = columns

    def apply(
        self,
        layer: Any,
        x: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        shared_experts: Any,
        shared_experts_input: Any,
    ) -> Tensor:
        """Return the weighted sum of the experts of each token, float [tokens, hidden]."""
        experts = layer.w13.weight.shape[0]
        if layer.expert_map is not None:  # experts of other ranks have the number -1
            topk_ids = layer.expert_map[topk_ids.long()]
        expert = topk_ids.flatten().long()
        expert, order = torch.where(expert < 0, experts, expert).sort(stable=True)
        token = order // topk_ids.shape[1]
        sets = getattr(layer, "sets_of_tokens", None)
        sets = None if sets is None else sets[token]
        weights = topk_weights.flatten()[order].unsqueeze(1)
        chosen = x[token]
        if layer.apply_router_weight_on_input:
            chosen = (chosen * weights).to(x.dtype)
        inner = _activate(layer, self._product(layer, "w13", chosen, expert, sets))
        y = self._product(layer, "w2", inner, expert, sets)
        if not layer.apply_router_weight_on_input:
            y = y * weights
        y = torch.where((expert < experts).unsqueeze(1), y, 0)  # a bias may have been added
        y = torch.empty_like(y).index_copy_(0, order, y)
        return y.view(*topk_ids.shape, -1).sum(1).to(x.dtype)

    def _product(
        self, layer: Any, name: str, x: Tensor, expert: Tensor, sets: Tensor | None
    ) -> Tensor:
        """Return the products of tokens sorted by expert."""
        part, product = getattr(layer, name), self.products[name]
        if product.slots is None or sets is None:
            y = lut_experts(x, _offsets(part, expert), part.weight, part.weight_table)
        else:
            y = _product_of_sets(part, getattr(part, product.slots), x, expert, sets)
        if self.moe.has_bias:
            bias = getattr(layer, f"{name}_bias")
            y = y + bias[expert.clamp(max=len(bias) - 1)]
        return y


def _offsets(part: Any, expert: Tensor) -> Tensor:
    """Return where the tokens of each expert begin and end, int64 [experts + 1]."""
    bounds = torch.arange(part.weight.shape[0] + 1, device=expert.device)
    return torch.searchsorted(expert, bounds)


def _product_of_sets(part: Any, tables: Tensor, x: Tensor, expert: Tensor, sets: Tensor) -> Tensor:
    """Return the products of tokens with the tables of their sets: one product per slot."""
    experts, y = part.weight.shape[0], None
    for slot in range(-1, tables.shape[0]):
        own = part.weight_table if slot < 0 else tables[slot]
        here, order = torch.where(sets == slot, expert, experts).sort(stable=True)
        products = lut_experts(x[order], _offsets(part, here), part.weight, own)
        products = torch.empty_like(products).index_copy_(0, order, products)
        y = products if y is None else y + products
    assert y is not None
    return y


def expert_weights(
    layer: Any, prefix: str, weights: Mapping[str, str], metadata: SketchMetadata
) -> list[str]:
    """Return the stored weights of the experts of a layer.

    Args:
        layer: vLLM's experts.
        prefix: Name of the layer.
        weights: Names of stored weights by the names that vLLM has for them.
        metadata: The config of the checkpoint.

    Returns:
        The names; none if not all of them are sketched, or not alike. They are served dense then.
    """
    modules = {module.index_map_name(name): module for name, module in metadata.modules.items()}
    below = prefix.removesuffix(".routed_experts") + "."
    gate, up, down = (
        layer.ckpt_gate_proj_name,
        layer.ckpt_up_proj_name,
        layer.ckpt_down_proj_name,
    )
    joined = {gate, up, _FUSED.get(gate), "w13_weight"}
    kinds: dict[bool, set[tuple[int, int]]] = {True: set(), False: set()}
    rows = {True: 0, False: 0}
    found = []
    for name, stored in weights.items():
        if not name.startswith(below):
            continue
        projection = name.removesuffix(INDEX_MAP_SUFFIX).rpartition(".")[2]
        if projection not in joined | {down, "w2_weight"}:
            continue
        module, is_joined = modules[stored], projection in joined
        kinds[is_joined].add((module.bits, module.groups_per_row))
        rows[is_joined] += module.rows
        found.append(stored)
    moe = layer.moe_config
    inner = moe.intermediate_size_per_partition * moe.moe_parallel_config.tp_size
    expected = moe.num_experts * (2 if moe.is_act_and_mul else 1) * inner
    is_whole = rows[True] == expected and rows[False] == moe.num_experts * moe.hidden_dim
    return found if is_whole and all(len(kind) == 1 for kind in kinds.values()) else []


def _activate(layer: Any, x: Tensor) -> Tensor:
    activation: MoEActivation = layer.activation
    if x.device.type == "cpu" and activation in _NATIVE:  # vLLM for CPUs has no operator for these
        return _NATIVE[activation](x)
    columns = x.shape[1] // 2 if activation.is_gated else x.shape[1]
    y = x.new_empty(x.shape[0], columns)
    config = ApplyMoEActivationConfig(
        clamp_limit=layer.swiglu_limit,
        alpha=1.0 if layer.swiglu_alpha is None else layer.swiglu_alpha,
        beta=0.0 if layer.swiglu_beta is None else layer.swiglu_beta,
        activation_situ_beta=layer.moe_config.activation_situ_beta,
        activation_situ_linear_beta=layer.moe_config.activation_situ_linear_beta,
    )
    return apply_moe_activation(activation, y, x, activation_config=config)


def _swiglu_of_gpt_oss(x: Tensor) -> Tensor:
    """Return the gated activation of interleaved gates and ups, [tokens, columns / 2]."""
    gate, up = x[:, ::2].clamp(max=7.0), x[:, 1::2].clamp(-7.0, 7.0)
    return (up + 1) * gate * torch.sigmoid(1.702 * gate)


_NATIVE = {MoEActivation.SWIGLUOAI: _swiglu_of_gpt_oss}
