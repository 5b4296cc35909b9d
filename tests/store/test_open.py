"""Which words of the configuration make which store."""

from __future__ import annotations

from pathlib import Path

import pytest

from towpath.errors import BadConfig
from towpath.store.etcd.store import EtcdStore
from towpath.store.memory import MemoryStore
from towpath.store.open import etcd_endpoints, open_store
from towpath.store.sqlite import SqliteStore


@pytest.mark.parametrize(
    ("where", "kind"),
    [
        pytest.param("memory://", MemoryStore, id="memory"),
        pytest.param("sqlite:///var/lib/x", SqliteStore, id="a directory as URL"),
        pytest.param("/var/lib/x", SqliteStore, id="a directory as text"),
        pytest.param(Path("/var/lib/x"), SqliteStore, id="a directory"),
        pytest.param("etcd://a:2379,b:2379", EtcdStore, id="members of etcd"),
        pytest.param("etcd://a/site/towpath", EtcdStore, id="members of etcd, and a prefix"),
    ],
)
def test_a_store_is_picked_by_its_address(where: str | Path, kind: type) -> None:
    store = open_store(where)
    assert isinstance(store, kind)
    assert not Path("/var/lib/x").exists(), "nothing is touched before it is opened"


@pytest.mark.parametrize("where", ["", "memory://x", "sqlite://relative", "mysql:///x", "sqlite://", "etcd://"])
def test_what_names_no_store_is_refused(where: str) -> None:
    with pytest.raises(BadConfig, match="is not known"):
        open_store(where)


@pytest.mark.parametrize(
    ("text", "want"),
    [
        pytest.param("a", ("a:2379",), id="the port may be left out"),
        pytest.param("10.0.0.1:4001, b.example:2379", ("10.0.0.1:4001", "b.example:2379"), id="several"),
        pytest.param("[fd00::1],[fd00::2]:1", ("[fd00::1]:2379", "[fd00::2]:1"), id="IPv6"),
    ],
)
def test_members_of_etcd_are_read(text: str, want: tuple[str, ...]) -> None:
    assert etcd_endpoints(text) == want


@pytest.mark.parametrize("text", ["a,", "fd00::1", "a:0", "a:65536", "a:x", "a b", "http://a"])
def test_what_names_no_member_of_etcd_is_refused(text: str) -> None:
    with pytest.raises(BadConfig, match="is not HOST or HOST:PORT"):
        etcd_endpoints(text)
