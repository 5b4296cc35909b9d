"""The agent's YAML: what it may say, its defaults, and the words for each mistake."""

from __future__ import annotations

import subprocess
import sys
from ipaddress import ip_address, ip_network
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from towpath.config import Cni, Config, describe, describe_network, load, network_from, parse, value
from towpath.errors import BadConfig
from towpath.model import Dns, Network, Pool, Range, Route, Trunk


def span(subnet: str, start: str, end: str, gateway: str) -> Range:
    return Range(ip_network(subnet), ip_address(start), ip_address(end), ip_address(gateway))


WEB = Pool((span("10.1.0.0/24", "10.1.0.1", "10.1.0.254", "10.1.0.1"),))
WEB6 = Pool((span("fd00:1::/64", "fd00:1::1", "fd00:1::ffff:ffff:ffff:ffff", "fd00:1::1"),))


# --- the file --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["", "# nothing\n", "---\n", "{}", "networks: []", "networks:\n"])
def test_an_empty_file_is_every_default(text: str) -> None:
    assert parse(text) == Config()


def test_every_key_of_the_file_is_read() -> None:
    text = """
    node: alpha
    state_dir: /tmp/state
    socket: /tmp/agent.sock
    firewall: nftables
    log_level: debug
    log_format: json
    cni: {bin_dir: /usr/lib/cni}
    networks: [{name: web, subnet: 10.1.0.0/24}]
    """
    assert parse(text) == Config(
        node="alpha",
        state_dir="/tmp/state",
        socket="/tmp/agent.sock",
        firewall="nftables",
        log_level="debug",
        log_format="json",
        cni=Cni("/usr/lib/cni"),
        networks=(Network("web", pools=(WEB,), source="yaml"),),
    )


@pytest.mark.parametrize(
    ("text", "words"),
    [
        pytest.param("node: a\nstate_dirr: /x\n", "f.yaml:2: unknown key 'state_dirr'", id="unknown key"),
        pytest.param("cni:\n  bindir: /x\n", "f.yaml:2: cni: unknown key 'bindir'", id="unknown key below another"),
        pytest.param("state_dir: var\n", "f.yaml:1: state_dir: 'var' is not an absolute path", id="relative state_dir"),
        pytest.param("\nsocket: ./s\n", "f.yaml:2: socket: './s' is not an absolute path", id="relative socket"),
        pytest.param(
            f"socket: /{'s' * 107}\n", "f.yaml:1: socket: .* too long for a unix socket", id="socket too long"
        ),
        pytest.param("node: 5\n", "f.yaml:1: node: 5 is not text", id="a number for text"),
        pytest.param("node: a b\n", "f.yaml:1: node: node 'a b' is not a valid name", id="a node name with a space"),
        pytest.param("node: 2001-01-01\n", "f.yaml:1: node: .*date.* is not text", id="a date for text"),
        pytest.param("firewall: pf\n", "f.yaml:1: firewall: 'pf' is not one of auto, nftables, iptables", id="choice"),
        pytest.param("log_level: loud\n", "f.yaml:1: log_level: 'loud' is not one of debug", id="log level"),
        pytest.param("cni: here\n", "f.yaml:1: cni: 'here' is not a mapping of keys", id="text for a mapping"),
        pytest.param(
            "cni:\n  bin_dir: x\n", "f.yaml:2: cni.bin_dir: 'x' is not an absolute path", id="path below a key"
        ),
        pytest.param("- node\n", r"f.yaml:1: \['node'\] is not a mapping of keys", id="a list for the file"),
        pytest.param(
            "node: a\nnode: b\n", "f.yaml:2: key 'node' is given twice, first in line 1", id="key given twice"
        ),
        pytest.param("node: [a\n", "f.yaml:2: .*expected", id="YAML syntax"),
        pytest.param("node: a\n\tsocket: /x\n", "f.yaml:2: ", id="a tab"),
        pytest.param("node: a\x01\n", "f.yaml: .*control characters", id="a character YAML forbids"),
        pytest.param("node: 2001-99-99\n", "f.yaml: month must be", id="a date that is none"),
        pytest.param("node: *who\n", "f.yaml:1: .*undefined alias", id="an alias of nothing"),
        pytest.param("a: 1\n---\nb: 2\n", "f.yaml:2: .*document", id="two documents"),
        pytest.param("node: !!python/name:os.system x\n", "f.yaml:1: ", id="a tag that would run code"),
        pytest.param(
            "networks: {}\nnode: 5\n", "f.yaml:2: node", id="an empty mapping is no network, node is wrong first"
        ),
        pytest.param("networks: web\n", "f.yaml:1: networks: 'web' is not a list of networks", id="text for a list"),
        pytest.param("networks:\n- web\n", r"f.yaml:2: networks\[0\]: 'web' is not a network", id="text for a network"),
        pytest.param(
            "networks:\n- name: web\n  mtuu: 5\n",
            r"f.yaml:3: networks\[0\]: unknown key 'mtuu'",
            id="unknown network key",
        ),
        pytest.param(
            "networks:\n- name: web\n  ranges:\n  - - subnet: 10.1.0.0/24\n      start: 10.1.0.5\n",
            r"f.yaml:5: networks\[0\].ranges\[0\]\[0\]: unknown key 'start'",
            id="unknown range key",
        ),
        pytest.param(
            "networks:\n- name: web\n  routes:\n  - dst: 10.2.0.0/16\n    gw: east\n",
            r"f.yaml:5: networks\[0\].routes\[0\].gw: 'east' is not an address",
            id="deep inside",
        ),
        pytest.param(
            "networks:\n- subnet: 10.1.0.0/24\n", r"f.yaml:2: networks\[0\]: key 'name' is missing", id="no name"
        ),
    ],
)
def test_a_mistake_names_file_line_and_key(text: str, words: str) -> None:
    with pytest.raises(BadConfig, match=f"^{words}"):
        parse(text, "f.yaml")


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("state_dirr: /x", "did you mean 'state_dir'?"),
        ("cni: {bindir: /x}", "did you mean 'bin_dir'?"),
        ("networks: [{name: web, subnets_: []}]", "did you mean 'subnets'?"),
        ("node: 5", "put it in quotes"),
    ],
)
def test_a_mistake_says_what_would_be_right(text: str, hint: str) -> None:
    with pytest.raises(BadConfig) as caught:
        parse(text)
    assert caught.value.hint == hint


def test_a_deep_file_is_refused_and_the_agent_lives() -> None:
    with pytest.raises(BadConfig, match=r"nested too deeply|flow"):
        parse("a: " + "[" * 3000 + "]" * 3000)


VALUES = st.none() | st.booleans() | st.integers() | st.text(max_size=8) | st.sampled_from(["10.1.0.0/24", "fd00::1"])
KEYS = st.sampled_from([row.key for row in describe_network()]) | st.text(max_size=5)


def complaint(text: str) -> str:
    """What is wrong with it, "" = nothing; any other exception than the one meant for it breaks the test."""
    try:
        parse(text)
    except BadConfig as exc:
        return exc.what
    return ""


@given(st.text(max_size=80))
def test_any_text_is_read_or_refused_in_words(text: str) -> None:
    assert complaint(text).startswith("configuration:") or complaint(text) == ""


@given(
    st.lists(st.dictionaries(KEYS, VALUES | st.lists(VALUES, max_size=2) | st.dictionaries(KEYS, VALUES), max_size=5))
)
def test_any_networks_are_read_or_refused_in_words(networks: list[object]) -> None:
    words = complaint(yaml.safe_dump({"networks": networks}))
    assert words.startswith("configuration:") or words == ""


def test_a_file_is_read_by_path(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("node: alpha\n")
    assert load(tmp_path / "a.yaml").node == "alpha"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        pytest.param(None, "a.yaml cannot be read: No such file", id="missing"),
        pytest.param(b"node: \xff\n", "a.yaml is no text: byte 6 is not UTF-8", id="not UTF-8"),
        pytest.param(b"nod: a\n", "a.yaml:1: unknown key 'nod'", id="its name is in the message"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, content: bytes | None, words: str) -> None:
    path = tmp_path / "a.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(BadConfig, match=words):
        load(path)


def test_every_key_is_described_with_its_default() -> None:
    rows = {row.key: row for row in describe()}
    assert rows["firewall"].default == "auto"
    assert rows["cni.bin_dir"].default == value(Config(), "cni.bin_dir") == "/opt/cni/bin"
    assert {key.partition(".")[0] for key in rows} == set(Config.__slots__)
    assert all(row.meaning and row.type for row in (*describe(), *describe_network()))


def test_every_field_of_a_network_is_a_key_or_made_from_keys() -> None:
    keys = {row.key for row in describe_network()}
    assert set(Network.__slots__) - keys == {"pools", "source", "v"}
    assert {row.key: row.default for row in describe_network()}["masquerade"] == "true"


def test_yaml_is_loaded_only_when_a_file_is_read() -> None:
    code = "import sys, towpath.config; sys.exit('yaml' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


# --- networks --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("raw", "want"),
    [
        pytest.param({"name": "web"}, Network("web"), id="the name is enough"),
        pytest.param({"name": "web", "subnet": "10.1.0.0/24"}, Network("web", pools=(WEB,)), id="one subnet"),
        pytest.param(
            {"name": "web", "subnets": ["10.1.0.0/24", "fd00:1::/64"]},
            Network("web", pools=(WEB, WEB6)),
            id="dual stack",
        ),
        pytest.param(
            {"name": "web", "subnet": "10.1.0.0/24", "range_start": "10.1.0.9", "range_end": "10.1.0.20"},
            Network("web", pools=(Pool((span("10.1.0.0/24", "10.1.0.9", "10.1.0.20", "10.1.0.1"),)),)),
            id="a part of one subnet",
        ),
        pytest.param(
            {
                "name": "web",
                "ranges": [[{"subnet": "10.1.0.0/24", "gateway": "10.1.0.254"}], [{"subnet": "fd00:1::/64"}]],
            },
            Network("web", pools=(Pool((span("10.1.0.0/24", "10.1.0.1", "10.1.0.254", "10.1.0.254"),)), WEB6)),
            id="ranges",
        ),
        pytest.param(
            {"name": "web", "subnets": ["10.1.0.0/24", "fd00:1::/64"], "gateway": "10.1.0.7"},
            Network("web", pools=(Pool((span("10.1.0.0/24", "10.1.0.1", "10.1.0.254", "10.1.0.7"),)), WEB6)),
            id="a gateway goes to the subnet it lies in",
        ),
        pytest.param(
            {"name": "web", "subnet": "10.1.0.0/24", "gateway": ["10.1.0.1"]},
            Network("web", pools=(WEB,)),
            id="gateways",
        ),
        pytest.param(
            {"name": "web", "subnet": "10.1.0.0/24", "gateway": False},
            Network("web", pools=(WEB,), gateway=False),
            id="no gateway",
        ),
        pytest.param(
            {"name": "web", "promiscuous": True},
            Network("web", promiscuous=True, hairpin=False),
            id="promiscuous turns hairpin off",
        ),
        pytest.param(
            {"name": "h", "mode": "host", "dns": {"nameservers": ["1.1.1.1"]}},
            Network("h", "host", dns=Dns(("1.1.1.1",))),
            id="host",
        ),
        pytest.param(
            {
                "name": "web",
                "bridge": "br0",
                "masquerade": False,
                "isolation": "isolated",
                "mtu": 1400,
                "vlan": 7,
                "trunk": [{"first": 10, "last": 20}],
                "routes": [{"dst": "10.2.0.0/16", "gw": "10.1.0.1"}],
                "dns": {"search": ["example.org"]},
                "data_dir": "/var/lib/cni/networks",
            },
            Network(
                "web",
                bridge="br0",
                masquerade=False,
                isolation="isolated",
                mtu=1400,
                vlan=7,
                trunk=(Trunk(10, 20),),
                routes=(Route(ip_network("10.2.0.0/16"), ip_address("10.1.0.1")),),
                dns=Dns(search=("example.org",)),
                data_dir="/var/lib/cni/networks",
            ),
            id="plain keys",
        ),
    ],
)
def test_a_network_reads(raw: dict[str, object], want: Network) -> None:
    assert network_from(raw) == want


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        pytest.param({"mode": "bridged"}, "mode: 'bridged' is not one of host, bridge", id="mode"),
        pytest.param({"subnet": "10.1.0.5/24"}, "subnet: '10.1.0.5/24' is not a subnet .*host bits", id="host bits"),
        pytest.param({"subnet": "10.1.0.0/31"}, "subnet: 10.1.0.0/31 is too small", id="too small"),
        pytest.param(
            {"subnets": ["10.1.0.0/31"]}, r"subnets\[0\]: 10.1.0.0/31 is too small", id="too small, in a list"
        ),
        pytest.param({"subnets": "10.1.0.0/24"}, "subnets: '10.1.0.0/24' is not a list", id="one subnet for a list"),
        pytest.param(
            {"subnets": ["10.1.0.0/24", "10.1.0.0/25"]}, r"subnets\[1\]: 10.1.0.1-10.1.0.126 overlaps", id="overlap"
        ),
        pytest.param({"subnet": "10.1.0.0/24", "ranges": []}, "ranges: excludes subnet", id="two ways at once"),
        pytest.param({"range_start": "10.1.0.5"}, "range_start: goes with subnet only", id="range_start alone"),
        pytest.param(
            {"subnet": "10.1.0.0/24", "range_start": "10.2.0.5"},
            "range_start: 10.2.0.5 is not in 10.1.0.0/24",
            id="range_start outside",
        ),
        pytest.param(
            {"subnet": "10.1.0.0/24", "gateway": "10.2.0.1"},
            "gateway: 10.2.0.1 is in none of the network's subnets",
            id="gateway outside",
        ),
        pytest.param(
            {"subnet": "10.1.0.0/24", "gateway": 1}, "gateway: 1 is not true, false, an address", id="gateway"
        ),
        pytest.param(
            {"ranges": [[{"subnet": "10.1.0.0/24", "gateway": "10.2.0.1"}]]},
            r"ranges\[0\]\[0\].gateway: 10.2.0.1 is not in 10.1.0.0/24",
            id="gateway of a range outside",
        ),
        pytest.param({"mtu": 20}, "mtu: 20 is not 0 or 68 to 65535", id="MTU too small"),
        pytest.param({"mtu": True}, "mtu: True is not a whole number", id="MTU yes"),
        pytest.param({"mtu": "1500"}, "mtu: '1500' is not a whole number", id="MTU in quotes"),
        pytest.param({"vlan": 4095}, "vlan: 4095 is not 0 or 1 to 4094", id="B12 VLAN id"),
        pytest.param({"trunk": [{"first": 9, "last": 5}]}, r"trunk\[0\]: 9 to 5 are not VLAN ids", id="B12 trunk"),
        pytest.param({"hairpin": True, "promiscuous": True}, "promiscuous: true excludes hairpin", id="B9 both"),
        pytest.param({"isolation": "some"}, "isolation 'some' of network 'web' is not one of open", id="isolation"),
        pytest.param({"bridge": "a/b"}, "bridge 'a/b' may not", id="bridge name"),
        pytest.param({"name": "a b"}, "network name 'a b' is not a valid name", id="network name"),
        pytest.param({"masquerade": "yes"}, "masquerade: 'yes' is not true or false", id="text for true"),
        pytest.param(
            {"mode": "host", "subnet": "10.1.0.0/24"}, "subnet: has no meaning for mode host", id="host subnet"
        ),
        pytest.param({"data_dir": "networks"}, "data_dir: 'networks' is not an absolute path", id="relative data_dir"),
        pytest.param({"pools": []}, "unknown key 'pools'", id="the record's own form"),
        pytest.param({"source": "cni"}, "unknown key 'source'", id="who made it is not for the writer to say"),
    ],
)
def test_a_network_that_cannot_work_is_refused_in_words(raw: dict[str, object], words: str) -> None:
    with pytest.raises(BadConfig, match=f"^body: {words}"):
        network_from({"name": "web", **raw}, "body")


def test_more_modes_may_be_known() -> None:
    text = "networks: [{name: web, mode: overlay}]"
    assert parse(text, modes=("overlay",)).networks[0].mode == "overlay"


@pytest.mark.parametrize(
    ("networks", "words"),
    [
        pytest.param(
            "{name: a}, {name: a}", r"networks\[1\].name: 'a' is the name of networks\[0\] already", id="name"
        ),
        pytest.param(
            "{name: a, bridge: br0}, {name: b, bridge: br0}",
            r"networks\[1\].bridge: 'br0' belongs to network 'a' already",
            id="bridge",
        ),
        pytest.param(
            "{name: a}, {name: b, bridge: br-a}",
            r"networks\[1\].bridge: 'br-a' belongs to network 'a'",
            id="derived name",
        ),
        pytest.param(
            "{name: a, subnet: 10.1.4.0/24}, {name: b, subnet: 10.1.0.0/16}",
            r"networks\[1\]: subnet 10.1.0.0/16 overlaps 10.1.4.0/24 of network 'a'",
            id="subnet around another",
        ),
        pytest.param(
            "{name: a, subnet: 10.1.0.0/16}, {name: b, subnet: 10.1.4.0/24}, {name: c, subnet: 10.1.3.0/24}",
            r"networks\[\d\]: subnet 10.1.[34].0/24 overlaps 10.1.0.0/16 of network 'a'",
            id="subnet inside another",
        ),
        pytest.param(
            "{name: a, subnet: 'fd00::/64'}, {name: b, subnets: [10.0.0.0/8, 'fd00::/64']}",
            r"networks\[1\]: subnet fd00::/64 overlaps fd00::/64 of network 'a'",
            id="equal v6 subnets",
        ),
    ],
)
def test_networks_that_clash_are_refused_in_words(networks: str, words: str) -> None:
    with pytest.raises(BadConfig, match=f"^configuration:1: {words}"):
        parse(f"networks: [{networks}]")


def test_networks_apart_are_fine() -> None:
    text = (
        "{name: a, subnet: 10.1.0.0/24}, {name: b, subnet: 10.1.1.0/24}, {name: h, mode: host}, {name: g, mode: host}"
    )
    assert len(parse(f"networks: [{text}]").networks) == 4


@pytest.mark.parametrize("subnet", ["0.0.0.0/0", "127.0.0.0/8", "224.1.0.0/16", "fe80::/64", "::/0", "ff02::/64"])
def test_a_subnet_that_no_container_can_be_in_is_refused(subnet: str) -> None:
    with pytest.raises(BadConfig, match=r"f:1: networks\[0\]\.subnet: .* cannot be a network of containers"):
        parse(f"networks: [{{name: web, subnet: '{subnet}'}}]", "f")


def test_a_nameserver_that_is_no_address_is_refused_with_its_place() -> None:
    text = "networks:\n- name: web\n  dns:\n    nameservers: [9.9.9.9, dns.example]\n"
    with pytest.raises(BadConfig, match=r"f:4: networks\[0\]\.dns\.nameservers\[1\]: 'dns.example' is not"):
        parse(text, "f")
