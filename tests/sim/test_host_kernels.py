# SPDX-License-Identifier: Apache-2.0
"""Kernels behind a graph's custom calls: the simulated NKI kernels write what the CPU kernels write."""

import numpy as np
import pytest
import torch

from compile.buckets import DecodeBucket, PrefillBucket
from compile.graph_spec import TensorSpec
from compile.kernel_calls import KernelCall
from neuron_paged.models.config import ModelConfig, RopeConfig
from neuron_paged.models.graph_plans import DecodeRowsPlanner, GraphModel, plan_prefill_chunk, plan_shape
from neuron_paged.ops.host_kernels import CPU_KERNELS, as_array, simulated_kernels
from nki_kernels.plan import plan_decode, smallest_shape
from nki_kernels.plan_shape import SlabLayout
from nki_kernels.prefill_plan import choose_bucket, plan_prefill
from nki_kernels.simulated_calls import simulate_attention
from nki_kernels.write_plan import WriteShape, plan_writes

LENS, TABLE = np.array([70, 0, 33], np.int32), np.array([[5, 2, 9, 1, 7], [0] * 5, [3, 8, 4, 0, 0]], np.int32)


def random(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def bfloat16(array):
    return as_array(torch.from_numpy(array).bfloat16())


CACHE = bfloat16(random(12, 2, 2, 16, 64))


def decode():
    plan = plan_decode(TABLE, LENS, layout := SlabLayout(12, 2, 16, 16),
                       smallest_shape(LENS, layout, columns_per_seq=2, max_columns=32))  # fmt: skip
    return plan.table, plan.plan_shape


def prefill():
    cu = np.array([0, 20, 20, 25], np.int32)
    bucket = choose_bucket(LENS, cu, 28)
    plan = plan_prefill(TABLE, LENS, cu, num_tokens=28, num_kv_heads=2, block_size=16, bucket=bucket)
    return plan.table, bucket.plan_shape


def attention(name, plan, num_tokens):
    table, plan_shape = plan
    operands = {"query": bfloat16(random(num_tokens, 4, 64, seed=1)), "kv_cache": CACHE, name: table}
    attributes = {"plan_shape": ",".join(map(str, plan_shape)), "num_seqs": 3, "softmax_scale": 0.2}
    return "attention", operands, {"output": operands["query"]}, attributes, False


def in_place(name, operands):
    return name, operands | {"kv_cache": CACHE}, {"kv_cache_out": CACHE}, {}, True


SLOTS = np.array([17, 40, 90, 91, 3], np.int32)
PAIRS = np.array([[1, 2], [2, 6], [6, 1]], np.int32)
NEW = [bfloat16(random(5, 2, 64, seed=s)) for s in (2, 3)]
CHUNK = [bfloat16(random(256, 2, 64, seed=s)) for s in (4, 5)]
WRITE_PLAN = plan_writes(np.r_[39 + np.arange(130), 1 + np.arange(126) % 15], WriteShape(256, 2, 16, 64, 2, 2))
ROTATED = {"positions": np.array([0, 3, 4, 9, 1], np.int32), "query": bfloat16(random(5, 4, 64)), "key": NEW[0],
           "cos_sin_cache": random(12, 64)}  # fmt: skip
CALLS = {
    "decode": attention("decode_plan", decode(), 3),
    "prefill": attention("prefill_plan", prefill(), 28),
    "write": in_place("reshape_and_cache", {"key": NEW[0], "value": NEW[1], "slot_mapping": SLOTS}),
    "planned write": in_place("reshape_and_cache", {"key": CHUNK[0], "value": CHUNK[1], "write_plan": WRITE_PLAN}),
    "copy": in_place("copy_blocks", {"block_mapping": PAIRS}),
    "rotary": ("rotary_embedding", ROTATED, {"q": ROTATED["query"], "k": NEW[0]}, {"interleaved": True}, False),
}


def run(name, kernels):
    """Result arrays of a call, run as an executor runs it; in-place results share the operand's memory or not."""
    op, operands, results, attributes, is_in_place = CALLS[name]
    arrays = {k: v.copy() for k, v in operands.items()}
    outputs = {k: np.zeros_like(v) for k, v in results.items()}
    if is_in_place:
        outputs["kv_cache_out"] = arrays["kv_cache"] if name == "copy" else outputs["kv_cache_out"]

    def spec(key, array):
        return TensorSpec(key, array.shape, array.dtype.name)

    pairs = ((0, list(arrays).index("kv_cache")),) if is_in_place else ()
    call = KernelCall(op, tuple(spec(*x) for x in arrays.items()), tuple(spec(*x) for x in outputs.items()),
                      tuple(sorted(attributes.items())), pairs)  # fmt: skip
    kernels[op](call, list(arrays.values()), list(outputs.values()))
    return [x.astype(np.float32) for x in outputs.values()]


@pytest.mark.parametrize("target", ["trn1", "trn2"])
@pytest.mark.parametrize("name", CALLS)
def test_simulated_kernels_give_what_the_cpu_kernels_give(name, target):
    got, expected = run(name, simulated_kernels(target)), run(name, CPU_KERNELS)
    for x, y in zip(got, expected, strict=True):
        live = slice(1 if CALLS[name][4] else 0, None)  # kernels drop what is meant for the null block
        assert np.abs(y[live]).max() > 0.1
        np.testing.assert_allclose(x[live], y[live], atol=0.03)


def test_attention_without_a_plan_has_no_simulated_kernel():
    call = KernelCall("attention", (TensorSpec("block_table", (3, 5), "int32"),), ())
    with pytest.raises(ValueError, match="attention: got a block table, need a plan"):
        simulated_kernels()["attention"](call, [TABLE], [])


def graph_model(num_kv_heads: int, num_blocks: int, num_cores: int) -> GraphModel:
    config = ModelConfig(
        architecture="LlamaForCausalLM", num_layers=1, hidden_size=64, intermediate_size=48, num_heads=2, head_dim=64,
        num_kv_heads=num_kv_heads, vocab_size=9, max_position_embeddings=512, rms_norm_eps=1e-5,
        rope=RopeConfig("default", (1.0,) * 32), sliding_windows=(0,), rope_layers=(True,), tie_word_embeddings=True,
    )  # fmt: skip
    return GraphModel(config, "float32", 512, 16, num_blocks, "float32", num_cores=num_cores)


def check_planned(name: str, plan: np.ndarray, shape: tuple[int, ...], query: np.ndarray, cache: np.ndarray, **options):
    """The simulated kernel gives what the CPU kernel gives, which is returned."""
    num_seqs = options["num_seqs"]
    got = simulate_attention(query, cache, **{name: plan}, plan_shape=shape, target="trn2", strict=True, **options)
    unread = torch.zeros(num_seqs, 1, dtype=torch.int32)
    planned = {name: torch.from_numpy(plan), "plan_shape": shape}
    want = torch.ops.neuron_paged.attention(*map(torch.from_numpy, (query, cache)), unread, unread[:, 0], **planned)
    torch.testing.assert_close(torch.from_numpy(np.asarray(got)), want, atol=2e-5, rtol=2e-5)
    return want


@pytest.mark.parametrize("num_kv_heads", [1, 2])
def test_plans_of_a_graphs_model_for_two_cores_give_what_one_core_gives(num_kv_heads: int) -> None:
    """KV heads are divided between the cores, or one head's folds and Q tiles are."""
    model = graph_model(num_kv_heads, 24, 2)
    cache, table = random(24, num_kv_heads, 2, 16, 64), np.arange(1, 24, dtype=np.int32)[None]
    decode, prefill = DecodeBucket(1, 1, 1, 1), PrefillBucket(200, 1)
    plans = DecodeRowsPlanner(model, decode).plan(table, np.array([300], np.int32))
    assert plans is not None and plans.need == DecodeBucket(1, 0, 1, 1)
    chunk = plan_prefill_chunk(model, prefill, table, 300, 200)[0]
    steps = [("decode_plan", 1, decode, plans.tables[0]), ("prefill_plan", 200, prefill, chunk)]
    for name, num_tokens, bucket, plan in steps:
        query = random(num_tokens, 2, 64, seed=1)
        check_planned(name, plan, plan_shape(model, bucket), query, cache, num_seqs=1, num_cores=2)


@pytest.mark.parametrize("num_cores", [1, 2])
def test_steps_of_rows_with_a_common_prefix(num_cores: int) -> None:
    """2048 tokens in common are one fold; the second plan is the first one changed, with a new slab for a row."""
    model, bucket = graph_model(1, 140, num_cores), DecodeBucket(2, 0, 1, 2, 1)
    cache, table = random(140, 1, 2, 16, 64), np.zeros((2, 131), np.int32)
    table[:, :128] = np.random.default_rng(0).permutation(128) + 1
    table[0, 128:], table[1, 128:] = [130, 131, 132], [133, 134, 135]
    planner, lens = DecodeRowsPlanner(model, bucket), np.array([2080, 2050], np.int32)
    for step, make in enumerate((planner.plan, planner.advance)):
        plans = make(table, lens + step)
        assert plans is not None and plans.need == DecodeBucket(2, 0, 1, 2, 1)
        query, shape = random(2, 2, 64, seed=step), plan_shape(model, bucket)
        got = check_planned("decode_plan", plans.tables[0], shape, query, cache, num_seqs=2, num_cores=num_cores)
        want = torch.ops.neuron_paged.attention(*map(torch.from_numpy, (query, cache, table, lens + step)))
        torch.testing.assert_close(got, want, atol=2e-5, rtol=2e-5)
