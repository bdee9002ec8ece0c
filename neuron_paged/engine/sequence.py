# SPDX-License-Identifier: Apache-2.0
"""One sequence of a request: its tokens, its progress and the blocks it holds.

Owns the data only; the scheduler moves `status`, the KV-cache manager moves the block fields. Never imports torch.
"""

import itertools
from collections.abc import Iterable
from enum import Enum
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from neuron_paged.engine.scheduler_output import ScheduledSequence

_seq_ids = itertools.count()


class SequenceStatus(Enum):
    """Where a sequence stands. WAITING, RUNNING and SWAPPED are unfinished."""

    WAITING = "waiting"
    RUNNING = "running"
    SWAPPED = "swapped"
    FINISHED_STOPPED = "finished_stopped"
    FINISHED_LENGTH = "finished_length"
    FINISHED_ABORTED = "finished_aborted"
    FINISHED_ERROR = "finished_error"

    @property
    def is_finished(self) -> bool:
        return self.value.startswith("finished")


class Sequence:
    """Tokens and state of one sequence.

    request_id: the request it belongs to; forks share it.
    prompt_token_ids: at least one token id.
    sampling_params: opaque here.
    priority: lower runs first under policy "priority". arrival_time: seconds, any clock; ties go by seq_id.
    cache_salt: sequences of different salts never share cached blocks.
    num_samples: next tokens to draw when the prompt is finished (best_of for the leader, else 1); 1 once drawn.
    needs_prompt_logprobs: every prompt position must be computed, so prefix-cache hits can't replace them.

    Progress: num_tokens = prompt + output; num_computed_tokens have their K and V in the cache; num_cached_tokens of
    those came from the prefix cache at first admission; num_prompt_logprobs prompt positions have been computed with
    their logits asked for; num_preemptions counts lost places. sample_index is 0 for a leader, 1, 2, … for its forks.

    Blocks (written by the KV-cache manager only): block_ids on the device, host_block_ids while SWAPPED, row in the
    scheduler's block tables (-1 if none), block_hashes of leading full blocks, num_registered_blocks of those
    known to the prefix cache; positions in [num_computed_tokens, num_writable_tokens) have a slot that no other
    sequence shares.
    """

    __slots__ = (
        "arrival_time",
        "block_hashes",
        "block_ids",
        "cache_salt",
        "decode_item",
        "host_block_ids",
        "last_token_id",
        "needs_prompt_logprobs",
        "num_cached_tokens",
        "num_computed_tokens",
        "num_forks",
        "num_preemptions",
        "num_prompt_logprobs",
        "num_prompt_tokens",
        "num_registered_blocks",
        "num_samples",
        "num_tokens",
        "num_writable_tokens",
        "order",
        "output_token_ids",
        "priority",
        "prompt_token_ids",
        "request_id",
        "row",
        "sample_index",
        "sampling_params",
        "seq_id",
        "status",
    )

    def __init__(
        self,
        request_id: str,
        prompt_token_ids: Iterable[int],
        sampling_params: Any = None,
        *,
        priority: int = 0,
        arrival_time: float = 0.0,
        cache_salt: str | None = None,
        num_samples: int = 1,
        needs_prompt_logprobs: bool = False,
        sample_index: int = 0,
    ) -> None:
        self.seq_id: int = next(_seq_ids)
        self.request_id = request_id
        self.prompt_token_ids: list[int] = list(prompt_token_ids)
        self.output_token_ids: list[int] = []
        self.sampling_params = sampling_params
        self.priority = priority
        self.arrival_time = arrival_time
        self.cache_salt = cache_salt
        self.num_samples = num_samples
        self.needs_prompt_logprobs = needs_prompt_logprobs
        self.sample_index = sample_index
        self.num_forks = 0

        self.status = SequenceStatus.WAITING
        self.num_prompt_tokens = len(self.prompt_token_ids)
        self.num_tokens = self.num_prompt_tokens
        self.last_token_id = self.prompt_token_ids[-1] if self.prompt_token_ids else -1
        self.num_computed_tokens = 0
        self.num_cached_tokens = 0
        self.num_preemptions = 0
        self.num_prompt_logprobs = 0

        self.block_ids: list[int] = []
        self.host_block_ids: list[int] = []
        self.row = -1
        self.num_writable_tokens = 0
        self.block_hashes: list[bytes] = []
        self.num_registered_blocks = 0
        # Set by the scheduler: its queue key, and the entry it re-uses every step while this sequence decodes.
        self.order: tuple[float, ...] = ()
        self.decode_item: ScheduledSequence | None = None

    @property
    def token_ids(self) -> list[int]:
        """Prompt and output token ids, a new list."""
        return self.prompt_token_ids + self.output_token_ids

    @property
    def is_finished(self) -> bool:
        return self.status.is_finished

    def append_token(self, token_id: int) -> None:
        """Append one sampled token."""
        self.output_token_ids.append(token_id)
        self.last_token_id = token_id
        self.num_tokens += 1

    def fork(self) -> "Sequence":
        """A new sequence of the same request with the same tokens and the next sample_index; it has no blocks yet."""
        self.num_forks += 1
        child = Sequence(
            self.request_id,
            self.prompt_token_ids,
            self.sampling_params,
            priority=self.priority,
            arrival_time=self.arrival_time,
            cache_salt=self.cache_salt,
            sample_index=self.num_forks,
        )
        for token_id in self.output_token_ids:
            child.append_token(token_id)
        child.num_cached_tokens = self.num_cached_tokens
        return child

    def get_token_ids(self, start: int, stop: int) -> list[int]:
        """Token ids of positions [start, stop), without joining prompt and output."""
        num_prompt = self.num_prompt_tokens
        if stop <= num_prompt:
            return self.prompt_token_ids[start:stop]
        if start >= num_prompt:
            return self.output_token_ids[start - num_prompt : stop - num_prompt]
        return self.prompt_token_ids[start:] + self.output_token_ids[: stop - num_prompt]

    def __repr__(self) -> str:
        return (
            f"Sequence(seq_id={self.seq_id}, request_id={self.request_id!r}, status={self.status.name}, "
            f"num_tokens={self.num_tokens}, num_computed_tokens={self.num_computed_tokens})"
        )
