"""Published ports, row by row (P1-P17): in one call and in a chain behind the reference bridge, on both firewalls."""

from __future__ import annotations

import socket
import statistics
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from integration.callers import Json, Runtime, encode, must, variables
from integration.conftest import open_host
from integration.lab import OUTSIDE, UPLINK, UPLINK6, Host
from integration.networks import CAPABILITIES, REFERENCE, Member, Net, new_net, plugin
from integration.sockets import Server, Unreachable, ask, client, reaches
from integration.traces import picture

BACKENDS = ["iptables"] if REFERENCE else ["nftables", "iptables"]
FORMS = ["chain"] if REFERENCE else ["one call", "chain"]


@pytest.fixture(scope="module", params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def host(backend: str) -> Iterator[Host]:
    """One node per firewall back end."""
    node = open_host(firewall=backend)
    yield node
    node.close()


@pytest.fixture(scope="module")
def victim(backend: str) -> Iterator[Host]:
    """A node whose rules are flushed: what is left afterwards is no question there."""
    node = open_host(firewall=backend)
    yield node
    node.close()


@pytest.fixture
def exposed(victim: Host) -> Iterator[Net]:
    network = new_net(victim)
    yield network
    network.close()


@pytest.fixture(params=FORMS)
def form(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def publisher(net: Net, form: str, ipam: Json | None = None, **keys: Any) -> Runtime:
    """A network list that publishes ports; `keys` are the port mapper's."""
    if form == "one call":
        return net.runtime(net.wire(ipam=ipam or net.ipam(), **keys), version="0.4.0")
    local = {**(ipam or net.ipam()), "type": "host-local", "dataDir": str(net.host.folder / "host-local")}
    wire = net.wire(type="bridge", ipam=local, ipMasq=False, hairpinMode=True, capabilities={})
    ports = {"type": plugin("portmap"), "capabilities": CAPABILITIES, **keys}
    return net.runtime(wire, ports, version="0.4.0")


def port(outer: int, inner: int, proto: str = "tcp", host_ip: str = "") -> Json:
    found: Json = {"hostPort": outer, "containerPort": inner, "protocol": proto}
    return {**found, "hostIP": host_ip} if host_ip else found


def publish(net: Net, runtime: Runtime, *ports: Json) -> Member:
    """A container with these ports and a server on every inner one."""
    member = net.join(runtime, portMappings=list(ports))
    for proto in ("tcp", "udp"):
        inner = tuple({p["containerPort"] for p in ports if p["protocol"] == proto})
        if inner:
            member.container.serve(**{proto: inner})
    return member


@pytest.mark.row("P1", reference=False)
def test_a_port_mapper_without_a_result_before_it_says_so(net: Net) -> None:
    config = {"cniVersion": "1.0.0", "name": net.name, "type": plugin("portmap"), "capabilities": CAPABILITIES}
    config["runtimeConfig"] = {"portMappings": [port(8080, 80)]}
    env = variables("ADD", "tpt-p1", net.host.container().path, "eth0")
    reply = net.host.exec()(plugin("portmap"), env, encode(config))
    assert "must be called as chained plugin" in reply.text


@pytest.mark.row("P2")
def test_without_mappings_the_result_passes_and_no_rule_changes(net: Net) -> None:
    container = net.host.container()
    before = picture(net.host)
    result = {"cniVersion": "1.0.0", "interfaces": [], "ips": [{"address": "10.9.9.9/24"}], "routes": [], "dns": {}}
    config = {"cniVersion": "1.0.0", "name": net.name, "type": plugin("portmap"), "prevResult": result}
    reply = net.host.exec()(plugin("portmap"), variables("ADD", container.id, container.path, "eth0"), encode(config))
    assert must(reply)["ips"] == result["ips"]
    assert picture(net.host) - before == []
    reply = net.host.exec()(plugin("portmap"), variables("DEL", container.id, container.path, "eth0"), encode(config))
    assert reply.ok


@pytest.mark.parametrize("proto", [pytest.param("tcp", id="P3-tcp"), pytest.param("udp", id="P4-udp")])
@pytest.mark.parametrize("bridge_calls", ["1", "0"], ids=["br_netfilter on", "br_netfilter off"])
def test_a_port_is_reached_from_everywhere(net: Net, form: str, proto: str, bridge_calls: str) -> None:
    runtime = publisher(net, form)
    net.host.sysctl("net/bridge/bridge-nf-call-iptables", bridge_calls)
    member = publish(net, runtime, port(8080, 80, proto))
    sibling = net.join(runtime)
    places = {
        "the host by its address": (net.host.netns, UPLINK),
        "the host by 127.0.0.1": (net.host.netns, "127.0.0.1"),
        "outside": (net.host.outside, UPLINK),
        "a sibling": (sibling.container.netns, UPLINK),
        "the container itself": (member.container.netns, UPLINK),
        "a sibling by the gateway": (sibling.container.netns, net.gateway),
    }
    answers = {}
    for place, (netns, address) in places.items():
        try:
            answers[place] = ask(netns, address, 8080, proto).server
        except Unreachable as exc:
            answers[place] = str(exc)
    assert answers == dict.fromkeys(places, member.container.id)


@pytest.mark.row("P4")
def test_udp_follows_a_restarted_container_while_the_client_keeps_sending(net: Net, form: str) -> None:
    runtime = publisher(net, form)
    old = publish(net, runtime, port(5353, 53, "udp"))
    with client(net.host.outside, UPLINK, "udp") as sock:
        sock.connect((UPLINK, 5353))
        assert talk(sock, 2.0) == old.container.id
        assert old.leave().ok
        old.container.remove()
        sock.send(b"?")  # nobody is there: an entry that leads nowhere may be remembered
        new = publish(net, runtime, port(5353, 53, "udp"))
        assert talk(sock, 1.0) == new.container.id


def talk(sock: socket.socket, within: float) -> str:
    """Send every 100 ms from the same source port; the first answer's server."""
    end = time.monotonic() + within
    sock.settimeout(0.1)
    while time.monotonic() < end:
        try:
            sock.send(b"?")
            return sock.recv(2048).decode().split()[0]
        except OSError:  # silence, or ICMP's word that nobody is there
            time.sleep(0.02)
    return "nobody"


@pytest.mark.row("P5", reference=False)
def test_after_del_udp_reaches_a_listener_of_the_host(net: Net, form: str) -> None:
    member = publish(net, publisher(net, form), port(5454, 53, "udp"))
    with client(net.host.outside, UPLINK, "udp") as sock:
        sock.connect((UPLINK, 5454))
        assert talk(sock, 2.0) == member.container.id
        assert member.leave().ok
        server = Server(net.host.netns, "host", udp=(5454,))
        try:
            assert talk(sock, 1.0) == "host"
        finally:
            server.close()


@pytest.mark.row("P6")
def test_a_host_ip_is_the_only_address_that_serves(net: Net, form: str) -> None:
    member = publish(net, publisher(net, form), port(8081, 80, host_ip="127.0.0.1"), port(8082, 80, host_ip=UPLINK))
    assert reaches(net.host.netns, "127.0.0.1", 8081)
    assert not reaches(net.host.netns, UPLINK, 8081)
    assert not reaches(net.host.outside, UPLINK, 8081)
    assert ask(net.host.outside, UPLINK, 8082).server == member.container.id
    assert not reaches(net.host.netns, "127.0.0.1", 8082)


@pytest.mark.row("P6")
@pytest.mark.parametrize("wildcard", ["0.0.0.0", "::"])
def test_an_unspecified_host_ip_is_every_address_of_its_family(net: Net, form: str, wildcard: str) -> None:
    publish(net, publisher(net, form, net.dual()), port(8083, 80, host_ip=wildcard))
    settle6(net)
    assert reaches(net.host.outside, UPLINK, 8083) is (wildcard == "0.0.0.0")
    assert reaches(net.host.outside, UPLINK6, 8083) is (wildcard == "::")


def settle6(net: Net) -> None:
    """The reference bridge's v6 gateway takes its time (duplicate address detection); ours is there at once."""
    end = time.monotonic() + 3
    while "tentative" in net.host.netns.run("ip", "-6", "addr", "show", net.bridge) and time.monotonic() < end:
        time.sleep(0.05)


@pytest.mark.row("P6")
def test_a_host_ip_of_a_family_the_container_lacks_is_left_out(net: Net, form: str) -> None:
    publish(net, publisher(net, form), port(8084, 80), port(8085, 80, host_ip=UPLINK6))
    assert reaches(net.host.outside, UPLINK, 8084)


@pytest.mark.row("P7")
def test_forty_ports_of_mixed_protocols(net: Net, form: str) -> None:
    """SCTP is published; whether it flows is not tried, kernels often lack it."""
    tcp, udp = [port(9100 + n, 100 + n) for n in range(24)], [port(9100 + n, 200 + n, "udp") for n in range(12)]
    sctp = [port(9100 + n, 300 + n, "sctp") for n in range(4)]
    member = publish(net, publisher(net, form), *tcp, *udp, *sctp)
    for n in (0, 14, 15, 16, 23):
        assert ask(net.host.outside, UPLINK, 9100 + n).server == member.container.id
    for n in (0, 11):
        assert ask(net.host.outside, UPLINK, 9100 + n, "udp").server == member.container.id


@pytest.mark.row("P8")
def test_conditions_restrict_who_is_served(net: Net, form: str, backend: str) -> None:
    words = ["-s", f"{OUTSIDE}/32"] if backend == "iptables" else ["ip", "saddr", OUTSIDE]
    publish(net, publisher(net, form, conditionsV4=words), port(8086, 80))
    assert reaches(net.host.outside, UPLINK, 8086)
    assert not reaches(net.host.netns, UPLINK, 8086)


@pytest.mark.row("P8", reference=False)
def test_conditions_of_the_other_back_end_are_refused(net: Net, form: str, backend: str) -> None:
    words = ["-s", f"{OUTSIDE}/32"] if backend == "nftables" else ["ip", "saddr", OUTSIDE]
    reply = net.refuse(publisher(net, form, conditionsV4=words), portMappings=[port(8087, 80)])
    assert reply.code == 7
    assert "conditionsV4" in reply.text


@pytest.mark.row("P9")
def test_without_snat_the_source_is_kept(net: Net, form: str) -> None:
    member = publish(net, publisher(net, form, snat=False), port(8088, 80))
    assert ask(net.host.outside, UPLINK, 8088).seen_from == OUTSIDE
    assert not reaches(member.container.netns, UPLINK, 8088), "hairpin is not expected to work"


@pytest.mark.row("P10")
def test_masq_all_shows_the_gateway_as_source(net: Net, form: str) -> None:
    publish(net, publisher(net, form, masqAll=True), port(8089, 80))
    assert ask(net.host.outside, UPLINK, 8089).seen_from == net.gateway


@pytest.mark.row("P11")
def test_a_client_outside_is_seen_under_its_own_address(net: Net, form: str) -> None:
    publish(net, publisher(net, form), port(8090, 80), port(8090, 80, "udp"))
    assert ask(net.host.outside, UPLINK, 8090).seen_from == OUTSIDE
    assert ask(net.host.outside, UPLINK, 8090, "udp").seen_from == OUTSIDE


@pytest.mark.row("P12")
def test_v6_ports_are_reached_from_everywhere_but_the_hosts_loopback(net: Net, form: str) -> None:
    runtime = publisher(net, form, net.dual())
    member = publish(net, runtime, port(8091, 80))
    sibling = net.join(runtime)
    settle6(net)
    for netns in (net.host.outside, net.host.netns, sibling.container.netns, member.container.netns):
        assert ask(netns, UPLINK6, 8091).server == member.container.id
    assert ask(net.host.outside, UPLINK, 8091).server == member.container.id


@pytest.mark.row("P13", reference=False)
def test_sixteen_dels_at_once_leave_nothing(net: Net, form: str) -> None:
    runtime = publisher(net, form)
    net.join(runtime)
    before = picture(net.host)
    members = [net.join(runtime, portMappings=[port(8200 + n, 80)]) for n in range(16)]
    with ThreadPoolExecutor(16) as pool:
        assert [str(r) for r in pool.map(Member.leave, members) if not r.ok] == []
    assert [r for r in map(Member.leave, members) if not r.ok] == [], "DEL again"
    assert picture(net.host) - before == []


@pytest.mark.row("P14")
def test_check_is_content_and_then_is_not(exposed: Net, form: str, backend: str) -> None:
    member = publish(exposed, publisher(exposed, form), port(8092, 80))
    path = member.container.path
    reply = member.runtime.check(member.container.id, path)
    assert reply.ok, str(reply)
    exposed.host.netns.run(*(("nft", "flush", "ruleset") if backend == "nftables" else ("iptables", "-t", "nat", "-F")))
    found = member.runtime.check(member.container.id, path)
    assert found.exit == 1 or healed(exposed, 8092), "CHECK finds the rules gone, or they are back already"
    assert REFERENCE or healed(exposed, 8092)


def healed(net: Net, outer: int) -> bool:
    """The port serves again within the two seconds that healing may take (and one for the machine)."""
    end = time.monotonic() + 3
    while time.monotonic() < end:
        if reaches(net.host.outside, UPLINK, outer, wait=0.2):
            return True
    return False


@pytest.mark.row("P14", reference=False)
def test_check_of_a_dual_stack_container_is_content(net: Net, form: str) -> None:
    member = publish(net, publisher(net, form, net.dual()), port(8093, 80))
    reply = member.runtime.check(member.container.id, member.container.path)
    assert reply.ok, str(reply)


@pytest.mark.row("P15", reference=False)
@pytest.mark.parametrize("again", [port(8094, 81), port(8094, 81, host_ip=UPLINK)], ids=["same", "one address of all"])
def test_a_taken_host_port_is_refused_naming_the_owner(net: Net, form: str, again: Json) -> None:
    runtime = publisher(net, form)
    owner = publish(net, runtime, port(8094, 80))
    net.join(runtime)
    reply = net.refuse(runtime, portMappings=[again])
    assert reply.code == 7
    assert owner.container.id in reply.text
    assert "8094" in reply.text
    assert ask(net.host.outside, UPLINK, 8094).server == owner.container.id


@pytest.mark.row("P15", reference=False)
def test_one_port_on_two_addresses_is_no_conflict(net: Net, form: str) -> None:
    runtime = publisher(net, form)
    publish(net, runtime, port(8095, 80, host_ip="127.0.0.1"))
    second = publish(net, runtime, port(8095, 80, host_ip=UPLINK))
    assert ask(net.host.outside, UPLINK, 8095).server == second.container.id


@pytest.mark.row("P16", reference=False)
def test_ports_come_back_after_somebody_flushed_the_rules(exposed: Net, form: str, backend: str) -> None:
    member = publish(exposed, publisher(exposed, form), port(8096, 80))
    exposed.host.netns.run("nft", "flush", "ruleset")
    assert healed(exposed, 8096)
    assert ask(exposed.host.netns, "127.0.0.1", 8096).server == member.container.id


@pytest.mark.row("P17", reference=False)
def test_two_thousand_ports_do_not_slow_an_add(net: Net, backend: str) -> None:
    """A ratio, not a clock. The iptables layout is one rule per port by nature; maps are not."""
    if backend == "iptables":
        pytest.skip("iptables rules are a list: the cost per rule is the back end's own")
    runtime = publisher(net, "one call")

    def median() -> float:
        times = []
        for n in range(7):
            container = net.host.container()
            reply = runtime.add(container.id, container.path, portMappings=[port(9000 + n, 80)])
            assert reply.ok, str(reply)
            times.append(reply.seconds)
            assert runtime.delete(container.id, container.path).ok
        return statistics.median(times[1:])

    empty = median()
    net.join(runtime, portMappings=[port(20_000 + n, 1 + n) for n in range(2000)])
    assert median() < 2 * empty
