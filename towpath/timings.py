"""How long the steps of an ADD and a DEL took lately: kept in memory, shown by `towpath status` and the benchmarks."""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median


class Timings:
    """The last `keep` durations of each named step, in seconds."""

    def __init__(self, keep: int = 1000) -> None:
        self._spans: defaultdict[str, deque[float]] = defaultdict(lambda: deque(maxlen=keep))
        self.counts: defaultdict[str, int] = defaultdict(int)

    @contextmanager
    def measure(self, step: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self._spans[step].append(time.perf_counter() - start)
            self.counts[step] += 1

    def summary(self) -> dict[str, dict[str, float]]:
        """step → {count, median_ms, max_ms} over the spans that are kept."""
        return {
            step: {
                "count": self.counts[step],
                "median_ms": round(median(spans) * 1000, 4),
                "max_ms": round(max(spans) * 1000, 4),
            }
            for step, spans in self._spans.items()
        }
