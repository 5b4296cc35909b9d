"""What a runtime says beside the configuration: the CNI_* variables of one call, checked in the order of the reference.

CNI spec 1.1.0 section 2 "Parameters". All errors are code 4 and name the variable.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from towpath.errors import BadConfig, BadEnvironment, Unreadable
from towpath.model import check_ifname, check_name

REQUIRED = {
    "ADD": ("CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME", "CNI_PATH"),
    "DEL": ("CNI_CONTAINERID", "CNI_IFNAME", "CNI_PATH"),
    "CHECK": ("CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME", "CNI_PATH"),
    "GC": ("CNI_PATH",),
    "STATUS": ("CNI_PATH",),
    "VERSION": (),
}
# Keys of CNI_ARGS that runtimes send: those we honour, and those of Kubernetes that do no harm.
KNOWN_ARGS = frozenset(
    {
        "IP",
        "MAC",
        "GATEWAY",
        "IgnoreUnknown",
        "K8S_POD_NAME",
        "K8S_POD_NAMESPACE",
        "K8S_POD_INFRA_CONTAINER_ID",
        "K8S_POD_UID",
    }
)
TRUE = ("1", "true", "TRUE", "True", "t", "T")


@dataclass(frozen=True, slots=True)
class Env:
    """One call. `variables` is the caller's whole environment, which delegates are given too."""

    command: str
    container: str = ""
    netns: str = ""
    ifname: str = ""
    args: Mapping[str, str] = field(default_factory=dict)
    path: tuple[str, ...] = ()
    own_netns_allowed: bool = False
    variables: Mapping[str, str] = field(default_factory=dict)


def split_body(body: bytes) -> tuple[dict[str, str], bytes]:
    """Environment and stdin of one forwarded call: `KEY=VALUE\\0` for each variable, `\\0`, then stdin as it came."""
    if body.startswith(b"\0"):
        return {}, body[1:]
    head, separator, stdin = body.partition(b"\0\0")
    if not separator:
        raise Unreadable("the request is cut short", hint="is the executable as new as the agent?")
    pairs = (entry.decode(errors="surrogateescape").partition("=") for entry in head.split(b"\0"))
    return {name: value for name, _, value in pairs}, stdin


def read_env(variables: Mapping[str, str]) -> Env:
    """Check the variables that the command needs. Raises BadEnvironment."""
    command = variables.get("CNI_COMMAND", "")
    if command not in REQUIRED:
        known = ", ".join(REQUIRED)
        raise BadEnvironment(f"CNI_COMMAND {command!r} is not known" if command else "CNI_COMMAND missing", hint=known)
    if missing := [name for name in REQUIRED[command] if not variables.get(name)]:
        raise BadEnvironment(f"required env variables [{','.join(missing)}] missing")
    if command in ("GC", "STATUS", "VERSION"):
        return Env(command, path=_path(variables), variables=variables)
    container, ifname = variables["CNI_CONTAINERID"], variables["CNI_IFNAME"]
    try:
        check_name("CNI_CONTAINERID", container)
        if not ifname.isprintable():  # also what is no UTF-8
            raise BadConfig(f"CNI_IFNAME {ifname!r} holds unprintable bytes")
        check_ifname("CNI_IFNAME", ifname)
    except BadConfig as exc:
        raise BadEnvironment(exc.what) from exc
    return Env(
        command,
        container,
        variables.get("CNI_NETNS", ""),
        ifname,
        # DEL uses none of them: one that is wrong must not keep anything alive.
        {} if command == "DEL" else read_args(variables.get("CNI_ARGS", "")),
        _path(variables),
        variables.get("CNI_NETNS_OVERRIDE", "").upper() in ("1", "TRUE"),
        variables,
    )


def _path(variables: Mapping[str, str]) -> tuple[str, ...]:
    return tuple(filter(None, variables.get("CNI_PATH", "").split(":")))


def read_args(text: str) -> dict[str, str]:
    """`K=V;K2=V2`. An unknown key is refused unless IgnoreUnknown is true, as the reference does."""
    found: dict[str, str] = {}
    for pair in filter(None, text.split(";")):
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise BadEnvironment(f"CNI_ARGS: {pair!r} is not KEY=VALUE")
        found[key] = value
    unknown = sorted(found.keys() - KNOWN_ARGS)
    if unknown and found.get("IgnoreUnknown", "") not in TRUE:
        raise BadEnvironment(f"CNI_ARGS: unknown args {unknown}", hint="IgnoreUnknown=1 lets them pass")
    return found
