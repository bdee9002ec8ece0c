# SPDX-License-Identifier: Apache-2.0
"""What a model needs besides tokens and caches. Owns the names only; the engine's batch builder fills them."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor


class AttentionInputs(NamedTuple):
    """Where this step's tokens are written and what each sequence attends to; the same for every layer.

    slot_mapping: [num_tokens] int32, block·block_size + offset of each token; padded rows point into the null block.
    block_table: [num_seqs, max_blocks_per_seq] int32, block ids in order, padded with 0.
    context_lens: [num_seqs] int32, tokens to attend to, this step's included; 0 = padded row.
    cu_seqlens_q: [num_seqs + 1] int32 prefix sums of query lengths; None when every row has exactly one token.
    """

    slot_mapping: Tensor
    block_table: Tensor
    context_lens: Tensor
    cu_seqlens_q: Tensor | None = None

    def plan_arguments(self, sliding_window: int) -> dict[str, Any]:
        """Keyword arguments of `attention` for layers of this window, beside the tables."""
        return {}

    def write_arguments(self) -> dict[str, Any]:
        """Keyword arguments of `reshape_and_cache`, beside slot_mapping."""
        return {}


class AttentionPlan(NamedTuple):
    """The operator's planned form: table [128, W] int32 and plan_shape, see ops.schema."""

    table: Tensor
    plan_shape: tuple[int, ...]
    is_prefill: bool


class PlannedInputs(AttentionInputs):
    """plans: for each sliding window of the model's layers the plan that takes the place of the tables; only the number
    of rows of block_table means anything. write_plan: of slot_mapping, None = without one."""

    plans: Mapping[int, AttentionPlan]
    write_plan: Tensor | None

    @classmethod
    def of(
        cls,
        slot_mapping: Tensor,
        num_rows: int,
        plans: Mapping[int, AttentionPlan],
        write_plan: Tensor | None = None,
    ) -> "PlannedInputs":
        """With tables that nobody reads."""
        table = torch.zeros((num_rows, 1), dtype=torch.int32, device=slot_mapping.device)
        inputs = cls(slot_mapping, table, table[:, 0])
        inputs.plans = plans
        inputs.write_plan = write_plan
        return inputs

    def write_arguments(self) -> dict[str, Any]:
        return {} if self.write_plan is None else {"write_plan": self.write_plan}

    def plan_arguments(self, sliding_window: int) -> dict[str, Any]:
        plan = self.plans[sliding_window]
        return {"prefill_plan" if plan.is_prefill else "decode_plan": plan.table, "plan_shape": plan.plan_shape}
