# SPDX-License-Identifier: Apache-2.0
"""Output tokens per second of a batch of requests, beside the machine's arithmetic floor and beside peers.

Engine and peers get identical token ids and take turns (A B A B …), because a shared machine's speed drifts.
"""

from contextlib import ExitStack
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

from neuron_paged.bench.compare import PEERS, Peer, PeerSpec
from neuron_paged.bench.floor import best_flops_per_second, gemm_seconds, workload_flops
from neuron_paged.bench.peer_models import model_for_peer
from neuron_paged.bench.recording import EngineRun, latencies, run_workload
from neuron_paged.bench.step_profile import ProfilingExecutor, named_ranges
from neuron_paged.bench.workload import Workload
from neuron_paged.engine.llm import LLM
from neuron_paged.engine.model_runner import ModelRunner
from neuron_paged.models.loader import resolve
from neuron_paged.progress import counted

OURS = "neuron-paged"
_PROFILED_STEPS = 40


@dataclass(frozen=True)
class ThroughputPlan:
    """What to run: the workload `repeats` times on the engine and on each peer, with a profiled pass or not."""

    workload: Workload
    repeats: int
    peers: list[PeerSpec]
    peer_model: str | None
    with_profile: bool
    progress: bool


def run_throughput(llm: LLM, model: str, plan: ThroughputPlan) -> dict[str, Any]:
    """The whole benchmark, JSON-ready. `model`: what `llm` was loaded from."""
    runs: dict[str, list[dict[str, Any]]] = {}
    ours: list[EngineRun] = []
    with ExitStack() as stack:
        peers = [stack.enter_context(_start_peer(spec, llm, model, plan)) for spec in plan.peers]
        _warm_up(llm, plan.workload)
        llm.engine.metrics.phase_s.update(dict.fromkeys(llm.engine.metrics.phase_s, 0.0))
        bar = stack.enter_context(counted("Runs", plan.repeats * (1 + len(peers)), "run", enabled=plan.progress))
        for _ in range(plan.repeats):
            run = run_workload(llm.engine, plan.workload)
            ours.append(run)
            runs.setdefault(OURS, []).append(_result(plan.workload, vars(run), ours[0].outputs))
            bar.update()
            for peer in peers:
                runs.setdefault(peer.name, []).append(_result(plan.workload, peer.run(), ours[0].outputs))
                bar.update()
    phases = {name: seconds / plan.repeats for name, seconds in llm.engine.metrics.phase_s.items()}
    report = {
        "workload": plan.workload.describe(),
        "engines": [{"name": name, "runs": results, **_middle(results)} for name, results in runs.items()],
        "floor": _floor(llm, plan.workload, ours),
        "phases_s": phases,
        "num_steps": len(ours[0].steps),
        "profile": _profile(llm, plan.workload) if plan.with_profile else None,
    }
    report["ratios"] = {
        name: {
            "median": median(pairs := [b["wall_s"] / a["wall_s"] for a, b in zip(runs[OURS], results, strict=True)]),
            "pairs": pairs,
        }
        for name, results in runs.items()
        if name != OURS
    }
    return report


def _runner(llm: LLM) -> ModelRunner:
    executor = llm.engine.executor
    assert isinstance(executor, ModelRunner)
    return executor


def _start_peer(spec: PeerSpec, llm: LLM, model: str, plan: ThroughputPlan) -> Peer:
    path = plan.peer_model or str(model_for_peer(resolve(model), PEERS[spec.name][2]))
    scheduler = llm.engine.config.scheduler
    return Peer(
        spec,
        path,
        plan.workload,
        {
            "threads": torch.get_num_threads(),
            "max_num_seqs": scheduler.max_num_seqs,
            "max_num_batched_tokens": scheduler.max_num_batched_tokens,
            "max_model_len": scheduler.max_model_len,
        },
    )


def _warm_up(llm: LLM, workload: Workload) -> None:
    """Kernels compile and buffers grow on the first steps of each kind."""
    requests = [type(request)(request.prompt_token_ids, 4) for request in workload.requests[:2]]
    run_workload(llm.engine, Workload(requests))


def _result(workload: Workload, run: dict[str, Any], reference: list[list[int]]) -> dict[str, Any]:
    return {
        "wall_s": run["wall_s"],
        "output_tokens_per_s": workload.num_output_tokens / run["wall_s"],
        "total_tokens_per_s": (workload.num_output_tokens + workload.num_prompt_tokens) / run["wall_s"],
        "peak_rss_mib": run["peak_rss_mib"],
        "num_equal_outputs": sum(a == b for a, b in zip(run["outputs"], reference, strict=True)),
        **latencies(run["token_times_s"]),
    }


def _middle(results: list[dict[str, Any]]) -> dict[str, Any]:
    """The run of median wall time stands for an engine."""
    return {"median_run": sorted(results, key=lambda result: result["wall_s"])[len(results) // 2]}


def _floor(llm: LLM, workload: Workload, runs: list[EngineRun]) -> dict[str, float]:
    model = _runner(llm).model
    flops = workload_flops(model.config, workload)
    rate = best_flops_per_second(model.config, model.dtype)
    wall = median(run.wall_s for run in runs)
    steps = runs[0].steps
    gemm = gemm_seconds(model, [step.num_tokens for step in steps], [step.num_logits for step in steps])
    return {
        "workload_tflop": flops / 1e12,
        "best_gflops_per_s": rate / 1e9,
        "floor_s": flops / rate,
        "fraction_of_floor": flops / rate / wall,
        "gemm_s": gemm,
        "fraction_of_gemm": gemm / wall,
    }


def _profile(llm: LLM, workload: Workload) -> dict[str, Any]:
    """Shares of time inside the step, from a pass of its own."""
    runner = _runner(llm)
    expected_steps = max(request.max_tokens for request in workload.requests)
    profiler = ProfilingExecutor(runner, runner.model.layers, every=max(1, expected_steps // _PROFILED_STEPS))
    llm.engine.executor = profiler
    try:
        with named_ranges(runner.model):
            run_workload(llm.engine, workload)
    finally:
        llm.engine.executor = runner
    return {"shares_of_step": profiler.shares(), "num_profiled_steps": profiler.num_profiled}
