# SPDX-License-Identifier: Apache-2.0
"""`python -m neuron_paged` is the command `neuron-paged`."""

import sys

from neuron_paged.cli import main

if __name__ == "__main__":
    sys.exit(main())
