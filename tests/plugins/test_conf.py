"""The configurations that we hand out: what CNI asks of them, and DC/OS's own to the letter."""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib import resources
from ipaddress import ip_network
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from towpath.install import NAMES

CONF = Path(str(resources.files("towpath.plugins") / "conf"))
FILES = sorted(CONF.iterdir())
REFERENCE = {"bridge"}


def plugins(path: Path) -> list[dict[str, Any]]:
    """The plug-ins of a file, delegates after those that delegate."""
    conf = json.loads(path.read_text())
    found = conf.get("plugins", [conf])
    return [*found, *(plugin["delegate"] for plugin in found if "delegate" in plugin)]


def subnets(path: Path) -> Iterator[str]:
    for plugin in plugins(path):
        ipam = plugin.get("ipam", {})
        yield from ([ipam["subnet"]] if "subnet" in ipam else [])
        yield from (part["subnet"] for ranges in ipam.get("ranges", []) for part in ranges)


def test_each_kind_of_network_has_an_example() -> None:
    assert [path.name for path in FILES] == [
        "10-towpath-bridge.conflist",
        "20-towpath-chain.conflist",
        "30-towpath-dual-stack.conflist",
        "40-towpath-host.conflist",
        "ucr-default-bridge.conf",
    ]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_an_example_names_plugins_that_are_installed(path: Path) -> None:
    for plugin in plugins(path):
        assert plugin["type"] in {*NAMES, *REFERENCE}
        assert plugin.get("ipam", {}).get("type", "towpath-ipam") == "towpath-ipam"
    assert ("plugins" in json.loads(path.read_text())) == (path.suffix == ".conflist")


def test_all_examples_may_be_used_side_by_side() -> None:
    everything = [ip_network(text) for path in FILES for text in subnets(path)]
    assert not [(a, b) for a, b in combinations(everything, 2) if a.version == b.version and a.overlaps(b)]
    assert len({json.loads(path.read_text())["name"] for path in FILES}) == len(FILES)
    bridges = [plugin["bridge"] for path in FILES for plugin in plugins(path) if "bridge" in plugin]
    assert len(set(bridges)) == len(bridges)


def test_the_bridge_of_ucr_is_the_one_of_dcos() -> None:
    """As DC/OS ships it, but for the types of the delegate and of its IPAM. No cniVersion: UCR reads 0.1.0 results."""
    assert json.loads((CONF / "ucr-default-bridge.conf").read_text()) == {
        "name": "mesos-bridge",
        "type": "mesos-cni-port-mapper",
        "excludeDevices": ["ucr-br0"],
        "chain": "UCR-DEFAULT-BRIDGE",
        "delegate": {
            "type": "towpath-bridge",
            "bridge": "ucr-br0",
            "isDefaultGateway": True,
            "forceAddress": False,
            "ipMasq": True,
            "hairpinMode": True,
            "ipam": {
                "type": "towpath-ipam",
                "dataDir": "/var/run/dcos/cni/networks",
                "subnet": "172.31.254.0/24",
                "routes": [{"dst": "0.0.0.0/0"}],
            },
        },
    }


@pytest.mark.parametrize("name", NAMES)
def test_the_readme_tells_what_each_executable_does(name: str) -> None:
    assert f"| `{name}`" in (resources.files("towpath.plugins") / "README.md").read_text(encoding="utf-8")
