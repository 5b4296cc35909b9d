#!/usr/bin/python3 -IS
"""Ship one CNI call to the Towpath agent and copy its answer: one file, installed under the name of every plug-in.

A container waits for each start of this file, so it imports C modules that are in the interpreter already, works in
bytes and leaves by posix._exit; the source is compiled at each start, hence its brevity. Python 3.9 is enough for it.
towpath_cni.c is its twin: what one does, the other does.
"""

import _socket
import posix
import sys

MARK = "towpath-cni-executable 1"  # by this `uninstall` knows a file as ours
SOCKET = b"/run/towpath/agent.sock"  # this line and the next are written anew by `towpath cni install`
PYTHON = b"/opt/towpath/venv/bin/python3"
VERSIONS = (b"0.1.0", b"0.2.0", b"0.3.0", b"0.3.1", b"0.4.0", b"1.0.0", b"1.1.0")
CHUNK = 1 << 18
TRIES, PAUSE = 40, 0.05  # an agent that is being restarted is waited for: 40 x 50 ms = 2 s


def main() -> int:
    # With 0, 1 or 2 closed, the socket would take that number and be mistaken for stdin or stdout.
    while posix.open(b"/dev/null", posix.O_RDWR) < 3:
        pass
    command = posix.environ.get(b"CNI_COMMAND", b"")
    if not command:
        listing = b"CNI protocol versions supported: " + b", ".join(VERSIONS)
        write(2, b"Towpath CNI plugin " + name() + b": forwards to the Towpath agent\n" + listing + b"\n")
        return 0
    if command == b"VERSION":
        supported = b",".join(b'"%s"' % version for version in VERSIONS)
        write(1, b'{"cniVersion":"%s","supportedVersions":[%s]}\n' % (asked(peek()) or VERSIONS[-1], supported))
        return 0
    stdin = b""
    try:
        stdin = read_all()
        return forward(stdin)
    except OSError as exc:
        return fail(stdin, 5, b"the call could not be passed on", posix.strerror(exc.errno or 5).encode())


def forward(stdin: bytes) -> int:
    """Ask the agent; without one, become the interpreter that does the same work alone."""
    path = posix.environ.get(b"TOWPATH_SOCKET") or SOCKET
    request = encode(stdin)
    for _ in range(2):  # once more where the agent died over the first: it may be back already
        agent = connect(path)
        if agent is None:
            break
        head, body = exchange(agent, request)
        if head:
            status = field(head, b"x-exit")
            if not 0 <= status <= 255:
                first = head.partition(b"\r\n")[0]
                return fail(stdin, 999, b"no CNI answer from the Towpath agent at " + path, first)
            write(1, body)
            return status
    return stand_in(stdin, path)


def encode(stdin: bytes) -> bytes:
    """The request: CNI_* and PATH as KEY=VALUE, each ended by NUL, one more NUL, then stdin as it came."""
    env = [b"%s=%s\0" % kv for kv in posix.environ.items() if kv[0].startswith(b"CNI_") or kv[0] == b"PATH"]
    body = b"".join([*env, b"\0", stdin])
    head = b"POST /cni HTTP/1.1\r\nHost: towpath\r\nConnection: close\r\nX-Plugin: %s\r\nContent-Length: %d\r\n\r\n"
    return head % (plain(name()), len(body)) + body


def connect(path: bytes) -> "_socket.socket | None":
    """A connection to the agent, or None where nobody answered for 2 s."""
    for left in range(TRIES, -1, -1):
        agent = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
        try:
            agent.connect(path)
            return agent
        except OSError:
            agent.close()
        if left:
            import time

            time.sleep(PAUSE)
    return None


def exchange(agent: _socket.socket, request: bytes) -> "tuple[bytes, bytes]":
    """Send the request; head and body of the reply, both empty where the agent went away before the reply's end."""
    try:  # noqa: SIM105 (contextlib is no C module)
        agent.sendall(request)
    except OSError:
        pass  # refused half-way: the reply that says why may be waiting to be read
    reply = head = end = body = b""
    try:
        while not end or len(body) < field(head, b"content-length"):
            chunk = agent.recv(CHUNK)
            if not chunk:
                return b"", b""
            reply += chunk
            head, end, body = reply.partition(b"\r\n\r\n")
    except OSError:
        return b"", b""
    return head, body


def field(head: bytes, key: bytes) -> int:
    """The number in a header field (names in any case, RFC 9110 section 5.1), -1 where there is none."""
    value = head.lower().partition(b"\r\n" + key + b":")[2].partition(b"\r\n")[0].strip(b" \t")
    return int(value) if value.isdigit() else -1


def stand_in(stdin: bytes, path: bytes) -> int:
    """Exec the full interpreter with stdin given again; where there is none, say how to start the agent."""
    again = posix.memfd_create("stdin")
    write(again, stdin)
    posix.lseek(again, 0, 0)
    posix.dup2(again, 0)
    env = {**posix.environ, b"TOWPATH_PLUGIN": name()}
    try:
        # -I: as root, nothing is imported from the directory that the caller happens to be in.
        posix.execve(PYTHON, [PYTHON, b"-I", b"-m", b"towpath.cni_once"], env)
    except OSError as exc:
        why = b"start it: systemctl start towpath or: towpath agent; %s: %s"
        why %= PYTHON, posix.strerror(exc.errno or 0).encode()
        code = 50 if posix.environ.get(b"CNI_COMMAND") == b"STATUS" else 11  # spec, "STATUS": 50 = no ADD can be served
        return fail(stdin, code, b"the Towpath agent is not running at " + path, why)


def fail(stdin: bytes, code: int, msg: bytes, details: bytes) -> int:
    """Print a CNI error (CNI spec 1.1.0 section 5) and return the exit status."""
    form = b'{"cniVersion":"%s","code":%d,"msg":"%s","details":"%s"}\n'
    write(1, form % (asked(stdin) or VERSIONS[-1], code, plain(msg), plain(details)))
    return 1


def asked(stdin: bytes) -> bytes:
    """The first cniVersion in the input if it is one of ours: near enough without a JSON parser, which costs 3 ms."""
    at = stdin.find(b'"cniVersion"')
    parts = stdin[at + 12 : at + 76].split(b'"') if at >= 0 else []
    return parts[1] if len(parts) > 2 and parts[0].strip() == b":" and parts[1] in VERSIONS else b""


def plain(text: bytes) -> bytes:
    """Text that needs no escape in JSON or in a header: '?' for all but printable ASCII without quote and backslash."""
    return bytes(c if 32 <= c < 127 and c not in b'"\\' else 63 for c in text)


def name() -> bytes:
    """The plug-in's name: the last part of the path that was executed."""
    return sys.argv[0].encode("utf-8", "surrogateescape").rpartition(b"/")[2]


def ready(fd: int, event: int, limit: int) -> bool:
    """Whether `fd` can be read (event 1) or written (event 4) within `limit` ms; -1 waits without end."""
    import select

    poll = select.poll()
    poll.register(fd, event)
    return bool(poll.poll(limit))


def peek() -> bytes:
    """What stdin holds already, as VERSION needs none: a terminal or a pipe that stays open must not hold us."""
    stdin = b""
    for _ in range(64):
        if asked(stdin) or not ready(0, 1, 10):
            break
        try:
            chunk = posix.read(0, 4096)
        except OSError:
            break
        if not chunk:
            break
        stdin += chunk
    return stdin


def read_all() -> bytes:
    chunks: list[bytes] = []
    while True:
        try:
            chunk = posix.read(0, CHUNK)
        except BlockingIOError:
            ready(0, 1, -1)
            continue
        if not chunk:
            return b"".join(chunks)
        chunks.append(chunk)


def write(fd: int, text: bytes) -> None:
    rest = memoryview(text)
    while rest:
        try:
            rest = rest[posix.write(fd, rest) :]
        except BlockingIOError:
            ready(fd, 4, -1)


if __name__ == "__main__":
    try:
        status = main()
    except OSError:  # nobody reads our stdout any more
        status = 1
    posix._exit(status)  # noqa: SLF001 (ends at once: nothing is left to tidy up)
