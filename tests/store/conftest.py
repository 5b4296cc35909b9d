"""One store of each backend, on a clock that the test turns."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.store import backends
from tests.store.backends import BACKENDS, AnyStore
from tests.store.hand_clock import HandClock


@pytest.fixture
def clock() -> HandClock:
    return HandClock()


@pytest.fixture(params=sorted(BACKENDS))
async def store(request: pytest.FixtureRequest, tmp_path: Path, clock: HandClock) -> AsyncIterator[AnyStore]:
    backends.on_the_way = 0.03 if request.param == "etcd" else 0.0
    store = BACKENDS[request.param](tmp_path / "state", clock, 10_000)
    await store.open()
    yield store
    await store.close()
