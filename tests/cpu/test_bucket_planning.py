# SPDX-License-Identifier: Apache-2.0
"""Traces, their replay, needs, modelled costs and plans: real scheduler, real fold planner, simulated kernels."""

import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compile.buckets import (
    BucketGrid,
    DecodeBucket,
    DecodeTableBucket,
    PrefillBucket,
    PrefillTableBucket,
    load_buckets,
)
from neuron_paged.bench.traffic import SAMPLES, sample_trace
from neuron_paged.cli import main
from neuron_paged.config import CacheConfig, SchedulerConfig
from neuron_paged.engine.batch import build_batch
from neuron_paged.engine.named_buckets import named_buckets
from neuron_paged.engine.packed_rows import PackedRows, SamplingArrays
from neuron_paged.engine.sampling import SamplingParams
from neuron_paged.engine.scheduler import Scheduler
from neuron_paged.engine.sequence import Sequence, SequenceStatus
from neuron_paged.errors import ConfigError, InvalidRequestError
from neuron_paged.models.graph_plans import GraphModel, prefill_need
from neuron_paged.models.rank_heads import supported_sizes
from neuron_paged.planning.bucket_plan import (
    BucketPlan,
    Traffic,
    _windows,
    plan_buckets,
    replay_traffic,
    unlimited_us,
)
from neuron_paged.planning.decoder_model import LLAMA_3_1_8B, DecoderModel
from neuron_paged.planning.device_memory import DeviceMemory, fitting_ranks
from neuron_paged.planning.instances import INSTANCES, core_hbm_bytes, find_instance, logical_cores
from neuron_paged.planning.rank import Rank
from neuron_paged.planning.replay import Chunk, Step, replay
from neuron_paged.planning.schemes import Scheme, replay_scheme, table_scheme
from neuron_paged.planning.step_cost import StepCost, step_cost
from neuron_paged.planning.trace import FIELDS, TraceRequest, read_trace, write_trace
from nki_kernels.plan import plan_decode, smallest_shape

TRACES = Path(__file__).resolve().parents[2] / "examples" / "traces"
MODEL_CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
    "max_position_embeddings": 131072,
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def timelines_kept_here(tmp_path_factory: pytest.TempPathFactory):
    """The simulator runs once per rank and test run, and nothing lands in the user's cache folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NEURON_PAGED_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def cost() -> StepCost:
    """Llama-3.1-8B on eight ranks of one trn2 core each: one KV head per rank."""
    return step_cost(Rank(LLAMA_3_1_8B, "trn2", 8))


@pytest.fixture(scope="module")
def memory(cost: StepCost) -> DeviceMemory:
    return DeviceMemory(cost.rank, core_hbm_bytes("trn2", 1))


@pytest.fixture(scope="module")
def traffic(cost: StepCost, memory: DeviceMemory) -> dict[str, Traffic]:
    """The sample traces, replayed."""
    files = {"sharegpt": "sharegpt.csv", "alpaca": "alpaca.csv", "long": "long.jsonl"}
    config = SchedulerConfig(64, 512, 8192)
    return {name: replay_traffic(read_trace(TRACES / file), config, memory, cost) for name, file in files.items()}


# ---- traces ----------------------------------------------------------------------------------------------------------

requests = st.lists(
    st.builds(TraceRequest, st.integers(0, 10**6).map(lambda ms: ms / 1e3), st.integers(1, 5000), st.integers(1, 5000)),
    min_size=1, max_size=20,
)  # fmt: skip


@settings(max_examples=30)
@given(requests, st.sampled_from(("t.jsonl", "t.csv")))
def test_a_written_trace_is_read_back_by_arrival(tmp_path_factory, trace: list[TraceRequest], name: str) -> None:
    path = tmp_path_factory.mktemp("trace") / name
    write_trace(path, trace)
    assert read_trace(path) == sorted(trace, key=lambda request: request.arrival_s)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ["is empty"]),
        ("\n \n", ["is empty"]),
        (",".join(FIELDS), ["no request after its first line"]),
        ("arrival_s,prompt\n1,2", ["line 1", "no column 'prompt_tokens'"]),
        ("arrival_s,prompt_tokens,output_tokens\n0,1,1\n1,x,3", ["line 3", "prompt_tokens", "'x'"]),
        ("arrival_s,prompt_tokens,output_tokens\n0,1", ["line 2", "output_tokens", "missing"]),
        ("arrival_s,prompt_tokens,output_tokens\n-1,1,1", ["line 2", "arrival_s", "seconds >= 0"]),
        ('{"arrival_s": 0, "prompt_tokens": 1, "output_tokens": 1}\n{"arrival_s": 1,', ["line 2", "not JSON"]),
        ('{"arrival_s": 0, "prompt_tokens": 1}', ["line 1", "output_tokens", "missing"]),
        ('{"arrival_s": 0, "prompt_tokens": 0, "output_tokens": 1}', ["line 1", "prompt_tokens", "is 0"]),
        ('{"arrival_s": 0, "prompt_tokens": 2.5, "output_tokens": 1}', ["line 1", "prompt_tokens", "2.5"]),
        ('{"arrival_s": 0, "prompt_tokens": true, "output_tokens": 1}', ["line 1", "prompt_tokens", "True"]),
        ('{"arrival_s": NaN, "prompt_tokens": 1, "output_tokens": 1}', ["line 1", "arrival_s", "nan"]),
        ('{"arrival_s": 0, "prompt_tokens": [1], "output_tokens": 1}', ["line 1", "prompt_tokens", "[1]"]),
        ("[1, 2]", ["line 1", "need an object"]),
        ('{"arrival_s": ' + "[" * 100_000, ["line 1", "not JSON"]),
        ("arrival_s,prompt_tokens,output_tokens\n0," + "1" * 200_000 + ",1", ["line 2", "not CSV"]),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else None,
)
def test_a_malformed_trace_names_line_and_field(tmp_path: Path, text: str, words: list[str]) -> None:
    path = tmp_path / "trace"
    path.write_text(text)
    with pytest.raises(InvalidRequestError) as caught:
        read_trace(path)
    for word in [str(path), *words]:
        assert word in str(caught.value), caught.value


def test_a_trace_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_bytes(b"\xef\xbb\xbf" + f"{','.join(FIELDS)}\r\n0,5,3\r\n".encode())
    assert read_trace(path) == [TraceRequest(0.0, 5, 3)]


def test_sample_traces_are_those_of_the_script() -> None:
    for file, (name, count) in {
        "sharegpt.csv": ("sharegpt", 400), "alpaca.csv": ("alpaca", 400), "long.jsonl": ("long", 300),
    }.items():  # fmt: skip
        assert read_trace(TRACES / file) == sample_trace(name, count, 17)


# ---- replay ----------------------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.builds(TraceRequest, st.floats(0, 3), st.integers(1, 90), st.integers(1, 40)), min_size=1, max_size=12),
    st.integers(12, 60),
)
def test_a_replay_computes_every_token_once(trace: list[TraceRequest], num_blocks: int) -> None:
    trace.sort(key=lambda request: request.arrival_s)
    run = replay(trace, SchedulerConfig(6, 64, 130), 16, num_blocks, lambda lens, chunks: 0.05)
    assert run.num_steps == len(run.steps) and all(step.weight == 1 for step in run.steps)
    decoded = sum(len(step.context_lens) for step in run.steps)
    prefilled = sum(chunk.num_tokens for step in run.steps for chunk in step.chunks)
    wanted = sum(request.num_tokens - 1 for request in trace)
    if run.num_preemptions == 0:
        assert decoded + prefilled == wanted
    else:  # preempted sequences are computed again
        assert decoded + prefilled >= wanted
    assert all(len(step.context_lens) <= 6 and step.context_lens.size + len(step.chunks) > 0 for step in run.steps)
    assert all(0 < chunk.num_tokens <= min(64, chunk.context_len) for step in run.steps for chunk in step.chunks)
    assert run.busy_seconds == pytest.approx(0.05 * run.num_steps)


def test_long_replays_are_thinned_evenly_and_keep_the_largest_step() -> None:
    trace = [TraceRequest(0.0, 20, 600)] + [TraceRequest(5.0 + i / 1e3, 20, 30) for i in range(5)]
    config = SchedulerConfig(8, 64, 700)
    whole, thin = (replay(trace, config, 16, 300, lambda lens, chunks: 0.02, limit) for limit in (10**6, 60))
    assert len(thin.steps) <= 65 < len(whole.steps) == whole.num_steps == thin.num_steps
    assert sum(step.weight for step in thin.steps) == pytest.approx(whole.num_steps)
    assert max(len(s.context_lens) for s in thin.steps) == max(len(s.context_lens) for s in whole.steps) == 6
    assert thin.mean_num_seqs == pytest.approx(whole.mean_num_seqs, rel=0.1)


def test_requests_that_can_never_run_are_refused() -> None:
    with pytest.raises(InvalidRequestError, match=r"request 2 by arrival has 80 \+ 60 tokens"):
        replay([TraceRequest(0, 5, 5), TraceRequest(1, 80, 60)], SchedulerConfig(4, 64, 130), 16, 99, lambda a, b: 1.0)


# ---- needs -----------------------------------------------------------------------------------------------------------

RANKS = {
    name: Rank(LLAMA_3_1_8B, target, 8, cores, block, window)
    for name, target, cores, block, window in (
        ("one core", "trn2", 1, 32, 0), ("two cores", "trn2", 2, 32, 0), ("window", "trn1", 1, 16, 700)
    )
}  # fmt: skip


@pytest.mark.parametrize("name", RANKS)
@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 9000), min_size=1, max_size=24))
def test_a_need_is_the_kernels_own_plan(name: str, lens: list[int]) -> None:
    rank, context_lens = RANKS[name], np.array(lens, np.int32)
    need = rank.decode_need(context_lens)
    shape = smallest_shape(
        context_lens, rank.problem.layout(2), columns_per_seq=rank.problem.columns_per_seq,
        max_columns=rank.max_seqs_per_fold * rank.problem.columns_per_seq, sliding_window=rank.sliding_window,
        num_cores=rank.num_cores,
    )  # fmt: skip
    assert rank.plan_shape(need) == shape
    table = np.ones((len(lens), -(-max(lens) // rank.block_size)), np.int32)
    plan_decode(table, context_lens, rank.problem.layout(2), shape, sliding_window=rank.sliding_window, check=True)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 2048), st.integers(0, 6000))
def test_a_chunk_fits_its_need(num_tokens: int, past: int) -> None:
    for rank in RANKS.values():
        need = rank.prefill_need(Chunk(num_tokens, num_tokens + past))
        config: Any = SimpleNamespace(sliding_windows=(rank.sliding_window,))  # all that the function reads of it
        model = GraphModel(config, "bfloat16", 0, rank.block_size, 0, "auto")
        runners = prefill_need(model, num_tokens, num_tokens + past)
        assert need == PrefillBucket(num_tokens, max(runners.num_folds, rank.min_folds(num_tokens)))
        assert need.num_tokens == num_tokens
        ((q_tiles, folds, _),) = rank.prefill_segment(need).segments
        assert (q_tiles, folds) == (rank.q_tiles(num_tokens), need.num_folds)
        seen = num_tokens + (min(past, rank.sliding_window) if rank.sliding_window else past)
        assert folds * rank.fold_tokens >= seen - 1 and q_tiles * 128 >= num_tokens


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("trn9",), "--target: got 'trn9', need one of inf2, trn1, trn2, trn3"),
        (("trn1", 1, 2), "--lnc: got 2, trn1 has logical cores of 1 NeuronCore only"),
        (("trn2", 6), "tensor_parallel_size: got 6 for a model of 32 heads and 8 KV heads, need one of 1, 2, 4, 8, 16"),
        (("trn2", 8, 1, 24), "--model: the decode kernel does not take Llama-3.1-8B: block_size: got 24"),
    ],
)
def test_impossible_ranks_are_refused(arguments: tuple, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Rank(LLAMA_3_1_8B, *arguments)
    assert message in str(caught.value)


# ---- cost and memory -------------------------------------------------------------------------------------------------

sizes = st.tuples(st.integers(1, 128), st.integers(0, 40), st.integers(1, 40), st.integers(1, 8))


@settings(max_examples=60, deadline=None)
@given(a=sizes, b=sizes, c=st.tuples(st.integers(1, 512), st.integers(1, 9)))
def test_a_bucket_that_holds_another_costs_no_less(cost: StepCost, a: tuple, b: tuple, c: tuple) -> None:
    small, large = DecodeBucket(*map(min, a, b)), DecodeBucket(*map(max, a, b))
    for of in (cost.time_us, cost.num_instructions):
        assert of(small) <= of(large) * (1 + 1e-12)
        assert of(PrefillBucket(*c)) <= of(PrefillBucket(c[0] + 40, c[1] + 1))


def test_interpolated_times_are_near_the_simulated_ones(cost: StepCost) -> None:
    assert cost.decode.error < 0.15 and cost.prefill.error < 0.15
    weights_us = cost.weight_bytes / 362.5e3
    assert cost.time_us(DecodeBucket(1, 0, 1, 1)) > weights_us == pytest.approx(cost.linear_us(1))


def test_timelines_are_read_back(cost: StepCost, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    again = step_cost(cost.rank, told.append)
    assert not any(told) and (again.decode.us == cost.decode.us).all() and again.prefill.error == cost.prefill.error


def test_instances_and_what_fits_them() -> None:
    assert {name: logical_cores(i, 1) for name, i in INSTANCES.items()} == {
        "inf2.xlarge": 2, "inf2.8xlarge": 2, "inf2.24xlarge": 12, "inf2.48xlarge": 24, "trn1.2xlarge": 2,
        "trn1.32xlarge": 32, "trn1n.32xlarge": 32, "trn2.3xlarge": 8, "trn2.48xlarge": 128, "trn2u.48xlarge": 128,
    }  # fmt: skip
    cores = (("inf2", 1), ("trn2", 1), ("trn2", 2), ("trn3", 2))
    assert [core_hbm_bytes(*core) >> 30 for core in cores] == [16, 12, 24, 36]
    assert find_instance("ml.inf2.xlarge").name == "inf2.xlarge"
    with pytest.raises(ConfigError, match="--instance: got 'p5.48xlarge', need one of inf2.xlarge"):
        find_instance("p5.48xlarge")
    llama = LLAMA_3_1_8B
    rows = fitting_ranks(llama, lambda size: Rank(llama, "inf2", size, block_size=16), 2, 16 * 2**30, 8192)
    assert [(row["tensor_parallel_size"], row["fits"]) for row in rows] == [(1, False), (2, True)]


def test_sizes_offered_are_those_that_the_engine_runs() -> None:
    odd = DecoderModel("odd", 30, 576, 1536, 9, 3, 64, 49152)
    rows = fitting_ranks(odd, lambda size: Rank(odd, "trn1", size), 32, 16 * 2**30, 8192)
    assert [row["tensor_parallel_size"] for row in rows] == [1, 3, 9] == supported_sizes(odd)
    with pytest.raises(ConfigError, match="got 2 for a model of 9 heads and 3 KV heads, need one of 1, 3, 9"):
        Rank(odd, "trn1", 2)


def test_memory_that_holds_no_sequence_is_refused(cost: StepCost) -> None:
    with pytest.raises(ConfigError, match="--hbm-gb: .* raise --tensor-parallel-size"):
        DeviceMemory(cost.rank, 2 * 2**30).num_blocks(32, 8192)


# ---- plans -----------------------------------------------------------------------------------------------------------


def picked_by_hand(plan: BucketPlan, steps: tuple[Step, ...]) -> tuple[Counter, Counter, float]:
    """(needed, held, time): a loop of its own over pick()."""
    needed: Counter = Counter()
    held: Counter = Counter()
    time_us = 0.0
    for step in steps:
        runs = [(plan.decode.grid, plan.cost.rank.decode_need(step.context_lens))] if len(step.context_lens) else []
        runs += [(plan.prefill.grid, plan.cost.rank.prefill_need(chunk)) for chunk in step.chunks]
        for grid, need in runs:
            bucket = grid.pick(need)
            time_us += step.weight * plan.cost.time_us(bucket)
            for name, size in bucket.dimensions().items():
                needed[f"{bucket.KIND}.{name}"] += step.weight * getattr(need, name)
                held[f"{bucket.KIND}.{name}"] += step.weight * size
    return needed, held, time_us


@pytest.mark.parametrize("name", SAMPLES)
def test_a_plan_is_exact_on_its_own_trace_and_within_its_budget(
    name: str, cost: StepCost, memory: DeviceMemory, traffic: dict[str, Traffic]
) -> None:
    plan = plan_buckets(traffic[name], memory, cost, 12)
    assert len(plan.buckets) <= 12 and memory.graphs_fit(plan.buckets, cost)
    assert not plan.tally.fallbacks
    needed, held, time_us = picked_by_hand(plan, traffic[name].replay.steps)
    assert plan.tally.padding == pytest.approx({key: 1 - needed[key] / held[key] for key in held if held[key]})
    assert plan.tally.time_us == pytest.approx(time_us)
    assert plan.loss >= 0
    used = memory.report(plan.buckets, traffic[name].num_blocks, cost)
    assert used["total"] <= used["hbm"]
    low, middle, high = plan.compile_seconds()
    assert 0 < low < middle < high


@pytest.mark.parametrize("name", SAMPLES)
def test_a_plan_beats_powers_of_two_of_as_many_graphs(
    name: str, cost: StepCost, memory: DeviceMemory, traffic: dict[str, Traffic]
) -> None:
    steps = traffic[name].replay.steps
    tables = table_scheme(cost.rank, steps)
    theirs = replay_scheme(tables, cost, steps)
    for count in (tables.num_graphs, 10):
        plan = plan_buckets(traffic[name], memory, cost, count)
        ratio = plan.tally.time_us / theirs.time_us, plan.tally.kv_bytes / theirs.kv_bytes
        print(
            f"{name}: time x {ratio[0]:.3f}, KV bytes x {ratio[1]:.2f}, graphs {len(plan.buckets)}:{tables.num_graphs}"
        )
        assert len(plan.buckets) <= tables.num_graphs
        assert plan.tally.time_us < theirs.time_us
        assert plan.tally.kv_bytes < theirs.kv_bytes


# The worst of seven draws each: 7.2, 0.2 and 2.8 % more time than predicted, 8.3, 0.2 and 2.8 % of the steps in parts.
@pytest.mark.parametrize(("name", "count", "seed"), [("sharegpt", 900, 8), ("alpaca", 2400, 7), ("long", 1200, 8)])
def test_the_other_half_of_the_traffic_takes_little_more_than_predicted(
    name: str, count: int, seed: int, cost: StepCost, memory: DeviceMemory
) -> None:
    trace, config = sample_trace(name, count, seed), SchedulerConfig(64, 512, 8192)
    first, second = (replay_traffic(part, config, memory, cost) for part in (trace[: count // 2], trace[count // 2 :]))
    plan = plan_buckets(first, memory, cost, 16)
    other = replay_scheme(plan.scheme, cost, second.replay.steps)
    assert other.time_us / unlimited_us(second, cost) - 1 < plan.loss + 0.1
    assert other.padding["prefill.num_tokens"] == pytest.approx(plan.tally.padding["prefill.num_tokens"], abs=0.05)
    assert other.fallbacks["eager"] == 0
    assert sum(other.fallbacks.values()) < 0.1 * other.steps


def test_more_graphs_are_never_worse(cost: StepCost, memory: DeviceMemory, traffic: dict[str, Traffic]) -> None:
    plans = [plan_buckets(traffic["long"], memory, cost, count) for count in (2, 3, 5, 8, 13)]
    times = [plan.decode.cost + plan.prefill.cost for plan in plans]
    assert times == sorted(times, reverse=True) and times[-1] < times[0]


def test_longer_traffic_than_planned_for_is_counted_and_still_runs(
    cost: StepCost, memory: DeviceMemory, traffic: dict[str, Traffic]
) -> None:
    plan = plan_buckets(traffic["alpaca"], memory, cost, 8)
    tally = replay_scheme(plan.scheme, cost, traffic["long"].replay.steps)
    assert tally.fallbacks["split"] > 0 and tally.fallbacks["eager"] == 0


def test_every_fallback_of_the_chain_is_counted(cost: StepCost) -> None:
    scheme = Scheme("tiny", BucketGrid([DecodeBucket(2, 0, 1, 2)]), BucketGrid([PrefillBucket(100, 2)]))
    step = Step(np.array([40, 50, 60, 3000, 5000], np.int32), (Chunk(250, 3000), Chunk(3, 9000)), 2.0)
    long = cost.rank.decode_need(np.array([5000], np.int32))
    assert long.full_folds == 1 and cost.rank.fold_tokens == 2048
    tally = replay_scheme(scheme, cost, [step])
    # Rows: 40+50 | 60+3000+5000 → 60 | 3000+5000 → 3000 | 5000, which is too long for prefill's two folds too.
    assert tally.fallbacks == {"split": 6.0, "larger": 2.0, "chunk": 4.0, "eager": 4.0}
    assert tally.runs == {"decode-2x0x1x2": 6.0, "prefill-100x2": 6.0}


@pytest.mark.parametrize("name", ("sharegpt", "long"))
def test_table_grids_are_those_that_the_graph_runner_picks_from(
    name: str, cost: StepCost, memory: DeviceMemory, traffic: dict[str, Traffic], tmp_path: Path
) -> None:
    plan = plan_buckets(traffic[name], memory, cost, 10, tables=True)
    plan.bucket_file({}).save(tmp_path / "grid.json")
    buckets = named_buckets([str(tmp_path / "grid.json")])
    assert len(buckets) == len(plan.buckets) <= 10 and memory.graphs_fit(plan.buckets, cost)
    kinds = (DecodeTableBucket, PrefillTableBucket)
    grids = {}
    for kind in kinds:  # as the runner tries them: by the file's times
        found = [bucket for bucket in buckets if type(bucket) is kind]
        grids[kind] = BucketGrid(found, {bucket: place for place, bucket in enumerate(found)})
    needed: Counter = Counter()
    held: Counter = Counter()
    for step in traffic[name].replay.steps:
        need = cost.rank.table_need(step.context_lens, step.chunks)
        bucket = grids[type(need)].pick(need)
        assert bucket is not None
        for dimension, size in bucket.dimensions().items():
            key = f"{bucket.KIND.removesuffix('_table')}.{dimension}"
            needed[key] += step.weight * getattr(need, dimension)
            held[key] += step.weight * size
    assert not plan.tally.fallbacks
    assert plan.tally.padding == pytest.approx({key: 1 - needed[key] / held[key] for key in held})
    assert plan.loss >= 0


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 60), st.integers(1, 12)), min_size=1, max_size=8))
def test_table_needs_are_those_of_real_batches(lengths: list[tuple[int, int]]) -> None:
    rank = RANKS["one core"]
    scheduler = Scheduler(SchedulerConfig(4, 32, 100), CacheConfig(32, 40, enable_prefix_caching=False))
    for index, (prompt, _) in enumerate(lengths):
        scheduler.add(Sequence(str(index), [0] * prompt, SamplingParams(), arrival_time=float(index)))
    while scheduler.has_unfinished():
        output = scheduler.schedule()
        decodes, others = output.scheduled[: output.num_decodes], output.scheduled[output.num_decodes :]
        lens = np.array([item.sequence.num_tokens for item in decodes], np.int32)
        chunks = [Chunk(i.num_tokens, i.sequence.num_computed_tokens + i.num_tokens) for i in others]
        batch = build_batch(output, 32)
        packed = PackedRows.of(batch, SamplingArrays.greedy(len(batch.logits_indices)))
        need = rank.table_need(lens, chunks)
        width = packed.num_blocks(32)
        if not chunks:
            assert packed.is_decode and need == DecodeTableBucket(packed.num_seqs, width)
        else:  # to the runner, prompts of one token alone are decodes
            assert not packed.is_decode or all(chunk.num_tokens == 1 for chunk in chunks)
            assert need == PrefillTableBucket(packed.num_seqs, packed.num_tokens, width)
        scheduler.commit(output)
        for item in output.scheduled:
            if item.num_samples:
                item.sequence.append_token(0)
                if len(item.sequence.output_token_ids) == lengths[int(item.sequence.request_id)][1]:
                    scheduler.finish(item.sequence, SequenceStatus.FINISHED_LENGTH)


def test_a_budget_nothing_fits_is_refused(cost: StepCost, memory: DeviceMemory, traffic: dict[str, Traffic]) -> None:
    with pytest.raises(ConfigError, match="max_graphs: got 1, need at least 2"):
        plan_buckets(traffic["alpaca"], memory, cost, 1)
    with pytest.raises(ConfigError, match="--max-graphs, --hbm-gb: nothing fits the budget"):
        plan_buckets(traffic["alpaca"], DeviceMemory(cost.rank, 2**28), cost, 8)


# ---- command line ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the config of Llama-3.1-8B and no weights."""
    folder = tmp_path_factory.mktemp("model")
    (folder / "config.json").write_text(json.dumps(MODEL_CONFIG))
    return folder


def test_the_command_writes_a_grid_and_a_picture(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    arguments = ["--model", str(model), "--target", "trn2", "--lnc", "1", "--tensor-parallel-size", "8"]
    files = ["--json", str(tmp_path / "grid.json"), "--png", str(tmp_path / "plan.png")]
    assert main(["plan-buckets", "--trace", str(TRACES / "alpaca.csv"), "--max-graphs", "6", *arguments, *files]) == 0
    printed = capsys.readouterr().out
    for words in ("modelled", "HBM per core", "compile time", "powers of two", "padding"):
        assert words in printed
    loaded = load_buckets(tmp_path / "grid.json")
    assert set(loaded.grids) == {"decode", "prefill"} and sum(map(len, loaded.grids.values())) <= 6
    assert all(bucket.name in printed for grid in loaded.grids.values() for bucket in grid)
    assert loaded.about["decode_fold_tokens"] == 128 * 32 and loaded.about["plan"]["plan"]["loss"] >= 0
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")


def test_a_request_too_long_for_the_model_is_refused_even_where_the_replay_skips_it(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    trace = [TraceRequest(float(number), 10, 300) for number in range(1500)]
    place = next(i for i in range(1500) if all(trace[i] not in window for window in _windows(trace)))
    trace[place] = TraceRequest(float(place), 100_000, 300)
    write_trace(tmp_path / "trace.csv", trace)
    assert main(["plan-buckets", "--model", str(model), "--trace", str(tmp_path / "trace.csv")]) == 2
    assert f"request {place + 1} by arrival has 100000 + 300 tokens" in capsys.readouterr().err


def test_instance_alone_shows_what_fits(model: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["plan-buckets", "--model", str(model), "--instance", "inf2.xlarge", "--block-size", "16"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line[:1].isdigit()]
    assert [row[-1] for row in rows] == ["fit", "fits"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--trace: missing"),
        (["--trace", "/nowhere"], "--trace: can't read /nowhere"),
        (["--instance", "m5.large"], "--instance: got 'm5.large'"),
        (["--trace", str(TRACES / "alpaca.csv"), "--target", "gpu"], "--target: got 'gpu'"),
        (["--trace", str(TRACES / "alpaca.csv"), "--target", "trn1", "--lnc", "2"], "--lnc: got 2"),
        (["--instance", "trn1.2xlarge", "--target", "trn2"], "--target: got trn2, but trn1.2xlarge is trn1"),
        (["--trace", str(TRACES / "alpaca.csv"), "--hbm-gb", "1"], "--hbm-gb: 1.00 GiB per core"),
        (["--trace", str(TRACES / "alpaca.csv"), "--hbm-gb", "99"], "--hbm-gb: got 99"),
        (["--trace", str(TRACES / "alpaca.csv"), "--instance", "trn1.2xlarge", "--tensor-parallel-size", "4"],
         "--tensor-parallel-size: got 4, trn1.2xlarge has 2"),
        (["--trace", str(TRACES / "alpaca.csv"), "--max-model-len", "999999"], "--max-model-len: got 999999"),
        (["--instance", "inf2.xlarge", "--trace", str(TRACES / "alpaca.csv"), "--hbm-gb", "7.5"],
         "with 8192 tokens of context does not fit inf2.xlarge with any of 1, 2 ranks"),
    ],
)  # fmt: skip
def test_bad_input_gives_one_line(
    model: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture
) -> None:
    assert main(["plan-buckets", "--model", str(model), *arguments]) == 2
    out, error = capsys.readouterr()
    assert out == "" and len(error.splitlines()) == 1
    assert message in error


def test_models_are_known_by_their_sizes() -> None:
    small = DecoderModel("small", 2, 256, 512, 4, 2, 64, 1000)
    assert Rank(small, "trn1", 4).heads == (1, 1)
