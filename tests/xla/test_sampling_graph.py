# SPDX-License-Identifier: Apache-2.0
"""sample_static as a graph draws the eager sampler's tokens from the same logits, parameters and uniform numbers."""

from functools import partial

import numpy as np
import torch

from compile.executors import HloCpuRuntime
from compile.graph_lint import lint_graph
from compile.graph_spec import GraphSpec, TensorSpec
from compile.lower import LoweringRequest
from compile.trace import trace
from neuron_paged.models.sampler import UNSETTLED, Filters, SamplingColumns, SamplingTensors, sample, sample_static

ROWS, VOCAB = 12, 9000
DTYPES = dict.fromkeys(SamplingColumns._fields, "float32") | {"top_k": "int32"}
SPEC = GraphSpec(
    "sample", (TensorSpec("logits", (ROWS, VOCAB), "float32"), *(TensorSpec(n, (ROWS,), d) for n, d in DTYPES.items())),
    (TensorSpec("count", (1,), "float32"),), ("token_ids",),
)  # fmt: skip


def step(logits, temperature, uniform, top_k, top_p, min_p, count):
    count.add_(1)
    return sample_static(logits, SamplingColumns(temperature, uniform, top_k, top_p, min_p))


def make_step():
    return step


def eager(logits: np.ndarray, columns: dict[str, np.ndarray]) -> np.ndarray:
    greedy = columns["temperature"] == 0
    plain = ~greedy & (columns["top_k"] >= VOCAB) & (columns["top_p"] == 1) & (columns["min_p"] == 0)
    filtered = torch.from_numpy(~greedy & ~plain)
    c = {name: torch.from_numpy(column) for name, column in columns.items()}
    rows = [torch.from_numpy(np.flatnonzero(kind)) for kind in (greedy, plain, filtered)]
    filters = Filters(c["top_k"][filtered].long(), c["top_p"][filtered], c["min_p"][filtered])
    rows_or_none = [kind if len(kind) else None for kind in rows]
    tensors = SamplingTensors(c["temperature"], c["uniform"], *rows_or_none, filters if len(rows[2]) else None)
    return sample(torch.from_numpy(logits), tensors).token_ids.numpy()


def test_graph_draws_the_eager_samplers_tokens() -> None:
    graph = trace(LoweringRequest(SPEC, partial(make_step)))
    assert {finding.rule for finding in lint_graph(graph)} <= {"reduce-window"}  # a warning: cumsum
    runtime = HloCpuRuntime({})
    executable = runtime.load(graph)
    state = {"count": runtime.zeros(SPEC.state[0])}
    rng = np.random.default_rng(0)
    num_drawn = num_unsettled = 0
    for turn in range(120):
        logits = (rng.standard_normal((ROWS, VOCAB)) * rng.choice([1, 4, 9])).astype(np.float32)
        logits = np.round(logits * 4) / 4 if turn % 3 == 0 else logits  # ties
        logits[11, rng.integers(VOCAB)] = np.nan
        uniform = (np.floor(rng.random(ROWS) * 2**24) * 2**-24).astype(np.float32)
        columns = {
            "temperature": rng.choice([0, 0.4, 1, 1.6], ROWS).astype(np.float32), "uniform": uniform,
            "top_k": rng.choice([1, 30, 200, VOCAB], ROWS).astype(np.int32),
            "top_p": rng.choice([0.3, 0.9, 1], ROWS).astype(np.float32),
            "min_p": rng.choice([0, 0.02], ROWS).astype(np.float32),
        }  # fmt: skip
        got = executable.run({"logits": logits, **columns}, {}, state)["token_ids"]
        expected = eager(logits, columns)
        settled = got != UNSETTLED
        np.testing.assert_array_equal(got[settled], expected[settled])
        assert got[11] == -1
        num_drawn, num_unsettled = num_drawn + int(settled.sum()), num_unsettled + int((~settled).sum())
    assert num_drawn > 1000 and num_unsettled > 10
