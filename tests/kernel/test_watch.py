"""What of the kernel's talk counts as a change."""

from __future__ import annotations

import socket
import struct

import pytest

from towpath.kernel.watch import tells

NEWLINK, DELLINK, NEWADDR = 16, 17, 20


def message(kind: int, family: int) -> bytes:
    body = struct.pack("=BxHiII", family, 1, 7, 0, 0)  # struct ifinfomsg
    return struct.pack("=IHHII", 16 + len(body), kind, 0, 0, 0) + body


@pytest.mark.parametrize(
    ("packet", "want"),
    [
        pytest.param(message(NEWLINK, socket.AF_UNSPEC), True, id="a link that is new or changed"),
        pytest.param(message(DELLINK, socket.AF_UNSPEC), True, id="a link that went"),
        pytest.param(message(NEWLINK, socket.AF_BRIDGE), False, id="a bridge about one of its ports"),
        pytest.param(message(DELLINK, socket.AF_BRIDGE), True, id="a port that left its bridge"),
        pytest.param(message(NEWLINK, socket.AF_BRIDGE) + message(NEWADDR, socket.AF_INET), True, id="one of several"),
        pytest.param(b"", False, id="nothing"),
    ],
)
def test_what_counts(packet: bytes, want: bool) -> None:
    assert tells(packet) is want
