"""The control API, over HTTP on a socket: what it answers, what it refuses and in which words."""

from __future__ import annotations

import http.client
import json
import socket
from collections.abc import Iterator
from ipaddress import ip_interface
from pathlib import Path
from typing import Any

import pytest

from tests.fakes import FakeKernel
from tests.serving import FakeAgent, served

NETNS = "/run/netns/a"
WEB = {"name": "web", "subnet": "10.1.0.0/24"}
RUN = {"network": "web", "container": "c1", "netns": NETNS}
ID = "/v1/attachments/run/web/c1/eth0"


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[FakeAgent]:
    with served(tmp_path / "agent.sock", FakeKernel(netns=(NETNS, "/run/netns/b"))) as agent:
        yield agent


def call(agent: FakeAgent, method: str, path: str, body: object = None) -> tuple[int, Any]:
    """(status, decoded body); a body of bytes is sent as it is."""
    connection = http.client.HTTPConnection("localhost")
    connection.sock = socket.socket(socket.AF_UNIX)
    connection.sock.connect(agent.config.socket)
    raw = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
    try:
        connection.request(method, path, raw)
        reply = connection.getresponse()
        text = reply.read().decode()
    finally:
        connection.close()
    is_json = reply.headers.get_content_type() == "application/json"
    return reply.status, json.loads(text) if text and is_json else text


def test_status_tells_who_serves_and_how_much(agent: FakeAgent) -> None:
    status, body = call(agent, "GET", "/v1/status")
    assert status == 200
    wanted = {"node": "n1", "state_dir": "/state", "networks": 0, "attachments": {}, "firewall": "nftables"}
    assert wanted.items() <= body.items()
    assert body["store"]["backend"] == "memory"


def test_a_network_is_made_listed_shown_and_removed(agent: FakeAgent) -> None:
    status, made = call(agent, "POST", "/v1/networks", WEB)
    assert (status, made["device"], made["subnets"], made["source"]) == (201, "br-web", ["10.1.0.0/24"], "cli")
    assert call(agent, "GET", "/v1/networks") == (200, [made])
    assert call(agent, "GET", "/v1/networks/web") == (200, made)
    assert call(agent, "DELETE", "/v1/networks/web") == (204, "")
    assert call(agent, "GET", "/v1/networks") == (200, [])


def test_a_run_is_attached_shown_checked_and_detached(agent: FakeAgent) -> None:
    call(agent, "POST", "/v1/networks", WEB)
    body = {**RUN, "ports": ["8080:80"], "labels": {"tier": "front"}, "aliases": ["www"], "name": "c1"}
    status, record = call(agent, "POST", "/v1/run", body)
    assert status == 201
    assert record["id"] == "run/web/c1/eth0"
    assert (record["phase"], record["netns"], record["addresses"]) == ("attached", NETNS, ["10.1.0.2/24"])
    assert (record["labels"], record["aliases"], record["name"]) == ({"tier": "front"}, ["www"], "c1")
    assert record["ports"] == [{"host_port": 8080, "container_port": 80, "proto": "tcp", "host_ip": None}]
    assert call(agent, "GET", ID) == (200, record)
    assert call(agent, "GET", "/v1/attachments") == (200, [record])
    assert call(agent, "GET", "/v1/attachments?prefix=cni/") == (200, [])
    assert call(agent, "GET", ID + "/check") == (200, {"id": record["id"], "problems": []})
    assert call(agent, "DELETE", ID) == (204, "")
    assert call(agent, "GET", "/v1/attachments") == (200, [])


def test_pools_show_what_is_taken(agent: FakeAgent) -> None:
    call(agent, "POST", "/v1/networks", {"name": "web", "subnet": "10.1.0.0/29"})
    call(agent, "POST", "/v1/run", RUN)
    assert call(agent, "GET", "/v1/ipam") == (
        200,
        [{"network": "web", "pool": "10.1.0.1-10.1.0.6", "size": 5, "used": 1, "free": 4}],
    )


def test_static_addresses_of_both_families_are_given(agent: FakeAgent) -> None:
    call(agent, "POST", "/v1/networks", {"name": "web", "subnets": ["10.1.0.0/24", "fd00::/64"]})
    _, record = call(agent, "POST", "/v1/run", {**RUN, "ip": ["10.1.0.9", "fd00::9"]})
    assert record["addresses"] == ["10.1.0.9/24", "fd00::9/64"]


def test_the_host_network_needs_neither_row_nor_namespace(agent: FakeAgent) -> None:
    status, record = call(agent, "POST", "/v1/run", {"network": "host", "container": "c1"})
    assert (status, record["mode"], record["addresses"]) == (201, "host", [])
    assert call(agent, "DELETE", "/v1/attachments/run/host/c1/eth0") == (204, "")


def test_metrics_are_prometheus_text(agent: FakeAgent) -> None:
    call(agent, "POST", "/v1/networks", WEB)
    call(agent, "POST", "/v1/run", RUN)
    _, text = call(agent, "GET", "/metrics")
    lines = text.splitlines()
    assert 'towpath_attachments{origin="run",network="web",phase="attached"} 1' in lines
    assert 'towpath_pool_leases{network="web",pool="10.1.0.1-10.1.0.254"} 1' in lines
    assert "towpath_networks 1" in lines
    assert "towpath_adds_begun_total 1" in lines
    assert "towpath_adds_total 1" in lines
    assert "# TYPE towpath_adds_total counter" in lines


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "error"),
    [
        pytest.param("GET", "/v1/nonsense", None, 404, "GET /v1/nonsense is not served", id="unknown path"),
        pytest.param("PUT", "/v1/networks", None, 404, "PUT /v1/networks is not served", id="unknown method"),
        pytest.param("GET", "/v1/networks/none", None, 404, "network 'none' does not exist", id="unknown network"),
        pytest.param("DELETE", "/v1/networks/none", None, 404, "network 'none' does not exist", id="drop unknown"),
        pytest.param("GET", ID, None, 404, "attachment 'run/web/c1/eth0' does not exist", id="unknown attachment"),
        pytest.param("DELETE", ID, None, 404, "attachment 'run/web/c1/eth0' does not exist", id="detach unknown"),
        pytest.param(
            "POST",
            "/v1/run",
            b'{"a": 1,\n "b" 2}',
            400,
            "the body is no JSON: Expecting ':' delimiter at line 2 column 6",
            id="broken JSON names line and column",
        ),
        pytest.param("POST", "/v1/run", b"\xff", 400, "the body is no JSON: byte 0 is not UTF-8", id="not UTF-8"),
        pytest.param(
            "POST", "/v1/run", b"", 400, "the body is no JSON: Expecting value at line 1 column 1", id="empty"
        ),
        pytest.param(
            "POST",
            "/v1/run",
            b"[" * 100_000,
            400,
            "the body is no JSON that can be read: it is nested too deeply",
            id="nested too deeply",
        ),
        pytest.param("POST", "/v1/run", [], 400, "the body is not a JSON object but list", id="a list"),
        pytest.param(
            "POST",
            "/v1/run",
            b" " * (2**20 + 1),
            413,
            "the body is larger than 1048576 bytes",
            id="more than 1 MB",
        ),
        pytest.param("POST", "/v1/run", {"network": "web"}, 400, "body: key 'container' is missing", id="missing key"),
        pytest.param("POST", "/v1/run", {**RUN, "port": 1}, 400, "body: unknown key 'port'", id="unknown key"),
        pytest.param(
            "POST",
            "/v1/run",
            {**RUN, "ports": [80]},
            400,
            "body: ports[0]: 80 is not text",
            id="wrong type names the place",
        ),
        pytest.param(
            "POST",
            "/v1/run",
            {**RUN, "ports": ["80"]},
            400,
            "port '80' is not [ADDRESS:]HOST:CONTAINER[/PROTOCOL]",
            id="malformed port",
        ),
        pytest.param(
            "POST", "/v1/run", {**RUN, "ip": "10.1"}, 400, "'10.1' is not an IP address", id="malformed address"
        ),
        pytest.param(
            "POST", "/v1/run", {**RUN, "ifname": "a/b"}, 400, "body: ifname 'a/b' may not be", id="bad ifname"
        ),
        pytest.param(
            "POST", "/v1/run", {**RUN, "network": "x"}, 404, "network 'x' does not exist", id="run on unknown"
        ),
        pytest.param(
            "POST",
            "/v1/run",
            {**RUN, "netns": ""},
            400,
            "netns is missing: network 'web' needs",
            id="bridge without netns",
        ),
        pytest.param(
            "POST",
            "/v1/run",
            {**RUN, "netns": "/none"},
            400,
            "netns '/none' is no network namespace that the agent can see",
            id="netns not there",
        ),
        pytest.param(
            "POST",
            "/v1/run",
            {"network": "host", "container": "c1", "ports": ["1:1"]},
            400,
            "network 'host' publishes no ports: it is the host's own",
            id="ports on the host network",
        ),
        pytest.param(
            "POST",
            "/v1/run",
            {**RUN, "network": "host"},
            400,
            "network 'host' is the host's own: netns",
            id="netns on host",
        ),
        pytest.param("POST", "/v1/networks", WEB, 409, "network 'web' exists already", id="network exists"),
        pytest.param(
            "POST", "/v1/networks", {"name": "b", "mode": "x"}, 400, "network: mode: 'x' is not", id="no such mode"
        ),
        pytest.param(
            "POST", "/v1/networks", {"name": "b", "nets": 1}, 400, "network: unknown key 'nets'", id="key of YAML"
        ),
        pytest.param(
            "POST",
            "/v1/networks",
            {"name": "b", "subnet": "10.1.0.128/25"},
            409,
            "subnet 10.1.0.128/25 overlaps 10.1.0.0/24 of network 'web'",
            id="overlapping subnets",
        ),
    ],
)
def test_what_cannot_be_is_refused_in_words(
    agent: FakeAgent, method: str, path: str, body: object, status: int, error: str
) -> None:
    call(agent, "POST", "/v1/networks", WEB)
    before = str(agent.kernel)
    got, reply = call(agent, method, path, body)
    assert (got, set(reply)) == (status, {"error", "hint"})
    assert reply["error"].startswith(error)
    assert str(agent.kernel) == before
    assert agent.attacher.attachments() == []


def test_a_network_in_use_is_not_removed(agent: FakeAgent) -> None:
    call(agent, "POST", "/v1/networks", WEB)
    call(agent, "POST", "/v1/run", RUN)
    status, reply = call(agent, "DELETE", "/v1/networks/web")
    assert (status, reply["error"]) == (409, "network 'web' is in use by run/web/c1/eth0")


def test_a_host_port_in_use_names_its_owner(agent: FakeAgent) -> None:
    call(agent, "POST", "/v1/networks", WEB)
    call(agent, "POST", "/v1/run", {**RUN, "ports": ["8080:80"]})
    second = {**RUN, "container": "c2", "netns": "/run/netns/b", "ports": ["8080:80"]}
    status, reply = call(agent, "POST", "/v1/run", second)
    assert status == 409
    assert "8080/tcp" in reply["error"]
    assert "run/web/c1/eth0" in reply["error"]


def test_a_bug_is_answered_and_the_agent_lives_on(agent: FakeAgent, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agent.attacher, "usage", lambda: 1 / 0)
    assert call(agent, "GET", "/v1/ipam") == (
        500,
        {"error": "internal error: ZeroDivisionError: division by zero", "hint": "the agent's log says more"},
    )
    assert call(agent, "GET", "/v1/status")[0] == 200


def test_a_network_over_the_nodes_own_address_is_refused(agent: FakeAgent) -> None:
    """It would take the uplink's neighbours away from the node."""
    assert isinstance(agent.kernel, FakeKernel)
    agent.kernel.add_link("eth0")
    agent.kernel.host.addresses.add(("eth0", ip_interface("192.0.2.7/24")))
    status, reply = call(agent, "POST", "/v1/networks", {"name": "b", "subnet": "192.0.2.0/25"})
    assert (status, reply["error"]) == (
        409,
        "subnet 192.0.2.0/25 holds 192.0.2.7, which is this node's own address on eth0",
    )
    assert call(agent, "POST", "/v1/networks", {"name": "b", "subnet": "192.0.2.128/25"})[0] == 201
    bridge = {"name": "c", "bridge": "eth0", "subnet": "10.9.0.0/24"}
    status, reply = call(agent, "POST", "/v1/networks", bridge)
    assert (status, reply["error"]) == (409, '"eth0" already exists but is not a bridge: it is a dummy')


def test_a_port_on_a_network_without_addresses_is_refused(agent: FakeAgent) -> None:
    call(agent, "POST", "/v1/networks", {"name": "l2"})
    status, reply = call(agent, "POST", "/v1/run", {**RUN, "network": "l2", "ports": ["8080:80"]})
    assert (status, reply["error"]) == (
        400,
        "network 'l2' publishes no ports: it has no subnet, so nobody gets an address",
    )
    assert agent.attacher.attachments() == []
