# SPDX-License-Identifier: Apache-2.0
"""ModelRunner: its caches, what it moves before a step, and which tokens it asks logits for."""

import numpy as np
import pytest
import torch

from neuron_paged.config import CacheConfig, SchedulerConfig
from neuron_paged.engine.batch import build_batch
from neuron_paged.engine.model_runner import ModelRunner, block_bytes
from neuron_paged.engine.sampling import SamplingParams
from neuron_paged.engine.sampling_state import SamplingState
from neuron_paged.engine.scheduler import Scheduler
from neuron_paged.engine.sequence import Sequence
from neuron_paged.errors import ConfigError
from neuron_paged.models.config import ModelConfig, RopeConfig
from neuron_paged.models.llama import LlamaModel

CONFIG = ModelConfig(
    architecture="LlamaForCausalLM", num_layers=2, hidden_size=32, intermediate_size=48, num_heads=4, num_kv_heads=2,
    head_dim=8, vocab_size=300, max_position_embeddings=64, rms_norm_eps=1e-5,
    rope=RopeConfig("default", (1.0, 0.1, 0.01, 0.001)), sliding_windows=(0, 0), rope_layers=(True, True),
)  # fmt: skip


@pytest.fixture(scope="module")
def model() -> LlamaModel:
    torch.manual_seed(0)
    model = LlamaModel(CONFIG)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.is_floating_point() and not name.startswith("rotary_emb."):
                parameter.normal_(0, 0.3)
    return model


def start(prompt: list[int], **params) -> tuple[Scheduler, Sequence]:
    cache = CacheConfig(block_size=8, num_blocks=12, num_swap_blocks=4)
    scheduler = Scheduler(SchedulerConfig(max_model_len=64), cache)
    state = SamplingState(SamplingParams(**params), seed=0, vocab_size=300)
    sequence = Sequence(
        "a", prompt, state, num_samples=state.params.num_samples,
        needs_prompt_logprobs=state.params.prompt_logprobs is not None,
    )  # fmt: skip
    scheduler.add(sequence)
    return scheduler, sequence


def test_warm_up_writes_to_the_null_block_only(model):
    runner = ModelRunner(model, CacheConfig(block_size=8, num_blocks=12))
    runner.warm_up()
    assert all(not cache[1:].any() and cache.isfinite().all() for cache in runner.kv_caches)


def test_caches_start_zeroed_and_only_own_slots_are_written(model):
    runner = ModelRunner(model, CacheConfig(block_size=8, num_blocks=12, num_swap_blocks=4))
    assert len(runner.kv_caches) == len(runner.swap_caches) == 2
    assert all(not cache.any() for cache in runner.kv_caches + runner.swap_caches)
    scheduler, sequence = start(list(range(11)), temperature=0)
    runner.execute(build_batch(scheduler.schedule(), 8))
    for cache in runner.kv_caches:
        written = cache.abs().sum((1, 2, 4)) > 0  # [num_blocks, block_size]
        expected = torch.zeros_like(written)
        expected[sequence.block_ids[0]] = True
        expected[sequence.block_ids[1], :3] = True
        assert torch.equal(written, expected)


def test_blocks_move_in_order_swap_out_swap_in_copies(model):
    runner = ModelRunner(model, CacheConfig(block_size=8, num_blocks=12, num_swap_blocks=4))
    for cache in runner.kv_caches:
        cache += torch.arange(12.0)[:, None, None, None, None]
    scheduler, _ = start([1], temperature=0)
    batch = build_batch(scheduler.schedule(), 8)

    def moved(**pairs):
        moves = {name: np.array(value, np.int32) for name, value in pairs.items()}
        return type(batch)(**{f: moves.get(f, getattr(batch, f)) for f in batch.__dataclass_fields__})

    runner.execute(moved(swap_out=[[9, 3]], swap_in=[[3, 10]], block_copies=[[10, 11], [8, 10]]))
    for cache, swapped in zip(runner.kv_caches, runner.swap_caches, strict=True):
        assert (swapped[3] == 9).all() and (cache[11] == 9).all() and (cache[10] == 8).all()


def test_prompt_logprobs_do_not_change_what_is_sampled(model):
    results = []
    for prompt_logprobs in (None, 1):
        runner = ModelRunner(model, CacheConfig(block_size=8, num_blocks=12))
        scheduler, _ = start(list(range(20)), seed=1, n=3, prompt_logprobs=prompt_logprobs)
        results.append(runner.execute(build_batch(scheduler.schedule(), 8)))
    np.testing.assert_array_equal(results[0].token_ids, results[1].token_ids)
    assert results[0].prompt_logprobs is None
    assert results[1].prompt_logprobs.token_ids.tolist() == list(range(1, 20))
    assert results[1].prompt_logprobs.top_ids.shape == (19, 1)


def test_a_chunk_without_samples_returns_no_token(model):
    runner = ModelRunner(model, CacheConfig(block_size=8, num_blocks=12))
    scheduler = Scheduler(SchedulerConfig(max_num_batched_tokens=4), CacheConfig(block_size=8, num_blocks=12))
    scheduler.add(Sequence("a", list(range(9)), SamplingState(SamplingParams(), seed=0, vocab_size=300)))
    result = runner.execute(build_batch(scheduler.schedule(), 8))
    assert len(result.token_ids) == 0 and result.sample_s >= 0


@pytest.mark.parametrize(("name", "element_bytes"), [("auto", 4), ("bf16", 2), ("fp8", 1)])
def test_block_bytes_count_all_layers(model, name, element_bytes):
    config = CacheConfig(block_size=8, num_blocks=3, kv_cache_dtype=name)
    runner = ModelRunner(model, config)
    total = sum(cache.nbytes for cache in runner.kv_caches)
    assert block_bytes(model, config) * 3 == total == 3 * 2 * 2 * 2 * 8 * 8 * element_bytes


def test_unsized_or_impossible_cache_is_refused(model):
    with pytest.raises(ConfigError, match="num_blocks: got None"):
        ModelRunner(model, CacheConfig(block_size=8))
    with pytest.raises(ConfigError, match="memory that can't be had"):
        ModelRunner(model, CacheConfig(block_size=8, num_blocks=2**44))
