"""Fixtures of whole nodes: a host per module, a network per test, and the check that nothing is left of either."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import pytest

from integration.lab import TOWPATH, Host
from integration.namespaces import Netns
from integration.networks import REFERENCE, Net, new_net, ours
from integration.traces import picture

HERE = Path(__file__).parent


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "row(name, reference=True): the row of a reference table that this test holds")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test's row stands in its id. reference=False: the reference plug-ins are known not to hold it."""
    if mark := metafunc.definition.get_closest_marker("row"):
        marks = () if mark.kwargs.get("reference", True) else (ours,)
        metafunc.fixturenames.append("row")
        metafunc.parametrize("row", [pytest.param(mark.args[0], id=mark.args[0], marks=marks)])


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Whole nodes need root; without it these tests are skipped, and say so. Soak runs only where it is asked for."""
    lacking = "" if os.geteuid() == 0 else "needs root: network namespaces"
    if not REFERENCE and not Path(TOWPATH).exists():
        lacking = lacking or f"needs {TOWPATH}: run make setup"
    asked = "soak" in (config.getoption("-m") or "")
    for item in items:
        if not item.path.is_relative_to(HERE):
            continue
        if lacking:
            item.add_marker(pytest.mark.skip(reason=lacking))
        if item.get_closest_marker("soak") and not asked:
            item.add_marker(pytest.mark.skip(reason="soak: run by make soak"))


@pytest.fixture(scope="session", autouse=True)
def no_namespace_stays() -> Iterator[None]:
    """Every namespace of the lab is gone when the tests are."""
    yield
    assert not Netns.alive, f"namespaces left behind: {sorted(Netns.alive)}"


def open_host(**settings: Any) -> Host:
    """A started host, warmed up: what is made once (skeletons of every kind, the reference's base chains) is there."""
    host = Host(**settings)
    try:
        if not REFERENCE:
            host.start()
        warm_up(host)
    except BaseException:
        sys.stderr.write(host.agent.tail())
        host.close()
        raise
    return host


def warm_up(host: Host) -> None:
    """One container by us and one by the reference plug-ins, both families, with a port."""
    ports = [{"hostPort": 7, "containerPort": 7, "protocol": "tcp"}]
    reference = new_net(host)
    ipam = {**reference.dual(), "type": "host-local", "dataDir": str(host.folder / "host-local")}
    reference.join(reference.runtime(reference.wire(type="bridge", ipam=ipam)))
    reference.close()
    if not REFERENCE:
        ours = new_net(host)
        ours.join(ours.runtime(ipam=ours.dual(), macspoofchk=True), portMappings=ports)
        ours.close()


@pytest.fixture(scope="module")
def host() -> Iterator[Host]:
    """One node with the nftables back end for all tests of a module."""
    node = open_host(firewall="nftables")
    yield node
    node.close()


@pytest.fixture
def make_host() -> Iterator[Callable[..., Host]]:
    """Nodes of a test's own: make_host(firewall=...)."""
    made: list[Host] = []

    def make(**settings: Any) -> Host:
        made.append(open_host(**{"firewall": "nftables", **settings}))
        return made[-1]

    yield make
    for node in made:
        node.close()


@pytest.fixture
def net(host: Host, request: pytest.FixtureRequest) -> Iterator[Net]:
    """A network of this test alone; when its containers have left, the host is as it was."""
    before = picture(host)
    network = new_net(host)
    try:
        yield network
    finally:
        network.close()
    if not REFERENCE:
        assert not (left := picture(host) - before), "left behind:\n" + "\n".join(left)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Generator[None, Any, Any]:
    """A failed test shows the end of its agent's log."""
    report: Any = yield
    node = getattr(item, "funcargs", {}).get("host")
    if report.failed and isinstance(node, Host) and node.agent.log.exists():
        report.sections.append(("agent log", node.agent.tail(3000)))
    return report
