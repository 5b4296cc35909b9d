"""What rules of a plan are in nftables: the chains that are put in once, and the elements that each rule adds to them.

A connection to a published port meets `prerouting` (or `output`), where the host's address and port become the
container's, and `postrouting`, where its source may become the node's:

    snat=False          never
    masquerade_all      always (with snat)
    otherwise           where the packet would go back the way it came (itself, or a sibling behind the same interface:
                        the answer would not pass here), and where it comes from 127.0.0.0/8 of the node

An external client keeps its address. A packet that br_netfilter shows us on its way through a bridge has no input
interface in postrouting (br_nf_post_routing), as one from the node has none; only its source tells them apart.

Only connections that our own maps have changed are touched: Docker's carry the same `ct status dnat`, hence the keys
that name the address and port that were asked for. Priorities are one before the usual ones, so that of two that
publish one port the same always wins.

Isolation looks at interfaces, not at addresses, which a container could choose. `user_forward` belongs to the
administrator, is asked first, and is never flushed, nor is any chain or set whose name begins with `user_`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

from towpath.errors import BadConfig
from towpath.kernel.nftset import BRIDGE, FRAMES, INET, SETS, Element, declaration, element
from towpath.model import Address
from towpath.plan import Accept, Bar, Fence, Guard, KeepSource, Masquerade, Peer, PinMac, Publish, Rule

COMMENT_ROOM = 120  # bytes; NFTNL_UDATA_COMMENT_MAXLEN is 128 with its end mark
MULTICAST = {4: "224.0.0.0/4", 6: "ff00::/8"}


def _family(version: int) -> dict[str, tuple[str, ...]]:
    """The chains of one address family."""
    ip = "ip" if version == 4 else "ip6"
    port = "meta l4proto . ct original proto-dst"  # needs the protocol's context: the match on l4proto before it
    known = "meta l4proto { tcp, udp, sctp }"
    asked = f"ct original {ip} daddr . {ip} daddr . {port}"
    # [::1] cannot leave the node (RFC 4291 section 2.5.3): what listens there is left alone.
    guard = () if version == 4 else ("ip6 daddr ::1 return",)
    return {
        f"conditional{version}": (),
        f"dnat{version}_ports": (
            *guard,
            f"jump conditional{version}",
            f"dnat {ip} to {ip} daddr . meta l4proto . th dport map @dnat{version}",
            f"dnat {ip} to meta l4proto . th dport map @dnat{version}_any",
        ),
        f"snat{version}_ports": (
            f"{known} {ip} daddr . {port} . iifname @hairpin{version}_any masquerade",
            f"{known} {asked} . iifname @hairpin{version} masquerade",
            f"{known} {ip} daddr . {port} vmap @snat{version}_any",
            f"{known} {asked} vmap @snat{version}",
        ),
    }


def _masquerade(version: int) -> tuple[str, ...]:
    ip = "ip" if version == 4 else "ip6"
    home = f"{ip} saddr . oifname != @masq{version}_home"
    return (
        f"{ip} saddr @inner{version} oifname @inner_links return",
        f"{ip} saddr @masq{version} {home} {ip} daddr != {MULTICAST[version]} masquerade",
    )


_DNAT = "fib daddr type local meta nfproto vmap { ipv4 : jump dnat4_ports, ipv6 : jump dnat6_ports }"

HOOKS: dict[str, dict[str, str]] = {
    INET: {
        "prerouting": "type nat hook prerouting priority dstnat - 1; policy accept;",
        "output": "type nat hook output priority -101; policy accept;",
        "postrouting": "type nat hook postrouting priority srcnat - 1; policy accept;",
        "input": "type filter hook input priority filter - 1; policy accept;",
        "forward": "type filter hook forward priority filter - 1; policy accept;",
    },
    **{
        table: {"prerouting": "type filter hook prerouting priority -300; policy accept;"} for table in (BRIDGE, FRAMES)
    },
}

CHAINS: dict[str, dict[str, tuple[str, ...]]] = {
    INET: {
        "user_forward": (),
        "always": ("masquerade",),
        "loopback": ("ip saddr 127.0.0.0/8 masquerade", "iif 0 fib saddr type != local masquerade"),
        **_family(4),
        **_family(6),
        "between": (
            "iifname . oifname @within iifname @isolated drop",
            "iifname . oifname @within return",
            "iifname @fenced drop",
            "oifname @fenced drop",
        ),
        "prerouting": (_DNAT,),
        "output": (_DNAT,),
        "postrouting": (
            "ct status dnat meta nfproto vmap { ipv4 : jump snat4_ports, ipv6 : jump snat6_ports }",
            *_masquerade(4),
            *_masquerade(6),
        ),
        "guard": (
            "ip saddr . udp dport @peers4 return",
            "ip6 saddr . udp dport @peers6 return",
            "drop",
        ),
        "input": ("iifname . udp dport @barred drop", "meta l4proto . th dport @guarded jump guard"),
        "forward": (
            "jump user_forward",
            "iifname . udp dport @barred drop",
            "ct state established,related accept",
            "ct status dnat accept",
            "iifname @homes oifname @homes jump between",
        ),
    },
    BRIDGE: {"prerouting": ("iifname @pinned iifname . ether saddr != @macs drop",)},
    FRAMES: {"prerouting": ("iifname @pinned_iptables iifname . ether saddr != @macs_iptables drop",)},
}

OPEN_CHAINS = frozenset({"user_forward", "conditional4", "conditional6"})  # their rules are not part of the skeleton


def skeleton(table: str) -> str:
    """The whole table without elements, as `nft -f` takes it; an empty chain tells which edition of it this is."""
    lines = [f"chain {edition(table)} {{\n}}", *(declaration(name) for name in sets_of(table))]
    for name, rules in CHAINS[table].items():
        hook = HOOKS[table].get(name, "")
        lines.append("\n".join((f"chain {name} {{", *((hook,) if hook else ()), *rules, "}")))
    return f"table {table} {{\n" + "\n".join(lines) + "\n}\n"


def edition(table: str) -> str:
    text = repr((CHAINS[table], HOOKS[table], [declaration(name) for name in sets_of(table)]))
    return f"edition_{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def sets_of(table: str) -> list[str]:
    return [name for name, declared in SETS.items() if declared.table == table]


# --- rules -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Conditional:
    """A rule of its own in `chain`, found again by `comment`: conditions of the user cannot be elements."""

    chain: str
    text: str
    comment: str


Piece = Element | Conditional


class FramePin(PinMac):
    """A PinMac of the iptables back end, which sees no frames: in a table of its own: neither heals the other's."""

    __slots__ = ()


def pieces(rule: Rule) -> Iterator[Piece]:
    """What belongs to this rule alone."""
    match rule:
        case Publish():
            if asked(rule) is not None:
                yield _dnat(rule)
                yield from _snat(rule)
        case Masquerade():
            version, address = rule.address.version, rule.address.ip
            if rule.home:
                yield element(f"masq{version}_home", (address, rule.home))
            yield element(f"masq{version}", (address,))
            if rule.inner:
                yield element(f"inner{version}", (address,))
        case Accept():
            if rule.home:
                yield element(f"members{rule.address.version}", (rule.home, rule.address))
        case Fence():
            if rule.home:
                kind = "isolate" if rule.policy == "isolated" else "fence"
                yield element(f"{kind}{rule.address.version}", (rule.home, rule.address))
        case FramePin():
            yield element("macs_iptables", (rule.port, rule.mac))
        case PinMac():
            yield element("macs", (rule.port, rule.mac))
        case KeepSource():
            yield element("inner_links", (rule.link,))
        case Guard():
            yield element("guarded", ("udp", rule.port))
        case Peer():
            yield element(f"peers{rule.address.version}", (rule.address, rule.port))
        case Bar():
            yield element("barred", (rule.home, rule.port))


def shared(rule: Rule) -> Iterator[Element]:
    """What rules with the same interface have in common (nftset.CLAIMS says how long it stays)."""
    match rule:
        case Accept(home=home) if home:
            yield element("homes", (home,))
            yield element("within", (home, home))
        case Fence(home=home, policy=policy) if home:
            yield element("fenced", (home,))
            if policy == "isolated":
                yield element("isolated", (home,))
        case FramePin(port=port):
            yield element("pinned_iptables", (port,))
        case PinMac(port=port):
            yield element("pinned", (port,))


def asked(rule: Publish) -> tuple[Address, ...] | None:
    """The host address in keys: () = any of the family, None = the families differ and nothing is made."""
    host = rule.port.host_ip
    if host is None:
        return ()
    if host.version != rule.to.version:
        return None
    return () if host.is_unspecified else (host,)


def _dnat(rule: Publish) -> Piece:
    port, host, version = rule.port, asked(rule) or (), rule.to.version
    conditions = rule.rules.conditions_v4 if version == 4 else rule.rules.conditions_v6
    if conditions:
        return _conditional(rule, conditions, host)
    name = f"dnat{version}" if host else f"dnat{version}_any"
    return element(name, (*host, port.proto, port.host_port), (rule.to, port.container_port))


def _conditional(rule: Publish, conditions: tuple[str, ...], host: tuple[Address, ...]) -> Conditional:
    port, version = rule.port, rule.to.version
    check_conditions(conditions, version)
    ip, to = ("ip", f"{rule.to}") if version == 4 else ("ip6", f"[{rule.to}]")
    where = "".join(f" {ip} daddr {address}" for address in host)
    text = (
        f"{' '.join(conditions)}{where} meta l4proto {port.proto} th dport {port.host_port} "
        f"dnat {ip} to {to}:{port.container_port}"
    )
    tag = hashlib.sha256(text.encode()).hexdigest()[:16]
    owner = "".join(letter for letter in rule.owner if letter.isprintable() and letter not in '"\\')
    return Conditional(f"conditional{version}", text, f"{tag} {owner}".encode()[:COMMENT_ROOM].decode(errors="ignore"))


def check_conditions(conditions: tuple[str, ...], version: int) -> None:
    """Refuse what is no match of nft(8): a text that begins like an iptables option, or that could end the rule."""
    name = f"conditionsV{version}"
    if conditions[0][:1] in ("-", "!"):
        raise BadConfig(f"{name} {conditions[0]!r} is iptables syntax, and this host uses nftables")
    for word in conditions:
        if any(letter in word for letter in '\n\r;#"\\'):
            raise BadConfig(f"{name} {word!r} may not hold line ends, ';', '#', quotes or backslashes")


def _snat(rule: Publish) -> Iterator[Element]:
    if not rule.rules.snat:
        return
    port, host, version = rule.port, asked(rule) or (), rule.to.version
    ending = "" if host else "_any"
    key = (*host, rule.to, port.proto, port.host_port)
    if rule.rules.masquerade_all:
        yield element(f"snat{version}{ending}", key, ("always",))
        return
    if rule.home:
        yield element(f"hairpin{version}{ending}", (*key, rule.home))
    yield element(f"snat{version}{ending}", key, ("loopback",))
