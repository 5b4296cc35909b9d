"""The reference host-local's directory is read, whatever state it was left in (row H7)."""

from __future__ import annotations

import logging
import os
from ipaddress import ip_address, ip_interface
from pathlib import Path

import pytest

from towpath.errors import BadConfig, Unavailable
from towpath.hostlocal import (
    Broken,
    Found,
    Reservation,
    interface,
    parse_name,
    parse_reservation,
    read_directory,
    reservations,
)

A = ip_address("10.0.0.2")


@pytest.mark.parametrize(
    ("content", "want"),
    [
        pytest.param(b"c1\r\neth0", Reservation(A, "c1", "eth0"), id="id and interface"),
        pytest.param(b"c1\neth0\n", Reservation(A, "c1", "eth0"), id="plain line ends"),
        pytest.param(b"  c1  \r\n\r\n eth0\t\r\n", Reservation(A, "c1", "eth0"), id="H7 extra white space"),
        pytest.param(b"c1", Reservation(A, "c1"), id="H7 the old form has the id only"),
        pytest.param(b"\r\nc1\r\n", Reservation(A, "c1"), id="H7 the old form with white space"),
    ],
)
def test_a_reservation_reads(content: bytes, want: Reservation) -> None:
    assert parse_reservation(A, content) == want


@pytest.mark.parametrize(
    ("content", "words"),
    [
        pytest.param(b"", "empty", id="empty"),
        pytest.param(b" \r\n", "empty", id="white space only"),
        pytest.param(b"\0\0\0\0", "container id .* is not a valid name", id="zeros that a power cut left"),
        pytest.param(b"\xff\xfe", "no text", id="no text"),
        pytest.param(b"../../etc\r\neth0", "is not a valid name", id="an id that is a path"),
        pytest.param(b"c1\r\neth0/1", "interface 'eth0/1'", id="no interface name"),
        pytest.param(b"c1\r\nan_interface_of_20", "1 to 15 bytes", id="interface name too long"),
        pytest.param(b"c1 eth0 more", "3 words", id="too much"),
    ],
)
def test_a_broken_reservation_says_why(content: bytes, words: str) -> None:
    with pytest.raises(BadConfig, match=words):
        parse_reservation(A, content)


@pytest.mark.parametrize(
    ("name", "want"),
    [("10.0.0.2", "10.0.0.2"), ("fd00::2", "fd00::2"), ("fd00__2", "fd00::2"), ("lock", None), ("10.0.0", None)],
)
def test_a_file_name_is_an_address_or_not(name: str, want: str | None) -> None:
    assert parse_name(name) == (want and ip_address(want))


def test_a_directory_reads_with_its_cursors_and_its_broken_files(tmp_path: Path) -> None:
    files = {
        "10.0.0.2": "c1\r\neth0",
        "fd00::2": "c1\r\neth0",
        "10.0.0.9": "",
        "last_reserved_ip.0": "10.0.0.2",
        "last_reserved_ip.1": "fd00::2\n",
        "last_reserved_ip.2": "nothing",
        "last_reserved_ip.x": "10.0.0.2",
        "lock": "",
        "notes.txt": "mine",
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content.encode())
    (tmp_path / "10.0.0.3").mkdir()
    os.mkfifo(tmp_path / "10.0.0.4")
    assert read_directory(tmp_path) == Found(
        (Reservation(A, "c1", "eth0"), Reservation(ip_address("fd00::2"), "c1", "eth0")),
        (A, ip_address("fd00::2")),
        (
            Broken("10.0.0.3", "it is no file"),
            Broken("10.0.0.4", "it is no file"),
            Broken("10.0.0.9", "it is empty"),
            Broken("last_reserved_ip.2", "it holds no address"),
            Broken("last_reserved_ip.x", "its name ends in no number of a range set"),
            Broken("notes.txt", "its name is no address"),
        ),
    )


def test_a_directory_that_is_not_there_holds_nothing(tmp_path: Path) -> None:
    assert read_directory(tmp_path / "absent") == Found()


def test_a_directory_that_cannot_be_listed_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(Unavailable, match=r"cannot list the reservations in .*file: Not a directory"):
        read_directory(tmp_path / "file")


def test_broken_reservations_are_logged_and_the_good_ones_are_given(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "web"
    folder.mkdir()
    (folder / "10.0.0.2").write_bytes(b"c1\r\neth0")
    (folder / "10.0.0.3").touch()
    with caplog.at_level(logging.WARNING):
        assert list(reservations(str(tmp_path), "web")) == [(A, "c1", "eth0")]
    (record,) = caplog.records
    assert vars(record)["file"] == str(folder / "10.0.0.3")
    assert vars(record)["reason"] == "it is empty"


def test_an_address_gets_the_prefix_of_its_subnet() -> None:
    assert interface(A, 24) == ip_interface("10.0.0.2/24")
    assert interface(ip_address("fd00::2"), 64) == ip_interface("fd00::2/64")
