#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Lets a CUDA build of torch be imported on a machine without CUDA's libraries: every library it needs and does not
find becomes a stand-in whose functions return cudaErrorNoDevice.

    VENV/bin/python .ci/cuda_stubs.py

For the XLA test lane: PyPI has torch 2.9 for x86-64 as a CUDA build only, and its 14 NVIDIA packages take 5 GB. Needs
gcc and binutils. Running it again replaces what an earlier run wrote.
"""

import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

# All functions live in this one library; the stand-ins under NVIDIA's names are empty and depend on it. A function in a
# library that torch's version-need tables name could make glibc stop the process.
FUNCTIONS = "libneuron_paged_no_cuda.so"
CUDA_ERROR_NO_DEVICE = 100
STAND_IN_BYTES = 200_000  # stand-ins are smaller than this, torch's libraries are not
SYSTEM = re.compile(r"^(libc|libm|libdl|librt|libpthread|libstdc\+\+|libgcc_s|libgomp|ld-linux.*)\.so")
VERSIONED_BY_SYSTEM = re.compile(r"@(GLIBC|GLIBCXX|CXXABI|GCC|GOMP|OMP|LIBC)")
RETURNS_TEXT = re.compile(r"Get(Error(String|Name)|StatusString|LastErrorString)|StatusName")


def output_of(*command: object) -> list[str]:
    done = subprocess.run([str(word) for word in command], check=True, capture_output=True, text=True)
    return done.stdout.splitlines()


def needed(library: Path) -> set[str]:
    """Names of the libraries that one depends on."""
    return {name for line in output_of("readelf", "-d", library) for name in re.findall(r"NEEDED.*\[(.*)\]", line)}


def symbols(library: Path) -> tuple[set[str], set[str]]:
    """(wanted with their versions, offered without); weak ones may stay unresolved and don't count."""
    wanted, offered = set(), set()
    for line in output_of("nm", "-D", library):
        *_, kind, name = line.split()
        if kind == "U":
            wanted.add(name)
        elif kind not in "vw":
            offered.add(name.split("@")[0])
    return wanted, offered


def offered_by_system() -> set[str]:
    """What glibc, libstdc++ and the like define: a stand-in for operator new would crash the process."""
    paths = [line.split("=> ")[-1] for line in output_of("ldconfig", "-p") if "=>" in line]
    libraries = [Path(path) for path in paths if SYSTEM.match(Path(path).name) and "x86_64" in path]
    return set().union(*(symbols(library)[1] for library in libraries))


def assembly(names: list[str]) -> str:
    lines = [".data", 'text: .asciz "no CUDA libraries on this machine"', ".text"]
    for name in names:
        result = "lea text(%rip),%rax" if RETURNS_TEXT.search(name) else f"mov ${CUDA_ERROR_NO_DEVICE},%eax"
        lines += [f".globl {name}", f".type {name},@function", f"{name}:", f"  {result}", "  ret"]
    return "\n".join([*lines, '.section .note.GNU-stack,"",@progbits', ""])


def link(*arguments: object) -> None:
    output_of("gcc", "-shared", "-nostdlib", *arguments)


def main() -> int:
    folder = Path(sysconfig.get_paths()["purelib"], "torch", "lib")
    missing_tools = [tool for tool in ("gcc", "nm", "readelf", "ldconfig") if shutil.which(tool) is None]
    if not folder.is_dir() or missing_tools:
        need = f"the commands {', '.join(missing_tools)}" if missing_tools else f"torch in {folder.parents[1]}"
        print(f"error: cuda_stubs.py needs {need}.", file=sys.stderr)
        return 2
    for path in folder.glob("lib*.so*"):
        if path.stat().st_size < STAND_IN_BYTES and (path.name == FUNCTIONS or FUNCTIONS in needed(path)):
            path.unlink()
    libraries = [path for path in folder.glob("*.so*") if "caffe2_nvrtc" not in path.name]
    present = {path.name for path in libraries}
    absent = sorted(set().union(*map(needed, libraries)) - present)
    absent = [name for name in absent if not SYSTEM.match(name)]
    wanted, offered = (set().union(*parts) for parts in zip(*map(symbols, libraries), strict=True))
    unversioned = {name.split("@")[0] for name in wanted if not VERSIONED_BY_SYSTEM.search(name)}
    names = sorted(name for name in unversioned - offered - offered_by_system() if not re.match(r"_?Py", name))
    with tempfile.TemporaryDirectory() as work:
        source = Path(work, "functions.s")
        source.write_text(assembly(names))
        link("-o", folder / FUNCTIONS, f"-Wl,-soname,{FUNCTIONS}", source)
        empty = Path(work, "empty.s")
        empty.write_text('.section .note.GNU-stack,"",@progbits\n')
        for name in absent:
            flags = (f"-Wl,-soname,{name}", "-Wl,--no-as-needed", "-Wl,-rpath,$ORIGIN", f"-L{folder}")
            link("-o", folder / name, *flags, empty, f"-l{FUNCTIONS[3:-3]}")
    print(f"cuda_stubs.py: {len(names)} functions, {len(absent)} libraries")
    return 0


if __name__ == "__main__":
    sys.exit(main())
