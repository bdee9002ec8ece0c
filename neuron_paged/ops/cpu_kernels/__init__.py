# SPDX-License-Identifier: Apache-2.0
"""CPU kernels: numba control flow around explicit vector IR, compiled on first use and cached on disk."""
