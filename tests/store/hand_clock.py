"""A clock that tests turn by hand: timers ring inside `turn`, in the order of their times."""

from __future__ import annotations

from collections.abc import Callable

import pytest


class HandTimer:
    def __init__(self, when: float, callback: Callable[[], None]) -> None:
        self.when = when
        self.callback = callback
        self.cancelled = False

    def cancel(self) -> None:
        self.cancelled = True


class HandClock:
    def __init__(self) -> None:
        self._now = 1000.0
        self._timers: list[HandTimer] = []
        self.stuck = ""  # why it cannot be turned: the test is skipped

    def now(self) -> float:
        return self._now

    def call_at(self, when: float, callback: Callable[[], None]) -> HandTimer:
        timer = HandTimer(when, callback)
        self._timers.append(timer)
        return timer

    def turn(self, seconds: float) -> None:
        if self.stuck:
            pytest.skip(self.stuck)
        end = self._now + seconds
        while due := self._due(end):
            self._timers.remove(due)
            self._now = max(self._now, due.when)
            due.callback()
        self._now = end

    def _due(self, end: float) -> HandTimer | None:
        self._timers = [timer for timer in self._timers if not timer.cancelled]
        return min((t for t in self._timers if t.when <= end), key=lambda t: t.when, default=None)
