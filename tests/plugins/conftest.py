"""Both twins, installed for real into folders of their own."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.plugins.stage import STAND_IN
from towpath.install import Compiler, install


@pytest.fixture(scope="session")
def folder() -> Iterator[Path]:
    """A folder whose path is short enough for a socket."""
    with tempfile.TemporaryDirectory(prefix="tpt-") as name:
        yield Path(name)


@pytest.fixture(scope="session")
def twins(folder: Path) -> dict[str, Path]:
    """kind → its towpath-bridge. The agent's socket is FOLDER/KIND.sock, the stand-in for it FOLDER/KIND.stand-in."""
    twins = {}
    compilers: dict[str, Compiler] = {"python": "never", "c": "require"}
    for kind, compiler in compilers.items():
        if kind == "c" and shutil.which("cc") is None:
            continue
        place, stand_in = folder / kind, folder / f"{kind}.stand-in"
        place.mkdir()
        stand_in.write_text(STAND_IN)
        stand_in.chmod(0o755)
        install(place, folder / f"{kind}.sock", stand_in, compiler)
        twins[kind] = place / "towpath-bridge"
    return twins


@pytest.fixture(params=["python", "c"])
def executable(request: pytest.FixtureRequest, twins: dict[str, Path]) -> Path:
    if request.param not in twins:
        pytest.skip("no C compiler")
    return twins[request.param]


@pytest.fixture
def sock(executable: Path) -> Iterator[Path]:
    """Where the executable looks for its agent; empty before and after the test."""
    path = executable.parent.with_suffix(".sock")
    yield path
    path.unlink(missing_ok=True)
