# SPDX-License-Identifier: Apache-2.0
"""EC2 instances with Neuron devices: which NeuronCores, how many, how much HBM. Prices are not its business."""

from dataclasses import dataclass

from neuron_paged.errors import ConfigError

GIB = 2**30


@dataclass(frozen=True)
class Instance:
    """num_devices chips; target as the compiler names it."""

    name: str
    target: str
    num_devices: int


# Cores and HBM (GiB) of one device. [doc] AWS Neuron documentation, architecture pages of NeuronCore-v2, v3, v4.
DEVICES = {"inf2": (2, 32), "trn1": (2, 32), "trn2": (8, 96), "trn3": (8, 144)}

# Devices per instance: [doc] AWS Neuron documentation, "Inf2/Trn1/Trn2 Architecture"; trn2.3xlarge: [general knowledge]
# of EC2's instance list. Trn3 has no public instance names: give --target trn3.
INSTANCES = {
    instance.name: instance
    for instance in (
        Instance("inf2.xlarge", "inf2", 1),
        Instance("inf2.8xlarge", "inf2", 1),
        Instance("inf2.24xlarge", "inf2", 6),
        Instance("inf2.48xlarge", "inf2", 12),
        Instance("trn1.2xlarge", "trn1", 1),
        Instance("trn1.32xlarge", "trn1", 16),
        Instance("trn1n.32xlarge", "trn1", 16),
        Instance("trn2.3xlarge", "trn2", 1),
        Instance("trn2.48xlarge", "trn2", 16),
        Instance("trn2u.48xlarge", "trn2", 16),
    )
}


def find_instance(name: str) -> Instance:
    """ConfigError for an unknown name; SageMaker's ml. in front is taken."""
    found = INSTANCES.get(name.removeprefix("ml."))
    if found is None:
        raise ConfigError(f"--instance: got {name!r}, need one of {', '.join(INSTANCES)}.")
    return found


def logical_cores(instance: Instance, num_cores: int) -> int:
    """Logical cores of num_cores NeuronCores each: the most ranks a model can have there."""
    return instance.num_devices * DEVICES[instance.target][0] // num_cores


def core_hbm_bytes(target: str, num_cores: int) -> int:
    """HBM of a logical core."""
    cores, gib = DEVICES[target]
    return gib * GIB // cores * num_cores
