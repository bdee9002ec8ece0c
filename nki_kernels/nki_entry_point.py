# SPDX-License-Identifier: Apache-2.0
"""nki's framework interface: a kernel of this project at given shapes → config and files of its custom call.

The only file that knows how the vendor's compiler is called; `toolchain` has its language. The interface is the one
that AWS's own integrations of nki 0.6 build on (nkipy's `nki_op`, the vLLM plugin's `nki_compile`): CompileKernel for
the options of production, compile_kernel_to_nir, which its cached form calls, and the result's build_config. nki
documents none of it, so every name that is used is checked first. Runs in a process of its own, which sees nothing of
the caller's NKI settings. *Not yet run with a real nki.*
"""

import base64
import binascii
import importlib
import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from nki_kernels import toolchain

# The release whose language the kernels are written in; kernels of different releases must not be mixed in a graph.
NKI_RELEASE = "0.6"
# Says to nki, and to kernels that ask while they are traced, for which target they are compiled. Its values (trn1,
# inf2, trn2, trn3) are documented, those of CompileKernel's own `target` are not.
TARGET_VARIABLE = "NEURON_PLATFORM_TARGET_OVERRIDE"
# What nki appends to the name of an input that the kernel updates in place.
IN_PLACE_SUFFIX = ".must_alias_input"
# Beside the kernel's own file: constants that it names.
CONSTANTS = "*.npy"
_REQUESTS, _RESULT = "requests.json", "result.json"


class NkiError(Exception):
    """nki is missing, another release, offers another interface, or refuses a kernel."""


class TensorArgument(NamedTuple):
    """A tensor argument; dtype: numpy's or ml_dtypes' name."""

    shape: tuple[int, ...]
    dtype: str


class KernelRequest(NamedTuple):
    """kernel: "module.function" below nki_kernels. arguments: by name; what is no TensorArgument is a constant: a
    number, string, bool, None or a tuple of them."""

    kernel: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True)
class CompiledKernel:
    """What nki made of a kernel.

    config: of the custom call, decoded; config["klir_binary"]["binary"] is the path that the kernel's file had. files:
    it and its constants, by name. inputs: names of the tensor arguments in the order of the call's operands. outputs:
    in order. aliases: (output, input) of outputs that are an input, updated in place.
    """

    config: dict[str, Any]
    files: Mapping[str, bytes]
    inputs: tuple[str, ...]
    outputs: tuple[TensorArgument, ...]
    aliases: tuple[tuple[int, int], ...]

    @property
    def file_name(self) -> str:
        """Name of the kernel's own file."""
        return Path(self.config["klir_binary"]["binary"]).name


class _Interface(NamedTuple):
    """What is used of nki."""

    version: str
    kernel: Any  # class of @nki.jit's results: a dataclass with func, lnc and settings
    compiling_kernel: Any  # the same with artifacts_dir
    translate: Any  # (kernel, inputs, compile_opts, frontend, enable_cache) → result with build_config()


def find_nki() -> _Interface:
    """The installed nki; kernels that are imported from here on are written against it. NkiError that says which came
    and what is needed."""
    try:
        release = version("nki")
    except PackageNotFoundError as error:
        raise NkiError(f"nki is not installed, need {NKI_RELEASE}") from error
    if not release.startswith(f"{NKI_RELEASE}."):
        raise NkiError(f"nki is {release}, need {NKI_RELEASE}")
    try:
        toolchain.use_nki()
        kernel = importlib.import_module("nki.framework.kernel")
        compiled = importlib.import_module("nki.framework.compiled")
    except ImportError as error:
        raise NkiError(f"nki {release}: its language or framework interface can't be imported ({error})") from error
    for module, name in (
        (kernel, "Kernel"), (compiled, "CompileKernel"), (compiled, "compile_kernel_to_nir"),
    ):  # fmt: skip
        _need(hasattr(module, name), release, f"{module.__name__}.{name}")
    found = _Interface(release, kernel.Kernel, compiled.CompileKernel, compiled.compile_kernel_to_nir)
    for cls, names in ((found.kernel, {"func", "lnc"}), (found.compiling_kernel, {"artifacts_dir"})):
        have = {field.name for field in fields(cls)} if is_dataclass(cls) else set()
        _need(names <= have, release, f"{cls.__name__} as a dataclass with {', '.join(sorted(names))}")
    _need(issubclass(found.compiling_kernel, found.kernel), release, "CompileKernel derived from Kernel")
    for name in ("_compile_opts", "_frontend_cls", "_enable_backend_opt"):
        _need(hasattr(found.compiling_kernel, name), release, f"CompileKernel.{name}")
    parameters = inspect.signature(found.translate).parameters
    for name in ("inputs", "compile_opts", "frontend", "enable_cache"):
        _need(name in parameters, release, f"compile_kernel_to_nir({name}=…)")
    return found


def _need(ok: bool, release: str, what: str) -> None:
    if not ok:
        raise NkiError(f"nki {release}: need {what}, which this release does not have; tested interface: {NKI_RELEASE}")


def compile_kernel(
    nki: _Interface, request: KernelRequest, target: str, num_cores: int, folder: Path
) -> dict[str, Any]:
    """Translate one kernel for this process's target; nki keeps its files in the empty folder.

    CompiledKernel's fields as JSON values, with the files' paths. Raises NkiError.
    """
    module, _, name = request.kernel.rpartition(".")
    kernel: Any = getattr(importlib.import_module(f"nki_kernels.{module}"), name)
    if not isinstance(kernel, nki.kernel):
        got = f"{type(kernel).__module__}.{type(kernel).__qualname__}"
        raise NkiError(f"{name}: nki.jit of nki {nki.version} gave a {got}, need a {nki.kernel.__qualname__}")
    settings = {f.name: getattr(kernel, f.name) for f in fields(kernel) if f.init and f.name not in ("func", "lnc")}
    compiling = nki.compiling_kernel(kernel.func, **settings, lnc=num_cores, artifacts_dir=str(folder))
    # In the order of the signature, as nki's own integrations pass them: it becomes the order of the operands.
    parameters = inspect.signature(kernel.func).parameters
    inputs = {key: _placeholder(request.arguments[key]) for key in parameters if key in request.arguments}
    if len(inputs) != len(request.arguments):
        raise NkiError(f"{name}: it has no argument {', '.join(sorted(request.arguments.keys() - parameters.keys()))}")
    frontend = compiling._frontend_cls(enable_backend_opt=compiling._enable_backend_opt)
    try:
        # Without its cache the kernel's file stays in the folder; the cache is shared by all users of the machine.
        result = nki.translate(
            compiling, inputs=inputs, compile_opts=compiling._compile_opts(), frontend=frontend, enable_cache=False
        )
    except Exception as error:  # whatever nki's front end raises
        said = " ".join(str(error).split())[:600]
        raise NkiError(f"{name}: nki {nki.version} refuses it for {target}: {type(error).__name__}: {said}") from error
    return _collect(nki, name, result)


def _placeholder(value: Any) -> Any:
    """An array in a tensor's place, of which only shape and dtype count; a constant as it is."""
    if not isinstance(value, TensorArgument):
        return value
    return np.empty(value.shape, _numpy_dtype(value.dtype))


def _numpy_dtype(name: str) -> "np.dtype[Any]":
    import ml_dtypes

    return np.dtype(getattr(ml_dtypes, name, name))


def _collect(nki: _Interface, name: str, result: Any) -> dict[str, Any]:
    """nki's result, checked. See compile_kernel."""
    _need(hasattr(result, "build_config"), nki.version, "a result with build_config()")
    _need(hasattr(result, "is_tuple_return"), nki.version, "a result with is_tuple_return")
    built = result.build_config()
    for attribute in ("backend_config_b64", "output_specs", "operand_output_aliases", "has_collectives"):
        _need(hasattr(built, attribute), nki.version, f"a config with {attribute}")
    try:
        config = json.loads(base64.b64decode(built.backend_config_b64, validate=True))
        binary = config["klir_binary"]
        path, inputs = Path(binary["binary"]), tuple(map(str, binary["input_names"]))
    except (binascii.Error, ValueError, KeyError, TypeError) as error:
        raise NkiError(
            f"nki {nki.version}: the config of {name} can't be read ({type(error).__name__}: {error}), need base64 of "
            "JSON with klir_binary.binary and klir_binary.input_names"
        ) from error
    if not path.is_file():
        raise NkiError(f"nki {nki.version}: the config of {name} names the file {path}, which is not there")
    if built.has_collectives:
        raise NkiError(f"{name}: nki {nki.version} says that it talks to other devices, need a kernel of one")
    outputs = tuple(_output(nki, spec) for spec in built.output_specs)
    if result.is_tuple_return and len(outputs) == 1:
        raise NkiError(f"{name}: it returns a tuple of one tensor, need the tensor")
    aliases = sorted((int(output), int(operand)) for operand, output in built.operand_output_aliases.items())
    files = [str(file) for file in [path, *sorted(path.parent.glob(CONSTANTS))]]
    operands = [key.removesuffix(IN_PLACE_SUFFIX) for key in inputs]
    return {"config": config, "files": files, "inputs": operands, "outputs": outputs, "aliases": aliases}


def _output(nki: _Interface, spec: Any) -> TensorArgument:
    _need(hasattr(spec, "shape") and hasattr(spec, "dtype"), nki.version, "outputs with shape and dtype")
    try:
        return TensorArgument(tuple(map(int, spec.shape)), _numpy_dtype(str(spec.dtype)).name)
    except TypeError as error:
        raise NkiError(f"nki {nki.version}: output dtype {spec.dtype!r}: need a numpy dtype's name") from error


def write_requests(folder: Path, target: str, num_cores: int, requests: Sequence[KernelRequest]) -> None:
    """What main() reads. None of them: it only says whether nki is there."""
    kernels = [
        {
            "kernel": request.kernel,
            "tensors": {name: v for name, v in request.arguments.items() if isinstance(v, TensorArgument)},
            "constants": {name: v for name, v in request.arguments.items() if not isinstance(v, TensorArgument)},
        }
        for request in requests
    ]
    (folder / _REQUESTS).write_text(json.dumps({"target": target, "num_cores": num_cores, "kernels": kernels}))


def read_result(folder: Path) -> tuple[str, list[CompiledKernel]]:
    """nki's version and the kernels that main() made.

    Raises the NkiError that it ended with, FileNotFoundError or JSONDecodeError if it did not come to its end.
    """
    result = json.loads((folder / _RESULT).read_text())
    if "error" in result:
        raise NkiError(result["error"])
    kernels = [
        CompiledKernel(
            made["config"],
            {Path(file).name: Path(file).read_bytes() for file in made["files"]},
            tuple(made["inputs"]),
            tuple(TensorArgument(tuple(shape), dtype) for shape, dtype in made["outputs"]),
            tuple((output, operand) for output, operand in made["aliases"]),
        )
        for made in result["kernels"]
    ]
    return result["version"], kernels


def _request(values: Mapping[str, Any]) -> KernelRequest:
    tensors = {name: TensorArgument(tuple(shape), dtype) for name, (shape, dtype) in values["tensors"].items()}
    constants = {name: _as_tuples(value) for name, value in values["constants"].items()}
    return KernelRequest(values["kernel"], tensors | constants)


def _as_tuples(value: Any) -> Any:
    return tuple(map(_as_tuples, value)) if isinstance(value, list) else value


def main(arguments: Sequence[str]) -> None:
    """Entry of the child process: write_requests' file in the folder that it is given → read_result's."""
    folder = Path(arguments[0])
    wanted = json.loads((folder / _REQUESTS).read_text())
    result: dict[str, Any] = {}
    try:
        nki = find_nki()
        kernels = []
        for number, values in enumerate(wanted["kernels"]):
            place = folder / str(number)
            place.mkdir()
            kernels.append(compile_kernel(nki, _request(values), wanted["target"], wanted["num_cores"], place))
        result = {"version": nki.version, "kernels": kernels}
    except NkiError as error:
        result = {"error": str(error)}
    (folder / _RESULT).write_text(json.dumps(result))
