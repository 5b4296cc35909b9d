"""Death and refusal between any two steps of ADD and DEL, on the true kernel: one GC later nothing is too many."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from tests.kernel.box import Box, box
from tests.netns.steps import DIED, REFUSED, Order

pytestmark = [pytest.mark.netns, pytest.mark.skipif(os.geteuid() != 0, reason="needs root")]

ROOT = Path(__file__).parent.parent.parent
VICTIM, KEEP = 0, 1  # containers


class Stage:
    """A host with one container that stays; every agent on it lives for one order."""

    def __init__(self, host: Box, state: Path, firewall: str) -> None:
        self.host = host
        self.state = state
        self.firewall = firewall
        self.process = subprocess.Popen(
            ["/usr/bin/nsenter", f"--net=/run/netns/{host.host}", sys.executable, "-m", "tests.netns.steps"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )

    def order(self, verb: str, *, fault: str = "", step: int = 0, container: int = VICTIM) -> tuple[int, str]:
        """(exit status, what it said: the number of steps, or the error)."""
        assert self.process.stdin
        assert self.process.stdout
        name = "keep" if container == KEEP else "victim"
        order = Order(str(self.state), self.firewall, verb, name, self.host.paths[container], fault, step)
        self.process.stdin.write(json.dumps(asdict(order)) + "\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline())
        return answer["status"], answer["said"]

    def must(self, verb: str, **more: Any) -> int:
        status, said = self.order(verb, **more)
        assert status == 0, said
        return int(said)

    def picture(self) -> list[str]:
        """Links and addresses on both sides, every rule of nftables and iptables-nft, rows and files."""
        lines = [f"row {row}" for row in self.rows()]
        lines += [f"file {path.name}" for path in self.state.iterdir()]
        for where in (-1, VICTIM, KEEP):
            for link in self.host.json("ip", "-j", "addr", "show", container=where):
                lines.append(f"{where} link {link['ifname']} {link.get('master', '')}")
                found = [a for a in link["addr_info"] if a["scope"] == "global"]
                lines += [f"{where} address {link['ifname']} {a['local']}/{a['prefixlen']}" for a in found]
        for entry in json.loads(self.host.run("nft", "-j", "list", "ruleset"))["nftables"]:
            lines += ruleset(entry)
        if self.firewall == "iptables":
            for tool in ("iptables-save", "ip6tables-save"):
                lines += [f"{tool} {line}" for line in self.host.run(tool).splitlines() if line.startswith("-A")]
        return sorted(lines)

    def rows(self) -> set[str]:
        """Keys of the store as its file tells them; how far the round robin is does not count."""
        copy = self.state.parent / "copy"
        shutil.copytree(self.state, copy, ignore=shutil.ignore_patterns("ballast", "lock"))
        try:
            database = sqlite3.connect(copy / "store.db")
            keys = {key for (key,) in database.execute("SELECT key FROM item")}
            for key, deleted in database.execute("SELECT key, deleted FROM event ORDER BY id"):
                keys = keys - {key} if deleted else keys | {key}
            database.close()
        finally:
            shutil.rmtree(copy)
        return {key for key in keys if not key.startswith("cursors/")}

    def close(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait(10)


def ruleset(entry: dict[str, Any]) -> Iterator[str]:
    """One thing of `nft -j list ruleset`, its elements singly, without handles and counters."""
    ((kind, body),) = entry.items()
    if kind == "metainfo":
        return
    for element in body.pop("elem", ()):
        yield f"nft {body['table']} {body['name']} element {json.dumps(element, sort_keys=True)}"
    clean = json.dumps({key: value for key, value in body.items() if key != "handle"}, sort_keys=True)
    if '"counter"' not in clean:
        yield f"nft {kind} {clean}"


@pytest.fixture
def stage(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Stage]:
    if request.param == "iptables" and not shutil.which("iptables-restore"):
        pytest.skip("this machine has no iptables")
    with box(2) as host:
        made = Stage(host, tmp_path / "state", request.param)
        try:
            made.must("add", container=KEEP)
            yield made
        finally:
            made.close()


def differences(now: list[str], before: list[str]) -> list[str]:
    return [f"+ {line}" for line in now if line not in before] + [f"- {line}" for line in before if line not in now]


BOTH = pytest.mark.parametrize("stage", ["nftables", "iptables"], indirect=True)
ONE = pytest.mark.parametrize("stage", ["nftables"], indirect=True)


@BOTH
def test_kill_9_before_any_step_of_an_add_leaves_nothing_after_a_restart_and_one_gc(stage: Stage) -> None:
    before = stage.picture()
    count = stage.must("chain")
    stage.must("del")
    assert differences(stage.picture(), before) == []
    assert count > 15
    for step in range(1, count + 1):
        status, said = stage.order("chain", fault="die", step=step)
        assert status == DIED, said
        stage.must("gc")
        assert differences(stage.picture(), before) == [], f"step {step}"


@BOTH
def test_kill_9_before_any_step_of_a_del_leaves_nothing_after_a_restart_and_one_gc(stage: Stage) -> None:
    before = stage.picture()
    stage.must("add")
    count = stage.must("del")
    assert count > 5
    for step in range(1, count + 1):
        stage.must("add")
        status, said = stage.order("del", fault="die", step=step)
        assert status == DIED, said
        stage.must("gc")
        assert differences(stage.picture(), before) == [], f"step {step}"


@ONE
def test_a_kernel_that_refuses_any_step_of_an_add_leaves_nothing_at_once(stage: Stage) -> None:
    before = stage.picture()
    count = stage.must("add")
    stage.must("del")
    for step in range(1, count + 1):
        status, said = stage.order("add", fault="fail", step=step)
        assert status == REFUSED, said
        assert "injected" in said
        assert differences(stage.picture(), before) == [], f"step {step}"


@ONE
def test_a_kernel_that_refuses_any_step_of_a_del_is_asked_again_by_the_next_del(stage: Stage) -> None:
    before = stage.picture()
    stage.must("add")
    count = stage.must("del")
    for step in range(1, count + 1):
        stage.must("add")
        status, said = stage.order("del", fault="fail", step=step)
        assert status == REFUSED, said
        stage.must("del")
        assert differences(stage.picture(), before) == [], f"step {step}"
