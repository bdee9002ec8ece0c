# SPDX-License-Identifier: Apache-2.0
"""Versions of Neuron's driver, runtime, compiler and NKI on this machine, and which of them don't go together.

Reads package databases and /sys, and never loads a Neuron library: loading one can claim a device.
"""

import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

from compile.neuronx_cc_flags import SDK_OF_COMPILER, compiler_version

# Runtime 2.32 (SDK 2.30) dropped drivers up to 2.26 (Neuron release notes, runtime).
FIRST_RUNTIME_WITHOUT_OLD_DRIVERS = (2, 32)
LAST_OLD_DRIVER = (2, 26)
# NKI release → SDK it ships with; kernels of one NKI need that SDK's compiler (NCC_EVRF065 otherwise).
SDK_OF_NKI = {"0.1": "2.27", "0.2": "2.28", "0.3": "2.29", "0.4": "2.30", "0.5": "2.31", "0.6": "2.32"}
# Runtime release → SDK it ships with (n2-manifest.json of the SDK).
SDK_OF_RUNTIME = {"2.29": "2.27", "2.30": "2.28", "2.31": "2.29", "2.32": "2.30", "2.33": "2.31", "2.34": "2.32"}
_SYSTEM_PACKAGES = {"driver": "aws-neuronx-dkms", "runtime": "aws-neuronx-runtime-lib"}


def system_versions(module: Path = Path("/sys/module/neuron/version")) -> dict[str, str | None]:
    """{"driver", "runtime"}: version of the loaded driver (else of its package) and of the runtime's package; None if
    absent."""
    found: dict[str, str | None] = {name: _package_version(package) for name, package in _SYSTEM_PACKAGES.items()}
    try:
        found["driver"] = module.read_text().strip() or found["driver"]
    except OSError:
        pass
    return found


def _package_version(package: str) -> str | None:
    for command in (["dpkg-query", "-W", "-f", "${Version}", package], ["rpm", "-q", "--qf", "%{VERSION}", package]):
        if shutil.which(command[0]) is None:
            continue
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=10, stdin=subprocess.DEVNULL)
        except (OSError, subprocess.TimeoutExpired):
            continue
        if done.returncode == 0 and done.stdout.strip():
            return done.stdout.strip()
    return None


def version_problems(
    *, driver: str | None, runtime: str | None, compiler: str | None, nki: str | None, nrtpy: str | None
) -> list[str]:
    """What can't work together, one line each; versions that are absent or can't be read are passed over."""
    problems = []
    driver_numbers, runtime_numbers = _numbers(driver), _numbers(runtime)
    if driver_numbers and runtime_numbers:
        if runtime_numbers >= FIRST_RUNTIME_WITHOUT_OLD_DRIVERS and driver_numbers <= LAST_OLD_DRIVER:
            problems.append(
                f"Neuron driver {driver} with runtime {runtime}: runtime 2.32 and newer need a driver after 2.26, "
                "models won't load; update aws-neuronx-dkms, or use SDK 2.29 or older where the host's driver is fixed"
            )
    compiler_numbers = _numbers(compiler)
    if compiler is not None and compiler_numbers is not None:
        release = ".".join(map(str, compiler_numbers))
        sdk = SDK_OF_COMPILER.get(release)
        if sdk is None:
            known = f"{min(SDK_OF_COMPILER)} to {max(SDK_OF_COMPILER)}"
            problems.append(f"neuronx-cc {compiler} is not a release this version knows ({known})")
        nki_numbers = _numbers(nki)
        nki_sdk = None if nki_numbers is None else SDK_OF_NKI.get(".".join(map(str, nki_numbers)))
        if sdk is not None and nki_sdk is not None and nki_sdk != sdk:
            problems.append(
                f"nki {nki} belongs to SDK {nki_sdk}, neuronx-cc {compiler} to SDK {sdk}; install both from one SDK"
            )
    nrtpy_numbers = _numbers(nrtpy)
    if runtime_numbers and nrtpy_numbers and runtime_numbers != nrtpy_numbers:
        problems.append(f"nrtpy {nrtpy} with runtime {runtime}: their versions must match; install both from one SDK")
    if nrtpy is not None and nki is not None:
        problems.append("nrtpy and nki in one environment: their wheels conflict; compile in one, serve in another")
    return problems


def neff_problems(compiler: str, runtime: str | None) -> list[str]:
    """Why a NEFF of this neuronx-cc may not load with this runtime; versions that can't be read are passed over."""
    made, here = _sdk(SDK_OF_COMPILER, compiler), _sdk(SDK_OF_RUNTIME, runtime)
    if made is None or here is None or compiler_version(f"{made}.0") <= compiler_version(f"{here}.0"):
        return []
    return [
        f"compiler: neuronx-cc {compiler} (SDK {made}) → runtime {runtime} (SDK {here}), which is older; update "
        "aws-neuronx-runtime-lib or compile with that SDK"
    ]


def _sdk(releases: Mapping[str, str], version: str | None) -> str | None:
    numbers = _numbers(version)
    return None if numbers is None else releases.get(".".join(map(str, numbers)))


def _numbers(version: str | None) -> tuple[int, ...] | None:
    """(major, minor), None for what is no version. Wheels add "+BUILD", such as nki's "+31049202112.g85070674"."""
    try:
        return None if version is None else compiler_version(version.split("-")[0].split("+")[0])[:2]
    except ValueError:
        return None
