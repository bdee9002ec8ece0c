# SPDX-License-Identifier: Apache-2.0
"""NkiKernelCompiler: the project's NKI kernels behind the custom calls of graphs for Neuron devices.

Owns which kernel a call is, with which arguments, and that what nki made of it is what the call says. nki runs in a
process of its own, which nki_kernels.nki_entry_point owns, so it need not be in the environment that lowers or serves.
"""

import base64
import hashlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from compile.child_process import run_child
from compile.errors import CompileError, MissingPackageError
from compile.graph_spec import TensorSpec
from compile.kernel_calls import KernelBlob, KernelCall
from nki_kernels.nki_entry_point import (
    NKI_RELEASE,
    TARGET_VARIABLE,
    CompiledKernel,
    KernelRequest,
    NkiError,
    TensorArgument,
    read_result,
    write_requests,
)
from nki_kernels.plan_shape import PlanShape
from nki_kernels.prefill_plan import PrefillBucket

INSTALL = f"pip install --extra-index-url https://pip.repos.neuron.amazonaws.com 'nki=={NKI_RELEASE}.*'"
# In configs, so that a graph's bytes don't depend on where nki ran. neuronx-cc looks for a file that is not at its
# path under the path's last two parts, in the directory where it was started (NCC_EVRF059).
ARTIFACT_ROOT = "/neuron-paged"
# For importing nki, to see whether it is there.
_START_TIMEOUT_S = 120.0

_SIMPLE = {
    "reshape_and_cache": "cache_ops.reshape_and_cache",
    "copy_blocks": "cache_ops.copy_blocks",
    "rotary_embedding": "rotary_embedding.rotary_embedding",
}


class Invocation(NamedTuple):
    """A kernel ("module.function" below nki_kernels) with its arguments by name: a TensorSpec for a tensor, anything
    else is a constant of the kernel."""

    kernel: str
    arguments: Mapping[str, Any]


def invocation(call: KernelCall, num_cores: int = 1) -> Invocation:
    """The kernel behind a call. CompileError if there is none: attention needs its planned form."""
    tensors: dict[str, Any] = {spec.name: spec for spec in call.operands}
    attributes: dict[str, Any] = dict(call.attributes)
    if "write_plan" in tensors:
        return Invocation("planned_cache_write.write_runs", tensors | attributes)
    if call.name in _SIMPLE:
        return Invocation(_SIMPLE[call.name], tensors | attributes)
    if call.name != "attention" or "plan_shape" not in attributes:
        raise CompileError(f"{call.name}: no NKI kernel takes it; attention needs a plan: lower planned buckets")
    plan_shape = [int(number) for number in attributes.pop("plan_shape").split(",")]
    num_seqs = attributes.pop("num_seqs")
    if "prefill_plan" in tensors:
        bucket = PrefillBucket.from_plan_shape(plan_shape)
        plan = {"plan": tensors.pop("prefill_plan"), "segments": bucket.segments, "row_tokens": bucket.row_tokens}
        return Invocation("paged_attention_prefill.paged_attention_prefill", tensors | plan | attributes)
    query: TensorSpec = tensors["query"]
    shape, _ = PlanShape.from_plan_shape(plan_shape, num_seqs, num_cores)
    plan = {"plan": tensors.pop("decode_plan"), "q_len": query.shape[0] // num_seqs}
    names = ("full_folds", "mixed_folds", "seqs_per_mixed_fold", "shared_folds", "seqs_per_shared_fold")
    folds = {name: getattr(shape, name) for name in names}
    return Invocation("paged_attention_decode.paged_attention_decode", tensors | plan | folds | attributes)


class NkiKernelCompiler:
    """Makes blobs of kernel calls with a real nki, each call once.

    target, num_cores: NEURON_PLATFORM_TARGET_OVERRIDE's name and LNC degree. python: interpreter of an environment with
    nki, None = this one. timeout_s: per kernel. Raises MissingPackageError unless nki is there, of NKI_RELEASE and with
    the known interface.
    """

    def __init__(
        self, target: str, num_cores: int, *, python: Path | None = None, timeout_s: float | None = None
    ) -> None:
        self._target, self._num_cores, self._python, self._timeout_s = target, num_cores, python, timeout_s
        self._blobs: dict[KernelCall, KernelBlob] = {}
        try:
            self.version, _ = self._run((), _START_TIMEOUT_S)
        except NkiError as error:
            raise MissingPackageError(f"NKI kernels: {error}. Install it: {INSTALL}.") from error
        self.identity = f"nki {self.version} {target} lnc{num_cores}"

    def compile_kernels(
        self, calls: Iterable[KernelCall], poll: Callable[[], None] = lambda: None
    ) -> dict[KernelCall, KernelBlob]:
        """Blobs of the calls; poll: called a few times per second meanwhile.

        Raises CompileError if there is no kernel for one, nki refuses it, takes too long, or makes something else.
        """
        wanted = list(dict.fromkeys(calls))
        new = {call: invocation(call, self._num_cores) for call in wanted if call not in self._blobs}
        if new:
            timeout_s = None if self._timeout_s is None else len(new) * self._timeout_s
            try:
                _, made = self._run([_request(kernel) for kernel in new.values()], timeout_s, poll)
            except NkiError as error:
                raise CompileError(f"NKI kernels: {error}") from error
            for (call, kernel), compiled in zip(new.items(), made, strict=True):
                _check(call, kernel, compiled)
                self._blobs[call] = _blob(compiled)
        return {call: self._blobs[call] for call in wanted}

    def _run(
        self, requests: Sequence[KernelRequest], timeout_s: float | None, poll: Callable[[], None] = lambda: None
    ) -> tuple[str, list[CompiledKernel]]:
        with tempfile.TemporaryDirectory(prefix="neuron-paged-nki-") as name:
            folder = Path(name)
            write_requests(folder, self._target, self._num_cores, requests)
            try:
                done = run_child(
                    "nki_kernels.nki_entry_point", [name], python=self._python,
                    environment={TARGET_VARIABLE: self._target}, while_waiting=poll, timeout_s=timeout_s,
                )  # fmt: skip
            except OSError as error:
                raise MissingPackageError(f"NKI kernels: {self._python} can't be run ({error.strerror}).") from error
            except subprocess.TimeoutExpired as error:
                if not requests:
                    raise CompileError(f"NKI kernels: importing nki took longer than {timeout_s:g} s.") from error
                names = ", ".join(sorted({request.kernel.partition(".")[2] for request in requests}))
                raise CompileError(
                    f"NKI kernels: nki took longer than {timeout_s:g} s for {len(requests)} of them ({names}); raise "
                    "--timeout or use smaller buckets"
                ) from error
            try:
                return read_result(folder)
            except (FileNotFoundError, json.JSONDecodeError) as error:  # it wrote nothing, or not to its end
                said = " / ".join([line for line in done.stderr.splitlines() if line.strip()][-3:]) or "nothing"
                ended = f"NKI kernels: the process with nki ended with exit code {done.returncode}: {said}"
                if not requests:
                    ended += f". Its interpreter, {self._python or sys.executable}, needs nki: {INSTALL}."
                raise CompileError(ended) from error


def _request(kernel: Invocation) -> KernelRequest:
    arguments = {
        name: TensorArgument(value.shape, value.dtype) if isinstance(value, TensorSpec) else value
        for name, value in kernel.arguments.items()
    }
    return KernelRequest(kernel.kernel, arguments)


def _check(call: KernelCall, kernel: Invocation, compiled: CompiledKernel) -> None:
    """CompileError unless operands, results and aliases are the call's, in its order."""
    argument = {value.name: name for name, value in kernel.arguments.items() if isinstance(value, TensorSpec)}
    operands = tuple(argument[spec.name] for spec in call.operands)
    results = tuple(TensorArgument(spec.shape, spec.dtype) for spec in call.results)
    for what, got, need in (
        ("operands", compiled.inputs, operands),
        ("results", compiled.outputs, results),
        ("results in place of operands", compiled.aliases, tuple(sorted(call.aliases))),
    ):
        if got != need:
            raise CompileError(f"{kernel.kernel}: nki made a kernel with {what} {got}, the graph has {need}")


def _blob(compiled: CompiledKernel) -> KernelBlob:
    """Files under a folder named by their content, and the config that names them there."""
    sha = hashlib.sha256()
    for name, content in sorted(compiled.files.items()):
        sha.update(f"{name}\0{len(content)}\0".encode() + content)
    folder = sha.hexdigest()[:16]
    binary = {**compiled.config["klir_binary"], "binary": f"{ARTIFACT_ROOT}/{folder}/{compiled.file_name}"}
    config = json.dumps({**compiled.config, "klir_binary": binary}, sort_keys=True)
    files = {f"{folder}/{name}": content for name, content in compiled.files.items()}
    return KernelBlob(base64.b64encode(config.encode()).decode(), files)
