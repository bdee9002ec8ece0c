# SPDX-License-Identifier: Apache-2.0
"""nki.framework.compiled: a kernel and shapes → a config and the file that it names.

The "binary" is a script for tests: which function, in which order its operands come, its constants. Outputs and aliases
follow from running the kernel once in the simulator, on zeros; a plan of writes, whose rows may not repeat, is that of
tokens without a slot.
"""

import base64
import json
import os
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from nki.framework.kernel import Kernel
from nki_kernels import simulator
from nki_kernels.write_plan import WriteShape, plan_writes

SUFFIX = ".must_alias_input"


class Frontend:
    """Translates a kernel's source."""

    def __init__(self, enable_backend_opt: bool) -> None:
        self.enable_backend_opt = enable_backend_opt


@dataclass(frozen=True)
class Options:
    """What the compiler is told."""

    target: str
    lnc: int
    artifacts_dir: str


@dataclass(frozen=True)
class CompileKernel(Kernel):
    """A kernel about to be compiled."""

    artifacts_dir: str = ""
    target: str | None = None
    _enable_backend_opt: bool = False
    _frontend_cls: type = Frontend

    def _compile_opts(self) -> Options:
        assert not [name for name in os.environ if name.startswith("NKI_")]
        target = self.target or os.environ["NEURON_PLATFORM_TARGET_OVERRIDE"]
        return Options(target, self.lnc, self.artifacts_dir)


class Result:
    """A translated kernel."""

    def __init__(self, config: dict, outputs: tuple, aliases: dict[int, int], is_tuple_return: bool) -> None:
        self.is_tuple_return = is_tuple_return
        self._config, self._outputs, self._aliases = config, outputs, aliases

    def build_config(self) -> SimpleNamespace:
        """What a framework needs."""
        return SimpleNamespace(
            backend_config_b64=base64.b64encode(json.dumps(self._config).encode()),
            output_specs=self._outputs,
            operand_output_aliases=self._aliases,
            has_collectives=False,
        )


def compile_kernel_to_nir(
    kernel_func: CompileKernel, *, inputs: dict, compile_opts: Options, frontend: Frontend, enable_cache: bool = True
) -> Result:
    """Run the kernel in the simulator, write its script into the folder for artifacts."""
    assert not enable_cache and not frontend.enable_backend_opt
    arrays = {name: np.zeros_like(value) for name, value in inputs.items() if isinstance(value, np.ndarray)}
    if "write_plan" in arrays:
        (num_tokens, heads, dim), cache = arrays["key"].shape, arrays["kv_cache"]
        shape = WriteShape(num_tokens, heads, cache.shape[3], dim, arrays["key"].itemsize, cache.itemsize)
        arrays["write_plan"] = plan_writes(np.zeros(num_tokens, np.int32), shape)
    cores = compile_opts.lnc if compile_opts.lnc > 1 else None
    run = simulator.run(kernel_func.func, **{**inputs, **arrays}, target=compile_opts.target, grid=cores)
    returned = run.outputs if isinstance(run.outputs, tuple) else (run.outputs,)
    names = list(arrays)
    aliases = {
        i: output for output, array in enumerate(returned) for i, name in enumerate(names) if array is arrays[name]
    }
    function = f"{kernel_func.func.__module__}.{kernel_func.func.__name__}"
    constants = {name: value for name, value in inputs.items() if name not in arrays}
    script = {
        "function": function, "operands": names, "constants": constants, "target": compile_opts.target, "cores": cores
    }
    path = Path(compile_opts.artifacts_dir, f"{kernel_func.func.__name__}.json")
    path.write_text(json.dumps(script, sort_keys=True))
    Path(compile_opts.artifacts_dir, "identity.npy").write_bytes(b"a constant")
    Path(compile_opts.artifacts_dir, f"{kernel_func.func.__name__}.log").write_text(str(path))  # differs in every run
    outputs = [f"out{i}" for i in range(len(returned))]
    config = {
        "func_name": function, "kernel_format": "bir", "kernel_version": 1, "grid": compile_opts.lnc,
        "klir_binary": {
            "binary": str(path), "output_names": outputs, "aliases": [list(pair) for pair in aliases.items()],
            "input_names": [name + SUFFIX * (i in aliases) for i, name in enumerate(names)],
        },
    }  # fmt: skip
    named = zip(outputs, returned, strict=True)
    specs = tuple(SimpleNamespace(name=name, shape=a.shape, dtype=a.dtype.name) for name, a in named)
    return Result(config, specs, aliases, isinstance(run.outputs, tuple))
