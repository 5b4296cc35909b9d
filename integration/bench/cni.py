"""`make bench-cni`: our CNI executables beside the reference chain, in one namespace, in interleaved rounds.

Options: --quick (fewer rounds and containers). Prints a table and writes build/bench/cni.json. Absolute times are this
machine's; what is judged are ratios of medians of the same run.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

from integration.bench.subjects import Call, Files, Ours, Reference, Subject, many, one
from integration.bench.table import Row, compare, text, write
from integration.lab import REFERENCE, Container, Host, links
from integration.namespaces import CommandFailed

OUTPUT = Path("build/bench/cni.json")
Times = dict[str, list[float]]
CALM = 0.1  # seconds in which the kernel takes down the namespace of a container that went


class Bench:
    """One host with the nftables back end, both kinds of executables installed, and what was measured so far."""

    def __init__(self, host: Host, quick: bool) -> None:
        self.host = host
        self.quick = quick
        self.files = Files(host.folder / "calls")
        self.rows: list[Row] = []
        self.numbers = iter(range(20, 250))
        self.bins = {kind: str(host.folder / f"bin-{kind}") for kind in ("python", "c")}

    def install(self) -> None:
        for kind, compiler in (("python", "never"), ("c", "require")):
            Path(self.bins[kind]).mkdir()
            self.host.towpath("cni", "install", self.bins[kind], "--compiler", compiler)
        self.host.agent.start()

    def ours(self, kind: str, **keys: Any) -> Ours:
        number = next(self.numbers)
        return Ours(self.host, f"ours{number}", number, self.bins[kind], **keys)

    def reference(self, **keys: Any) -> Reference:
        number = next(self.numbers)
        return Reference(self.host, f"ref{number}", number, REFERENCE, **keys)

    def rounds(self, subjects: dict[str, Subject], count: int) -> tuple[Times, Times]:
        """ADD and DEL times per subject, each round one of each; the first round is not counted."""
        adds: Times = defaultdict(list)
        dels: Times = defaultdict(list)
        for n in range(count + 1):
            for name, subject in subjects.items():
                container = self.host.container("b")
                with self.host.netns.inside():
                    add = one(self.files, subject, "ADD", container)
                    gone = one(self.files, subject, "DEL", container)
                if not subject.extra.get("deferredDelete") and container.link() is not None:
                    raise CommandFailed(f"{name}: DEL answered while the interface was still there")
                container.remove()
                time.sleep(CALM)  # or the next one, whoever it is, pays for taking this namespace down
                if n:
                    adds[name].append(add)
                    dels[name].append(gone)
        return adds, dels

    def crowd(self, subject: Subject, size: int, width: int = 8) -> list[Container]:
        """`size` containers that stay."""
        held = [self.host.container("b") for _ in range(size)]
        with self.host.netns.inside():
            many(self.files, subject, "ADD", held, width)
        return held


def say(what: str) -> None:
    print(f"==> {what}", flush=True)


def sequential(bench: Bench) -> float:
    """One container at a time on an empty host; returns the median of our Python executable's ADD in seconds."""
    say("one call against the chain: bridge with masquerade, host-local, portmap with one port")
    subjects: dict[str, Subject] = {
        "reference": bench.reference(),
        "python": bench.ours("python"),
        "c": bench.ours("c"),
        "deferred": bench.ours("c", extra={"deferredDelete": True}),
    }
    adds, dels = bench.rounds(subjects, 7 if bench.quick else 25)
    bench.rows += compare("ADD, Python executable / chain", adds["python"], adds["reference"], 0.25)
    bench.rows += compare("ADD, C executable / chain", adds["c"], adds["reference"], 0.1)
    bench.rows += compare("DEL, Python executable / chain", dels["python"], dels["reference"], 0.2)
    bench.rows += compare("DEL, C executable / chain", dels["c"], dels["reference"], 0.2)
    bench.rows += compare("DEL with deferredDelete, C executable / chain", dels["deferred"], dels["reference"], 0.08)
    return sorted(adds["python"])[len(adds["python"]) // 2]


def share(bench: Bench) -> None:
    """Where the time of an ADD and DEL goes inside the agent; without a peer, told only."""
    for step, spans in sorted(bench.host.agent.get("/v1/status").get("timings", {}).items()):
        bench.rows.append(Row(f"agent's share: {step}, median", "ms", spans["median_ms"], None, None))


def fair(bench: Bench) -> None:
    say("the fair row: plain bridge and addresses, no masquerade, no ports")
    plain: dict[str, Any] = {"ports": False, "masquerade": False}
    subjects: dict[str, Subject] = {
        "reference": bench.reference(**plain),
        "python": bench.ours("python", **plain),
        "c": bench.ours("c", **plain),
    }
    adds, dels = bench.rounds(subjects, 7 if bench.quick else 25)
    bench.rows += compare("plain ADD, Python executable / bridge", adds["python"], adds["reference"], 1.1)
    bench.rows += compare("plain ADD, C executable / bridge", adds["c"], adds["reference"], 0.3)
    bench.rows += compare("plain DEL, Python executable / bridge", dels["python"], dels["reference"], None)


def version(bench: Bench) -> None:
    """The executable's own share: VERSION is answered without the agent."""
    say("VERSION: what starting the executable costs")
    programs = {"reference": f"{REFERENCE}/bridge"} | {k: f"{v}/towpath-bridge" for k, v in bench.bins.items()}
    times: Times = defaultdict(list)
    with bench.host.netns.inside():
        for _ in range(20 if bench.quick else 100):
            for name, program in programs.items():
                call = Call(program, {"CNI_COMMAND": "VERSION"}, b'{"cniVersion":"1.0.0"}')
                times[name].append(bench.files.run(call)[1])
    bench.rows += compare("VERSION, Python executable / Go plug-in", times["python"], times["reference"], 5)
    bench.rows += compare("VERSION, C executable / Go plug-in", times["c"], times["reference"], 5)


def parallel(bench: Bench) -> None:
    say("sixteen callers at once")
    size = 32 if bench.quick else 96
    rates: dict[str, tuple[list[float], list[float]]] = {}
    subjects: dict[str, Subject] = {
        "reference": bench.reference(),
        "python": bench.ours("python"),
        "c": bench.ours("c"),
    }
    for _ in range(1 if bench.quick else 2):
        for name, subject in subjects.items():
            held = [bench.host.container("b") for _ in range(size)]
            with bench.host.netns.inside():
                spans = [many(bench.files, subject, verb, held, 16) for verb in ("ADD", "DEL")]
            for container in held:
                container.remove()
            adds, dels = rates.setdefault(name, ([], []))
            adds.append(size / spans[0])
            dels.append(size / spans[1])
    best = {name: (max(adds), max(dels)) for name, (adds, dels) in rates.items()}
    for kind, words in (("python", "Python"), ("c", "C")):
        for n, (verb, bar) in enumerate((("ADD", 6.0), ("DEL", 15.0))):
            ours, peer = best[kind][n], best["reference"][n]
            bench.rows.append(Row(f"16 callers, {verb}, {words} executable / chain", "1/s", ours, peer, bar, more=True))


def crowded(bench: Bench, empty: float) -> list[Container]:
    """With many containers present; `empty` is our median ADD on the empty host. Returns those of ours that stay."""
    size = 100 if bench.quick else 500
    reference, ours = bench.reference(), bench.ours("python")
    fast = Ours(bench.host, ours.name, ours.number, bench.bins["c"])
    say(f"{size} containers of each present (the reference takes about {size / 8.5:.0f} s to get there)")
    kept = bench.crowd(fast, size)
    theirs = bench.crowd(reference, size)
    adds, dels = bench.rounds({"reference": reference, "python": ours, "c": fast}, 5 if bench.quick else 12)
    bench.rows += compare(f"ADD, {size} present, Python executable / chain", adds["python"], adds["reference"], 0.03)
    bench.rows += compare(f"ADD, {size} present, C executable / chain", adds["c"], adds["reference"], 0.03)
    bench.rows += compare(f"DEL, {size} present, Python executable / chain", dels["python"], dels["reference"], None)
    bench.rows += compare(f"ADD, {size} present / empty host, Python executable", adds["python"], [empty], 1.3)[:1]
    for container in theirs:
        container.remove()
    return kept


def resident(pid: int) -> float:
    """VmRSS of a process in MB (10^6 bytes)."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024 / 1e6
    raise CommandFailed(f"process {pid} tells no VmRSS")


def busy(pid: int) -> float:
    """CPU seconds of all its threads so far (/proc/PID/task/*/schedstat counts nanoseconds)."""
    tasks = Path(f"/proc/{pid}/task").glob("*/schedstat")
    return sum(int(task.read_text().split()[0]) for task in tasks) / 1e9


def settle(host: Host, quiet: float = 3.0, wait: float = 60.0) -> None:
    """Wait until links stop going: the kernel takes dead namespaces down in its own time, and each is an event."""
    end, seen, since = time.monotonic() + wait, -1, time.monotonic()
    while time.monotonic() < min(end, since + quiet):
        count = len(links(host.netns))
        if count != seen:
            seen, since = count, time.monotonic()
        time.sleep(0.25)


def idle(bench: Bench, kept: list[Container]) -> None:
    size = 1000
    say(f"memory and idle CPU with {size} attachments")
    more = bench.crowd(bench.ours("c"), size - len(kept), 16)
    pid = bench.host.agent.pid
    bench.rows.append(Row(f"agent's memory, {size} attachments", "MB", resident(pid), None, 100))
    took = bench.host.agent.restart()
    bench.rows.append(Row(f"restart with {size} attachments until it serves", "s", took, None, 1.0))
    pid = bench.host.agent.pid
    settle(bench.host)
    time.sleep(5 if bench.quick else 20)  # the kernel tells of the last links and ports for some seconds more
    bench.rows.append(Row(f"agent's memory, {size} attachments, after the restart", "MB", resident(pid), None, 100))
    span = 3 if bench.quick else 10
    before = busy(pid)
    time.sleep(span)
    bench.rows.append(Row("agent's idle CPU", "%", (busy(pid) - before) / span * 100, None, 0.2))
    for container in kept + more:
        container.remove()


def measure(host: Host, quick: bool) -> list[Row]:
    bench = Bench(host, quick)
    bench.install()
    time.sleep(1)
    bench.rows.append(Row("agent's memory, no attachment", "MB", resident(host.agent.pid), None, 60))
    version(bench)
    fair(bench)
    empty = sequential(bench)
    share(bench)
    parallel(bench)
    idle(bench, crowded(bench, empty))
    return bench.rows


def main() -> int:
    parser = argparse.ArgumentParser(prog="make bench-cni", description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--quick", action="store_true", help="fewer rounds and containers: a look, not a figure")
    quick = parser.parse_args().quick
    if os.geteuid() != 0:
        print("needs root: it makes network namespaces", file=sys.stderr)
        return 1
    begin = time.monotonic()
    host = Host(firewall="nftables")
    try:
        rows = measure(host, quick)
    except BaseException:
        print(host.agent.tail(), file=sys.stderr)
        raise
    finally:
        host.close()
    took = time.monotonic() - begin
    print(f"\n{platform.machine()}, {os.cpu_count()} cores, Linux {platform.release()}; {took:.0f} s\n")
    print(text(rows))
    write(rows, OUTPUT)
    print(f"\nwritten to {OUTPUT}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
