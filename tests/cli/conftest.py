"""What the tests of the command line share: an agent on a socket of its own, and a way to call `towpath`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from tests.fakes import FakeKernel
from tests.serving import FakeAgent, served
from towpath.cli.__main__ import towpath

Towpath = Callable[..., Result]


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[FakeAgent]:
    with served(tmp_path / "agent.sock", FakeKernel(netns=("/run/netns/a",))) as agent:
        yield agent


@pytest.fixture
def call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Towpath:
    """Run `towpath` with these arguments, its agent's socket in a folder of the test's own."""
    monkeypatch.setenv("TOWPATH_SOCKET", str(tmp_path / "agent.sock"))
    return lambda *args: CliRunner().invoke(towpath, list(args), prog_name="towpath")
