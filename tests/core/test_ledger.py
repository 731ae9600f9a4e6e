"""What is known of orders across starts and processes."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tunnel.core.issuing.ledger import FIRST_DELAY, LEASE, MAX_DELAY, MAX_NAMES, Ledger


class Book(Ledger):
    def __init__(self, path: Path, max_orders: int = 10) -> None:
        super().__init__(path, max_orders, lambda: self.now, lambda: 0.0)
        self.now = 1_000_000.0


@pytest.fixture
def book(tmp_path: Path) -> Book:
    return Book(tmp_path / "new" / "state.json")


def test_failures_are_kept_over_a_start(book: Book, tmp_path: Path) -> None:
    assert book.begin("a.test", True).is_given
    until, count = book.fail("a.test")
    assert (until - book.now, count) == (FIRST_DELAY, 1)
    again = Book(book._path)
    refused = again.begin("a.test", True)
    assert not refused.is_given and refused.until == until
    again.now = until
    assert again.begin("a.test", True).is_given
    again.end("a.test")
    assert again.begin("a.test", True).is_given, "a success makes an end of it"
    assert book._path.stat().st_mode & 0o777 == 0o600
    assert book._path.parent.stat().st_mode & 0o777 == 0o700


def test_delays_grow_and_end(book: Book) -> None:
    delays = [book.fail("a.test")[0] - book.now for _ in range(30)]
    assert delays[:3] == [120, 360, 1080] and delays[-1] == MAX_DELAY
    assert book.fail("b.test", retry_after=86400)[0] - book.now == 86400


def test_the_hours_orders(book: Book) -> None:
    book._max_orders = 2
    assert book.begin("a.test", True).is_given and book.begin("b.test", True).is_given
    refused = book.begin("c.test", True)
    assert not refused.is_given and refused.until == book.now + 3600 and "last hour" in refused.why
    assert book.begin("d.test", False).is_given
    book.now += 3600
    assert book.begin("c.test", True).is_given


def test_an_authority_that_sends_everybody_away(book: Book) -> None:
    book.fail("a.test", retry_after=600, everybody=True)
    refused = book.begin("b.test", False)
    assert not refused.is_given and refused.until == book.now + 600
    book.now += 600
    assert book.begin("b.test", False).is_given


def test_another_process_is_at_work(book: Book, tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        book.begin("a.test", False)
        text = book._path.read_text()
        book._path.write_text(text.replace(str(os.getpid()), str(other.pid)))
        refused = book.begin("a.test", False)
        assert not refused.is_given and "another process" in refused.why
        other.communicate(b"\n")
    assert book.begin("a.test", False).is_given, "it has gone"
    book._path.write_text(text.replace(str(os.getpid()), "1"))
    assert not book.begin("a.test", False).is_given
    book.now += LEASE
    assert book.begin("a.test", False).is_given, "nobody takes that long"
    book.leave("a.test")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"failed": 1}', '{"failed": {}, "busy": {}, "begun": ["x"]}', "\xff"])
def test_an_unreadable_one_is_as_good_as_none(book: Book, text: str) -> None:
    book._path.parent.mkdir()
    book._path.write_text(text, encoding="latin-1")
    assert book.begin("a.test", True).is_given


def test_a_clock_that_was_wrong_locks_nobody_out(book: Book) -> None:
    book.now += 10 * 365 * 86400
    book.begin("a.test", True)
    book.fail("a.test", retry_after=600, everybody=True)
    book.now -= 10 * 365 * 86400
    assert book.begin("a.test", True).is_given


def test_it_does_not_grow_without_end(book: Book, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tunnel.core.issuing.ledger.MAX_NAMES", 5)
    for number in range(9):
        book.fail(f"n{number}.test")
    assert book.begin("n0.test", False).is_given and not book.begin("n8.test", False).is_given
    assert MAX_NAMES == 10_000


def test_many_at_once(book: Book) -> None:
    book._max_orders = 50
    given: list[bool] = []
    threads = [
        threading.Thread(target=lambda n=number: given.append(book.begin(f"n{n}.test", True).is_given))  # type: ignore[misc]
        for number in range(60)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert given.count(True) == 50
