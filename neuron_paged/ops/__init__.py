# SPDX-License-Identifier: Apache-2.0
"""The operators: importing this package registers `torch.ops.neuron_paged.*`."""

from neuron_paged.ops import autograd, cpu, fake, schema, xla

__all__ = ["autograd", "cpu", "fake", "schema", "xla"]
