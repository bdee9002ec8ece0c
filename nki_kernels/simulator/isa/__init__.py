# SPDX-License-Identifier: Apache-2.0
"""The simulator's `nki.isa`: one module per engine, gathered here under NKI's names."""

from typing import Any

from ..errors import LawError as NkiValidationError
from ..errors import unknown_name
from ..state import Instruction as NkiInstruction
from ..state import Register as VirtualRegister
from . import enums as constants
from .cores import core_barrier, sendrecv
from .dma import dma_compute, dma_copy, dma_transpose
from .enums import (
    dge_mode,
    dma_engine,
    engine,
    get_nc_sub_version,
    get_nc_version,
    gpsimd_engine,
    matmul_perf_mode,
    nc_version,
    oob_mode,
    reduce_cmd,
    scalar_engine,
    tensor_engine,
    unknown_engine,
    vector_engine,
)
from .gpsimd import affine_select, iota, local_gather, nc_n_gather, nonzero_with_count, tensor_partition_reduce
from .reductions import tensor_scalar_reduce
from .registers import register_alloc, register_load, register_move, register_store
from .scalar import activate2, activation, activation_reduce
from .scan import tensor_scalar_cumulative, tensor_tensor_scan
from .select import (
    bn_aggr,
    bn_stats,
    exponential,
    max8,
    nc_find_index8,
    nc_match_replace8,
    nc_stream_shuffle,
    range_select,
    reciprocal,
    select_reduce,
    tensor_copy_predicated,
)
from .tensor_engine import nc_matmul, nc_transpose
from .vector import (
    memset,
    scalar_tensor_tensor,
    tensor_copy,
    tensor_reduce,
    tensor_scalar,
    tensor_tensor,
)

__all__ = [
    "NkiInstruction",
    "NkiValidationError",
    "VirtualRegister",
    "activate2",
    "activation",
    "activation_reduce",
    "affine_select",
    "bn_aggr",
    "constants",
    "bn_stats",
    "core_barrier",
    "dge_mode",
    "dma_compute",
    "dma_copy",
    "dma_engine",
    "dma_transpose",
    "engine",
    "exponential",
    "get_nc_sub_version",
    "get_nc_version",
    "gpsimd_engine",
    "iota",
    "local_gather",
    "matmul_perf_mode",
    "max8",
    "memset",
    "nc_find_index8",
    "nc_match_replace8",
    "nc_matmul",
    "nc_n_gather",
    "nc_stream_shuffle",
    "nc_transpose",
    "nc_version",
    "nonzero_with_count",
    "oob_mode",
    "range_select",
    "reciprocal",
    "reduce_cmd",
    "register_alloc",
    "register_load",
    "register_move",
    "register_store",
    "scalar_engine",
    "scalar_tensor_tensor",
    "select_reduce",
    "sendrecv",
    "tensor_copy",
    "tensor_copy_predicated",
    "tensor_engine",
    "tensor_partition_reduce",
    "tensor_reduce",
    "tensor_scalar",
    "tensor_scalar_cumulative",
    "tensor_scalar_reduce",
    "tensor_tensor",
    "tensor_tensor_scan",
    "unknown_engine",
    "vector_engine",
]


def __getattr__(name: str) -> Any:
    raise unknown_name("nisa", name, __all__)
