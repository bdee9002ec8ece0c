# SPDX-License-Identifier: Apache-2.0
"""Settings of graph executors: what can't work is refused by name before a model is loaded; default ladders hold
whatever the scheduler may make."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compile.buckets import BucketFile as File
from compile.buckets import (
    BucketGrid,
    DecodeTableBucket,
    PrefillTableBucket,
    bucket_of_name,
    decode_table_grid,
)
from neuron_paged import LLM
from neuron_paged.cli import main
from neuron_paged.config import CacheConfig, EngineConfig, SchedulerConfig
from neuron_paged.engine.graph_buckets import default_buckets, named_buckets
from neuron_paged.errors import ConfigError, GraphError

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
    ({"executor": "eager", "graph_kernels": "plain"}, "executor: got 'eager' with .* for graphs"),
]


@pytest.mark.parametrize(("settings", "message"), REFUSED)
def test_impossible_settings_are_refused_before_a_model_is_loaded(settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LLM("no/such-model-anywhere", **({"executor": "hlo-cpu"} | settings))


def test_an_interpreter_that_is_not_there_is_one_line_on_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("jaxlib", reason="jaxlib is looked for first: pip install jaxlib==0.7.1")
    arguments = ["--executor", "hlo-cpu", "--graph-python", "/no/python", "--prompt", "x"]
    with pytest.raises(GraphError, match="python: /no/python can't be run. Make one: python3.11 -m venv"):
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
    assert found == [DecodeTableBucket(8, 16), DecodeTableBucket(1, 4), DecodeTableBucket(2, 4)]


@given(st.integers(1, 300), st.integers(1, 5000), st.integers(2, 40000), st.sampled_from([8, 16, 32, 128]))
def test_default_ladders_hold_what_the_limits_allow(seqs: int, tokens: int, length: int, block_size: int) -> None:
    limits = SchedulerConfig(max_num_seqs=seqs, max_num_batched_tokens=tokens, max_model_len=length)
    buckets = default_buckets(EngineConfig(CacheConfig(block_size=block_size), limits))
    assert all(bucket_of_name(bucket.name) == bucket for bucket in buckets)
    decode = BucketGrid(b for b in buckets if isinstance(b, DecodeTableBucket))
    prefill = BucketGrid(b for b in buckets if isinstance(b, PrefillTableBucket))
    width = -(-length // block_size)
    assert decode.pick(DecodeTableBucket(seqs, width)) is not None and decode.pick(DecodeTableBucket(1, 1)) is not None
    assert prefill.pick(PrefillTableBucket(seqs, max(seqs, tokens), width)) is not None
    assert len(buckets) <= 40
