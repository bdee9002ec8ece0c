# SPDX-License-Identifier: Apache-2.0
"""Where a step's time goes, from torch's profiler on a sample of the steps of a separate, slower pass."""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch.profiler import ProfilerActivity, profile, record_function

from neuron_paged.engine.batch import Batch
from neuron_paged.engine.executor import Executor, StepResult
from neuron_paged.models import step as step_module
from neuron_paged.models.cpu_decoder import CpuDecoderStack
from neuron_paged.models.cpu_decoder_calls import Kind
from neuron_paged.models.llama import LlamaModel
from neuron_paged.models.prepare_cpu import CpuRMSNorm, PackedLinear

HEAD, SAMPLING, LINEAR, NORMS = "output head", "sampling", "linear layers", "norms"
ATTENTION, CACHE_WRITE, ROTARY, LAYERS = "attention", "KV cache write", "rotary embedding", "decoder layers"
OTHER_OPS, OUTSIDE_OPS = "copies and other operators", "Python and dispatch in the step"
_KINDS = {
    Kind.LINEAR: LINEAR,
    Kind.ATTENTION: ATTENTION,
    Kind.NORM: NORMS,
    Kind.ROTARY: ROTARY,
    Kind.CACHE_WRITE: CACHE_WRITE,
}
_OPS = {
    "neuron_paged::attention": ATTENTION,
    "neuron_paged::reshape_and_cache": CACHE_WRITE,
    "neuron_paged::rotary_embedding": ROTARY,
    "aten::linear": LINEAR,
    "aten::addmm": LINEAR,
    "aten::mm": LINEAR,
    "aten::matmul": LINEAR,
    LINEAR: LINEAR,
    NORMS: NORMS,
}


@dataclass
class ProfilingExecutor:
    """Profiles every `every`-th step of the executor inside; seconds: per category, over the profiled steps.

    layers: of the executor's model; a program of kernels counts by itself what its kernels take.
    """

    inner: Executor
    layers: Any
    every: int
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    num_steps: int = 0
    num_profiled: int = 0

    def execute(self, batch: Batch) -> StepResult:
        """Run the inner executor, profiled or not."""
        self.num_steps += 1
        if self.num_steps % self.every != 1 and self.every > 1:
            return self.inner.execute(batch)
        self.num_profiled += 1
        program = self.layers.program if isinstance(self.layers, CpuDecoderStack) else None
        before = (program.cycles.copy(), program.seconds) if program else None
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            start = time.perf_counter()
            result = self.inner.execute(batch)
            wall = time.perf_counter() - start
        in_ops = 0.0
        if program and before:
            in_ops = program.seconds - before[1]
            for name, seconds in _by_kind(program.cycles - before[0], in_ops).items():
                self.seconds[name] += seconds
        for event in profiler.events() or ():
            if event.name in (HEAD, SAMPLING) or event.name.startswith("[memory]"):  # their operators count
                continue
            seconds = event.self_cpu_time_total / 1e6
            self.seconds[_category(event)] += seconds
            in_ops += seconds
        self.seconds[OUTSIDE_OPS] += max(0.0, wall - in_ops)
        return result

    def shares(self) -> dict[str, float]:
        """Share of the profiled steps' time per category, largest first; sums to 1."""
        total = sum(self.seconds.values())
        return {name: value / total for name, value in sorted(self.seconds.items(), key=lambda item: -item[1])}


def _by_kind(cycles: Any, seconds: float) -> dict[str, float]:
    """A program's seconds per kind of kernel; as one if the processor does not let programs count cycles."""
    total = int(cycles.sum())
    if total == 0:
        return {LAYERS: seconds}
    return {_KINDS[kind]: seconds * int(cycles[kind]) / total for kind in Kind}


def _category(event: Any) -> str:
    """The named range the event lies in, else the innermost operator that is listed, else `OTHER_OPS`."""
    found, node = OTHER_OPS, event
    while node is not None:
        name = node.name
        if name in (HEAD, SAMPLING):
            return name
        if found == OTHER_OPS and name in _OPS:
            found = _OPS[name]
        node = node.cpu_parent
    return found


@contextmanager
def named_ranges(model: LlamaModel) -> Iterator[None]:
    """While open, what is not an operator shows up in a profile too: the output head, the sampler, the model's own CPU
    layers."""
    with ExitStack() as stack:
        stack.enter_context(_in_range(model, "compute_logits", HEAD))
        stack.enter_context(_in_range(step_module, "sample", SAMPLING))
        for layer, name in ((PackedLinear, LINEAR), (CpuRMSNorm, NORMS)):
            stack.enter_context(_in_range(layer, "forward", name))
        yield


@contextmanager
def _in_range(owner: Any, name: str, label: str) -> Iterator[None]:
    """While open, calls of owner.name lie in a range of the profile called `label`."""
    is_own = name in vars(owner)
    plain = getattr(owner, name)

    def labelled(*args: Any, **kwargs: Any) -> Any:
        with record_function(label):
            return plain(*args, **kwargs)

    setattr(owner, name, labelled)
    try:
        yield
    finally:
        if is_own:
            setattr(owner, name, plain)
        else:  # the instance's attribute goes, the class's method shows again
            delattr(owner, name)
