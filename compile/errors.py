# SPDX-License-Identifier: Apache-2.0
"""Errors of the compile layer. Wrong arguments raise ValueError; these are for what goes wrong with good arguments."""

from collections.abc import Mapping
from typing import Any


class CompileError(RuntimeError):
    """A graph could not be lowered, checked, compiled or run."""


class LoweringError(CompileError):
    """A model step could not be turned into one static graph: the message names the step's line where it is known."""


class MissingPackageError(CompileError):
    """A package that this part needs is not installed, or in a version that does not work here."""


class GraphsFailedError(CompileError):
    """Some graphs of a build failed; the others are kept for the next run. failures: reason by bucket."""

    def __init__(self, failures: Mapping[str, str], num_graphs: int) -> None:
        self.failures = dict(failures)
        lines = "; ".join(f"{bucket}: {reason}" for bucket, reason in list(failures.items())[:3])
        more = f"; and {len(failures) - 3} more" if len(failures) > 3 else ""
        super().__init__(
            f"{len(failures)} of {num_graphs} graphs failed, the others are kept for the next run: {lines}{more}"
        )


class KernelError(CompileError):
    """A kernel behind a custom call failed while a graph ran."""


class DeviceError(CompileError):
    """A Neuron device, or its runtime, failed while it was given memory or ran a graph."""


class BundleError(CompileError):
    """A bundle is missing, damaged, foreign or incomplete: the message names the file or the field."""


class BundleMissError(BundleError):
    """No bundle for these settings; the message names the nearest one and the fields in which it differs.

    needed: those fields with the values that are wanted, names as in bundle.flatten; "buckets": names that it lacks.
    """

    def __init__(self, message: str, needed: Mapping[str, Any] | None = None) -> None:
        super().__init__(message)
        self.needed = dict(needed or {})


class StoreError(CompileError):
    """A store of bundles can't be reached, read or written."""
