# SPDX-License-Identifier: Apache-2.0
"""Every law: the violating kernel raises with instruction, operand and line; its conforming twin runs.

Longer than other test files because it holds the table of laws.
"""

import numpy as np
import pytest

from nki_kernels import simulator
from nki_kernels.toolchain import nisa, nl

CASES = {}


def law(match, target="trn2", error=simulator.LawError, strict=False):
    def register(fn):
        CASES[fn.__name__] = (fn, match, target, error, strict)
        return fn

    return register


def tile(shape, dtype=nl.float32, buffer=nl.sbuf, value=0, **where):
    out = nl.ndarray(shape, dtype=dtype, buffer=buffer, **where)
    nisa.memset(dst=out, value=value if "int" in dtype else float(value))
    return out


def hbm(shape, dtype=nl.float32, value=0):
    return nl.full(shape, value, dtype=dtype, buffer=nl.private_hbm)


# ---- tiles and operands -------------------------------------------------------------------------------------------
@law("partition dimension 129 exceeds 128")
def partition_limit(bad):
    nl.ndarray((129 if bad else 128, 4), dtype=nl.float32, buffer=nl.sbuf)


@law("at least 2 dimensions")
def on_chip_rank(bad):
    nl.ndarray((128,) if bad else (128, 1), dtype=nl.float32, buffer=nl.sbuf)


@law("229380 bytes per partition exceed the 229376")
def one_tile_exceeds_sbuf(bad):
    nl.ndarray((128, 57345 if bad else 57344), dtype=nl.float32, buffer=nl.sbuf)


@law("address: partitions 64..192, bytes 0..16 leave the 128 partitions")
def address_beyond_memory(bad):
    nl.ndarray((128 if bad else 64, 4), dtype=nl.float32, buffer=nl.sbuf, address=(64, 0))


@law("SBUF: live tiles need", error=simulator.CapacityError)
def summed_sbuf(bad):
    tiles = [tile((128, 20_000)) for _ in range(3 if bad else 2)]
    out = tile((128, 20_000))
    for t in tiles:
        nisa.tensor_tensor(dst=out, data1=out, data2=t, op=nl.add)
        if not bad:
            break


@law("PSUM: live tiles need 9 banks", error=simulator.CapacityError)
def summed_psum_banks(bad):
    tiles = [tile((128, 8), buffer=nl.psum) for _ in range(9 if bad else 8)]
    out = tile((128, 8))
    for t in tiles:
        nisa.tensor_copy(dst=out, src=t)


@law(r"tensor_copy: src: .* starts at partition 16")
def start_partition(bad):
    x = tile((128, 4))
    begin = 16 if bad else 32
    nisa.tensor_copy(dst=tile((32, 4)), src=x[begin : begin + 32])


@law(r"tensor_copy: src: .* starts at partition 32; 64 partitions may start at \(0, 64\)")
def start_partition_of_64(bad):
    x = tile((128, 4))
    begin = 32 if bad else 64
    nisa.tensor_copy(dst=tile((64, 4)), src=x[begin : begin + 64])


@law(r"tensor_copy: src: .* steps over partitions")
def partition_step(bad):
    x = tile((128, 4))
    nisa.tensor_copy(dst=tile((32, 4)), src=x[0:64:2] if bad else x[0:32])


@law(r"tensor_copy: src: \(4, 8\) does not match dst \(4, 4\)")
def element_counts(bad):
    nisa.tensor_copy(dst=tile((4, 4)), src=tile((4, 8 if bad else 4)))


@law(r"tensor_tensor: data1: .* is in private_hbm, need SBUF or PSUM")
def compute_on_hbm(bad):
    x = hbm((4, 4)) if bad else tile((4, 4))
    nisa.tensor_tensor(dst=tile((4, 4)), data1=x, data2=tile((4, 4)), op=nl.add)


@law("data1, data2: both are in PSUM")
def two_psum_inputs(bad):
    p, q = tile((4, 4), buffer=nl.psum), tile((4, 4), buffer=nl.psum if bad else nl.sbuf)
    nisa.tensor_tensor(dst=tile((4, 4)), data1=p, data2=q, op=nl.add)


@law("tensor_copy: engine: gpsimd cannot run it")
def gpsimd_reads_psum(bad):
    src = tile((4, 4), buffer=nl.psum if bad else nl.sbuf)
    nisa.tensor_copy(dst=tile((4, 4)), src=src, engine=nisa.engine.gpsimd)


@law("tensor_copy: engine: scalar cannot run it on NeuronCore-v2", target="trn1")
def scalar_copy_on_v2(bad):
    nisa.tensor_copy(dst=tile((4, 4)), src=tile((4, 4)), engine=nisa.engine.scalar if bad else nisa.engine.vector)


@law("is a broadcast view")
def write_to_broadcast(bad):
    x = tile((4, 1))
    nisa.memset(dst=x.broadcast(1, 4) if bad else x, value=1.0)


@law("partly overlaps dst")
def partial_overlap(bad):
    x = tile((4, 16))
    nisa.tensor_copy(dst=x[:, 1:9], src=x[:, 0:8] if bad else x[:, 1:9])


@law("tensor_reduce: dst: lies inside data", error=simulator.StrictError, strict=True)
def reduce_into_its_input(bad):
    x = tile((4, 2))
    nisa.tensor_reduce(dst=x[:, 0:1] if bad else tile((4, 1)), op=nl.maximum, data=x, axis=1)


@law("memset: value: 1.5 for a int32 tile")
def memset_type(bad):
    x = nl.ndarray((4, 4), dtype=nl.int32, buffer=nl.sbuf)
    nisa.memset(dst=x, value=1.5 if bad else 1)


@law("tensor_reduce: axis")
def reduce_axis(bad):
    nisa.tensor_reduce(dst=tile((4, 2 if not bad else 8)), op=nl.add, data=tile((4, 2, 8)), axis=1 if bad else 2)


@law("dtype float32; bitvec operators")
def bitvec_on_floats(bad):
    dtype = nl.float32 if bad else nl.int32
    x = tile((4, 4), dtype=dtype)
    nisa.tensor_tensor(dst=tile((4, 4), dtype=dtype), data1=x, data2=x, op=nl.bitwise_and)


@law("different classes")
def mixed_operator_classes(bad):
    x = tile((4, 4), dtype=nl.int32)
    nisa.tensor_scalar(dst=x, data=x, op0=nl.bitwise_and, operand0=1, op1=nl.add if bad else nl.bitwise_or, operand1=1)


@law("integer above 2\\^24")
def index_maths_above_2_24(bad):
    x = tile((4, 4), dtype=nl.int32, value=(1 << 24) + 1 if bad else 1 << 24)
    nisa.tensor_scalar(dst=tile((4, 4), dtype=nl.float32), data=x, op0=nl.multiply, operand0=1.0)


@law("operand0: \\(4, 2\\), need \\[4, 1\\]")
def operand_vector_shape(bad):
    nisa.tensor_scalar(dst=tile((4, 4)), data=tile((4, 4)), op0=nl.add, operand0=tile((4, 2 if bad else 1)))


@law("operand0: dtype bfloat16, need float32", error=simulator.StrictError, strict=True)
def operand_vector_dtype(bad):
    vector = tile((4, 1), dtype=nl.bfloat16 if bad else nl.float32)
    nisa.tensor_scalar(dst=tile((4, 4)), data=tile((4, 4)), op0=nl.add, operand0=vector)


@law("predicate: dtype float32")
def predicate_dtype(bad):
    predicate = tile((4, 4), dtype=nl.float32 if bad else nl.uint8)
    nisa.tensor_copy_predicated(dst=tile((4, 4)), src=1.0, predicate=predicate)


@law("the hardware has FP32_MIN")
def range_select_fill(bad):
    bound = tile((4, 1))
    nisa.range_select(
        dst=tile((4, 4)), on_true_tile=tile((4, 4)), comp_op0=nl.greater_equal, comp_op1=nl.less, bound0=bound,
        bound1=bound, on_false_value=-1e30 if bad else -3.4028235e38, reduce_res=tile((4, 1)),
    )  # fmt: skip


@law("reduce_cmd: reduce without a reset")
def accumulator_without_reset(bad):
    x = tile((4, 4))
    command = nisa.reduce_cmd.reduce if bad else nisa.reduce_cmd.reset_reduce
    nisa.activation(dst=x, op=nl.exp, data=x, reduce_op=nl.add, reduce_res=tile((4, 1)), reduce_cmd=command)


@law("bias: constant 1.0: NeuronCore-v2", target="trn1")
def constant_bias_on_v2(bad):
    x = tile((4, 4))
    nisa.activation(dst=x, op=nl.exp, data=x, bias=1.0 if bad else tile((4, 1)))


# ---- generations --------------------------------------------------------------------------------------------------
@law("needs NeuronCore-v4", target="trn2")
def exponential_needs_v4(bad):
    x = tile((4, 4))
    if bad or nisa.get_nc_version() >= nisa.nc_version.gen4:
        nisa.exponential(dst=x, src=x)


@law("needs NeuronCore-v3", target="trn1")
def hwdge_needs_v3(bad):
    mode = nisa.dge_mode.hwdge if bad else nisa.dge_mode.unknown
    nisa.dma_copy(dst=tile((4, 4)), src=hbm((4, 4)), dge_mode=mode)


# ---- TensorE ------------------------------------------------------------------------------------------------------
def matmul(k=128, m=128, n=512, dtype=nl.bfloat16, moving_dtype=None, accumulate=False, out=None):
    out = nl.ndarray((m, n), dtype=nl.float32, buffer=nl.psum) if out is None else out
    x, y = tile((k, m), dtype=dtype), tile((k, n), dtype=moving_dtype or dtype)
    nisa.nc_matmul(dst=out, stationary=x, moving=y, accumulate=accumulate)
    return out


@law("nc_matmul: moving: free size 513 exceeds 512")
def matmul_n(bad):
    matmul(n=513 if bad else 512)


@law("nc_matmul: stationary: free size 256 exceeds 128")
def matmul_m(bad):
    out = nl.ndarray((128, 4), dtype=nl.float32, buffer=nl.psum)
    x = tile((128, 256 if bad else 128), dtype=nl.bfloat16)
    nisa.nc_matmul(dst=out, stationary=x, moving=tile((128, 4), dtype=nl.bfloat16), accumulate=False)


@law("nc_matmul: dst: .* is in sbuf, need PSUM")
def matmul_dst_buffer(bad):
    matmul(n=4, out=tile((128, 4), buffer=nl.sbuf if bad else nl.psum))


@law("fp32 only with fp32")
def matmul_mixed_fp32(bad):
    matmul(dtype=nl.float32, moving_dtype=nl.bfloat16 if bad else nl.float32)


@law("crossing a 2048-byte PSUM bank")
def matmul_crosses_bank(bad):
    out = nl.ndarray((128, 1024), dtype=nl.float32, buffer=nl.psum)
    matmul(n=256, out=out[:, 384:640] if bad else out[:, 256:512])


@law("True on .* initialised by memset")
def accumulate_onto_memset(bad):
    out = tile((128, 4), buffer=nl.psum)
    if not bad:
        matmul(n=4, out=out)
    matmul(n=4, out=out, accumulate=True)


@law("no matmul has written")
def accumulate_onto_fresh(bad):
    matmul(n=4, accumulate=bad)


@law("several accumulation chains", target="trn1", error=simulator.StrictError, strict=True)
def two_chains_in_one_psum_tensor(bad):
    shared = nl.ndarray((128, 8), dtype=nl.float32, buffer=nl.psum)
    other = shared if bad else nl.ndarray((128, 8), dtype=nl.float32, buffer=nl.psum)
    for step in range(2):
        matmul(n=4, out=shared[:, 0:4], accumulate=step > 0)
        matmul(n=4, out=other[:, 4:8], accumulate=step > 0)


@law("accumulate=None is inferred", error=simulator.StrictError, strict=True)
def strict_wants_accumulate(bad):
    matmul(n=4, accumulate=None if bad else False)


@law(r"\[33, 32\] exceeds \[32, 32\] on VectorE")
def vector_transpose_size(bad):
    n = 33 if bad else 32
    nisa.nc_transpose(dst=tile((32, n)), data=tile((n, 32)), engine=nisa.engine.vector)


@law("nc_transpose: dst: dtype float32 differs")
def transpose_dtype(bad):
    dst = tile((32, 32), dtype=nl.float32 if bad else nl.bfloat16, buffer=nl.psum)
    nisa.nc_transpose(dst=dst, data=tile((32, 32), dtype=nl.bfloat16), engine=nisa.engine.tensor)


# ---- DMA ----------------------------------------------------------------------------------------------------------
@law("dma_copy: src: .* is in PSUM")
def dma_from_psum(bad):
    nisa.dma_copy(dst=hbm((4, 4)), src=tile((4, 4), buffer=nl.psum if bad else nl.sbuf))


def gather(index, table_rows=8, oob=nisa.oob_mode.error, **kwargs):
    table = hbm((table_rows, 16))
    pattern = [[16, index.shape[0]], [1, 16]]
    src = table.ap(pattern=pattern, vector_offset=index, indirect_dim=0)
    nisa.dma_copy(dst=tile((index.shape[0], 16)), src=src, oob_mode=oob, **kwargs)


@law("vector_offset: index 8 of partition 0 leaves the 8 rows", error=simulator.OutOfBoundsError)
def gather_out_of_bounds(bad):
    gather(tile((4, 1), dtype=nl.int32, value=8 if bad else 7))


@law("vector_offset: index -1", error=simulator.OutOfBoundsError)
def gather_negative_index(bad):
    gather(tile((4, 1), dtype=nl.int32, value=-1), oob=nisa.oob_mode.error if bad else nisa.oob_mode.skip)


@law("vector_offset: dtype int16")
def gather_index_dtype(bad):
    gather(tile((4, 1), dtype=nl.int16 if bad else nl.uint32))


@law(r"\(4, 2\), need \(P, 1\)")
def gather_index_shape(bad):
    gather(tile((4, 2 if bad else 1), dtype=nl.int32))


@law("hwdge cannot gather")
def gather_through_hwdge(bad):
    gather(tile((4, 1), dtype=nl.int32), dge_mode=nisa.dge_mode.hwdge if bad else nisa.dge_mode.swdge)


@law("hwdge cannot convert")
def hwdge_converts(bad):
    dst = tile((4, 4), dtype=nl.bfloat16 if bad else nl.float32)
    nisa.dma_copy(dst=dst, src=hbm((4, 4)), dge_mode=nisa.dge_mode.hwdge)


@law("dma_copy: src: integer above")
def dma_rounds_large_integers(bad):
    x = tile((4, 4), dtype=nl.int32, value=(1 << 24) + 1)
    nisa.dma_copy(dst=hbm((4, 4), dtype=nl.float32) if bad else hbm((4, 4), dtype=nl.int32), src=x)


def rows_from_3(step):
    """Four rows of an [8, 16] table, from row 3 on."""
    index = nl.ndarray((4, 1), dtype=nl.int32, buffer=nl.sbuf)
    nisa.iota(dst=index, pattern=[[0, 1]], offset=3, channel_multiplier=step)
    return hbm((8, 16)).ap(pattern=[[16, 4], [1, 16]], vector_offset=index, indirect_dim=0)


@law("row 3 is scattered to more than once", error=simulator.StrictError, strict=True)
def duplicate_scatter_rows(bad):
    nisa.dma_copy(dst=rows_from_3(0 if bad else 1), src=tile((4, 16)))


@law("row 3 is added to more than once")
def duplicate_rows_of_a_scatter_add(bad):
    rows = rows_from_3(0 if bad else 1)
    nisa.dma_compute(dst=rows, srcs=[rows, tile((4, 16))], reduce_op=nl.add)


@law("source of a vector scatter must be in SBUF")
def scatter_from_hbm(bad):
    index = nl.ndarray((4, 1), dtype=nl.int32, buffer=nl.sbuf)
    nisa.iota(dst=index, pattern=[[0, 1]], offset=0, channel_multiplier=1)
    dst = hbm((8, 16)).ap(pattern=[[16, 4], [1, 16]], vector_offset=index, indirect_dim=0)
    nisa.dma_copy(dst=dst, src=hbm((4, 16)) if bad else tile((4, 16)))


@law("dma_transpose: dst: .* need exactly")
def dma_transpose_shape(bad):
    dst = tile((32, 16) if not bad else (16, 32), dtype=nl.bfloat16)
    nisa.dma_transpose(dst=dst, src=hbm((16, 32), dtype=nl.bfloat16))


@law("scalar_tensor_tensor: dtype: no document", error=simulator.StrictError, strict=True)
def undocumented_argument(bad):
    x, extra = tile((4, 4)), {"dtype": nl.float32} if bad else {}
    nisa.scalar_tensor_tensor(dst=x, data=x, op0=nl.add, operand0=1.0, op1=nl.add, operand1=x, **extra)


# ---- views --------------------------------------------------------------------------------------------------------
@law("leaves|need 0 <= start < stop", error=simulator.OutOfBoundsError)
def slice_beyond_shape(bad):
    tile((4, 8))[:, 0 : 9 if bad else 8]


@law("first stride 4, need the 8 elements of a partition")
def ap_partition_stride(bad):
    tile((4, 8)).ap(pattern=[[4 if bad else 8, 4], [1, 4]])


@law("reaches element", error=simulator.OutOfBoundsError)
def ap_out_of_bounds(bad):
    hbm((4, 8)).ap(pattern=[[8, 4], [1, 8]], offset=1 if bad else 0)


@law("not a whole tensor", error=simulator.StrictError, strict=True)
def ap_on_a_slice(bad):
    x = hbm((4, 8))
    (x[1:3] if bad else x).ap(pattern=[[8, 2], [1, 8]])


@law("not a whole tensor", error=simulator.StrictError, strict=True)
def ap_on_a_slice_of_a_tile(bad):
    x = tile((4, 8))
    (x[:, 4:8] if bad else x).ap(pattern=[[4 if bad else 8, 4], [1, 4]])


# ---- control ------------------------------------------------------------------------------------------------------
@law("more than 100 iterations", error=simulator.DeadlockError)
def endless_loop(bad):
    one = nisa.register_alloc(1)
    zero = nisa.register_alloc(0)
    nl.while_loop(one, lambda r: r if bad else zero)


@law("while_loop: more than 1000 instructions", error=simulator.DeadlockError)
def endless_loop_with_a_large_body(bad):
    one, zero, x = nisa.register_alloc(1), nisa.register_alloc(0), tile((4, 4))

    def body(r):
        for _ in range(100):
            nisa.memset(dst=x, value=1.0)
        return one if bad else zero

    nl.while_loop(one, body)


@law("device loops do not nest", target="trn1")
def nested_loops_on_v2(bad):
    def inner(i):
        return None

    def outer(i):
        if bad:
            nl.fori_loop(0, 2, inner)

    nl.fori_loop(0, 2, outer)


@law("tells presence, not content", error=simulator.StrictError, strict=True)
def truth_value_of_a_tensor(bad):
    x = hbm((4, 8))
    assert x if bad else x is not None


@law("a register has no value", error=TypeError)
def int_of_register(bad):
    register = nisa.register_alloc(3)
    int(register) if bad else None


@law("positive compile-time int")
def loop_step(bad):
    nl.fori_loop(0, 4, lambda i: None, step=-1 if bad else 2)


@pytest.mark.parametrize("name", sorted(CASES))
def test_violation_raises_and_twin_runs(name):
    fn, match, target, error, strict = CASES[name]
    with pytest.raises(error, match=match) as caught:
        simulator.run(fn, True, target=target, strict=strict, max_iterations=100)
    assert "test_law.py:" in str(caught.value)
    simulator.run(fn, False, target=target, strict=strict, max_iterations=100)


def test_poisoned_output_is_reported_and_strict_raises():
    def kernel(a, initialise):
        x = nl.ndarray((4, 8), dtype=nl.float32, buffer=nl.sbuf)
        if initialise:
            nisa.memset(dst=x, value=0.0)
        y = nl.ndarray((4, 8), dtype=nl.float32, buffer=nl.sbuf)
        nisa.dma_copy(dst=y, src=a)
        nisa.dma_copy(dst=x[:, 0:6], src=a[:, 0:6])
        nisa.tensor_tensor(dst=y, data1=x, data2=y, op=nl.add)
        out = nl.ndarray((4, 8), dtype=nl.float32, buffer=nl.shared_hbm)
        nisa.dma_copy(dst=out, src=y)
        return out

    a = np.ones((4, 8), np.float32)
    result = simulator.run(kernel, a, False)
    assert len(result.report.poisoned) == 1 and "8 elements" in result.report.poisoned[0]
    with pytest.raises(simulator.PoisonError, match="never written.*test_law.py"):
        simulator.run(kernel, a, False, strict=True)
    assert simulator.run(kernel, a, True, strict=True).report.poisoned == []


def test_unwritten_output_is_reported():
    def kernel(a):
        return nl.ndarray(a.shape, dtype=a.dtype, buffer=nl.shared_hbm)

    result = simulator.run(kernel, np.ones((2, 4), np.int32))
    assert "8 elements" in result.report.poisoned[0]


def test_poison_does_not_leave_masked_elements():
    """Unwritten elements that a predicated copy replaces are not reported."""

    def kernel(a):
        x = nl.ndarray((4, 8), dtype=nl.float32, buffer=nl.sbuf)
        mask = nl.ndarray((4, 8), dtype=nl.uint8, buffer=nl.sbuf)
        nisa.dma_copy(dst=x[:, 0:6], src=a[:, 0:6])
        nisa.memset(dst=mask, value=0)
        nisa.memset(dst=mask[:, 6:8], value=1)
        nisa.tensor_copy_predicated(dst=x, src=5.0, predicate=mask)
        out = nl.ndarray((4, 8), dtype=nl.float32, buffer=nl.shared_hbm)
        nisa.dma_copy(dst=out, src=x)
        return out

    result = simulator.run(kernel, np.ones((4, 8), np.float32), strict=True)
    np.testing.assert_array_equal(result.outputs[:, 6:], 5.0)


def test_tile_over_same_address_invalidates_the_older_one():
    def kernel(a, distance):
        old = nl.ndarray((4, 8), dtype=nl.float32, buffer=nl.sbuf, address=(0, 0))
        new = nl.ndarray((4, 8), dtype=nl.float32, buffer=nl.sbuf, address=(0, distance))
        nisa.dma_copy(dst=old, src=a)
        nisa.memset(dst=new, value=0.0)
        out = nl.ndarray((4, 8), dtype=nl.float32, buffer=nl.shared_hbm)
        nisa.dma_copy(dst=out, src=old)
        return out

    a = np.ones((4, 8), np.float32)
    with pytest.raises(simulator.PoisonError, match="16 elements"):
        simulator.run(kernel, a, 16, strict=True)
    np.testing.assert_array_equal(simulator.run(kernel, a, 32, strict=True).outputs, a)


def test_cross_core_read_without_barrier_raises_under_strict():
    def kernel(a, barrier):
        shared = nl.ndarray((2, 8), dtype=nl.float32, buffer=nl.shared_hbm)
        mine = nl.program_id(0)
        x = nl.ndarray((1, 8), dtype=nl.float32, buffer=nl.sbuf)
        nisa.dma_copy(dst=x, src=a[mine : mine + 1])
        nisa.dma_copy(dst=shared[mine : mine + 1], src=x)
        if barrier:
            nisa.core_barrier(data=shared, cores=(0, 1))
        nisa.dma_copy(dst=x, src=shared[1 - mine : 2 - mine])
        out = nl.ndarray((2, 8), dtype=nl.float32, buffer=nl.shared_hbm)
        nisa.dma_copy(dst=out[mine : mine + 1], src=x)
        return out

    a = np.arange(16, dtype=np.float32).reshape(2, 8)
    np.testing.assert_array_equal(simulator.run(kernel, a, True, grid=2, strict=True).outputs, a[::-1])
    with pytest.raises(simulator.KernelError, match="core_barrier|never written"):
        simulator.run(kernel, a, False, grid=2, strict=True)


def test_one_sided_barrier_is_a_deadlock():
    def kernel(a):
        if nl.program_id(0) == 0:
            nisa.core_barrier(data=a, cores=(0, 1))

    with pytest.raises(simulator.DeadlockError, match="core 0 waits in core_barrier, core 1 has finished"):
        simulator.run(kernel, np.ones((2, 2), np.float32), grid=2)
