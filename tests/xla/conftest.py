# SPDX-License-Identifier: Apache-2.0
"""Pins this process to what the lowering process has, before anything imports torch_xla."""

import os

from compile.lower import CHILD_ENVIRONMENT

os.environ.update(CHILD_ENVIRONMENT)
