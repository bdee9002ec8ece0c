# SPDX-License-Identifier: Apache-2.0
"""Source lint: every rule on a violating and a conforming kernel, reachability, suppression and the command.

Longer than other test files because it holds the table of all rules.
"""

import ast
import inspect
import io
import textwrap
from pathlib import Path

import pytest

from nki_kernels.simulator import isa
from nki_kernels.source_lint import RULES, SourceError, format_findings, lint_file, lint_source, run_lint
from nki_kernels.source_lint.signatures import SIGNATURES

HEADER = """\
import functools
import math
from enum import Enum
import numpy as np
import nki
import nki.isa as nisa
import nki.language as nl

"""
SBUF = "nl.ndarray((128, 512), dtype=nl.float32, buffer=nl.sbuf)"
PSUM = "nl.ndarray((128, 512), dtype=nl.float32, buffer=nl.psum)"
SECOND_KERNEL = "@nki.jit\ndef second(x):\n    return x\n\n\n"
TILES = f"t = {SBUF}\nu = {SBUF}\nacc = {PSUM}\n"


def kernel(body: str, above: str = "", signature: str = "x, n") -> str:
    """A module with one decorated kernel of the given body, after the definitions in `above`."""
    return (HEADER + textwrap.dedent(above) + f"\n@nki.jit\ndef kernel({signature}):\n"
            + textwrap.indent(textwrap.dedent(body).strip("\n"), "    ") + "\n")


def loop(body: str, call: str = "nl.fori_loop(0, n, step)", before: str = TILES) -> str:
    """A kernel with a device loop whose body function has the given statements."""
    return kernel(before + "def step(i):\n" + textwrap.indent(textwrap.dedent(body).strip("\n"), "    ") + f"\n{call}")


# rule, violating module, conforming module
LANGUAGE_CASES = [
    ("comprehension", kernel("a = [i for i in range(4)]"), kernel("a = []\nfor i in range(4):\n    a.append(i)")),
    ("comprehension", kernel("a = tuple(i for i in range(4))"), kernel("a = tuple([1, 2])")),
    ("comprehension", kernel("a = {str(i): i for i in x}"), kernel("a = {'k': 1}")),
    ("for-target", kernel("for a, b in x:\n    print(a)"), kernel("for a in x:\n    print(a[0])")),
    ("assign-target", kernel("c = [0, 1]\nc[0], d = x"), kernel("c, d = x\n(e, f), g = x")),
    ("assign-target", kernel("[c, d] = x"), kernel("c = d = x")),
    ("assign-target", kernel("c = [0]\nd = [0]\nc[0] = d[0] = n"), kernel("c = [0]\nc[0] = d = n")),
    ("starred", kernel("print(*x)"), kernel("print(x)")),
    ("starred", kernel("a, *b = x"), kernel("a, b = x")),
    ("starred", kernel("dict(**x)"), kernel("dict()")),
    ("varargs", kernel("print(n)", signature="x, *n"), kernel("print(n)")),
    ("kwargs-parameter", kernel("print(n)", signature="x, **n"), kernel("print(n)")),
    ("keyword-only", kernel("print(n)", signature="x, *, n=1"), kernel("print(n)", signature="x, n=1")),
    ("dict-key", kernel("a = {1: 2}"), kernel("a = {'1': 2}\na['b'] = 3")),
    ("dict-key", kernel("a = {n: 2}"), kernel("a = dict()\na[n] = 2")),
    ("set-value", kernel("a = {1, 2}"), kernel("a = [1, 2]")),
    ("set-value", kernel("a = set(x)"), kernel("a = list(x)")),
    ("constant-type", kernel("a = b'raw'"), kernel("a = 'text'")),
    ("constant-type", kernel("a = 2j"), kernel("a = 2.0")),
    ("int-range", kernel("a = 4294967295"), kernel("a = 2147483647")),
    ("lambda", kernel("a = lambda i: i"), kernel("a = twice", "def twice(i):\n    return 2 * i\n")),
    ("inner-function", kernel("def f(i):\n    return i\nf(n)"), kernel("f(n)", "def f(i):\n    return i\n")),
    ("inner-function", kernel("def f(i):\n    print(1)\nnl.fori_loop(0, n, f)\nf(0)"),
     kernel("def f(i):\n    print(1)\nnl.fori_loop(0, n, f)")),
    ("inner-class", kernel("class C(nl.NKIObject):\n    a: int = 1"),
     kernel("C()", "class C(nl.NKIObject):\n    a: int = 1\n")),
    ("local-import", kernel("import math\nprint(math.pi)"), kernel("print(math.pi)")),
    ("local-import", kernel("from math import pi"), kernel("print(math.pi)")),
    ("try", kernel("try:\n    print(n)\nexcept ValueError:\n    pass"), kernel("if n == 1:\n    print(n)")),
    ("raise", kernel("raise ValueError"), kernel("assert n == 1, f'n is {n}'")),
    ("global-nonlocal", kernel("global counter\ncounter = 1", "counter = 0\n"), kernel("counter = 1")),
    ("async-yield", kernel("yield n"), kernel("return n")),
    ("async-yield", HEADER + "@nki.jit\nasync def kernel(x):\n    return x\n", kernel("return x")),
    ("unsupported-statement", kernel("del n"), kernel("n = None")),
    ("unsupported-statement", kernel("match n:\n    case 1:\n        print(n)"), kernel("if n == 1:\n    print(n)")),
    ("walrus", kernel("if (a := n):\n    print(a)"), kernel("a = n\nif a:\n    print(a)")),
    ("loop-else", kernel("for i in range(4):\n    print(i)\nelse:\n    print(n)"),
     kernel("for i in range(4):\n    if i == 2:\n        break\n    else:\n        print(i)")),
    ("loop-else", kernel("while n < 4:\n    n += 1\nelse:\n    print(n)"), kernel("while n < 4:\n    n += 1")),
    ("with-context", kernel("with open('f') as f:\n    print(f)"), kernel("with nl.no_reorder():\n    print(n)")),
    ("matmul-operator", kernel("a = x @ n"), kernel("a = x * n")),
    ("format-spec", kernel("print(f'{n:.2f}')"), kernel("print(f'{n} {x!r}')")),
    ("is-operator", kernel("if n is True:\n    print(n)"), kernel("if n == True:\n    print(n)")),
    ("is-none", kernel("if n is not None:\n    print(n)"), kernel("if n != None:\n    print(n)")),
    ("host-builtin", kernel("for i in enumerate(x):\n    print(i)"), kernel("for i in range(len(x)):\n    print(i)")),
    ("host-builtin", kernel("a = sum(x)"), kernel("a = sum(x)", "def sum(v):\n    return v[0]\n")),
    ("min-max-arguments", kernel("a = min(1, 2, n)"), kernel("a = min(1, min(2, n))")),
    ("host-library", kernel("a = np.zeros((2, 2))"), kernel("a = nl.shared_constant(np.eye(2))\nb = np.pi")),
    ("mutable-global", kernel("a = SIZES[0]", "SIZES = [1, 2]\n"), kernel("a = SIZES[0]", "SIZES = (1, 2)\n")),
    ("mutable-global", kernel("a = SIZES", "SIZES = [i for i in range(3)]\n"),
     kernel("SIZES = n\na = SIZES", "SIZES = [1]\n")),
    ("jitted-subkernel", kernel("sub(x)", "@nki.jit\ndef sub(a):\n    return a\n"),
     kernel("sub(x)", "def sub(a):\n    return a\n")),
    ("jit-platform-target", HEADER + "@nki.jit(platform_target='trn1')\ndef kernel(x):\n    return x\n",
     kernel("return x")),
    ("jit-mode", HEADER + "@nki.jit(mode='trace')\ndef kernel(x):\n    return x\n", kernel("return x")),
    ("decorator", kernel("sub(x)", "@functools.cache\ndef sub(a):\n    return a\n"),
     kernel("sub(x)", "def sub(a):\n    return a\n")),
    ("class-base", kernel("C()", "class C:\n    a = 1\n"), kernel("C()", "class C(nl.NKIObject):\n    a = 1\n")),
    ("class-base", kernel("C()", "class B(nl.NKIObject):\n    a = 1\nclass C(B):\n    b = 1\n"),
     kernel("print(C.A)", "class C(Enum):\n    A = 1\n")),
    ("legacy-namespace", "import neuronxcc.nki as nki\n@nki.jit\ndef kernel(x):\n    return x\n", kernel("return x")),
    ("legacy-namespace", kernel("return old.exp", "import neuronxcc.nki.language as old\n"),
     kernel("return x", "import neuronxcc.nki.typing as nt\n", signature="x: nt.tensor")),
    ("list-argument", kernel("print(n)", signature="x, n=[1, 1]"), kernel("print(n)", signature="x, n=(1, 1)")),
    ("list-argument", kernel("print(n)", signature="x, n: list[int]"), kernel("print(n)", signature="x, n: tuple")),
]

API_CASES = [
    ("string-buffer", kernel("a = nl.ndarray((128, 8), nl.float32, 'sbuf')"), kernel(f"a = {SBUF}")),
    ("int-enum", kernel(TILES + "nisa.dma_copy(dst=t, src=x, dge_mode=2)"),
     kernel(TILES + "nisa.dma_copy(dst=t, src=x, dge_mode=nisa.dge_mode.swdge)")),
    ("mask-argument", kernel(TILES + "nisa.tensor_copy(dst=t, src=u, mask=n)"),
     kernel(TILES + "nisa.tensor_copy(dst=t, src=u)")),
    ("removed-api", kernel("a = nl.arange(128)"), kernel("a = range(128)")),
    ("removed-api", kernel("a = nl.mgrid[0:128, 0:512]"), kernel("a = x[0:128, 0:512]")),
    ("isa-arguments", kernel(TILES + "t2 = nisa.reciprocal(u)"), kernel(TILES + "nisa.reciprocal(t, u)")),
    ("isa-arguments", kernel(TILES + "nisa.dma_copy(dst=t, src=u, dst_rmw_op=nl.add)"),
     kernel(TILES + "nisa.dma_compute(dst=t, srcs=[t, u], reduce_op=nl.add)")),
    ("isa-arguments", kernel(TILES + "nisa.tensor_copy(t, u, nisa.engine.vector, 'name', 5)"),
     kernel(TILES + "nisa.tensor_copy(t, u, nisa.engine.vector, 'name')")),
    ("unknown-instruction", kernel(TILES + "nisa.tensor_scalr(dst=t, data=u, op0=nl.add, operand0=1.0)"),
     kernel(TILES + "nisa.tensor_scalar(dst=t, data=u, op0=nl.add, operand0=nisa.get_nc_version())")),
    ("undocumented-argument",
     kernel(TILES + "nisa.scalar_tensor_tensor(t, t, nl.add, 1.0, nl.add, u, dtype=nl.float32)"),
     kernel(TILES + "nisa.scalar_tensor_tensor(t, t, nl.add, 1.0, nl.add, u)")),
    ("deprecated-range", kernel("for i in nl.affine_range(4):\n    print(i)"),
     kernel("for i in range(4):\n    print(i)")),
    ("dynamic-range", kernel("for i in nl.dynamic_range(n):\n    print(1)"), loop("print(1)")),
    ("dynamic-range", kernel(TILES + "r = nisa.register_alloc(1)\nwhile r:\n    nisa.register_load(r, t)"),
     kernel("while n < 4:\n    n += 1")),
    ("experimental-api", kernel("a = nl.load(x)"), kernel(TILES + "nisa.dma_copy(dst=t, src=x)")),
    ("output-buffer", kernel("o = nl.ndarray((8, 8), dtype=x.dtype, buffer=nl.hbm)\nreturn o"),
     kernel("o = nl.ndarray((8, 8), dtype=x.dtype, buffer=nl.shared_hbm)\nreturn o")),
    ("output-buffer", kernel(TILES + "return x, t"),
     kernel("return tile(x)", f"def tile(a):\n    t = {SBUF}\n    return t\n")),
    ("output-buffer", kernel(TILES + "return t", SECOND_KERNEL) + "\nresult = kernel(np.ones(4), 2)\n",
     kernel(TILES + "return t", SECOND_KERNEL)),
    ("on-chip-result", kernel(TILES + "return t", SECOND_KERNEL),
     kernel(TILES + "return t", SECOND_KERNEL + "@nki.jit\ndef third(x):\n    return kernel(x, 1)\n")),
    ("on-chip-rank", kernel("a = nl.ndarray((128,), dtype=nl.float32)"),
     kernel("a = nl.ndarray((128,), dtype=nl.float32, buffer=nl.shared_hbm)")),
    ("partition-limit", kernel("a = nl.ndarray((256, 4), dtype=nl.float32, buffer=nl.psum)"),
     kernel("a = nl.ndarray((256, 4), dtype=nl.float32, buffer=nl.hbm)")),
    ("ap-on-view", kernel("a = x[0:4, :].ap([[8, 4], [1, 8]])"), kernel("a = x[...].ap([[8, 4], [1, 8]], offset=4)")),
    ("ap-on-view", kernel("a = x.slice(0, 0, 4).ap([[8, 4]])"), kernel("a = x.reshape((4, 8)).ap([[8, 4]])")),
    ("ap-indirection", kernel("a = x.ap([[8, 4], [1, 8]], vector_offset=n, indirect_dim=1)"),
     kernel("a = x.ap([[8, 4], [1, 8]], scalar_offset=n, indirect_dim=1)")),
    ("ap-indirection", kernel("a = x.ap([[8, 4]], vector_offset=n, scalar_offset=n)"),
     kernel("a = x.ap([[8, 4]], vector_offset=n, scalar_offset=None)")),
    ("tile-in-loop", kernel(f"for i in range(4):\n    t = {SBUF}\n    nisa.dma_copy(dst=t, src=x)"),
     kernel(f"ring = []\nfor i in range(4):\n    ring.append({SBUF})\nfor i in range(4):\n"
            "    nisa.dma_copy(dst=ring[i], src=x)")),
]

LOOP_CASES = [
    ("nested-device-loop", kernel("def inner(j):\n    print(1)\ndef outer(i):\n    nl.fori_loop(0, 4, inner)\n"
                                  "nl.fori_loop(0, n, outer)"),
     kernel("def a(j):\n    print(1)\ndef b(i):\n    print(2)\nnl.fori_loop(0, 4, a)\nnl.fori_loop(0, n, b)")),
    ("nested-device-loop", kernel("def outer(i):\n    helper(4)\nnl.fori_loop(0, n, outer)",
                                  "def tick(j):\n    print(1)\ndef helper(m):\n    nl.fori_loop(0, m, tick)\n"),
     kernel("def outer(i):\n    helper(4)\nnl.fori_loop(0, n, outer)", "def helper(m):\n    print(m)\n")),
    ("nested-device-loop", kernel("for i in nl.dynamic_range(n):\n    for j in nl.dynamic_range(4):\n        print(1)"),
     kernel("for i in nl.dynamic_range(n):\n    for j in range(4):\n        print(1)")),
    ("nested-device-loop",
     kernel("r = nisa.register_alloc(3)\nfor i in nl.dynamic_range(n):\n    while r:\n        print(1)"),
     kernel("k = 3\nfor i in nl.dynamic_range(n):\n    while k > 0:\n        k -= 1")),
    ("loop-body-callable", kernel("nl.fori_loop(0, n, functools.partial(print, 1))"), loop("print(1)")),
    ("loop-return", loop("return t"), loop("return None")),
    ("loop-return", loop("nisa.register_load(i, t)", "nl.while_loop(n, step)"),
     loop("nisa.register_load(i, t)\nreturn i", "nl.while_loop(n, step)")),
    ("loop-jump", kernel("for i in nl.dynamic_range(n):\n    break"),
     kernel("for i in nl.dynamic_range(n):\n    for j in range(4):\n        break")),
    ("loop-step", loop("print(1)", "nl.fori_loop(0, n, step, -1)"), loop("print(1)", "nl.fori_loop(0, n, step, 2)")),
    ("loop-step", loop("print(1)", "nl.fori_loop(0, n, step, step=0)"),
     loop("print(1)", "nl.fori_loop(0, n, step, n)")),
    ("loop-variable", loop("nisa.dma_copy(dst=t, src=x.ap([[1, 4]], offset=i * 128))"),
     loop("nisa.dma_copy(dst=t, src=x.ap([[1, 4]], scalar_offset=i))")),
    ("loop-variable", loop("if i == 0:\n    print(1)"), loop("if n == 0:\n    print(1)")),
    ("register-arithmetic", kernel("r = nisa.register_alloc(3)\na = r + 1"),
     kernel("r = nisa.register_alloc(3)\na = x.ap([[1, 4]], scalar_offset=r)")),
    ("register-arithmetic", kernel("r = nisa.register_alloc(3)\nif r:\n    print(1)"),
     kernel("r = nisa.register_alloc(3)\nnl.fori_loop(0, r, tick)", "def tick(i):\n    print(1)\n")),
    ("loop-psum", loop("nisa.nc_matmul(acc, t, u, accumulate=False)"),
     loop(f"acc = {PSUM}\nnisa.nc_matmul(acc, t, u, accumulate=False)")),
    ("loop-dge-none", loop("nisa.dma_copy(dst=t, src=x, dge_mode=nisa.dge_mode.none)"),
     loop("nisa.dma_copy(dst=t, src=x)")),
    ("loop-dma-name", loop("nisa.dma_copy(dst=t, src=x, name='a')\nnisa.dma_copy(dst=u, src=x, name='a')"),
     loop("nisa.dma_copy(dst=t, src=x, name='a')\nnisa.dma_copy(dst=u, src=x, name='b')")),
    ("loop-no-reorder", kernel("def step(i):\n    print(1)\nwith nl.no_reorder():\n    nl.fori_loop(0, n, step)"),
     kernel("def step(i):\n    with nl.no_reorder():\n        print(1)\nnl.fori_loop(0, n, step)")),
]

GATHER = "x.ap([[8, 4], [1, 8]], vector_offset=n, indirect_dim=0)"
INSTRUCTION_CASES = [
    ("implicit-accumulate", kernel(TILES + "nisa.nc_matmul(acc, t, u)"),
     kernel(TILES + "nisa.nc_matmul(acc, t, u, accumulate=False)")),
    ("implicit-accumulate", kernel(TILES + "nisa.nc_matmul(acc, t, u, accumulate=None)"),
     kernel(TILES + "nisa.nc_matmul(acc, t, u, accumulate=n > 0)")),
    ("accumulate-memset", kernel(TILES + "nisa.memset(acc, 0.0)\nnisa.nc_matmul(acc, t, u, accumulate=True)"),
     kernel(TILES + "nisa.nc_matmul(acc, t, u, accumulate=False)\nnisa.nc_matmul(acc, t, u, accumulate=True)")),
    ("accumulate-slice", kernel(TILES + "nisa.nc_matmul(acc[:, 0:128], t, u, accumulate=n > 0)"),
     kernel(TILES + "nisa.nc_matmul(acc[:, 0:128], t, u, accumulate=False)")),
    ("matmul-buffers", kernel(TILES + "nisa.nc_matmul(u, t, t, accumulate=False)"),
     kernel(TILES + "nisa.nc_matmul(acc, t, u, accumulate=False)")),
    ("matmul-buffers", kernel(TILES + "nisa.nc_matmul(acc, t[:, 0:64], acc.reshape((128, 512)), accumulate=False)"),
     kernel(TILES + "nisa.nc_matmul(acc, t[:, 0:64], u.reshape((128, 512)), accumulate=False)")),
    ("matmul-tile", kernel(TILES + "nisa.nc_matmul(acc, t, u, accumulate=False, tile_position=(0, 0))"),
     kernel(TILES + "nisa.nc_matmul(acc, t, u, accumulate=False, tile_position=(64, 0), tile_size=(64, 128))")),
    ("matmul-tile",
     kernel(TILES + "nisa.nc_matmul(acc, t, u, accumulate=False, tile_position=(8, 0), tile_size=(64, 128))"),
     kernel(TILES + "nisa.nc_matmul(acc, t, u, accumulate=False)")),
    ("dma-psum", kernel(TILES + "nisa.dma_copy(dst=x, src=acc[:, 0:8])"),
     kernel(TILES + "nisa.dma_copy(dst=x, src=t)")),
    ("dma-transpose-skip", kernel(TILES + f"nisa.dma_transpose(dst=t, src={GATHER}, oob_mode=nisa.oob_mode.skip)"),
     kernel(TILES + f"nisa.dma_copy(dst=t, src={GATHER}, oob_mode=nisa.oob_mode.skip)")),
    ("hwdge-gather", kernel(TILES + f"nisa.dma_copy(dst=t, src={GATHER}, dge_mode=nisa.dge_mode.hwdge)"),
     kernel(TILES + "nisa.dma_copy(dst=t, src=x, dge_mode=nisa.dge_mode.hwdge)")),
    ("scatter-source", kernel(f"h = nl.ndarray((4, 8), nl.float32, nl.hbm)\nnisa.dma_copy(dst={GATHER}, src=h)"),
     kernel(TILES + f"nisa.dma_copy(dst={GATHER}, src=t)")),
    ("skip-view-source", kernel(TILES + f"nisa.dma_copy(dst={GATHER}, src=t[0:4, :], oob_mode=nisa.oob_mode.skip)"),
     kernel(TILES + f"nisa.dma_copy(dst={GATHER}, src=t, oob_mode=nisa.oob_mode.skip)")),
    ("dma-compute-op", kernel(TILES + "nisa.dma_compute(t, [t, u], nl.maximum)"),
     kernel(TILES + "nisa.dma_compute(t, [t, u], nl.add)")),
    ("dynamic-operand", kernel(TILES + "nisa.tensor_copy(dst=t, src=u.ap([[512, 128], [1, 8]], scalar_offset=n))"),
     kernel(TILES + "nisa.tensor_copy(dst=t, src=u.ap([[512, 128], [1, 8]], offset=8))")),
    ("two-psum-operands", kernel(TILES + "nisa.tensor_tensor(t, acc[:, 0:8], acc[:, 8:16], nl.add)"),
     kernel(TILES + "nisa.tensor_tensor(t, acc[:, 0:8], u[:, 8:16], nl.add)")),
    ("gpsimd-psum", kernel(TILES + "nisa.tensor_copy(t, acc, engine=nisa.engine.gpsimd)"),
     kernel(TILES + "nisa.tensor_copy(t, acc, engine=nisa.engine.vector)")),
    ("gpsimd-tensor-scalar", kernel(TILES + "nisa.tensor_scalar(t, u, nl.add, 1.0, engine=nisa.engine.gpsimd)"),
     kernel(TILES + "nisa.tensor_scalar(t, u, nl.rsqrt, 1.0, engine=nisa.engine.gpsimd)")),
    ("activation-reduce", kernel(TILES + "nisa.activation_reduce(t, nl.exp, u, nl.maximum, acc)"),
     kernel(TILES + "nisa.activation_reduce(t, nl.exp, u, nl.add, acc)")),
    ("activation-accumulator", kernel(TILES + "nisa.activation(t, nl.exp, u, reduce_op=nl.add, reduce_res=acc)"),
     kernel(TILES + "nisa.activation(t, nl.exp, u, reduce_op=nl.add, reduce_res=acc, "
            "reduce_cmd=nisa.reduce_cmd.reset_reduce)")),
    ("activation-immediate", kernel(TILES + "nisa.activation(t, nl.exp, u, bias=-1.0)"),
     kernel(TILES + "nisa.activation(t, nl.exp, u, bias=acc[:, 0:1])")),
    ("reduce-axis", kernel(TILES + "nisa.tensor_reduce(t, nl.add, u, axis=0)"),
     kernel(TILES + "nisa.tensor_reduce(t, nl.add, u, axis=(1,))")),
    ("partition-reduce", kernel(TILES + "nisa.tensor_partition_reduce(t, nl.add, u)"),
     kernel(TILES + "nisa.tensor_reduce(t, nl.add, u, axis=1)")),
    ("range-select", kernel(TILES + "nisa.range_select(t, u, nl.greater, nl.less, n, n, reduce_op=nl.add)"),
     kernel(TILES + "nisa.range_select(t, u, nl.greater, nl.less, n, n, reduce_op=nl.maximum)")),
    ("memset-type", kernel("a = nl.ndarray((128, 8), dtype=nl.int32)\nnisa.memset(a, 2.0)"),
     kernel("a = nl.ndarray((128, 8), dtype=nl.int32)\nnisa.memset(a, -2)")),
    ("memset-type", kernel(TILES + "nisa.memset(t[:, 0:1], -2)"), kernel(TILES + "nisa.memset(t[:, 0:1], -2.0)")),
    ("infinite-value", kernel(TILES + "nisa.memset(t, float('-inf'))"), kernel(TILES + "nisa.memset(t, -3.0e38)")),
    ("infinite-value", kernel(TILES + "nisa.memset(t, -math.inf)"), kernel("best = -math.inf")),
    ("needs-v3", kernel(TILES + "nisa.tensor_copy(t, u, engine=nisa.engine.scalar)"),
     kernel(TILES + "if nisa.get_nc_version() > nisa.nc_version.gen2:\n"
            "    nisa.tensor_copy(t, u, engine=nisa.engine.scalar)")),
    ("needs-v3", kernel(TILES + "nisa.register_store(t, n)"), kernel(TILES + "nisa.register_load(n, t)")),
    ("needs-v4", kernel(TILES + "nisa.exponential(t, u)"), kernel(TILES + "nisa.activation(t, nl.exp, u)")),
    ("needs-v4", kernel("a = nl.ndarray((8, 8), dtype=nl.float8_e4m3fn)"),
     kernel("a = nl.ndarray((8, 8), dtype=nl.float8_e4m3)")),
    ("suppression", kernel("print(n)  # nki-lint: allow is-none"), kernel("print(n)  # nki-lint-free")),
    ("unused-suppression", kernel("print(n)  # nki-lint: allow is-none compared on the host"), kernel("print(n)")),
]
CASES = LANGUAGE_CASES + API_CASES + LOOP_CASES + INSTRUCTION_CASES


def rules_of(text: str) -> list[str]:
    return [finding.rule for finding in lint_source(text)]


@pytest.mark.parametrize(("rule", "violating", "conforming"), CASES,
                         ids=[f"{rule}-{i}" for i, (rule, _, _) in enumerate(CASES)])
def test_rule_fires_only_on_violation(rule: str, violating: str, conforming: str) -> None:
    found = lint_source(violating)
    assert rule in {f.rule for f in found}
    if RULES[rule].severity == "error":
        assert {f.rule for f in found if f.severity == "error"} == {rule}
    good = lint_source(conforming)
    assert rule not in {f.rule for f in good}
    assert not [f for f in good if f.severity == "error"], format_findings(good)


def test_every_rule_has_a_case() -> None:
    assert {rule for rule, _, _ in CASES} == set(RULES)


def test_rule_texts_are_one_line_each() -> None:
    for rule in RULES.values():
        for text in (rule.reason, rule.fix, rule.origin):
            assert text and "\n" not in text and not text.endswith(".")


# what counts as kernel code

HOST = """\
def host(values):
    try:
        return {v: [i for i in v] for v in values}
    except KeyError:
        raise
"""


def test_host_code_beside_a_kernel_is_ignored() -> None:
    assert rules_of(kernel("print(n)", HOST + "TABLE = {1: lambda v: v}\n")) == []


def test_module_without_kernel_is_ignored() -> None:
    assert rules_of(HEADER + HOST) == []


def test_other_jit_decorators_are_host_code() -> None:
    assert rules_of("import numba\n@numba.njit\ndef f(x):\n    return [i for i in x]\n") == []
    assert rules_of("import torch\n@torch.jit.script\ndef f(x):\n    return [i for i in x]\n") == []


@pytest.mark.parametrize("use", ["helper(x)", "f = helper\nf(x)", "apply(helper, x)", "TABLE['a'](x)"])
def test_helper_named_by_kernel_is_checked(use: str) -> None:
    above = ("def deep(a):\n    raise ValueError\n\ndef helper(a):\n    deep(a)\n\ndef apply(f, a):\n    f(a)\n"
             "\nTABLE = {'a': helper}\n")
    found = [f for f in lint_source(kernel(use, above)) if f.rule == "raise"]
    assert len(found) == 1
    assert found[0].line == HEADER.count("\n") + 2


def test_table_built_by_a_host_call_is_not_followed() -> None:
    above = HOST + "SIZES = host(())\n"
    assert rules_of(kernel("print(SIZES)", above)) == []


def test_methods_of_a_class_used_in_a_kernel_are_checked() -> None:
    above = "class Pool(nl.NKIObject):\n    size: int = 4\n    def take(self, i):\n        raise ValueError\n"
    assert "raise" in rules_of(kernel("p = Pool()\np.take(0)", above))
    assert "raise" in rules_of(kernel("n.take(0)", above, signature="x, n: Pool"))
    assert "raise" not in rules_of(kernel("print(n)", above))


def test_kernel_inside_a_host_function_is_checked_alone() -> None:
    text = HEADER + textwrap.dedent("""
        def make(values):
            sizes = [v for v in values]
            @nki.jit
            def kernel(x):
                raise ValueError
            return kernel, sizes
        """)
    assert rules_of(text) == ["raise"]


@pytest.mark.parametrize("wrap", ["fast = nki.jit(sub)", "def call(a):\n    return nki.jit(sub)[2](a)"])
def test_function_passed_to_jit_is_a_kernel(wrap: str) -> None:
    assert rules_of(HEADER + f"def sub(a):\n    raise ValueError\n\n{wrap}\n") == ["raise"]


def test_undecorated_function_with_instructions_is_a_sub_kernel() -> None:
    text = HEADER + "def sub(dst, src):\n    nisa.tensor_copy(dst, src)\n    raise ValueError\n\n" + HOST
    assert rules_of(text) == ["raise"]


def test_caller_of_a_sub_kernel_is_kernel_code_but_not_the_caller_of_a_kernel() -> None:
    sub = "def sub(dst, src):\n    nisa.tensor_copy(dst, src)\n\n"
    caller = "def caller(dst, src):\n    sub(dst, src)\n    raise ValueError\n"
    assert rules_of(HEADER + sub + caller) == ["raise"]
    assert rules_of(HEADER + "@nki.jit\n" + sub + caller) == []
    assert rules_of(HEADER + sub + caller.replace("sub(dst, src)", "nki.jit(sub)(dst, src)")) == []


@pytest.mark.parametrize("imports", [
    "from nki.isa import nc_matmul as matmul\nimport nki.language as nl\nimport nki",
    "from nki import isa, language as nl, jit\nmatmul = None",
    "import nki",
    "from nki_kernels.toolchain import nki, nisa, nl",
    "from nki_kernels.toolchain import jit, nisa, nl\nmatmul = None",
])
def test_import_spellings_resolve_to_the_same_instruction(imports: str) -> None:
    call = {"from nki.isa": "matmul", "from nki ": "isa.nc_matmul", "import nki": "nki.isa.nc_matmul"}
    name = next((v for k, v in call.items() if imports.startswith(k) and "toolchain" not in imports), "nisa.nc_matmul")
    decorator = "jit" if imports.endswith("None") else "nki.jit"
    text = f"{imports}\n\n@{decorator}\ndef kernel(x, y, z):\n    {name}(x, y, z)\n"
    assert rules_of(text) == ["implicit-accumulate"]


def test_findings_are_in_source_order_with_position() -> None:
    found = lint_source(kernel("a = {1: 2}\nb = [i for i in x]"), "k.py")
    assert [(f.rule, f.line, f.col) for f in found] == [("dict-key", 12, 10), ("comprehension", 13, 9)]
    assert str(found[0]).startswith("k.py:12:10: error [dict-key] key 1: ")


# suppression

def test_suppression_permits_one_rule_on_its_line() -> None:
    body = "a = [i for i in x]  # nki-lint: allow comprehension unrolled by our preprocessor\nb = [i for i in x]"
    found = lint_source(kernel(body))
    assert [(f.rule, f.line) for f in found] == [("comprehension", 13)]


def test_suppression_alone_permits_the_next_line() -> None:
    body = ("# nki-lint: allow comprehension, host-builtin compiles here\n# more words\n"
            "a = [i for i in sum(x)]\nb = sum(x)")
    found = lint_source(kernel(body))
    assert [(f.rule, f.line) for f in found] == [("host-builtin", 15)]


def test_suppression_covers_a_statement_of_several_lines() -> None:
    body = TILES + "nisa.nc_matmul(\n    acc,  # nki-lint: allow implicit-accumulate first chain\n    t, u)"
    assert rules_of(kernel(body)) == []


def test_suppression_on_a_def_does_not_cover_its_body() -> None:
    text = HEADER + "@nki.jit\ndef kernel(x):  # nki-lint: allow raise not here\n    raise ValueError\n"
    assert rules_of(text) == ["unused-suppression", "raise"]


@pytest.mark.parametrize(("comment", "says"), [
    ("allow comprehension", "no reason"),
    ("allow comprehensions because", "unknown rule comprehensions"),
    ("disable comprehension because", "cannot read"),
])
def test_malformed_suppression_is_an_error_and_permits_nothing(comment: str, says: str) -> None:
    found = lint_source(kernel(f"a = [i for i in x]  # nki-lint: {comment}"))
    assert [f.rule for f in found] == ["comprehension", "suppression"]
    assert says in found[1].detail


def test_suppression_inside_a_string_is_text() -> None:
    assert rules_of(kernel("print('# nki-lint: allow comprehension x')")) == []


# files and the command

@pytest.fixture
def write(tmp_path: Path):
    def _write(name: str, text: str) -> Path:
        path = tmp_path / name
        path.write_text(text)
        return path
    return _write


def run(*paths: Path) -> tuple[int, list[str]]:
    out = io.StringIO()
    code = run_lint(paths, out)
    return code, out.getvalue().splitlines()


def test_run_lint_exit_codes_and_summary(write) -> None:
    good, warned, bad = (write("good.py", kernel("print(n)")), write("warned.py", kernel("print(n is None)")),
                         write("bad.py", kernel("raise ValueError")))
    assert run(good) == (0, ["0 errors, 0 warnings in 1 file: 1 nki.jit kernel, kernel code in 1 definition."])
    assert run(good, warned)[0] == 0
    code, lines = run(good.parent)  # a directory
    assert code == 1
    assert len(lines) == 3
    assert lines[0].startswith(f"{bad}:12:5: error [raise]")
    assert lines[-1].startswith("1 error, 1 warning in 3 files: 3 nki.jit kernels")


def test_run_lint_goes_on_after_a_bad_file(write, tmp_path: Path) -> None:
    broken, bad = write("broken.py", "def f(:\n"), write("bad.py", kernel("raise ValueError"))
    absent = tmp_path / "absent.py"
    code, lines = run(absent, broken, bad)
    assert code == 2
    assert lines[0] == f"{absent}: cannot be read (No such file or directory); pass a Python source file."
    assert lines[1].startswith(f"{broken}:1: not valid Python (")
    assert "[raise]" in lines[2]
    assert lines[-1].endswith("2 files could not be read.")


def test_run_lint_says_when_there_is_nothing_to_check(write, tmp_path: Path) -> None:
    code, lines = run(write("host.py", HOST))
    assert code == 0
    assert "No kernel code found" in lines[-1]
    (tmp_path / "empty").mkdir()
    assert run(tmp_path / "empty") == (2, [f"no Python file in {tmp_path / 'empty'}."])


@pytest.mark.parametrize("content", [b"\xff\xfe\x00bad", b"# coding: nonsense\n", b"x = '\x00'\n"])
def test_unreadable_file_raises_one_clear_error(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "f.py"
    path.write_bytes(content)
    with pytest.raises(SourceError, match="f.py"):
        lint_file(path)


def test_lint_imports_the_standard_library_only() -> None:
    import sys

    import nki_kernels.source_lint as package

    for path in Path(package.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = ([a.name for a in node.names] if isinstance(node, ast.Import)
                     else [node.module or ""] if isinstance(node, ast.ImportFrom) else [])
            for name in names:
                top = name.partition(".")[0]
                assert top in sys.stdlib_module_names or name.startswith("nki_kernels.source_lint"), (path, name)


OWN_FILES = sorted((Path(__file__).parents[2] / "nki_kernels").glob("*.py"))


def test_own_kernels_have_no_errors() -> None:
    assert OWN_FILES
    errors = [f for path in OWN_FILES for f in lint_file(path) if f.severity == "error"]
    assert not errors, format_findings(errors)


def test_simulator_accepts_the_same_parameters() -> None:
    implemented = set(isa.__all__) & set(SIGNATURES)
    assert len(implemented) > 30
    for name in implemented:
        parameters = list(inspect.signature(getattr(isa, name)).parameters)
        assert parameters[: len(SIGNATURES[name].required)] == list(SIGNATURES[name].required), name
        assert set(SIGNATURES[name].names) <= set(parameters), name
