"""How fast a writer may write, and what becomes of that which waits."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from towpath.store.contract import Delete, Put
from towpath.store.pace import Backlog, Bucket


def test_a_burst_goes_at_once_and_then_the_rate_holds() -> None:
    bucket = Bucket(100.0, burst=20, rate=10)
    assert all(bucket.take(100.0) for _ in range(20))
    assert not bucket.take(100.0)
    assert bucket.wait(100.0) == pytest.approx(0.1)
    assert bucket.take(100.1)
    assert not bucket.take(100.15)


def test_a_bucket_is_never_fuller_than_its_burst() -> None:
    bucket = Bucket(0.0, burst=2, rate=10)
    assert [bucket.take(1000.0) for _ in range(3)] == [True, True, False]


def test_a_clock_that_goes_back_gives_nothing_and_takes_nothing() -> None:
    bucket = Bucket(10.0, burst=1, rate=1)
    assert bucket.take(5.0)
    assert not bucket.take(10.5)
    assert bucket.take(11.0)


@pytest.mark.parametrize(("burst", "rate"), [(0, 1.0), (1, 0.0), (1, -1.0), (1, float("nan"))])
def test_a_bucket_that_lets_nothing_through_is_refused(burst: int, rate: float) -> None:
    with pytest.raises(ValueError, match="lets nothing through"):
        Bucket(0.0, burst=burst, rate=rate)


@given(st.lists(st.floats(0, 2), max_size=200), st.integers(1, 30), st.floats(0.1, 100))
def test_no_more_goes_than_burst_and_rate_allow(gaps: list[float], burst: int, rate: float) -> None:
    now, went = 0.0, 0
    bucket = Bucket(now, burst=burst, rate=rate)
    for gap in gaps:
        now += gap
        went += bucket.take(now)
    assert went <= burst + rate * now + 1e-6


@given(st.lists(st.floats(0, 2), max_size=50), st.floats(0.1, 100))
def test_who_waits_as_long_as_told_gets_a_token(gaps: list[float], rate: float) -> None:
    now = 0.0
    bucket = Bucket(now, burst=2, rate=rate)
    for gap in gaps:
        now += gap
        now += bucket.wait(now)
        assert bucket.take(now)


def test_of_each_key_the_last_change_waits() -> None:
    backlog = Backlog()
    backlog.add(Put("a", b"1"), Put("b", b"1"))
    backlog.add(Put("a", b"2"), Delete("b"), Put("c", b"1"))
    assert backlog.next() == (Put("a", b"2"), Delete("b"), Put("c", b"1"))
    assert backlog.next(largest=2) == (Put("a", b"2"), Delete("b"))


def test_what_changes_while_it_is_written_goes_on_waiting() -> None:
    backlog = Backlog()
    backlog.add(Put("a", b"1"), Put("b", b"1"))
    written = backlog.next()
    backlog.add(Put("a", b"2"))
    backlog.done(written)
    assert backlog.next() == (Put("a", b"2"),)
    backlog.done(backlog.next())
    assert len(backlog) == 0


def test_a_deleted_prefix_cannot_wait() -> None:
    with pytest.raises(ValueError, match="cannot wait"):
        Backlog().add(Delete("a/", prefix=True))
