"""What the refusals, edits and STATUS answers of a network's configuration leave, and what they say."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from tests.api.cni_calls import OTHER, SUBNET, Desk, bridge, make_desk
from towpath.api.cni.server import failure
from towpath.errors import Unavailable
from towpath.model import Network

PORTS = {"portMappings": [{"hostPort": 8080, "containerPort": 80}]}
TWICE = {"portMappings": [{"hostPort": 8080, "containerPort": 80}, {"hostPort": 8080, "containerPort": 81}]}


@pytest.fixture
async def desk() -> Desk:
    return await make_desk()


def devices(desk: Desk) -> set[str]:
    return set(desk.kernel.host.links)


# --- a refused ADD ---------------------------------------------------------------------------------------------------

REFUSED: list[tuple[str, dict[str, Any]]] = [
    ("towpath-bridge", bridge(bridge="eth0")),
    ("towpath-bridge", bridge(runtimeConfig=TWICE)),
    ("towpath-bridge", bridge(runtimeConfig={"ips": ["10.9.0.255"]})),
    ("towpath-ipam", bridge(runtimeConfig={"ips": ["10.9.0.7", "10.9.0.8"]})),
]


@pytest.mark.parametrize(
    ("plugin", "conf"), REFUSED, ids=["name taken", "port twice", "broadcast address", "two addresses of one pool"]
)
async def test_the_first_add_of_a_network_leaves_neither_row_nor_bridge_where_it_is_refused(
    desk: Desk, plugin: str, conf: dict[str, Any]
) -> None:
    before = desk.kernel.state
    answer = await desk.call("ADD", plugin, conf)
    assert answer.code == 7
    assert (desk.attacher.networks.rows, desk.kernel.state, await desk.rows()) == ({}, before, set())
    assert not (await desk.attacher.store.list("networks/")).items


async def test_a_refused_add_leaves_a_network_that_others_use(desk: Desk) -> None:
    await desk.add("towpath-bridge", bridge())
    before = desk.kernel.state
    assert (await desk.call("ADD", "towpath-bridge", bridge(runtimeConfig=TWICE), container="c2", NETNS=OTHER)).code
    assert (set(desk.attacher.networks.rows), desk.kernel.state) == ({"blue"}, before)


async def test_a_refused_add_leaves_a_row_that_was_there_unused(desk: Desk) -> None:
    await desk.attacher.create_network(Network("blue", bridge="blue0", source="cli"))
    answer = await desk.call("ADD", "towpath-bridge", bridge(ipam={}, isGateway=False, runtimeConfig=PORTS))
    assert (answer.code, set(desk.attacher.networks.rows)) == (7, {"blue"})


async def test_a_refused_edit_puts_the_row_of_an_unused_network_back(desk: Desk) -> None:
    await desk.add("towpath-bridge", bridge())
    await desk.call("DEL", "towpath-bridge", bridge())
    row = desk.attacher.networks.rows["blue"]
    assert (await desk.call("ADD", "towpath-bridge", bridge(bridge="eth0"))).code == 7
    assert desk.attacher.networks.rows == {"blue": row}
    await desk.add("towpath-bridge", bridge())


# --- an edited configuration -----------------------------------------------------------------------------------------


async def test_an_unused_network_may_change_its_subnet_and_its_bridge_takes_the_new_gateway(desk: Desk) -> None:
    await desk.add("towpath-bridge", bridge())
    await desk.call("DEL", "towpath-bridge", bridge())
    await desk.add("towpath-bridge", bridge(ipam={**SUBNET, "subnet": "10.8.0.0/24"}))
    assert {str(a) for name, a in desk.kernel.host.addresses if name == "blue0"} == {"10.8.0.1/24"}


async def test_an_unused_network_that_moves_to_another_bridge_takes_its_old_one_away(desk: Desk) -> None:
    await desk.add("towpath-bridge", bridge())
    await desk.call("DEL", "towpath-bridge", bridge())
    await desk.add("towpath-bridge", bridge(bridge="green0"))
    assert devices(desk) & {"blue0", "green0"} == {"green0"}


async def test_a_bridge_that_is_not_of_our_making_stays_when_its_network_moves(desk: Desk) -> None:
    desk.kernel.add_link("blue0", "bridge")
    await desk.add("towpath-bridge", bridge())
    await desk.call("DEL", "towpath-bridge", bridge())
    await desk.add("towpath-bridge", bridge(bridge="green0"))
    assert {"blue0", "green0"} <= devices(desk)


async def test_a_network_in_use_keeps_its_keys_and_the_error_names_both_values(desk: Desk) -> None:
    await desk.add("towpath-bridge", bridge())
    before = desk.kernel.state
    routed = bridge(ipam={**SUBNET, "routes": [{"dst": "10.0.0.0/8", "gw": "10.9.0.9"}]})
    answer = await desk.call("ADD", "towpath-bridge", routed, container="c2", NETNS=OTHER)
    assert (answer.code, "[]" in answer.msg, "[10.0.0.0/8 via 10.9.0.9]" in answer.msg) == (7, True, True)
    assert desk.kernel.state == before


async def test_the_gc_of_a_network_leaves_a_bridge_with_somebody_else_s_port(desk: Desk) -> None:
    conf = bridge("1.1.0")
    await desk.add("towpath-bridge", conf)
    desk.kernel.host.links["vm0"] = replace(desk.kernel.add_link("vm0", "tun"), master="blue0")
    gone = {**conf, "cni.dev/valid-attachments": []}
    assert (await desk.call("GC", "towpath-bridge", gone)).status == 0
    assert ("blue0" in devices(desk), desk.attacher.networks.rows) == (True, {})


# --- STATUS ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("plugin", ["towpath-bridge", "towpath-ipam"])
async def test_status_fails_where_the_configuration_names_no_ranges(desk: Desk, plugin: str) -> None:
    conf = bridge("1.1.0", ipam={"type": "towpath-ipam"})
    status, add = await desk.call("STATUS", plugin, conf), await desk.call("ADD", plugin, conf)
    assert (status.code, status.msg) == (7, add.msg)
    assert "ipam.ranges" in status.msg


async def test_status_says_50_where_the_bridge_has_another_gateway(desk: Desk) -> None:
    await desk.add("towpath-bridge", bridge())
    conf = {**bridge("1.1.0", ipam={**SUBNET, "subnet": "10.8.0.0/24"}), "name": "red"}
    status = await desk.call("STATUS", "towpath-bridge", conf)
    assert (status.code, "already has an IP address different from" in status.msg) == (50, True)
    assert set(desk.attacher.networks.rows) == {"blue"}


async def test_status_of_an_unknown_network_does_not_decide_its_pools(desk: Desk) -> None:
    wide, narrow = bridge("1.1.0"), bridge("1.1.0", ipam={**SUBNET, "subnet": "10.8.0.0/24"})
    assert (await desk.call("STATUS", "towpath-bridge", wide)).status == 0
    assert [ip["address"] for ip in (await desk.add("towpath-bridge", narrow))["ips"]] == ["10.8.0.2/24"]


@pytest.mark.parametrize(("command", "code"), [("STATUS", 50), ("ADD", 11)])
def test_a_call_that_could_not_be_begun_is_50_for_status_and_try_again_for_the_rest(command: str, code: int) -> None:
    assert json.loads(failure("towpath-bridge", Unavailable("no agent"), command))["code"] == code


# --- words -----------------------------------------------------------------------------------------------------------


async def test_an_error_to_a_configuration_without_version_is_in_the_form_that_it_means(desk: Desk) -> None:
    for conf in (bridge(None, mtu="x"), bridge("", mtu="x"), {"type": "towpath-bridge"}):
        assert (await desk.call("ADD", "towpath-bridge", conf)).body["cniVersion"] == "0.1.0"
    assert (await desk.raw("towpath-bridge", {}, b"")).body["cniVersion"] == "1.1.0"


async def test_a_wrong_host_address_of_a_port_is_named_once(desk: Desk) -> None:
    ports = {"portMappings": [{"hostPort": 80, "containerPort": 80, "hostIP": "x"}]}
    answer = await desk.call("ADD", "towpath-bridge", bridge(runtimeConfig=ports))
    assert answer.msg == 'runtimeConfig.portMappings[0].hostIP "x" is not an IP address'
