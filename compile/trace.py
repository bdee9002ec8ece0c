# SPDX-License-Identifier: Apache-2.0
"""Inside the lowering process: traces callables with torch_xla's placeholders and writes the graphs.

`_XLAC` is private API of exactly the release that lower.py names.
"""

import json
import pickle
import resource
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compile import hlo_edit
from compile.errors import CompileError, LoweringError
from compile.graph_spec import ELEMENT_BYTES, GraphSpec, TensorSpec
from compile.hlo import Module, parse_module
from compile.hlo_sources import model_sources
from compile.kernel_calls import RecordingKernelCompiler, use_kernel_compiler
from compile.lower import TORCH_VERSION, TORCH_XLA_VERSION, LoweringRequest
from compile.lowered_graph import LoweredGraph, LoweringCost, Manifest, Parameter, Role
from compile.neff_names import declare_names

if TYPE_CHECKING:
    from torch import Tensor

# Parts of the paths of files that are not the model's own.
_FOREIGN_FILES = ("/torch/", "/torch_xla/", "/compile/", "/neuron_paged/ops/", "<frozen", "<string>")


def main(arguments: list[str]) -> None:
    """Entry of the child: lowers FOLDER/requests.pickle into FOLDER/0, FOLDER/1, … and FOLDER/status.json."""
    folder = Path(arguments[0])
    status: dict[str, str] = {}
    missing = _missing_package()
    if missing:
        status["missing"] = missing
    else:
        try:
            requests: list[LoweringRequest] = pickle.loads((folder / "requests.pickle").read_bytes())
            for i, request in enumerate(requests):
                (folder / str(i)).mkdir()
                trace(request).save(folder / str(i))
        except CompileError as error:
            status["error"] = str(error)
        except Exception as error:  # whatever the caller's factory raises
            status["error"] = f"{type(error).__name__}: {error} ({_model_line(error)})"
    (folder / "status.json").write_text(json.dumps(status))


def _missing_package() -> str | None:
    for name, need in (("torch_xla", TORCH_XLA_VERSION), ("torch", TORCH_VERSION)):
        try:
            got = __import__(name).__version__
        except ImportError as error:
            return f"{name} can't be imported ({error}), need {need}"
        if got.split("+")[0] != need:
            return f"got {name} {got}, need {need}"
    return None


def trace(request: LoweringRequest) -> LoweredGraph:
    """Lower one request in this process."""
    import torch
    import torch_xla
    import torch_xla.core.xla_builder as xb
    from torch_xla import _XLAC

    spec = request.spec
    compiler = None if request.kernel_compiler is None else RecordingKernelCompiler(request.kernel_compiler)
    step = request.factory()
    weights = _weights(step)
    roles: dict[str, Role] = {s.name: "input" for s in spec.inputs}
    roles.update((s.name, "state") for s in spec.state)
    clash = sorted(roles.keys() & weights.keys())
    if clash:
        raise LoweringError(f"{spec.name}: {', '.join(clash)} names both an input and a weight, need distinct names.")
    weight_specs = {name: _weight_spec(spec, name, tensor) for name, tensor in weights.items()}
    specs = {s.name: s for s in (*spec.inputs, *spec.state)} | weight_specs
    roles.update((name, "weight") for name in weights)

    start = time.process_time()
    placeholders = {
        name: xb.create_placeholder_tensor(list(s.shape), getattr(torch, s.dtype)) for name, s in specs.items()
    }
    with _tracing(), use_kernel_compiler(compiler):
        # A clone is a second handle of the same value: after an in-place operation the placeholder still stands for the
        # parameter, while the clone has become the new value.
        handles = {name: tensor.clone() for name, tensor in placeholders.items()}
        outputs = _call(step, spec, handles, weights.keys())
        state = [handles[s.name] for s in spec.state]
        context = _XLAC.lowering.LoweringContext()
        context.set_name_string(spec.name)
        try:
            context.build([*outputs, *state])
        except RuntimeError as error:
            raise LoweringError(f"{spec.name}: the graph can't be built: {_first_line(error)}.") from error
        hlo = context.hlo()
        numbers = {name: context.tensor_parameter_id(tensor) for name, tensor in placeholders.items()}
        used = sorted((number, name) for name, number in numbers.items() if number >= 0)
        _check_no_constants(spec, context.device_parameter_id_tensor_mapping(), len(used))
    results = [_output_spec(spec, name, tensor) for name, tensor in zip(spec.outputs, outputs, strict=True)]
    manifest = Manifest(
        name=spec.name,
        parameters=tuple(Parameter(specs[name], roles[name]) for _, name in used),
        outputs=(*results, *spec.state),
        aliases={len(outputs) + i: numbers[s.name] for i, s in enumerate(spec.state)},
        unused=tuple(name for name, number in numbers.items() if number < 0),
        kernels={} if compiler is None else compiler.calls,
        kernel_compiler="" if compiler is None else compiler.identity,
        toolchain={"torch": torch.__version__, "torch_xla": torch_xla.__version__, "functionalization": "off"},
    )
    module = parse_module(hlo)
    _check_state_is_updated(spec, module)
    sources = model_sources(hlo, module, _is_foreign)
    try:
        hlo = hlo_edit.inline_kernel_calls(hlo_edit.normalise(hlo, spec.name))
        hlo = declare_names(hlo, manifest.aliases) + hlo_edit.must_alias(manifest.aliases)
    except ValueError as error:
        raise LoweringError(f"{spec.name}: {error}") from error
    cost = LoweringCost(time.process_time() - start, _peak_rss_bytes())
    return LoweredGraph(hlo, manifest, {} if compiler is None else compiler.artifacts, sources, cost)


def _peak_rss_bytes() -> int:
    """Of this process. getrusage's figure would start from the parent's size at the fork."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):  # not Linux
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@contextmanager
def _tracing() -> Iterator[None]:
    from torch_xla import _XLAC

    _XLAC._set_xla_all_numbers_special_scalars(True)  # otherwise every Python scalar becomes a parameter
    _XLAC._set_allow_execution(False)  # .item() or bool() of a traced tensor raises instead of running the graph
    _XLAC._set_ir_debug(True)  # source locations
    try:
        yield
    finally:
        _XLAC._set_ir_debug(False)
        _XLAC._set_allow_execution(True)
        _XLAC._set_xla_all_numbers_special_scalars(False)


def _weights(step: Callable[..., Any]) -> dict[str, "Tensor"]:
    """Parameters and buffers of a module; a tied one once."""
    import torch

    if not isinstance(step, torch.nn.Module):
        return {}
    return {**dict(step.named_parameters()), **dict(step.named_buffers())}


def _weight_spec(spec: GraphSpec, name: str, tensor: "Tensor") -> TensorSpec:
    dtype = str(tensor.dtype).removeprefix("torch.")
    if dtype not in ELEMENT_BYTES:
        raise LoweringError(f"{spec.name}: weight {name} is {dtype}, need one of {', '.join(ELEMENT_BYTES)}.")
    return TensorSpec(name, tuple(tensor.shape), dtype)


def _output_spec(spec: GraphSpec, name: str, tensor: "Tensor") -> TensorSpec:
    dtype = str(tensor.dtype).removeprefix("torch.")
    dtype = "int32" if dtype == "int64" else dtype  # hlo_edit.normalise narrows it
    if dtype not in ELEMENT_BYTES:
        raise LoweringError(f"{spec.name}: output {name} is {dtype}, need one of {', '.join(ELEMENT_BYTES)}.")
    return TensorSpec(name, tuple(tensor.shape), dtype)


def _call(
    step: Callable[..., Any], spec: GraphSpec, handles: Mapping[str, "Tensor"], weights: Any
) -> list["Tensor"]:
    """Results of the step on traced tensors, one per name of spec.outputs."""
    import torch
    from torch.func import functional_call

    arguments = tuple(handles[s.name] for s in (*spec.inputs, *spec.state))
    try:
        with torch.no_grad():
            if isinstance(step, torch.nn.Module):
                returned = functional_call(step, {name: handles[name] for name in weights}, arguments)
            else:
                returned = step(*arguments)
    except CompileError:
        raise
    except Exception as error:
        where, first = _model_line(error), _first_line(error)
        if "execution" in first.lower():
            raise LoweringError(
                f"{spec.name}: the step reads a tensor's value on the host ({where}), need a static step: no .item(), "
                "bool() or shape that depends on data."
            ) from error
        if "Expected XLA tensor" in first or "XLATensor" in first or "cpu" in first:
            first += "; make tensors on the device of an input, not on the CPU"
        raise LoweringError(f"{spec.name}: {type(error).__name__} at {where}: {first}") from error
    outputs = list(returned) if isinstance(returned, (tuple, list)) else [] if returned is None else [returned]
    if len(outputs) != len(spec.outputs):
        raise LoweringError(f"{spec.name}: the step returned {len(outputs)} tensors, need {list(spec.outputs)}.")
    for name, tensor in zip(spec.outputs, outputs, strict=True):
        if not isinstance(tensor, torch.Tensor) or tensor.device.type != "xla":
            got = f"a tensor on {tensor.device}" if isinstance(tensor, torch.Tensor) else type(tensor).__name__
            raise LoweringError(f"{spec.name}: output {name} is {got}, need a tensor computed from the inputs.")
    return outputs


def _check_no_constants(spec: GraphSpec, parameters: Mapping[int, "Tensor"], num_used: int) -> None:
    """Every parameter of the graph must be one of ours; others are tensors that the step made or kept by itself."""
    if len(parameters) == num_used:
        return
    listed = ", ".join(sorted(f"{list(t.shape)} {str(t.dtype).removeprefix('torch.')}" for t in parameters.values()))
    raise LoweringError(
        f"{spec.name}: the step hides {len(parameters) - num_used} constants; the graph's parameters are {listed}. "
        "Pass them as inputs, or make them parameters or buffers of the module."
    )


def _check_state_is_updated(spec: GraphSpec, module: Module) -> None:
    """An output that is a bare parameter can't be written in place, and the state would not have to be state."""
    results = module.entry.operands(module.entry.root)[len(spec.outputs) :]
    names = [s.name for s, result in zip(spec.state, results, strict=True) if result.opcode == "parameter"]
    if names:
        raise LoweringError(f"{spec.name}: the step does not change the state {', '.join(names)}; make it an input.")


def _is_foreign(file: str) -> bool:
    return any(part in file for part in _FOREIGN_FILES)


def _model_line(error: BaseException) -> str:
    """file:line of the innermost frame that is the model's own."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not _is_foreign(frame.filename)]
    frame = (own or list(frames))[-1]
    return f"{frame.filename}:{frame.lineno}"


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
