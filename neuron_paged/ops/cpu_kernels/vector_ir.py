# SPDX-License-Identifier: Apache-2.0
"""LLVM IR building blocks of the CPU kernels: vectors of fp32 lanes, conversions, exponential, transposition.

numba compiles the scalar control flow; arithmetic is written here as explicit vector IR, because auto-vectorisation
does not reach register-blocked loops. LLVM turns `<lanes x float>` into AVX-512, AVX2, SSE or NEON. Addresses are i64.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache

import llvmlite.binding as llvm
import numba
from llvmlite import ir

from nki_kernels.layout import FP8_E4M3_MAX

F32, I64, I32, I16, I8, VOID = (
    ir.FloatType(),
    ir.IntType(64),
    ir.IntType(32),
    ir.IntType(16),
    ir.IntType(8),
    ir.VoidType(),
)

# Codes of element types, as the kernels' arguments carry them.
FP32, BF16, FP16, FP8 = range(4)
DTYPE_CODES = (FP32, BF16, FP16, FP8)
ELEMENT_BYTES = (4, 2, 2, 1)

# 2**f on [-0.5, 0.5]: minimax polynomial of degree 6 (relative error 2e-9, below fp32 rounding), constant term first.
EXP2_COEFFICIENTS = (
    1.0,
    0.6931472057372673,
    0.24022646890634292,
    0.055503287769656434,
    0.009618488957108423,
    0.001339993121914494,
    0.00015345812003834507,
)
LOG2_E = 1.4426950216293335  # log2(e) as fp32, and what that leaves
LOG2_E_REST = 1.9259629911e-08
LN_2 = 0.6931471805599453
ROUND_MAGIC = 12582912.0  # 1.5 * 2**23: adding it leaves the nearest integer in the low mantissa bits


@dataclass(frozen=True)
class Target:
    """What the micro-kernels are shaped for. lanes: fp32 per vector register; vectors: accumulators per row."""

    lanes: int
    vectors: int

    @property
    def registers(self) -> int:
        return 32 if self.vectors == 4 else 16


@lru_cache(maxsize=1)
def target() -> Target:
    """Shape for the processor numba compiles for (its own override first, then the host)."""
    features = numba.config.CPU_FEATURES
    if features is None:
        features = llvm.get_host_cpu_features().flatten()
    if "+avx512f" in features:
        return Target(lanes=16, vectors=4)
    if "+avx," in features or "+avx2" in features:
        return Target(lanes=8, vectors=2)  # 16 registers: 6 rows x 2 accumulators, 2 columns, 1 broadcast
    return Target(lanes=4, vectors=4 if "+neon" in features else 2)


def vec(lanes: int, element: ir.Type = F32) -> ir.Type:
    """Vector type; one lane is a plain vector of length 1, so that tails share the code."""
    return ir.VectorType(element, lanes)


def constant(value: float, lanes: int, element: ir.Type = F32) -> ir.Constant:
    return ir.Constant(vec(lanes, element), [value] * lanes)


def splat(b: ir.IRBuilder, scalar: ir.Value, lanes: int) -> ir.Value:
    one = b.insert_element(ir.Constant(vec(lanes, scalar.type), ir.Undefined), scalar, I32(0))
    return b.shuffle_vector(one, one, ir.Constant(ir.VectorType(I32, lanes), [0] * lanes))


def load(b: ir.IRBuilder, address: ir.Value, kind: ir.Type) -> ir.Value:
    """Load at an i64 address, aligned to one element only."""
    element = kind.element if isinstance(kind, ir.VectorType) else kind
    align = {F32: 4, I32: 4, I64: 8, I16: 2, I8: 1}.get(element, 2)
    return b.load(b.inttoptr(address, ir.PointerType(kind)), align=align)


def store(b: ir.IRBuilder, value: ir.Value, address: ir.Value) -> None:
    element = value.type.element if isinstance(value.type, ir.VectorType) else value.type
    align = {F32: 4, I32: 4, I64: 8, I16: 2, I8: 1}.get(element, 2)
    b.store(value, b.inttoptr(address, ir.PointerType(value.type)), align=align)


def intrinsic_call(b: ir.IRBuilder, name: str, args: list[ir.Value]) -> ir.Value:
    """Call an LLVM intrinsic on fp32 vectors, such as llvm.fma.v16f32."""
    kind = args[0].type
    name = f"{name}.v{kind.count}f32"
    function = b.module.globals.get(name)
    if function is None:
        function = ir.Function(b.module, ir.FunctionType(kind, [kind] * len(args)), name)
    return b.call(function, args)


def fma(b: ir.IRBuilder, x: ir.Value, y: ir.Value, z: ir.Value) -> ir.Value:
    return intrinsic_call(b, "llvm.fma", [x, y, z])


def maximum(b: ir.IRBuilder, x: ir.Value, y: ir.Value) -> ir.Value:
    """The larger; y where one is NaN (a single max instruction on x86)."""
    return b.select(b.fcmp_ordered(">", x, y), x, y)


def reduce_lanes(
    b: ir.IRBuilder, x: ir.Value, combine: Callable[[ir.IRBuilder, ir.Value, ir.Value], ir.Value]
) -> ir.Value:
    """Fold a vector to a scalar by halves."""
    lanes = x.type.count
    while lanes > 1:
        lanes //= 2
        undefined = ir.Constant(x.type, ir.Undefined)
        low, high = (
            b.shuffle_vector(x, undefined, ir.Constant(ir.VectorType(I32, lanes), list(range(start, start + lanes))))
            for start in (0, lanes)
        )
        x = combine(b, low, high)
    return b.extract_element(x, I32(0))


def add(b: ir.IRBuilder, x: ir.Value, y: ir.Value) -> ir.Value:
    return b.fadd(x, y)


def exp2(b: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """2**x for x <= 0, NaN stays NaN, below -126 gives about 1e-38."""
    lanes = x.type.count
    x = b.select(b.fcmp_ordered("<", x, constant(-126.0, lanes)), constant(-126.0, lanes), x)
    shifted = b.fadd(x, constant(ROUND_MAGIC, lanes))
    fraction = b.fsub(x, b.fsub(shifted, constant(ROUND_MAGIC, lanes)))
    result: ir.Value = constant(EXP2_COEFFICIENTS[-1], lanes)
    for coefficient in EXP2_COEFFICIENTS[-2::-1]:
        result = fma(b, result, fraction, constant(coefficient, lanes))
    exponent = b.shl(b.bitcast(shifted, vec(lanes, I32)), constant(23, lanes, I32))
    return b.bitcast(b.add(b.bitcast(result, vec(lanes, I32)), exponent), vec(lanes))


def tanh(b: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """Series where |x| < 0.25 (1 - exp would cancel), (1 - e) / (1 + e) with e = exp(-2|x|) elsewhere."""
    lanes = x.type.count
    one = constant(1.0, lanes)
    size = intrinsic_call(b, "llvm.fabs", [x])
    square = b.fmul(x, x)
    series: ir.Value = constant(62 / 2835, lanes)
    for coefficient in (-17 / 315, 2 / 15, -1 / 3, 1.0):
        series = fma(b, series, square, constant(coefficient, lanes))
    e = exp2(b, b.fmul(size, constant(-2.8853900817779268, lanes)))  # 2 / ln 2
    ratio = intrinsic_call(b, "llvm.copysign", [b.fdiv(b.fsub(one, e), b.fadd(one, e)), x])
    return b.select(b.fcmp_ordered("<", size, constant(0.25, lanes)), b.fmul(x, series), ratio)


def silu_times(b: ir.IRBuilder, gate: ir.Value, up: ir.Value) -> ir.Value:
    """gate · sigmoid(gate) · up."""
    lanes = gate.type.count
    # exp2 takes arguments <= 0 and never gives less than 1e-38: below -88 the gate's product with it is as good as 0.
    # With e = exp(-|x|), sigmoid(x) = 1 / (1 + e) or, for x < 0, e / (1 + e).
    floor = constant(-88.0, lanes)
    gate = b.select(b.fcmp_ordered("<", gate, floor), floor, gate)
    size, most = intrinsic_call(b, "llvm.fabs", [gate]), constant(88.0, lanes)
    size = b.select(b.fcmp_ordered(">", size, most), most, size)
    power = b.fmul(size, constant(-LOG2_E, lanes))
    e = exp2(b, power)
    # The product's rounding error, and that of its constant, would cost four bits of a large power.
    rest = fma(b, size, constant(-LOG2_E, lanes), b.fneg(power))
    rest = fma(b, size, constant(-LOG2_E_REST, lanes), rest)
    e = fma(b, e, b.fmul(rest, constant(LN_2, lanes)), e)
    one = constant(1.0, lanes)
    numerator = b.select(b.fcmp_ordered("<", gate, constant(0.0, lanes)), e, one)
    return b.fdiv(b.fmul(b.fmul(gate, numerator), up), b.fadd(one, e))


def load_fp32(b: ir.IRBuilder, address: ir.Value, code: int, lanes: int) -> ir.Value:
    """Load elements of type `code` as fp32."""
    if code == FP32:
        return load(b, address, vec(lanes))
    if code == BF16:
        bits = b.zext(load(b, address, vec(lanes, I16)), vec(lanes, I32))
        return b.bitcast(b.shl(bits, constant(16, lanes, I32)), vec(lanes))
    if code == FP16:
        return b.fpext(b.bitcast(load(b, address, vec(lanes, I16)), vec(lanes, ir.HalfType())), vec(lanes))
    # e4m3 bits moved into a half are the value / 2**8, subnormals included; 0x7f is the only NaN.
    bits16 = b.zext(load(b, address, vec(lanes, I8)), vec(lanes, I16))
    magnitude = b.and_(bits16, constant(0x7F, lanes, I16))
    sign = b.shl(b.and_(bits16, constant(0x80, lanes, I16)), constant(8, lanes, I16))
    half = b.or_(sign, b.shl(magnitude, constant(7, lanes, I16)))
    is_nan = b.icmp_unsigned("==", magnitude, constant(0x7F, lanes, I16))
    half = b.select(is_nan, constant(0x7E00, lanes, I16), half)
    return b.fmul(b.fpext(b.bitcast(half, vec(lanes, ir.HalfType())), vec(lanes)), constant(256.0, lanes))


def store_fp32(b: ir.IRBuilder, x: ir.Value, address: ir.Value, code: int) -> None:
    """Store fp32 lanes as elements of type `code`, rounded to nearest even; fp8 saturates at ±FP8_E4M3_MAX."""
    lanes = x.type.count
    if code == FP32:
        store(b, x, address)
        return
    if code == FP16:
        store(b, b.bitcast(b.fptrunc(x, vec(lanes, ir.HalfType())), vec(lanes, I16)), address)
        return

    def i32(value: int) -> ir.Constant:
        return constant(value, lanes, I32)

    is_nan = b.fcmp_unordered("uno", x, x)
    if code == BF16:
        bits = b.bitcast(x, vec(lanes, I32))
        odd = b.and_(b.lshr(bits, i32(16)), i32(1))
        rounded = b.lshr(b.add(b.add(bits, odd), i32(0x7FFF)), i32(16))
        store(b, b.trunc(b.select(is_nan, i32(0x7FC0), rounded), vec(lanes, I16)), address)
        return
    size = intrinsic_call(b, "llvm.fabs", [x])
    limit = constant(FP8_E4M3_MAX, lanes)
    size = b.select(b.fcmp_ordered(">", size, limit), limit, size)
    bits = b.bitcast(size, vec(lanes, I32))
    odd = b.and_(b.lshr(bits, i32(20)), i32(1))
    normal = b.sub(b.lshr(b.add(b.add(bits, odd), i32(0x7FFFF)), i32(20)), i32(120 << 3))  # exponent bias 127 -> 7
    # Below 2**-6 the codes count multiples of 2**-9, the last mantissa bit of numbers around 1.5 * 2**14.
    magic = b.fadd(size, constant(24576.0, lanes))
    subnormal = b.sub(b.bitcast(magic, vec(lanes, I32)), i32(0x46C00000))
    is_subnormal = b.fcmp_ordered("<", size, constant(2.0**-6, lanes))
    magnitude = b.select(is_nan, i32(0x7F), b.select(is_subnormal, subnormal, normal))
    sign = b.and_(b.lshr(b.bitcast(x, vec(lanes, I32)), i32(24)), i32(0x80))
    store(b, b.trunc(b.or_(magnitude, sign), vec(lanes, I8)), address)


def prefetch(b: ir.IRBuilder, address: ir.Value) -> None:
    """Ask for the cache line at `address`, which may be any number, for reading."""
    pointer = ir.PointerType(I8)
    name = "llvm.prefetch.p0"
    function = b.module.globals.get(name)
    if function is None:
        function = ir.Function(b.module, ir.FunctionType(VOID, [pointer, I32, I32, I32]), name)
    b.call(function, [b.inttoptr(address, pointer), I32(0), I32(3), I32(1)])


def sum_lanes(b: ir.IRBuilder, vectors: list[ir.Value]) -> ir.Value:
    """Lane sums of `lanes` vectors as one vector: lane i is the sum over vectors[i].

    Pairs are merged by two shuffles and an addition; the masks are those of single x86 instructions (unpack, 128-bit
    shuffles), which work within quads of lanes first.
    """
    lanes = len(vectors)
    quads = range(0, lanes, 4)
    second = lanes  # masks number the second vector's lanes from here
    steps = [
        ([j for q in quads for j in (q, second + q, q + 1, second + q + 1)],
         [j for q in quads for j in (q + 2, second + q + 2, q + 3, second + q + 3)]),
        ([j for q in quads for j in (q, q + 1, second + q, second + q + 1)],
         [j for q in quads for j in (q + 2, q + 3, second + q + 2, second + q + 3)]),
    ]  # fmt: skip
    if lanes == 8:
        steps.append(([*range(4), *range(8, 12)], [*range(4, 8), *range(12, 16)]))
    if lanes == 16:
        steps.append(([*range(8), *range(16, 24)], [*range(8, 16), *range(24, 32)]))
        even, odd = ([quad + i for quad in places for i in range(4)] for places in ((0, 8, 16, 24), (4, 12, 20, 28)))
        steps.append((even, odd))
    for low_mask, high_mask in steps:
        merged = []
        for first, other in zip(vectors[0::2], vectors[1::2], strict=True):
            low, high = (
                b.shuffle_vector(first, other, ir.Constant(ir.VectorType(I32, lanes), mask))
                for mask in (low_mask, high_mask)
            )
            merged.append(b.fadd(low, high))
        vectors = merged
    return vectors[0]


def transpose(b: ir.IRBuilder, rows: list[ir.Value]) -> list[ir.Value]:
    """Transpose `lanes` vectors of `lanes`: exchange off-diagonal halves of 1, 2, 4, … lanes."""
    lanes, rows = len(rows), list(rows)
    step = 1
    while step < lanes:
        low_mask = [j if not j & step else lanes + j - step for j in range(lanes)]
        high_mask = [j + step if not j & step else lanes + j for j in range(lanes)]
        for i in range(lanes):
            if not i & step:
                low, high = (
                    b.shuffle_vector(rows[i], rows[i + step], ir.Constant(ir.VectorType(I32, lanes), mask))
                    for mask in (low_mask, high_mask)
                )
                rows[i], rows[i + step] = low, high
        step *= 2
    return rows


@contextmanager
def counted_loop(b: ir.IRBuilder, start: ir.Value, stop: ir.Value, step: int) -> Iterator[ir.Value]:
    """for (i = start; i + step <= stop; i += step)"""
    function = b.function
    with b.goto_entry_block():
        slot = b.alloca(I64)
    b.store(start, slot)
    head, body, done = (function.append_basic_block(name) for name in ("head", "body", "done"))
    b.branch(head)
    b.position_at_end(head)
    index = b.load(slot)
    b.cbranch(b.icmp_signed("<=", b.add(index, I64(step)), stop), body, done)
    b.position_at_end(body)
    yield index
    b.store(b.add(index, I64(step)), slot)
    b.branch(head)
    b.position_at_end(done)


def for_lanes(b: ir.IRBuilder, count: ir.Value, lanes: int, body: Callable[[ir.Value, int], None]) -> None:
    """Run `body(index, lanes)` over `count` elements: full vectors first, then one lane at a time."""
    with counted_loop(b, I64(0), count, lanes) as index:
        body(index, lanes)
    if lanes > 1:
        done = b.mul(b.sdiv(count, I64(lanes)), I64(lanes))
        with counted_loop(b, done, count, 1) as index:
            body(index, 1)


def define(module: ir.Module, name: str, arguments: list[ir.Type], body: Callable[..., None]) -> ir.Function:
    """A function private to the module, made once; `body(builder, *arguments)` fills it."""
    existing = module.globals.get(name)
    if existing is not None:
        return existing
    function = ir.Function(module, ir.FunctionType(VOID, arguments), name)
    function.linkage = "internal"
    function.attributes.add("noinline")  # bodies are register-blocked; merged, they would only compile longer
    builder = ir.IRBuilder(function.append_basic_block("entry"))
    body(builder, *function.args)
    builder.ret_void()
    return function


def switch_call(b: ir.IRBuilder, selector: ir.Value, functions: dict[int, ir.Function], args: list[ir.Value]) -> None:
    """Call the function that belongs to the selector's value; do nothing for any other value."""
    done = b.function.append_basic_block("switch_done")
    switch = b.switch(selector, done)
    for value, function in functions.items():
        block = b.function.append_basic_block("case")
        switch.add_case(I64(value), block)
        b.position_at_end(block)
        b.call(function, args)
        b.branch(done)
    b.position_at_end(done)
