# SPDX-License-Identifier: Apache-2.0
"""Other engines on the same token ids. `child.py` runs in the peer's own environment, so nothing in this folder
imports neuron_paged; `neuron_paged.bench.compare` starts it and talks to it."""
