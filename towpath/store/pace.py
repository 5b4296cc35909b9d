"""How fast a writer may write: a token bucket, and what waits for a token coalesces. No clock, no waiting of its own.

An engine tells every write to every watcher, so a node that writes in bursts costs all the others. The first writes go
at once; what comes faster than the bucket fills is merged by key, and goes as one transaction per token.
"""

from __future__ import annotations

from towpath.store.contract import Change

BURST = 20  # transactions at once
RATE = 10.0  # transactions a second after that
LARGEST = 100  # changes in one transaction


class Bucket:
    """`burst` tokens at first, `rate` more each second, never more than `burst`. Times are seconds of any one clock."""

    def __init__(self, now: float, *, burst: int = BURST, rate: float = RATE) -> None:
        if burst < 1 or not rate > 0:
            raise ValueError(f"a bucket of {burst} tokens and {rate} a second lets nothing through")
        self._burst = burst
        self._rate = rate
        self._tokens = float(burst)
        self._at = now

    def wait(self, now: float) -> float:
        """Seconds until there is a token; 0 = now."""
        self._fill(now)
        # What is short of a token by rounding alone is one: else a caller that waited as told would have to wait again.
        short = 1 - self._tokens
        return short / self._rate if short > 1e-9 else 0.0

    def take(self, now: float) -> bool:
        """Take a token; False = there is none."""
        if self.wait(now) > 0:
            return False
        self._tokens = max(0.0, self._tokens - 1)
        return True

    def _fill(self, now: float) -> None:
        passed = max(0.0, now - self._at)
        self._at = max(self._at, now)
        self._tokens = min(float(self._burst), self._tokens + passed * self._rate)


class Backlog:
    """Writes without compares that wait: of each key only the last change, in the order in which keys came to wait."""

    def __init__(self) -> None:
        self._waiting: dict[str, Change] = {}

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, *changes: Change) -> None:
        """Let `changes` wait. Raises ValueError for a deleted prefix: which keys it names is only known later."""
        for change in changes:
            if getattr(change, "prefix", False):
                raise ValueError(f"a deletion of everything under {change.key!r} cannot wait")
        self._waiting |= {change.key: change for change in changes}

    def next(self, largest: int = LARGEST) -> tuple[Change, ...]:
        """What one transaction takes now; it goes on waiting until it is `done`."""
        return tuple(self._waiting.values())[:largest]

    def done(self, changes: tuple[Change, ...]) -> None:
        """These are written; what was changed again meanwhile goes on waiting."""
        for change in changes:
            if self._waiting.get(change.key) is change:
                del self._waiting[change.key]

    def get(self, key: str) -> Change | None:
        return self._waiting.get(key)

    def under(self, prefix: str) -> list[Change]:
        return [change for key, change in self._waiting.items() if key.startswith(prefix)]
