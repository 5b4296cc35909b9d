"""Faults from outside: bad input, kill -9 of agent and executable, a full disk, two agents, two runtimes' GC."""

from __future__ import annotations

import contextlib
import os
import random
import re
import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from integration.callers import Json, Runtime, encode, variables
from integration.lab import TOWPATH, Container, Host, links
from integration.networks import REFERENCE, Net, new_net
from integration.runtimes import lacks
from integration.sockets import reaches
from integration.traces import picture

pytestmark = pytest.mark.skipif(REFERENCE, reason="about the agent")

CYCLES = int(os.environ.get("TOWPATH_CYCLES", "50"))
SEED = int(os.environ.get("TOWPATH_SEED", "0")) or random.SystemRandom().randrange(1, 2**31)
RESULT = {"cniVersion": "1.0.0", "interfaces": [], "ips": []}


def config(net: Net, **keys: Any) -> Json:
    return {"cniVersion": "1.0.0", "name": net.name, **net.wire(), **keys}


def ipam(net: Net, **keys: Any) -> Json:
    return {"ipam": {"type": "towpath-ipam", "subnet": net.subnet, **keys}}


def ports(**keys: Any) -> Json:
    mapping = {"hostPort": 8080, "containerPort": 80, "protocol": "tcp", **keys}
    return {"runtimeConfig": {"portMappings": [mapping]}}


# (id, change of the environment, change of the configuration, code, words of the message)
BAD_ENV: list[tuple[str, Json, int, str]] = [
    ("unknown command", {"CNI_COMMAND": "EAT"}, 4, "EAT"),
    ("no container id", {"CNI_CONTAINERID": ""}, 4, "CNI_CONTAINERID"),
    ("wrong container id", {"CNI_CONTAINERID": "-x"}, 4, "CNI_CONTAINERID"),
    ("no interface name", {"CNI_IFNAME": ""}, 4, "CNI_IFNAME"),
    ("interface name too long", {"CNI_IFNAME": "sixteen-letters-"}, 4, "CNI_IFNAME"),
    ("interface name with a slash", {"CNI_IFNAME": "a/b"}, 4, "CNI_IFNAME"),
    ("interface name ..", {"CNI_IFNAME": ".."}, 4, "CNI_IFNAME"),
    ("no namespace", {"CNI_NETNS": ""}, 4, "CNI_NETNS"),
    ("no path", {"CNI_PATH": ""}, 4, "CNI_PATH"),
    ("a namespace that is not there", {"CNI_NETNS": "/var/run/netns/tpt-nobody"}, 8, "tpt-nobody"),
    ("a file that is no namespace", {"CNI_NETNS": "/etc/hostname"}, 8, "/etc/hostname"),
    ("arguments without a value", {"CNI_ARGS": "IP"}, 4, "CNI_ARGS"),
]

BAD_CONFIG: list[tuple[str, Json, int, str]] = [
    ("a version from the future", {"cniVersion": "9.0.0"}, 1, "9.0.0"),
    ("a version that is no text", {"cniVersion": 1}, 6, "cniVersion"),
    ("no name", {"name": ""}, 7, "name"),
    ("a wrong name", {"name": "../x"}, 7, "../x"),
    ("a bridge that is no text", {"bridge": 5}, 6, "bridge"),
    ("a bridge name too long", {"bridge": "b" * 16}, 7, "b" * 16),
    ("mtu as text", {"mtu": "big"}, 6, "mtu"),
    ("a negative mtu", {"mtu": -1}, 7, "mtu"),
    ("a vlan out of range", {"vlan": 4095}, 7, "4095"),
    ("a subnet that is none", {"ipam": {"type": "towpath-ipam", "subnet": "ten/8"}}, 7, "ten/8"),
    ("an ipam plug-in that is not there", {"ipam": {"type": "no-such-ipam"}}, 0, "no-such-ipam"),
    ("a host port too large", ports(hostPort=70000), 7, "70000"),
    ("a host port as text", ports(hostPort="http"), 6, "hostPort"),
    ("a container port of nought", ports(containerPort=0), 7, "containerPort"),
    ("an unknown protocol", ports(protocol="icmp"), 7, "icmp"),
    ("a host ip that is none", ports(hostIP="here"), 7, "here"),
    ("a mac that is none", {"runtimeConfig": {"mac": "zz:00"}}, 7, "zz:00"),
    ("an address that is none", {"runtimeConfig": {"ips": ["1.2.3"]}}, 7, "1.2.3"),
    ("an isolation that is none", {"isolation": "maybe"}, 7, "maybe"),
]


def refused(net: Net, env: Json, stdin: bytes, code: int, words: str) -> None:
    """The call fails with this code (0 = any) and these words, in valid JSON, and nothing changed."""
    before = picture(net.host)
    reply = net.host.exec()("towpath-bridge", env, stdin)
    assert reply.exit != 0, str(reply)
    assert reply.json["msg"], "an error has words"
    assert code in (0, reply.code), str(reply)
    assert words in reply.text, str(reply)
    assert picture(net.host) - before == []


@pytest.mark.parametrize(("change", "code", "words"), [pytest.param(*row[1:], id=row[0]) for row in BAD_ENV])
def test_a_bad_environment_is_refused_by_name(net: Net, change: Json, code: int, words: str) -> None:
    env = {**variables("ADD", "tpt-bad", net.host.container().path, "eth0"), **change}
    refused(net, env, encode(config(net)), code, words)


@pytest.mark.parametrize(("change", "code", "words"), [pytest.param(*row[1:], id=row[0]) for row in BAD_CONFIG])
def test_a_bad_configuration_is_refused_by_name(net: Net, change: Json, code: int, words: str) -> None:
    env = variables("ADD", "tpt-bad", net.host.container().path, "eth0")
    refused(net, env, encode({**config(net), **change}), code, words)


NO_JSON = [b"", b"{", b"[]", b"null", b'"x"', b"\xff\xfe", b"{" * 5000]


@pytest.mark.parametrize("stdin", NO_JSON, ids=["empty", "half", "list", "null", "text", "no UTF-8", "deep"])
def test_what_is_no_json_object_is_refused(net: Net, stdin: bytes) -> None:
    refused(net, variables("ADD", "tpt-bad", net.host.container().path, "eth0"), stdin, 6, "")


def test_the_agents_own_namespace_is_refused_before_any_work(net: Net) -> None:
    env = variables("ADD", "tpt-bad", net.host.netns.path, "eth0")
    refused(net, env, encode(config(net)), 8, net.host.netns.path)


@pytest.fixture
def own(make_host: Any) -> Net:
    """A network on a host of the test's own."""
    return Net(make_host(), 240)


def test_a_second_agent_on_one_state_dir_refuses_to_start(own: Net) -> None:
    other = own.host.folder / "other.yaml"
    text = own.host.agent.config.read_text().replace("agent.sock", "other.sock")
    other.write_text(text)
    done = own.host.netns.call(TOWPATH, "agent", "--config", str(other), timeout=20)
    assert done.returncode == 1
    assert str(own.host.agent.state) in (done.stdout + done.stderr).decode()
    assert own.join().leave().ok


WRITES = re.compile(r"RTM_(NEW|DEL|SET)|NFT_MSG_(NEW|DEL|DESTROY)|NFNL_MSG_BATCH_BEGIN|IPCTNL_MSG_CT_(NEW|DELETE)")


@pytest.mark.skipif(bool(lacks("strace")), reason=lacks("strace"))
def test_a_restart_writes_nothing_to_the_kernel_and_traffic_goes_on(own: Net) -> None:
    runtime = own.runtime()
    member = own.join(runtime, portMappings=[{"hostPort": 8080, "containerPort": 80, "protocol": "tcp"}])
    member.container.serve(tcp=(80,))
    for _ in range(100):
        own.join(runtime)
    agent, before = own.host.agent, picture(own.host)
    agent.stop()
    assert reaches(own.host.outside, "192.0.2.1", 8080), "the data plane lives while the agent does not"
    trace = own.host.folder / "trace"
    agent.start(wrap=("strace", "-D", "-f", "-qq", "-e", "trace=sendto,sendmsg", "-o", str(trace)))
    time.sleep(1.5)  # what a reconciler would do at start, it has done by now
    written = [line for line in trace.read_text(errors="replace").splitlines() if WRITES.search(line)]
    assert written == []
    assert picture(own.host) - before == []
    assert own.join(runtime).leave().ok
    assert WRITES.search(trace.read_text(errors="replace")), "the trace does see writes"
    agent.stop()
    agent.start()
    own.close()


@pytest.fixture
def tiny() -> Iterator[Host]:
    """A host whose state_dir is a file system of its own, 4 MB large."""
    host = Host(firewall="nftables")
    host.agent.state.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(host.agent.state)], check=True)
    try:
        yield host.start()
    finally:
        host.agent.kill()
        subprocess.run(["umount", "--lazy", str(host.agent.state)], check=False)
        host.close()


def fill(folder: Path) -> Path:
    """Use up the file system of a folder to the last byte."""
    file = folder / "filler"
    with contextlib.suppress(OSError), file.open("wb", buffering=0) as out:
        while out.write(bytes(4096)):
            pass
    return file


def test_a_full_disk_refuses_add_and_still_deletes(tiny: Host) -> None:
    net = new_net(tiny)
    runtime = net.runtime()
    net.join(runtime)
    before = picture(tiny)
    stay = [net.join(runtime) for _ in range(3)]
    filler = fill(tiny.agent.state)
    full = picture(tiny)
    replies = [runtime.add(c.id, c.path) for c in (tiny.container() for _ in range(40))]
    bad = [reply for reply in replies if not reply.ok]
    assert bad, "at some point the disk is full"
    assert {reply.code for reply in bad} == {11}
    for container, reply in zip(tiny.containers[-40:], replies, strict=True):
        assert runtime.delete(container.id, container.path).ok, str(reply)
    assert picture(tiny) - full == []
    assert [reply for reply in (member.leave() for member in stay) if not reply.ok] == []
    assert picture(tiny) - before == []
    filler.unlink()
    net.join(runtime)
    net.close()


OTHER = ("/bin/sh", "-c", '"$0"; exit $?')  # a shell as parent: to the agent another runtime than this process


def test_gc_of_one_runtime_spares_the_living_of_another(own: Net) -> None:
    mine = own.runtime(version="1.1.0")
    theirs = own.runtime(version="1.1.0")
    theirs.run = replace(theirs.run, through=OTHER)
    own.join(mine)
    before = picture(own.host)
    a, b, dead = own.join(mine), own.join(theirs), own.join(theirs)
    dead.container.remove()
    end = time.monotonic() + 5
    while dead.veth in links(own.host.netns) and time.monotonic() < end:
        time.sleep(0.05)  # the kernel takes a namespace down in its own time
    reply = mine.gc([(own.members[0].container.id, "eth0")])
    assert reply.ok, str(reply)
    assert a.container.link() is None, "mine was not valid any more"
    assert b.container.link() is not None, "theirs lives"
    rows = {row["container"] for row in own.host.agent.get("/v1/attachments")}
    assert {b.container.id} <= rows
    assert not {a.container.id, dead.container.id} & rows
    assert theirs.gc([]).ok
    left = [line for line in picture(own.host) - before if own.members[0].container.id not in line]
    assert [line for line in left if line.startswith("+")] == []


def test_gc_without_the_list_removes_nothing(own: Net) -> None:
    member = own.join(own.runtime(version="1.1.0"))
    stdin = encode({**config(own), "cniVersion": "1.1.0"})
    assert own.host.exec()("towpath-bridge", {"CNI_COMMAND": "GC"}, stdin).ok
    assert member.container.link() is not None


class Cycle:
    """One random ADD or DEL with a blow in the middle, as a runtime and an unlucky machine do it."""

    def __init__(self, net: Net, dice: random.Random) -> None:
        self.net = net
        self.dice = dice
        self.runtime: Runtime = net.runtime(version="1.1.0", deferredDelete=None)
        self.living: dict[str, Container] = {}
        self.blows = {"agent killed": 0, "executable killed": 0, "none": 0}

    def run(self) -> None:
        blow = self.dice.choice(["agent killed", "agent killed", "executable killed", "none"])
        self.blows[blow] += 1
        verb = "DEL" if self.living and self.dice.random() < 0.5 else "ADD"
        container = self.dice.choice(list(self.living.values())) if verb == "DEL" else self.net.host.container()
        self.living[container.id] = container
        strike = self.dice.random() * 0.012
        process = self._start(verb, container)
        time.sleep(strike)
        if blow == "agent killed":
            self.net.host.agent.kill()
            self.net.host.agent.start()
        elif blow == "executable killed":
            process.kill()
        process.communicate(timeout=30)
        if verb == "DEL" or process.returncode:
            self._bury(container)

    def _start(self, verb: str, container: Container) -> subprocess.Popen[bytes]:
        number = int(container.id[-4:], 16) % 20_000 + 10_000
        mapping = [{"hostPort": number, "containerPort": 80, "protocol": self.dice.choice(["tcp", "udp"])}]
        plugin = self.runtime.plugins[0]
        stdin = encode(self.runtime.config(plugin, {"portMappings": mapping}, {}))
        run = self.runtime.run
        env = {**run.env, **variables(verb, container.id, container.path, "eth0"), "CNI_PATH": run.folders[0]}
        file = self.net.host.folder / "stdin"
        file.write_bytes(stdin)
        with file.open("rb") as source:
            return self.net.host.netns.start(
                run.find(plugin["type"]), env=env, stdin=source, stdout=subprocess.PIPE, stderr=subprocess.PIPE
            )

    def _bury(self, container: Container) -> None:
        """What a runtime does after a failure or a stop: DEL, or (one in three) just dying, which GC has to find."""
        if self.dice.random() < 0.67:
            reply = self.runtime.delete(container.id, container.path, prev=False)
            assert reply.ok, str(reply)
        container.remove()
        self.living.pop(container.id, None)


def cycles(net: Net, count: int) -> None:
    print(f"\n{count} cycles of ADD, DEL and kill -9, TOWPATH_SEED={SEED}", flush=True)
    keep = net.join()
    before = picture(net.host)
    cycle = Cycle(net, random.Random(SEED))
    for _ in range(count):
        cycle.run()
    print(f"done: {cycle.blows}", flush=True)
    for container in list(cycle.living.values()):
        cycle._bury(container)
    net.host.agent.restart()
    reply = cycle.runtime.gc([(keep.container.id, "eth0")])
    assert reply.ok, str(reply)
    assert picture(net.host) - before == []
    check = keep.runtime.check(keep.container.id, keep.container.path)
    assert check.ok, str(check)


@pytest.mark.timeout(300)
def test_cycles_with_kill_9_end_with_what_they_began_with(own: Net) -> None:
    cycles(own, min(CYCLES, 50))


@pytest.mark.soak
@pytest.mark.timeout(7200)
def test_many_cycles_with_kill_9_end_with_what_they_began_with(own: Net) -> None:
    cycles(own, CYCLES)
