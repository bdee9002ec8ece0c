# SPDX-License-Identifier: Apache-2.0
"""ParallelRunner: the Executor of a tensor-parallel engine, rank 0 of its model in this process.

Rank 0 alone samples. Its steps run on a thread of their own: whatever interrupts the caller, a step that the other
ranks have begun is finished, so that all agree about what is in the caches.
"""

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from neuron_paged.config import CacheConfig
from neuron_paged.engine.batch import Batch
from neuron_paged.engine.executor import StepResult
from neuron_paged.engine.model_runner import ModelRunner
from neuron_paged.engine.rank_messages import LOADED, READY, StepMessage
from neuron_paged.engine.rank_pool import RankPool
from neuron_paged.models.sampler import SamplingTensors
from neuron_paged.models.step import PromptLogprobTensors
from neuron_paged.models.tensor_parallel import is_greedy

if TYPE_CHECKING:
    from neuron_paged.models.llama import LlamaModel

# So long an interrupted caller waits for its step to end; then the ranks are stopped.
_INTERRUPTED_STEP_S = 10.0


class ParallelRunner(ModelRunner):
    """Runs batches on all ranks of a pool.

    model: rank 0's part, joined to the pool's ranks. config: num_blocks set; each rank's caches have so many blocks of
    its own KV heads. Raises RankError if a rank dies, and from then on always.
    """

    def __init__(self, model: "LlamaModel", config: CacheConfig, pool: RankPool) -> None:
        self.pool = pool
        self._is_announced = True
        self._thread = _StepThread(pool.num_threads)
        pool.wait_for(LOADED)
        pool.send(config)
        self._on_thread(lambda: super(ParallelRunner, self).__init__(model, config))

    @property
    def num_ranks(self) -> int:
        """Ranks, this one included; each has caches of the same size."""
        return self.pool.size

    def warm_up(self) -> None:
        """As ModelRunner.warm_up, on all ranks; once, before the first step."""
        self._on_thread(super().warm_up)
        self.pool.wait_for(READY)

    def execute(self, batch: Batch) -> StepResult:
        """As ModelRunner.execute. What fails before the ranks know of the step is raised as it is."""
        if self.pool.failure is not None:
            raise self.pool.failure
        self._is_announced = False
        execute = super().execute
        return self._on_thread(lambda: execute(batch))

    def _announce(
        self,
        batch: Batch,
        logits_indices: Tensor,
        prompt: PromptLogprobTensors | None,
        sampling: SamplingTensors,
    ) -> None:
        self._is_announced = True
        self.pool.send(
            StepMessage(
                batch.token_ids,
                batch.positions,
                batch.slot_mapping,
                batch.block_table,
                batch.context_lens,
                batch.cu_seqlens_q,
                logits_indices.numpy(),
                is_greedy(sampling),
                None if prompt is None else prompt.indices.numpy(),
                batch.block_copies,
                batch.swap_out,
                batch.swap_in,
            )
        )

    def _on_thread(self, function: Callable[[], Any]) -> Any:
        task = self._thread.submit(function)
        try:
            wait([task])
        except BaseException as interruption:
            try:
                wait([task], _INTERRUPTED_STEP_S)
            finally:
                if self._is_announced and (not task.done() or task.exception() is not None):
                    self.pool.blame(interruption)
            raise
        error = task.exception()
        if error is None:
            return task.result()
        if self.pool.failure is not None:
            raise self.pool.failure
        if self._is_announced:
            raise self.pool.blame(error) from error
        raise error


class _StepThread:
    """A thread that calls one function at a time, with its own number of CPU threads. Ends with the process."""

    def __init__(self, num_threads: int) -> None:
        self._calls: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]]] = queue.SimpleQueue()
        threading.Thread(target=_call_all, args=(self._calls, num_threads), daemon=True).start()

    def submit(self, function: Callable[[], Any]) -> "Future[Any]":
        future: Future[Any] = Future()
        self._calls.put((future, function))
        return future


def _call_all(calls: "queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]]]", num_threads: int) -> None:
    torch.set_num_threads(num_threads)
    while True:
        future, function = calls.get()
        try:
            result = function()
        except BaseException as error:
            future.set_exception(error)
        else:
            future.set_result(result)
            del result
        del future, function
