"""Which leases live and until when: one timer, set to the first that ends."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping

from towpath.store.clock import Clock, Timer
from towpath.store.contract import LeaseGone, StoreError

RETRY = 1.0  # seconds until an end that the disk refused is tried again

log = logging.getLogger(__name__)


class Leases:
    """Deadlines of all leases; `end(lease)` is called once when a lease's time is over."""

    def __init__(self, clock: Clock, end: Callable[[int], None]) -> None:
        self._clock = clock
        self._end = end
        self._ttl: dict[int, float] = {}
        self._deadline: dict[int, float] = {}
        self._timer: Timer | None = None
        self._rings_at = 0.0

    def __contains__(self, lease: int) -> bool:
        return lease in self._ttl

    def __len__(self) -> int:
        return len(self._ttl)

    def start(self, leases: Mapping[int, float]) -> None:
        """Begin with the leases that outlived a restart; their time counts from now."""
        for lease, ttl in leases.items():
            self.add(lease, ttl)

    def stop(self) -> None:
        """Forget all without ending any."""
        if self._timer:
            self._timer.cancel()
        self._timer = None
        self._ttl.clear()
        self._deadline.clear()

    def add(self, lease: int, ttl: float) -> None:
        self._ttl[lease] = ttl
        self._deadline[lease] = self._clock.now() + ttl
        self._ring_by(self._deadline[lease])

    def renew(self, lease: int) -> float:
        """Start the lease's time again; returns its TTL. Raises LeaseGone."""
        if lease not in self._ttl:
            raise LeaseGone(f"lease {lease} does not exist", hint="it ended, or was revoked: ask for a new one")
        # The timer stays where it is: it rings early, finds nothing due and is set anew.
        self._deadline[lease] = self._clock.now() + self._ttl[lease]
        return self._ttl[lease]

    def drop(self, lease: int) -> None:
        self._ttl.pop(lease, None)
        self._deadline.pop(lease, None)

    def _ring_by(self, when: float) -> None:
        if self._timer:
            if self._rings_at <= when:
                return
            self._timer.cancel()
        self._rings_at = when
        self._timer = self._clock.call_at(when, self._ring)

    def _ring(self) -> None:
        self._timer = None
        now = self._clock.now()
        for lease in sorted(lease for lease, when in self._deadline.items() if when <= now):
            try:
                self._end(lease)
            except StoreError as exc:
                log.warning("lease not ended, trying again", extra={"lease": lease, "reason": str(exc)})
                self._deadline[lease] = now + RETRY
        if self._deadline:
            self._ring_by(min(self._deadline.values()))
