"""The pure parts of the command line: tables, files for /etc, ports, names."""

from __future__ import annotations

from ipaddress import ip_address
from pathlib import Path

import pytest

from towpath.api.run import parse_port
from towpath.cli.files import hosts, resolv_conf
from towpath.cli.namespaces import mounted_below
from towpath.cli.options import sentence
from towpath.cli.run import free_name
from towpath.cli.table import details, span, table
from towpath.errors import BadConfig
from towpath.model import PortMap


def test_a_table_is_aligned_and_says_where_nothing_is() -> None:
    text = table(("name", "size"), [("a", 5), ("longer", ""), ("c", 12345)], right=frozenset({"size"}))
    assert text.splitlines() == ["NAME     SIZE", "a           5", "longer      -", "c       12345"]


def test_details_leave_out_what_is_empty() -> None:
    text = details([("a", ""), ("long", ["x", "y"]), ("b", True), ("d", {"k": ["1", "2"], "e": ""})])
    assert text.splitlines() == ["long  x", "      y", "b     yes", "d     k=1 2"]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (45.9, "45s"), (200, "3m 20s"), (180, "3m"), (7500, "2h 5m"), (4 * 86400 + 11000, "4d 3h")],
)
def test_a_span_has_two_units_at_most(seconds: float, text: str) -> None:
    assert span(seconds) == text


@pytest.mark.parametrize(
    ("what", "hint", "text"),
    [
        ("no agent", "", "no agent"),
        ("no agent", "start one", "no agent. Start one"),
        ("no agent.", "start one", "no agent. Start one"),
    ],
)
def test_an_error_is_what_and_hint(what: str, hint: str, text: str) -> None:
    assert sentence(what, hint) == text


@pytest.mark.parametrize(
    ("text", "want"),
    [
        pytest.param("8080:80", PortMap(8080, 80), id="tcp is the default"),
        pytest.param("53:53/udp", PortMap(53, 53, "udp"), id="protocol given"),
        pytest.param("127.0.0.1:8080:80", PortMap(8080, 80, "tcp", ip_address("127.0.0.1")), id="on one address"),
        pytest.param("[::1]:53:53/udp", PortMap(53, 53, "udp", ip_address("::1")), id="IPv6 address in brackets"),
    ],
)
def test_a_port_reads(text: str, want: PortMap) -> None:
    assert parse_port(text) == want


@pytest.mark.parametrize(
    ("text", "said"),
    [
        pytest.param("80", "port '80' is not", id="one port only"),
        pytest.param("80:http", "port '80:http' is not", id="a name"),
        pytest.param("80:80/", "port '80:80/' is not", id="empty protocol"),
        pytest.param(":80:80", "port ':80:80' is not", id="empty address"),
        pytest.param("-1:80", "port '-1:80' is not", id="a sign"),
        pytest.param("٣:80", "port '٣:80' is not", id="digits of another script"),
        pytest.param("0:80", "hostPort 0 is not a port: 1 to 65535", id="port 0"),
        pytest.param("80:65536", "containerPort 65536 is not a port", id="port too large"),
        pytest.param("80:80/icmp", "protocol 'icmp' cannot be published", id="unknown protocol"),
        pytest.param("10.1:80:80", "'10.1' is not an IP address", id="half an address"),
        pytest.param("::1:80:80", "port '::1:80:80': an IPv6 address stands in brackets", id="IPv6 without brackets"),
    ],
)
def test_a_malformed_port_is_refused(text: str, said: str) -> None:
    with pytest.raises(BadConfig) as refused:
        parse_port(text)
    assert refused.value.what.startswith(said)


def test_hosts_names_every_address() -> None:
    text = hosts(["10.1.0.2/24", "fd00::2/64"], ["c1", "www", "c1", ""])
    assert text.splitlines()[2:] == ["10.1.0.2\tc1 www", "fd00::2\tc1 www"]


HOST = "# made by hand\nnameserver 127.0.0.53\nnameserver 9.9.9.9\nsearch lan\noptions edns0\n"


@pytest.mark.parametrize(
    ("dns", "want"),
    [
        pytest.param({}, "nameserver 9.9.9.9\nsearch lan\n", id="the host's, without its loopback server"),
        pytest.param({"nameservers": ["10.1.0.1"]}, "nameserver 10.1.0.1\n", id="the network's alone"),
        pytest.param(
            {"nameservers": ["10.1.0.1"], "domain": "a", "search": ["b", "a"], "options": ["ndots:2"]},
            "nameserver 10.1.0.1\nsearch a b\noptions ndots:2\n",
            id="domain is searched first",
        ),
        pytest.param({"search": ["b"]}, "nameserver 9.9.9.9\nsearch b\n", id="search given, servers the host's"),
    ],
)
def test_resolv_conf_is_the_networks_before_the_hosts(dns: dict[str, object], want: str) -> None:
    assert resolv_conf(dns, HOST) == want


def test_resolv_conf_says_why_it_is_empty() -> None:
    assert resolv_conf({}, "nameserver 127.0.0.53\n").startswith("# no nameserver")


def test_mounts_of_other_runs_are_found() -> None:
    info = (
        "22 27 0:21 / /proc rw - proc proc rw\n"
        "90 27 0:4 net:[402653] /run/towpath/netns/a rw - nsfs nsfs rw\n"
        "91 27 0:4 net:[402654] /run/towpath/netns/with\\040space rw - nsfs nsfs rw\n"
        "92 27 0:4 net:[402655] /run/netns/b rw - nsfs nsfs rw\n"
    )
    want = ["/run/towpath/netns/a", "/run/towpath/netns/with space"]
    assert mounted_below(Path("/run/towpath/netns"), info) == want


@pytest.mark.parametrize(
    ("program", "stem"), [("/usr/sbin/httpd", "httpd"), ("./my prog.sh", "my-prog-sh"), ("/-", "run"), ("[", "run")]
)
def test_a_free_name_tells_the_program(program: str, stem: str) -> None:
    name = free_name(program)
    assert name.startswith(stem + "-")
    assert len(name) == len(stem) + 5
