"""Entries for other tunnels: how they read, what is wrong with them, and the ones that ship."""

from __future__ import annotations

import re

import pytest
from benchmarks.others import FILE, Misnamed, filled, read_entries

ENTRY = """
[[tunnel]]
name = "other"
url = "http://127.0.0.1:{port}"
host = "app.example"
[tunnel.commands]
agent = ["sh", "-c", "{local}"]
server = ["sh"]
"""
VALUES = {"port": "1", "link": "2", "local": "3", "directory": "/d"}


def test_an_entry() -> None:
    (entry,) = read_entries(ENTRY + '[tunnel.files]\nconf = "port = {link}"')
    assert (entry.name, entry.host, entry.url) == ("other", "app.example", "http://127.0.0.1:{port}")
    assert list(entry.commands) == ["server", "agent"]  # in the order in which they are started
    assert entry.files == {"conf": "port = {link}"}
    assert entry.is_installed
    assert filled("{port} {link} {local} {directory} { x }", VALUES) == "1 2 3 /d { x }"


def test_a_program_that_is_missing_is_not_installed() -> None:
    (entry,) = read_entries(ENTRY.replace('server = ["sh"]', 'server = ["no-such-program-here"]'))
    assert not entry.is_installed


@pytest.mark.parametrize(
    ("old", "new", "why"),
    [
        ('host = "app.example"', "", "host is missing"),
        ('host = "app.example"', "host = 3", "host is missing"),
        ('name = "other"', 'name = "other"\nprot = 1', "tunnel other: unknown: prot"),
        ("agent =", "client =", "commands are those of server and agent"),
        ('server = ["sh"]', 'server = "sh"', "a list of words"),
        ('server = ["sh"]', "server = []", "a list of words"),
        ('server = ["sh"]', 'server = ["sh", 1]', "a list of words"),
        ("[[tunnel]]", "[[tunnels]]\n[[tunnel]]", "unknown: tunnels"),
    ],
)
def test_what_is_wrong_is_said(old: str, new: str, why: str) -> None:
    assert old in ENTRY
    with pytest.raises(Misnamed, match=re.escape(why)):
        read_entries(ENTRY.replace(old, new))


def test_a_placeholder_that_means_nothing_is_said() -> None:
    with pytest.raises(Misnamed, match=r"unknown placeholder .prot.; there are directory, link, local, port"):
        filled("{prot}", VALUES)


def test_what_ships_can_be_read() -> None:
    entries = read_entries(FILE.read_text())
    assert [entry.name for entry in entries] == ["pagekite", "frp (HTTP)", "chisel (raw TCP)"]
    for entry in entries:
        for text in (entry.url, *(word for words in entry.commands.values() for word in words), *entry.files.values()):
            filled(text, VALUES)


def test_no_entry_is_none() -> None:
    assert read_entries("") == []
