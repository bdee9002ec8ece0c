# SPDX-License-Identifier: Apache-2.0
"""Benchmarks behind `neuron-paged bench`. Each prints what it measured, on what, and beside which limit or peer."""
