# SPDX-License-Identifier: Apache-2.0
"""What plan-buckets predicts is what the engine does: the same trace through LLMEngine and its choice of buckets, with
real batches and fold plans, and no model behind the graphs."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from neuron_paged.bench.traffic import sample_trace
from neuron_paged.config import CacheConfig, EngineConfig, SchedulerConfig
from neuron_paged.engine.batch import Batch
from neuron_paged.engine.graph_chain import GraphChain
from neuron_paged.engine.llm_engine import LLMEngine
from neuron_paged.engine.named_buckets import named_buckets
from neuron_paged.engine.sampling import RequestOutputKind, SamplingParams
from neuron_paged.models.graph_plans import GraphModel
from neuron_paged.models.graph_step import LOGITS, TOKEN_IDS, GraphBucket
from neuron_paged.models.loader import load_config
from neuron_paged.planning.bucket_plan import plan_buckets, replay_traffic
from neuron_paged.planning.decoder_model import decoder_model
from neuron_paged.planning.device_memory import DeviceMemory
from neuron_paged.planning.instances import core_hbm_bytes
from neuron_paged.planning.rank import Rank
from neuron_paged.planning.step_cost import step_cost
from tests.cpu.test_bucket_planning import MODEL_CONFIG

RANKS, BLOCK_SIZE, LIMITS = 8, 32, SchedulerConfig(16, 512, 8192)


class NoModel(GraphChain):
    """Graphs that give token 1 for every row."""

    def run_graph(self, bucket: GraphBucket, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
        rows = bucket.dimensions().get("num_seqs", 1)
        return {TOKEN_IDS: np.ones(rows, np.int32), LOGITS: np.zeros((rows, 1), np.float32)}

    def move_blocks(self, batch: Batch) -> None: ...


@pytest.fixture(scope="module", autouse=True)
def timelines_kept_here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The simulator runs once for this file, and nothing lands in the user's cache folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NEURON_PAGED_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.mark.parametrize(
    ("name", "count", "tables"), [("sharegpt", 40, False), ("long", 30, False), ("long", 30, True)]
)
def test_predicted_padding_is_the_engines(name: str, count: int, tables: bool, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(MODEL_CONFIG))
    config = load_config(tmp_path)
    rank = Rank(decoder_model("llama", config), "trn2", RANKS, block_size=BLOCK_SIZE, max_context=LIMITS.max_model_len)
    cost, memory = step_cost(rank), DeviceMemory(rank, core_hbm_bytes("trn2", 1))
    # All at once: when requests arrive during a step depends on how long steps take.
    trace = [replace(request, arrival_s=0.0) for request in sample_trace(name, count, 5)]
    plan = plan_buckets(replay_traffic(trace, LIMITS, memory, cost), memory, cost, 8, tables)
    plan.bucket_file({}).save(tmp_path / "grid.json")

    buckets, num_blocks = named_buckets([str(tmp_path / "grid.json")]), plan.traffic.num_blocks
    model = GraphModel(config, "bfloat16", LIMITS.max_model_len, BLOCK_SIZE, num_blocks, "bfloat16", RANKS, "trn2")
    chain = NoModel(model, buckets)
    cache = CacheConfig(BLOCK_SIZE, num_blocks, enable_prefix_caching=False)
    engine = LLMEngine(EngineConfig(cache, LIMITS), chain, vocab_size=config.vocab_size)
    for number, request in enumerate(trace):
        params = SamplingParams(
            temperature=0, max_tokens=request.output_tokens, ignore_eos=True, detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )  # fmt: skip
        engine.add_request(str(number), [1] * request.prompt_tokens, params)
    while engine.has_unfinished_requests():
        engine.step()

    measured = {key.replace("_table", ""): waste for key, waste in chain.graph_stats.padding_waste().items()}
    measured.pop("decode.seqs_per_fold", None)  # a plan fills folds up to the bucket's number, so it needs that number
    print(name, {key: (round(plan.tally.padding.get(key, 0.0), 4), round(waste, 4)) for key, waste in measured.items()})
    assert measured == pytest.approx({key: plan.tally.padding.get(key, 0.0) for key in measured}, abs=0.05)
    assert sum(chain.graph_stats.runs.values()) == pytest.approx(sum(plan.tally.runs.values()), rel=0.05)
    assert dict(chain.graph_stats.fallbacks) == {}
