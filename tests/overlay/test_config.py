"""DC/OS's overlay configuration: what is read, and which mistakes are named."""

from __future__ import annotations

import json
from dataclasses import replace
from ipaddress import ip_network
from typing import Any

import pytest

from towpath import schema
from towpath.errors import BadConfig
from towpath.overlay.config import DCOS, OverlayConfig, host_route_in_the_way, read

DCOS_JSON = """{
  "vtep_subnet": "44.128.0.0/20", "vtep_subnet6": "fd01:a::/64", "vtep_mac_oui": "70:B3:D5:00:00:00",
  "overlays": [{"name": "dcos", "subnet": "9.0.0.0/8", "prefix": 24},
               {"name": "dcos6", "subnet6": "fd01:b::/64", "prefix6": 80}]
}"""
SMALL: dict[str, Any] = {
    "vtep_subnet": "44.128.0.0/20",
    "overlays": [{"name": "dcos", "subnet": "9.0.0.0/8", "prefix": 24}],
}


def small(**changes: Any) -> dict[str, Any]:
    return {**SMALL, **changes}


def one(**changes: Any) -> dict[str, Any]:
    """A configuration with one overlay that differs."""
    return small(overlays=[{"name": "dcos", "subnet": "9.0.0.0/8", "prefix": 24, **changes}])


def test_what_dcos_writes_is_read() -> None:
    assert read(json.loads(DCOS_JSON)) == DCOS
    assert (DCOS.vni, DCOS.port, DCOS.table, DCOS.device) == (1024, 64000, 42, "vtep1024")


def test_a_row_of_it_reads_back() -> None:
    assert schema.read(OverlayConfig, schema.rewrite(None, DCOS)) == DCOS


@pytest.mark.parametrize(
    "raw",
    [
        pytest.param(one(name="a" * 13), id="a name of 13 characters"),
        pytest.param(small(vtep_subnet="10.0.0.0/8"), id="the largest subnet of tunnel addresses"),
        pytest.param(small(vtep_mtu=1420), id="an MTU"),
        pytest.param(one(split="none"), id="one bridge for all runtimes"),
        pytest.param(one(prefix=29), id="blocks whose halves have one address to lease"),
        pytest.param(one(prefix=30, split="none"), id="blocks that are not halved may be smaller"),
        pytest.param(one(prefix=8), id="one block for one node"),
        pytest.param(
            {"vtep_subnet6": "fd01:a::/64", "overlays": [{"name": "six", "subnet6": "fd01:b::/64", "prefix6": 80}]},
            id="IPv6 only",
        ),
        pytest.param(
            small(
                overlays=[
                    *SMALL["overlays"],
                    {"name": "six", "subnet6": "fd01:b::/64", "prefix6": 80, "enabled": False},
                ]
            ),
            id="a disabled overlay needs no tunnel addresses of its family",
        ),
    ],
)
def test_what_can_work_is_taken(raw: dict[str, Any]) -> None:
    assert read(raw).overlays


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        pytest.param({"overlays": SMALL["overlays"]}, "neither vtep_subnet nor vtep_subnet6", id="no tunnel addresses"),
        pytest.param(small(vtep_subnet="0.0.0.0/7"), "/8 to /30", id="tunnel addresses that no MAC holds"),
        pytest.param(small(vtep_mac_oui="70:B3:D5:00:00:01"), "vtep_mac_oui", id="an OUI that is longer"),
        pytest.param(small(vtep_mac_oui="71:B3:D5:00:00:00"), "the first even", id="an OUI of groups"),
        pytest.param(small(overlays=[]), "at least one", id="no overlay"),
        pytest.param(small(overlays=SMALL["overlays"] * 2), "'dcos' is given twice", id="a name twice"),
        pytest.param(one(name="a" * 14), "longer than 13 characters", id="a name of 14 characters"),
        pytest.param(one(name="bridge"), "'bridge' is reserved", id="a reserved name"),
        pytest.param(one(name="a/b"), "not a valid name", id="a name that is no name"),
        pytest.param(one(prefix=7), "prefix 7 of overlay 'dcos' does not divide 9.0.0.0/8", id="prefix too short"),
        pytest.param(one(prefix=30), "does not divide", id="halves without room"),
        pytest.param(one(prefix=0), "does not divide", id="no prefix"),
        pytest.param(one(prefix6=80), "has prefix6 80, but no pool", id="a prefix without its pool"),
        pytest.param(small(overlays=[{"name": "x"}]), "neither subnet nor subnet6", id="no pool"),
        pytest.param(one(subnet6="fd01:b::/64", prefix6=80), "vtep_subnet6 is not given", id="a family without tunnel"),
        pytest.param(one(subnet="44.0.0.0/8"), "overlaps vtep_subnet", id="pool over the tunnel's addresses"),
        pytest.param(
            small(overlays=[*SMALL["overlays"], {"name": "b", "subnet": "9.9.0.0/16", "prefix": 24}]),
            "pool of overlay 'b' 9.9.0.0/16 overlaps pool of overlay 'dcos' 9.0.0.0/8",
            id="pools that overlap",
        ),
        pytest.param(small(vtep_mtu=551), "vtep_mtu 551", id="MTU too small"),
        pytest.param(small(vtep_mtu=1279, vtep_subnet6="fd01:a::/64"), "IPv6 needs 1280", id="MTU too small for IPv6"),
        pytest.param(one(split="third"), "half, none", id="unknown split"),
        pytest.param(one(subnet="9.0.0.1/8"), "host bits", id="no subnet"),
        pytest.param(small(vtep_subnett="x"), "unknown key", id="unknown key"),
        pytest.param(small(port=0), "port 0", id="no port"),
    ],
)
def test_a_mistake_is_named(raw: dict[str, Any], words: str) -> None:
    with pytest.raises(BadConfig, match="dcos_overlay_network") as caught:
        read(raw)
    assert words in caught.value.what


@pytest.mark.parametrize(
    ("link", "dst", "words"),
    [
        pytest.param("eth0", "9.1.0.0/16", "overlaps 9.1.0.0/16, which this host reaches through eth0", id="inside"),
        pytest.param("eth0", "8.0.0.0/7", "overlaps", id="around"),
        pytest.param("eth0", "0.0.0.0/0", "", id="a default route is everybody's"),
        pytest.param("eth0", "10.0.0.0/8", "", id="elsewhere"),
        pytest.param("m-dcos", "9.0.0.0/25", "", id="our bridge"),
        pytest.param("vtep1024", "9.0.1.0/24", "", id="our tunnel"),
        pytest.param("eth0", "fd01:b:0:0:1::/80", "pool of overlay 'dcos6'", id="IPv6"),
    ],
)
def test_a_pool_that_the_host_routes_already(link: str, dst: str, words: str) -> None:
    reason = host_route_in_the_way(DCOS, iter([(link, ip_network(dst))]))
    assert words in reason
    assert bool(reason) is bool(words)


def test_a_changed_record_is_checked_too() -> None:
    with pytest.raises(BadConfig, match="at least one"):
        replace(DCOS, overlays=())
