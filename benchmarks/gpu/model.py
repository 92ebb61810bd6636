"""Measure tokens per second of a whole Llama with dense and with sketched layers, one sequence.

Both models have the sizes of Llama-3-8B and random weights, made on the device: the time of a step
does not depend on the values. `lm_head` is dense in both. A decoding step uses the same tensors
every time, including a static cache, so that a CUDA graph of one step can be replayed for every
token.
"""

from __future__ import annotations

import inspect
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from benchmarks.shared.machine import quantiles
from spallm_convert.runtime.linear import SketchedLinear
from spallm_formats import SketchedModule

from .operands import BITS, GROUPS, Task
from .timing import Bench, Call

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LLAMA_3_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}
_TINY = {
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
}
PROMPT, STEPS = 128, 64
EAGER_STEPS = 16
_SAMPLES = 10
_DEVIATION = 0.02  # of random weights, as models are initialised


def model(bench: Bench) -> list[Task]:
    return [Task("batch 1", partial(measure_model, bench))]


@torch.no_grad()
def measure_model(bench: Bench) -> dict[str, Any]:
    """Measure tokens per second of both, with and without a replayed graph, in turn."""
    torch.manual_seed(0)
    sizes = _TINY if bench.scale > 1 else LLAMA_3_8B
    prompt = torch.randint(0, sizes["vocab_size"], (1, bench.tokens(PROMPT)), device=bench.device)
    steps = bench.tokens(STEPS)
    length = -(-(prompt.shape[1] + steps + 1) // 64) * 64
    # Measure the sketched model first: both start as a dense model, and only one exists at a time.
    sketched = random_llama(bench, sizes)
    sketch_layers(sketched, bench)
    bench.collect()
    models = {"ours": sketched, "dense": random_llama(bench, sizes)}
    decoders = {name: Decoder(model, prompt, length) for name, model in models.items()}
    same = {name: _replays_like_eager(bench, decoder) for name, decoder in decoders.items()}
    us = _compare(bench, decoders, steps)
    eager = _compare(bench, decoders, EAGER_STEPS, eager=True)
    return {
        "sizes": sizes,
        "bits": BITS,
        "prompt": prompt.shape[1],
        "parameter_bytes": {name: _nbytes(model) for name, model in models.items()},
        "replay_gives_the_tokens_of_eager": same,
        "us": us,
        "tokens_per_second": {name: 1e6 / levels["p50"] for name, levels in us.items()},
        "speedup": us["dense"]["p50"] / us["ours"]["p50"],
        "us_eager": eager,
        "tokens_per_second_eager": {n: 1e6 / levels["p50"] for n, levels in eager.items()},
    }


def random_llama(bench: Bench, sizes: dict[str, int]) -> PreTrainedModel:
    """Return a bf16 Llama, initialised on the device."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(**sizes, max_position_embeddings=1024, tie_word_embeddings=False)
    with bench.device:
        made = AutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16, attn_implementation="sdpa"
        )
    return made.eval()


def sketch_layers(llama: PreTrainedModel, bench: Bench) -> None:
    """Replace each linear layer in a block by a sketched one of random codes and tables."""
    for name, layer in list(llama.model.layers.named_modules()):
        if not isinstance(layer, nn.Linear):
            continue
        shape = SketchedModule(
            in_features=layer.in_features,
            out_features=layer.out_features,
            bits=BITS,
            groups_per_row=GROUPS,
        )
        sketched = SketchedLinear(shape, bias=None, table_dtype=torch.bfloat16, device=bench.device)
        sketched.weight.random_(0, 256)
        sketched.weight_table.normal_(0, _DEVIATION)
        llama.model.layers.set_submodule(name, sketched)


class Decoder:
    """Decode one sequence greedily, with the same tensors in every step."""

    def __init__(self, llama: PreTrainedModel, prompt: Tensor, length: int) -> None:
        from transformers import StaticCache

        self._llama, self._prompt = llama, prompt
        self._cache = StaticCache(config=llama.config, max_cache_len=length)
        self._columns = torch.arange(length, device=prompt.device)
        self._mask = torch.zeros(1, 1, 1, length, dtype=torch.bool, device=prompt.device)
        self._position = torch.zeros(1, dtype=torch.int64, device=prompt.device)
        self.token = prompt.new_zeros(1, 1)
        self.replay: Call = self.step
        # Early releases of transformers 5 need the place in the cache; later ones count themselves.
        asked = inspect.signature(llama.model.forward).parameters
        self._tells_position = "cache_position" in asked

    def begin(self) -> None:
        """Empty the cache and run the prompt."""
        self._cache.reset()
        self._position.fill_(self._prompt.shape[1])
        positions = torch.arange(self._prompt.shape[1], device=self._prompt.device)
        mask = self._columns <= positions[:, None]
        self._forward(self._prompt, positions, mask[None, None])

    def step(self) -> None:
        """Decode the next token."""
        # We make the mask: the model may read values to make it, which a graph cannot do.
        self._mask.copy_(self._columns <= self._position)
        self._forward(self.token, self._position, self._mask)
        self._position.add_(1)

    def _forward(self, tokens: Tensor, positions: Tensor, mask: Tensor) -> None:
        where = {"cache_position": positions} if self._tells_position else {}
        logits = self._llama(
            input_ids=tokens,
            position_ids=positions[None],
            attention_mask=mask,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
            **where,
        ).logits
        self.token.copy_(logits[:, -1:].argmax(-1))


def _replays_like_eager(bench: Bench, decoder: Decoder) -> bool:
    """Capture a step; return whether its replays decode the same tokens as eager steps."""
    decoder.begin()
    expected = _decode(decoder, decoder.step, EAGER_STEPS)
    decoder.begin()
    decoder.replay = bench.capture([decoder.step])
    decoder.begin()
    return _decode(decoder, decoder.replay, EAGER_STEPS) == expected


def _decode(decoder: Decoder, step: Call, count: int) -> list[int]:
    found = []
    for _ in range(count):
        step()
        found.append(int(decoder.token.item()))
    return found


def _compare(
    bench: Bench, decoders: dict[str, Decoder], steps: int, *, eager: bool = False
) -> dict[str, dict[str, float]]:
    """Return microseconds per step. Every sample starts after the prompt, so none reads more."""
    samples: dict[str, list[float]] = {name: [] for name in decoders}
    for _ in range(1 + min(_SAMPLES, bench.samples)):
        for name, decoder in decoders.items():
            decoder.begin()
            step = decoder.step if eager else decoder.replay
            samples[name].append(1e6 * bench.seconds(step, steps, queued=not eager) / steps)
    return {name: quantiles(taken[1:]) for name, taken in samples.items()}


def _nbytes(llama: PreTrainedModel) -> int:
    return sum(parameter.nbytes for parameter in llama.parameters())
