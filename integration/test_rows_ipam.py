"""Addresses, row by row (H1-H13): our IPAM behind our bridge, and as a delegate of the reference bridge."""

from __future__ import annotations

import ipaddress
import statistics
from pathlib import Path
from typing import Any

import pytest

from integration.callers import Json, Reply, Runtime, encode, variables
from integration.lab import Host
from integration.networks import REFERENCE, Member, Net, ours, plugin
from integration.traces import picture

WIRES = [pytest.param("bridge", id="delegated to by the reference bridge")]
if not REFERENCE:
    WIRES.append(pytest.param("towpath-bridge", id="in one call"))
WIRES[0], WIRES[-1] = WIRES[-1], WIRES[0]


@pytest.fixture(params=WIRES)
def wire(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def over(net: Net, wire: str, ipam: Json, version: str = "0.4.0", **keys: Any) -> Runtime:
    """A network without firewall work: addresses are all that counts here."""
    return net.runtime(net.wire(type=wire, ipMasq=False, ipam=ipam, **keys), version=version)


def between(net: Net, first: int, last: int) -> Json:
    return {"subnet": net.subnet, "rangeStart": f"10.{net.number}.0.{first}", "rangeEnd": f"10.{net.number}.0.{last}"}


def last_octets(*members: Member) -> list[int]:
    return [int(member.address.rsplit(".", 1)[1]) for member in members]


@pytest.mark.row("H1")
def test_addresses_go_round_and_are_not_soon_used_again(net: Net, wire: str) -> None:
    runtime = over(net, wire, net.ipam(between(net, 2, 5)))
    first, *more = [net.join(runtime) for _ in range(3)]
    assert last_octets(first, *more) == [2, 3, 4]
    assert first.leave().ok
    fourth = net.join(runtime)
    assert last_octets(fourth) == [5]
    assert last_octets(net.join(runtime)) == [2], "after the turn the released one comes again"


@pytest.mark.row("H2")
def test_a_30_has_one_address_beside_the_gateway(net: Net, wire: str) -> None:
    runtime = over(net, wire, net.ipam({"subnet": f"10.{net.number}.0.0/30"}))
    assert last_octets(net.join(runtime)) == [2]
    assert "no IP addresses available" in net.refuse(runtime).text


@pytest.mark.row("H3")
def test_a_used_up_range_says_so_and_leaves_nothing(net: Net, wire: str) -> None:
    runtime = over(net, wire, net.ipam(between(net, 2, 3)))
    for _ in range(2):
        net.join(runtime)
    before = picture(net.host)
    reply = net.refuse(runtime)
    tidied(net, wire)
    assert f"10.{net.number}.0.2-10.{net.number}.0.3" in reply.text
    assert picture(net.host) - before == []


@pytest.mark.row("H4")
def test_a_failure_in_the_second_range_gives_the_first_back(net: Net, wire: str) -> None:
    small = {"subnet": net.subnet6, "rangeStart": f"fd00:{net.number}::2", "rangeEnd": f"fd00:{net.number}::2"}
    runtime = over(net, wire, net.ipam({"subnet": net.subnet}, small))
    net.join(runtime)
    before = picture(net.host)
    net.refuse(runtime)
    tidied(net, wire)
    assert picture(net.host) - before == []


def tidied(net: Net, wire: str) -> None:
    """The reference bridge leaves its veth to the DEL that a runtime owes after a failed ADD; ours needs none."""
    if wire == "bridge":
        assert net.members[-1].leave().ok


def by_args(address: str) -> Json:
    return {"args": f"IgnoreUnknown=1;IP={address}"}


def by_runtime(address: str) -> Json:
    return {"ips": [address]}


def by_cni_args(address: str) -> Json:
    return {}


SOURCES = [
    pytest.param(by_args, id="H5-CNI_ARGS"),
    pytest.param(by_runtime, id="H5-runtimeConfig.ips"),
    pytest.param(by_cni_args, id="H5-args.cni.ips"),
]


def ask_for(net: Net, wire: str, source: Any, address: str) -> tuple[Runtime, Json]:
    """A runtime and the words of ADD that ask for one address."""
    keys: Json = {"args": {"cni": {"ips": [address]}}} if source is by_cni_args else {}
    return over(net, wire, net.ipam(between(net, 2, 20)), **keys), source(address)


@pytest.mark.parametrize("source", SOURCES)
def test_an_address_can_be_asked_for(net: Net, wire: str, source: Any) -> None:
    wanted = f"10.{net.number}.0.17"
    runtime, words = ask_for(net, wire, source, wanted)
    assert net.join(runtime, **words).address == wanted
    assert net.refuse(runtime, **words).code, "it is taken now"


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("octet", [pytest.param(99, id="out of range"), pytest.param(1, id="the gateway")])
def test_an_address_that_cannot_be_had_is_refused(net: Net, wire: str, source: Any, octet: int) -> None:
    runtime, words = ask_for(net, wire, source, f"10.{net.number}.0.{octet}")
    before = picture(net.host)
    net.refuse(runtime, **words)
    left = [
        line for line in picture(net.host) - before if net.bridge not in line
    ]  # the reference makes its bridge first
    assert left == []


def ipam_call(
    net: Net, verb: str, ipam: Json, container: str, netns: str, version: str = "0.4.0", name: str = ""
) -> Reply:
    """The IPAM executable alone, as a main plug-in calls it."""
    config = {"cniVersion": version, "name": name or net.name, "type": "bridge", "ipam": ipam}
    return net.host.exec()(plugin("host-local"), variables(verb, container, netns, "eth0"), encode(config))


@pytest.mark.row("H6")
@pytest.mark.parametrize(
    "netns", [pytest.param("", id="no namespace"), pytest.param("/nowhere", id="a path that is gone")]
)
def test_del_of_an_unknown_container_is_no_error(net: Net, netns: str) -> None:
    assert ipam_call(net, "DEL", net.ipam(), "tpt-nobody", netns).ok


def reservations(net: Net, content: dict[str, str]) -> Path:
    """A directory as the reference host-local leaves it behind."""
    folder = net.host.folder / f"adopt-{net.number}" / net.name
    folder.mkdir(parents=True)
    for name, text in content.items():
        (folder / name).write_bytes(text.encode())
    return folder.parent


OLD_FILES = [
    pytest.param("tpt-old\r\neth0", id="H7-as written today"),
    pytest.param("tpt-old", id="H7-id alone"),
    pytest.param("  tpt-old\r\neth0  \r\n", id="H7-spaces around"),
]


@pytest.mark.parametrize("text", OLD_FILES)
def test_reservations_of_the_reference_are_known_and_released(net: Net, text: str) -> None:
    folder = reservations(net, {f"10.{net.number}.0.2": text})
    ipam = {**net.ipam(between(net, 2, 3)), "dataDir": str(folder)}
    assert ipam_call(net, "ADD", ipam, "tpt-one", "/x").json["ips"][0]["address"] == f"10.{net.number}.0.3/24"
    assert not ipam_call(net, "ADD", ipam, "tpt-two", "/x").ok, "both are taken"
    assert ipam_call(net, "DEL", ipam, "tpt-old", "").ok
    assert ipam_call(net, "ADD", ipam, "tpt-two", "/x").json["ips"][0]["address"] == f"10.{net.number}.0.2/24"
    for container in ("tpt-one", "tpt-two"):
        assert ipam_call(net, "DEL", ipam, container, "").ok


@pytest.mark.row("H8")
def test_two_interfaces_of_one_container_have_addresses_of_their_own(net: Net, wire: str) -> None:
    runtime = over(net, wire, net.ipam(), isDefaultGateway=False)
    first = net.join(runtime)
    second = net.join(runtime, container=first.container, ifname="eth1")
    assert last_octets(first, second) == [2, 3]
    assert first.leave().ok
    assert second.container.addresses("eth1") == [f"10.{net.number}.0.3/24"]
    assert second.container.link("eth0") is None


RESOLV = """# comment
; another
nameserver 192.0.2.53
nameserver 2001:db8::53
domain example.org
search a.example b.example
options ndots:5 timeout:1
"""


@pytest.mark.row("H9")
def test_resolv_conf_is_read_without_its_comments(net: Net) -> None:
    file = net.host.folder / f"resolv-h9-{net.number}"
    file.write_text(RESOLV)
    ipam = net.ipam(resolvConf=str(file))
    dns = ipam_call(net, "ADD", ipam, "tpt-h9", "/x").json["dns"]
    assert ipam_call(net, "DEL", ipam, "tpt-h9", "").ok
    assert dns == {
        "nameservers": ["192.0.2.53", "2001:db8::53"],
        "domain": "example.org",
        "search": ["a.example", "b.example"],
        "options": ["ndots:5", "timeout:1"],
    }


WRONG = [
    pytest.param([[{"subnet": "10.240.0.5/24"}]], id="H10-host bits set", marks=ours),
    pytest.param([[{"subnet": "10.240.0.0/31"}]], id="H10-too small"),
    pytest.param([[{"subnet": "fd00::/127"}]], id="H10-too small v6"),
    pytest.param([[{"subnet": "10.240.0.0/24", "rangeStart": "10.241.0.5"}]], id="H10-start outside"),
    pytest.param([[{"subnet": "10.240.0.0/24", "rangeEnd": "10.241.0.5"}]], id="H10-end outside"),
    pytest.param(
        [[{"subnet": "10.240.0.0/24", "rangeStart": "10.240.0.9", "rangeEnd": "10.240.0.5"}]],
        id="H10-backwards",
        marks=ours,
    ),
    pytest.param([[{"subnet": "10.240.0.0/24"}, {"subnet": "10.240.0.0/25"}]], id="H10-overlap in a set"),
    pytest.param([[{"subnet": "10.240.0.0/24"}], [{"subnet": "10.240.0.0/25"}]], id="H10-overlap of sets"),
    pytest.param([[{"subnet": "10.240.0.0/24"}, {"subnet": "fd00::/64"}]], id="H10-families mixed"),
    pytest.param([[{"subnet": "ten/24"}]], id="H10-no subnet at all"),
    pytest.param([[{}]], id="H10-subnet missing"),
]


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_ranges_are_refused_and_nothing_changes(net: Net, wrong: Any) -> None:
    before = picture(net.host)
    reply = ipam_call(net, "ADD", {**net.ipam(), "ranges": wrong}, "tpt-h10", "/x")
    assert not reply.ok
    assert reply.json["msg"]
    assert REFERENCE or reply.code in (6, 7)
    assert picture(net.host) - before == []


@pytest.mark.row("H11")
def test_a_v6_64_serves_without_a_search(net: Net, wire: str) -> None:
    runtime = over(net, wire, net.ipam({"subnet": net.subnet6}))
    assert [net.join(runtime).address for _ in range(3)] == [f"fd00:{net.number}::{n}" for n in (2, 3, 4)]


@pytest.mark.row("H11")
def test_version_0_2_0_cannot_say_two_v4_addresses(net: Net) -> None:
    ipam = net.ipam({"subnet": net.subnet}, {"subnet": f"10.{net.number}.9.0/24"})
    reply = ipam_call(net, "ADD", ipam, "tpt-h11", "/x", "0.2.0")
    assert not reply.ok
    assert ipam_call(net, "DEL", ipam, "tpt-h11", "", "0.3.1").ok


def used(host: Host) -> int:
    """Addresses that the agent counts as taken."""
    return sum(int(row["used"]) for row in host.agent.get("/v1/ipam"))


@pytest.mark.row("H12", reference=False)
def test_addresses_of_dead_namespaces_come_back_at_the_next_start(make_host: Any) -> None:
    host = make_host()
    net = Net(host, 200)
    dead, alive = net.join(), net.join()
    host.agent.kill()
    dead.container.remove()
    host.agent.start()
    assert used(host) == 1
    assert alive.runtime.check(alive.container.id, alive.container.path).ok
    net.close()


@pytest.mark.row("H12", reference=False)
def test_a_reboot_frees_everything(make_host: Any) -> None:
    host = make_host()
    net = Net(host, 200)
    before = picture(host)
    for _ in range(2):
        net.join(portMappings=[{"hostPort": 8000 + len(net.members), "containerPort": 80, "protocol": "tcp"}])
    host.agent.kill()
    boot = host.folder / "boot_id"
    boot.write_text("11111111-2222-3333-4444-555555555555\n")
    script = f'mount --bind {boot} /proc/sys/kernel/random/boot_id && exec "$@"'
    host.agent.start(wrap=("unshare", "--mount", "--propagation", "slave", "sh", "-c", script, "sh"))
    assert used(host) == 0
    net.close()
    assert picture(host) - before == []


@pytest.mark.row("H13", reference=False)
def test_twenty_thousand_addresses_cost_no_more_than_none(make_host: Any) -> None:
    """No clock decides here but a ratio: a search through the reservations would be a hundred times slower."""
    net = Net(make_host(), 200)
    first = ipaddress.IPv4Address(f"10.{net.number}.0.2")
    folder = reservations(net, {str(first + n): f"tpt-old{n}\r\neth0" for n in range(20_000)})
    full = {"type": plugin("host-local"), "ranges": [[{"subnet": f"10.{net.number}.0.0/16"}]], "dataDir": str(folder)}

    def median(name: str, ipam: Json) -> float:
        times = []
        for n in range(9):
            reply = ipam_call(net, "ADD", ipam, f"tpt-h13-{n}", "/x", name=name)
            assert reply.ok, str(reply)
            gone = ipam_call(net, "DEL", ipam, f"tpt-h13-{n}", "", name=name)
            assert gone.ok
            times.append(reply.seconds + gone.seconds)
        return statistics.median(times[1:])

    crowded = median(net.name, full)
    last = ipam_call(net, "ADD", full, "tpt-h13", "/x")
    assert last.json["ips"][0]["address"].startswith(f"10.{net.number}.78.")
    assert ipam_call(net, "DEL", full, "tpt-h13", "").ok
    empty = median(f"{net.name}e", {**full, "ranges": [[{"subnet": "10.251.0.0/16"}]], "dataDir": "/nowhere"})
    assert crowded < 3 * empty
