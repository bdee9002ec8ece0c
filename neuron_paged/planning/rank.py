# SPDX-License-Identifier: Apache-2.0
"""One tensor-parallel rank of a model on a target: what batches need of its kernels, and what its kernels take.

Owns the geometry (folds, slabs, tiles) in terms of buckets. Time is step_cost's, memory is device_memory's.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from compile.buckets import Bucket, DecodeBucket, DecodeTableBucket, PrefillBucket, PrefillTableBucket
from neuron_paged.errors import ConfigError
from neuron_paged.models.rank_heads import check_tensor_parallel_size, rank_heads
from neuron_paged.planning.decoder_model import DecoderModel
from neuron_paged.planning.replay import Chunk
from nki_kernels.decode_support import DecodeProblem
from nki_kernels.hardware import DEFAULT_TARGET, GENERATIONS, generation
from nki_kernels.paged_attention_prefill import check_paged_attention_prefill
from nki_kernels.plan import smallest_shape
from nki_kernels.plan_shape import SLABS_PER_FOLD, PlanShape
from nki_kernels.prefill_plan import ROW_TOKENS, ROWS
from nki_kernels.prefill_plan import PrefillBucket as KernelPrefillBucket

TARGETS = ("inf2", "trn1", "trn2", "trn3")
DTYPE, ITEMSIZE = "bfloat16", 2


@dataclass(frozen=True)
class Rank:
    """num_cores: NeuronCores of a logical core (LNC). sliding_window: 0, or of all layers. Raises ConfigError.

    max_context: tokens of the longest sequence.
    """

    model: DecoderModel
    target: str = DEFAULT_TARGET
    tensor_parallel: int = 1
    num_cores: int = 1
    block_size: int = 32
    sliding_window: int = 0
    max_context: int = 8192

    def __post_init__(self) -> None:
        if self.target not in TARGETS:
            known = f"; {self.target} is known to the simulator only" if self.target in GENERATIONS else ""
            raise ConfigError(f"--target: got {self.target!r}, need one of {', '.join(TARGETS)}{known}.")
        most = generation(self.target).lnc_max
        if not 1 <= self.num_cores <= most:
            raise ConfigError(
                f"--lnc: got {self.num_cores}, {self.target} has logical cores of "
                f"{'1 NeuronCore only' if most == 1 else f'1 or {most} NeuronCores'}."
            )
        check_tensor_parallel_size(self.tensor_parallel, self.model)
        if problems := self.problem.unsupported():
            raise ConfigError(f"--model: the decode kernel does not take {self.model.name}: {' '.join(problems)}")
        try:
            self._check_prefill(self.prefill_segment(PrefillBucket(1, 1)))
        except ValueError as error:
            raise ConfigError(f"--model: the prefill kernel does not take {self.model.name}: {error}") from error

    @cached_property
    def heads(self) -> tuple[int, int]:
        """(num_heads, num_kv_heads) of the rank."""
        return rank_heads(self.model, self.tensor_parallel)

    @cached_property
    def problem(self) -> DecodeProblem:
        return DecodeProblem(
            self.target, *self.heads, self.model.head_dim, self.block_size, DTYPE, num_cores=self.num_cores
        )

    @cached_property
    def max_seqs_per_fold(self) -> int:
        """Half the columns that the kernel takes: above that VectorE is slower than all other engines."""
        return max(1, self.problem.max_columns // 2 // self.problem.columns_per_seq)

    @cached_property
    def slab_tokens(self) -> int:
        return self.problem.slab_tokens

    @property
    def row_tokens(self) -> int:
        """Tokens per row of a prefill fold."""
        return min(ROW_TOKENS[-1], self.block_size)

    @property
    def fold_tokens(self) -> int:
        """Tokens of a prefill fold."""
        return ROWS * self.row_tokens

    @property
    def kv_bytes_per_token(self) -> int:
        """K and V of all layers."""
        return self.model.num_layers * 2 * self.heads[1] * self.model.head_dim * ITEMSIZE

    # ---- what batches need ------------------------------------------------------------------------------------------

    @cached_property
    def _known_needs(self) -> dict[bytes, DecodeBucket]:
        return {}

    def decode_need(self, context_lens: NDArray[np.int32]) -> DecodeBucket:
        """The fold plan of one decode step, as the kernels' planner makes it."""
        slabs = -(-context_lens // self.slab_tokens)
        # Without a window, sequences of the same numbers of slabs and full folds need the same.
        exact = np.sort(context_lens) if self.sliding_window else np.sort(
            2 * slabs + (context_lens // self.slab_tokens // SLABS_PER_FOLD == slabs // SLABS_PER_FOLD)
        )  # fmt: skip
        key = exact.tobytes()
        if key not in self._known_needs:
            shape = smallest_shape(
                context_lens, self.problem.layout(2), columns_per_seq=self.problem.columns_per_seq,
                max_columns=self.max_seqs_per_fold * self.problem.columns_per_seq, sliding_window=self.sliding_window,
                num_cores=self.num_cores,
            )  # fmt: skip
            self._known_needs[key] = DecodeBucket(
                shape.num_seqs, shape.full_folds, shape.mixed_folds, shape.seqs_per_mixed_fold
            )
        return self._known_needs[key]

    def prefill_need(self, chunk: Chunk) -> PrefillBucket:
        """One chunk is one graph run: the kernel's static shape is per sequence."""
        window, row = self.sliding_window, self.row_tokens
        oldest = max(0, chunk.context_len - chunk.num_tokens - window + 1) if window else 0
        rows = -(-chunk.context_len // row) - oldest // row
        return PrefillBucket(chunk.num_tokens, max(-(-rows // ROWS), self.min_folds(chunk.num_tokens)))

    def table_need(
        self, context_lens: NDArray[np.int32], chunks: Sequence[Chunk] = ()
    ) -> DecodeTableBucket | PrefillTableBucket:
        """Rows (and tokens, with chunks) and the longest context of a step that runs as a whole."""
        longest = max(int(context_lens.max(initial=1)), *(chunk.context_len for chunk in chunks), 1)
        width, size = -(-longest // self.block_size), len(context_lens)
        if not chunks:
            return DecodeTableBucket(size, width)
        return PrefillTableBucket(size + len(chunks), size + sum(chunk.num_tokens for chunk in chunks), width)

    def table_folds(self, bucket: DecodeTableBucket) -> DecodeBucket:
        """What the fold kernel needs for a whole table: every row as long as the table is wide."""
        return self.decode_need(np.full(bucket.num_seqs, bucket.max_blocks_per_seq * self.block_size, np.int32))

    def live_slabs(self, context_lens: Sequence[int] | NDArray[np.int32]) -> int:
        """Slabs per KV head that hold a token some query sees."""
        lens = np.asarray(context_lens, np.int64)
        first = np.maximum(lens - self.sliding_window, 0) // self.slab_tokens if self.sliding_window else 0
        return int((-(-lens // self.slab_tokens) - first).sum())

    def q_tiles(self, num_tokens: int) -> int:
        """Q tiles of a chunk; cores that share a KV head share its tiles, so their number divides."""
        tiles = -(-num_tokens // ROWS)
        return tiles if self.heads[1] % self.num_cores == 0 else -(-tiles // self.num_cores) * self.num_cores

    def min_folds(self, num_tokens: int) -> int:
        """A chunk is part of its own context: its Q tiles fit its folds."""
        return -(-self.q_tiles(num_tokens) * ROWS // self.fold_tokens)

    # ---- what kernels take ------------------------------------------------------------------------------------------

    def plan_shape(self, bucket: DecodeBucket) -> PlanShape:
        """The kernels' name for a bucket."""
        return PlanShape(
            bucket.num_seqs, bucket.full_folds, bucket.mixed_folds, bucket.seqs_per_fold, num_cores=self.num_cores
        )

    def prefill_segment(self, bucket: PrefillBucket) -> KernelPrefillBucket:
        """One sequence of as many tokens and folds as the bucket has."""
        folds = max(bucket.num_folds, self.min_folds(bucket.num_tokens))
        return KernelPrefillBucket(((self.q_tiles(bucket.num_tokens), folds, 0),), self.row_tokens)

    def takes(self, bucket: Bucket) -> bool:
        """Whether the kernels have code and on-chip memory for the bucket."""
        try:
            if isinstance(bucket, DecodeTableBucket):
                bucket = self.table_folds(bucket)
            if isinstance(bucket, DecodeBucket):
                self.problem.check(self.plan_shape(bucket))
            elif isinstance(bucket, PrefillBucket):
                self._check_prefill(self.prefill_segment(bucket))
            else:
                assert isinstance(bucket, PrefillTableBucket)
                folds = -(-bucket.max_blocks_per_seq * self.block_size // self.fold_tokens)
                self._check_prefill(self.prefill_segment(PrefillBucket(bucket.num_tokens, folds)))
        except ValueError:
            return False
        return True

    def _check_prefill(self, bucket: KernelPrefillBucket) -> None:
        heads, kv_heads = self.heads
        check_paged_attention_prefill(
            num_heads=heads, num_kv_heads=kv_heads, head_dim=self.model.head_dim, block_size=self.block_size,
            dtype=DTYPE, cache_dtype=DTYPE, bucket=bucket, target=self.target, num_cores=self.num_cores,
            sliding_window=self.sliding_window,
        )  # fmt: skip
