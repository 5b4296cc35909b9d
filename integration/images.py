"""A container image of one program, Debian's static busybox, written as an OCI archive without any registry."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from pathlib import Path

NAME = "docker.io/library/towpath-test:latest"
BUSYBOX = Path("/bin/busybox")
APPLETS = ("sh", "sleep", "ip", "cat", "mkdir", "echo", "httpd", "wget", "nc", "true")


def layer() -> bytes:
    """A root file system: busybox and the names under which it is called."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for folder in ("bin", "etc", "tmp", "proc", "sys", "dev"):
            entry = tarfile.TarInfo(folder)
            entry.type, entry.mode = tarfile.DIRTYPE, 0o755
            tar.addfile(entry)
        body = BUSYBOX.read_bytes()
        entry = tarfile.TarInfo("bin/busybox")
        entry.size, entry.mode = len(body), 0o755
        tar.addfile(entry, io.BytesIO(body))
        for applet in APPLETS:
            entry = tarfile.TarInfo(f"bin/{applet}")
            entry.type, entry.linkname = tarfile.SYMTYPE, "busybox"
            tar.addfile(entry)
    return out.getvalue()


def write(path: Path) -> None:
    """The image as an OCI archive (image-spec 1.0, image layout) that podman load and ctr images import take."""
    rootfs = layer()
    blobs = {digest(rootfs): rootfs}
    config = encode(
        {
            "architecture": "amd64",
            "os": "linux",
            "config": {"Cmd": ["/bin/sh"], "Env": ["PATH=/bin"]},
            "rootfs": {"type": "layers", "diff_ids": [f"sha256:{digest(rootfs)}"]},
        }
    )
    manifest = encode(
        {
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": pointer("application/vnd.oci.image.config.v1+json", config),
            "layers": [pointer("application/vnd.oci.image.layer.v1.tar", rootfs)],
        }
    )
    names = {"org.opencontainers.image.ref.name": NAME, "io.containerd.image.name": NAME}
    entry = {**pointer("application/vnd.oci.image.manifest.v1+json", manifest), "annotations": names}
    index = encode({"schemaVersion": 2, "manifests": [entry]})
    blobs |= {digest(config): config, digest(manifest): manifest}
    files = {"oci-layout": encode({"imageLayoutVersion": "1.0.0"}), "index.json": index}
    files |= {f"blobs/sha256/{name}": body for name, body in blobs.items()}
    with tarfile.open(path, "w") as tar:
        for name, body in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(body)
            tar.addfile(info, io.BytesIO(body))


def pointer(media: str, body: bytes) -> dict[str, object]:
    return {"mediaType": media, "digest": f"sha256:{digest(body)}", "size": len(body)}


def digest(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()


def encode(value: object) -> bytes:
    return json.dumps(value).encode()
