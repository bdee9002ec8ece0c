# SPDX-License-Identifier: Apache-2.0
"""Planning: traffic replayed through the scheduler, modelled cost of its steps, grids of buckets for it.

A room of its own because both the command plan-buckets and the benchmarks use it. Nothing here is measured.
"""
