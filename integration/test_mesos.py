"""Mesos/UCR as a caller: one plug-in per file, old results, no CNI_ARGS, no CHECK, DEL without a namespace."""

from __future__ import annotations

import json

import pytest

from integration.callers import Json, Mesos, addresses, must
from integration.lab import UPLINK
from integration.networks import REFERENCE, Net
from integration.sockets import ask, reaches
from integration.traces import picture

pytestmark = pytest.mark.skipif(REFERENCE, reason="Debian has no mesos-cni-port-mapper")

OLD = {"ip4", "ip6", "dns", "cniVersion"}


def bridge(net: Net) -> Json:
    """A network as an operator writes it for UCR: no cniVersion at all."""
    return {**net.wire(), "name": net.name}


def mapper(net: Net, delegate: str = "towpath-bridge", **keys: object) -> Json:
    """DC/OS's ucr-default-bridge.conf, on this test's bridge."""
    inner = {"type": delegate, "bridge": net.bridge, "isDefaultGateway": True, "ipMasq": True, "hairpinMode": True}
    ipam: Json = {**net.ipam(), "routes": [{"dst": "0.0.0.0/0"}]}
    if delegate == "bridge":  # it adds the default route itself, and fails over one that is there
        ipam |= {"type": "host-local", "dataDir": str(net.host.folder / "host-local"), "routes": []}
    chain = {"excludeDevices": [net.bridge], "chain": "TP-TEST", "delegate": {**inner, "ipam": ipam}}
    return {"name": net.name, "type": "mesos-cni-port-mapper", **chain, **keys}


def info(*ports: tuple[int, int, str]) -> Json:
    found = [{"host_port": h, "container_port": c, "protocol": p} for h, c, p in ports]
    return {"ip_addresses": [{"protocol": "IPv4"}], "port_mappings": found}


def test_a_network_without_a_version_answers_in_the_old_shape(net: Net) -> None:
    container = net.host.container()
    mesos = Mesos(net.host.exec(), bridge(net))
    result = must(mesos.add(container.id, container.path))
    assert set(result) <= OLD
    assert result["ip4"]["ip"].startswith(f"10.{net.number}.0.")
    assert result["ip4"]["gateway"] == net.gateway
    assert mesos.delete(container.id, container.path).ok
    assert container.link() is None


@pytest.mark.parametrize("delegate", ["towpath-bridge", "bridge"], ids=["our bridge", "the reference bridge"])
def test_ports_of_the_network_info_are_published(net: Net, delegate: str) -> None:
    container = net.host.container()
    container.serve(tcp=(80,), udp=(53,))
    mesos = Mesos(net.host.exec(), mapper(net, delegate))
    wanted = info((31000, 80, "tcp"), (31001, 53, "udp"))
    result = must(mesos.add(container.id, container.path, **wanted))
    assert set(result) <= OLD
    assert ask(net.host.outside, UPLINK, 31000).server == container.id
    assert ask(net.host.outside, UPLINK, 31001, "udp").server == container.id
    assert mesos.delete(container.id, container.path, **wanted).ok
    assert not reaches(net.host.outside, UPLINK, 31000)


def test_del_after_a_reboot_has_no_namespace_and_frees_the_address(net: Net) -> None:
    keep = net.host.container()
    mesos = Mesos(net.host.exec(), mapper(net))
    must(mesos.add(keep.id, keep.path))
    before = picture(net.host)
    container = net.host.container()
    wanted = info((31002, 80, "tcp"))
    must(mesos.add(container.id, container.path, **wanted))
    container.remove()
    for _ in range(2):
        assert mesos.delete(container.id, None, **wanted).ok
    assert picture(net.host) - before == []
    assert mesos.delete(keep.id, keep.path).ok


def test_a_nested_container_has_a_dot_in_its_id(net: Net) -> None:
    container = net.host.container()
    mesos = Mesos(net.host.exec(), mapper(net))
    name = f"{container.id}.4f1c"
    assert addresses(must(mesos.add(name, container.path)))
    assert mesos.delete(name, container.path).ok


def test_the_old_result_tells_routes_and_dns(net: Net) -> None:
    container = net.host.container()
    config = {**bridge(net), "dns": {"nameservers": ["198.51.100.1"]}}
    config["ipam"] = net.ipam(routes=[{"dst": "0.0.0.0/0"}])
    mesos = Mesos(net.host.exec(), config)
    result = must(mesos.add(container.id, container.path))
    assert {route["dst"] for route in result["ip4"]["routes"]} == {"0.0.0.0/0"}
    assert result["dns"]["nameservers"] == ["198.51.100.1"]
    assert mesos.delete(container.id, container.path).ok


WRONG: list[tuple[Json, int]] = [
    ({"chain": ""}, 101),
    ({"delegate": {}}, 101),
    ({"delegate": {"type": "no-such-plugin"}}, 101),
]


@pytest.mark.parametrize(("keys", "code"), WRONG, ids=["no chain", "delegate without type", "delegate not found"])
def test_errors_have_the_port_mappers_own_codes(net: Net, keys: Json, code: int) -> None:
    container = net.host.container()
    before = picture(net.host)
    reply = Mesos(net.host.exec(), {**mapper(net), **keys}).add(container.id, container.path)
    assert (reply.exit != 0, reply.code) == (True, code)
    assert picture(net.host) - before == []


def test_a_taken_host_port_fails_the_launch_and_gives_the_address_back(net: Net) -> None:
    first, second = net.host.container(), net.host.container()
    mesos = Mesos(net.host.exec(), mapper(net))
    wanted = info((31003, 80, "tcp"))
    must(mesos.add(first.id, first.path, **wanted))
    before = picture(net.host)
    reply = mesos.add(second.id, second.path, **wanted)
    assert not reply.ok
    assert first.id in json.dumps(reply.json)
    assert picture(net.host) - before == []
    assert mesos.delete(first.id, first.path, **wanted).ok
