# SPDX-License-Identifier: Apache-2.0
"""The operators in a model of your own: one attention layer that prefills and decodes over a paged KV cache.

    python examples/op_in_your_model.py

Prints the largest difference from torch's own attention on the same tokens.
"""

import torch

import neuron_paged.ops  # noqa: F401  registers torch.ops.neuron_paged.*

NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, BLOCK_SIZE, NUM_BLOCKS = 8, 2, 64, 16, 64


class PagedSelfAttention(torch.nn.Module):
    """Grouped-query self-attention; the cache and the block table belong to the caller."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.qkv = torch.nn.Linear(hidden_size, (NUM_HEADS + 2 * NUM_KV_HEADS) * HEAD_DIM, bias=False)
        self.out = torch.nn.Linear(NUM_HEADS * HEAD_DIM, hidden_size, bias=False)

    def project(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        sizes = [NUM_HEADS * HEAD_DIM, NUM_KV_HEADS * HEAD_DIM, NUM_KV_HEADS * HEAD_DIM]
        query, key, value = self.qkv(x).split(sizes, dim=-1)
        num_tokens = x.shape[0]
        heads = (query.view(num_tokens, NUM_HEADS, HEAD_DIM), key.view(num_tokens, NUM_KV_HEADS, HEAD_DIM))
        return *heads, value.view(num_tokens, NUM_KV_HEADS, HEAD_DIM)

    def forward(self, x, kv_cache, slot_mapping, block_table, context_lens, cu_seqlens_q=None):
        """x [num_tokens, hidden], the sequences' new tokens one after the other."""
        query, key, value = self.project(x)
        torch.ops.neuron_paged.reshape_and_cache(key.contiguous(), value.contiguous(), kv_cache, slot_mapping)
        attended = torch.ops.neuron_paged.attention(
            query.contiguous(), kv_cache, block_table, context_lens, cu_seqlens_q
        )
        return self.out(attended.flatten(1))


@torch.inference_mode()
def main() -> None:
    torch.manual_seed(0)
    layer = PagedSelfAttention(hidden_size=256)
    kv_cache = torch.zeros(NUM_BLOCKS, NUM_KV_HEADS, 2, BLOCK_SIZE, HEAD_DIM)
    lengths = [37, 5]
    # Blocks in any order; block 0 is the null block that pads the shorter row.
    block_table = torch.tensor([[9, 3, 27], [14, 0, 0]], dtype=torch.int32)
    tokens = [torch.randn(length + 1, 256) for length in lengths]  # the last one is decoded

    def slots(row: int, positions: range) -> list[int]:
        table = block_table[row].tolist()
        return [table[p // BLOCK_SIZE] * BLOCK_SIZE + p % BLOCK_SIZE for p in positions]

    def int32(values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32)

    # Prefill both prompts in one call, packed.
    prefill = layer(
        torch.cat([x[:-1] for x in tokens]),
        kv_cache,
        int32(slots(0, range(lengths[0])) + slots(1, range(lengths[1]))),
        block_table,
        int32(lengths),
        int32([0, lengths[0], sum(lengths)]),
    )
    # Decode one token of each: no cu_seqlens_q.
    decode = layer(
        torch.stack([x[-1] for x in tokens]),
        kv_cache,
        int32([slots(row, range(n, n + 1))[0] for row, n in enumerate(lengths)]),
        block_table,
        int32([n + 1 for n in lengths]),
    )

    worst, start = 0.0, 0
    for row, x in enumerate(tokens):
        query, key, value = (t.transpose(0, 1) for t in layer.project(x))
        attended = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        expected = layer.out(attended.transpose(0, 1).flatten(1))
        paged = torch.cat([prefill[start : start + lengths[row]], decode[row : row + 1]])
        worst = max(worst, float((paged - expected).abs().max()))
        start += lengths[row]
    print(f"largest difference from scaled_dot_product_attention: {worst:.1e}")
    assert worst < 1e-4


if __name__ == "__main__":
    main()
