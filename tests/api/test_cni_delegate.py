"""Delegation: foreign IPAM plug-ins behind towpath-bridge, and DC/OS's mesos-cni-port-mapper."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from tests.api.cni_calls import NETNS, OTHER, Desk, bridge, make_desk
from towpath.model import Key, PortMap
from towpath.plan import Publish

HOST_LOCAL = Path("/usr/lib/cni/host-local")
KEY = Key("cni", "blue", "c1", "eth0")
ANSWER = {
    "cniVersion": "1.0.0",
    "ips": [{"address": "10.3.0.7/24"}],
    "routes": [{"dst": "0.0.0.0/0", "gw": "10.3.0.254"}],
    "dns": {"nameservers": ["10.3.0.53"]},
}
# Logs "<command> <container>" and its stdin; answers ADD with the file `answer`; fails at the command in `fail`.
SCRIPT = """#!/bin/sh
cd "${0%/*}"
echo "$CNI_COMMAND $CNI_CONTAINERID $CNI_NETNS" >> calls
cat > stdin.$CNI_COMMAND
if [ "$CNI_COMMAND" = "$(cat fail 2>/dev/null)" ]; then cat error; exit 3; fi
if [ "$CNI_COMMAND" = ADD ]; then cat answer; fi
if [ -e slow ]; then exec sleep 30; fi
"""


class Plugin:
    """A foreign plug-in in a folder of its own."""

    def __init__(self, folder: Path, name: str = "theirs") -> None:
        self.folder = folder
        (folder / name).write_text(SCRIPT)
        (folder / name).chmod(0o755)
        self.answers(ANSWER)

    def answers(self, body: Any) -> None:
        (self.folder / "answer").write_text(body if isinstance(body, str) else json.dumps(body))

    def fails(self, command: str, printed: str) -> None:
        (self.folder / "fail").write_text(command)
        (self.folder / "error").write_text(printed)

    @property
    def calls(self) -> list[str]:
        place = self.folder / "calls"
        return [line.split()[0] for line in place.read_text().splitlines()] if place.exists() else []

    def stdin(self, command: str) -> Any:
        return json.loads((self.folder / f"stdin.{command}").read_text())


@pytest.fixture
def plugin(tmp_path: Path) -> Plugin:
    return Plugin(tmp_path)


@pytest.fixture
async def desk(plugin: Plugin) -> Desk:
    desk = await make_desk()
    desk.env["PATH"] = f"/nonexistent:{plugin.folder}"
    return desk


def foreign(version: str | None = "1.1.0", **keys: Any) -> dict[str, Any]:
    return bridge(version, ipam={"type": "theirs", "extra": 1}, **keys)


async def test_a_foreign_ipam_gives_address_routes_and_dns(desk: Desk, plugin: Plugin) -> None:
    result = await desk.add("towpath-bridge", foreign())
    assert result["ips"] == [{"interface": 2, "address": "10.3.0.7/24", "gateway": "10.3.0.1"}]
    assert result["routes"] == ANSWER["routes"]
    assert result["dns"] == ANSWER["dns"]
    assert plugin.stdin("ADD") == foreign()  # the whole configuration
    assert desk.attacher.records[KEY].ipam == "theirs"
    assert ("blue0", "10.3.0.1/24") in {(name, str(address)) for name, address in desk.kernel.host.addresses}
    assert not any(row.startswith("leases/") for row in await desk.rows())


async def test_del_check_gc_and_status_are_passed_on(desk: Desk, plugin: Plugin) -> None:
    conf = foreign()
    conf["prevResult"] = await desk.add("towpath-bridge", conf)
    for command in ("CHECK", "STATUS", "GC", "DEL", "DEL"):
        more = {"cni.dev/valid-attachments": [{"containerID": "c1", "ifname": "eth0"}]}
        answer = await desk.call(command, "towpath-bridge", {**conf, **more})
        assert (answer.status, answer.stdout) == (0, b""), command
    assert plugin.calls == ["ADD", "CHECK", "STATUS", "GC", "DEL", "DEL"]
    assert await desk.rows() == set()


async def test_b14_ipam_del_is_run_when_the_add_fails_later(desk: Desk, plugin: Plugin) -> None:
    desk.kernel.add_link("eth0", netns=NETNS)
    assert (await desk.call("ADD", "towpath-bridge", foreign())).status == 1
    assert plugin.calls == ["ADD", "DEL"]
    assert await desk.rows() == set()


ERROR = json.dumps({"cniVersion": "1.0.0", "code": 77, "msg": "no room", "details": "try elsewhere"})
FAILURES = [
    pytest.param(ERROR, 77, "plugin theirs: no room", id="its own code and words"),
    pytest.param("Segmentation fault", 999, "status 3: Segmentation fault", id="text"),
    pytest.param("", 999, "no message", id="nothing"),
    pytest.param("[]", 999, "status 3", id="a list"),
    pytest.param('{"code": "x", "msg": ""}', 999, "status 3", id="a code that is none"),
]


@pytest.mark.parametrize(("printed", "code", "named"), FAILURES)
async def test_a_delegate_s_failure_is_told_in_its_words(
    desk: Desk, plugin: Plugin, printed: str, code: int, named: str
) -> None:
    plugin.fails("ADD", printed)
    answer = await desk.call("ADD", "towpath-bridge", foreign())
    assert (answer.code, named in answer.msg) == (code, True), answer.body
    assert (await desk.attacher.store.list("")).items == ()


@pytest.mark.parametrize(
    ("answer", "named"),
    [
        pytest.param("nonsense", "no JSON", id="no JSON"),
        pytest.param("7", "not a result", id="a number"),
        pytest.param({"cniVersion": "1.0.0"}, "missing IP", id="no address"),
        pytest.param({"ips": [{"address": "x/y"}]}, "result of theirs.ips[0].address", id="address is none"),
    ],
)
async def test_a_delegate_s_wrong_answer_is_refused_and_undone(
    desk: Desk, plugin: Plugin, answer: Any, named: str
) -> None:
    plugin.answers(answer)
    refused = await desk.call("ADD", "towpath-bridge", foreign())
    assert (refused.status, named in refused.msg) == (1, True), refused.body
    assert plugin.calls == ["ADD", "DEL"]
    assert (await desk.attacher.store.list("")).items == ()


async def test_b4_two_addresses_of_a_family_are_given_back_in_old_versions(desk: Desk, plugin: Plugin) -> None:
    plugin.answers({"ips": [{"address": "10.3.0.7/24"}, {"address": "10.4.0.7/24"}]})
    answer = await desk.call("ADD", "towpath-bridge", foreign("0.2.0"))
    assert (answer.code, "0.2.0" in answer.msg) == (7, True)
    assert plugin.calls == ["ADD", "DEL"]


async def test_a_delegate_that_fails_at_del_fails_the_del_after_our_own_part_is_done(
    desk: Desk, plugin: Plugin
) -> None:
    await desk.add("towpath-bridge", foreign())
    plugin.fails("DEL", ERROR)
    assert (await desk.call("DEL", "towpath-bridge", foreign())).code == 77
    assert await desk.rows() == set()


async def test_a_delegate_that_hangs_is_ended_at_the_deadline(desk: Desk, plugin: Plugin) -> None:
    (plugin.folder / "slow").touch()
    removing = asyncio.get_running_loop().call_later(0.3, (plugin.folder / "slow").unlink)
    env = {"CNI_COMMAND": "ADD", "CNI_CONTAINERID": "c1", "CNI_NETNS": NETNS, "CNI_IFNAME": "eth0"}
    env["CNI_PATH"] = str(plugin.folder)
    answer = await desk.raw("towpath-bridge", env, json.dumps(foreign()).encode(), deadline=0.5)
    removing.cancel()
    assert answer.code == 11
    assert plugin.calls == ["ADD", "DEL"]


@pytest.mark.skipif(not HOST_LOCAL.exists(), reason="no reference host-local on this machine")
@pytest.mark.parametrize("version", [None, "0.2.0", "0.3.1", "0.4.0", "1.0.0"])
async def test_the_reference_host_local_serves_as_delegate(tmp_path: Path, version: str | None) -> None:
    desk = await make_desk()
    desk.env["PATH"] = str(HOST_LOCAL.parent)
    ipam = {"type": "host-local", "dataDir": str(tmp_path), "subnet": "10.3.0.0/24", "routes": [{"dst": "0.0.0.0/0"}]}
    conf = bridge(version, ipam=ipam)
    result = await desk.add("towpath-bridge", conf)
    address = result["ip4"]["ip"] if "ip4" in result else result["ips"][0]["address"]
    assert address == "10.3.0.2/24"
    assert (tmp_path / "blue" / "10.3.0.2").exists()
    assert (await desk.call("DEL", "towpath-bridge", conf, NETNS="")).status == 0
    assert not (tmp_path / "blue" / "10.3.0.2").exists()


# --- mesos-cni-port-mapper -------------------------------------------------------------------------------------------

MAPPER = "mesos-cni-port-mapper"
MAPPINGS = [{"host_port": 31000, "container_port": 80}, {"host_port": 31001, "container_port": 53, "protocol": "udp"}]


def task(delegate: Any, mappings: Any = MAPPINGS, **keys: Any) -> dict[str, Any]:
    """UCR's input: a single-plugin file without cniVersion, NetworkInfo injected."""
    info = {
        "name": "blue",
        "ip_addresses": [{"protocol": "IPv4"}],
        "labels": {"labels": [{"key": "VIP_0", "value": "web:80"}]},
        "port_mappings": mappings,
    }
    conf = {
        "name": "blue",
        "type": MAPPER,
        "chain": "UCR-DEFAULT-BRIDGE",
        "excludeDevices": ["blue0"],
        "delegate": delegate,
        "args": {"org.apache.mesos": {"network_info": info}},
        **keys,
    }
    return {key: value for key, value in conf.items() if value is not None}


OURS = {
    "type": "towpath-bridge",
    "bridge": "blue0",
    "isDefaultGateway": True,
    "ipMasq": True,
    "hairpinMode": True,
    "ipam": {"type": "towpath-ipam", "subnet": "172.31.254.0/24"},
}


def published(desk: Desk) -> set[tuple[PortMap, str]]:
    return {(rule.port, str(rule.to)) for rule in desk.kernel.rules if isinstance(rule, Publish)}


async def test_a_delegate_of_ours_is_served_in_process_and_answers_in_the_old_form(desk: Desk, plugin: Plugin) -> None:
    result = await desk.add(MAPPER, task(OURS))
    assert result == {
        "cniVersion": "0.1.0",
        "ip4": {
            "ip": "172.31.254.2/24",
            "gateway": "172.31.254.1",
            "routes": [{"dst": "0.0.0.0/0", "gw": "172.31.254.1"}],
        },
        "dns": {},
    }
    ports = {(PortMap(31000, 80), "172.31.254.2"), (PortMap(31001, 53, "udp"), "172.31.254.2")}
    assert published(desk) == ports
    assert desk.attacher.records[KEY].labels == (("VIP_0", "web:80"),)
    env = {"CNI_COMMAND": "DEL", "CNI_CONTAINERID": "c1", "CNI_IFNAME": "eth0", "CNI_PATH": "/nowhere"}
    for _ in range(2):  # after a reboot UCR sends no CNI_NETNS
        answer = await desk.raw(MAPPER, env, json.dumps(task(OURS)).encode())
        assert (answer.status, answer.stdout) == (0, b"")
    assert await desk.rows() == set()
    assert plugin.calls == []


async def test_a_foreign_delegate_gets_its_own_object_with_name_and_args(desk: Desk, plugin: Plugin) -> None:
    plugin.answers({"ip4": {"ip": "10.3.0.7/24"}, "dns": {}})
    delegate = {"type": "theirs", "bridge": "b0"}
    conf = task(delegate)
    assert await desk.add(MAPPER, conf) == {"ip4": {"ip": "10.3.0.7/24"}, "dns": {}}
    assert plugin.stdin("ADD") == {**delegate, "name": "blue", "args": conf["args"]}
    assert {port for port, _ in published(desk)} == {PortMap(31000, 80), PortMap(31001, 53, "udp")}
    assert (await desk.call("DEL", MAPPER, conf, NETNS="")).status == 0
    assert plugin.calls == ["ADD", "DEL"]
    assert published(desk) == set()
    assert await desk.rows() == set()


async def test_without_port_mappings_a_foreign_delegate_is_all_there_is(desk: Desk, plugin: Plugin) -> None:
    plugin.answers({"ip4": {"ip": "10.3.0.7/24"}})
    await desk.add(MAPPER, task({"type": "theirs"}, mappings=[], args=None))
    assert desk.kernel.log == []
    assert desk.attacher.records == {}


async def test_a_port_in_use_undoes_the_delegate(desk: Desk, plugin: Plugin) -> None:
    plugin.answers({"ip4": {"ip": "10.3.0.7/24"}})
    await desk.add(MAPPER, task({"type": "theirs"}))
    answer = await desk.call("ADD", MAPPER, task({"type": "theirs"}), container="c2", NETNS=OTHER)
    assert (answer.code, "cni/blue/c1/eth0" in answer.msg) == (103, True)
    assert plugin.calls == ["ADD", "ADD", "DEL"]


@pytest.mark.parametrize(
    ("conf", "code", "named"),
    [
        pytest.param(task(None), 101, "delegate", id="no delegate"),
        pytest.param(task({}), 101, "type", id="delegate without type"),
        pytest.param(task(OURS, chain=None), 101, "chain", id="no chain"),
        pytest.param(task(OURS, chain="X" * 29), 101, "chain", id="chain name too long"),
        pytest.param(task(OURS, excludeDevices="x"), 101, "excludeDevices", id="devices are text"),
        pytest.param(task({"type": MAPPER}), 101, "itself", id="delegates to itself"),
        pytest.param(task({"type": "absent"}), 101, "'absent'", id="delegate is not in CNI_PATH"),
        pytest.param(task({**OURS, "cniVersion": "7"}), 101, "incompatible", id="delegate's version"),
        pytest.param(task(OURS, mappings=[{"host_port": 0, "container_port": 1}]), 101, "hostPort 0", id="host port 0"),
        pytest.param(task(OURS, mappings=[{"host_port": "1"}]), 101, 'host_port "1"', id="host port is text"),
        pytest.param(task({"type": "theirs"}), 102, "no room", id="the delegate fails"),
    ],
)
async def test_the_port_mapper_s_own_error_codes(
    desk: Desk, plugin: Plugin, conf: dict[str, Any], code: int, named: str
) -> None:
    plugin.fails("ADD", ERROR)
    answer = await desk.call("ADD", MAPPER, conf)
    assert (answer.code, named in answer.msg) == (code, True), answer.body
    assert answer.body["cniVersion"] == "0.3.0"
    assert await desk.rows() == set()
    assert desk.kernel.log == []


async def test_an_unknown_command_and_a_cut_request_have_codes_of_their_own(desk: Desk) -> None:
    answer = await desk.raw(MAPPER, {"CNI_COMMAND": "PAINT"}, b"{}")
    assert answer.code == 104
    answer = await desk.raw(MAPPER, {"CNI_COMMAND": "ADD"}, b"{}")
    assert (answer.code, "CNI_CONTAINERID" in answer.msg) == (101, True)


async def test_the_port_mapper_checks_collects_and_tells_its_status(desk: Desk, plugin: Plugin) -> None:
    conf = {**task({**OURS, "cniVersion": "1.1.0"}), "cniVersion": "1.1.0"}
    result = await desk.add(MAPPER, conf)
    assert result["cniVersion"] == "1.1.0"
    assert (await desk.call("CHECK", MAPPER, {**conf, "prevResult": result})).status == 0
    assert (await desk.call("STATUS", MAPPER, conf)).status == 0
    desk.kernel.rules.clear()
    assert (await desk.call("CHECK", MAPPER, {**conf, "prevResult": result})).code == 103
    keep = [{"containerID": "c1", "ifname": "eth0"}]
    assert (await desk.call("GC", MAPPER, {**conf, "cni.dev/valid-attachments": keep})).status == 0
    assert len(desk.attacher.records) == 1
    assert (await desk.call("GC", MAPPER, {**conf, "cni.dev/valid-attachments": []})).status == 0
    assert await desk.rows() == set()
