# SPDX-License-Identifier: Apache-2.0
"""The peer of `bench kernels`: AWS's decode kernel `attention_tkg` from a checkout of nki-library, in our simulator.

Owns how that kernel is called and the check of its result. It reads its whole bucket, so only the longest sequence
counts. Needs NeuronCore-v3 or later.
"""

import contextlib
import importlib
import io
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from neuron_paged.env import environment_kept
from neuron_paged.errors import InvalidRequestError
from nki_kernels import simulator

BF16 = ml_dtypes.bfloat16
SBUF_LEFT_BYTES = 16 * 1024  # per partition, not handed to the kernel's own allocator
MAX_ERROR = 1e-2  # relative Frobenius error of bf16 attention against fp64; about 2e-3 is usual


@dataclass(frozen=True)
class PeerRun:
    """One simulated call for one KV head. relative_error: Frobenius, against fp64."""

    block_size: int
    report: simulator.Report
    relative_error: float


def library_source(path: str) -> Path:
    """The folder to import `nkilib` from. InvalidRequestError if `path` is not a checkout of nki-library."""
    source = Path(path) / "src" / "nkilib_src"
    if not (source / "nkilib" / "core" / "attention" / "attention_tkg.py").is_file():
        raise InvalidRequestError(
            f"--peer nki-library={path}: has no src/nkilib_src/nkilib/core/attention/attention_tkg.py; need a clone of "
            "github.com/aws-neuron/nki-library."
        )
    return source


def run_attention_tkg(
    source: Path, context_lens: tuple[int, ...], num_heads: int, head_dim: int, block_size: int, target: str
) -> PeerRun:
    """Decode attention of one token per sequence over a block KV cache with one KV head, bf16.

    source: see `library_source`. context_lens include this step's token. The bucket is the longest of them, which must
    be what the kernel takes (a power of two is). Raises whatever the kernel does.
    """
    rng = np.random.default_rng(0)
    num_seqs, bucket = len(context_lens), max(context_lens)
    past = np.array(context_lens) - 1
    blocks_per_seq = bucket // block_size
    num_blocks = 1 + num_seqs * blocks_per_seq
    table = 1 + rng.permutation(num_blocks - 1).reshape(num_seqs, blocks_per_seq).astype(np.uint32)

    def random(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, dtype=np.float32).astype(BF16)

    query = (rng.standard_normal((head_dim, num_seqs, num_heads)) * head_dim**-0.5).astype(BF16)
    key, value = random(head_dim, num_seqs), random(num_seqs, 1, 1, head_dim)
    k_cache, v_cache = (random(num_blocks, block_size, head_dim) for _ in range(2))
    mask = np.ones((1, num_seqs, num_heads, 1), np.uint8)
    with simulator.as_nki(target=target), environment_kept(), _on_path(source):
        with contextlib.redirect_stdout(io.StringIO()):  # the library prints its memory statistics
            kernel = _kernel(num_seqs, num_heads, head_dim, bucket, block_size)
            result = simulator.run(
                kernel, query.reshape(head_dim, -1), key, value, k_cache, v_cache, mask,
                past.astype(np.float32)[:, None], table, target=target,
            )  # fmt: skip
    expected = np.empty((num_seqs, num_heads, head_dim))
    for seq, length in enumerate(past):
        keys, values = (c[table[seq]].reshape(-1, head_dim)[:length].astype(np.float64) for c in (k_cache, v_cache))
        keys = np.concatenate([keys, key[:, seq][None].astype(np.float64)])
        values = np.concatenate([values, value[seq, 0].astype(np.float64)])
        scores = query[:, seq].astype(np.float64).T @ keys.T
        weights = np.exp(scores - scores.max(axis=1, keepdims=True))
        expected[seq] = weights @ values / weights.sum(axis=1, keepdims=True)
    got = result.outputs.astype(np.float64).reshape(expected.shape)
    return PeerRun(block_size, result.report, float(np.linalg.norm(got - expected) / np.linalg.norm(expected)))


def _kernel(num_seqs: int, num_heads: int, head_dim: int, bucket: int, block_size: int) -> Any:
    """The library's kernel with query and key loaded into SBUF, where it wants them."""
    nl, nisa = (importlib.import_module(f"nki.{name}") for name in ("language", "isa"))
    core = "nkilib.core"
    attention = importlib.import_module(f"{core}.attention.attention_tkg").attention_tkg
    config = importlib.import_module(f"{core}.attention.attention_tkg_utils").AttnTKGConfig(
        bs=num_seqs, q_head=num_heads, s_active=1, curr_sprior=bucket, full_sprior=bucket, d_head=head_dim,
        block_len=block_size, tp_k_prior=True, strided_mm1=False, use_pos_id=True, fuse_rope=False, qk_in_sb=True,
    )  # fmt: skip
    allocator = importlib.import_module(f"{core}.utils.allocator").SbufManager
    logger = importlib.import_module(f"{core}.utils.logging").Logger("attention_tkg")

    def attention_tkg(query, key, value, k_cache, v_cache, mask, positions, block_table):
        manager = allocator(0, nl.tile_size.total_available_sbuf_size - SBUF_LEFT_BYTES, logger)
        manager.open_scope()
        on_chip = []
        for tensor in (query, key):
            tile = manager.alloc_stack(tensor.shape, dtype=tensor.dtype, buffer=nl.sbuf)
            nisa.dma_copy(dst=tile, src=tensor)
            on_chip.append(tile)
        out = nl.ndarray((num_seqs, num_heads, head_dim, 1), dtype=nl.bfloat16, buffer=nl.shared_hbm)
        result, _ = attention(
            *on_chip, value, k_cache, v_cache, mask, out, config, manager, rope_pos_ids=positions,
            active_blocks_table=block_table,
        )  # fmt: skip
        manager.close_scope()
        return result

    return attention_tkg


@contextlib.contextmanager
def _on_path(folder: Path):
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
