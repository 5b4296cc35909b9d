"""Tells systemd how the agent is doing: one datagram to $NOTIFY_SOCKET (sd_notify(3)), nothing where there is none."""

from __future__ import annotations

import os
import socket


def notify(state: str) -> bool:
    """Send `state`, for example "READY=1"; returns whether somebody listens.

    Raises OSError where $NOTIFY_SOCKET is set but cannot be reached: then systemd would wait in vain.
    """
    path = os.environ.get("NOTIFY_SOCKET", "")
    if not path:
        return False
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as out:
        out.connect("\0" + path[1:] if path.startswith("@") else path)  # '@' stands for the abstract namespace
        out.sendall(state.encode())
    return True
