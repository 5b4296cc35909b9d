"""Who calls CNI executables: a runtime as libcni drives them, and Mesos as UCR drives them."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from integration.namespaces import CommandFailed, Netns

Json = dict[str, Any]
PATH = "/usr/sbin:/usr/bin:/sbin:/bin"


@dataclass(frozen=True, slots=True)
class Reply:
    """What one executable answered. `seconds` is from its start to its end."""

    exit: int
    stdout: bytes
    stderr: bytes
    seconds: float

    @property
    def ok(self) -> bool:
        return self.exit == 0

    @property
    def json(self) -> Json:
        """The JSON on standard output; {} where there is none."""
        found: Json = json.loads(self.stdout) if self.stdout.strip() else {}
        return found

    @property
    def code(self) -> int:
        """The CNI error code (CNI spec 1.1.0 section 5); 0 = no error."""
        return 0 if self.ok else int(self.json["code"])

    @property
    def text(self) -> str:
        """The error in words: msg and details."""
        return f"{self.json.get('msg', '')} {self.json.get('details', '')}".strip()

    def __str__(self) -> str:
        return f"exit {self.exit}: {self.stdout.decode(errors='replace')} {self.stderr.decode(errors='replace')}"


def must(reply: Reply) -> Json:
    """The result of a call that has to succeed."""
    if not reply.ok:
        raise CommandFailed(str(reply))
    return reply.json


def addresses(result: Mapping[str, Any]) -> list[str]:
    """Addresses of a result, without prefix, in order; any version's shape."""
    if "ips" in result:
        return [ip["address"].split("/")[0] for ip in result["ips"]]
    return [result[key]["ip"].split("/")[0] for key in ("ip4", "ip6") if key in result]


@dataclass(frozen=True, slots=True)
class Exec:
    """Starts executables of `folders` in one host's namespace, as any runtime does."""

    host: Netns
    folders: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=dict)
    through: tuple[str, ...] = ()  # a program that starts the executable: another runtime, as the agent sees it

    def find(self, plugin: str) -> str:
        for folder in self.folders:
            if (Path(folder) / plugin).exists():
                return str(Path(folder) / plugin)
        raise CommandFailed(f"no executable {plugin} in {self.folders}")

    def __call__(self, plugin: str, variables: Mapping[str, str], stdin: bytes) -> Reply:
        env = {"PATH": PATH, "CNI_PATH": ":".join(self.folders), **self.env, **variables}
        begin = time.perf_counter()
        done = self.host.call(*self.through, self.find(plugin), stdin=stdin, env=env)
        return Reply(done.returncode, done.stdout, done.stderr, time.perf_counter() - begin)


@dataclass(slots=True)
class Runtime:
    """One network list, called as libcni calls it: in order for ADD and CHECK, backwards for DEL, results handed on.

    `plugins` are the objects of a conflist. Results are kept per (container, interface), as libcni's cache does.
    """

    run: Exec
    name: str
    plugins: Sequence[Json]
    version: str = "1.0.0"
    results: dict[tuple[str, str], Json] = field(default_factory=dict)
    asked: dict[tuple[str, str], Json] = field(default_factory=dict)

    def add(self, container: str, netns: str, ifname: str = "eth0", *, args: str = "", **capabilities: Any) -> Reply:
        """ADD through the whole list; the first error ends it (and, as runtimes do, nothing is undone)."""
        result: Json = {}
        reply = None
        self.asked[container, ifname] = dict(capabilities)
        for plugin in self.plugins:
            config = self.config(plugin, capabilities, result)
            reply = self.run(plugin["type"], variables("ADD", container, netns, ifname, args), encode(config))
            if not reply.ok:
                return reply
            result = reply.json
        assert reply is not None
        self.results[container, ifname] = result
        return reply

    def delete(self, container: str, netns: str, ifname: str = "eth0", *, args: str = "", prev: bool = True) -> Reply:
        """DEL through the list backwards. prev=False: the runtime lost its cache."""
        result = self.results.get((container, ifname), {}) if prev else {}
        asked = self.asked.get((container, ifname), {}) if prev else {}
        reply = self._each("DEL", container, netns, ifname, args, result, asked, backwards=True)
        if reply.ok:
            self.results.pop((container, ifname), None)
        return reply

    def check(self, container: str, netns: str, ifname: str = "eth0") -> Reply:
        result = self.results[container, ifname]
        return self._each("CHECK", container, netns, ifname, "", result, self.asked[container, ifname])

    def _each(
        self,
        verb: str,
        container: str,
        netns: str,
        ifname: str,
        args: str,
        result: Json,
        asked: Json,
        *,
        backwards: bool = False,
    ) -> Reply:
        reply = None
        for plugin in reversed(self.plugins) if backwards else self.plugins:
            config = self.config(plugin, asked, result)
            reply = self.run(plugin["type"], variables(verb, container, netns, ifname, args), encode(config))
            if not reply.ok:
                break
        assert reply is not None
        return reply

    def gc(self, valid: Sequence[tuple[str, str]]) -> Reply:
        """GC of everything of this network but `valid` (container, interface)."""
        return self._list("GC", {"cni.dev/valid-attachments": [{"containerID": c, "ifname": i} for c, i in valid]})

    def status(self) -> Reply:
        return self._list("STATUS", {})

    def _list(self, verb: str, more: Json) -> Reply:
        reply = None
        for plugin in self.plugins:
            config = {**self.config(plugin, {}, {}), **more}
            reply = self.run(plugin["type"], {"CNI_COMMAND": verb}, encode(config))
            if not reply.ok:
                break
        assert reply is not None
        return reply

    def config(self, plugin: Json, capabilities: Mapping[str, object], result: Json) -> Json:
        """One plug-in's standard input: its object with name, version, runtimeConfig and prevResult put in."""
        config = {**plugin, "name": self.name, "cniVersion": self.version}
        wanted = plugin.get("capabilities", {})
        if given := {key: value for key, value in capabilities.items() if wanted.get(key)}:
            config["runtimeConfig"] = given
        if result:
            config["prevResult"] = result
        return config


def variables(verb: str, container: str, netns: str | None, ifname: str, args: str = "") -> dict[str, str]:
    """The CNI_* environment of a call about one container (CNI spec 1.1.0 section 2); netns None = not set at all."""
    found = {"CNI_COMMAND": verb, "CNI_CONTAINERID": container, "CNI_IFNAME": ifname}
    if netns is not None:
        found["CNI_NETNS"] = netns
    if args:
        found["CNI_ARGS"] = args
    return found


def encode(config: object) -> bytes:
    return json.dumps(config).encode()


@dataclass(frozen=True, slots=True)
class Mesos:
    """Mesos's network/cni isolator: single-plugin configuration, no CNI_ARGS, no CHECK, the same JSON again at DEL.

    A DEL after a reboot has no CNI_NETNS at all. Results must be the old shape, else a task shows no address.
    """

    run: Exec
    config: Json

    def add(self, container: str, netns: str, ifname: str = "eth0", **network_info: object) -> Reply:
        env = variables("ADD", container, netns, ifname)
        return self.run(self.config["type"], env, encode(self._stdin(network_info)))

    def delete(self, container: str, netns: str | None = None, ifname: str = "eth0", **network_info: object) -> Reply:
        env = variables("DEL", container, netns, ifname)
        return self.run(self.config["type"], env, encode(self._stdin(network_info)))

    def _stdin(self, network_info: Mapping[str, object]) -> Json:
        info = {"name": self.config["name"], **network_info}
        return {**self.config, "args": {**self.config.get("args", {}), "org.apache.mesos": {"network_info": info}}}
