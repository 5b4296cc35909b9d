"""Install the CNI executables into a plug-in directory, all or none, and take them out again.

Runtimes start plug-ins at any moment, so a name always leads to a whole file, the old or the new one: files are built
in a hidden folder beside their place and renamed over it, never written in place (which fails with ETXTBSY while one
runs, and makes others fail so).
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Literal

from towpath.errors import BadRequest, Conflict, Unavailable

NAMES = (
    "towpath-bridge",
    "towpath-host",
    "towpath-loopback",
    "towpath-ipam",
    "towpath-portmap",
    "towpath-firewall",
    "towpath-bandwidth",
    "towpath-tuning",
    "mesos-cni-port-mapper",
)
SOCKET = "/run/towpath/agent.sock"
MARK = b"towpath-cni-executable"  # stands in both twins
SUN_PATH = 107  # unix(7): sockaddr_un.sun_path without its NUL
SHEBANG_MAX = 250  # the kernel reads 256 bytes of the first line (BINPRM_BUF_SIZE)
WORK = ".towpath-"

Compiler = Literal["auto", "never", "require"]


@dataclass(frozen=True, slots=True)
class Installed:
    """What `install` did. kind: "c" or "python"; note: why "auto" settled for Python, else empty."""

    directory: Path
    names: tuple[str, ...]
    kind: str
    socket: str
    python: str
    note: str = ""


def install(
    directory: str | Path, socket: str | Path = SOCKET, python: str | Path = "", compiler: Compiler = "auto"
) -> Installed:
    """Put every executable of NAMES into `directory` and try each; what was there comes back if one fails.

    socket: the agent's, where TOWPATH_SOCKET is not set. python: the interpreter that has towpath installed, which
    does the work while no agent runs (default: this one). compiler: whether to build the C twin.
    Raises BadRequest for a directory or path that cannot serve, Conflict where a name is taken by somebody else's
    file, Unavailable where no executable can be built or one does not answer.
    """
    place = Path(directory)
    socket, python = os.fspath(socket), os.fspath(python or sys.executable)
    check_paths(socket, python)
    with work_folder(place) as work:
        for name in NAMES:
            if os.path.lexists(place / name) and not is_ours(place / name):
                raise Conflict(f"{place / name} is not Towpath's file", hint="move it away, or install elsewhere")
        kind, note = build(work / "candidate", socket, python, compiler)
        swap(work, place)
    return Installed(place, NAMES, kind, socket, python, note)


def uninstall(directory: str | Path) -> tuple[str, ...]:
    """Remove our executables from `directory`, and what an interrupted install left; the names that were removed.

    Files of ours are told by their content: one of the same name that is somebody else's stays.
    """
    place = Path(directory)
    gone = tuple(name for name in NAMES if is_ours(place / name))
    try:
        for name in gone:
            (place / name).unlink()
        for left in place.glob(f"{WORK}*"):
            shutil.rmtree(left)
    except OSError as exc:
        raise BadRequest(f"cannot remove from {place}: {exc.strerror}") from exc
    return gone


def check_paths(socket: str, python: str) -> None:
    for what, path in (("socket", socket), ("python", python)):
        if not path.startswith("/") or "\0" in path or "\n" in path:
            raise BadRequest(f"{what} {path!r} is not an absolute path")
    if len(os.fsencode(socket)) > SUN_PATH:
        raise BadRequest(f"socket {socket!r} is longer than {SUN_PATH} bytes")


def is_ours(path: Path) -> bool:
    """Whether the file carries our mark; a folder, a broken link or nothing at all is not ours."""
    try:
        return path.is_file() and MARK in path.read_bytes()
    except OSError:
        return False


@contextlib.contextmanager
def work_folder(place: Path) -> Iterator[Path]:
    """A hidden folder inside `place` (renames stay on one file system), gone at the end with all that is in it."""
    if not place.is_dir():
        raise BadRequest(f"{place} is not a directory", hint=f"make it: mkdir -p {place}")
    try:
        folder = tempfile.TemporaryDirectory(prefix=WORK, dir=place)
    except OSError as exc:
        raise BadRequest(f"cannot write to {place}: {exc.strerror}") from exc
    with folder as name:
        try:
            yield Path(name)
        except OSError as exc:
            raise Unavailable(f"cannot install into {place}: {exc}") from exc


def swap(work: Path, place: Path) -> None:
    """Rename copies of work/candidate over every name and try each; put the old files back if anything fails."""
    new, old = work / "new", work / "old"
    new.mkdir()
    old.mkdir()
    for name in NAMES:
        duplicate(work / "candidate", new / name)
        if os.path.lexists(place / name):
            duplicate(place / name, old / name)
    sync(work / "candidate")
    try:
        for name in NAMES:
            (new / name).replace(place / name)
        for name in NAMES:
            if why := ask_version(place / name):
                raise Unavailable(f"{place / name} does not work: {why}", hint="nothing was changed")
        sync(place)
    except BaseException:
        for name in NAMES:
            if os.path.lexists(old / name):
                (old / name).replace(place / name)
            else:
                (place / name).unlink(missing_ok=True)
        raise


def duplicate(source: Path, target: Path) -> None:
    """A second name for one file; a second file where the file system has no hard links."""
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:
        shutil.copy2(source, target, follow_symlinks=False)
        sync(target)


def sync(path: Path) -> None:
    """Wait until a file or folder is on the disk: a rename must not be there before the content after a power cut."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def ask_version(executable: Path) -> str:
    """Run VERSION with an empty environment, as runtimes do; "" or what is wrong with the answer."""
    try:
        with tempfile.TemporaryFile() as stdin:  # all there at once: VERSION does not wait for what comes late
            stdin.write(b'{"cniVersion":"1.0.0"}')
            stdin.seek(0)
            done = subprocess.run(
                [executable],
                env={"CNI_COMMAND": "VERSION"},
                stdin=stdin,
                capture_output=True,
                timeout=30,
                check=False,
            )
        answer = json.loads(done.stdout)
    except (OSError, subprocess.TimeoutExpired) as exc:
        return str(exc)
    except ValueError:
        return (
            f"exit status {done.returncode}, no JSON: {(done.stderr or done.stdout)[:200].decode(errors='replace')!r}"
        )
    if done.returncode or answer.get("cniVersion") != "1.0.0" or "1.1.0" not in answer.get("supportedVersions", []):
        return f"exit status {done.returncode}, answer {done.stdout[:200].decode(errors='replace')!r}"
    return ""


def build(target: Path, socket: str, python: str, compiler: Compiler) -> tuple[str, str]:
    """Write the executable to `target`; its kind, and why it is not the C one where that was wished for."""
    note = ""
    if compiler != "never":
        note = build_c(target, socket, python)
        if not note:
            return "c", ""
        if compiler == "require":
            raise Unavailable(f"no C twin: {note}", hint="install one: apt-get install gcc libc6-dev")
    target.unlink(missing_ok=True)
    target.write_text(script(socket, python), encoding="utf-8")
    target.chmod(0o755)
    return "python", note


def build_c(target: Path, socket: str, python: str) -> str:
    """Compile the C twin, static where that is possible (the quicker start); "" or why there is none."""
    cc = shutil.which("cc")
    if cc is None:
        return "no C compiler (cc) found"
    source = resources.files("towpath.plugins").joinpath("towpath_cni.c").read_bytes()
    given = [f"-DSOCKET={c_literal(socket)}", f"-DPYTHON={c_literal(python)}"]
    why = ""
    for static in (["-static"], []):
        command = [cc, "-std=c99", "-O2", *static, *given, "-x", "c", "-", "-o", str(target)]
        try:
            done = subprocess.run(command, input=source, capture_output=True, timeout=120, check=False)
        except (OSError, subprocess.TimeoutExpired) as exc:
            return f"{cc}: {exc}"
        if done.returncode:
            why = done.stderr.decode(errors="replace").strip() or f"{cc}: exit status {done.returncode}"
        else:
            why = ask_version(target)
        if not why:
            target.chmod(0o755)
            return ""
    return why


def c_literal(text: str) -> str:
    """`text` as a C string; octal escapes keep quotes, backslashes and trigraphs from meaning anything."""
    return (
        '"'
        + "".join(chr(b) if b < 128 and (chr(b).isalnum() or b in b"/._-") else f"\\{b:03o}" for b in os.fsencode(text))
        + '"'
    )


# Run by the interpreter of the shebang, since bytecode belongs to one minor version of Python.
PRECOMPILE = """
import marshal, sys, _frozen_importlib_external as external
code = compile(sys.stdin.buffer.read(), "towpath_cni.py", "exec", dont_inherit=True, optimize=2)
sys.stdout.buffer.write(external.MAGIC_NUMBER + marshal.dumps(code))
"""
SCRIPT = """#!{interpreter} -IS
# {mark}: made by `towpath cni install` of towpath_cni.py, the text in SOURCE, and of its bytecode: parsing the text
# costs 1 ms at each start. A Python of another version finds another magic number here, and reads the text.
import _frozen_importlib_external
SOURCE = {source!r}
if _frozen_importlib_external.MAGIC_NUMBER == {magic!r}:
    import marshal
    exec(marshal.loads({code!r}))
else:
    exec(SOURCE)
"""


def script(socket: str, python: str) -> str:
    """The Python executable: plugins/towpath_cni.py with both paths written into it, and its bytecode."""
    source = resources.files("towpath.plugins").joinpath("towpath_cni.py").read_text(encoding="utf-8")
    for constant, value in (("SOCKET", socket), ("PYTHON", python)):
        line = f"{constant} = {os.fsencode(value)!r}".replace("\\", r"\\")  # re.sub reads escapes
        source = re.sub(rf"^{constant} = .*$", line, source, count=1, flags=re.MULTILINE)
    interpreter = system_python()
    try:
        done = subprocess.run(
            [interpreter, "-IS", "-c", PRECOMPILE], input=source.encode(), capture_output=True, timeout=60, check=True
        )
    except (OSError, subprocess.SubprocessError) as exc:
        raise Unavailable(f"{interpreter} cannot run the CNI executable: {exc}") from exc
    magic, code = done.stdout[:4], done.stdout[4:]
    return SCRIPT.format(interpreter=interpreter, mark=MARK.decode(), source=source, magic=magic, code=code)


def system_python() -> str:
    """The interpreter of the shebang: the system's, which outlives a rebuilt virtualenv, else the one we run on."""
    system = "/usr/bin/python3"
    chosen = system if os.access(system, os.X_OK) else os.path.realpath(sys.executable)
    if len(chosen) > SHEBANG_MAX or " " in chosen:
        raise Unavailable(f"interpreter {chosen!r} cannot stand in a first line: too long, or it holds a space")
    return chosen
