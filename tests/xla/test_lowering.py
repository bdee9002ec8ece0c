# SPDX-License-Identifier: Apache-2.0
"""Lowering: real model steps to static HLO, the same bytes in every process; steps that aren't static are refused."""

from collections import Counter
from functools import partial

import pytest

from compile.buckets import DecodeTableBucket, PrefillTableBucket
from compile.errors import LoweringError
from compile.graph_lint import check_graph, lint_graph
from compile.graph_spec import TensorSpec
from compile.hlo import parse_module
from compile.kernel_calls import StandInKernelCompiler
from compile.lower import LoweringRequest, lower_graphs
from compile.lowered_graph import LoweredGraph
from compile.trace import trace
from neuron_paged.models.graph_step import lowering_request
from tests.xla import lowering_cases as cases
from tests.xla.large_model import MODEL as MODEL_1B
from tests.xla.tiny_model import GRAPH_MODEL

BUCKETS = (DecodeTableBucket(4, 3), PrefillTableBucket(3, 16, 3))
COMPILERS = (StandInKernelCompiler(), None)


def requests() -> list[LoweringRequest]:
    small = [lowering_request(GRAPH_MODEL, bucket, compiler) for bucket in BUCKETS for compiler in COMPILERS]
    return [*small, lowering_request(MODEL_1B, DecodeTableBucket(8, 16), COMPILERS[0])]


@pytest.fixture(scope="module")
def graphs() -> list[LoweredGraph]:
    return lower_graphs(requests())


def trace_case(step, **spec) -> LoweredGraph:
    factory = step if isinstance(step, type) else partial(cases.returns, step)
    return trace(LoweringRequest(cases.spec(**spec), factory))


def test_graphs_are_static_aliased_and_free_of_errors(graphs: list[LoweredGraph]) -> None:
    for graph, request in zip(graphs, requests(), strict=True):
        module = parse_module(graph.hlo)
        dtypes = {leaf.dtype for _, i in module.instructions() for leaf in i.shape.leaves()}
        assert not dtypes & {"int64", "uint64", "float64"}
        assert not any(leaf.dynamic for _, i in module.instructions() for leaf in i.shape.leaves())
        assert module.name == request.spec.name
        must = {alias.output: alias.parameter for alias in module.aliases if alias.must}
        state = [graph.manifest.parameters[must[2 + i]].spec.name for i in range(len(request.spec.state))]
        assert state == [spec.name for spec in request.spec.state]
        assert {finding.rule for finding in check_graph(graph)} <= {
            "stand-in-kernel", "rounding-round-trip", "reduce-window",
        }  # fmt: skip
        assert not graph.manifest.unused
        assert [spec.name for spec in graph.manifest.outputs[:2]] == ["sampled_token_ids", "logits"]


def test_custom_calls_are_layers_times_operators(graphs: list[LoweredGraph]) -> None:
    for graph, request in zip(graphs, requests(), strict=True):
        calls = parse_module(graph.hlo).custom_calls()
        names = Counter(graph.manifest.kernels[call.backend_config.decode()].name for call in calls)
        layers = len(request.spec.state)
        if request.kernel_compiler is None:
            assert not names and graph.manifest.kernel_compiler == ""
        else:
            assert names == dict.fromkeys(("rotary_embedding", "reshape_and_cache", "attention"), layers)
            assert graph.manifest.kernel_compiler == "stand-in 1"
        assert not any(i.opcode == "call" for _, i in parse_module(graph.hlo).instructions())


def test_bytes_are_equal_in_another_process_and_order(graphs: list[LoweredGraph]) -> None:
    for request, graph in reversed(list(zip(requests(), graphs, strict=True))):
        again = trace(request)
        assert again.hlo == graph.hlo and again.manifest == graph.manifest and again.digest == graph.digest
    assert len({graph.digest for graph in graphs}) == len(graphs)


def test_graph_survives_its_folder(graphs: list[LoweredGraph], tmp_path) -> None:
    graphs[0].save(tmp_path)
    assert LoweredGraph.load(tmp_path) == graphs[0]


def test_instructions_know_the_line_of_the_model(graphs: list[LoweredGraph]) -> None:
    sources = {source.rpartition("/")[2].split(":")[0] for source in graphs[0].sources.values()}
    assert {"layers.py", "sampler.py", "linear.py"} <= sources
    findings = [finding for finding in lint_graph(graphs[0]) if finding.rule == "stand-in-kernel"]
    assert {finding.source.rpartition("/")[2].split(":")[0] for finding in findings} == {"layers.py"}
    assert b"layers.py" not in graphs[0].hlo


def test_large_model_is_lowered_without_its_weights(graphs: list[LoweredGraph]) -> None:
    """1.1 B parameters in bf16 would be 2.2 GB."""
    graph = graphs[-1]
    assert sum(spec.num_bytes for spec in graph.manifest.by_role("weight")) > 2.0e9
    assert len(parse_module(graph.hlo).custom_calls()) == 48 and len(graph.manifest.aliases) == 16
    assert graph.cost is not None
    print(f"\n16 layers, 1.1 B: {graph.cost.trace_s:.2f} s, {graph.cost.peak_rss_bytes / 2**20:.0f} MiB peak RSS")
    assert graph.cost.peak_rss_bytes < 2**30


def test_function_with_state() -> None:
    graph = trace_case(cases.add_to_state)
    assert [(p.spec.name, p.role) for p in graph.manifest.parameters] == [("x", "input"), ("s", "state")]
    assert graph.manifest.aliases == {1: 1} and not graph.manifest.kernels


def test_module_with_parameter_buffer_and_unused_weight() -> None:
    graph = trace_case(cases.Scaled)
    roles = {p.spec.name: p.role for p in graph.manifest.parameters}
    assert roles == {"x": "input", "s": "state", "weight": "weight", "offset": "weight"}
    assert graph.manifest.unused == ("unused",)


def test_int64_results_become_int32() -> None:
    graph = trace_case(cases.wide_integers)
    assert graph.manifest.outputs[0] == TensorSpec("y", (4,), "int32")
    assert not lint_graph(graph)


STATIC = "need a static step: no .item"
REFUSED = [
    (cases.item, {}, rf"case: the step reads a tensor's value on the host \(.*lowering_cases.py:\d+\), {STATIC}"),
    (cases.branch, {}, STATIC),
    (cases.nonzero, {}, STATIC),
    (cases.host_tensor, {}, r"hides 1 constants; the graph's parameters are \[4, 8\] float32, .*\[8\] float32"),
    (cases.hidden_constant, {}, "hides 1 constants.* make them parameters or buffers"),
    (cases.draw, {}, "hides 1 constants"),
    (cases.cpu_result, {}, "output y is a tensor on cpu, need a tensor computed from the inputs"),
    (cases.two_results, {}, r"returned 2 tensors, need \['y'\]"),
    (cases.ignores_state, {}, "does not change the state s; make it an input"),
    (cases.huge_integer, {}, "1099511627776, need one of 32 bits"),
    (cases.add_to_state, {"inputs": (TensorSpec("x", (3, 8), "float32"),)}, r"RuntimeError at .*lowering_cases.py:\d+"),
    (cases.Scaled, {"inputs": (TensorSpec("weight", (4, 8), "float32"),)}, "weight names both an input and a weight"),
]


@pytest.mark.parametrize(("step", "spec", "message"), REFUSED, ids=lambda value: getattr(value, "__name__", None))
def test_steps_that_are_no_graph_are_refused(step, spec: dict, message: str) -> None:
    with pytest.raises(LoweringError, match=message):
        trace_case(step, **spec)
    assert trace_case(cases.add_to_state).manifest.aliases  # tracing is usable afterwards


LINTED = [
    (cases.masked_fill, "float64"),
    (cases.divide_by_three, "integer-division"),
    (cases.count_by_scatter, "integer-scatter"),
    (cases.top_of_two, "small-top-k"),
    (cases.returns_its_input, "returned-parameter"),
]


@pytest.mark.parametrize(("step", "rule"), LINTED, ids=[rule for _, rule in LINTED])
def test_lint_finds_what_torch_makes_of_a_step(step, rule: str) -> None:
    findings = [finding for finding in lint_graph(trace_case(step)) if finding.severity == "error"]
    assert [finding.rule for finding in findings] == [rule]
    assert rule == "returned-parameter" or "lowering_cases.py:" in findings[0].source


def test_errors_reach_the_parent_process() -> None:
    with pytest.raises(LoweringError, match="reads a tensor's value on the host"):
        lower_graphs([LoweringRequest(cases.spec(), partial(cases.returns, cases.item))])


def test_a_factory_that_cannot_be_sent_is_refused() -> None:
    with pytest.raises(LoweringError, match="need a function of a module"):
        lower_graphs([LoweringRequest(cases.spec(), lambda: cases.add_to_state)])
