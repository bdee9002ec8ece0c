# SPDX-License-Identifier: Apache-2.0
"""Which Neuron target this machine is, and what a compiled graph must have been made for to run here."""

from dataclasses import dataclass

from compile.neuronx_cc_flags import NEURON_TARGETS, check_lnc
from neuron_paged.collect_env import instance_type, package_versions
from neuron_paged.env import neuron_logical_nc_config, neuron_platform_target
from neuron_paged.errors import GraphError
from neuron_paged.neuron_versions import neff_problems, system_versions, version_problems

# Other values that NEURON_PLATFORM_TARGET_OVERRIDE may have (documentation of nki.jit), and the targets they mean.
_TARGETS_OF_GENERATION = {"gen2": ("trn1", "inf2"), "gen3": ("trn2",), "gen4": ("trn3",)}


@dataclass(frozen=True)
class NeuronMachine:
    """target: as neuronx-cc calls it. lnc: physical cores per logical core, as the runtime groups them. source: what
    says so."""

    target: str
    lnc: int
    source: str

    def __str__(self) -> str:
        return f"{self.target} with LNC {self.lnc} ({self.source})"


def neuron_machine() -> NeuronMachine:
    """This machine: by NEURON_PLATFORM_TARGET_OVERRIDE, else by its EC2 instance type; LNC by NEURON_LOGICAL_NC_CONFIG,
    else the target's default. GraphError where neither says which target it is, or the LNC is none of the target's."""
    named, instance = neuron_platform_target(), instance_type()
    family = (instance or "").partition(".")[0]
    target = next((known for known in NEURON_TARGETS if family.startswith(known)), None)
    if named is not None:
        meant = _TARGETS_OF_GENERATION.get(named, (named,))
        if target not in meant:
            target = meant[0] if len(meant) == 1 else None
    if target not in NEURON_TARGETS:
        got = f"NEURON_PLATFORM_TARGET_OVERRIDE={named}" if named else instance or "no EC2 instance type"
        raise GraphError(
            f"executor neuron: got {got}, need one of {', '.join(NEURON_TARGETS)}, to choose a bundle. On a Neuron "
            "instance that hides its type, set NEURON_PLATFORM_TARGET_OVERRIDE."
        )
    cores = neuron_logical_nc_config()
    if cores is not None and not cores.isdecimal():
        raise GraphError(f"NEURON_LOGICAL_NC_CONFIG: got {cores!r}, need a number of cores.")
    try:
        lnc = check_lnc(target, None if cores is None else int(cores))
    except ValueError as error:
        raise GraphError(f"NEURON_LOGICAL_NC_CONFIG: got {cores!r}: {error}") from error
    source = "NEURON_PLATFORM_TARGET_OVERRIDE" if named else str(instance)
    return NeuronMachine(target, lnc, source + ("" if cores is None else ", NEURON_LOGICAL_NC_CONFIG"))


def compiler_problems(compiler: str) -> list[str]:
    """Why a bundle's NEFFs may not load on this machine. compiler: the bundle's field, "neuronx-cc 2.27.5334.0"."""
    system, packages = system_versions(), package_versions(("nki", "nrtpy"))
    here = version_problems(**system, compiler=None, nki=packages["nki"], nrtpy=packages["nrtpy"])
    return [*here, *neff_problems(compiler.removeprefix("neuronx-cc "), system["runtime"])]
