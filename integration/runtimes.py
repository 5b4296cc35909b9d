"""Real runtimes on a host of the lab, driven by their own commands: Podman with its CNI backend, and containerd."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

from integration import images
from integration.callers import Json
from integration.lab import REFERENCE, Host
from integration.namespaces import CommandFailed

# Hard limits of a container may not exceed those of whoever starts it: containers of containers often have low ones.
LIMITS = ("--ulimit", "nofile=1024:1024", "--ulimit", "nproc=1024:1024")

CONTAINERS_CONF = """[engine]
cgroup_manager = "cgroupfs"
events_logger = "file"
[network]
network_backend = "cni"
network_config_dir = "{networks}"
cni_plugin_dirs = ["{ours}", "{reference}"]
"""

CONTAINERD_CONF = """version = 2
root = "{folder}/root"
state = "{folder}/state"
disabled_plugins = ["io.containerd.grpc.v1.cri"]
[grpc]
address = "{folder}/containerd.sock"
"""


class Conflists:
    """A folder of network lists as a runtime reads it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True)

    def write(self, name: str, *plugins: Json, version: str = "0.4.0") -> None:
        body = {"cniVersion": version, "name": name, "plugins": list(plugins)}
        (self.folder / f"87-{name}.conflist").write_text(json.dumps(body))


class Podman:
    """Podman with storage of its own; its containers live on `host`. Needs runc: crun refuses some cgroup layouts."""

    def __init__(self, host: Host) -> None:
        self.host = host
        self.folder = host.folder / "podman"
        self.networks = Conflists(self.folder / "net.d")
        config = CONTAINERS_CONF.format(networks=self.networks.folder, ours=host.bin, reference=REFERENCE)
        (self.folder / "containers.conf").write_text(config)
        image = self.folder / "image.tar"
        images.write(image)
        self.run("load", "-q", "-i", str(image))

    def run(self, *argv: str) -> str:
        """Standard output of one podman command. Raises CommandFailed."""
        stores = ("--root", str(self.folder / "root"), "--runroot", str(self.folder / "run"))
        env = {**os.environ, **self.host.env, "CONTAINERS_CONF": str(self.folder / "containers.conf")}
        done = self.host.netns.call("podman", "--runtime", "runc", *stores, *argv, env=env, timeout=60)
        if done.returncode:
            said = (done.stdout + done.stderr).decode(errors="replace")
            raise CommandFailed(f"podman {' '.join(argv)}: exit {done.returncode}\n{said}")
        return done.stdout.decode().strip()

    def serve(self, name: str, *options: str, port: int = 80) -> str:
        """A container that answers its name by HTTP on `port`; returns its id."""
        script = f"mkdir -p /w; echo {name} >/w/x; exec httpd -f -p {port} -h /w"
        return self.run("run", "-d", "--name", name, *LIMITS, *options, images.NAME, "sh", "-c", script)

    def addresses(self, name: str, network: str) -> Json:
        """What podman thinks the container has on this network."""
        found = json.loads(self.run("inspect", name))[0]["NetworkSettings"]["Networks"][network]
        return dict(found)

    def close(self) -> None:
        self.run("rm", "-f", "-a", "-t", "0")
        self.run("rmi", "-f", "-a")


class Containerd:
    """A containerd of its own in the host's namespace. `ctr run --cni` reads /etc/cni/net.d and /usr/lib/cni: in a
    private mount namespace other folders lie there."""

    def __init__(self, host: Host) -> None:
        self.host = host
        self.folder = host.folder / "containerd"
        self.networks = Conflists(self.folder / "net.d")
        (self.folder / "config.toml").write_text(CONTAINERD_CONF.format(folder=self.folder))
        for folder in ("/etc/cni/net.d", "/run/containerd"):
            Path(folder).mkdir(parents=True, exist_ok=True)
        binds = [(self.networks.folder, "/etc/cni/net.d")] + [(host.bin, REFERENCE)] * any(host.bin.iterdir())
        mounts = ["mount -t tmpfs tmpfs /run/containerd"] + [f"mount --bind {what} {where}" for what, where in binds]
        script = " && ".join([*mounts, f"exec containerd -c {self.folder}/config.toml"])
        with (self.folder / "log").open("wb") as log:
            argv = ("unshare", "--mount", "--propagation", "slave", "sh", "-c", script)
            self.process = host.netns.start(*argv, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
        self._wait()
        image = self.folder / "image.tar"
        images.write(image)
        self.ctr("images", "import", str(image))

    def _wait(self) -> None:
        end = time.monotonic() + 20
        while time.monotonic() < end and self.process.poll() is None:
            if (self.folder / "containerd.sock").exists():
                try:
                    self.ctr("version")
                except CommandFailed:
                    pass
                else:
                    return
            time.sleep(0.05)
        raise CommandFailed(f"containerd does not serve:\n{(self.folder / 'log').read_text()[-3000:]}")

    def ctr(self, *argv: str) -> str:
        """Standard output of one ctr command in containerd's mount namespace. Raises CommandFailed."""
        there = ("nsenter", "--target", str(self.process.pid), "--mount")
        base = (*there, "ctr", "--address", str(self.folder / "containerd.sock"), "--namespace", "towpath")
        done = self.host.netns.call(*base, *argv, env={**os.environ, **self.host.env}, timeout=60)
        if done.returncode:
            said = (done.stdout + done.stderr).decode(errors="replace")
            raise CommandFailed(f"ctr {' '.join(argv)}: exit {done.returncode}\n{said}")
        return done.stdout.decode().strip()

    def run(self, name: str, *command: str) -> str:
        """What a command prints in a container of its own on the first network."""
        return self.ctr("run", "--rm", "--cni", images.NAME, name, *command)

    def close(self) -> None:
        self.process.terminate()
        self.process.wait(15)
        for pid in self._shims():  # each container's shim outlives containerd on purpose
            os.kill(pid, signal.SIGKILL)

    def _shims(self) -> list[int]:
        """Processes that were started for this very containerd: they name its socket."""
        needle = str(self.folder / "containerd.sock").encode()
        found = []
        for entry in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                if needle in entry.read_bytes():
                    found.append(int(entry.parent.name))
            except OSError:
                continue  # it ended meanwhile
        return found


def lacks(*programs: str) -> str:
    """Which of these programs this machine does not have, in words; "" = none."""
    missing = [program for program in programs if shutil.which(program) is None]
    return f"needs {', '.join(missing)}" if missing else ""
