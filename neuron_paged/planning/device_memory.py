# SPDX-License-Identifier: Apache-2.0
"""HBM of one rank: weights, KV cache, graphs' code and scratch. Modelled; none of it was seen on a device.

The sum follows what a third party matched to device failures (foxl-ai/kiln): tensors, code of all graphs, the largest
scratch rounded up to 64 MiB, and 0.13 GiB.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from compile.buckets import Bucket
from neuron_paged.errors import ConfigError
from neuron_paged.memory import size_text
from neuron_paged.models.rank_heads import supported_sizes
from neuron_paged.planning.decoder_model import DecoderModel
from neuron_paged.planning.instances import GIB
from neuron_paged.planning.rank import ITEMSIZE, Rank
from neuron_paged.planning.step_cost import StepCost

INSTRUCTION_BYTES = 64  # of code per instruction, [estimate]
SCRATCH_STEP = 64 * 2**20  # [measured, third party] foxl-ai/kiln
RUNTIME_BYTES = int(0.13 * GIB)  # [measured, third party] foxl-ai/kiln
GRAPH_SHARE = 0.1  # of the HBM, kept for graphs' code and scratch; the KV cache gets what weights and this leave


@dataclass(frozen=True)
class DeviceMemory:
    """Bytes of one rank's logical core. hbm_bytes: all there is."""

    rank: Rank
    hbm_bytes: int

    @property
    def weight_bytes(self) -> int:
        """Linear layers, output head and this rank's part of the embedding."""
        model, ranks = self.rank.model, self.rank.tensor_parallel
        return ITEMSIZE * (model.rank_weights(ranks) + model.hidden_size * -(-model.vocab_size // ranks))

    @property
    def graph_bytes(self) -> int:
        """What graphs may take."""
        return int(self.hbm_bytes * GRAPH_SHARE)

    def code_bytes(self, buckets: Sequence[Bucket], cost: StepCost) -> int:
        return int(sum(INSTRUCTION_BYTES * cost.num_instructions(bucket) for bucket in buckets))

    def scratch_bytes(self, buckets: Sequence[Bucket]) -> int:
        """Activations of the largest graph: residual stream, q, k, v, MLP and logits of a run's rows, [estimate]."""
        model, rank = self.rank.model, self.rank
        largest = 0
        for bucket in buckets:
            sizes = bucket.dimensions()
            rows = sizes.get("num_seqs", 1)
            tokens = sizes.get("num_tokens", rows)
            width = 4 * model.hidden_size + 3 * -(-model.intermediate_size // rank.tensor_parallel)
            width += 2 * (rank.heads[0] + rank.heads[1]) * model.head_dim
            logits = 4 * rows * -(-model.vocab_size // rank.tensor_parallel)
            largest = max(largest, 2 * (tokens * width * ITEMSIZE + logits))
        return -(-largest // SCRATCH_STEP) * SCRATCH_STEP

    def graphs_fit(self, buckets: Sequence[Bucket], cost: StepCost) -> bool:
        return self.code_bytes(buckets, cost) + self.scratch_bytes(buckets) <= self.graph_bytes

    @property
    def block_bytes(self) -> int:
        return self.rank.block_size * self.rank.kv_bytes_per_token

    def num_blocks(self, max_num_seqs: int, max_model_len: int) -> int:
        """Blocks of the KV cache, null block included: what is free, at most what can be used.

        ConfigError if not even one sequence of max_model_len tokens fits.
        """
        rank = self.rank
        per_sequence = -(-max_model_len // rank.block_size)
        free = self.hbm_bytes - self.weight_bytes - self.graph_bytes - RUNTIME_BYTES
        blocks = min(free // self.block_bytes, max_num_seqs * per_sequence + 1)
        if blocks < per_sequence + 1:
            raise ConfigError(
                f"--hbm-gb: {size_text(self.hbm_bytes)} per core, weights of {rank.model.name} take "
                f"{size_text(self.weight_bytes)} of it with tensor parallelism {rank.tensor_parallel}, graphs "
                f"{size_text(self.graph_bytes)}: left are {size_text(max(free, 0))}, need "
                f"{size_text((per_sequence + 1) * self.block_bytes)} for one sequence of {max_model_len} tokens; raise "
                "--tensor-parallel-size or --hbm-gb, or lower --max-model-len."
            )
        return int(blocks)

    def report(self, buckets: Sequence[Bucket], num_blocks: int, cost: StepCost) -> dict[str, int]:
        """Bytes by use, and what stays free."""
        uses = {
            "weights": self.weight_bytes,
            "kv_cache": num_blocks * self.block_bytes,
            "graph_code": self.code_bytes(buckets, cost),
            "scratch": self.scratch_bytes(buckets),
            "runtime": RUNTIME_BYTES,
        }
        return uses | {"total": sum(uses.values()), "hbm": self.hbm_bytes}


def fitting_ranks(
    model: DecoderModel, make: Callable[[int], Rank], limit: int, hbm_bytes: int, max_model_len: int
) -> list[dict[str, Any]]:
    """Tensor-parallel sizes that the model takes, up to `limit`: what a rank's weights take and its KV cache's tokens.

    make(size): the rank; sizes whose ranks kernels don't take are left out. "fits": at least one sequence of
    max_model_len tokens runs. Raises ConfigError if kernels take none.
    """
    rows = []
    refused: ConfigError | None = None
    for size in supported_sizes(model):
        if size > limit:
            break
        try:
            rank = make(size)
        except ConfigError as error:
            refused = error
            continue
        memory = DeviceMemory(rank, hbm_bytes)
        free = hbm_bytes - memory.weight_bytes - memory.graph_bytes - RUNTIME_BYTES
        tokens = max(0, free // memory.block_bytes - 1) * rank.block_size
        rows.append(
            {"tensor_parallel_size": size, "weight_bytes": memory.weight_bytes, "kv_tokens": tokens,
             "fits": tokens >= max_model_len}
        )  # fmt: skip
    if refused is not None and not rows:
        raise refused
    return rows
