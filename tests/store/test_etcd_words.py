"""etcd's words read without etcd: failures, versions, the watch stream, marks."""

from __future__ import annotations

import json
from base64 import b64encode
from typing import Any

import pytest

from towpath.store.contract import Event, Item
from towpath.store.etcd.marks import Marks
from towpath.store.etcd.stream import Compacted, Ended, Happened, Nothing, WatchReader, watch_request
from towpath.store.etcd.verdict import Fate, fault_of, judge_answer
from towpath.store.etcd.wire import Scope

SCOPE = Scope("/t/")


def said(code: int, words: str) -> bytes:
    return json.dumps({"error": words, "message": words, "code": code}).encode()


@pytest.mark.parametrize(
    ("status", "body", "fate"),
    [
        pytest.param(503, said(14, "etcdserver: no leader"), Fate.NOT_APPLIED, id="no leader is said before"),
        pytest.param(429, said(8, "etcdserver: too many requests"), Fate.NOT_APPLIED, id="too busy"),
        pytest.param(503, said(14, "etcdserver: rpc not supported for learner"), Fate.NOT_APPLIED, id="a learner"),
        pytest.param(503, said(14, "etcdserver: request timed out"), Fate.UNKNOWN, id="timed out"),
        pytest.param(
            503,
            said(14, "etcdserver: request timed out, possibly due to previous leader failure"),
            Fate.UNKNOWN,
            id="the leader is gone",
        ),
        pytest.param(503, said(14, "etcdserver: leader changed"), Fate.UNKNOWN, id="another leader"),
        pytest.param(504, said(4, "context deadline exceeded"), Fate.UNKNOWN, id="deadline"),
        pytest.param(502, b"<html>Bad Gateway</html>", Fate.UNKNOWN, id="something in between broke"),
        pytest.param(404, said(5, "etcdserver: requested lease not found"), Fate.REFUSED, id="no such lease"),
        pytest.param(429, said(8, "etcdserver: mvcc: database space exceeded"), Fate.REFUSED, id="full"),
        pytest.param(400, b'{"error":"json: bad","grpc_code":3}', Fate.REFUSED, id="a code by its other name"),
        pytest.param(400, b"[]", Fate.REFUSED, id="no object"),
    ],
)
def test_a_failure_tells_whether_it_was_applied(status: int, body: bytes, fate: Fate) -> None:
    assert judge_answer(status, body).fate is fate


@pytest.mark.parametrize(
    ("version", "faulty", "forbidden"),
    [
        ("3.3.27", True, True),
        ("3.4.20", True, False),
        ("3.4.21", True, False),
        ("3.4.22", False, False),
        ("3.4.23", False, False),
        ("3.5.0", True, True),
        ("3.5.2", True, True),
        ("3.5.3", True, False),
        ("3.5.5", True, False),
        ("3.5.6", False, False),
        ("3.6.0-rc.1", False, False),
        ("unknown", True, False),
    ],
)
def test_versions_with_known_faults_are_named(version: str, faulty: bool, forbidden: bool) -> None:
    words, forbids = fault_of(version)
    assert (bool(words), forbids) == (faulty, forbidden)


def line(**result: Any) -> bytes:
    return json.dumps({"result": {"header": {"revision": "99"}, **result}}).encode() + b"\n"


def put(key: str, revision: int) -> dict[str, Any]:
    number = str(revision)
    coded = b64encode(f"/t/{key}".encode()).decode()
    return {"kv": {"key": coded, "create_revision": number, "mod_revision": number}}


def happened(revision: int, *keys: str) -> Happened:
    return Happened(revision - 1, tuple(Event(Item(key, b"", revision - 1, revision - 1)) for key in keys))


def test_a_stream_is_read_however_it_is_cut() -> None:
    whole = line(created=True) + line(events=[put("b", 5), put("a", 5), put("a", 6)]) + line(events=[put("c", 7)])
    want = [happened(5, "a", "b"), happened(6, "a"), happened(7, "c")]
    for size in (1, 7, 100, len(whole)):
        reader = WatchReader(SCOPE)
        pieces = [whole[i : i + size] for i in range(0, len(whole), size)]
        assert [s for piece in pieces for s in reader.feed(piece)] == want


def test_fragments_are_one_message() -> None:
    reader = WatchReader(SCOPE)
    assert reader.feed(line(events=[put("a", 5), put("b", 6)], fragment=True)) == []
    assert reader.feed(line(events=[put("c", 6)])) == [happened(5, "a"), happened(6, "b", "c")]


@pytest.mark.parametrize(
    ("message", "want"),
    [
        pytest.param(line(), [Nothing(98)], id="progress"),
        pytest.param(line(created=True), [], id="the head of a new watch promises nothing"),
        pytest.param(line(canceled=True, compact_revision="8"), [Compacted(7)], id="compacted"),
        pytest.param(line(canceled=True, cancel_reason="why"), [Ended("why")], id="cancelled"),
        pytest.param(
            b'{"error":{"grpc_code":14,"http_code":503,"message":"etcdserver: no leader"}}\n',
            [Ended("etcdserver: no leader")],
            id="no leader",
        ),
        pytest.param(b'{"error":"gone"}\n', [Ended("gone")], id="an error in another form"),
        pytest.param(b"\n", [], id="an empty line"),
    ],
)
def test_a_stream_says_more_than_events(message: bytes, want: list[object]) -> None:
    assert WatchReader(SCOPE).feed(message) == want


def test_a_deletion_whose_past_is_compacted_away_is_told_all_the_same() -> None:
    deleted = {"type": "DELETE", "kv": {"key": put("a", 5)["kv"]["key"], "mod_revision": "5"}}
    said = WatchReader(SCOPE).feed(line(events=[deleted]))
    assert said == [Happened(4, (Event(Item("a", b"", 4, 4), deleted=True),))]


def test_a_watch_asks_for_its_prefix_alone() -> None:
    create = watch_request(SCOPE, 7)["create_request"]
    assert (create["key"], create["range_end"]) == (b64encode(b"/t/").decode(), b64encode(b"/t0").decode())
    assert create["start_revision"] == "8"


@pytest.mark.parametrize("prefix", ["", "towpath", "/towpath"])
def test_a_prefix_ends_with_a_slash(prefix: str) -> None:
    with pytest.raises(ValueError, match="slash"):
        Scope(prefix)


# --- marks -----------------------------------------------------------------------------------------------------------


def test_transactions_at_once_have_marks_of_their_own_which_are_used_again() -> None:
    marks = Marks("/m/", "w")
    first, second = marks.take(), marks.take()
    assert (first.key, second.key, first.seen) == ("/m/w/0", "/m/w/1", 0)
    marks.give_back(first, 7)
    again = marks.take()
    assert (again.key, again.seen, again.fenced) == (first.key, 7, ())
    assert len({first.name, second.name, again.name}) == 3


def test_doubtful_marks_are_fenced_by_the_next_transaction_that_is_applied() -> None:
    marks = Marks("/m/", "w")
    lost = [marks.take() for _ in range(3)]
    for mark in lost:
        marks.doubt(mark)
    refused = marks.take()
    assert {refused.key, *refused.fenced} == {mark.key for mark in lost}
    assert marks.take().fenced == (), "what one transaction fences is not fenced by a second at once"
    marks.give_back(refused)
    applied = marks.take()
    assert {applied.key, *applied.fenced} == {mark.key for mark in lost}, "refused: nothing was fenced"
    marks.give_back(applied, 9)
    assert marks.take().fenced == ()


def test_two_runs_of_one_writer_have_different_names() -> None:
    assert Marks("/m/", "w").take().name != Marks("/m/", "w").take().name


def test_a_mark_that_was_seen_to_move_is_in_doubt_no_more() -> None:
    marks = Marks("/m/", "w")
    marks.doubt(marks.take())
    marks.give_back(marks.again(marks.take(), 5))
    assert marks.take().seen == 5
    assert marks.take().fenced == ()
