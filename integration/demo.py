"""`make demo`: a node in namespaces of its own, workloads of two kinds, a published port reached from everywhere.

Nothing of this machine's own links, rules or resolver is touched; everything is gone at the end. Exit status 1 where a
step failed, with what the agent said.
"""

from __future__ import annotations

import http.client
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from integration.callers import Runtime, must
from integration.lab import OUTSIDE, UPLINK, Host
from integration.namespaces import CommandFailed, Netns
from integration.sockets import Unreachable, ask, client
from integration.traces import Picture, picture

PYTHON = "/usr/bin/python3"
SERVE = """import http.server, socketserver, sys
class Page(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        body = f"{sys.argv[1]} saw you as {self.client_address[0]}".encode()
        self.send_response(200); self.send_header("Content-Length", str(len(body))); self.end_headers()
        self.wfile.write(body)
    def log_message(self, *words): pass
socketserver.ThreadingTCPServer(("", int(sys.argv[2])), Page).serve_forever()  # HTTPServer would ask the DNS its name
"""
FETCH = "import sys, urllib.request as u; print(u.urlopen(sys.argv[1], timeout=5).read().decode())"


class Story:
    """Prints one line per step with the time that it took."""

    def __init__(self) -> None:
        self.begin = time.monotonic()

    def chapter(self, title: str) -> None:
        print(f"\n{title}")

    @contextmanager
    def step(self, what: str) -> Iterator[Callable[[str], None]]:
        """The block is the step; it may add what came of it. A failure is told, and rises."""
        said: list[str] = []
        begin = time.monotonic()
        try:
            yield said.append
        except BaseException:
            print(f"  FAILED  {what}")
            raise
        print(
            f"  {(time.monotonic() - begin) * 1000:6.0f} ms  {what}"
            + "".join(f"\n             → {line}" for line in said)
        )


def get(netns: Netns, address: str, port: int, wait: float = 5.0) -> str:
    """One page by HTTP from inside a namespace; a server that is only starting gets `wait` seconds."""
    end = time.monotonic() + wait
    while True:
        try:
            with client(netns, address) as sock:
                sock.settimeout(2)
                sock.connect((address, port))
                connection = http.client.HTTPConnection(address, port)
                connection.sock = sock
                connection.request("GET", "/")
                return connection.getresponse().read().decode()
        except (OSError, http.client.HTTPException) as exc:
            if time.monotonic() > end:
                raise Unreachable(f"http://{address}:{port} from {netns.name}: {exc}") from exc
            time.sleep(0.02)


def expect(said: str, wanted: str) -> str:
    if wanted not in said:
        raise CommandFailed(f"{wanted!r} was expected, {said!r} came")
    return said


def web_server(host: Host) -> str:
    """The program that every workload runs: SERVER NAME PORT."""
    file = host.folder / "server.py"
    file.write_text(SERVE)
    return str(file)


def open_node(story: Story) -> Host:
    story.chapter("A node: network namespaces of its own, an uplink, and an outside to be reached from")
    with story.step(f"namespaces and uplink: node {UPLINK}, outside {OUTSIDE}"):
        host = Host(firewall="nftables")
    try:
        with story.step("towpath cni install: the CNI executables"):
            host.towpath("cni", "install", str(host.bin))
        with story.step("towpath agent: serves, state on disk"):
            host.agent.start()
    except BaseException:
        print(host.agent.tail(), file=sys.stderr)
        host.close()
        raise
    return host


def bare_commands(story: Story, host: Host) -> None:
    story.chapter("Bare commands, no container runtime: towpath run")
    with story.step("towpath network create web --subnet 10.44.0.0/24"):
        host.towpath("network", "create", "web", "--subnet", "10.44.0.0/24")
    with story.step("towpath run --network web --name shop -p 8080:80 -- (a web server)"):
        argv = ("run", "-d", "--network", "web", "--name", "shop", "-p", "8080:80")
        host.towpath(*argv, "--", PYTHON, web_server(host), "shop", "80")
    with story.step("towpath run --network web --name buyer -- sleep"):
        host.towpath("run", "-d", "--network", "web", "--name", "buyer", "--", "sleep", "600")
    with story.step("from outside, to the node's port 8080") as tell:
        tell(expect(get(host.outside, UPLINK, 8080), f"shop saw you as {OUTSIDE}"))
    with story.step("from the node itself, 127.0.0.1:8080") as tell:
        tell(expect(get(host.netns, "127.0.0.1", 8080), "shop saw you as"))
    for who, what in (("buyer", "a sibling"), ("shop", "itself, through the node and back")):
        with story.step(f"towpath exec {who} -- (fetch http://{UPLINK}:8080): from {what}") as tell:
            done = host.towpath("exec", who, "--", PYTHON, "-c", FETCH, f"http://{UPLINK}:8080")
            tell(expect(done.stdout.decode().strip(), "shop saw you as"))


def host_network(story: Story, host: Host) -> None:
    story.chapter("The host network: no namespace of its own, the node's addresses")
    with story.step("towpath run --network host --name metrics -- (a web server on 9100)"):
        argv = ("run", "-d", "--network", "host", "--name", "metrics")
        host.towpath(*argv, "--", PYTHON, web_server(host), "metrics", "9100")
    with story.step(f"from outside, {UPLINK}:9100") as tell:
        tell(expect(get(host.outside, UPLINK, 9100), f"metrics saw you as {OUTSIDE}"))
    with story.step("towpath ps") as tell:
        for line in host.towpath("ps").stdout.decode().splitlines():
            tell(line)


def cni(story: Story, host: Host) -> None:
    story.chapter("CNI, as Podman, containerd and Mesos call it: one call for interface, address, ports, masquerade")
    container = host.container("cni-")
    plugin = {
        "type": "towpath-bridge",
        "bridge": "cni0",
        "isDefaultGateway": True,
        "ipMasq": True,
        "capabilities": {"portMappings": True},
        "ipam": {"type": "towpath-ipam", "subnet": "10.45.0.0/24"},
    }
    runtime = Runtime(host.exec(str(host.bin)), "cnidemo", [plugin])
    ports = [{"hostPort": 8081, "containerPort": 80, "protocol": "tcp"}]
    with story.step("ADD towpath-bridge, hostPort 8081 → containerPort 80") as tell:
        result = must(runtime.add(container.id, container.path, portMappings=ports))
        tell(f"{result['ips'][0]['address']}, gateway {result['ips'][0]['gateway']}")
    container.serve(tcp=(80,))
    with story.step("from outside, to the node's port 8081") as tell:
        answer = ask(host.outside, UPLINK, 8081)
        tell(f"the container saw {answer.seen_from}")
    with story.step("DEL: interface, address and port are free again"):
        must(runtime.delete(container.id, container.path))
    with story.step("towpath network rm cnidemo"):
        host.towpath("network", "rm", "cnidemo")
        host.netns.call("ip", "link", "del", "cni0")


def clean_up(story: Story, host: Host, before: Picture) -> None:
    story.chapter("Everything goes again")
    with story.step("towpath stop shop buyer metrics; towpath network rm web"):
        host.towpath("stop", "--time", "0", "shop", "buyer", "metrics")
        host.towpath("network", "rm", "web")
        host.netns.call("ip", "link", "del", "br-web")
    with story.step("rules, links, routes and rows are those of the beginning"):
        left = [line for line in picture(host) - before if "nft inet towpath" not in line]
        if left:
            raise CommandFailed("left behind:\n" + "\n".join(left))


def main() -> int:
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    if os.geteuid() != 0:
        print("make demo needs root: it makes network namespaces", file=sys.stderr)
        return 1
    story = Story()
    host = open_node(story)
    try:
        before = picture(host)
        bare_commands(story, host)
        host_network(story, host)
        cni(story, host)
        clean_up(story, host, before)
    except (CommandFailed, Unreachable) as exc:
        print(f"\n{exc}\n\nthe agent's log:\n{host.agent.tail()}", file=sys.stderr)
        host.towpath("stop", "--time", "0", "shop", "buyer", "metrics", check=False)
        return 1
    finally:
        host.close()
    print(f"\nAll of it in {time.monotonic() - story.begin:.1f} s, and nothing is left.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
