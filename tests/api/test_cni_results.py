"""Results in every version's form, there and back."""

from __future__ import annotations

from ipaddress import ip_address, ip_interface, ip_network
from typing import Any

import pytest

from towpath.api.cni.results import VERSIONS, Ip, Link, Result, decode, encode
from towpath.errors import BadConfig, BadRequest
from towpath.model import Dns, Route

RESULT = Result(
    (Link("br0", "02:00:00:00:00:01", mtu=1500), Link("eth0", "02:00:00:00:00:02", "/run/netns/a", mtu=1500)),
    (
        Ip(ip_interface("10.0.0.5/24"), ip_address("10.0.0.1"), 1),
        Ip(ip_interface("fd00::5/64"), ip_address("fd00::1"), 1),
    ),
    (Route(ip_network("0.0.0.0/0"), ip_address("10.0.0.1"), mtu=1400, table=7, scope=0), Route(ip_network("::/0"))),
    Dns(("10.0.0.1",), "a.test", ("b.test",), ("ndots:2",)),
)
DNS = {"nameservers": ["10.0.0.1"], "domain": "a.test", "search": ["b.test"], "options": ["ndots:2"]}
OLD = {
    "ip4": {"ip": "10.0.0.5/24", "gateway": "10.0.0.1", "routes": [{"dst": "0.0.0.0/0", "gw": "10.0.0.1"}]},
    "ip6": {"ip": "fd00::5/64", "gateway": "fd00::1", "routes": [{"dst": "::/0"}]},
    "dns": DNS,
}
LINKS = [
    {"name": "br0", "mac": "02:00:00:00:00:01"},
    {"name": "eth0", "mac": "02:00:00:00:00:02", "sandbox": "/run/netns/a"},
]
IPS = [
    {"interface": 1, "address": "10.0.0.5/24", "gateway": "10.0.0.1"},
    {"interface": 1, "address": "fd00::5/64", "gateway": "fd00::1"},
]
ROUTES = [{"dst": "0.0.0.0/0", "gw": "10.0.0.1"}, {"dst": "::/0"}]
MIDDLE = {
    "interfaces": LINKS,
    "ips": [{"version": "4", **IPS[0]}, {"version": "6", **IPS[1]}],
    "routes": ROUTES,
    "dns": DNS,
}
FORMS: dict[str, dict[str, Any]] = {
    "0.1.0": OLD,
    "0.2.0": OLD,
    "0.3.0": MIDDLE,
    "0.3.1": MIDDLE,
    "0.4.0": MIDDLE,
    "1.0.0": {"interfaces": LINKS, "ips": IPS, "routes": ROUTES, "dns": DNS},
    "1.1.0": {
        "interfaces": [{**link, "mtu": 1500} for link in LINKS],
        "ips": IPS,
        "routes": [{**ROUTES[0], "mtu": 1400, "table": 7, "scope": 0}, ROUTES[1]],
        "dns": DNS,
    },
}


@pytest.mark.parametrize("version", VERSIONS)
def test_a_result_takes_the_form_of_its_version(version: str) -> None:
    assert encode(RESULT, version) == {"cniVersion": version, **FORMS[version]}


@pytest.mark.parametrize("version", VERSIONS)
def test_what_a_version_can_say_comes_back(version: str) -> None:
    assert encode(decode(FORMS[version], "prevResult"), version) == {"cniVersion": version, **FORMS[version]}


def test_the_newest_form_loses_nothing() -> None:
    assert decode(encode(RESULT, "1.1.0"), "prevResult") == RESULT


def test_an_old_result_in_a_newer_configuration_is_lifted() -> None:
    assert encode(decode(FORMS["0.2.0"], "prevResult"), "1.0.0") == {
        "cniVersion": "1.0.0",
        "interfaces": [],
        "ips": [{"address": ip["address"], "gateway": ip["gateway"]} for ip in IPS],
        "routes": ROUTES,
        "dns": DNS,
    }


TWO = Result((), (Ip(ip_interface("10.0.0.5/24")), Ip(ip_interface("10.1.0.5/24"))))


@pytest.mark.parametrize("version", ["0.1.0", "0.2.0"])
@pytest.mark.parametrize(
    ("result", "named"),
    [
        pytest.param(TWO, "more than 1 address per family", id="B4 two of a family"),
        pytest.param(Result(), "needs an IP address", id="no address at all"),
    ],
)
def test_old_forms_refuse_what_they_cannot_say(version: str, result: Result, named: str) -> None:
    with pytest.raises(BadConfig, match=named) as caught:
        encode(result, version)
    assert version in caught.value.what


def test_newer_forms_take_any_number_of_addresses() -> None:
    assert len(encode(TWO, "0.3.0")["ips"]) == 2
    assert encode(Result(), "1.0.0")["ips"] == []


@pytest.mark.parametrize(
    ("raw", "code", "named"),
    [
        pytest.param({"ips": {}}, 6, "prevResult.ips", id="ips is no list"),
        pytest.param({"ips": [7]}, 6, "prevResult.ips[0] 7", id="an ip is no object"),
        pytest.param({"ips": [{"address": "10.0.0.5"}]}, 7, '"10.0.0.5"', id="address without prefix length"),
        pytest.param(
            {"ips": [{"address": "10.0.0.5/24", "gateway": "x"}]}, 7, 'gateway "x"', id="gateway is no address"
        ),
        pytest.param(
            {"ips": [{"address": "10.0.0.5/24", "interface": 1}]}, 6, "beyond", id="index beyond the interfaces"
        ),
        pytest.param({"ips": [{"address": "10.0.0.5/24", "interface": -1}]}, 7, "-1", id="negative index"),
        pytest.param({"interfaces": [{}]}, 6, "without name", id="interface without name"),
        pytest.param({"routes": [{"dst": "x"}]}, 7, 'dst "x"', id="route to no subnet"),
        pytest.param({"routes": [{"dst": "::/0", "gw": "10.0.0.1"}]}, 7, "family", id="gateway of the other family"),
        pytest.param({"ip4": {"ip": "fd00::1/64"}}, 7, "IPv4", id="an IPv6 address as ip4"),
        pytest.param({"dns": {"nameservers": [1]}}, 6, "nameservers[0]", id="a nameserver that is a number"),
    ],
)
def test_a_wrong_previous_result_is_refused_by_field(raw: dict[str, Any], code: int, named: str) -> None:
    with pytest.raises(BadRequest) as caught:
        decode(raw, "prevResult")
    assert (caught.value.code, named in caught.value.what) == (code, True), caught.value.what
