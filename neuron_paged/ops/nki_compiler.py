# SPDX-License-Identifier: Apache-2.0
"""NkiKernelCompiler: the project's NKI kernels behind the custom calls of graphs for Neuron devices.

Owns which kernel a call is and with which arguments. The entry point that compiles an NKI kernel for given shapes is an
argument, and nki's wheel is checked first. *Not yet run with a real nki*; the simulator runs the same arguments.
"""

from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple

from compile.errors import CompileError, MissingPackageError
from compile.graph_spec import TensorSpec
from compile.kernel_calls import KernelBlob, KernelCall
from nki_kernels.cache_ops import copy_blocks, reshape_and_cache
from nki_kernels.paged_attention_decode import paged_attention_decode
from nki_kernels.paged_attention_prefill import paged_attention_prefill
from nki_kernels.plan_shape import PlanShape
from nki_kernels.prefill_plan import PrefillBucket
from nki_kernels.rotary_embedding import rotary_embedding

# The release whose language the kernels are written in; kernels of different releases must not be mixed in a graph.
NKI_RELEASE = "0.6"
INSTALL = "pip install --extra-index-url https://pip.repos.neuron.amazonaws.com nki==0.6.*"

_SIMPLE = {"reshape_and_cache": reshape_and_cache, "copy_blocks": copy_blocks, "rotary_embedding": rotary_embedding}


class Invocation(NamedTuple):
    """A kernel with its arguments by name: a TensorSpec for a tensor, anything else is a constant of the kernel."""

    kernel: Any
    arguments: Mapping[str, Any]


# (kernel, arguments, target, LNC degree) → what goes into the graph.
CompileKernel = Callable[[Any, Mapping[str, Any], str, int], KernelBlob]


def invocation(call: KernelCall) -> Invocation:
    """The kernel behind a call. CompileError if there is none: attention needs its planned form."""
    tensors: dict[str, Any] = {spec.name: spec for spec in call.operands}
    attributes: dict[str, Any] = dict(call.attributes)
    if call.name in _SIMPLE:
        return Invocation(_SIMPLE[call.name], tensors | attributes)
    if call.name != "attention" or "plan_shape" not in attributes:
        raise CompileError(f"{call.name}: no NKI kernel takes it; attention needs a plan: lower planned buckets")
    plan_shape = [int(number) for number in attributes.pop("plan_shape").split(",")]
    num_seqs = attributes.pop("num_seqs")
    if "prefill_plan" in tensors:
        bucket = PrefillBucket.from_plan_shape(plan_shape)
        plan = {"plan": tensors.pop("prefill_plan"), "segments": bucket.segments, "row_tokens": bucket.row_tokens}
        return Invocation(paged_attention_prefill, tensors | plan | attributes)
    query: TensorSpec = tensors["query"]
    shape, _ = PlanShape.from_plan_shape(plan_shape, num_seqs)
    plan = {"plan": tensors.pop("decode_plan"), "q_len": query.shape[0] // num_seqs}
    names = ("full_folds", "mixed_folds", "seqs_per_mixed_fold", "shared_folds", "seqs_per_shared_fold")
    folds = {name: getattr(shape, name) for name in names}
    return Invocation(paged_attention_decode, tensors | plan | folds | attributes)


class NkiKernelCompiler:
    """A KernelCompiler over an entry point of a real nki.

    compile_kernel_function: see CompileKernel. source_digest: of the kernels' source, which nki's own caches don't look
    at. target, num_cores: NEURON_PLATFORM_TARGET_OVERRIDE's name and LNC degree. nki_version: None = the installed one.
    Raises MissingPackageError unless it is of NKI_RELEASE.
    """

    def __init__(
        self,
        compile_kernel_function: CompileKernel,
        source_digest: str,
        *,
        target: str = "trn2",
        num_cores: int = 1,
        nki_version: str | None = None,
    ) -> None:
        if nki_version is None:
            try:
                nki_version = version("nki")
            except PackageNotFoundError:
                nki_version = "not installed"
        if not nki_version.startswith(f"{NKI_RELEASE}."):
            raise MissingPackageError(f"NKI kernels: nki is {nki_version}, need {NKI_RELEASE}. Install it: {INSTALL}.")
        self.identity = f"nki {nki_version} {target} lnc{num_cores} {source_digest}"
        self._compile, self._target, self._num_cores = compile_kernel_function, target, num_cores

    def compile_kernel(self, call: KernelCall) -> KernelBlob:
        """The call's kernel, compiled by the entry point."""
        kernel, arguments = invocation(call)
        return self._compile(kernel, arguments, self._target, self._num_cores)
