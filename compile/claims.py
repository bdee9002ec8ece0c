# SPDX-License-Identifier: Apache-2.0
"""Claims: machines that share a store divide the work. A claim is a lease; one that ran out may be taken over.

Only speed depends on claims: a graph compiled twice is published once. So clocks may differ by much less than a lease.
"""

import contextlib
import json
import os
import socket
import time
import uuid
from collections.abc import Callable
from pathlib import PurePosixPath

from compile.bundle import canonical_json
from compile.errors import StoreError
from compile.store import Store


class Claims:
    """Claims of one process. lease_s: how long a claim lasts without renewal. clock: seconds, as time.time.

    Every generation of a claim is an object of its own, written only if it is new, so one taker wins.
    """

    def __init__(self, store: Store, *, lease_s: float = 600.0, clock: Callable[[], float] = time.time) -> None:
        self.owner = f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        self._store, self._lease_s, self._clock = store, lease_s, clock
        self._held: dict[str, tuple[str, float]] = {}  # graph key → object name, time of the last renewal

    def take(self, key: str) -> bool:
        """Claim a graph; False if somebody else holds it."""
        generation, held_until = self._latest(key)
        if held_until is not None and held_until > self._clock():
            return False
        name = f"claims/{key}.{generation + 1}.json"
        if not self._store.put_new(name, self._content()):
            return False
        self._held[key] = (name, self._clock())
        return True

    def renew(self) -> None:
        """Extend what is held, once a third of the lease has passed. Cheap to call often."""
        for key, (name, renewed) in list(self._held.items()):
            if self._clock() - renewed > self._lease_s / 3:
                self._store.replace(name, self._content())
                self._held[key] = (name, self._clock())

    def release(self, key: str) -> None:
        """Give a claim up, with its earlier generations."""
        if self._held.pop(key, None) is not None:
            for name in self._names(key):
                self._store.delete(name)

    def release_all(self) -> None:
        """Give everything up; a store that can't be reached any more lets the leases run out."""
        for key in list(self._held):
            with contextlib.suppress(StoreError):
                self.release(key)

    def _content(self) -> bytes:
        return canonical_json({"owner": self.owner, "expires": self._clock() + self._lease_s})

    def _names(self, key: str) -> list[str]:
        return [name for name in self._store.names("claims") if name.startswith(f"claims/{key}.")]

    def _latest(self, key: str) -> tuple[int, float | None]:
        """(generation, when it runs out); (-1, None) if there is no claim, None if it can't be read."""
        generations = {int(PurePosixPath(name).name.split(".")[1]): name for name in self._names(key)}
        if not generations:
            return -1, None
        latest = max(generations)
        try:
            return latest, float(json.loads(self._store.read(generations[latest]))["expires"])
        except (StoreError, ValueError, KeyError, TypeError):
            return latest, None  # released meanwhile, or foreign
