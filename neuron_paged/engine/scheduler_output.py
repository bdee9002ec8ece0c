# SPDX-License-Identifier: Apache-2.0
"""What the scheduler decided for one step."""

from dataclasses import dataclass, field

from neuron_paged.engine.block_tables import BlockTables
from neuron_paged.engine.kv_cache_manager import BlockPairs
from neuron_paged.engine.sequence import Sequence


@dataclass(slots=True)
class ScheduledSequence:
    """One row of a step: `num_tokens` tokens from num_computed_tokens on are computed, then `num_samples` drawn.

    num_samples is 0 while a prefill chunk does not reach the sequence's last token.
    """

    sequence: Sequence
    num_tokens: int
    num_samples: int


@dataclass(slots=True)
class SchedulerOutput:
    """One step. Data moves in this order: swap_out, swap_in, block_copies, then the step's own writes.

    block_tables: rows of the running sequences, as long as the step is in flight.
    scheduled: the first num_decodes entries compute exactly their last token and draw one sample. Empty only if nothing
        can run; then there is no data to move either.
    num_tokens: tokens computed in the step.
    block_copies: (source, destination) device blocks, copy-on-write; all reads before any write.
    swap_out: (device, host) blocks. swap_in: (host, device) blocks.
    preempted: sequences that lost their place, now WAITING (recompute) or SWAPPED.
    finished: sequences that the whole cache can't hold any longer, FINISHED_LENGTH; nothing more comes from them.
    """

    block_tables: BlockTables
    scheduled: list[ScheduledSequence] = field(default_factory=list)
    num_decodes: int = 0
    num_tokens: int = 0
    block_copies: BlockPairs = field(default_factory=list)
    swap_out: BlockPairs = field(default_factory=list)
    swap_in: BlockPairs = field(default_factory=list)
    preempted: list[Sequence] = field(default_factory=list)
    finished: list[Sequence] = field(default_factory=list)
