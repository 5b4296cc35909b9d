"""Which words of the configuration make which store."""

from __future__ import annotations

from pathlib import Path

import pytest

from towpath.errors import BadConfig
from towpath.store.memory import MemoryStore
from towpath.store.open import open_store
from towpath.store.sqlite import SqliteStore


@pytest.mark.parametrize(
    ("where", "kind"),
    [
        pytest.param("memory://", MemoryStore, id="memory"),
        pytest.param("sqlite:///var/lib/x", SqliteStore, id="a directory as URL"),
        pytest.param("/var/lib/x", SqliteStore, id="a directory as text"),
        pytest.param(Path("/var/lib/x"), SqliteStore, id="a directory"),
    ],
)
def test_a_store_is_picked_by_its_address(where: str | Path, kind: type) -> None:
    store = open_store(where)
    assert isinstance(store, kind)
    assert not Path("/var/lib/x").exists(), "nothing is touched before it is opened"


@pytest.mark.parametrize("where", ["", "memory://x", "sqlite://relative", "mysql:///x", "sqlite://"])
def test_what_names_no_store_is_refused(where: str) -> None:
    with pytest.raises(BadConfig, match="is not known"):
        open_store(where)
