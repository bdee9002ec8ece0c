# SPDX-License-Identifier: Apache-2.0
"""LiveRequests: the requests in flight and the completions of their unfinished sequences, until each has ended."""

import time

from neuron_paged.engine.metrics import EngineMetrics
from neuron_paged.engine.request import Completion, Request
from neuron_paged.engine.sequence import Sequence, SequenceStatus


class LiveRequests:
    """What an engine has accepted and not yet ended.

    by_id: requests. completions: of unfinished sequences, by seq_id. A request leaves both at once, and only then is it
    counted in the metrics and noted in its outbox.
    """

    def __init__(self, metrics: EngineMetrics) -> None:
        self.by_id: dict[str, Request] = {}
        self.completions: dict[int, Completion] = {}
        self._metrics = metrics

    def add(self, request: Request) -> None:
        """A request whose sequence the scheduler holds."""
        self.by_id[request.request_id] = request
        self.completions[request.leader.seq_id] = request.completions[0]
        self._metrics.num_requests_received += 1
        request.outbox.num_unfinished += 1

    def forget(self, request: Request) -> None:
        """Undo an add that was interrupted."""
        self.by_id.pop(request.request_id, None)
        self.completions.pop(request.leader.seq_id, None)

    def note_first_token(self, sequence: Sequence, now: float) -> None:
        """Its prompt is finished (again, if it was preempted: only the first time counts)."""
        metrics = self.completions[sequence.seq_id].request.metrics
        if metrics.first_token_time is None:
            metrics.first_token_time = now
            self._metrics.record_first_token(
                sequence.num_prompt_tokens, sequence.num_cached_tokens, now - metrics.arrival_time
            )

    def completion_ended(self, completion: Completion) -> None:
        """A sequence has ended; the request ends with its last one."""
        del self.completions[completion.sequence.seq_id]
        request = completion.request
        request.num_unfinished -= 1
        if request.num_unfinished == 0:
            self._remove(request)

    def end(self, request: Request, status: SequenceStatus, error: str | None) -> None:
        """End a request before its time, whatever its samples are doing; the scheduler has let go of them."""
        for completion in request.completions:
            self.completions.pop(completion.sequence.seq_id, None)
        try:
            request.end(status, error)
        finally:
            self._remove(request)

    def _remove(self, request: Request) -> None:
        times, status = request.metrics, request.completions[0].status
        times.finished_time = time.perf_counter()
        del self.by_id[request.request_id]
        request.outbox.num_unfinished -= 1
        request.outbox.note(request)
        assert status is not None
        first = times.first_token_time or times.finished_time
        longest = max(len(c.sequence.output_token_ids) for c in request.completions)
        self._metrics.record_finished(
            status, longest, times.finished_time - first, times.finished_time - times.arrival_time
        )
