# SPDX-License-Identifier: Apache-2.0
"""Buckets that somebody names, one by one or as a file of grids. Imports nothing heavy: wrong names show at once."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from compile.buckets import BucketGrid, bucket_of_name, load_buckets
from neuron_paged.errors import ConfigError

if TYPE_CHECKING:
    from neuron_paged.models.graph_step import AnyBucket


def named_buckets(names: Sequence[str], costs_us: Mapping[str, float] | None = None) -> list["AnyBucket"]:
    """Buckets by name, or all those of a file of grids (NAME.json); each once. Raises ConfigError.

    Of each kind the cheapest first: by the modelled times of files (cost_us) or, of what those leave open, of costs_us
    by name, if all are known, else by work.
    """
    costs = bucket_costs(names)
    for bucket, cost in costs.items():
        if cost is None and costs_us is not None:
            costs[bucket] = costs_us.get(bucket.name)
    buckets: list[AnyBucket] = []
    for kind in dict.fromkeys(bucket.KIND for bucket in costs):
        found: list[AnyBucket] = [bucket for bucket in costs if bucket.KIND == kind]
        known: dict[AnyBucket, float] = {bucket: cost for bucket in found if (cost := costs[bucket]) is not None}
        buckets += BucketGrid(found, known if len(known) == len(found) else None)
    return buckets


def bucket_costs(names: Sequence[str]) -> "dict[Any, float | None]":
    """The buckets that named_buckets gives, with the files' cost_us. Raises ConfigError."""
    if isinstance(names, str) or not names:
        raise ConfigError(f"graph_buckets: got {names!r}, need a list of names such as 'decode-8x0x4x2'.")
    costs: dict[Any, float | None] = {}
    for name in names:
        try:
            if name.endswith(".json"):
                for grid in load_buckets(name).grids.values():
                    costs.update({bucket: None if grid.costs is None else grid.costs[bucket] for bucket in grid})
            else:
                costs.setdefault(bucket_of_name(name), None)
        except OSError as error:
            raise ConfigError(f"graph_buckets: can't read {name}: {error.strerror}.") from error
        except ValueError as error:
            raise ConfigError(f"graph_buckets: {error}") from error
    return costs


def planned_otherwise(names: Sequence[str], here: Mapping[str, Any]) -> list[str]:
    """A line per file of grids among the names that was made for other settings. here: those of now, named as in files:
    target, lnc, tensor_parallel_size, block_size."""
    lines = []
    for name in names:
        about = load_buckets(name).about if name.endswith(".json") else {}
        others = [f"{key} {about[key]} (here {value})" for key, value in here.items() if about.get(key, value) != value]
        if others:
            lines.append(f"{name} was planned for {', '.join(others)}")
    return lines
