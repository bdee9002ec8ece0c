# SPDX-License-Identifier: Apache-2.0
"""Tensor parallelism: which part of a model a rank has, and the layers where its ranks' results are put together.

q, k, v, gate and up are split by output (heads, columns of the MLP), o and down by input, embedding and head by
vocabulary; norms and rotary table are everywhere. Every rank computes the same graph, only weights and buffers differ.
R = logits rows, V = vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from neuron_paged.models.collectives import RankGroup
from neuron_paged.models.config import ModelConfig
from neuron_paged.models.inputs import AttentionInputs
from neuron_paged.models.layers import Device, Embedding
from neuron_paged.models.linear import Linear
from neuron_paged.models.llama import LlamaModel
from neuron_paged.models.rank_heads import rank_heads
from neuron_paged.models.sampler import SamplerOutput, SamplingTensors, argmax
from neuron_paged.models.step import ModelStep, prompt_parts
from neuron_paged.models.weights import TensorPart

# Finite, so that they survive a multiplication by zero.
_LARGEST = torch.finfo(torch.float32).max
_EXCLUDED = torch.finfo(torch.float32).min


@dataclass(frozen=True)
class Shard:
    """Part `rank` of `size` of a model of `config`. Odd sizes are rounded up: the last ranks' weights end in zeros."""

    config: ModelConfig
    rank: int
    size: int

    @property
    def vocab_size(self) -> int:
        """Rows of this rank's embedding and head."""
        return -(-self.config.vocab_size // self.size)

    @property
    def kv_heads(self) -> slice:
        """This rank's KV heads among the model's; with more ranks than KV heads, neighbours hold the same one."""
        per_rank, sharing = rank_heads(self.config, self.size)[1], max(1, self.size // self.config.num_kv_heads)
        start = self.rank // sharing * per_rank
        return slice(start, start + per_rank)

    @property
    def rank_config(self) -> ModelConfig:
        """Sizes of the rank's modules; vocab_size stays the model's, as hidden_size does."""
        heads, kv_heads = rank_heads(self.config, self.size)
        return replace(
            self.config,
            num_heads=heads,
            num_kv_heads=kv_heads,
            intermediate_size=-(-self.config.intermediate_size // self.size),
        )

    def new_model(
        self,
        model_class: type[LlamaModel],
        *,
        dtype: torch.dtype,
        device: Device = "cpu",
        max_positions: int | None = None,
    ) -> LlamaModel:
        """The rank's model with plain layers, as weights are loaded into it; `join_ranks` makes it compute."""
        config = replace(self.rank_config, vocab_size=self.vocab_size)
        return model_class(config, dtype=dtype, device=device, max_positions=max_positions)

    def parts(self, whole: LlamaModel, own: LlamaModel) -> dict[str, TensorPart]:
        """What this rank's model `own` reads of each checkpoint tensor of the `whole` one; both may be on "meta"."""
        own_slots = own.checkpoint_slots()
        return {
            name: self.part(name, slot.shape, own_slots[name].shape) for name, slot in whole.checkpoint_slots().items()
        }

    def part(self, name: str, whole: tuple[int, ...], own: tuple[int, ...]) -> TensorPart:
        """What this rank reads of the checkpoint tensor `name`: `whole` is its shape, `own` that of the rank's."""
        if name.endswith((".o_proj.bias", ".down_proj.bias")) and self.rank > 0:
            return (slice(0, 0),)  # added once
        rank = self.rank
        if name.rpartition(".")[0].endswith((".k_proj", ".v_proj")):
            rank = self.kv_heads.start // rank_heads(self.config, self.size)[1]
        starts = [rank * size if size != full else 0 for size, full in zip(own, whole, strict=True)]
        return tuple(
            slice(min(start, full), min(start + size, full))
            for start, size, full in zip(starts, own, whole, strict=True)
        )


class RowParallelLinear(nn.Module):
    """A linear layer split by its inputs: the ranks' products are summed. One rank alone has the bias."""

    def __init__(self, linear: Linear, group: RankGroup) -> None:
        super().__init__()
        self.linear, self.group = linear, group

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """As Linear.forward, with the rank's share of x."""
        y = self.group.all_reduce(self.linear(x))
        return y if residual is None else y + residual


class VocabParallelEmbedding(nn.Module):
    """Rows [first_token_id, first_token_id + n) of the embedding; first_token_id [1] int32."""

    first_token_id: Tensor

    def __init__(self, embedding: Embedding, group: RankGroup) -> None:
        super().__init__()
        self.embedding, self.group = embedding, group
        device, rows = embedding.weight.device, embedding.weight.shape[0]
        self.register_buffer("first_token_id", torch.tensor([group.rank * rows], dtype=torch.int32, device=device))

    def forward(self, token_ids: Tensor) -> Tensor:
        """token_ids [T] int32 → [T, hidden_size]."""
        last = self.embedding.weight.shape[0] - 1
        row = token_ids - self.first_token_id
        is_own = (row >= 0) & (row <= last)
        hidden = self.embedding(row.clamp(0, last))
        return self.group.all_reduce(hidden * is_own[:, None].to(hidden.dtype))


class VocabParallelHead(nn.Module):
    """The output head, split by vocabulary; ranks' logits are gathered, or only their largest ones.

    is_rank [size] fp32: see RankGroup.all_gather. excluded [V / size] fp32: what keeps rows beyond the vocabulary from
    being the largest, None if there are none.
    """

    is_rank: Tensor
    excluded: Tensor | None

    def __init__(self, linear: Linear, vocab_size: int, group: RankGroup) -> None:
        super().__init__()
        self.linear, self.group, self.vocab_size = linear, group, vocab_size
        self.num_rows, device = linear.weight.shape[0], linear.weight.device
        self.register_buffer("is_rank", (torch.arange(group.size) == group.rank).float().to(device))
        excluded = None
        if self.num_rows * group.size != vocab_size:
            beyond = torch.arange(self.num_rows) + group.rank * self.num_rows >= vocab_size
            excluded = torch.where(beyond, _EXCLUDED, 0.0).to(device)
        self.register_buffer("excluded", excluded)

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden [R, hidden_size] → [R, V] fp32, on every rank."""
        gathered = self.group.all_gather(self.linear(hidden).float(), self.is_rank)
        return gathered.movedim(0, 1).flatten(1)[:, : self.vocab_size]

    def argmax(self, hidden: Tensor) -> Tensor:
        """Lowest id of the largest logit of each row, -1 if that is not finite; i64 [R], on every rank."""
        logits = self.linear(hidden).float()
        if self.excluded is not None:
            logits = logits + self.excluded
        row = argmax(logits)
        value = logits.gather(1, row.clamp(min=0)[:, None]).squeeze(1)
        value = torch.where(row < 0, torch.full_like(value, _LARGEST), value)
        # fp32 holds the ids exactly: a rank has fewer than 2**24 rows.
        best = self.group.all_gather(torch.stack((value, row.float())), self.is_rank)
        rank = best[:, 0].argmax(0)  # of equal ones the first, so the lowest id
        row = best[:, 1].gather(0, rank[None]).squeeze(0).long()
        return torch.where(row < 0, row, rank * self.num_rows + row)


def join_ranks(model: LlamaModel, shard: Shard, group: RankGroup) -> LlamaModel:
    """Put the layers in place that join the ranks' results. Its weights are loaded, its linear layers still plain."""
    parts: Any = model  # nn.Module takes any layer in place of another
    parts.config = shard.rank_config
    parts.embed_tokens = VocabParallelEmbedding(parts.embed_tokens, group)
    for layer in parts.layers:
        layer.self_attn.o_proj = RowParallelLinear(layer.self_attn.o_proj, group)
        layer.mlp.down_proj = RowParallelLinear(layer.mlp.down_proj, group)
    parts.lm_head = VocabParallelHead(parts.lm_head, shard.config.vocab_size, group)
    return model


class ShardedModelStep(ModelStep):
    """A step whose ranks settle greedy samples among themselves, without gathering logits.

    Rank 0 calls it like any step; the others `follow`, which makes the same collectives.
    """

    def __init__(self, model: LlamaModel) -> None:
        super().__init__(model)
        head: nn.Module = model.lm_head
        assert isinstance(head, VocabParallelHead)
        self._head = head

    def follow(
        self,
        token_ids: Tensor,
        positions: Tensor,
        inputs: AttentionInputs,
        logits_indices: Tensor,
        is_greedy: bool,
        kv_caches: list[Tensor],
        prompt_indices: Tensor | None,
    ) -> None:
        """The model's part of a step, for ranks that don't sample. is_greedy: rank 0's samples are all argmax."""
        hidden = self.model(token_ids, positions, inputs, kv_caches)
        if prompt_indices is not None:
            for part in prompt_parts(prompt_indices):
                self.model.compute_logits(hidden.index_select(0, prompt_indices[part]))
        if logits_indices.shape[0] > 0:
            hidden = hidden.index_select(0, logits_indices)
            (self._head.argmax if is_greedy else self._head)(hidden)

    def _sample(
        self,
        hidden: Tensor,
        sample_rows: Tensor | None,
        sampling: SamplingTensors,
        on_logits: Callable[[], None] | None,
    ) -> SamplerOutput:
        if not is_greedy(sampling):
            return super()._sample(hidden, sample_rows, sampling, on_logits)
        token_ids = self._head.argmax(hidden)
        if on_logits is not None:
            on_logits()
        return SamplerOutput(token_ids if sample_rows is None else token_ids.index_select(0, sample_rows), None)


def is_greedy(sampling: SamplingTensors) -> bool:
    """Whether every sample is the argmax of the model's logits and nothing else is asked for."""
    return sampling.temperature is None and sampling.edits is None and sampling.logprob_rows is None


def model_step(model: LlamaModel) -> ModelStep:
    """The step of a model, whole or sharded."""
    head: nn.Module = model.lm_head
    return ShardedModelStep(model) if isinstance(head, VocabParallelHead) else ModelStep(model)
