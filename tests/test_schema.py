"""Records become plain data and come back; a mistake says where it is; rows of newer versions survive."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv4Interface, IPv6Network, ip_address, ip_interface, ip_network
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from towpath.errors import BadConfig, TowpathError
from towpath.model import (
    Address,
    Attachment,
    Bandwidth,
    Dns,
    Key,
    Lease,
    Network,
    Pool,
    PortMap,
    Range,
    Route,
    Tuning,
)
from towpath.schema import decode, encode, read, reader, rewrite

KEY = Key("cni", "web", "c1", "eth0")
FULL = Attachment(
    KEY,
    mode="bridge",
    parts=("wire", "address"),
    leases=(
        Lease(ip_interface("10.0.0.2/24"), ip_address("10.0.0.1"), 0),
        Lease(ip_interface("fd00::2/64"), ip_address("fd00::1"), 1),
    ),
    routes=(Route(ip_network("0.0.0.0/0")), Route(ip_network("fd01::/48"), ip_address("fd00::9"), scope=0)),
    dns=Dns(("10.0.0.1",), "example.org"),
    masquerade=True,
    ports=(PortMap(8080, 80), PortMap(53, 53, "udp", ip_address("192.0.2.1"))),
    bandwidth=Bandwidth(1000, 2000),
    tuning=Tuning((("net/ipv4/ip_forward", "1"),), promiscuous=False),
    labels=(("a", "b"),),
    created=12.5,
)


@dataclass(frozen=True, slots=True)
class Odd:
    """Forms that the model may come to use."""

    pair: tuple[int, str] = (0, "")
    texts: dict[str, str] = field(default_factory=dict)
    v4: IPv4Address | None = None
    home: IPv4Interface | None = None
    net: IPv6Network | None = None
    rate: float = 0.0
    inner: Dns | None = None


def test_fields_that_equal_their_default_are_left_out() -> None:
    assert encode(Attachment(KEY)) == {"key": {"origin": "cni", "network": "web", "container": "c1", "ifname": "eth0"}}
    assert encode(FULL)["leases"][1] == {"address": "fd00::2/64", "gateway": "fd00::1", "pool": 1}
    assert encode(FULL)["tuning"] == {"sysctl": [["net/ipv4/ip_forward", "1"]], "promiscuous": False}


@pytest.mark.parametrize(
    "record",
    [
        FULL,
        Attachment(KEY),
        Network(
            "web", pools=(Pool((Range(ip_network("10.0.0.0/24"), ip_address("10.0.0.2"), ip_address("10.0.0.9")),)),)
        ),
        Odd(
            (3, "c"),
            {"a": "b"},
            IPv4Address("10.0.0.1"),
            IPv4Interface("10.0.0.1/8"),
            IPv6Network("fd00::/8"),
            2,
            Dns(),
        ),
        Odd(),
    ],
    ids=["full", "bare", "network", "odd", "odd and bare"],
)
def test_a_record_comes_back_from_json_as_it_was(record: Any) -> None:
    assert decode(type(record), json.loads(json.dumps(encode(record)))) == record
    assert read(type(record), rewrite(None, record)) == record


ADDRESSES = st.ip_addresses()


@given(
    st.lists(st.tuples(ADDRESSES, st.integers(0, 32)), max_size=4),
    st.lists(st.text(max_size=9), max_size=3),
    st.floats(allow_nan=False),
)
def test_any_record_comes_back(pairs: list[tuple[Address, int]], words: list[str], created: float) -> None:
    leases = tuple(Lease(ip_interface(f"{a}/{length}"), a) for a, length in pairs)
    record = Attachment(KEY, leases=leases, aliases=tuple(words), name="".join(words), created=created)
    assert read(Attachment, rewrite(None, record)) == record


@pytest.mark.parametrize(
    ("cls", "data", "words"),
    [
        pytest.param(Network, {}, "key 'name' is missing", id="a key left out"),
        pytest.param(Network, {"name": 5}, "name: 5 is not text", id="a number for text"),
        pytest.param(Network, {"name": None}, "name: None is not text", id="nothing for text"),
        pytest.param(Network, {"name": "a", "mtu": "5"}, "mtu: '5' is not a whole number", id="text for a number"),
        pytest.param(Network, {"name": "a", "mtu": True}, "mtu: True is not a whole number", id="true is no number"),
        pytest.param(Network, {"name": "a", "mtu": 1.5}, "mtu: 1.5 is not a whole number", id="a fraction"),
        pytest.param(Network, {"name": "a", "hairpin": 1}, "hairpin: 1 is not true or false", id="1 is not true"),
        pytest.param(Network, {"name": "a b"}, "network name 'a b' is not a valid name", id="the record's own check"),
        pytest.param(Network, [], r"\[\] is not a mapping of keys", id="a list for a record"),
        pytest.param(Network, {"name": "a", "routes": {}}, "routes: {} is not a list", id="a mapping for a list"),
        pytest.param(Network, {"name": "a", "routes": "x"}, "routes: 'x' is not a list", id="text for a list"),
        pytest.param(
            Network,
            {"name": "a", "pools": [{"ranges": []}, {"ranges": [{"subnet": "10.0.0.1/24"}]}]},
            r"pools\[1\].ranges\[0\].subnet: '10.0.0.1/24' is not a subnet such as 10.0.0.0/24: .*host bits",
            id="deep inside",
        ),
        pytest.param(
            Network, {"name": "a", "routes": [{"dst": "ten"}]}, r"routes\[0\].dst: 'ten' is not", id="no subnet"
        ),
        pytest.param(
            Lease, {"address": "10.0.0.1"}, "address: '10.0.0.1' is not an address with prefix", id="no prefix"
        ),
        pytest.param(Lease, {"address": "10.0.0.1/33"}, "address: '10.0.0.1/33' is not", id="prefix too long"),
        pytest.param(Lease, {"address": "10.0.0.256/8"}, "address: '10.0.0.256/8' is not", id="no address"),
        pytest.param(
            Lease, {"address": "fd00::1/64", "gateway": 5}, "gateway: 5 is not an address", id="5 is not 0.0.0.5"
        ),
        pytest.param(Odd, {"v4": "fd00::1"}, "v4: 'fd00::1' is not an IPv4 address", id="the other family"),
        pytest.param(Odd, {"pair": [1]}, r"pair: \[1\] is not a list of 2", id="too short"),
        pytest.param(Odd, {"pair": [1, 2]}, r"pair\[1\]: 2 is not text", id="one of a pair"),
        pytest.param(Odd, {"texts": {"a": 1}}, "texts.a: 1 is not text", id="a number in a mapping"),
        pytest.param(Odd, {"texts": ["a"]}, r"texts: \['a'\] is not a mapping of text", id="a list for a mapping"),
        pytest.param(Odd, {"inner": 5}, "inner: 5 is not a mapping of keys", id="a number for a record"),
        pytest.param(Odd, {5: 5}, "unknown key 5", id="a key that is no text"),
        pytest.param(PortMap, {"host_port": 0, "container_port": 1}, "hostPort 0 is not a port", id="a port"),
    ],
)
def test_a_mistake_names_place_key_and_value(cls: type, data: object, words: str) -> None:
    with pytest.raises(BadConfig, match=f"^body: {words}"):
        decode(cls, data, "body")


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("hairpins", "did you mean 'hairpin'?"),
        ("zzz", "known keys: bridge, dad"),
    ],
)
def test_an_unknown_key_comes_with_the_nearest_one(key: str, hint: str) -> None:
    with pytest.raises(BadConfig, match=f"^unknown key '{key}'") as caught:
        decode(Network, {"name": "a", key: 1})
    assert caught.value.hint.startswith(hint)


def test_a_row_of_a_newer_version_is_read_without_what_is_new() -> None:
    row = {"name": "web", "colour": "red", "dns": {"domain": "x", "ttl": 5}, "routes": [{"dst": "10.0.0.0/8", "x": 1}]}
    want = Network("web", dns=Dns(domain="x"), routes=(Route(ip_network("10.0.0.0/8")),))
    assert read(Network, json.dumps(row).encode()) == want


def test_unknown_fields_survive_a_rewrite() -> None:
    old = b'{"name":"web","mtu":9000,"colour":"red","dns":{"domain":"x","ttl":5}}'
    kept = json.loads(rewrite(old, Network("web", dns=Dns(domain="y"))))
    assert kept == {"name": "web", "colour": "red", "dns": {"domain": "y", "ttl": 5}}
    gone = json.loads(rewrite(b'{"inner":{"domain":"x","ttl":5}}', Odd(inner=None)))
    assert gone == {"inner": {"ttl": 5}}
    bare = json.loads(rewrite(old, Network("web")))
    assert bare == {"name": "web", "colour": "red", "dns": {"ttl": 5}}


@pytest.mark.parametrize(
    ("row", "words"),
    [
        pytest.param(b"", "broken Network row: it is no JSON", id="empty"),
        pytest.param(b'{"name":', "broken Network row: it is no JSON", id="cut off"),
        pytest.param(b"\xff\xfe\xfd", "broken Network row: it is no JSON", id="no text"),
        pytest.param(b"[]", r"broken Network row: \[\] is not a mapping", id="a list"),
        pytest.param(
            b'{"name":"a","mtu":"x"}', "broken Network row: mtu: 'x' is not a whole number", id="a wrong type"
        ),
        pytest.param(b'{"name":"a b"}', "broken Network row: network name 'a b'", id="a value that is refused"),
    ],
)
def test_a_broken_row_names_the_type(row: bytes, words: str) -> None:
    with pytest.raises(TowpathError, match=words):
        read(Network, row)


@pytest.mark.parametrize("row", [b"", b"[]"])
def test_a_broken_row_is_not_rewritten_in_silence(row: bytes) -> None:
    with pytest.raises(TowpathError, match="broken Network row"):
        rewrite(row, Network("web"))


@pytest.mark.parametrize("hint", [int | str, list[int], set[str], dict[str, int]], ids=str)
def test_a_type_that_is_not_understood_is_our_own_mistake(hint: Any) -> None:
    with pytest.raises(TypeError, match="schema cannot read"):
        reader(hint)
