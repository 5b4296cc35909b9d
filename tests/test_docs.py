"""What the documents say is so: commands parse, links lead somewhere, tables are the code's, the unit is valid."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from tests.test_floors import FLOORS
from towpath.cli.__main__ import VERBS, towpath
from towpath.config import Described, describe, describe_network

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "ARCHITECTURE.md", ROOT / "CONTRIBUTING.md", ROOT / "plugins" / "README.md"]
DOCUMENTS += sorted((ROOT / "docs").glob("*.md"))


def commands() -> Iterator[str]:
    """Every line of a code block, in any document, that calls `towpath`."""
    for document in DOCUMENTS:
        for block in re.findall(r"^```\n(.*?)^```", document.read_text(), re.MULTILINE | re.DOTALL):
            for line in block.splitlines():
                if found := re.match(r"(?:\$ )?(towpath .*?)(?:\s+&)?(?:\s+#.*)?$", line):
                    yield found[1]


@pytest.mark.parametrize("line", sorted(set(commands())))
def test_a_command_in_a_document_is_one_that_there_is(line: str) -> None:
    parse(towpath, shlex.split(line)[1:])


def parse(command: click.Command, args: list[str], parent: click.Context | None = None) -> None:
    """As click reads a call, down to the last command; nothing is run. Raises UsageError."""
    context = command.make_context(command.name, list(args), parent)
    if isinstance(command, click.Group):
        rest = [*context._protected_args, *context.args]
        _, inner, rest = command.resolve_command(context, rest)
        assert inner is not None
        parse(inner, rest, context)


def test_the_readme_has_every_command_and_no_other() -> None:
    told = (ROOT / "README.md").read_text().partition("## Commands")[2]
    rows = "\n".join(line for line in told.splitlines() if line.startswith("|"))
    words = set(re.findall(r"`(?:towpath )?([a-z]+)", rows))
    assert set(VERBS) <= words


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_between_documents_lead_to_a_file(document: Path) -> None:
    for link in re.findall(r"\]\(([^)#:]+)\)", document.read_text()):
        target = (document.parent / link).resolve()
        assert target.exists(), link


@pytest.mark.parametrize("key", [*describe(), *describe_network()], ids=lambda key: key.key)
def test_every_key_is_in_the_document_of_networks_as_the_code_tells_it(key: Described) -> None:
    row = f"| `{key.key}` | {key.type} | {key.default} | {key.meaning} |\n"
    assert row in (ROOT / "docs" / "networks.md").read_text()


def test_every_room_has_its_floor_in_the_architecture() -> None:
    table = (ROOT / "ARCHITECTURE.md").read_text().partition("## Floors")[2].partition("\n## ")[0]
    rooms = {room.rpartition("/")[2] for floor in FLOORS for room in floor} - {"__init__"}
    named = set(re.findall(r"`(?:towpath/)?(\w+)(?:\.py|/)`", table))
    assert rooms - named == set()


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")
def test_the_unit_is_one_that_systemd_takes() -> None:
    unit = str(ROOT / "units" / "towpath.service")
    done = subprocess.run(["systemd-analyze", "verify", unit], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "towpath.service" not in done.stderr
