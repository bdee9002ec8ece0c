# SPDX-License-Identifier: Apache-2.0
"""Run in a child process by test_lowering_without_torch_xla.py: prints the variables that matter to lowering."""

import os


def main(arguments: list[str]) -> None:
    for name in ("NEURON_CC_FLAGS", "PJRT_DEVICE", "PYTHONHASHSEED", "XLA_FLAGS"):
        if name in os.environ:
            print(f"{name}={os.environ[name]}")
