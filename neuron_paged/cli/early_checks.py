# SPDX-License-Identifier: Apache-2.0
"""What is wrong with a command line and can be told at once: before torch and transformers, which take seconds to
import. Each check calls the function that has the rule; nothing is kept or made."""

from collections.abc import Sequence

from neuron_paged.errors import GraphError


def check_model(name: str) -> None:
    """ModelNotFoundError for a --model that is not on this machine and can't be on the hub."""
    from neuron_paged.models.locate import local_model

    local_model(name)


def check_graphs(bundle: str | None, buckets: Sequence[str] | None) -> None:
    """GraphError for a --bundle without bundles, ConfigError for wrong --graph-bucket."""
    if buckets is not None:
        from neuron_paged.engine.named_buckets import named_buckets

        named_buckets(buckets)
    if bundle is not None:
        from compile.bundle_store import require_bundles
        from compile.errors import CompileError
        from compile.store import open_store

        try:
            require_bundles(open_store(bundle))
        except CompileError as error:
            raise GraphError(str(error)) from error
