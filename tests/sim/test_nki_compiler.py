# SPDX-License-Identifier: Apache-2.0
"""NkiKernelCompiler gives each call's kernel the right arguments: the simulator gets the operator's result by them."""

from typing import Any

import numpy as np
import pytest
import torch

from compile.errors import CompileError, MissingPackageError
from compile.graph_spec import TensorSpec
from compile.kernel_calls import KernelBlob, KernelCall, is_stand_in
from neuron_paged.ops.host_kernels import run_operator
from neuron_paged.ops.nki_compiler import NkiKernelCompiler
from nki_kernels import simulator
from nki_kernels.decode_support import DecodeProblem
from nki_kernels.plan import plan_decode
from nki_kernels.plan_shape import PlanShape
from nki_kernels.prefill_plan import PrefillBucket, plan_prefill

RNG = np.random.default_rng(0)
CACHE = RNG.standard_normal((6, 1, 2, 16, 64)).astype(np.float32)
TABLE, LENS = np.array([[1, 2], [3, 0]], np.int32), np.array([30, 9], np.int32)
SETTINGS = {"softmax_scale": 0.125, "sliding_window": 0, "logits_soft_cap": 0.0}


def normal(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def decode() -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    layout = DecodeProblem("trn2", 2, 1, 64, 16, "float32").layout(6)
    plan = plan_decode(TABLE, LENS, layout, PlanShape(2, 0, 1, 2))
    shape = ",".join(map(str, plan.plan_shape))
    operands = {"query": normal(2, 2, 64), "kv_cache": CACHE, "decode_plan": plan.table}
    return operands, {"plan_shape": shape, "num_seqs": 2, **SETTINGS}


def prefill() -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    bucket = PrefillBucket(((1, 1, 0),), 16)
    plan = plan_prefill(
        TABLE[:1], LENS[:1], np.array([0, 7], np.int32), num_tokens=9, num_kv_heads=1, block_size=16, bucket=bucket
    )
    operands = {"query": normal(9, 2, 64), "kv_cache": CACHE, "prefill_plan": plan.table}
    return operands, {"plan_shape": ",".join(map(str, bucket.plan_shape)), "num_seqs": 1, **SETTINGS}


def rotary() -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    positions = np.array([3, 0, 7], np.int32)
    operands = {"positions": positions, "query": normal(3, 2, 64), "key": normal(3, 1, 64)}
    return operands | {"cos_sin_cache": normal(8, 64)}, {"interleaved": False}


def specs(arrays: dict[str, np.ndarray]) -> tuple[TensorSpec, ...]:
    return tuple(TensorSpec(name, array.shape, array.dtype.name) for name, array in arrays.items())


CALLS = [("attention", decode), ("attention", prefill), ("rotary_embedding", rotary)]


@pytest.mark.parametrize(("name", "make"), CALLS)
def test_arguments_of_a_kernel_give_the_operators_result(name: str, make) -> None:
    operands, attributes = make()
    outputs = {"query": operands["query"]} | ({"key": operands["key"]} if "key" in operands else {})
    call = KernelCall(name, specs(operands), specs(outputs), tuple(sorted(attributes.items())))
    results = []

    def run_in_simulator(kernel, arguments, target: str, num_cores: int) -> KernelBlob:
        tensors = {spec.name: array for spec, array in zip(call.operands, operands.values(), strict=True)}
        given = {k: tensors[v.name] if isinstance(v, TensorSpec) else v for k, v in arguments.items()}
        returned = simulator.run(kernel, **given, target=target).outputs
        results.extend(returned if isinstance(returned, tuple) else (returned,))
        return KernelBlob("config")

    compiler = NkiKernelCompiler(run_in_simulator, "digest", nki_version="0.6.0")
    assert compiler.compile_kernel(call) == KernelBlob("config") and not is_stand_in(b"config")
    assert compiler.identity == "nki 0.6.0 trn2 lnc1 digest"
    expected = [np.empty_like(array) for array in outputs.values()]
    run_operator(call, list(operands.values()), expected)
    for got, want in zip(results, expected, strict=True):
        torch.testing.assert_close(torch.from_numpy(np.asarray(got)), torch.from_numpy(want), atol=2e-5, rtol=2e-5)


def test_attention_without_a_plan_has_no_kernel() -> None:
    call = KernelCall("attention", specs({"query": CACHE}), specs({"query": CACHE}), tuple(SETTINGS.items()))
    compiler = NkiKernelCompiler(lambda *arguments: KernelBlob(""), "digest", nki_version="0.6.1")
    with pytest.raises(CompileError, match="attention needs a plan: lower planned buckets"):
        compiler.compile_kernel(call)


@pytest.mark.parametrize("found", ["0.5.0", "0.60.0", None])
def test_other_releases_of_nki_are_refused(found: str | None) -> None:
    with pytest.raises(MissingPackageError, match=r"NKI kernels: nki is .*, need 0\.6\. Install it: pip install"):
        NkiKernelCompiler(lambda *arguments: KernelBlob(""), "digest", nki_version=found)
