# SPDX-License-Identifier: Apache-2.0
"""Among how many ranks a model's heads can be divided: one rule for engine, graphs and planning. Needs no torch."""

from typing import Protocol

from neuron_paged.errors import ConfigError


class Heads(Protocol):
    """Query heads and KV heads of a whole model; a ModelConfig, for one."""

    @property
    def num_heads(self) -> int: ...

    @property
    def num_kv_heads(self) -> int: ...


def supported_sizes(model: Heads) -> list[int]:
    """Numbers of ranks that give each rank whole heads, its KV heads divided or repeated evenly."""
    heads, kv_heads = model.num_heads, model.num_kv_heads
    return [n for n in range(1, heads + 1) if heads % n == 0 and (kv_heads % n == 0 or n % kv_heads == 0)]


def check_tensor_parallel_size(size: int, model: Heads) -> None:
    """ConfigError unless a model of these heads runs on `size` ranks. Names the sizes that work."""
    sizes = supported_sizes(model)
    if size not in sizes:
        nearest = min(sizes, key=lambda n: (abs(n - size), -n))
        raise ConfigError(
            f"tensor_parallel_size: got {size} for a model of {model.num_heads} heads and {model.num_kv_heads} KV "
            f"heads, need one of {', '.join(map(str, sizes))} (whole heads per rank, KV heads divided or repeated "
            f"evenly); the nearest is {nearest}."
        )


def rank_heads(model: Heads, size: int) -> tuple[int, int]:
    """(num_heads, num_kv_heads) of each of `size` ranks, one of the supported sizes."""
    return model.num_heads // size, max(1, model.num_kv_heads // size)
