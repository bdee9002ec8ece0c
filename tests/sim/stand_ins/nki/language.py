# SPDX-License-Identifier: Apache-2.0
"""nki.language: the simulator's."""

from nki_kernels.simulator.modules import nki_modules


def __getattr__(name: str):
    return getattr(nki_modules()["nki.language"], name)
