"""The file from which a node serves while the engine is away."""

from __future__ import annotations

from pathlib import Path

import pytest

from towpath.store.contract import Item
from towpath.store.snapshot import Snapshot, SnapshotBroken, WrongCluster, load, save

SNAPSHOT = Snapshot("c1", 7, (Item("a", b"\x00\xff\n", 7, 3, 9), Item("ä/\u2028", b"", 2, 2)))


def test_what_was_saved_is_loaded(tmp_path: Path) -> None:
    path = tmp_path / "state.snap"
    assert load(path, "c1") is None
    save(path, Snapshot("c1", 1, ()))
    save(path, SNAPSHOT)
    assert load(path, "c1") == SNAPSHOT
    assert [p.name for p in tmp_path.iterdir()] == ["state.snap"], "nothing is left beside it"
    assert path.stat().st_mode & 0o777 == 0o600


def test_rows_of_another_cluster_are_refused_by_name(tmp_path: Path) -> None:
    save(tmp_path / "s", SNAPSHOT)
    with pytest.raises(WrongCluster, match="'c1', this node is in 'c2'") as raised:
        load(tmp_path / "s", "c2")
    assert "towpath cluster leave" in raised.value.hint


def test_any_damage_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "s"
    save(path, SNAPSHOT)
    whole = path.read_bytes()
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes((whole[place] ^ 1,)) + whole[place + 1 :])
        with pytest.raises(SnapshotBroken, match="is damaged"):
            load(path, "c1")
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(SnapshotBroken, match="is damaged"):
            load(path, "c1")


def test_a_crash_while_it_is_written_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "s"
    save(path, SNAPSHOT)
    path.with_name("s.new").write_bytes(b"half")
    assert load(path, "c1") == SNAPSHOT
    save(path, Snapshot("c1", 8, ()))
    assert load(path, "c1") == Snapshot("c1", 8, ())


def test_another_version_is_said_not_guessed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("towpath.store.snapshot.VERSION", 2)
    save(tmp_path / "s", SNAPSHOT)
    monkeypatch.undo()
    with pytest.raises(SnapshotBroken, match="of version 2, not 1"):
        load(tmp_path / "s", "c1")
