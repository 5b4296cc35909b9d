"""The keys of the chained plug-ins — portmap, firewall, bandwidth, tuning — as records.

Facts: the pages of the reference plug-ins (containernetworking.github.io/plugins "meta"). A key of theirs that has no
counterpart here is refused with code 2, never ignored.
"""

from __future__ import annotations

import re
from pathlib import Path

from towpath.errors import BadConfig, TowpathError, UnsupportedField
from towpath.model import Bandwidth, PortRules, Tuning

from . import conf as confs
from .conf import Conf
from .env import Env
from .section import Section, shown

POLICIES = {
    "": "open",
    "open": "open",
    "same-bridge": "same-network",
    "same-network": "same-network",
    "isolated": "isolated",
}
BURST_LIMIT = 2**32 * 8  # bits: tc keeps the burst in 32-bit bytes
ALLOWLIST = Path("/etc/cni/tuning/allowlist.conf")


def unsupported(section: Section, key: str, why: str) -> UnsupportedField:
    """The error for a known key whose value asks for what is not served (code 2 names key and value)."""
    return UnsupportedField(f"unsupported field {section.at(key)}: {shown(section.raw.get(key))}", hint=why)


def refuse(section: Section, key: str, harmless: tuple[object, ...], why: str) -> None:
    """Raise UnsupportedField unless the key is absent or one of the `harmless` values."""
    if key in section and section.raw[key] not in harmless:
        raise unsupported(section, key, why)


# --- ports -----------------------------------------------------------------------------------------------------------


def port_rules(body: Section) -> PortRules:
    """How ports are published. The agent's setting picks the back end; a stated `backend` must be a known one."""
    body.choice("backend", ("", "iptables", "nftables"))
    chain = body.text("externalSetMarkChain")
    if chain and "markMasqBit" in body:
        raise BadConfig("externalSetMarkChain and markMasqBit exclude each other")
    rules = PortRules(
        snat=body.flag("snat", True),
        masquerade_all=body.flag("masqAll"),
        mark_bit=body.number("markMasqBit", 13, high=31),
        set_mark_chain=chain,
        conditions_v4=body.texts("conditionsV4"),
        conditions_v6=body.texts("conditionsV6"),
    )
    _check_conditions(body)
    return rules


def _check_conditions(body: Section) -> None:
    """Conditions are match words; one that could end a rule or start another has no business there."""
    for key in ("conditionsV4", "conditionsV6"):
        for word in body.texts(key):
            if not word or any(c in '\n\r;{}#\\"' or not c.isprintable() for c in word):
                raise body.wrong(key, f"holds {shown(word)}, which is no word of a rule")


# --- firewall --------------------------------------------------------------------------------------------------------


def isolation(body: Section, key: str) -> str:
    """The isolation policy below `key`, the reference's names included."""
    return POLICIES[body.choice(key, tuple(POLICIES))]


def check_firewall(body: Section) -> None:
    refuse(body, "backend", ("", "iptables", "nftables"), "rules are made with nftables or iptables only")
    refuse(body, "iptablesAdminChainName", ("", "CNI-ADMIN"), "the administrator's chain has a fixed name")
    refuse(body, "firewalldZone", ("", "trusted"), "there is no firewalld back end")


# --- bandwidth -------------------------------------------------------------------------------------------------------


def bandwidth(static: Section, runtime: Section) -> Bandwidth:
    """Rates of the configuration, else of the runtime. A rate needs its burst and a burst its rate (bits/s, bits)."""
    keys = ("ingressRate", "ingressBurst", "egressRate", "egressBurst")
    source = static if any(static.raw.get(key) for key in keys) else runtime
    values = {key: source.number(key, high=2**63 - 1) for key in keys}
    for way in ("ingress", "egress"):
        if bool(values[f"{way}Rate"]) != bool(values[f"{way}Burst"]):
            present = f"{way}Rate" if values[f"{way}Rate"] else f"{way}Burst"
            lacking = f"{way}Burst" if values[f"{way}Rate"] else f"{way}Rate"
            raise source.wrong(present, f"needs {lacking} beside it")
        if values[f"{way}Burst"] >= BURST_LIMIT:
            raise source.wrong(f"{way}Burst", f"is not below {BURST_LIMIT} bits (4 GiB)")
    return Bandwidth(*values.values())


# --- tuning ----------------------------------------------------------------------------------------------------------


def tuning(env: Env, conf: Conf) -> Tuning:
    """What is to be set on the interface: args.cni wins over the configuration; the MAC as everywhere."""
    body, args = conf.body, conf.args

    def pick(key: str) -> Section:
        return args if key in args else body

    return Tuning(
        sysctl=sysctls(env.ifname, body.section("sysctl"), args.section("sysctl")),
        mac=confs.mac(env, conf) or body.mac("mac"),
        mtu=pick("mtu").number("mtu", low=68, high=65535),
        promiscuous=True if pick("promisc").flag("promisc") else None,
        allmulti=pick("allmulti").flag("allmulti") if "allmulti" in pick("allmulti") else None,
        tx_queue=pick("txQLen").number("txQLen", high=2**31 - 1),
    )


def sysctls(ifname: str, *sources: Section) -> tuple[tuple[str, str], ...]:
    """(path below /proc/sys, value), later sources first. Only net/ is the container's own: all else is refused."""
    found: dict[str, str] = {}
    for source in sources:
        seen: set[str] = set()
        for key in source.raw:
            path = _sysctl_path(key).replace("IFNAME", ifname)
            steps = path.split("/")
            if steps[0] != "net" or len(steps) < 2 or not all(steps) or {".", ".."} & set(steps):
                raise source.wrong(key, "is not a setting below net")
            if path in seen:
                raise source.wrong(key, "is there twice")
            seen.add(path)
            found[path] = source.text(key)
    return tuple(found.items())


def _sysctl_path(key: str) -> str:
    """Slashes, as in /proc/sys. As sysctl(8): the first separator says which form it is, the other one is literal."""
    first = next((c for c in key if c in "./"), "/")
    return key if first == "/" else key.translate(str.maketrans("./", "/."))


def check_allowed(sysctl: tuple[tuple[str, str], ...], allowlist: Path = ALLOWLIST) -> None:
    """Where the administrator keeps an allowlist (one regular expression a line), each setting must match a line."""
    if not sysctl:
        return
    try:
        lines = allowlist.read_text(errors="replace").splitlines()
    except FileNotFoundError:
        return
    except OSError as exc:
        raise TowpathError(f"cannot read {allowlist}: {exc.strerror}") from exc
    try:
        patterns = [re.compile(line.strip()) for line in lines if line.strip()]
    except re.error as exc:
        raise TowpathError(f"{allowlist}: {exc.pattern!r} is not a regular expression: {exc}") from exc
    for path, _ in sysctl:
        if not any(pattern.search(path) or pattern.search(path.replace("/", ".")) for pattern in patterns):
            raise BadConfig(f"sysctl {path!r} is not allowed by {allowlist}", hint="ask the administrator")
