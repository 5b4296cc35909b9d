"""Records as the control API shows them: every key always there, addresses as text, the key's parts on top."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from towpath.model import Attachment, Network

Usage = tuple[str, str, int, int, int]


def plain(value: Any) -> Any:
    """Anything of the model as JSON takes it: records become mappings, addresses text. Nothing is left out."""
    if is_dataclass(value):
        return {f.name: plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, tuple | list):
        return [plain(v) for v in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return str(value)


def attachment(record: Attachment) -> dict[str, Any]:
    """The record with its key flat beside it; `id` is origin/network/container/ifname, addresses are ADDRESS/LENGTH."""
    body: dict[str, Any] = plain(record)
    key = body.pop("key")
    return {
        "id": str(record.key),
        **key,
        **body,
        "labels": dict(record.labels),
        "addresses": [str(lease.address) for lease in record.leases],
    }


def network(row: Network) -> dict[str, Any]:
    """The row, with the device that carries it and its subnets."""
    device = row.device if row.mode == "bridge" else ""
    subnets = [str(span.subnet) for pool in row.pools for span in pool.ranges]
    return {**plain(row), "device": device, "subnets": list(dict.fromkeys(subnets))}


def pool(usage: Usage) -> dict[str, Any]:
    return dict(zip(("network", "pool", "size", "used", "free"), usage, strict=True))


# --- metrics: Prometheus text format 0.0.4 --------------------------------------------------------------------------

Sample = tuple[Mapping[str, str], float]


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def family(name: str, kind: str, meaning: str, samples: Iterable[Sample]) -> str:
    """One metric: its HELP and TYPE lines and a line per sample."""
    lines = [f"# HELP {name} {meaning}", f"# TYPE {name} {kind}"]
    for labels, value in samples:
        inner = ",".join(f'{key}="{_escaped(text)}"' for key, text in labels.items())
        lines.append(f"{name}{{{inner}}} {value:.15g}" if inner else f"{name} {value:.15g}")
    return "\n".join(lines) + "\n"


def metrics(
    records: Iterable[Attachment], networks: int, usage: Iterable[Usage], steps: Mapping[str, int], started: float
) -> str:
    """The page of GET /metrics. `steps`: how often each step of an ADD or DEL was gone through since the start."""
    tally: dict[tuple[str, str, str], int] = {}
    for record in records:
        place = (record.key.origin, record.key.network, record.phase)
        tally[place] = tally.get(place, 0) + 1
    attached = [(dict(zip(("origin", "network", "phase"), place, strict=True)), n) for place, n in tally.items()]
    pools = list(usage)
    size = [({"network": name, "pool": text}, total) for name, text, total, _, _ in pools]
    used = [({"network": name, "pool": text}, taken) for name, text, _, taken, _ in pools]
    begun, done = steps.get("claim", 0), steps.get("mark", 0)
    return "".join(
        (
            family("towpath_start_time_seconds", "gauge", "When the agent started, Unix time.", [({}, started)]),
            family("towpath_networks", "gauge", "Networks of this node.", [({}, networks)]),
            family("towpath_attachments", "gauge", "Attachments of this node.", attached),
            family("towpath_pool_addresses", "gauge", "Addresses that a pool can lease.", size),
            family("towpath_pool_leases", "gauge", "Addresses of a pool that are leased.", used),
            family("towpath_adds_begun_total", "counter", "ADDs that claimed or tried to.", [({}, begun)]),
            family("towpath_adds_total", "counter", "ADDs done; those begun and not done failed.", [({}, done)]),
            family(
                "towpath_dels_total", "counter", "Detaches, of failed ADDs too.", [({}, steps.get("undo links", 0))]
            ),
        )
    )
