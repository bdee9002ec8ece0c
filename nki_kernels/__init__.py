# SPDX-License-Identifier: Apache-2.0
"""NKI kernels beside their references, host-side plans, and the NKI simulator.

Importing this package needs numpy only; torch is imported by `*_ref.py`, `nki` only through `toolchain.py`.
"""
