# SPDX-License-Identifier: Apache-2.0
"""Sharded models against whole ones: every family on 2 and 4 ranks over gloo, here one thread each; what ranks read of
a checkpoint; which numbers of ranks a model allows."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from neuron_paged.errors import ConfigError
from neuron_paged.models import load_model
from neuron_paged.models.collectives import RankGroup, connect
from neuron_paged.models.gguf_file import GGUFTensor
from neuron_paged.models.kv_scales import calibrate_kv_scales
from neuron_paged.models.llama import LlamaModel
from neuron_paged.models.loader import RankTask, load_rank
from neuron_paged.models.rank_heads import check_tensor_parallel_size, supported_sizes
from neuron_paged.models.sampler import argmax
from neuron_paged.models.tensor_parallel import Shard, VocabParallelHead
from neuron_paged.models.weights import SafetensorsSource, TensorPart, load_weights
from tests.cpu.test_models import CONFIGS, make_reference, paged_logits
from tests.cpu.test_weights_gguf import write_gguf


def run_ranks(size: int, folder: Path, work: Callable[[RankGroup], Any]) -> list[Any]:
    """work(group) on every rank, a thread each; results by rank."""
    with ThreadPoolExecutor(size) as threads:
        return list(threads.map(lambda rank: work(connect(rank, size, folder / "rendezvous")), range(size)))


def task_of(path: Path, size: int, packed_dtype: torch.dtype | None = torch.float32) -> RankTask:
    loaded = load_model(path, progress=False)
    return RankTask(path, loaded.config, torch.float32, packed_dtype, loaded.max_model_len, size)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def checkpoint(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name)
            family, options = CONFIGS[name]
            make_reference(family, options).save_pretrained(made[name])
        return made[name]

    return checkpoint


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("name", CONFIGS)
def test_ranks_give_the_whole_models_logits(name: str, size: int, checkpoints, tmp_path: Path) -> None:
    """Vocabulary (97) and some MLPs don't divide evenly, and four ranks share two KV heads, or one."""
    path = checkpoints(name)
    whole = paged_logits(load_model(path, progress=False).model)
    task = task_of(path, size)
    for logits in run_ranks(size, tmp_path, lambda group: paged_logits(load_rank(task, group))):
        for ours, expected in zip(logits, whole, strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-4, atol=2e-5)


def test_plain_layers_of_ranks_give_the_same(checkpoints, tmp_path: Path) -> None:
    path = checkpoints("llama_bias")
    whole = paged_logits(load_model(path, progress=False, prepare=False).model)
    task = task_of(path, 2, packed_dtype=None)
    for logits in run_ranks(2, tmp_path, lambda group: paged_logits(load_rank(task, group))):
        torch.testing.assert_close(torch.cat(logits), torch.cat(whole), rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("size", [2, 3, 4])
def test_ranks_agree_about_the_largest_logit(size: int, tmp_path: Path) -> None:
    """Ties across ranks, NaN and infinity on one of them, an all-negative row whose rival is padding."""
    vocab_size, hidden_size = 10, 12
    weight = torch.zeros(vocab_size, hidden_size)
    weight[torch.arange(10), torch.arange(10)] = 1.0
    rows = torch.zeros(6, hidden_size)
    rows[0, [3, 8]] = 2.0  # a tie of ids 3 and 8
    rows[1, 9] = 1.0
    rows[2, :10] = -5.0
    rows[2, 6] = -4.0
    rows[3, 7] = torch.nan
    rows[4, 2] = torch.inf
    whole = argmax(rows @ weight.T)
    assert whole.tolist() == [3, 9, 6, -1, -1, 0]

    def work(group: RankGroup) -> tuple[torch.Tensor, torch.Tensor]:
        per_rank = -(-vocab_size // size)
        linear = torch.nn.Linear(hidden_size, per_rank, bias=False)
        linear.weight = torch.nn.Parameter(torch.zeros(per_rank, hidden_size), requires_grad=False)
        own = weight[group.rank * per_rank : (group.rank + 1) * per_rank]
        linear.weight[: len(own)] = own
        head = VocabParallelHead(linear, vocab_size, group)  # type: ignore[arg-type]
        return head.argmax(rows), head(rows)

    for token_ids, logits in run_ranks(size, tmp_path, work):
        assert token_ids.tolist() == whole.tolist()
        torch.testing.assert_close(logits, rows @ weight.T, equal_nan=True)


class CountingSource(SafetensorsSource):
    """A checkpoint that counts how often each element is read."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.counts: dict[str, torch.Tensor] = {}

    def read(self, name: str, part: TensorPart | None = None) -> torch.Tensor:
        count = self.counts.setdefault(name, torch.zeros(self.shape(name)))
        count[slice(None) if part is None else part] += 1
        return super().read(name, part)


@pytest.mark.parametrize("name", ["llama_bias", "qwen3", "llama_mqa_head_dim"])
def test_every_element_is_read_by_the_ranks_that_need_it_only(name: str, checkpoints) -> None:
    path, size = checkpoints(name), 4
    config = load_model(path, progress=False).config
    whole = LlamaModel(config, device="meta")
    with CountingSource(path) as source:
        for rank in range(size):
            shard = Shard(config, rank, size)
            model = shard.new_model(LlamaModel, dtype=torch.float32)
            load_weights(model, source, progress=False, parts=shard.parts(whole, model))
    for tensor, count in source.counts.items():
        module = tensor.rpartition(".")[0].rpartition(".")[2]
        times = size if "norm" in module else size // config.num_kv_heads if module in ("k_proj", "v_proj") else 1
        assert (count == times).all(), tensor
    assert source.counts.keys() == whole.checkpoint_slots().keys()


@pytest.mark.parametrize("kind", ["F32", "F16", "Q8_0", "Q4_0"])
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_part_of_a_gguf_tensor(kind: str, data: st.DataObject) -> None:
    dims = data.draw(st.sampled_from([(64,), (7, 96)]))
    values = np.random.default_rng(0).standard_normal(dims).astype(np.float32)
    type_id = gguf.GGMLQuantizationType[kind]
    quantised = np.ascontiguousarray(gguf.quants.quantize(values, type_id)).view(np.uint8)
    tensor = GGUFTensor("t", dims, int(type_id), quantised.reshape(int(np.prod(dims[:-1])), -1))
    bounds = [sorted(data.draw(st.tuples(st.integers(0, n - 1), st.integers(1, n)))) for n in dims]
    part = tuple(slice(low, max(high, low + 1)) for low, high in bounds)
    np.testing.assert_array_equal(tensor.dequantise(part), tensor.dequantise()[part])


@pytest.mark.parametrize(("name", "architecture"), [("llama", "llama"), ("qwen2", "qwen2"), ("qwen3", "qwen3")])
def test_ranks_read_gguf_files(name: str, architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows of llama's q and k are permuted within each head."""
    monkeypatch.setattr("neuron_paged.models.loader._gguf_tokenizer", lambda path: None)
    family, options = CONFIGS[name]
    reference = make_reference(family, {"head_dim": 16, **options})
    path = tmp_path / "model.gguf"
    write_gguf(path, reference, architecture)
    whole = paged_logits(load_model(path, progress=False).model)
    task = task_of(path, 2)
    for logits in run_ranks(2, tmp_path, lambda group: paged_logits(load_rank(task, group))):
        torch.testing.assert_close(torch.cat(logits), torch.cat(whole), rtol=1e-4, atol=2e-5)


def test_ranks_calibrate_fp8_scales_of_their_own_heads(checkpoints, tmp_path: Path) -> None:
    path = checkpoints("llama")
    whole = load_model(path, progress=False).model
    calibrate_kv_scales(whole)
    task = task_of(path, 2)

    def scales(group: RankGroup) -> list[torch.Tensor]:
        model = load_rank(task, group)
        calibrate_kv_scales(model)
        return [layer.self_attn.k_scale for layer in model.layers]

    by_rank = run_ranks(2, tmp_path, scales)
    for index, layer in enumerate(whole.layers):
        torch.testing.assert_close(torch.cat([by_rank[0][index], by_rank[1][index]]), layer.self_attn.k_scale)


@pytest.mark.parametrize("per_head", [False, True])
def test_ranks_take_the_checkpoints_scales_of_their_heads(per_head: bool, checkpoints, tmp_path: Path) -> None:
    tensors = load_file(checkpoints("llama_mha") / "model.safetensors")
    for layer in range(3):
        for name in ("k_scale", "v_scale"):
            scale = torch.arange(1.0, 5.0) + layer if per_head else torch.tensor(1.5 + layer)
            tensors[f"model.layers.{layer}.self_attn.attn.{name}"] = scale
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((checkpoints("llama_mha") / "config.json").read_text())
    whole, task = load_model(tmp_path, progress=False).model, task_of(tmp_path, 4)
    by_rank = run_ranks(4, tmp_path, lambda group: load_rank(task, group))
    for index, layer in enumerate(whole.layers):
        own = [model.layers[index].self_attn.v_scale for model in by_rank]
        torch.testing.assert_close(torch.cat(own), layer.self_attn.v_scale)


def test_sizes_that_a_model_allows(checkpoints) -> None:
    config = load_model(checkpoints("llama"), progress=False).config
    demo = replace(config, num_heads=9, num_kv_heads=3)
    assert supported_sizes(demo) == [1, 3, 9]
    assert supported_sizes(replace(config, num_heads=32, num_kv_heads=8)) == [1, 2, 4, 8, 16, 32]
    assert supported_sizes(replace(config, num_heads=12, num_kv_heads=3)) == [1, 3, 6, 12]
    for size, nearest in ((0, 1), (2, 3), (4, 3), (6, 9), (10, 9)):
        with pytest.raises(ConfigError, match=f"got {size} for a model of 9 heads and 3 KV .* 1, 3, 9 .* is {nearest}"):
            check_tensor_parallel_size(size, demo)
    check_tensor_parallel_size(9, demo)
