# SPDX-License-Identifier: Apache-2.0
"""Outbox: where the outputs of one caller's requests wait until that caller takes them, whoever runs the steps."""

from typing import TYPE_CHECKING

from neuron_paged.engine.outputs import RequestOutput

if TYPE_CHECKING:
    from neuron_paged.engine.request import Request


class Outbox:
    """Requests with news for one caller, the longest waiting first.

    An output is made when it is taken and says all that is new by then, so that nothing piles up while nobody looks.
    num_unfinished: requests of this outbox that have not ended.
    """

    __slots__ = ("_requests", "num_unfinished")

    def __init__(self) -> None:
        self._requests: dict[Request, None] = {}
        self.num_unfinished = 0

    def __len__(self) -> int:
        """Outputs that wait."""
        return len(self._requests)

    def note(self, request: "Request") -> None:
        """The request has news."""
        self._requests[request] = None

    def discard(self, request: "Request") -> None:
        """Its news go another way."""
        self._requests.pop(request, None)

    def take_of(self, requests: list["Request"]) -> list[RequestOutput]:
        """Outputs of those of the requests that deliver here."""
        outputs = []
        for request in requests:
            if request.outbox is self:
                self.discard(request)
                outputs.append(request.output())
        return outputs

    def take(self) -> RequestOutput | None:
        """The next output, or None."""
        for request in self._requests:
            del self._requests[request]
            return request.output()
        return None

    def take_all(self) -> list[RequestOutput]:
        """All outputs that wait."""
        requests, self._requests = self._requests, {}
        return [request.output() for request in requests]
