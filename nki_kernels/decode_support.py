# SPDX-License-Identifier: Apache-2.0
"""What the paged decode kernel takes: a check on the host, before anything is traced or compiled.

Owns the limits of one call and the estimate of its SBUF; `plan` owns batches and buckets.
"""

from dataclasses import dataclass

from .hardware import NUM_PARTITIONS, PSUM_BANK_BYTES, generation
from .plan_shape import RING_DEPTH, PlanShape, SlabLayout, slab_tokens_of, split_units_of
from .support import BLOCK_SIZES, ITEMSIZE

QUERY_DTYPES = ("bfloat16", "float16", "float32")
HEAD_DIMS = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256)
MAX_Q_LEN = 8
MAX_COLUMNS = 64  # query tokens x query heads per KV head x sequences that share a matmul: TensorE's 64-cycle floor
MAX_COLUMNS_HEAD_64 = 32  # for head_dim up to 64: slabs hold twice the tokens, and SBUF as many more scores
ZERO_COLUMNS = 1024  # elements per partition of the tile of zeros
SBUF_RESERVE = 24 * 1024  # bytes per partition left to the compiler: DMA scratch pins 2-64 KiB


def nearest(value: int, allowed: tuple[int, ...]) -> int:
    """The allowed value closest to `value`, the larger of two equally close ones."""
    return min(allowed, key=lambda a: (abs(a - value), -a))


@dataclass(frozen=True)
class DecodeProblem:
    """One configuration of the kernel on one core group.

    num_heads, num_kv_heads: of this rank. dtypes are names as in ITEMSIZE; cache_dtype None means the query's.
    num_cores: LNC degree. has_alibi: attention with ALiBi slopes.
    """

    target: str
    num_heads: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    query_dtype: str = "bfloat16"
    cache_dtype: str | None = None
    q_len: int = 1
    num_cores: int = 1
    has_alibi: bool = False

    @property
    def group_size(self) -> int:
        """Query heads per KV head."""
        return self.num_heads // self.num_kv_heads

    @property
    def slab_tokens(self) -> int:
        version = generation(self.target).version
        return slab_tokens_of(self.block_size, self.head_dim, ITEMSIZE[self.query_dtype], version)

    @property
    def max_columns(self) -> int:
        """Most score columns of a unit."""
        return MAX_COLUMNS if self.head_dim > 64 else MAX_COLUMNS_HEAD_64

    @property
    def columns_per_seq(self) -> int:
        """Score columns of one sequence."""
        return self.q_len * self.group_size

    @property
    def sbuf_budget_bytes(self) -> int:
        """What a kernel may take per partition."""
        return generation(self.target).sbuf_partition_bytes - SBUF_RESERVE

    def layout(self, num_blocks: int) -> SlabLayout:
        """Slab layout of a cache of `num_blocks` blocks."""
        return SlabLayout(num_blocks, self.num_kv_heads, self.block_size, self.slab_tokens)

    def unsupported(self) -> list[str]:
        """One sentence per reason why the kernel refuses; empty if it takes the problem."""
        cores = generation(self.target).lnc_max
        cache = self.cache_dtype or self.query_dtype
        found = []

        def need(ok: bool, name: str, got: object, what: str) -> None:
            if not ok:
                found.append(f"{name}: got {got}, need {what}.")

        need(self.query_dtype in QUERY_DTYPES, "query_dtype", self.query_dtype, f"one of {', '.join(QUERY_DTYPES)}")
        need(cache in ITEMSIZE, "cache_dtype", cache, f"one of {', '.join(ITEMSIZE)}")
        need(1 <= self.num_kv_heads <= self.num_heads and self.num_heads % self.num_kv_heads == 0, "num_heads",
             f"{self.num_heads} with {self.num_kv_heads} KV heads", "a multiple of num_kv_heads")
        need(self.head_dim in HEAD_DIMS, "head_dim", self.head_dim,
             f"one of {HEAD_DIMS}; nearest is {nearest(self.head_dim, HEAD_DIMS)} (pad the heads)")
        need(self.block_size in BLOCK_SIZES, "block_size", self.block_size,
             f"one of {BLOCK_SIZES}; nearest is {nearest(self.block_size, BLOCK_SIZES)}")
        need(1 <= self.q_len <= MAX_Q_LEN, "q_len", self.q_len,
             f"1..{MAX_Q_LEN}; longer runs of query tokens are prefill")
        need(1 <= self.num_cores <= cores, "num_cores", self.num_cores, f"1..{cores} on {self.target}")
        need(not self.has_alibi, "alibi_slopes", "slopes",
             "none: the kernel's unmasked folds add no positions; use the padding fallback")
        if not found:
            need(self.columns_per_seq <= self.max_columns, "q_len",
                 f"{self.q_len} x {self.group_size} heads per KV head",
                 f"at most {self.max_columns} score columns: q_len <= {self.max_columns // self.group_size}")
        return found

    def check(self, shape: PlanShape | None = None) -> None:
        """ValueError naming every argument that does not fit; with `shape`, also a bucket too large for SBUF."""
        problems = self.unsupported()
        if problems:
            raise ValueError("paged_attention_decode: " + " ".join(problems))
        if shape is None:
            return
        for name in ("seqs_per_mixed_fold", "seqs_per_shared_fold"):
            seqs = getattr(shape, name)
            if seqs * self.columns_per_seq > self.max_columns:
                raise ValueError(
                    f"paged_attention_decode: {name}: got {seqs}, need at most "
                    f"{self.max_columns // self.columns_per_seq}: {self.columns_per_seq} score columns per sequence."
                )
        if self.num_cores != shape.num_cores:
            raise ValueError(f"paged_attention_decode: num_cores: {self.num_cores}, the shape has {shape.num_cores}.")
        have, needed = self.sbuf_budget_bytes, self.sbuf_bytes(shape)
        if needed > have:
            raise ValueError(
                f"paged_attention_decode: {shape} needs {needed} bytes of SBUF per partition, {self.target} leaves "
                f"{have}. Split the batch, or use fewer folds per bucket."
            )

    def sbuf_bytes(self, shape: PlanShape) -> int:
        """Bytes per partition of all tiles the kernel allocates for a bucket."""
        size, tokens = ITEMSIZE[self.query_dtype], self.slab_tokens
        shards = shape.fold_shards(self.num_kv_heads)
        heads = self.num_kv_heads // (1 if shards > 1 else shape.num_cores)
        columns, head_columns = self.columns_per_seq, heads * self.columns_per_seq
        mixed = shape.mixed_folds // shards
        shared = shape.shared_folds // shards
        pairs = shape.full_folds // shards + mixed * shape.seqs_per_mixed_fold + shared * shape.seqs_per_shared_fold
        seqs = max(shape.seqs_per_mixed_fold if mixed else 1, shape.seqs_per_shared_fold if shared else 1)
        widest = columns * seqs
        row_tiles = -(-shape.num_seqs // NUM_PARTITIONS)
        pair_tiles = -(-pairs // NUM_PARTITIONS)
        rows, parity = min(shape.num_seqs, NUM_PARTITIONS), 2 if heads > 1 else 1
        pack, chunks = (2 if self.head_dim == 64 else 1), (2 if self.head_dim > NUM_PARTITIONS else 1)
        slab = 2 * tokens * self.head_dim * size
        transposes = PSUM_BANK_BYTES // (NUM_PARTITIONS * (4 if self.target in ("trn1", "inf2") else size))
        key_banks = -(-tokens // min(tokens, transposes * pack // chunks))
        plan = 4 * shape.table_shape(self.num_kv_heads)[1] + 4 * pairs + 8 * max(mixed, 1)
        queries = max(pack, chunks) * pairs * head_columns * size
        queries += row_tiles * head_columns * self.head_dim * (3 if pack == 2 else 1) * size
        one_hots = row_tiles * pairs * (size + 2)
        constants = NUM_PARTITIONS * (4 + 2 + 2 * size) + 4 * self.q_len * tokens + ZERO_COLUMNS * size
        version = generation(self.target).version
        split = split_units_of(tokens, self.head_dim, size, version) if self.block_size == tokens else 0
        slabs = (RING_DEPTH + split) * slab
        unit = 2 * (key_banks * transposes * NUM_PARTITIONS * size
                    + widest * (tokens * (4 + size) + 8)
                    + 4 * shape.seqs_per_mixed_fold * (self.q_len * tokens + columns + 2) + 4 * columns)
        statistics = parity * columns * pairs * (2 + 4 + chunks * size)
        combine = columns * (pairs + 1) * 2 + row_tiles * columns * pairs * (4 + size)
        combine += row_tiles * pair_tiles * columns * rows * size + pair_tiles * columns * self.head_dim * size
        result = row_tiles * head_columns * (self.head_dim * size + 16)
        if shards > 1:
            result = row_tiles * head_columns * (self.head_dim * (8 + size) + 32)
        return plan + queries + one_hots + constants + slabs + unit + statistics + combine + result + 1024
