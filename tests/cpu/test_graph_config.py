# SPDX-License-Identifier: Apache-2.0
"""Settings of graph executors: what can't work is refused by name before a model is loaded; default ladders hold
whatever the scheduler may make."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compile.buckets import BucketFile as File
from compile.buckets import (
    BucketGrid,
    CopyBucket,
    DecodeBucket,
    DecodeTableBucket,
    PrefillBucket,
    PrefillTableBucket,
    bucket_of_name,
    decode_table_grid,
)
from compile.bundle import Bundle, Graph
from compile.store import open_store
from neuron_paged import LLM
from neuron_paged.cli import main
from neuron_paged.config import CacheConfig, EngineConfig, GraphConfig, SchedulerConfig
from neuron_paged.engine.bundles import ChosenBundle
from neuron_paged.engine.graph_buckets import default_buckets
from neuron_paged.engine.graph_fits import GraphFits
from neuron_paged.engine.make_executor import make_executor
from neuron_paged.engine.named_buckets import bucket_costs, named_buckets, planned_otherwise
from neuron_paged.engine.packed_rows import PackedRows, SamplingArrays
from neuron_paged.engine.rank_pool import RankPool
from neuron_paged.errors import ConfigError, GraphError
from neuron_paged.models.graph_plans import DecodeRowsPlanner, GraphModel, check_kernels, prefill_need, table_shape
from neuron_paged.models.graph_step import plan_name
from neuron_paged.models.llama import LlamaModel
from neuron_paged.ops.planned import decode_tables
from tests.xla.family_models import family_config

REFUSED = [
    ({"kv_cache_dtype": "fp8"}, "kv_cache_dtype: got 'fp8', graphs need .* torch_xla 2.9.* has no fp8 tensors"),
    ({"block_size": 24}, "block_size: got 24, graphs need a power of two"),
    ({"weight_dtype": "bf16"}, "weight_dtype: got 'bf16', graphs need 'auto'"),
    ({"graph_buckets": ["decode_table-8"]}, "graph_buckets: bucket: got 'decode_table-8' with 1 sizes, need one of"),
    ({"graph_buckets": ["huge-1x2"]}, "graph_buckets: bucket: got 'huge-1x2', need one of the forms decode-num_seqsx"),
    ({"graph_buckets": "decode_table-8x1"}, "graph_buckets: got 'decode_table-8x1', need a list of names"),
    ({"graph_buckets": ["missing.json"]}, "graph_buckets: .*missing.json"),
    ({"graph_kernels": "gpu"}, "kernels: got 'gpu', need one of"),
    ({"executor": "cuda"}, "executor: got 'cuda', need one of"),
    ({"executor": "eager", "bundle": "store"}, "executor: got 'eager' with a bundle, .* need 'hlo-cpu' or 'neuron'"),
    ({"executor": "eager", "graph_kernels": "plain"}, "executor: got 'eager' with .* for graphs"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_impossible_settings_are_refused_before_a_model_is_loaded(changes: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LLM("no/such-model-anywhere", **({"executor": "hlo-cpu"} | changes))


def test_an_interpreter_that_is_not_there_is_one_line_on_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("jaxlib", reason="jaxlib is looked for first: pip install jaxlib==0.7.1")
    arguments = ["--executor", "hlo-cpu", "--graph-python", "/no/python", "--prompt", "x"]
    with pytest.raises(GraphError, match="python: /no/python can't be run. Make one: in a clone .*ensure_xla_venv"):
        LLM("demo", executor="hlo-cpu", graph_python="/no/python")
    assert main(["generate", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("neuron-paged: error: python: /no/python can't be run") and error.count("\n") == 1


NAMES = ["decode_table-8x16", "prefill_table-2x64x16"]


def test_buckets_by_name_and_by_file(tmp_path) -> None:
    buckets = [DecodeTableBucket(8, 16), PrefillTableBucket(2, 64, 16)]
    assert named_buckets([*NAMES, NAMES[0]]) == buckets
    assert [bucket.name for bucket in buckets] == NAMES
    File({"decode_table": decode_table_grid([1, 2], [4])}).save(tmp_path / "grids.json")
    found = named_buckets([NAMES[0], str(tmp_path / "grids.json")])
    assert found == [DecodeTableBucket(1, 4), DecodeTableBucket(2, 4), DecodeTableBucket(8, 16)]


def test_files_that_were_planned_for_other_settings_are_told(tmp_path: Path) -> None:
    path, about = str(tmp_path / "grids.json"), {"target": "trn2", "block_size": 32, "lnc": 2, "model": "any"}
    File({"decode_table": decode_table_grid([1], [4])}, about).save(path)
    assert planned_otherwise([NAMES[0], path], {"target": "trn2", "lnc": 2, "tensor_parallel_size": 8}) == []
    (line,) = planned_otherwise([path, NAMES[0]], {"target": "inf2", "block_size": 16, "lnc": 2})
    assert line == f"{path} was planned for target trn2 (here inf2), block_size 32 (here 16)"


def test_rows_take_the_bucket_that_a_files_times_say_is_cheapest(tmp_path: Path) -> None:
    model, _ = model_and_limits(4, 128, 2048, 16)
    few_folds, many_folds = DecodeBucket(4, 0, 2, 4), DecodeBucket(4, 0, 4, 1)  # two of four rows, or one of each
    assert few_folds.work < many_folds.work
    one = np.ones(1, np.int32)
    rows = PackedRows(one, one, one, one[None], one, np.array([0, 1], np.int32), one - 1, SamplingArrays.greedy(1))
    for costs, cheapest in (({few_folds: 9.0, many_folds: 5.0}, many_folds), (None, few_folds)):
        File({"decode": BucketGrid([few_folds, many_folds], costs)}).save(tmp_path / "grids.json")
        buckets = named_buckets([str(tmp_path / "grids.json")])
        fit = GraphFits(model, buckets).find(rows)
        assert buckets[0] == cheapest and fit is not None and fit.bucket == cheapest
        # A bundle of them keeps the times, so that it serves as the file does.
        costs_us = {b.name: us for b, us in bucket_costs([str(tmp_path / "grids.json")]).items() if us is not None}
        bundle = Bundle({}, {b.name: Graph(b.name, {}) for b in buckets}, costs_us=costs_us)
        bundle = Bundle.from_bytes(bundle.to_bytes(), "bundle")
        assert ChosenBundle(open_store(tmp_path), bundle).buckets == [b.name for b in buckets]
        assert named_buckets(list(bundle.graphs), bundle.costs_us) == buckets


CONFIG = family_config("llama")
LIMITS = st.tuples(st.integers(1, 300), st.integers(1, 5000), st.integers(2, 40000), st.sampled_from([8, 16, 32, 128]))


def model_and_limits(seqs: int, tokens: int, length: int, block_size: int) -> tuple[GraphModel, SchedulerConfig]:
    model = GraphModel(CONFIG, "float32", length, block_size, 5000, "float32")
    return model, SchedulerConfig(max_num_seqs=seqs, max_num_batched_tokens=tokens, max_model_len=length)


@settings(deadline=None, max_examples=60)
@given(LIMITS)
def test_default_table_ladders_hold_what_the_limits_allow(sizes: tuple[int, int, int, int]) -> None:
    seqs, tokens, length, block_size = sizes
    buckets = default_buckets(*model_and_limits(*sizes), planned=False)
    assert all(bucket_of_name(bucket.name) == bucket for bucket in buckets)
    decode = BucketGrid(b for b in buckets if isinstance(b, DecodeTableBucket))
    prefill = BucketGrid(b for b in buckets if isinstance(b, PrefillTableBucket))
    width = -(-length // block_size)
    assert decode.pick(DecodeTableBucket(seqs, width)) is not None and decode.pick(DecodeTableBucket(1, 1)) is not None
    assert prefill.pick(PrefillTableBucket(seqs, max(seqs, tokens), width)) is not None
    assert len(buckets) <= 40


@settings(deadline=None, max_examples=60)
@given(LIMITS)
def test_default_planned_ladders_hold_a_sequence_of_any_length(sizes: tuple[int, int, int, int]) -> None:
    seqs, tokens, length, block_size = sizes
    model, limits = model_and_limits(*sizes)
    buckets = default_buckets(model, limits, planned=True)
    prefill = BucketGrid(b for b in buckets if isinstance(b, PrefillBucket))
    assert prefill.pick(prefill_need(model, min(tokens, length), length)) is not None
    table = np.ones((1, -(-length // block_size)), np.int32)
    decode = [b for b in buckets if isinstance(b, DecodeBucket)]
    for context_len in {1, length // 2 + 1, length}:
        lens = np.array([context_len], np.int32)
        assert any(DecodeRowsPlanner(model, bucket).plan(table, lens) for bucket in decode)
    assert max(bucket.num_seqs for bucket in decode) <= seqs and len(buckets) <= 60


def test_default_planned_buckets_take_many_long_contexts_at_once() -> None:
    """64 rows of up to 16384 tokens, 8 KV heads: mixed folds with room for 8 rows each would exceed SBUF."""
    config = replace(CONFIG, num_heads=32, num_kv_heads=8, head_dim=128, hidden_size=4096)
    model = GraphModel(config, "bfloat16", 32768, 32, 40000, "bfloat16")
    limits = SchedulerConfig(max_num_seqs=64, max_num_batched_tokens=2048, max_model_len=32768)
    random = np.random.default_rng(0)
    lens = random.integers(1, 16384, 64).astype(np.int32)
    table = random.permutation(np.arange(1, 64 * 512 + 1, dtype=np.int32)).reshape(64, 512)
    decode = [b for b in default_buckets(model, limits, planned=True) if isinstance(b, DecodeBucket)]
    assert any(DecodeRowsPlanner(model, b).plan(table, lens) for b in decode if b.num_seqs == 64)


def test_kernels_refuse_what_any_of_a_graphs_calls_can_not_be() -> None:
    """Not only attention: rotary embedding of 72 heads of 128, caches whose rows don't fit 32 bits, copies of many
    blocks; one rank of two has half the heads."""
    config = replace(CONFIG, num_heads=64, num_kv_heads=8, head_dim=128, hidden_size=8192)
    config = replace(config, rope=replace(config.rope, inv_freq=(1.0,) * 64))
    model = GraphModel(config, "bfloat16", 8192, 32, 4000, "bfloat16")
    half = model._replace(tensor_parallel_size=2)
    for bucket in (DecodeBucket(8, 8, 4, 2), PrefillBucket(128, 1), CopyBucket(16)):
        check_kernels(half, bucket)
    for bucket in (DecodeBucket(8, 8, 4, 2), PrefillBucket(128, 1)):
        with pytest.raises(ValueError, match=r"rotary_embedding: num_heads \+ num_kv_heads"):
            check_kernels(model, bucket)
        with pytest.raises(ValueError, match="reshape_and_cache: num_blocks"):
            check_kernels(half._replace(num_blocks=2**24), bucket)
    with pytest.raises(ValueError, match="copy_blocks: num_pairs"):
        check_kernels(half, CopyBucket(2**20))


def test_planned_bucket_needs_what_the_kernels_plan_uses() -> None:
    model, _ = model_and_limits(4, 128, 8192, 16)
    table = np.arange(1, 3 * 512 + 1, dtype=np.int32).reshape(3, 512)
    plans = DecodeRowsPlanner(model, DecodeBucket(4, 8, 4, 2)).plan(table, np.array([8192, 2048, 40], np.int32))
    assert plans is not None and plans.need == DecodeBucket(3, 5, 1, 2)  # 2048 tokens of 16 per slab fill a fold
    assert plans.tables[0].shape == table_shape(model, DecodeBucket(4, 8, 4, 2))
    # Sixteen slabs per row, spread over two mixed folds, when one would do.
    planner, lens = DecodeRowsPlanner(model, DecodeBucket(4, 0, 4, 4)), np.full(3, 256, np.int32)
    for plans in (planner.plan(table, lens), planner.advance(table, lens + 1)):
        assert plans is not None and plans.need == DecodeBucket(3, 0, 1, 4)
    assert DecodeRowsPlanner(model, DecodeBucket(4, 0, 4, 2)).plan(table[:1], np.array([8192], np.int32)) is not None
    assert DecodeRowsPlanner(model, DecodeBucket(4, 0, 3, 2)).plan(table[:1], np.array([8192], np.int32)) is None


def test_a_bucket_with_shared_folds_takes_common_prefixes_once_and_any_other_rows() -> None:
    """Four rows of 2048 + 100 tokens, 16 per slab: a fold each, or one for all."""
    model, _ = model_and_limits(4, 128, 8192, 16)
    table = np.arange(1, 4 * 135 + 1, dtype=np.int32).reshape(4, 135)
    lens = np.full(4, 2148, np.int32)
    shared, plain = DecodeBucket(4, 0, 1, 4, 1), DecodeBucket(4, 4, 1, 4, 1)
    assert DecodeRowsPlanner(model, shared).plan(table, lens) is None
    found = DecodeRowsPlanner(model, plain).plan(table, lens)
    assert found is not None and found.need == DecodeBucket(4, 4, 1, 4)
    table[1:, :128] = table[0, :128]
    for bucket in (shared, plain):
        found = DecodeRowsPlanner(model, bucket).plan(table, lens)
        assert found is not None and found.need == DecodeBucket(4, 0, 1, 4, 1)
    found = DecodeRowsPlanner(model, DecodeBucket(4, 4, 1, 4)).plan(table, lens)  # without: read for each
    assert found is not None and found.need == DecodeBucket(4, 4, 1, 4)


def test_parts_of_a_step_are_planned_from_those_of_the_step_before() -> None:
    """Rows that no bucket holds together: the plans of eight parts change in place, those of more parts are made anew;
    all are right."""
    model, _ = model_and_limits(4, 128, 8192, 16)
    fits = GraphFits(model, [DecodeBucket(1, 0, 1, 1), DecodeBucket(2, 0, 2, 2)])
    table = np.arange(1, 20 * 20 + 1, dtype=np.int32).reshape(20, 20)
    start = np.random.default_rng(0).integers(1, 280, 20).astype(np.int32)

    def check(rows: PackedRows) -> list[np.ndarray]:
        """The plans of the parts, each read back before the next is made."""
        fit = fits.find(rows)
        if fit is None:
            division = fits.divide(rows)
            assert division is not None
            return [plan for part in division.parts for plan in check(part)]
        assert isinstance(fit.bucket, DecodeBucket)
        plan, num_seqs = fit.inputs[plan_name(0)], fit.bucket.num_seqs
        found = decode_tables(plan, (0, num_seqs, num_seqs, 16), num_seqs=num_seqs, q_len=1, sliding_window=0,
                              kv_cache_shape=(model.num_blocks, 1, 2, 16, 8))  # fmt: skip
        assert (found.context_lens[: rows.num_seqs] == rows.context_lens).all()
        for seq, blocks in enumerate(-(-rows.context_lens // 16)):
            assert (found.block_table[seq, :blocks] == rows.block_table[seq, :blocks]).all()
        return [plan]

    for num_seqs, num_parts in ((16, 8), (20, 12), (3, 2)):
        before: list[np.ndarray] = []
        for step in range(12):
            lens, none = start[:num_seqs] + np.int32(step), np.zeros(num_seqs, np.int32)
            starts = np.arange(num_seqs + 1, dtype=np.int32)
            plans = check(PackedRows(none, lens - 1, none, table[:num_seqs], lens, starts, starts[:-1],
                                     SamplingArrays.greedy(num_seqs)))  # fmt: skip
            assert len(plans) == num_parts
            assert step == 0 or num_parts > 8 or all(map(np.shares_memory, plans, before))
            before = plans


def test_default_buckets_read_a_common_prefix_once() -> None:
    model, limits = model_and_limits(4, 128, 8192, 16)
    buckets = [b for b in default_buckets(model, limits, planned=True) if isinstance(b, DecodeBucket)]
    (bucket,) = (b for b in buckets if b.shared_folds)
    table = np.arange(1, 4 * 512 + 1, dtype=np.int32).reshape(4, 512)
    table[1:, :384] = table[0, :384]  # three folds
    lens = np.array([8192, 7000, 6200, 6145], np.int32)
    fitting = [b for b in BucketGrid(buckets) if DecodeRowsPlanner(model, b).plan(table, lens)]
    assert fitting[0] == bucket and bucket.work < min(b.work for b in fitting[1:])


SIMULATOR = [
    ({"block_size": 8}, "graph_kernels: got 'simulator', whose decode kernel does not take it: block_size: got 8"),
    ({"graph_buckets": ["decode_table-1x4"]}, "graph_buckets: got decode_table-1x4, NKI kernels need decode-"),
    ({"graph_buckets": ["decode-40x0x1x40"]}, "decode-40x0x1x40: .*seqs_per_mixed_fold: got 40, need at most"),
]


@pytest.mark.parametrize(("changes", "message"), SIMULATOR)
def test_what_simulated_kernels_do_not_take_is_refused(changes: dict, message: str) -> None:
    cache = CacheConfig(block_size=changes.pop("block_size", 16), num_blocks=9)
    config = EngineConfig(cache, SchedulerConfig(max_model_len=64))
    buckets = changes.get("graph_buckets")
    graphs = GraphConfig("hlo-cpu", None if buckets is None else tuple(buckets), "simulator")
    model = LlamaModel(CONFIG, device="meta", max_positions=64)
    with pytest.raises(ConfigError, match=message):
        make_executor(model, config, graphs, RankPool(1), progress=False)
