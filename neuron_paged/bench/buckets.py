# SPDX-License-Identifier: Apache-2.0
"""`bench buckets`: sample traffic through bucket schemes; what each pads, falls back to, moves and costs per step.

Owns the case and the comparison. A planner's grid is made from one draw of the traffic and judged on another. All
schemes get the same steps and the same kernels; batches are the scheduler's, times are modelled.
"""

from collections.abc import Callable
from typing import Any

from neuron_paged.bench.traffic import SAMPLES, sample_trace
from neuron_paged.config import SchedulerConfig
from neuron_paged.planning.bucket_plan import plan_buckets, replay_traffic, unlimited_us
from neuron_paged.planning.decoder_model import LLAMA_3_1_8B, DecoderModel
from neuron_paged.planning.device_memory import DeviceMemory
from neuron_paged.planning.instances import core_hbm_bytes
from neuron_paged.planning.rank import Rank
from neuron_paged.planning.schemes import Scheme, ladder_scheme, replay_scheme, table_scheme
from neuron_paged.planning.step_cost import step_cost

FEW_GRAPHS = 8


def run_buckets(
    *,
    num_requests: int,
    max_num_seqs: int,
    seed: int,
    model: DecoderModel = LLAMA_3_1_8B,
    target: str = "trn2",
    tensor_parallel: int = 4,
    num_cores: int = 2,
    tell: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Every scheme on every sample, JSON-ready."""
    results = []
    for name, sample in SAMPLES.items():
        rank = Rank(model, target, tensor_parallel, num_cores, max_context=sample.max_model_len)
        cost = step_cost(rank, tell)
        memory = DeviceMemory(rank, core_hbm_bytes(target, num_cores))
        config = SchedulerConfig(max_num_seqs, max_model_len=sample.max_model_len)
        tell(f"{sample.name} traffic")
        first, second = (
            replay_traffic(sample_trace(name, num_requests, s), config, memory, cost) for s in (seed, seed + 1)
        )
        tables = table_scheme(rank, second.replay.steps)
        plans = [plan_buckets(first, memory, cost, count) for count in (FEW_GRAPHS, tables.num_graphs)]
        unlimited = unlimited_us(second, cost) / second.replay.num_steps / 1e3
        schemes: list[tuple[Scheme, dict[str, Any] | None]] = [
            (tables, None),
            (ladder_scheme(cost, second.needs), None),
            *((plan.scheme, plan.tally.document(plan.scheme)) for plan in plans),
        ]
        rows = [
            replay_scheme(scheme, cost, second.replay.steps).document(scheme) | {"predicted": predicted}
            for scheme, predicted in schemes
        ]
        results.append(
            {
                "traffic": sample.name,
                "num_requests": num_requests,
                "requests_per_s": sample.requests_per_s,
                "max_model_len": sample.max_model_len,
                "steps": second.replay.num_steps,
                "mean_num_seqs": second.replay.mean_num_seqs,
                "busy_share": second.replay.busy_seconds / second.replay.seconds,
                "unlimited_step_ms": unlimited,
                "weight_bytes": cost.weight_bytes,
                "fit_error": {"decode": cost.decode.error, "prefill": cost.prefill.error},
                "schemes": rows,
            }
        )
    tell("")
    return {
        "model": model.name, "target": target, "tensor_parallel": tensor_parallel, "lnc": num_cores,
        "max_num_seqs": max_num_seqs, "seed": seed, "traffic": results,
    }  # fmt: skip
