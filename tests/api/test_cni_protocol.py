"""The door: environment, stdin, JSON, name and version are refused in the reference's order, and nothing is changed."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.api.cni_calls import NETNS, OTHER, SPEC_CODES, SUBNET, Answer, Desk, bridge, make_desk, pack
from tests.fakes import HOST_ID
from towpath.api.cni import HANDLERS, serve_cni
from towpath.api.cni.env import read_args, split_body
from towpath.errors import BadEnvironment
from towpath.plan import AddVeth

GOOD = {
    "CNI_COMMAND": "ADD",
    "CNI_CONTAINERID": "c1",
    "CNI_NETNS": NETNS,
    "CNI_IFNAME": "eth0",
    "CNI_PATH": "/nowhere",
}


@pytest.fixture
async def desk() -> Desk:
    return await make_desk()


def without(*names: str) -> dict[str, str]:
    return {key: value for key, value in GOOD.items() if key not in names}


ENVIRONMENTS = [
    pytest.param(without("CNI_COMMAND"), 4, "CNI_COMMAND", id="no command"),
    pytest.param({**GOOD, "CNI_COMMAND": "PAINT"}, 4, "PAINT", id="unknown command"),
    pytest.param(without("CNI_CONTAINERID", "CNI_NETNS"), 4, "CNI_CONTAINERID,CNI_NETNS", id="all missing are named"),
    pytest.param(without("CNI_PATH"), 4, "CNI_PATH", id="CNI_PATH is required"),
    pytest.param({"CNI_COMMAND": "GC"}, 4, "CNI_PATH", id="CNI_PATH is required of GC too"),
    pytest.param({**GOOD, "CNI_CONTAINERID": "-x"}, 4, "'-x'", id="container id starts with a dash"),
    pytest.param({**GOOD, "CNI_CONTAINERID": "a/b"}, 4, "'a/b'", id="container id with a slash"),
    pytest.param({**GOOD, "CNI_CONTAINERID": "a\n"}, 4, "CNI_CONTAINERID", id="container id ends with a newline"),
    pytest.param({**GOOD, "CNI_IFNAME": "sixteen-letters."}, 4, "15 bytes", id="interface name too long"),
    pytest.param({**GOOD, "CNI_IFNAME": ".."}, 4, "CNI_IFNAME", id="interface name is two dots"),
    pytest.param({**GOOD, "CNI_IFNAME": "a/b"}, 4, "'a/b'", id="interface name with a slash"),
    pytest.param({**GOOD, "CNI_IFNAME": "a:1"}, 4, "'a:1'", id="interface name with a colon"),
    pytest.param({**GOOD, "CNI_IFNAME": "a b"}, 4, "'a b'", id="interface name with a space"),
    pytest.param({**GOOD, "CNI_ARGS": "novalue"}, 4, "'novalue'", id="CNI_ARGS without equals sign"),
    pytest.param({**GOOD, "CNI_ARGS": "FOO=1"}, 4, "FOO", id="unknown CNI_ARGS key"),
    pytest.param({**GOOD, "CNI_NETNS": "/run/netns/none"}, 8, "/run/netns/none", id="netns is not there"),
]


@pytest.mark.parametrize(("env", "code", "named"), ENVIRONMENTS)
async def test_a_malformed_environment_is_refused_by_name(
    desk: Desk, env: dict[str, str], code: int, named: str
) -> None:
    answer = await desk.raw("towpath-bridge", env, json.dumps(bridge()).encode())
    assert (answer.status, answer.code) == (1, code)
    assert named in answer.msg
    assert desk.kernel.log == []
    assert await desk.rows() == set()


STDINS = [
    pytest.param(b"", 6, "JSON", id="nothing"),
    pytest.param(b"{", 6, "JSON", id="half an object"),
    pytest.param(b"\xff\xfe{}", 6, "JSON", id="no UTF-8"),
    pytest.param(b"[1]", 6, "[1]", id="a list"),
    pytest.param(b"null", 6, "null", id="null"),
    pytest.param(b'{"name": NaN}', 6, "NaN", id="NaN"),
    pytest.param(b'{"name": "\\ud800"}', 6, "JSON", id="half a surrogate pair"),
    pytest.param(b"[" * 100000, 6, "JSON", id="nested too deep"),
    pytest.param(b"{}", 7, "name", id="no name"),
    pytest.param(b'{"name": ""}', 7, "name", id="empty name"),
    pytest.param(b'{"name": 7}', 6, "name 7", id="name is a number"),
    pytest.param(b'{"name": "a b"}', 7, "'a b'", id="name with a space"),
    pytest.param(b'{"name": "a", "cniVersion": 1}', 6, "cniVersion 1", id="version is a number"),
    pytest.param(b'{"name": "a", "cniVersion": "9.9.9"}', 1, "incompatible", id="unknown version"),
    pytest.param(b'{"name": "a b", "cniVersion": "9.9.9"}', 7, "'a b'", id="the name is judged before the version"),
]


@pytest.mark.parametrize(("stdin", "code", "named"), STDINS)
async def test_malformed_input_is_refused_with_the_spec_s_code(desk: Desk, stdin: bytes, code: int, named: str) -> None:
    answer = await desk.raw("towpath-bridge", GOOD, stdin)
    assert (answer.status, answer.code) == (1, code)
    assert named in answer.msg
    assert await desk.rows() == set()


async def test_the_environment_is_judged_before_the_input(desk: Desk) -> None:
    assert (await desk.raw("towpath-bridge", without("CNI_PATH"), b"{")).code == 4


async def test_a_request_that_is_cut_short_is_code_5(desk: Desk) -> None:
    status, stdout = await serve_cni(desk.attacher, desk.kernel, b"CNI_COMMAND=ADD", "towpath-bridge", "")
    assert (status, Answer(status, stdout).code) == (1, 5)


async def test_an_unsupported_version_says_what_is_supported(desk: Desk) -> None:
    body = (await desk.raw("towpath-bridge", GOOD, b'{"name": "a", "cniVersion": "0.9.0"}')).body
    assert body["cniVersion"] == "1.1.0"
    assert '"0.9.0"' in body["details"]
    assert "0.1.0" in body["details"]


@pytest.mark.parametrize(
    ("command", "version"),
    [
        pytest.param("CHECK", "0.3.1", id="CHECK came with 0.4.0"),
        pytest.param("GC", "1.0.0", id="GC came with 1.1.0"),
        pytest.param("STATUS", "1.0.0", id="STATUS came with 1.1.0"),
    ],
)
async def test_a_verb_needs_the_version_that_brought_it(desk: Desk, command: str, version: str) -> None:
    answer = await desk.call(command, "towpath-bridge", bridge(version))
    assert (answer.code, answer.body["cniVersion"]) == (1, version)


@pytest.mark.parametrize(
    ("env", "plugin", "code"),
    [
        pytest.param({}, "towpath-bridge", 8, id="refused before any work"),
        pytest.param({"OVERRIDE": "TRUE"}, "towpath-bridge", 0, id="CNI_NETNS_OVERRIDE lets it pass"),
        pytest.param({}, "towpath-host", 0, id="towpath-host is exempt"),
    ],
)
async def test_the_agent_s_own_namespace(desk: Desk, env: dict[str, str], plugin: str, code: int) -> None:
    desk.kernel.add_netns("/proc/1/ns/net")
    desk.kernel.netns["/proc/1/ns/net"].id = HOST_ID
    conf = {**bridge(), "type": plugin}
    more = {"NETNS_OVERRIDE": env["OVERRIDE"]} if env else {}
    answer = await desk.call("ADD", plugin, conf, NETNS="/proc/1/ns/net", **more)
    assert answer.code == code, answer.msg
    if code:
        assert desk.kernel.log == []


async def test_version_is_answered_whatever_the_environment_and_input_are(desk: Desk) -> None:
    answer = await desk.raw("towpath-bridge", {"CNI_COMMAND": "VERSION", "CNI_NETNS": "dummy"}, b"dummy")
    assert answer.body == {
        "cniVersion": "1.1.0",
        "supportedVersions": ["0.1.0", "0.2.0", "0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"],
    }
    answer = await desk.raw("towpath-bridge", {"CNI_COMMAND": "VERSION"}, b'{"cniVersion": "0.4.0"}')
    assert answer.body["cniVersion"] == "0.4.0"


async def test_the_type_of_the_configuration_names_the_plugin_where_the_executable_does_not(desk: Desk) -> None:
    assert (await desk.call("ADD", "", bridge())).status == 0
    answer = await desk.call("ADD", "", bridge(type="nonsense"))
    assert (answer.code, "'nonsense'" in answer.msg) == (7, True)


def test_unknown_args_pass_where_ignore_unknown_is_true() -> None:
    args = read_args("IgnoreUnknown=1;K8S_POD_NAME=web;FOO=x=y")
    assert (args["K8S_POD_NAME"], args["FOO"]) == ("web", "x=y")
    with pytest.raises(BadEnvironment, match="FOO"):
        read_args("IgnoreUnknown=0;FOO=1")
    assert read_args("K8S_POD_NAMESPACE=a;IP=10.0.0.1;") == {"K8S_POD_NAMESPACE": "a", "IP": "10.0.0.1"}


async def test_del_does_not_trip_over_args(desk: Desk) -> None:
    await desk.add("towpath-bridge", bridge())
    assert (await desk.call("DEL", "towpath-bridge", bridge(), ARGS="FOO=1;x")).status == 0
    assert await desk.rows() == set()


@pytest.mark.parametrize(
    ("body", "want"),
    [
        pytest.param(b"\0{}", ({}, b"{}"), id="no variable"),
        pytest.param(b"A=1\0\0{}", ({"A": "1"}, b"{}"), id="one variable"),
        pytest.param(b"A=1\0B=x=y\0\0", ({"A": "1", "B": "x=y"}, b""), id="equals sign in a value, no stdin"),
        pytest.param(b"A=\0\0a\0\0b", ({"A": ""}, b"a\0\0b"), id="zero bytes in stdin are its own"),
    ],
)
def test_body_is_split(body: bytes, want: tuple[dict[str, str], bytes]) -> None:
    assert split_body(body) == want


async def test_a_deadline_puts_everything_back(desk: Desk) -> None:
    class Slow:
        def __init__(self, kernel: Any) -> None:
            self.kernel = kernel

        async def __call__(self, plan: Any) -> None:
            await apply(plan)
            if any(isinstance(op, AddVeth) for phase in plan for op in phase.ops):
                await asyncio.sleep(0.3)

    apply = desk.kernel.apply
    desk.kernel.apply = Slow(desk.kernel)  # type: ignore[method-assign]
    answer = await desk.raw("towpath-bridge", GOOD, json.dumps(bridge()).encode(), deadline=0.05)
    assert answer.code == 11
    assert await desk.rows() == set()
    assert desk.kernel.netns[NETNS].links.keys() == {"lo"}


async def test_a_bug_of_ours_is_code_999_and_still_json(desk: Desk) -> None:
    async def broken(plan: Any) -> None:
        raise KeyError("oops")

    desk.kernel.apply = broken  # type: ignore[method-assign]
    answer = await desk.call("ADD", "towpath-loopback", {"name": "lo", "cniVersion": "1.0.0"})
    assert (answer.code, "oops" in answer.msg) == (999, True)


# --- whatever is sent ------------------------------------------------------------------------------------------------

WORDS = """
    name cniVersion type ipam bridge isGateway mtu vlan vlanTrunk dns args cni runtimeConfig prevResult ips subnet
    ranges routes dst gw address interfaces interface sandbox portMappings hostPort containerPort protocol hostIP
    bandwidth ingressRate ingressBurst sysctl mac network isolation delegate chain cni.dev/valid-attachments ip4 ip
    containerID ifname promisc conditionsV4 aliases labels org.apache.mesos network_info port_mappings
"""
KEYS = st.sampled_from(WORDS.split())
TEXTS = st.sampled_from(
    [
        "",
        "a",
        "blue",
        "1.0.0",
        "0.1.0",
        "1.1.0",
        "10.0.0.0/24",
        "10.0.0.5",
        "fd00::/64",
        "::1/128",
        "towpath-ipam",
        "tcp",
    ]
) | st.text(max_size=6)
LEAVES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXTS
VALUES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4), max_leaves=12
)
CONFS = st.dictionaries(KEYS, VALUES, max_size=8)
COMMANDS = st.sampled_from(["ADD", "DEL", "CHECK", "GC", "STATUS"])


async def answer_of(plugin: str, command: str, stdin: bytes) -> Answer:
    desk = await make_desk()
    return await desk.raw(plugin, {**GOOD, "CNI_COMMAND": command, "CNI_NETNS": OTHER}, stdin)


def check_answer(answer: Answer, command: str) -> None:
    if answer.status == 0:
        assert (answer.stdout != b"") == (command == "ADD")
        return
    assert answer.status == 1
    # 999 is the code of what the kernel refuses (a link that is not there, say), never of a fault of ours.
    assert answer.code in SPEC_CODES or answer.msg.startswith("kernel refused"), answer.body
    assert {"cniVersion", "code", "msg"} <= answer.body.keys()
    assert answer.msg


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(plugin=st.sampled_from(sorted(HANDLERS)), command=COMMANDS, conf=CONFS, named=st.booleans())
def test_no_json_gets_anything_but_a_result_or_an_error_of_the_spec(
    plugin: str, command: str, conf: dict[str, Any], named: bool
) -> None:
    if named:
        conf = {**conf, "name": "blue", "cniVersion": "1.1.0"}
    check_answer(asyncio.run(answer_of(plugin, command, json.dumps(conf).encode())), command)


PREVIOUS = {
    "interfaces": [{"name": "br0"}, {"name": "eth0", "sandbox": OTHER, "mac": "02:00:00:00:00:07"}],
    "ips": [{"address": "10.1.0.5/24", "gateway": "10.1.0.1", "interface": 1}],
    "routes": [{"dst": "0.0.0.0/0"}],
    "dns": {"nameservers": ["10.1.0.1"]},
}
WHOLE: dict[str, Any] = {
    **bridge("1.1.0"),
    "ipam": {
        **SUBNET,
        "rangeStart": "10.9.0.9",
        "routes": [{"dst": "0.0.0.0/0", "gw": "10.9.0.1"}],
        "dataDir": "/none",
    },
    "mtu": 1400,
    "vlan": 7,
    "vlanTrunk": [{"minID": 2, "maxID": 3}],
    "dns": {"nameservers": ["1.1.1.1"]},
    "isolation": "same-network",
    "sysctl": {"net.ipv4.conf.IFNAME.log_martians": "1"},
    "chain": "UCR",
    "excludeDevices": ["br0"],
    "delegate": {"type": "towpath-bridge", "bridge": "ucr0", "ipam": {"type": "towpath-ipam", "subnet": "10.8.0.0/24"}},
    "args": {
        "cni": {"ips": ["10.9.0.5"], "labels": [{"key": "a", "value": "b"}], "mac": "02:00:00:00:00:09"},
        "org.apache.mesos": {"network_info": {"port_mappings": [{"host_port": 81, "container_port": 80}]}},
    },
    "runtimeConfig": {
        "portMappings": [{"hostPort": 8080, "containerPort": 80, "protocol": "tcp", "hostIP": "192.0.2.1"}],
        "bandwidth": {"ingressRate": 1000, "ingressBurst": 1000},
        "ipRanges": [[{"subnet": "10.7.0.0/24"}]],
        "aliases": ["web"],
        "dns": {"servers": ["1.1.1.1"]},
    },
    "prevResult": PREVIOUS,
    "cni.dev/valid-attachments": [{"containerID": "c2", "ifname": "eth0"}],
}


@st.composite
def damaged(draw: st.DrawFn) -> dict[str, Any]:
    """A configuration that uses every key, with one to three of its values, however deep, changed or gone."""
    conf: Any = json.loads(json.dumps(WHOLE))
    for _ in range(draw(st.integers(1, 3))):
        inside = conf
        while True:
            where = draw(st.sampled_from(sorted(inside) if isinstance(inside, dict) else range(len(inside))))
            if not isinstance(inside[where], dict | list) or not inside[where] or draw(st.booleans()):
                break
            inside = inside[where]
        if draw(st.integers(0, 4)):
            inside[where] = draw(VALUES)
        else:
            del inside[where]
        if not conf:
            break
    return dict(conf)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(plugin=st.sampled_from(sorted(HANDLERS)), command=COMMANDS, conf=damaged())
def test_a_damaged_configuration_gets_a_result_or_an_error_of_the_spec(
    plugin: str, command: str, conf: dict[str, Any]
) -> None:
    check_answer(asyncio.run(answer_of(plugin, command, json.dumps(conf).encode())), command)


@settings(max_examples=60, deadline=None)
@given(plugin=st.sampled_from(sorted(HANDLERS)), command=COMMANDS, stdin=st.binary(max_size=60))
def test_no_bytes_get_anything_but_an_error_of_the_spec(plugin: str, command: str, stdin: bytes) -> None:
    check_answer(asyncio.run(answer_of(plugin, command, stdin)), command)


@settings(max_examples=60, deadline=None)
@given(body=st.binary(max_size=80))
def test_no_request_body_gets_anything_but_an_error_of_the_spec(body: bytes) -> None:
    async def ask() -> Answer:
        desk = await make_desk()
        return Answer(*await serve_cni(desk.attacher, desk.kernel, body, "towpath-bridge", ""))

    check_answer(asyncio.run(ask()), "ADD")


@settings(max_examples=60, deadline=None)
@given(
    container=st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=18),
    ifname=st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=18),
    args=st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=18),
)
def test_no_environment_gets_anything_but_a_result_or_an_error_of_the_spec(
    container: str, ifname: str, args: str
) -> None:
    async def ask() -> Answer:
        desk = await make_desk()
        env = {**GOOD, "CNI_CONTAINERID": container, "CNI_IFNAME": ifname, "CNI_ARGS": args}
        return Answer(*await serve_cni(desk.attacher, desk.kernel, pack(env, json.dumps(bridge()).encode()), "", ""))

    check_answer(asyncio.run(ask()), "ADD")
