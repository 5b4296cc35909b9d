"""The lines of etcd's watch stream, read: bytes in, what happened out. No sockets."""

from __future__ import annotations

import json
from dataclasses import dataclass

from towpath.store.contract import Event
from towpath.store.etcd.wire import Json, Scope, header_revision, number


@dataclass(frozen=True, slots=True)
class Happened:
    """All events of one transaction."""

    revision: int
    events: tuple[Event, ...]


@dataclass(frozen=True, slots=True)
class Nothing:
    """No event up to `revision` that was not told."""

    revision: int


@dataclass(frozen=True, slots=True)
class Compacted:
    """Events up to `revision` are gone."""

    revision: int


@dataclass(frozen=True, slots=True)
class Ended:
    """The engine ends the stream."""

    why: str


Said = Happened | Nothing | Compacted | Ended


def watch_request(scope: Scope, revision: int) -> Json:
    """The body for /v3/watch that tells everything from `revision` on.

    The caller asks for one revision less than it needs: only of an event before the compacted revision the engine says
    that it is gone, and a deletion at it is gone in silence (etcd issue 19179).
    """
    create: Json = {
        **scope.span(),
        "start_revision": str(scope.to_engine(revision)),
        "progress_notify": True,
        "fragment": True,
        "prev_kv": True,
    }
    return {"create_request": create}


class WatchReader:
    """Reads one stream. Pieces need not end with lines, nor messages with lines: large ones come in fragments."""

    def __init__(self, scope: Scope) -> None:
        self._scope = scope
        self._rest: list[bytes] = []
        self._fragments: list[Json] = []

    def feed(self, piece: bytes) -> list[Said]:
        *lines, rest = piece.split(b"\n")
        said: list[Said] = []
        for line in lines:
            whole = b"".join((*self._rest, line))
            self._rest.clear()
            if whole.strip():
                said += self._message(json.loads(whole))
        self._rest.append(rest)
        return said

    def _message(self, message: Json) -> list[Said]:
        if error := message.get("error"):
            return [Ended(str(error.get("message", error)) if isinstance(error, dict) else str(error))]
        told: Json = message.get("result", {})
        if told.get("canceled"):
            if compacted := number(told, "compact_revision"):
                return [Compacted(self._scope.from_engine(compacted))]
            return [Ended(str(told.get("cancel_reason", "the watch was cancelled")))]
        self._fragments += told.get("events", ())
        if told.get("fragment"):
            return []
        events, self._fragments = self._fragments, []
        if events:
            return [Happened(revision, of_one) for revision, of_one in self._scope.batches(events)]
        # The revision in the head counts only here: in answers with events it may be ahead of what was told.
        return [] if told.get("created") else [Nothing(self._scope.from_engine(header_revision(told)))]
