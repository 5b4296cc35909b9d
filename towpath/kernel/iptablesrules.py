"""What rules of a plan are in iptables: lines in the reference plug-ins' chains, each found again by its comment.

The chains are those of the CNI plug-ins (portmap: CNI-HOSTPORT-*, CNI-DN-*; bridge: CNI-<hash>; firewall: CNI-FORWARD,
CNI-ADMIN, CNI-ISOLATION-STAGE-*). A line of ours says in its comment `towpath <id> <notes>`: the id tells which rule
it belongs to (iptables prints lines in another form than they were given, and another in each edition), the notes
which shared lines it needs and which port it takes. Lines without such a comment are somebody else's.

    nat     PREROUTING, OUTPUT (to a local address) → CNI-HOSTPORT-DNAT → (15 ports each) CNI-DN-<hash>: mark, DNAT
            POSTROUTING → CNI-HOSTPORT-MASQ (marked: MASQUERADE), and (from a container's address) CNI-<hash>
    filter  FORWARD, DOCKER-USER → CNI-FORWARD → CNI-ADMIN, which is the administrator's and never flushed
                                               → CNI-ISOLATION-STAGE-1: established and published pass; then
                                                 from a member's interface elsewhere → 2 (drops what goes to the fenced)
                                                 from a fenced interface elsewhere → 3 (drops what goes to any member)
                                               → accept to and from each address
            INPUT → TOWPATH-GUARD (datagrams to a guarded port: those of peers return, others are dropped)
    nat     CNI-<hash> of an overlay's member → TOWPATH-INNER (accepts what leaves towards other members)
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from towpath.errors import BadConfig
from towpath.model import Address
from towpath.plan import Accept, Bar, Fence, Guard, KeepSource, Masquerade, Peer, PinMac, Publish, Rule

DNAT, MASQ, SETMARK = "CNI-HOSTPORT-DNAT", "CNI-HOSTPORT-MASQ", "CNI-HOSTPORT-SETMARK"
FORWARD, ADMIN = "CNI-FORWARD", "CNI-ADMIN"
STAGE_1, STAGE_2, STAGE_3 = (f"CNI-ISOLATION-STAGE-{n}" for n in (1, 2, 3))
INNER, GUARD = "TOWPATH-INNER", "TOWPATH-GUARD"
CHAINS = {"nat": (DNAT, MASQ, INNER), "filter": (FORWARD, ADMIN, STAGE_1, STAGE_2, STAGE_3, GUARD)}
BUILT_IN = frozenset({"PREROUTING", "INPUT", "FORWARD", "OUTPUT", "POSTROUTING", "DOCKER-USER"})
COMMENT_ROOM = 250  # bytes; xt_comment keeps 256 with the end mark
PORTS_PER_LINE = 15  # xt_multiport
REFERENCE_MARK_BIT = 13
PLAIN = re.compile(r"[\w.@\-]+\Z", re.ASCII)
MULTICAST = {4: "224.0.0.0/4", 6: "ff00::/8"}


@dataclass(frozen=True, slots=True)
class Line:
    """One line. notes: words of its comment after the id; first: it goes to the top of its chain."""

    table: str
    chain: str
    spec: str
    id: str
    notes: tuple[str, ...] = ()
    first: bool = False

    def text(self) -> str:
        return f"{'-I' if self.first else '-A'} {self.chain} {self.spec.replace('{comment}', self.comment())}"

    def comment(self) -> str:
        words = " ".join(("towpath", self.id, *self.notes)).encode()[:COMMENT_ROOM].decode(errors="ignore")
        return f'-m comment --comment "{words}"'


@dataclass(frozen=True, slots=True)
class Group:
    """The lines in CNI-HOSTPORT-DNAT that lead to one CNI-DN- chain are made of all ports in that chain."""

    chain: str
    conditions: str
    owner: str

    def lines(self, ports: Iterable[tuple[str, int]]) -> Iterator[Line]:
        """One for each 15 (protocol, port)."""
        wanted = sorted(set(ports))
        for proto in dict.fromkeys(proto for proto, _ in wanted):
            numbers = [str(port) for name, port in wanted if name == proto]
            for start in range(0, len(numbers), PORTS_PER_LINE):
                some = ",".join(numbers[start : start + PORTS_PER_LINE])
                yield Line(
                    "nat",
                    DNAT,
                    f"-p {proto} {{comment}} -m multiport --dports {some}{self.conditions} -j {self.chain}",
                    f"dispatch.{self.chain}.{digest(proto, some)}",
                    (f"{proto}={some}", self.owner),
                )


def digest(*words: str) -> str:
    return hashlib.sha256("\n".join(words).encode()).hexdigest()[:16]


def skeleton(table: str, version: int, docker: bool = False) -> Iterator[Line]:
    """The lines that are there before any rule. docker: the table has Docker's chain for the user."""
    if table == "nat":
        local = "-m addrtype --dst-type LOCAL {comment} -j " + DNAT
        # [::1] cannot leave the node (RFC 4291 section 2.5.3): what listens there is left alone.
        guard = "" if version == 4 else "! -d ::1/128 "
        yield Line(table, "PREROUTING", local, "skeleton.prerouting")
        yield Line(table, "OUTPUT", guard + local, "skeleton.output")
        # At the top: an ACCEPT of anybody's masquerading would hide it.
        yield Line(table, "POSTROUTING", f"{{comment}} -j {MASQ}", "skeleton.postrouting", first=True)
        return
    yield Line(table, "FORWARD", f"{{comment}} -j {FORWARD}", "skeleton.forward", first=True)
    if docker:
        yield Line(table, "DOCKER-USER", f"{{comment}} -j {FORWARD}", "skeleton.docker", first=True)
    yield Line(table, FORWARD, f"{{comment}} -j {ADMIN}", "skeleton.admin")
    yield Line(table, FORWARD, f"{{comment}} -j {STAGE_1}", "skeleton.isolation")
    for state in ("RELATED,ESTABLISHED", "DNAT"):
        yield Line(
            table, STAGE_1, f"-m conntrack --ctstate {state} {{comment}} -j RETURN", f"skeleton.{state.split(',')[0]}"
        )


# --- rules -----------------------------------------------------------------------------------------------------------


def versions_of(rule: Rule) -> tuple[int, ...]:
    """The address families whose tables hold the rule."""
    match rule:
        case Publish(port=port, to=to):
            return (to.version,) if port.host_ip is None or port.host_ip.version == to.version else ()
        case Masquerade(address=address) | Accept(address=address) | Fence(address=address) | Peer(address=address):
            return (address.version,)
        case KeepSource() | Guard() | Bar():
            return (4, 6)
    return ()


def lines(rule: Rule) -> tuple[Line, ...]:
    """The lines of this rule alone, in their order; ids `<digest>.<n>`. Raises BadConfig for what cannot be."""
    home = interface_of(rule)
    if home and not PLAIN.match(home):
        # A plus at the end means any interface that begins so, and there is no way to mean the plus itself.
        raise BadConfig(f"interface name {home!r} cannot be written in the syntax of iptables")
    drafts = list(_drafts(rule))
    tag = digest(rule.owner, *(f"{chain} {spec}" for _, chain, spec, _ in drafts))
    owner = sanitised(rule.owner)
    # Before whatever the host accepts, and peers before the line that drops the others.
    upfront = isinstance(rule, Peer | Bar)
    return tuple(
        Line(table, chain, spec, f"{tag}.{place}", (*notes, owner), first=upfront or chain == "INPUT")
        for place, (table, chain, spec, notes) in enumerate(drafts)
    )


def interface_of(rule: Rule) -> str:
    match rule:
        case PinMac() | Guard() | Peer():
            return ""
        case KeepSource(link=link):
            return link
    return rule.home


def sanitised(owner: str) -> str:
    return "".join(letter for letter in owner if letter.isprintable() and letter not in '"\\ {}')


Draft = tuple[str, str, str, tuple[str, ...]]  # table, chain, spec, notes


def _drafts(rule: Rule) -> Iterator[Draft]:
    match rule:
        case Publish():
            yield from _publish(rule)
        case Masquerade(address=address, home=home):
            chain = f"CNI-{digest(str(address), home, rule.owner)}"
            if home:
                yield "nat", chain, f"-o {home} {{comment}} -j ACCEPT", ()
            if rule.inner:
                yield "nat", chain, f"{{comment}} -j {INNER}", ()
            yield "nat", chain, f"! -d {MULTICAST[address.version]} {{comment}} -j MASQUERADE", ()
            yield "nat", "POSTROUTING", f"-s {address.ip} {{comment}} -j {chain}", ()
        case Accept(address=address, home=home):
            member = (f"member={home}",) if home else ()
            yield "filter", FORWARD, f"-d {address} {{comment}} -j ACCEPT", member
            yield "filter", FORWARD, f"-s {address} {{comment}} -j ACCEPT", member
        case Fence(address=address, home=home, policy=policy) if home:
            within = (f"isolated={home}",) if policy == "isolated" else ()
            yield "filter", STAGE_2, f"-d {address} -o {home} {{comment}} -j DROP", (f"fence={home}", *within)

        case KeepSource(link=link):
            yield "nat", INNER, f"-o {link} {{comment}} -j ACCEPT", ()
        case Guard(port=port):
            datagrams = f"-p udp -m udp --dport {port}"
            yield "filter", GUARD, f"{datagrams} {{comment}} -j DROP", ()
            yield "filter", "INPUT", f"{datagrams} {{comment}} -j {GUARD}", ()
        case Peer(address=address, port=port):
            yield "filter", GUARD, f"-s {address} -p udp -m udp --dport {port} {{comment}} -j RETURN", ()
        case Bar(home=home, port=port):
            for chain in ("INPUT", FORWARD):
                yield "filter", chain, f"-i {home} -p udp -m udp --dport {port} {{comment}} -j DROP", ()


def shared(note: str) -> Iterator[Line]:
    """The lines that stay as long as any line carries this note."""
    kind, _, what = note.partition("=")
    elsewhere = f"-i {what} ! -o {what} {{comment}} -j "
    match kind:
        case "member":
            yield Line("filter", STAGE_1, elsewhere + STAGE_2, f"shared.{note}.1")
            yield Line("filter", STAGE_3, f"-o {what} {{comment}} -j DROP", f"shared.{note}.2")
        case "fence":
            yield Line("filter", STAGE_1, elsewhere + STAGE_3, f"shared.{note}.1")
        case "isolated":
            yield Line("filter", STAGE_1, f"-i {what} -o {what} {{comment}} -j DROP", f"shared.{note}.1")
        case "mark":
            mark = f"{1 << int(what):#x}"
            yield Line(
                "nat", mark_chain(int(what)), f"{{comment}} -j MARK --set-xmark {mark}/{mark}", f"shared.{note}.1"
            )
            yield Line("nat", MASQ, f"-m mark --mark {mark}/{mark} {{comment}} -j MASQUERADE", f"shared.{note}.2")


def mark_chain(bit: int) -> str:
    return SETMARK if bit == REFERENCE_MARK_BIT else f"{SETMARK}-{bit}"


# --- published ports -------------------------------------------------------------------------------------------------


def group(rule: Publish) -> Group:
    conditions = rule.rules.conditions_v4 if rule.to.version == 4 else rule.rules.conditions_v6
    check_conditions(conditions, rule.to.version)
    words = "".join(f" {word}" for word in conditions)
    return Group(f"CNI-DN-{digest(rule.owner, words)}", words, sanitised(rule.owner))


def check_conditions(conditions: tuple[str, ...], version: int) -> None:
    """Refuse what is no match of iptables(8): a text that begins like nft's, or that could end the line or jump."""
    name = f"conditionsV{version}"
    if conditions and conditions[0][:1] not in ("-", "!"):
        raise BadConfig(f"{name} {conditions[0]!r} is nftables syntax, and this host uses iptables")
    for word in conditions:
        if any(letter in word for letter in "\n\r\"'\\{}") or word in ("-j", "-g", "--jump", "--goto"):
            raise BadConfig(f"{name} {word!r} may not hold line ends, quotes, braces or backslashes, nor be a target")


def taken(rule: Publish) -> str:
    """The note that says which port this takes. Under conditions one port may be published more than once."""
    host = rule.port.host_ip
    where = "*" if host is None or host.is_unspecified else str(host)
    word = "if-port" if group(rule).conditions else "port"
    return f"{word}={where},{rule.port.host_port},{rule.port.proto}"


def _publish(rule: Publish) -> Iterator[Draft]:
    if not versions_of(rule):
        return
    chain, port, rules = group(rule).chain, rule.port, rule.rules
    match = f"-p {port.proto} -m {port.proto} --dport {port.host_port}"
    if port.host_ip is not None and not port.host_ip.is_unspecified:
        match = f"-d {port.host_ip} {match}"
    target = rules.set_mark_chain or mark_chain(rules.mark_bit)
    notes = (taken(rule), *(() if rules.set_mark_chain or not rules.snat else (f"mark={rules.mark_bit}",)))
    for source in _masqueraded(rule):
        yield "nat", chain, f"{source}{match} {{comment}} -j {target}", notes
    yield "nat", chain, f"{match} {{comment}} -j DNAT --to-destination {endpoint(rule.to, port.container_port)}", notes


def _masqueraded(rule: Publish) -> Iterator[str]:
    """Matches on the source of connections that shall come from the node."""
    if not rule.rules.snat:
        return
    if rule.rules.masquerade_all:
        yield ""
        return
    if rule.home:
        yield f"-i {rule.home} "  # back the way it came: itself or a sibling; the answer would not pass here
    if rule.to.version == 4:
        yield "-s 127.0.0.0/8 "


def endpoint(address: Address, port: int) -> str:
    return f"{address}:{port}" if address.version == 4 else f"[{address}]:{port}"
