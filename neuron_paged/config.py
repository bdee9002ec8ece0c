# SPDX-License-Identifier: Apache-2.0
"""Engine settings: small frozen dataclasses, checked when made. Owns no defaults of models and no device choice."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from neuron_paged.errors import ConfigError

# Without a max_model_len of the caller's own, so long a context is set aside for: models allow up to a million tokens,
# whose rotary table and cache nobody asked for.
DEFAULT_MAX_MODEL_LEN = 8192
# Each running sequence has a row in the engine's tables, set aside at the start.
MAX_NUM_SEQS_LIMIT = 2**16
EXECUTORS = ("eager", "hlo-cpu", "xla", "neuron")
GRAPH_KERNELS = ("cpu", "simulator", "plain")
KV_CACHE_DTYPES = ("auto", "fp32", "bf16", "fp16", "fp8")


def _need_int(owner: str, name: str, value: object, low: int, high: int | None = None) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < low or (high is not None and value > high):
        need = f"an integer >= {low}" if high is None else f"an integer in [{low}, {high}]"
        raise ConfigError(f"{owner}.{name}: got {value!r}, need {need}.")


@dataclass(frozen=True)
class CacheConfig:
    """The KV cache.

    block_size: tokens per block, >= 8.
    num_blocks: blocks per layer, null block included; None sizes it from kv_cache_memory_bytes.
    kv_cache_memory_bytes: memory of all layers together; None takes a quarter of what is free, at most what
        max_num_seqs sequences of max_model_len tokens could use.
    num_swap_blocks: host blocks that preempted sequences are swapped to; 0 preempts by recompute.
    kv_cache_dtype: "auto" is the model's. "fp8" (e4m3) scales K and V per layer and head, by the checkpoint's k_scale
        and v_scale if it has them, else by a calibration at start (models.kv_scales).
    enable_prefix_caching: reuse the full blocks of equal prefixes.
    """

    block_size: int = 32
    num_blocks: int | None = None
    kv_cache_memory_bytes: int | None = None
    num_swap_blocks: int = 0
    kv_cache_dtype: Literal["auto", "fp32", "bf16", "fp16", "fp8"] = "auto"
    enable_prefix_caching: bool = True

    def __post_init__(self) -> None:
        _need_int("CacheConfig", "block_size", self.block_size, 8)
        if self.num_blocks is not None:
            _need_int("CacheConfig", "num_blocks", self.num_blocks, 2)
        if self.kv_cache_memory_bytes is not None:
            _need_int("CacheConfig", "kv_cache_memory_bytes", self.kv_cache_memory_bytes, 1)
        _need_int("CacheConfig", "num_swap_blocks", self.num_swap_blocks, 0)
        if self.kv_cache_dtype not in KV_CACHE_DTYPES:
            raise ConfigError(
                f"CacheConfig.kv_cache_dtype: got {self.kv_cache_dtype!r}, need one of {KV_CACHE_DTYPES}."
            )


@dataclass(frozen=True)
class SchedulerConfig:
    """Limits of one step (vLLM's names).

    max_num_seqs: sequences running at once, at most MAX_NUM_SEQS_LIMIT.
    max_num_batched_tokens: tokens computed per step over all sequences; longer prompts are prefilled in chunks.
    max_model_len: prompt plus output tokens of one sequence.
    preemption: what happens to a running sequence when blocks run out; "swap" needs CacheConfig.num_swap_blocks
        and falls back to recompute when those are full.
    policy: order of waiting requests; "priority" serves the lowest `priority` first and preempts the highest.
    """

    max_num_seqs: int = 32
    max_num_batched_tokens: int = 512
    max_model_len: int = 2048
    preemption: Literal["recompute", "swap"] = "recompute"
    policy: Literal["fcfs", "priority"] = "fcfs"

    def __post_init__(self) -> None:
        _need_int("SchedulerConfig", "max_num_seqs", self.max_num_seqs, 1, MAX_NUM_SEQS_LIMIT)
        _need_int("SchedulerConfig", "max_num_batched_tokens", self.max_num_batched_tokens, 1)
        _need_int("SchedulerConfig", "max_model_len", self.max_model_len, 2)
        for name, allowed in (
            ("preemption", ("recompute", "swap")),
            ("policy", ("fcfs", "priority")),
        ):
            if getattr(self, name) not in allowed:
                raise ConfigError(f"SchedulerConfig.{name}: got {getattr(self, name)!r}, need one of {allowed}.")


@dataclass(frozen=True)
class GraphConfig:
    """How an executor of compiled graphs makes them.

    executor: "eager" runs the model's step without graphs, on batches as they are; "hlo-cpu" lowers it for buckets and
        runs the graphs on XLA:CPU; "xla" runs buckets on torch_xla's device; "neuron" on a Neuron device (not yet run):
        with a bundle its NEFFs, through nrtpy, else what AWS's torch stack compiles.
    buckets: names such as "decode-8x0x4x2" (compile.buckets); None makes ladders from the engine's limits.
    kernels: what stands behind the operators' custom calls: "cpu", the fast CPU kernels; "simulator", the NKI kernels
        in the simulator; "plain": no custom calls, the operators are lowered to plain operations. With executor
        "neuron" and a bundle, "cpu" takes a bundle of either kind.
    python: interpreter of an environment with torch_xla, None = this one.
    bundle: store with compiled graphs, a folder or s3://bucket/prefix; None lowers and compiles at start.
    allow_compiling: without a fitting bundle, lower and compile at start; False makes that an error within seconds.
    """

    executor: Literal["eager", "hlo-cpu", "xla", "neuron"] = "eager"
    buckets: tuple[str, ...] | None = None
    kernels: Literal["cpu", "simulator", "plain"] = "cpu"
    python: Path | None = None
    bundle: str | None = None
    allow_compiling: bool = True

    def __post_init__(self) -> None:
        if self.executor == "eager" and self.bundle is not None:
            raise ConfigError(
                "executor: got 'eager' with a bundle, whose graphs it does not run; need 'hlo-cpu' or 'neuron', or no "
                "bundle."
            )
        if self.bundle is None and not self.allow_compiling:
            raise ConfigError("no_compile: got no bundle with it, need one to take the graphs from.")
        for name, allowed in (("executor", EXECUTORS), ("kernels", GRAPH_KERNELS)):
            if getattr(self, name) not in allowed:
                raise ConfigError(f"GraphConfig.{name}: got {getattr(self, name)!r}, need one of {allowed}.")
        if self.executor == "eager" and (self.buckets, self.kernels, self.python) != (None, "cpu", None):
            raise ConfigError(
                "GraphConfig.executor: got 'eager' with buckets, kernels or an interpreter for graphs; need executor="
                "'hlo-cpu' with them."
            )
        if self.serves_neffs:
            if self.kernels == "simulator" or self.python is not None:
                raise ConfigError(
                    "GraphConfig.executor: got 'neuron' and a bundle with simulated kernels or an interpreter, need "
                    "neither: the bundle's NEFFs run as they are."
                )
        elif self.executor in ("xla", "neuron") and (self.kernels, self.python, self.bundle) != ("cpu", None, None):
            raise ConfigError(
                f"GraphConfig.executor: got {self.executor!r} with kernels, an interpreter or a bundle, need none: it "
                "lowers operators to plain operations, in this process."
            )

    @property
    def serves_neffs(self) -> bool:
        """Whether a bundle's NEFFs run on a Neuron device."""
        return self.executor == "neuron" and self.bundle is not None

    def check_cache(self, cache: CacheConfig) -> None:
        """ConfigError for caches that no graph can have."""
        if self.executor == "eager":
            return
        if cache.kv_cache_dtype == "fp8":
            raise ConfigError(
                "kv_cache_dtype: got 'fp8', graphs need 'auto', 'fp32', 'bf16' or 'fp16': torch_xla 2.9, which lowers "
                "them, has no fp8 tensors. executor='eager' has fp8 caches."
            )
        if cache.block_size & (cache.block_size - 1):
            raise ConfigError(
                f"block_size: got {cache.block_size}, graphs need a power of two: devices were reported to divide "
                "integers by an fp32 reciprocal, which is exact for those only. executor='eager' takes any."
            )


def check_tensor_parallel_size(size: object, graphs: GraphConfig) -> None:
    """ConfigError unless it is a number of ranks; which of them a model allows is known to models.rank_heads."""
    _need_int("LLM", "tensor_parallel_size", size, 1)
    if size != 1 and graphs.executor != "eager":
        raise ConfigError(
            f"tensor_parallel_size: got {size} with executor={graphs.executor!r}, which runs the graphs of one process "
            "only; need executor='eager', or tensor_parallel_size=1."
        )


@dataclass(frozen=True)
class EngineConfig:
    """What an engine needs to know besides the model."""

    cache: CacheConfig = field(default_factory=CacheConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)

    def __post_init__(self) -> None:
        if self.scheduler.preemption == "swap" and self.cache.num_swap_blocks == 0:
            raise ConfigError(
                "SchedulerConfig.preemption: got 'swap' with CacheConfig.num_swap_blocks = 0, need host blocks to swap "
                "to; set num_swap_blocks or use preemption='recompute'."
            )
