"""Bandwidth on a wire: what was asked is read back, traffic obeys it in both directions, and it can be taken away."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator
from ipaddress import ip_interface

import pytest

from tests.kernel.box import Box, box
from towpath.errors import PhaseFailed
from towpath.kernel.contract import ShapeSeen
from towpath.kernel.netns import inside, open_netns
from towpath.model import Bandwidth
from towpath.plan import AddAddress, AddVeth, DropLink, EnsureBridge, SetLink, Shape, Unshape

pytestmark = [pytest.mark.netns, pytest.mark.skipif(os.geteuid() != 0, reason="needs root")]

RATE, BURST = 16_000_000, 400_000
BOTH = Bandwidth(RATE, BURST, 2 * RATE, 2 * BURST)


@pytest.fixture
def host() -> Iterator[Box]:
    with box(1) as made:
        made.do(
            EnsureBridge("br-t", "02:00:00:00:00:01"),
            AddAddress("br-t", ip_interface("10.9.0.1/24")),
            AddVeth("tp0", "eth0", made.paths[0], "02:00:00:00:00:02", master="br-t"),
        )
        made.do(AddAddress("eth0", ip_interface("10.9.0.2/24")), SetLink("eth0", up=True), container=0)
        yield made


def shapes(host: Box, link: str) -> list[ShapeSeen]:
    return [seen for seen in host.wait(lambda: host.kernel.shapes(link)) if seen.kind != "noqueue"]


@pytest.mark.parametrize(
    ("bandwidth", "port", "ifb"),
    [
        pytest.param(BOTH, (RATE, BURST), (2 * RATE, 2 * BURST), id="both directions"),
        pytest.param(Bandwidth(ingress_rate=RATE, ingress_burst=BURST), (RATE, BURST), None, id="ingress only (BW2)"),
        pytest.param(Bandwidth(egress_rate=RATE, egress_burst=BURST), None, (RATE, BURST), id="egress only (BW2)"),
        pytest.param(Bandwidth(80_000_000_000, 8_000_000), (80_000_000_000, 8_000_000), None, id="beyond 32 bits"),
    ],
)
def test_a_shape_reads_back(
    host: Box, bandwidth: Bandwidth, port: tuple[int, int] | None, ifb: tuple[int, int] | None
) -> None:
    for _ in range(2):  # doing it again changes nothing
        host.do(Shape("tp0", "tq0", bandwidth))
    for link, want in (("tp0", port), ("tq0", ifb)):
        seen = [(s.rate, s.burst) for s in shapes(host, link) if s.kind == "tbf"]
        assert [rate for rate, _ in seen] == ([want[0]] if want else [])
        if want:
            assert seen[0][1] == pytest.approx(want[1], rel=0.02)


def test_what_was_shaped_can_be_freed_twice(host: Box) -> None:
    host.do(Shape("tp0", "tq0", BOTH))
    host.do(Unshape("tp0"), DropLink("tq0"))
    host.do(Unshape("tp0"), DropLink("tq0"), Unshape("nope"))
    assert shapes(host, "tp0") == []
    assert shapes(host, "tq0") == []


def test_a_name_that_is_taken_is_refused(host: Box) -> None:
    with pytest.raises(PhaseFailed, match="not an ifb"):
        host.do(Shape("tp0", "br-t", BOTH))
    with pytest.raises(PhaseFailed, match="nope"):
        host.do(Shape("nope", "tq0", BOTH))


def seconds_for(host: Box, amount: int, to_container: bool) -> float:
    """How long `amount` bytes take over TCP between the host and the container."""
    here = host.inside(lambda: socket.create_server(("10.9.0.1", 0)))

    def dial() -> socket.socket:
        home, fd = open_netns("/proc/thread-self/ns/net"), open_netns(host.paths[0])
        with inside(fd, home):
            far = socket.socket()
        os.close(fd)
        os.close(home)
        far.connect(here.getsockname())
        return far

    far = host.inside(dial)
    near, _ = here.accept()
    source, sink = (near, far) if to_container else (far, near)
    begin = time.monotonic()

    def send() -> None:
        with source:
            source.sendall(bytes(amount))

    sender = threading.Thread(target=send)
    sender.start()
    while sink.recv(65536):
        pass
    taken = time.monotonic() - begin
    sender.join()
    for end in (near, far, here):
        end.close()
    return taken


@pytest.mark.parametrize("to_container", [pytest.param(True, id="received"), pytest.param(False, id="sent")])
def test_traffic_obeys(host: Box, to_container: bool) -> None:
    free = seconds_for(host, 550_000, to_container)
    rates = (RATE, BURST, 0, 0) if to_container else (0, 0, RATE, BURST)
    host.do(Shape("tp0", "tq0", Bandwidth(*rates)))
    shaped = seconds_for(host, 550_000, to_container)
    assert free < 0.15 < shaped < 1.0  # (550,000 B - 50,000 B burst) at 2,000,000 B/s = 0.25 s
