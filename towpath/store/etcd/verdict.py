"""What a failed request means: was it applied? And which servers are not to be trusted. No sockets."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from enum import Enum

from towpath.store.contract import StoreError


class Effect(Enum):
    """What it would mean to send a request a second time."""

    LOCAL = "nothing is changed, and one member's own data is enough"
    READ = "nothing is changed"
    AGAIN = "twice is the same as once"
    ONCE = "only the caller can know"


class Fate(Enum):
    """Of a request that failed."""

    REFUSED = "the engine understood it and will not do it"
    NOT_APPLIED = "it was not looked at: another member, or the same one later, may do it"
    UNKNOWN = "it may or may not be applied, perhaps later"


# gRPC codes (google.rpc.Code) of answers after which the outcome is open: CANCELLED, UNKNOWN, DEADLINE_EXCEEDED,
# ABORTED, INTERNAL, UNAVAILABLE, DATA_LOSS.
OPEN_CODES = frozenset((1, 2, 4, 10, 13, 14, 15))
# Of these messages the server says them before it proposes anything (etcdserver/api/v3rpc/interceptor.go and
# v3_server.go processInternalRaftRequestOnce).
BEFORE = ("no leader", "too many requests", "not supported for learner", "not capable")

SPACE = "database space exceeded"
COMPACTED = "has been compacted"
NO_LEASE = "requested lease not found"
LEASE_THERE = "lease already exists"


class Refused(StoreError):
    """The engine's own refusal: its gRPC code and words."""

    def __init__(self, rpc: int, words: str) -> None:
        super().__init__(f"etcd refused: {words}")
        self.rpc = rpc
        self.words = words


@dataclass(frozen=True, slots=True)
class Failure:
    fate: Fate
    words: str
    rpc: int = 0


def judge_answer(status: int, body: bytes) -> Failure:
    """What an answer that is not HTTP 200 means.

    `code` or `grpc_code`, `message` or `error`: which of them are there differs between versions and methods.
    """
    try:
        said = json.loads(body)
        words, rpc = str(said.get("message") or said.get("error")), int(said.get("code") or said.get("grpc_code") or 0)
    except (ValueError, TypeError, AttributeError):
        words, rpc = f"HTTP {status} {body[:80].decode(errors='replace').strip()}", 0
    if any(hint in words for hint in BEFORE):
        return Failure(Fate.NOT_APPLIED, words, rpc)
    if rpc in OPEN_CODES or (not rpc and status >= 500):
        return Failure(Fate.UNKNOWN, words, rpc)
    return Failure(Fate.REFUSED, words, rpc)


def fault_of(version: str) -> tuple[str, bool]:
    """What is wrong with a server of this version, and whether that forbids its use. ("", False) = nothing known."""
    found = re.match(r"(\d+)\.(\d+)\.(\d+)", version)
    if not found:
        return "its version is not understood", False
    release = tuple(map(int, found.groups()))
    if release < (3, 4, 0):
        return "it is older than 3.4 and speaks another protocol", True
    if (3, 5, 0) <= release <= (3, 5, 2):
        return "members may come to differ after a kill (etcd issue 13766): use 3.5.6 or later", True
    if release < (3, 4, 22):
        return "members added while authentication is on may fail: use 3.4.22 or later", False
    if (3, 5, 3) <= release <= (3, 5, 5):
        return "a member may crash while it defragments: use 3.5.6 or later", False
    return "", False
