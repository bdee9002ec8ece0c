# SPDX-License-Identifier: Apache-2.0
"""All decoder layers as one program of compiled kernels: what a prepared fp32 model runs on the CPU.

The kernels are the operators' own (attention, reshape_and_cache, rotary_embedding) and those of linear layers and
norms; shapes and index values are checked once per step instead of once per layer. `cpu_decoder_calls` says which
kernels with which arguments; this file owns the memory they share and what changes from step to step.
"""

import ctypes
import threading
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from neuron_paged.models.config import ModelConfig
from neuron_paged.models.cpu_decoder_calls import Kind, Ref, Symbol, Widths, decoder_calls, layer_symbol
from neuron_paged.models.cpu_gemm import SUMS_BYTES, row_pieces
from neuron_paged.models.inputs import AttentionInputs
from neuron_paged.models.layers import DecoderStack, RotaryEmbedding
from neuron_paged.ops import checks, value_checks
from neuron_paged.ops.cpu import ELEMENT_CODES
from neuron_paged.ops.cpu_kernels.attention_plan import Arg
from neuron_paged.ops.cpu_kernels.library import MAX_ARGS, kernel, workspace
from neuron_paged.ops.cpu_kernels.openmp import num_threads
from neuron_paged.ops.cpu_kernels.program import Program

_PLANNED = slice(Arg.NUM_ITEMS, Arg.NUM_GROUPS + 1)


class CpuDecoderStack(DecoderStack):
    """The layers of an fp32 model whose parts prepare_cpu has replaced, run as one program.

    Keeps the modules, whose packed weights the program reads. One thread runs it at a time, others wait. The first step
    compiles the kernels, which takes up to a minute on a new machine.
    """

    def __init__(self, layers: Iterable[nn.Module], config: ModelConfig) -> None:
        super().__init__(layers)
        self.config, self._lock, self._widths = config, threading.Lock(), Widths.of(self[0])
        self._program: Program | None = None

    @property
    def program(self) -> Program:
        """The program, made on first use."""
        with self._lock:
            return self._program or self._make_program()

    def _make_program(self) -> Program:
        """Kernels, the argument blocks' fixed values, and where the others go."""
        calls = decoder_calls(self, self.config)
        self._template = np.zeros((len(calls), MAX_ARGS), np.int64)
        self._blocks = np.zeros_like(self._template)
        refs = []
        for row, call in enumerate(calls):
            for place, value in call.fields.items():
                if isinstance(value, Ref):
                    refs.append((row * MAX_ARGS + place, value.symbol, value.offset))
                else:
                    self._template[row, place] = value
        self._places, self._symbols, self._offsets = np.array(refs, np.int64).T.copy()
        self._values = np.zeros(layer_symbol(len(self)), np.int64)
        self._rows = {kind: [row for row, call in enumerate(calls) if call.kind == kind] for kind in Kind}
        attention = list(zip(self._rows[Kind.ATTENTION], self.config.sliding_windows, strict=True))
        windows = sorted(set(self.config.sliding_windows))
        self._same_window = {window: [row for row, other in attention if other == window] for window in windows}
        start = self._blocks.ctypes.data
        table = [(call.kernel.worker, start + 8 * MAX_ARGS * row, call.kind) for row, call in enumerate(calls)]
        self._program = Program(table, len(Kind))
        return self._program

    def forward(
        self,
        hidden: Tensor,
        positions: Tensor,
        rotary: RotaryEmbedding,
        inputs: AttentionInputs,
        kv_caches: list[Tensor],
    ) -> Tensor:
        """As DecoderStack.forward."""
        positions = positions.contiguous()
        inputs = AttentionInputs._make(None if x is None else x.contiguous() for x in inputs)
        table = rotary.cos_sin_cache
        num_tokens, size = hidden.shape
        self._check(num_tokens, positions, table, inputs, kv_caches)
        state = torch.empty((num_tokens, self._widths.hidden))
        state[:, :size] = hidden
        if num_tokens:
            with self._lock:
                program = self._program or self._make_program()
                threads = num_threads()  # once: memory and threads must agree whatever others set meanwhile
                self._fill(state, positions, table, inputs, kv_caches, threads)
                self._check_values(positions, table, inputs, kv_caches[0])
                self._share_out(num_tokens, inputs, kv_caches[0], threads)
                program.run(threads)
        return state[:, :size]

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError("a model prepared for the CPU can't be copied or pickled; load it anew.")

    def _check(
        self, num_tokens: int, positions: Tensor, table: Tensor, inputs: AttentionInputs, kv_caches: list[Tensor]
    ) -> None:
        """What the operators check of every call; layers differ in the window and in the cache's scales only."""
        c = self.config
        if len(kv_caches) != len(self) or any(
            cache.shape != kv_caches[0].shape
            or cache.dtype != kv_caches[0].dtype
            or cache.device != kv_caches[0].device
            or not cache.is_contiguous()
            for cache in kv_caches
        ):
            shapes = sorted({f"{list(cache.shape)} {cache.dtype}" for cache in kv_caches})
            raise ValueError(
                f"kv_caches: got {len(kv_caches)} of {', '.join(shapes)}, need {len(self)}, contiguous and alike."
            )
        query, key = (
            positions.new_empty((), dtype=torch.float32).expand(num_tokens, heads, c.head_dim)
            for heads in (c.num_heads, c.num_kv_heads)
        )
        first = kv_caches[0]
        slots, block_table, context_lens, starts = inputs
        checks.check_attention(
            query, first, block_table, context_lens, starts, None, 0, 0.0, None, None, *self._scales(0, first),
            None, None, None,
        )  # fmt: skip
        checks.check_reshape_and_cache(key, key, first, slots, *self._scales(0, first))
        checks.check_rotary_embedding(positions, query, key, table)
        if first.dtype == torch.float8_e4m3fn:
            for layer in range(1, len(self)):
                checks.check_scales(first, *self._scales(layer, first))
        if checks.debug_checks_enabled():
            value_checks.check_attention_values(query, first, block_table, context_lens, starts, 0, strict=True)
            value_checks.check_slot_mapping_values(first, slots, strict=True)
            value_checks.check_positions_values(positions, table)
            for layer in range(len(self)):
                value_checks.check_scale_values(*self._scales(layer, first))

    def _scales(self, layer: int, kv_cache: Tensor) -> tuple[Tensor | None, Tensor | None]:
        attention: Any = self[layer].self_attn
        is_fp8 = kv_cache.dtype == torch.float8_e4m3fn
        return (attention.k_scale, attention.v_scale) if is_fp8 else (None, None)

    def _fill(
        self,
        state: Tensor,
        positions: Tensor,
        table: Tensor,
        inputs: AttentionInputs,
        kv_caches: list[Tensor],
        threads: int,
    ) -> None:
        """Write the argument blocks of a step, all but what planning finds."""
        num_tokens, first = state.shape[0], kv_caches[0]
        values, widths = self._values, self._widths
        arena = workspace.buffer("decoder", 4 * num_tokens * widths.arena)
        places = {Symbol.NORMED: widths.hidden, Symbol.ATTENDED: widths.attended, Symbol.QKV: widths.qkv}
        for symbol, width in places.items():
            values[symbol] = arena
            arena += 4 * num_tokens * width
        values[Symbol.ACTIVATED] = values[Symbol.QKV]  # Q, K and V are done with when the MLP starts
        values[Symbol.QUERY] = arena
        values[Symbol.KEY] = arena + 4 * num_tokens * widths.query
        slots, block_table, context_lens, starts = inputs
        values[Symbol.NUM_TOKENS], values[Symbol.ROW_PIECES] = num_tokens, row_pieces(num_tokens)
        values[Symbol.HIDDEN], values[Symbol.THREADS] = state.data_ptr(), threads
        values[Symbol.POSITIONS], values[Symbol.COS_SIN_CACHE] = positions.data_ptr(), table.data_ptr()
        values[Symbol.MAX_POSITIONS], values[Symbol.ROT_DIM] = table.shape
        values[Symbol.SLOT_MAPPING] = slots.data_ptr()
        values[Symbol.NUM_BLOCKS], _, _, values[Symbol.BLOCK_SIZE], _ = first.shape
        values[Symbol.CACHE_DTYPE] = ELEMENT_CODES[first.dtype]
        values[Symbol.BLOCK_TABLE] = block_table.data_ptr()
        values[Symbol.BLOCK_TABLE_STRIDE] = 4 * block_table.stride(0)
        values[Symbol.NUM_SEQS], values[Symbol.MAX_BLOCKS] = block_table.shape
        values[Symbol.CONTEXT_LENS] = context_lens.data_ptr()
        values[Symbol.CU_SEQLENS_Q] = 0 if starts is None else starts.data_ptr()
        values[Symbol.SCRATCH] = workspace.buffer("scratch", max(SUMS_BYTES, 4 * self.config.head_dim) * threads)
        of_layers = []
        for layer, cache in enumerate(kv_caches):
            scales = self._scales(layer, cache)
            of_layers += [cache.data_ptr(), *(0 if scale is None else scale.data_ptr() for scale in scales)]
        values[len(Symbol) :] = of_layers
        np.copyto(self._blocks, self._template)
        self._blocks.reshape(-1)[self._places] = values[self._symbols] + self._offsets

    def _check_values(self, positions: Tensor, table: Tensor, inputs: AttentionInputs, kv_cache: Tensor) -> None:
        """Raise ValueError for a position or slot out of range; they are the same for every layer."""
        address = self._blocks.ctypes.data
        if self._rows[Kind.ROTARY] and kernel("rotary").plan(address + 8 * MAX_ARGS * self._rows[Kind.ROTARY][0]):
            value_checks.check_positions_values(positions, table)
            raise RuntimeError("positions changed while the step was reading them.")
        if kernel("cache_write").plan(address + 8 * MAX_ARGS * self._rows[Kind.CACHE_WRITE][0]):
            value_checks.check_slot_mapping_values(kv_cache, inputs.slot_mapping)
            raise RuntimeError("slot_mapping changed while the step was reading it.")

    def _share_out(self, num_tokens: int, inputs: AttentionInputs, kv_cache: Tensor, threads: int) -> None:
        """Plan attention, once per window, and give its calls their memory."""
        blocks, rows = self._blocks, self._rows[Kind.ATTENTION]
        num_seqs = inputs.block_table.shape[0]
        plan_bytes = 8 * (4 * num_seqs + 1)
        plans = workspace.buffer("plan", plan_bytes * len(self._same_window))
        for number, (window, same) in enumerate(self._same_window.items()):
            blocks[same, Arg.PLAN] = plans + number * plan_bytes
            if kernel("attention").plan(blocks.ctypes.data + 8 * MAX_ARGS * same[0]):
                query = kv_cache.new_empty(()).expand(num_tokens, self.config.num_heads, self.config.head_dim)
                _, table, lens, starts = inputs
                value_checks.check_attention_values(query, kv_cache, table, lens, starts, window)
                raise RuntimeError("attention: index tensors changed while the step was reading them.")
            blocks[same, _PLANNED] = blocks[same[0], _PLANNED]
        planned = blocks[rows]
        worker_bytes, partial_bytes = planned[:, Arg.WORKER_BYTES].max(), 4 * planned[:, Arg.PARTIAL_FLOATS].max()
        group_bytes = 8 * int(planned[:, Arg.NUM_GROUPS].max())
        partials_at = (int(worker_bytes) * threads + 63) // 64 * 64
        counters_at = (partials_at + int(partial_bytes) + 63) // 64 * 64
        scratch = workspace.buffer("attention", counters_at + group_bytes * len(rows))
        blocks[rows, Arg.SCRATCH], blocks[rows, Arg.PARTIALS] = scratch, scratch + partials_at
        blocks[rows, Arg.GROUP_COUNTERS] = scratch + counters_at + group_bytes * np.arange(len(rows))
        if group_bytes:
            ctypes.memset(scratch + counters_at, 0, group_bytes * len(rows))
        if planned[0, Arg.NUM_LIVE_TOKENS] < num_tokens:  # nobody writes the results of padded tokens
            ctypes.memset(int(self._values[Symbol.ATTENDED]), 0, 4 * num_tokens * self._widths.attended)
