# SPDX-License-Identifier: Apache-2.0
"""What tensor parallelism costs on this machine: decode steps of several ranks beside those of one process.

Both share the same CPU threads and take turns, so the ratio shows the overhead, not a gain: a device's ranks bring
hardware of their own. A model with random weights is made, because the demo's heads divide among 3 and 9 only.
"""

import time
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch

from neuron_paged.engine.llm import LLM
from neuron_paged.engine.parallel_runner import ParallelRunner
from neuron_paged.engine.sampling import SamplingParams
from neuron_paged.models.collectives import RankGroup
from neuron_paged.models.llama import LlamaModel
from neuron_paged.models.registry import normalise_config
from neuron_paged.models.tensor_parallel import RowParallelLinear, VocabParallelEmbedding, VocabParallelHead
from neuron_paged.progress import each

# SmolLM2-135M with 8 heads and 4 KV heads instead of 9 and 3.
_SIZES: dict[str, Any] = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}
_PROMPT_LEN = 64


class _TimedGroup(RankGroup):
    """Adds up the seconds rank 0 spends in collectives, waiting for slower ranks included."""

    seconds = 0.0

    def _wait(self, collective: Any, *arguments: Any) -> None:
        start = time.perf_counter()
        super()._wait(collective, *arguments)
        type(self).seconds += time.perf_counter() - start


def run_tensor_parallel(*, num_ranks: int, batch_sizes: list[int], num_steps: int, progress: bool) -> dict[str, Any]:
    """Each batch size three times on one process and on the ranks, in turn; JSON-ready."""
    with TemporaryDirectory(prefix="neuron-paged-bench-") as name:
        _write_random_model(Path(name))
        settings: dict[str, Any] = {
            "progress": False,
            "enable_prefix_caching": False,
            "max_num_seqs": max(batch_sizes),
            "max_model_len": _PROMPT_LEN + num_steps + 8,
        }
        one = LLM(name, **settings)
        many = LLM(name, tensor_parallel_size=num_ranks, **settings)
    runner = many.engine.executor
    assert isinstance(runner, ParallelRunner)
    _time_collectives(runner)
    rows = []
    for batch_size in each(batch_sizes, "Batch sizes", "run", enabled=progress):
        alone, shared, collectives = [], [], []
        for _ in range(3):
            alone.append(_decode_step_s(one, batch_size, num_steps))
            _TimedGroup.seconds = 0.0
            shared.append(_decode_step_s(many, batch_size, num_steps))
            collectives.append(_TimedGroup.seconds / num_steps)
        rows.append(
            {
                "batch_size": batch_size,
                "one_process_s": median(alone),
                "ranks_s": median(shared),
                "collectives_s": median(collectives),
            }
        )
    num_layers = runner.model.config.num_layers
    runner.pool.stop()
    return {
        "num_ranks": num_ranks,
        "num_threads": torch.get_num_threads(),
        "threads_per_rank": runner.pool.num_threads,
        "collectives_per_step": 2 * num_layers + 2,
        "num_steps": num_steps,
        "batches": rows,
    }


def _write_random_model(folder: Path) -> None:
    from safetensors.torch import save_file
    from transformers import LlamaConfig

    hf_config = LlamaConfig(architectures=["LlamaForCausalLM"], **_SIZES)
    hf_config.save_pretrained(folder)
    outline = LlamaModel(normalise_config(hf_config)[1], device="meta")
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, slot in outline.checkpoint_slots().items():
        scale = slot.shape[-1] ** -0.5 if len(slot.shape) == 2 else 1.0
        tensors[name] = (scale * torch.randn(slot.shape, generator=generator)).bfloat16()
    save_file(tensors, folder / "model.safetensors")


def _time_collectives(runner: ParallelRunner) -> None:
    for module in runner.model.modules():
        if isinstance(module, (RowParallelLinear, VocabParallelEmbedding, VocabParallelHead)):
            module.group = _TimedGroup(module.group.rank, module.group.size, module.group.process_group)


def _decode_step_s(llm: LLM, batch_size: int, num_steps: int) -> float:
    """Median seconds of a decode step of so many sequences."""
    engine = llm.engine
    params = SamplingParams(temperature=0, max_tokens=None, ignore_eos=True)
    generator = torch.Generator().manual_seed(1)
    names = [f"bench-{row}" for row in range(batch_size)]
    for name in names:
        prompt = torch.randint(_SIZES["vocab_size"], (_PROMPT_LEN,), generator=generator).tolist()
        engine.add_request(name, prompt, params)
    started: set[str] = set()
    while len(started) < batch_size:
        started.update(output.request_id for output in engine.step())
    seconds = []
    for _ in range(num_steps):
        start = time.perf_counter()
        engine.step()
        seconds.append(time.perf_counter() - start)
    engine.abort_request(names)
    return median(seconds)
