"""Installing the executables: all or none, nobody else's file touched, and out again without a trace."""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.plugins.stage import Agent, call, reply, say
from towpath import install as installing
from towpath.errors import BadRequest, Conflict, TowpathError, Unavailable
from towpath.install import NAMES, c_literal, install, uninstall

needs_cc = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")


@pytest.fixture
def place(tmp_path: Path) -> Path:
    place = tmp_path / "bin"
    place.mkdir()
    return place


@pytest.fixture
def short() -> Iterator[Path]:
    """A path that is short enough for a socket."""
    with tempfile.TemporaryDirectory(prefix="tpt-") as name:
        yield Path(name) / "a.sock"


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is the whole PATH, so that a test decides which `cc` there is."""
    tools = tmp_path / "tools"
    tools.mkdir()
    monkeypatch.setenv("PATH", str(tools))
    return tools


def write_cc(tools: Path, text: str) -> None:
    (tools / "cc").write_text(f"#!/bin/sh\n{text}\n")
    (tools / "cc").chmod(0o755)


def version(path: Path) -> object:
    return json.loads(call(path, "VERSION").stdout)["cniVersion"]


@pytest.mark.parametrize(
    ("compiler", "kind"),
    [pytest.param("never", "python", id="python"), pytest.param("require", "c", id="c", marks=needs_cc)],
)
def test_every_name_answers_and_nothing_else_is_left(place: Path, compiler: installing.Compiler, kind: str) -> None:
    done = install(place, "/run/x.sock", "/opt/python", compiler)
    assert (done.names, done.kind, done.socket, done.python) == (NAMES, kind, "/run/x.sock", "/opt/python")
    assert sorted(os.listdir(place)) == sorted(NAMES)
    for name in NAMES:
        assert version(place / name) == "1.1.0"
        assert stat.S_IMODE((place / name).stat().st_mode) == 0o755


def test_the_interpreter_that_installs_is_the_one_to_fall_back_on(place: Path) -> None:
    assert install(place, compiler="never").python == sys.executable
    assert os.fsencode(sys.executable) in (place / NAMES[0]).read_bytes()


def test_a_second_install_replaces_by_rename_even_while_the_first_runs(place: Path, short: Path) -> None:
    with Agent(short, say(reply(b"of the first"))):
        install(place, short)
        before = (place / NAMES[0]).stat().st_ino
        running = subprocess.Popen([place / NAMES[0]], env={"CNI_COMMAND": "ADD"}, stdin=-1, stdout=-1)
        install(place, "/nonexistent/agent.sock")
        assert (place / NAMES[0]).stat().st_ino != before
        assert running.communicate(b"", 20)[0] == b"of the first"


def test_a_python_of_another_version_reads_the_text(place: Path, short: Path) -> None:
    """After an upgrade of the system's Python its bytecode has another magic number."""
    install(place, short, "/nonexistent/python", compiler="never")
    text = (place / NAMES[0]).read_text()
    magic = re.compile(r"MAGIC_NUMBER == b(['\"]).*\1:$", re.MULTILINE)
    assert len(magic.findall(text)) == 1
    (place / NAMES[0]).write_text(magic.sub("MAGIC_NUMBER == b'none':", text))
    with Agent(short, say(reply(b"text"))):
        assert call(place / NAMES[0]).stdout == b"text"


@pytest.mark.parametrize(
    "odd", ['/a b/"quoted"', r"/back\slash\1\g<0>", "/??/tri", "/ü/%s{x}", "/'single'"], ids=lambda odd: odd
)
@pytest.mark.parametrize("compiler", [pytest.param("never"), pytest.param("require", marks=needs_cc)])
def test_any_path_can_be_written_in(tmp_path: Path, short: Path, compiler: installing.Compiler, odd: str) -> None:
    place = tmp_path / "bin"
    place.mkdir()
    stand_in = tmp_path / odd[1:] / "python"
    stand_in.parent.mkdir(parents=True)
    stand_in.write_text("#!/bin/sh\necho stood in\n")
    stand_in.chmod(0o755)
    sock = short.with_name(odd.replace("/", "|"))
    with Agent(sock, say(b"")):
        install(place, sock, stand_in, compiler)
        assert call(place / NAMES[0]).stdout == b"stood in\n"


# --- refusals --------------------------------------------------------------------------------------------------------


def test_a_missing_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadRequest, match="/none is not a directory") as refused:
        install(tmp_path / "none")
    assert "mkdir" in refused.value.hint


def test_a_directory_that_cannot_be_written_is_named() -> None:
    with pytest.raises(BadRequest, match="/proc/self"):
        install("/proc/self")


@pytest.mark.parametrize(
    ("socket", "python"),
    [
        pytest.param("agent.sock", "/usr/bin/python3", id="socket relative"),
        pytest.param("/" + "x" * 107, "/usr/bin/python3", id="socket too long"),
        pytest.param("/run/a", "python3", id="python relative"),
        pytest.param("/run/a\nb", "/usr/bin/python3", id="a line break"),
    ],
)
def test_paths_that_cannot_work_are_refused(place: Path, socket: str, python: str) -> None:
    with pytest.raises(BadRequest):
        install(place, socket, python)
    assert os.listdir(place) == []


def test_a_file_that_is_somebody_elses_is_refused_and_stays(place: Path) -> None:
    (place / "mesos-cni-port-mapper").write_bytes(b"\x7fELF of Mesos")
    with pytest.raises(Conflict, match="mesos-cni-port-mapper is not Towpath's"):
        install(place, compiler="never")
    assert os.listdir(place) == ["mesos-cni-port-mapper"]
    assert (place / "mesos-cni-port-mapper").read_bytes() == b"\x7fELF of Mesos"


# --- compilers -------------------------------------------------------------------------------------------------------


def test_without_a_compiler_it_is_python_and_the_report_says_why(place: Path, tools: Path) -> None:
    done = install(place)
    assert (done.kind, done.note) == ("python", "no C compiler (cc) found")


def test_without_the_compiler_that_is_required_nothing_changes(place: Path, tools: Path) -> None:
    with pytest.raises(Unavailable, match="no C compiler") as refused:
        install(place, compiler="require")
    assert "apt-get install" in refused.value.hint
    assert os.listdir(place) == []


@needs_cc
def test_where_static_cannot_be_linked_the_twin_is_dynamic(place: Path, tools: Path) -> None:
    write_cc(tools, 'case "$*" in *-static*) exit 1;; esac; PATH=/usr/bin:/bin exec cc "$@"')
    done = install(place)
    assert (done.kind, done.note) == ("c", "")


@pytest.mark.parametrize(
    ("cc", "note"),
    [
        pytest.param("echo 'no headers' >&2; exit 1", "no headers", id="that cannot compile"),
        pytest.param(
            ':; while [ "$1" != -o ]; do shift; done; echo "#!/bin/false" > "$2"', "denied", id="whose work fails"
        ),
    ],
)
def test_a_compiler_that_makes_nothing_of_use_is_passed_over(place: Path, tools: Path, cc: str, note: str) -> None:
    write_cc(tools, cc)
    done = install(place)
    assert done.kind == "python"
    assert note in done.note
    assert version(place / NAMES[0]) == "1.1.0"


def test_a_c_literal_means_nothing_but_its_bytes() -> None:
    assert c_literal('/a"\\?\xe9') == r'"/a\042\134\077\303\251"'


# --- undo ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("earlier", [False, True], ids=["nothing there", "an older install there"])
def test_an_executable_that_does_not_answer_brings_back_what_was_there(
    place: Path, earlier: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if earlier:
        install(place, "/nonexistent/old.sock", compiler="never")
    before = {name: (place / name).read_bytes() for name in os.listdir(place)}
    with monkeypatch.context() as patch:
        patch.setattr(installing, "PRECOMPILE", installing.PRECOMPILE.replace("sys.stdin.buffer.read()", "'pass'"))
        with pytest.raises(Unavailable, match="does not work: exit status 0, no JSON"):
            install(place, compiler="never")
    assert {name: (place / name).read_bytes() for name in os.listdir(place)} == before


def test_where_hard_links_are_refused_copies_do(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError("no links here")

    monkeypatch.setattr(os, "link", refuse)
    install(place, compiler="never")
    install(place, compiler="never")
    assert {(place / name).stat().st_nlink for name in NAMES} == {1}


def test_uninstall_removes_ours_alone(place: Path) -> None:
    install(place, compiler="never")
    (place / "towpath-host").unlink()
    (place / "towpath-host").write_text("#!/bin/sh\n# somebody's own\n")
    (place / "bridge").write_text("reference")
    (place / ".towpath-left").mkdir()
    assert uninstall(place) == tuple(name for name in NAMES if name != "towpath-host")
    assert sorted(os.listdir(place)) == ["bridge", "towpath-host"]
    assert uninstall(place) == ()


def test_every_refusal_is_one_of_ours() -> None:
    for directory in ("/proc", "/nonexistent", "/dev/null"):
        with pytest.raises(TowpathError):
            install(directory)
