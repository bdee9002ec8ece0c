# SPDX-License-Identifier: Apache-2.0
"""Choosing a bundle for an engine before any weight is read: what is not set is taken from the bundle."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from compile.bundle import Bundle, Fields
from compile.bundle_store import copy_bundle, find_bundle
from compile.store import Store, open_store
from neuron_paged.engine.named_buckets import named_buckets
from neuron_paged.env import cache_dir
from neuron_paged.models.config import ModelConfig
from neuron_paged.models.graph_plans import GraphModel, PlansFor

_SHORT_NAMES: dict[str, Literal["fp32", "bf16", "fp16"]] = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
DTYPE_NAMES: dict[str, str] = {short: name for name, short in _SHORT_NAMES.items()}
# Options of `neuron-paged compile` that set a field of a bundle's key (see graph_fields).
_OPTIONS = {
    "model.dtype": "--dtype",
    "model.max_positions": "--max-model-len",
    "cache.block_size": "--block-size",
    "cache.num_blocks": "--num-blocks",
    "cache.dtype": "--kv-cache-dtype",
    "target": "--target",
    "lnc": "--lnc",
    "tensor_parallel": "--tensor-parallel",
    "operators": "--graph-kernels",
    "buckets": "--buckets",
}
# Values of fields as the options take them.
_OPTION_VALUES: dict[str, str] = {**_SHORT_NAMES, "kernels": "cpu"}


@dataclass(frozen=True)
class ChosenBundle:
    """A bundle on this machine."""

    store: Store
    bundle: Bundle

    @property
    def dtype(self) -> Literal["fp32", "bf16", "fp16"]:
        """Of weights and activations, as LLM takes it."""
        return _SHORT_NAMES[self.bundle.fields["model"]["dtype"]]

    @property
    def cache_settings(self) -> dict[str, Any]:
        """block_size, num_blocks and kv_cache_dtype as CacheConfig takes them."""
        cache = self.bundle.fields["cache"]
        return {
            "block_size": cache["block_size"],
            "num_blocks": cache["num_blocks"],
            "kv_cache_dtype": _SHORT_NAMES[cache["dtype"]],
        }

    @property
    def plans_for(self) -> PlansFor:
        """What its graphs' plans are made for."""
        plans_for = self.bundle.fields["plans_for"]
        return PlansFor(plans_for["target"], plans_for["num_cores"])

    @property
    def compiler(self) -> str:
        """What compiled it, and its version."""
        return str(self.bundle.fields["compiler"])

    @property
    def max_model_len(self) -> int:
        """Tokens that the graphs' rotary table has room for."""
        return int(self.bundle.fields["model"]["max_positions"])

    @property
    def buckets(self) -> list[str]:
        """Names of its graphs, of each kind the cheapest first."""
        return [bucket.name for bucket in named_buckets(list(self.bundle.graphs), self.bundle.costs_us)]


def choose_bundle(
    location: str | Path,
    config: ModelConfig,
    *,
    dtype: str,
    cache: dict[str, Any],
    max_model_len: int | None,
    fields_here: Callable[[GraphModel], Fields],
    buckets: Sequence[str] | None,
) -> ChosenBundle:
    """The bundle of a store that fits these settings; one under s3:// is pulled into the cache folder.

    dtype: as LLM takes it, "auto" = the bundle's. cache: CacheConfig's settings that were given, and max_model_len:
    what is left out or None is the bundle's, too. fields_here: what a bundle for a model must say to be served here.
    buckets: names it must have.
    Raises BundleMissError, which names the nearest bundle and what differs; BundleError, StoreError.
    """
    store = open_store(location)
    wanted = wanted_fields(
        config, dtype=dtype, cache=cache, max_model_len=max_model_len, fields_here=fields_here
    )
    bundle = find_bundle(store, wanted, buckets or ())
    if str(location).startswith("s3://"):
        local = open_store(cache_dir() / "bundles", create=True)
        copy_bundle(store, local, bundle)
        store = local
    return ChosenBundle(store, bundle)


def wanted_fields(
    config: ModelConfig,
    *,
    dtype: str,
    cache: dict[str, Any],
    max_model_len: int | None,
    fields_here: Callable[[GraphModel], Fields],
) -> Fields:
    """Fields of a bundle's key that are settled; those that were not given are left out."""
    name = DTYPE_NAMES.get(dtype, "float32")
    kv_name = cache.get("kv_cache_dtype", "auto")
    kv_dtype = DTYPE_NAMES.get(kv_name, name)
    open_value = 0
    model = GraphModel(
        config,
        name,
        max_model_len or open_value,
        cache.get("block_size", open_value),
        cache.get("num_blocks") or open_value,
        kv_dtype,
    )
    fields = {**fields_here(model)}
    for group in ("model", "cache"):
        kept = {k: v for k, v in fields[group].items() if v != open_value}
        if (group == "model" and dtype == "auto") or (group == "cache" and kv_name == "auto"):
            kept.pop("dtype", None)
        fields[group] = kept
    return {name: value for name, value in fields.items() if value != {}}


def compile_options(needed: Mapping[str, Any]) -> str:
    """Options of `neuron-paged compile` for the fields that a bundle lacks (see BundleMissError), in one sentence;
    empty if no option sets them."""
    words = []
    for name, option in _OPTIONS.items():
        if name in needed:
            values = needed[name] if isinstance(needed[name], list) else [needed[name]]
            words += [option, *(_OPTION_VALUES.get(value, str(value)) for value in values)]
    return f" What differs is set there by {' '.join(words)}." if words else ""
