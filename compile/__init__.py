# SPDX-License-Identifier: Apache-2.0
"""Buckets, lowering to HLO, the neuronx-cc driver and artifact bundles.

Import from its modules (`from compile.buckets import …`), never `import compile`: that would hide the builtin.
"""
