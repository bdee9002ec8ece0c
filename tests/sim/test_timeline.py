# SPDX-License-Identifier: Apache-2.0
"""The timeline: calibration residuals, dependencies, engine order, DMA limits, trace and picture."""

import json

import numpy as np
import pytest

from nki_kernels import simulator
from nki_kernels.hardware import GENERATIONS, generation
from nki_kernels.simulator import calibration
from nki_kernels.toolchain import nisa, nki, nl


def run(body, *arrays, target="trn2", **kwargs):
    return simulator.run(body, *arrays, target=target, **kwargs).report


def test_calibration_within_15_percent_or_explained():
    residuals = calibration.residuals()
    assert len(residuals) >= 24
    for residual in residuals:
        assert abs(residual.error) <= 0.15 or residual.note, residual


def test_calibration_table_shows_every_case():
    text = calibration.table(calibration.calibrate("trn1"))
    assert all(case.name in text for case in calibration.CASES)


@pytest.mark.parametrize("target", sorted(GENERATIONS))
def test_generation_figures_have_unit_source_and_ordered_range(target):
    for name, figure in generation(target).figures.items():
        assert figure.unit and figure.source, name
        assert figure.low is None or figure.low <= figure.value, name
        assert figure.high is None or figure.value <= figure.high, name


def chain(independent):
    def body():
        tiles = [nl.zeros((128, 256), dtype=nl.float32) for _ in range(16)]
        for i in range(1, 16):
            source = tiles[0] if independent else tiles[i - 1]
            engine = nisa.engine.vector
            nisa.tensor_copy(dst=tiles[i], src=source, engine=engine)

    return body


def test_dependent_instructions_take_longer_than_independent_ones():
    assert run(chain(False)).total_ns > 1.1 * run(chain(True)).total_ns


def two_engines(body_tiles):
    def body():
        a, b = (nl.zeros((128, 2048), dtype=nl.float32) for _ in range(2))
        target_b = a if body_tiles == "same" else b
        for _ in range(8):
            nisa.activation(dst=a, op=nl.exp, data=a)
            nisa.tensor_scalar(dst=target_b, data=target_b, op0=nl.add, operand0=1.0, engine=nisa.engine.vector)

    return body


def test_engines_overlap_unless_they_share_a_tile():
    apart, together = run(two_engines("apart")), run(two_engines("same"))
    assert together.total_ns > 1.5 * apart.total_ns
    assert together.timeline.busy_ns["vector"] == pytest.approx(apart.timeline.busy_ns["vector"])


def test_whole_tensor_dependencies_are_never_faster():
    def body(a):
        tile = nl.ndarray((128, 4, 1024), dtype=nl.float32, buffer=nl.sbuf)
        out = nl.ndarray((128, 4, 1024), dtype=nl.float32, buffer=nl.sbuf)
        for i in range(4):
            nisa.dma_copy(dst=tile[:, i, :], src=a)
            nisa.activation(dst=out[:, i, :], op=nl.exp, data=tile[:, i, :])

    report = run(body, np.zeros((128, 1024), np.float32))
    assert report.timeline_with(whole_tensors=True).total_ns > report.total_ns


def test_streaming_loads_reach_the_dma_limit():
    def body(a):
        tiles = [nl.ndarray((128, 16384), dtype=nl.uint8, buffer=nl.sbuf) for _ in range(4)]
        for i in range(32):
            nisa.dma_copy(dst=tiles[i % 4], src=a)

    a = np.zeros((128, 16384), np.uint8)
    report = run(body, a, target="trn1")
    assert report.timeline.dma_bytes == 32 * a.nbytes
    assert 0.9 < report.fraction_of_dma() <= 1.0
    assert report.bound() == "dma"


def test_swdge_figure_changes_gather_time():
    def body(table, index):
        idx = nl.ndarray((128, 1), dtype=nl.int32, buffer=nl.sbuf)
        nisa.dma_copy(dst=idx, src=index)
        for _ in range(8):
            out = nl.ndarray((128, 512), dtype=nl.uint8, buffer=nl.sbuf)
            source = table.ap([[512, 128], [1, 512]], vector_offset=idx, indirect_dim=0)
            nisa.dma_copy(dst=out, src=source)

    report = run(body, np.zeros((256, 512), np.uint8), np.arange(128, dtype=np.int32)[:, None])
    fast = report.timeline_with(swdge_descriptor=13.0)
    assert report.total_ns - fast.total_ns == pytest.approx(8 * 128 * 13.5, rel=0.05)
    low, high = report.range_ns
    assert low <= report.total_ns <= high
    assert report.timeline.bytes_by_kind["gather"] == 8 * 128 * 512


def test_small_descriptors_are_bound_by_their_generator():
    def body(table):
        idx = nl.ndarray((128, 1), dtype=nl.int32, buffer=nl.sbuf)
        nisa.iota(dst=idx, pattern=[[0, 1]], offset=0, channel_multiplier=1)
        outs = [nl.ndarray((128, 64), dtype=nl.uint8, buffer=nl.sbuf) for _ in range(4)]
        for i in range(40):
            source = table.ap([[64, 128], [1, 64]], vector_offset=idx, indirect_dim=0)
            nisa.dma_copy(dst=outs[i % 4], src=source)

    report = run(body, np.zeros((256, 64), np.uint8))
    assert report.bound() == "gpsimd"
    assert report.timeline.busy_ns["dma"] < report.timeline.busy_ns["gpsimd"]


@pytest.mark.parametrize("is_shared", [True, False])
def test_transposes_by_an_identity_matrix_are_no_products(is_shared):
    def body():
        ramp, eye = nl.zeros((128, 128), dtype=nl.float32), nl.zeros((128, 128), dtype=nl.bfloat16)
        if is_shared:
            eye = nl.shared_identity_matrix(128, dtype=nl.bfloat16)
        else:
            nisa.iota(dst=ramp, pattern=[[1, 128]], offset=0, channel_multiplier=-1)
            nisa.tensor_scalar(dst=eye, data=ramp, op0=nl.equal, operand0=0.0)
        data = nl.zeros((128, 128), dtype=nl.bfloat16)
        moving = nl.zeros((128, 512), dtype=nl.bfloat16)
        turned = nl.ndarray((128, 128), dtype=nl.float32, buffer=nl.psum)
        product = nl.ndarray((128, 512), dtype=nl.float32, buffer=nl.psum)
        nisa.nc_matmul(dst=turned, stationary=data, moving=eye, accumulate=False)
        nisa.nc_matmul(dst=product, stationary=data, moving=moving, accumulate=False)

    assert run(body, target="trn1").timeline.matmul_flops == 2 * 128 * 128 * 512


@pytest.mark.parametrize("target,serial", [("trn1", True), ("trn2", False)])
def test_vector_and_scalar_take_turns_at_psum_on_v2(target, serial):
    def body():
        a, b = (nl.zeros((128, 512), dtype=nl.float32, buffer=nl.psum) for _ in range(2))
        x, y = (nl.ndarray((128, 512), dtype=nl.float32, buffer=nl.sbuf) for _ in range(2))
        for _ in range(8):
            nisa.activation(dst=x, op=nl.copy, data=a)
            nisa.tensor_copy(dst=y, src=b, engine=nisa.engine.vector)

    report = run(body, target=target)
    busy = report.timeline.busy_ns
    assert (report.total_ns > 0.95 * (busy["scalar"] + busy["vector"])) == serial


def test_unknown_figure_raises():
    report = run(chain(True))
    with pytest.raises(ValueError, match="unknown figure 'swdge'"):
        report.timeline_with(swdge=1.0)


def test_lnc_pair_meets_at_sendrecv():
    def body():
        me = nl.program_id(0)
        x, y = nl.zeros((128, 512), dtype=nl.float32), nl.zeros((128, 512), dtype=nl.float32)
        for _ in range(1 + 20 * me):
            nisa.activation(dst=x, op=nl.exp, data=x)
        nisa.sendrecv(src=x, dst=y, send_to_rank=1 - me, recv_from_rank=1 - me, pipe_id=0)

    report = run(body, grid=2)
    starts = [s.start for s in report.timeline.spans if report.events[s.core][s.number].op == "sendrecv"]
    slow_core_end = max(
        s.end for s in report.timeline.spans if s.core == 1 and report.events[1][s.number].op == "activation"
    )
    assert len(starts) == 2 and min(starts) >= slow_core_end


def test_device_loop_pays_a_barrier_per_iteration():
    def body(iterations):
        x = nl.zeros((128, 8), dtype=nl.float32)

        def step(i):
            nisa.activation(dst=x, op=nl.exp, data=x)

        nl.fori_loop(0, iterations, step)

    barrier = generation("trn2").loop_barrier.value
    assert run(body, 10).total_ns - run(body, 5).total_ns >= 5 * barrier


def test_depends_on_orders_independent_instructions():
    def body(wait):
        x, y = nl.zeros((128, 4096), dtype=nl.float32), nl.zeros((128, 64), dtype=nl.float32)
        first = nisa.activation(dst=x, op=nl.exp, data=x)
        second = nisa.tensor_scalar(dst=y, data=y, op0=nl.add, operand0=1.0, engine=nisa.engine.vector)
        if wait:
            second.depends_on(first)

    def start_of_last(report):
        return next(s.start for s in report.timeline.spans if report.events[0][s.number].op == "tensor_scalar")

    free, ordered = run(body, False), run(body, True)
    end = next(s.end for s in ordered.timeline.spans if ordered.events[0][s.number].op == "activation")
    assert start_of_last(free) < end <= start_of_last(ordered)


@nki.jit
def named_instructions():
    x, y = nl.zeros((128, 4096), dtype=nl.float32), nl.zeros((128, 64), dtype=nl.float32)
    nisa.activation(dst=x, op=nl.exp, data=x, name="exp")
    nisa.tensor_scalar(dst=y, data=y, op0=nl.add, operand0=1.0, engine=nisa.engine.vector, name="plus1")


@pytest.mark.parametrize("producers", ["exp", ["exp"]])
def test_with_schedule_adds_dependencies(producers):
    def spans(kernel):
        report = simulator.run(kernel).report
        return report, {report.events[0][s.number].name: s for s in report.timeline.spans}

    _, free = spans(named_instructions)
    assert free["plus1"].start < free["exp"].end
    report, ordered = spans(named_instructions.with_schedule([("plus1", producers)]))
    assert ordered["exp"].end <= ordered["plus1"].start and report.diagnostics == []
    report, _ = spans(named_instructions.with_schedule([("exp", "plus1")]))
    assert "exp waits for plus1, issued later: not modelled" in report.diagnostics[0]
    assert "test_timeline.py:" in report.diagnostics[0]


def test_with_schedule_checks_names():
    with pytest.raises(simulator.LawError, match="named_instructions has no instruction named 'plus2'. Nearest: plus1"):
        simulator.run(named_instructions.with_schedule([("plus2", "exp")]))
    with pytest.raises(simulator.LawError, match="with_schedule: got 'plus1', need .*test_timeline.py"):
        named_instructions.with_schedule(["plus1"])


def test_timeline_covers_every_event_and_respects_engine_order():
    report = run(two_engines("apart"))
    spans = [s for s in report.timeline.spans if s.lane == "vector"]
    assert sorted(s.number for s in spans) == [s.number for s in sorted(spans, key=lambda s: s.start)]
    assert {s.number for s in report.timeline.spans} == set(range(report.num_instructions))


def test_table_trace_and_picture(tmp_path):
    report = run(two_engines("same"))
    text = report.table()
    assert "modelled time" in text and "SBUF high water" in text and "NeuronCore-v3" in text
    report.write_trace(tmp_path / "trace.json")
    trace = json.loads((tmp_path / "trace.json").read_text())
    complete = [e for e in trace["traceEvents"] if e["ph"] == "X"]
    assert len(complete) == len(report.timeline.spans)
    assert all("test_timeline.py:" in e["args"]["line"] for e in complete)
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    report.plot(tmp_path / "lanes.png")
    assert (tmp_path / "lanes.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_hot_lines_name_the_expensive_line():
    line, count, busy = run(two_engines("apart")).hot_lines(1)[0]
    assert "test_timeline.py:" in line and count == 8 and busy > 0
