# SPDX-License-Identifier: Apache-2.0
"""Limits a throughput figure stands beside, measured on this machine in the same run.

The arithmetic floor: all floating-point operations of the workload at the best GFLOP/s any matrix product reaches here.
The GEMM time: the model's own linear layers alone, at the numbers of tokens its steps really had.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial

import numpy as np
import torch

from neuron_paged.bench.workload import Workload
from neuron_paged.models.config import ModelConfig
from neuron_paged.models.linear import Linear
from neuron_paged.models.llama import LlamaModel
from neuron_paged.models.prepare_cpu import PackedLinear

_GEMM_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
# Weights to cycle through so that every product reads them from memory, as in a real step: several last-level caches.
_OUT_OF_CACHE_BYTES = 256 * 2**20


def workload_flops(config: ModelConfig, workload: Workload) -> float:
    """Floating-point operations: every token through the layers once, the head for sampled tokens only, attention."""
    layers = config.num_parameters - config.vocab_size * config.hidden_size * (1 if config.tie_word_embeddings else 2)
    total = 0.0
    for request in workload.requests:
        computed = len(request.prompt_token_ids) + request.max_tokens - 1  # the last token is never fed back
        total += 2.0 * layers * computed
        total += 2.0 * config.vocab_size * config.hidden_size * request.max_tokens
        # q·k and p·v of every token with all before it
        total += 4.0 * config.num_layers * config.num_heads * config.head_dim * computed * (computed + 1) / 2
    return total


def best_flops_per_second(config: ModelConfig, dtype: torch.dtype) -> float:
    """The best rate of three large matrix products (a square one, two of this model's shapes), ours or torch's."""
    shapes = (
        (1024, 2048, 2048),
        (512, config.hidden_size, 2 * config.intermediate_size),
        (512, config.intermediate_size, config.hidden_size),
    )
    best = 0.0
    with torch.inference_mode():
        for m, k, n in shapes:
            x, weight = torch.randn(m, k).to(dtype), torch.randn(n, k).to(dtype)
            for multiply in (_multiplier(weight, dtype), partial(torch.nn.functional.linear, weight=weight)):
                best = max(best, 2.0 * m * k * n / _best_seconds(partial(multiply, x), 0.3))
    return best


def _multiplier(weight: torch.Tensor, stored: torch.dtype) -> Callable[[torch.Tensor], torch.Tensor]:
    """x·wᵀ as the engine computes it: PackedLinear over weights of type `stored`."""
    linear = Linear(weight.shape[1], weight.shape[0], False, dtype=weight.dtype, device="cpu")
    linear.weight.copy_(weight)
    return PackedLinear(linear, stored)


def _best_seconds(call: Callable[[], object], budget_s: float) -> float:
    """Shortest of the calls that fit into budget_s, after one that does not count."""
    call()
    best, end = float("inf"), time.perf_counter() + budget_s
    while time.perf_counter() < end:
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
    return best


def gemm_seconds(model: LlamaModel, step_tokens: Iterable[int], step_logits: Iterable[int]) -> float:
    """Seconds the linear layers alone need for steps of these sizes: timed at powers of two, interpolated between.

    step_tokens: tokens of each step; step_logits: rows each step puts through the head. The layers are of the model's
    shapes (query, key and value as one product, gate and up as one) and so many that no cache holds them.
    """
    config, dtype = model.config, model.dtype
    stored = dtype if isinstance(model.lm_head, Linear) else model.lm_head.packed.dtype
    hidden, inner = config.hidden_size, config.intermediate_size
    attention = config.num_heads * config.head_dim
    shapes = [
        (hidden, attention + 2 * config.num_kv_heads * config.head_dim),
        (attention, hidden),
        (hidden, 2 * inner),
        (inner, hidden),
    ]
    layer_bytes = sum(k * n for k, n in shapes) * stored.itemsize
    num_timed = min(config.num_layers, -(-_OUT_OF_CACHE_BYTES // layer_bytes))
    body = _interpolated(shapes * num_timed, dtype, stored, step_tokens) * config.num_layers / num_timed
    return body + _interpolated([(hidden, config.vocab_size)], dtype, stored, step_logits)


def _interpolated(
    shapes: list[tuple[int, int]], dtype: torch.dtype, stored: torch.dtype, sizes: Iterable[int]
) -> float:
    """Seconds of one pass through weights of these (inputs, outputs), summed over `sizes` rows."""
    counts = Counter(size for size in sizes if size > 0)
    top = max(counts, default=1)
    grid = [size for size in _GEMM_SIZES if size < top] + [top]
    seconds = []
    with torch.inference_mode():
        layers = [(k, _multiplier(torch.randn(n, k).to(dtype), stored)) for k, n in shapes]
        for size in grid:
            inputs = {k: torch.randn(size, k).to(dtype) for k, _ in layers}

            def run(inputs: dict[int, torch.Tensor] = inputs) -> None:
                for k, multiply in layers:
                    multiply(inputs[k])

            seconds.append(_best_seconds(run, 0.5))
    return sum(count * float(np.interp(size, grid, seconds)) for size, count in counts.items())
