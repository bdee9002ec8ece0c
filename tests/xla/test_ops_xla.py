# SPDX-License-Identifier: Apache-2.0
"""The operators on lazy XLA tensors against the CPU's, with and without torch_xla's functionalization."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch_xla

import neuron_paged.ops  # noqa: F401
from neuron_paged.env import xla_functionalizes
from nki_kernels.plan import plan_decode
from nki_kernels.plan_shape import PlanShape, SlabLayout
from nki_kernels.prefill_plan import PrefillBucket, choose_bucket, plan_prefill
from nki_kernels.write_plan import WriteShape, plan_writes

OPS = torch.ops.neuron_paged


def ints(*values):
    return torch.tensor(values, dtype=torch.int32)


def calls():
    """name → operator, arguments, keyword arguments, place of what it writes or None."""
    generator = torch.Generator().manual_seed(0)

    def randn(*size):
        return torch.randn(*size, generator=generator)

    query, key, cache = randn(5, 6, 16), randn(5, 3, 16), randn(8, 3, 2, 8, 16)
    table = ints([1, 2, 3], [4, 5, 6])
    lens, cu = np.array([20, 11], np.int32), np.array([0, 2, 5], np.int32)
    decode = plan_decode(table.numpy(), lens, SlabLayout(8, 3, 8, 8), PlanShape(2, 0, 2, 2), q_len=2, sliding_window=9)
    bucket = choose_bucket(lens, cu, 5, max_row_tokens=8)
    bucket = PrefillBucket(bucket.segments, 8)
    prefill = plan_prefill(table.numpy(), lens, cu, num_tokens=5, num_kv_heads=3, block_size=8, bucket=bucket)
    decode = {"decode_plan": torch.from_numpy(decode.table), "plan_shape": decode.plan_shape}
    prefill = {"prefill_plan": torch.from_numpy(prefill.table), "plan_shape": bucket.plan_shape}
    nothing = (ints([-1], [-1]), ints(-1, -1))
    options = {"sliding_window": 9, "logits_soft_cap": 5.0, "sinks": randn(6)}
    extras = {"sliding_window": 9, "logits_soft_cap": 5.0, "sinks": randn(6), "alibi_slopes": torch.rand(6)}
    long_lens, long_table = np.array([1044, 1027], np.int32), np.arange(2 * 132, dtype=np.int32).reshape(2, 132)
    long_table[1, :128] = long_table[0, :128]
    shared = plan_decode(long_table, long_lens, SlabLayout(264, 3, 8, 8), PlanShape(2, 1, 1, 2, 1, 2, 2))
    shared = {"decode_plan": torch.from_numpy(shared.table), "plan_shape": shared.plan_shape}
    chunk, blocks, slots = randn(256, 2, 16), randn(18, 2, 2, 16, 16), torch.arange(20, 276, dtype=torch.int32)
    write_plan = torch.from_numpy(plan_writes(slots.numpy(), WriteShape(256, 2, 16, 16, 4, 4)))
    return {
        "shared_plan": ("attention", (query[:2], randn(264, 3, 2, 8, 16), *nothing), shared, None),
        "decode_plan": ("attention", (query[:4], cache, *nothing), options | decode, None),
        "prefill_plan": ("attention", (query, cache, *nothing), {**options, "sliding_window": 0} | prefill, None),
        "decode": ("attention", (query[:2], cache, table, ints(20, 0)), {}, None),
        "packed": ("attention", (query, cache, table, ints(20, 11), ints(0, 2, 5)), extras, None),
        "rotary": ("rotary_embedding", (ints(0, 1, 2, 7, 9), query, key, randn(10, 16)), {"interleaved": True}, None),
        "write": ("reshape_and_cache", (key, -key, cache, ints(16, 17, 1, 40, 41)), {}, 2),
        "planned write": ("reshape_and_cache", (chunk, -chunk, blocks, slots), {"write_plan": write_plan}, 2),
        "copy": ("copy_blocks", (cache, ints([1, 2], [2, 1], [2, 7])), {}, 0),
        "swap": ("swap_blocks", (cache, torch.zeros(4, 3, 2, 8, 16), ints([7, 0], [2, 3])), {}, 1),
    }


@pytest.mark.parametrize("name", calls())
def test_operator_equals_the_cpus(name):
    op, args, kwargs, written = calls()[name]
    device = torch_xla.device()
    moved = [x.to(device) for x in args]
    moved_kwargs = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in kwargs.items()}
    got = getattr(OPS, op)(*moved, **moved_kwargs)
    local = [x.clone() for x in args]
    expected = getattr(OPS, op)(*local, **kwargs)
    if written is not None:
        got, expected = moved[written], local[written]
        assert not torch.equal(expected, args[written])
    got, expected = ((x,) if isinstance(x, torch.Tensor) else x for x in (got, expected))
    for x, y in zip(got, expected, strict=True):
        torch.testing.assert_close(x.cpu(), y, atol=1e-5, rtol=1e-5)


def test_swap_between_devices_is_refused():
    cache = torch.zeros(4, 1, 2, 8, 4)
    device = torch_xla.device()
    with pytest.raises(ValueError, match="swap_blocks: got src on cpu, dst on xla:0"):
        OPS.swap_blocks(cache, cache.to(device), ints([1, 2]).to(device))


def test_mutation_inside_torch_compile_on_the_cpu():
    """With functionalization on it is refused instead of being lost."""
    cache = torch.zeros(4, 1, 2, 8, 4)
    compiled = torch.compile(lambda c, pairs: OPS.copy_blocks(c, pairs), backend="aot_eager", fullgraph=True)
    cache[1] = 1
    if xla_functionalizes():
        with pytest.raises(Exception, match="set XLA_DISABLE_FUNCTIONALIZATION=1"):
            compiled(cache, ints([1, 2]))
    else:
        compiled(cache, ints([1, 2]))
        assert (cache[2] == 1).all()


def test_everything_holds_with_functionalization_on():
    """torch_xla's default. In a process of its own: the variable is read at import."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--noconftest", __file__, "-k", "not holds"],
        cwd=Path(__file__).parents[2], env={"PATH": "/usr/bin:/bin", "PJRT_DEVICE": "CPU", "OMP_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
