# SPDX-License-Identifier: Apache-2.0
"""Claims: machines that share a store divide the work. A claim is a lease; one that ran out may be taken over, and one
of a process of this host that has ended, be it by a reboot, at once.

Only speed depends on claims: a graph compiled twice is published once. So clocks may differ by much less than a lease.
Of a clock further ahead a claim counts for a lease after it was first seen; one further behind claims nothing for long.
"""

import contextlib
import json
import math
import os
import socket
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from compile.bundle import canonical_json
from compile.errors import StoreError
from compile.process_identity import is_known_dead, own_identity
from compile.store import ObjectMissingError, Store


@dataclass(frozen=True)
class Holder:
    """Who holds a claim, and for how many seconds more unless it is renewed."""

    owner: str
    seconds_left: float


class Claims:
    """Claims of one process. lease_s: how long a claim lasts without renewal. clock: seconds, as time.time.

    Every generation of a claim is an object of its own, written only if it is new, so one taker wins.
    """

    def __init__(self, store: Store, *, lease_s: float = 600.0, clock: Callable[[], float] = time.time) -> None:
        self.owner = f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        self._store, self._lease_s, self._clock = store, lease_s, clock
        self._held: dict[str, tuple[str, float]] = {}  # graph key → object name, time of the last renewal
        self._seen: dict[str, tuple[bytes, float]] = {}  # graph key → somebody's claim, when it was first seen so
        self._holders: dict[str, Holder] = {}

    def take(self, key: str) -> bool:
        """Claim a graph; False if somebody else holds it, see holder()."""
        generation, holder = self._latest(key)
        if holder is not None:
            self._holders[key] = holder
            return False
        self._holders.pop(key, None)
        name, content = f"claims/{key}.{generation + 1}.json", self._content()
        # A put whose answer got lost is sent again, and finds what the first one wrote.
        if not self._store.put_new(name, content) and self._read(name) != content:
            return False
        self._held[key] = (name, self._clock())
        return True

    def _read(self, name: str) -> bytes | None:
        try:
            return self._store.read(name)
        except ObjectMissingError:
            return None

    def holder(self, key: str) -> Holder | None:
        """Who held the graph when take() last refused it."""
        return self._holders.get(key)

    def renew(self) -> None:
        """Extend what is held, once a third of the lease has passed. Cheap to call often.

        A store that can't be reached is tried again a third later: that is no reason to end what compiles.
        """
        for key, (name, renewed) in list(self._held.items()):
            if self._clock() - renewed > self._lease_s / 3:
                with contextlib.suppress(StoreError):
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
        return canonical_json(
            {"owner": self.owner, "expires": self._clock() + self._lease_s, "lease_s": self._lease_s,
             "process": own_identity()}
        )  # fmt: skip

    def _names(self, key: str) -> list[str]:
        return [name for name in self._store.names("claims") if name.startswith(f"claims/{key}.")]

    def _latest(self, key: str) -> tuple[int, Holder | None]:
        """(generation, who holds it); (-1, None) if there is no claim, None if it is void or can't be read."""
        generations = {int(PurePosixPath(name).name.split(".")[1]): name for name in self._names(key)}
        if not generations:
            return -1, None
        latest = max(generations)
        try:
            content = self._store.read(generations[latest])
            return latest, self._holder(key, content, json.loads(content))
        except (StoreError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return latest, None  # released meanwhile, or foreign

    def _holder(self, key: str, content: bytes, claim: dict[str, Any]) -> Holder | None:
        now = self._clock()
        if self._seen.get(key, (b"",))[0] != content:
            self._seen[key] = (content, now)
        lease_s = float(claim.get("lease_s", self._lease_s))
        if not math.isfinite(lease_s):
            raise ValueError
        left = min(float(claim["expires"]), self._seen[key][1] + lease_s) - now
        if not left > 0 or is_known_dead(claim.get("process")):
            return None
        return Holder(str(claim["owner"]), left)
