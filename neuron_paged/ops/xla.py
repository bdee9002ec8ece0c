# SPDX-License-Identifier: Apache-2.0
"""XLA implementations of the operators: kernels behind custom calls, or the plain operations of plain.py.

Which of the two is one switch: `compile.kernel_calls.use_kernel_compiler`. Without a compiler (the default) any XLA
device runs them. torch_xla is never imported before an operator runs on an XLA tensor; where it functionalizes (its
default), it has to be imported before this module, which then registers what it needs for that.
"""

import sys
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from compile.kernel_calls import Attribute, active_kernel_compiler, emit_kernel, tensor_spec
from neuron_paged.env import xla_functionalizes
from neuron_paged.ops import checks, plain, plain_planned
from neuron_paged.ops.schema import LIB


def _present(**tensors: Tensor | None) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


def _attention(
    query: Tensor,
    kv_cache: Tensor,
    block_table: Tensor,
    context_lens: Tensor,
    cu_seqlens_q: Tensor | None = None,
    *,
    softmax_scale: float | None = None,
    sliding_window: int = 0,
    logits_soft_cap: float = 0.0,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    decode_plan: Tensor | None = None,
    prefill_plan: Tensor | None = None,
    plan_shape: Sequence[int] | None = None,
) -> Tensor:
    checks.check_attention(
        query,
        kv_cache,
        block_table,
        context_lens,
        cu_seqlens_q,
        softmax_scale,
        sliding_window,
        logits_soft_cap,
        sinks,
        alibi_slopes,
        k_scale,
        v_scale,
        decode_plan,
        prefill_plan,
        plan_shape,
    )
    optional = _present(
        cu_seqlens_q=cu_seqlens_q, sinks=sinks, alibi_slopes=alibi_slopes, k_scale=k_scale, v_scale=v_scale
    )
    scale = query.shape[2] ** -0.5 if softmax_scale is None else softmax_scale
    settings = {"softmax_scale": scale, "sliding_window": sliding_window, "logits_soft_cap": logits_soft_cap}
    if plan_shape is not None:
        operands = {"query": query, "kv_cache": kv_cache} | _present(
            decode_plan=decode_plan, prefill_plan=prefill_plan, sinks=sinks, k_scale=k_scale, v_scale=v_scale
        )
        return _planned_attention(operands, plan_shape, block_table.shape[0], settings)
    compiler = active_kernel_compiler()
    if compiler is None:
        return plain.attention(query, kv_cache, block_table, context_lens, **optional, **settings)  # type: ignore[arg-type]
    operands = {"query": query, "kv_cache": kv_cache, "block_table": block_table, "context_lens": context_lens}
    return emit_kernel(compiler, "attention", {**operands, **optional}, [tensor_spec("output", query)], settings)[0]


def _planned_attention(
    operands: dict[str, Tensor], plan_shape: Sequence[int], num_seqs: int, settings: dict[str, float]
) -> Tensor:
    """With a plan the tables are no operands: the graph does not depend on them."""
    compiler = active_kernel_compiler()
    if compiler is None:
        return plain_planned.planned_attention(**operands, plan_shape=plan_shape, num_seqs=num_seqs, **settings)  # type: ignore[arg-type]
    attributes: dict[str, Attribute] = {"plan_shape": ",".join(map(str, plan_shape)), "num_seqs": num_seqs, **settings}
    return emit_kernel(compiler, "attention", operands, [tensor_spec("output", operands["query"])], attributes)[0]


def _rotary_embedding(
    positions: Tensor, query: Tensor, key: Tensor, cos_sin_cache: Tensor, *, interleaved: bool = False
) -> tuple[Tensor, Tensor]:
    checks.check_rotary_embedding(positions, query, key, cos_sin_cache)
    compiler = active_kernel_compiler()
    if compiler is None:
        return plain.rotary_embedding(positions, query, key, cos_sin_cache, interleaved=interleaved)
    operands = {"positions": positions, "query": query, "key": key, "cos_sin_cache": cos_sin_cache}
    results = [tensor_spec("query_out", query), tensor_spec("key_out", key)]
    query_out, key_out = emit_kernel(compiler, "rotary_embedding", operands, results, {"interleaved": interleaved})
    return query_out, key_out


# What the operators that write in place compute, as functions that return the new cache.


def _new_reshape_and_cache(
    key: Tensor,
    value: Tensor,
    kv_cache: Tensor,
    slot_mapping: Tensor,
    *,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    write_plan: Tensor | None = None,
) -> Tensor:
    checks.check_reshape_and_cache(key, value, kv_cache, slot_mapping, k_scale, v_scale, write_plan)
    compiler = active_kernel_compiler()
    if compiler is None:
        return plain.reshape_and_cache(key, value, kv_cache, slot_mapping)
    operands = {"key": key, "value": value, "kv_cache": kv_cache}  # with a plan the graph does not depend on the slots
    operands |= {"slot_mapping": slot_mapping} if write_plan is None else {"write_plan": write_plan}
    operands |= _present(k_scale=k_scale, v_scale=v_scale)
    results = [tensor_spec("kv_cache_out", kv_cache)]
    return emit_kernel(compiler, "reshape_and_cache", operands, results, {}, {0: "kv_cache"})[0]


def _new_copy_blocks(kv_cache: Tensor, block_mapping: Tensor) -> Tensor:
    checks.check_copy_blocks(kv_cache, block_mapping)
    compiler = active_kernel_compiler()
    if compiler is None:
        return plain.swap_blocks(kv_cache, kv_cache, block_mapping)
    operands = {"kv_cache": kv_cache, "block_mapping": block_mapping}
    return emit_kernel(compiler, "copy_blocks", operands, [tensor_spec("kv_cache_out", kv_cache)], {}, {0: "kv_cache"})[
        0
    ]


def _new_swap_blocks(src: Tensor, dst: Tensor, block_mapping: Tensor) -> Tensor:
    checks.check_swap_blocks(src, dst, block_mapping)
    if src.device != dst.device or block_mapping.device != dst.device:
        raise ValueError(
            f"swap_blocks: got src on {src.device}, dst on {dst.device}, block_mapping on {block_mapping.device}, need "
            "one XLA device; a transfer between host and device is not part of a graph."
        )
    compiler = active_kernel_compiler()
    if compiler is None:
        return plain.swap_blocks(src, dst, block_mapping)
    operands = {"src": src, "dst": dst, "block_mapping": block_mapping}
    return emit_kernel(compiler, "swap_blocks", operands, [tensor_spec("dst_out", dst)], {}, {0: "dst"})[0]


def _in_place(compute: Callable[..., Tensor], written: int) -> Callable[..., None]:
    """Kernel for the XLA key, reached with XLA_DISABLE_FUNCTIONALIZATION=1."""

    def kernel(*arguments: Tensor, **scales: Tensor | None) -> None:
        arguments[written].copy_(compute(*arguments, **scales))

    return kernel


def _functionalized(name: str, compute: Callable[..., Tensor], written: int) -> Callable[..., None]:
    """Kernel for the Functionalize key, without which torch_xla refuses a mutating operator."""

    def unwrap(value: Tensor | None) -> Tensor | None:
        if not isinstance(value, Tensor) or not torch._is_functional_tensor(value):
            return value
        torch._sync(value)
        return torch._from_functional_tensor(value)

    def kernel(*arguments: Tensor, **scales: Tensor | None) -> None:
        inner = [unwrap(argument) for argument in arguments]
        inner_scales = {key: unwrap(scale) for key, scale in scales.items()}
        old, wrapped = inner[written], arguments[written]
        assert old is not None
        if old.device.type != "xla":
            raise NotImplementedError(
                f"{name}: got a tensor on {old.device} inside torch.compile or torch.export, in a process where "
                "torch_xla functionalizes; set XLA_DISABLE_FUNCTIONALIZATION=1, or do this in another process."
            )
        functionalize = torch._C.DispatchKeySet(torch._C.DispatchKey.Functionalize)
        with torch._C._ExcludeDispatchKeyGuard(functionalize):
            new = compute(*inner, **inner_scales)
            torch._propagate_xla_data(old, new)  # keeps the donation of the cache's buffer
        torch._C._replace_(wrapped, new)
        torch._C._commit_update(wrapped)
        torch._sync(wrapped)

    return kernel


LIB.impl("attention", _attention, "XLA")
LIB.impl("rotary_embedding", _rotary_embedding, "XLA")
# (operator, its function, place of the argument that it writes)
for _name, _compute, _written in (
    ("reshape_and_cache", _new_reshape_and_cache, 2),
    ("copy_blocks", _new_copy_blocks, 0),
    ("swap_blocks", _new_swap_blocks, 1),
):
    LIB.impl(_name, _in_place(_compute, _written), "XLA")
    if "torch_xla" in sys.modules and xla_functionalizes():
        LIB.impl(_name, _functionalized(_name, _compute, _written), "Functionalize")
