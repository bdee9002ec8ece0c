# SPDX-License-Identifier: Apache-2.0
"""NkiKernelCompiler gives each call's kernel the right arguments, and takes from nki only what the call says.

nki is a stand-in, a package on the path of the process that compiles kernels.
"""

import base64
import importlib
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from compile.errors import CompileError, MissingPackageError
from compile.graph_spec import TensorSpec
from compile.kernel_calls import KernelCall, kernel_file
from neuron_paged.ops.host_kernels import run_operator
from neuron_paged.ops.nki_compiler import NkiKernelCompiler, invocation
from nki_kernels import simulator
from nki_kernels.decode_support import DecodeProblem
from nki_kernels.plan import plan_decode
from nki_kernels.plan_shape import PlanShape
from nki_kernels.prefill_plan import PrefillBucket, plan_prefill
from nki_kernels.write_plan import WriteShape

STAND_INS = Path(__file__).parent / "stand_ins"
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


def call_of(name: str, operands: dict[str, np.ndarray], attributes: dict[str, Any]) -> KernelCall:
    outputs = {"query": operands["query"]} | ({"key": operands["key"]} if "key" in operands else {})
    return KernelCall(name, specs(operands), specs(outputs), tuple(sorted(attributes.items())))


NEW = {"key": normal(3, 1, 64), "value": normal(3, 1, 64), "kv_cache": CACHE, "slot_mapping": np.array([17, 40, 3])}
NEW["slot_mapping"] = NEW["slot_mapping"].astype(np.int32)
WRITTEN = TensorSpec("kv_cache_out", CACHE.shape, "float32")
WRITE = KernelCall("reshape_and_cache", specs(NEW), (WRITTEN,), (), ((0, 2),))
WRITES = np.zeros(WriteShape(256, 1, 16, 64, 4, 4).table_shape, np.int32)
RUNS = {"key": normal(256, 1, 64), "value": normal(256, 1, 64), "kv_cache": CACHE, "write_plan": WRITES}
WRITE_RUNS = KernelCall("reshape_and_cache", specs(RUNS), (WRITTEN,), (), ((0, 2),))
CALLS = [("attention", decode), ("attention", prefill), ("rotary_embedding", rotary)]


@pytest.mark.parametrize(("name", "make"), CALLS)
def test_arguments_of_a_kernel_give_the_operators_result(name: str, make) -> None:
    operands, attributes = make()
    call = call_of(name, operands, attributes)
    kernel, arguments = invocation(call)
    module, _, function = kernel.rpartition(".")
    given = {k: operands[v.name] if isinstance(v, TensorSpec) else v for k, v in arguments.items()}
    returned = simulator.run(getattr(importlib.import_module(f"nki_kernels.{module}"), function), **given).outputs
    results = returned if isinstance(returned, tuple) else (returned,)
    expected = [np.empty(spec.shape, spec.dtype) for spec in call.results]
    run_operator(call, list(operands.values()), expected)
    for got, want in zip(results, expected, strict=True):
        torch.testing.assert_close(torch.from_numpy(np.asarray(got)), torch.from_numpy(want), atol=2e-5, rtol=2e-5)


def test_attention_without_a_plan_has_no_kernel() -> None:
    call = KernelCall("attention", specs({"query": CACHE}), specs({"query": CACHE}), tuple(SETTINGS.items()))
    with pytest.raises(CompileError, match="attention needs a plan: lower planned buckets"):
        invocation(call)


@pytest.fixture
def nki(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the stand-in on the path, for tests to change."""
    shutil.copytree(STAND_INS, tmp_path / "packages")
    monkeypatch.syspath_prepend(tmp_path / "packages")
    return tmp_path / "packages"


def test_blobs_name_their_files_and_are_equal_in_every_run(nki: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NKI_DEBUG_INFO", "1")  # the caller's settings don't reach nki
    calls = [WRITE, WRITE_RUNS, *(call_of(name, *make()) for name, make in CALLS)]
    compiler = NkiKernelCompiler("trn2", 1)
    polls: list[None] = []
    blobs = compiler.compile_kernels(calls, lambda: polls.append(None))
    assert polls and compiler.identity == "nki 0.6.0+31049202112.g85070674 trn2 lnc1"
    assert NkiKernelCompiler("trn2", 1).compile_kernels(calls) == blobs
    assert len({blob.backend_config for blob in blobs.values()}) == len(calls)
    for call, blob in blobs.items():
        file = kernel_file(blob.backend_config.encode())
        assert file is not None and set(blob.artifacts) == {file, f"{file.split('/')[0]}/identity.npy"}
        config = json.loads(base64.b64decode(blob.backend_config))
        assert config["grid"] == 1 and config["klir_binary"]["binary"].endswith(file)
        script = json.loads(blob.artifacts[file])
        assert len(script["operands"]) == len(call.operands) and (script["target"], script["cores"]) == ("trn2", None)
    shutil.rmtree(nki / "nki")  # each call is compiled once
    assert compiler.compile_kernels(calls[:2]) == {call: blobs[call] for call in calls[:2]}


REORDERED = replace(WRITE, operands=(WRITE.operands[1], WRITE.operands[0], *WRITE.operands[2:]))
WRONG = [
    (REORDERED, r"made a kernel with operands \('key', 'value', .*, the graph has \('value', 'key'"),
    (replace(WRITE, aliases=()), r"made a kernel with results in place of operands \(\(0, 2\),\), the graph has \(\)"),
    (replace(WRITE, results=(replace(WRITTEN, dtype="bfloat16"),), aliases=()), "made a kernel with results"),
]


@pytest.mark.parametrize(("call", "says"), WRONG)
def test_a_kernel_that_is_not_the_calls_is_refused(nki: Path, call: KernelCall, says: str) -> None:
    with pytest.raises(CompileError, match=says):
        NkiKernelCompiler("trn1", 1).compile_kernels([call])


COMPILED, KERNEL = "nki/framework/compiled.py", "nki/framework/kernel.py"
METADATA = "nki-0.6.0.dist-info/METADATA"
OTHER = [
    (METADATA, "0.6.0+", "0.5.0+", r"nki is 0\.5\.0\+.*, need 0\.6\. Install it: pip install"),
    (METADATA, "0.6.0+", "0.60.0+", r"nki is 0\.60\.0\+"),
    (KERNEL, "class Kernel:", "class Other:", r"can't be imported \(cannot import name 'Kernel'"),
    (COMPILED, "class CompileKernel(Kernel):", "class CompileKernel:", "need CompileKernel derived from Kernel"),
    (COMPILED, "    artifacts_dir: str = \"\"\n", "", "need CompileKernel as a dataclass with artifacts_dir"),
    (COMPILED, "def _compile_opts", "def compile_options", "need CompileKernel._compile_opts"),
    (COMPILED, "def compile_kernel_to_nir", "def translate", "need nki.framework.compiled.compile_kernel_to_nir"),
    (COMPILED, ", enable_cache: bool = True", "", r"need compile_kernel_to_nir\(enable_cache=…\)"),
]


@pytest.mark.parametrize(("file", "old", "new", "says"), OTHER)
def test_another_nki_is_refused_by_what_it_lacks(nki: Path, file: str, old: str, new: str, says: str) -> None:
    text = (nki / file).read_text()
    assert old in text
    (nki / file).write_text(text.replace(old, new))
    with pytest.raises(MissingPackageError, match=says):
        NkiKernelCompiler("trn2", 1)


RESULTS = [
    ("            operand_output_aliases=self._aliases,\n", "", "need a config with operand_output_aliases"),
    ("has_collectives=False", "has_collectives=True", "talks to other devices"),
    ('"klir_binary": {', '"binary": {', "need base64 of JSON with klir_binary.binary"),
    ('"binary": str(path)', '"binary": "/nowhere/kernel.json"', "names the file /nowhere/kernel.json, which is not"),
    ('isinstance(run.outputs, tuple))', 'True)', "returns a tuple of one tensor"),
    ("    run = sim", '    raise RuntimeError("a\\n b")\n    run = sim', "refuses it for trn2: RuntimeError: a b"),
    ("    run = sim", "    os._exit(134)\n    run = sim", "process with nki ended with exit code 134"),
]


@pytest.mark.parametrize(("old", "new", "says"), RESULTS)
def test_what_nki_gives_or_says_is_one_error(nki: Path, old: str, new: str, says: str) -> None:
    text = (nki / COMPILED).read_text()
    assert old in text
    (nki / COMPILED).write_text(text.replace(old, new))
    with pytest.raises(CompileError, match=says) as error:
        NkiKernelCompiler("trn2", 1).compile_kernels([WRITE])
    assert "\n" not in str(error.value)


def test_an_nki_that_does_not_end_is_told(nki: Path) -> None:
    compiler = NkiKernelCompiler("trn2", 1, timeout_s=0.4)
    text = (nki / COMPILED).read_text()
    (nki / COMPILED).write_text(text.replace("    run = sim", "    import time; time.sleep(600)\n    run = sim"))
    says = r"nki took longer than 0.8 s for 2 of them \(reshape_and_cache, rotary_embedding\); raise --timeout or use"
    with pytest.raises(CompileError, match=says):
        compiler.compile_kernels([WRITE, call_of("rotary_embedding", *rotary())])


def test_an_installed_nki_changes_nothing_but_what_compiles_kernels(nki: Path) -> None:
    """The simulator runs the kernels in an environment that has nki, too."""
    command = [sys.executable, "-m", "neuron_paged", "kernels", "profile", "decode", "--context-lens", "40"]
    root = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "PYTHONPATH": f"{nki}{os.pathsep}{root}"}
    done = subprocess.run([*command, "--target", "trn2"], env=environment, cwd=nki, capture_output=True, text=True)
    assert done.returncode == 0 and "live KV" in done.stdout, done.stderr


def test_no_nki_at_all() -> None:
    with pytest.raises(MissingPackageError, match=r"nki is not installed, need 0\.6\. Install it: pip install "):
        NkiKernelCompiler("trn2", 1)
    with pytest.raises(MissingPackageError, match="/no/python can't be run"):
        NkiKernelCompiler("trn2", 1, python=Path("/no/python"))
    with pytest.raises(CompileError, match="with exit code 1: nothing. Its interpreter, .*false, needs nki: pip in"):
        NkiKernelCompiler("trn2", 1, python=Path(str(shutil.which("false"))))
