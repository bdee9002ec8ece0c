# SPDX-License-Identifier: Apache-2.0
"""Parameter names of the nki.isa instructions of NKI 0.6 [doc]: required ones, then optional ones after the bar.

Every instruction but the register calls also takes the optional `name`.
"""

from typing import NamedTuple

_TABLE = {
    "dma_copy": "dst src | priority oob_mode dge_mode engine",
    "dma_transpose": "dst src | axes priority dge_mode oob_mode",
    "dma_compute": "dst srcs reduce_op | scales unique_indices oob_mode",
    "tensor_copy": "dst src | engine",
    "memset": "dst value | engine",
    "tensor_copy_predicated": "dst src predicate | reverse_pred",
    "nc_matmul": "dst stationary moving | is_stationary_onezero is_moving_onezero is_transpose accumulate "
                 "tile_position tile_size perf_mode",
    "nc_matmul_mx": "dst stationary moving stationary_scale moving_scale | tile_position tile_size accumulate",
    "nc_transpose": "dst data | engine",
    "tensor_tensor": "dst data1 data2 op | engine",
    "tensor_scalar": "dst data op0 operand0 | reverse0 op1 operand1 reverse1 engine",
    "tensor_reduce": "dst op data axis | negate keepdims",
    "tensor_partition_reduce": "dst op data",
    "tensor_scalar_cumulative": "dst src op0 op1 imm0 | imm1 reduce_cmd",
    "activation": "dst op data | bias scale reduce_op reduce_res reduce_cmd",
    "activation_reduce": "dst op data reduce_op reduce_res | bias scale",
    "activate2": "dst op data imm0 imm1 op0 op1 | relu_param reverse0 reverse1 reduce_op reduce_res reduce_cmd",
    "iota": "dst pattern | offset channel_multiplier",
    "affine_select": "dst pattern channel_multiplier on_true_tile on_false_value | cmp_op offset",
    "local_gather": "dst src_buffer index | num_elem_per_idx num_valid_indices",
    "nc_n_gather": "dst data indices",
    "bn_stats": "dst data",
    "bn_aggr": "dst data",
    "tensor_tensor_scan": "dst data0 data1 initial op0 op1 | reverse0 reverse1",
    "nc_stream_shuffle": "dst src shuffle_mask",
    "rng": "dst | engine",
    "dropout": "dst data prob",
    "set_rng_seed": "src_seeds",
    "rand_set_state": "src_seeds | engine",
    "rand_get_state": "dst | engine",
    "rand2": "dst min max",
    "exponential": "dst src | max_value reduce_res reduce_cmd reduce_init",
    "reciprocal": "dst data",
    "max8": "dst src",
    "sequence_bounds": "dst segment_ids",
    "scalar_tensor_tensor": "dst data op0 operand0 op1 operand1 | reverse0 reverse1",
    "tensor_scalar_reduce": "dst data op0 operand0 reduce_op | reduce_res reverse0 reduce_cmd reduce_init "
                            "reduce_res_negate",
    "core_barrier": "data cores | engine",
    "quantize_mx": "dst src dst_scale",
    "range_select": "dst on_true_tile comp_op0 comp_op1 bound0 bound1 | reduce_cmd reduce_res reduce_op range_start "
                    "on_false_value",
    "select_reduce": "dst predicate on_true on_false | reduce_res reduce_cmd reduce_op reverse_pred",
    "sendrecv": "src dst send_to_rank recv_from_rank pipe_id | dma_engine",
    "register_alloc": "| x",
    "register_move": "dst src",
    "register_load": "dst src",
    "register_store": "dst src",
    "nc_find_index8": "dst data vals",
    "nc_match_replace8": "dst data vals imm | dst_idx",
    "nonzero_with_count": "dst src | index_offset padding_val",
    "topk": "val_dst idx_dst src n",
}


class Signature(NamedTuple):
    """Required and optional parameter names in positional order."""

    required: tuple[str, ...]
    optional: tuple[str, ...]

    @property
    def names(self) -> tuple[str, ...]:
        return self.required + self.optional


def _parse(instruction: str, text: str) -> Signature:
    required, _, optional = text.partition("|")
    name = () if instruction.startswith("register_") else ("name",)
    return Signature(tuple(required.split()), (*optional.split(), *name))


SIGNATURES: dict[str, Signature] = {instruction: _parse(instruction, text) for instruction, text in _TABLE.items()}

# Arguments that AWS's published kernels pass and no document has [source].
UNDOCUMENTED = {"scalar_tensor_tensor": frozenset({"dtype"})}
DMA = frozenset({"dma_copy", "dma_transpose", "dma_compute"})
ENUM_PARAMETERS = frozenset({"engine", "dge_mode", "oob_mode", "reduce_cmd", "perf_mode", "dma_engine"})
# Operands that VectorE reads as tensors, for the rule of at most one PSUM operand.
VECTOR_INPUTS = {
    "tensor_tensor": ("data1", "data2"),
    "scalar_tensor_tensor": ("data", "operand1"),
    "tensor_tensor_scan": ("data0", "data1"),
    "tensor_copy_predicated": ("src", "predicate"),
    "select_reduce": ("on_true", "predicate"),
}
