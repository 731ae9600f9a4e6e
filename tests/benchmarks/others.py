"""Other tunnels beside ours: those of `others.toml` (its head says how an entry reads) that are installed."""

from __future__ import annotations

import http.client
import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from benchmarks.processes import Failed, Process, find, poll, which
from benchmarks.servers import Servers, free_port, is_listening
from benchmarks.tunnels import Contender

FILE = Path(__file__).with_name("others.toml")
ROLES = ("server", "agent")


class Misnamed(ValueError):
    """An entry that can't be read."""


@dataclass(frozen=True)
class Entry:
    """commands: by role, started in this order. files: text by name, written into the run's directory."""

    name: str
    url: str
    host: str
    commands: Mapping[str, Sequence[str]]
    files: Mapping[str, str]

    @property
    def is_installed(self) -> bool:
        return all(find(words[0]) for words in self.commands.values())


def read_entries(text: str) -> list[Entry]:
    """Raises Misnamed."""
    document = tomllib.loads(text)
    if unknown := document.keys() - {"tunnel"}:
        raise Misnamed(f"unknown: {', '.join(sorted(unknown))}")
    return [_read(table) for table in document.get("tunnel", [])]


def _read(table: dict[str, object]) -> Entry:
    name = table.get("name")
    commands, files = table.get("commands"), table.get("files", {})
    if unknown := table.keys() - {"name", "url", "host", "commands", "files"}:
        raise Misnamed(f"tunnel {name}: unknown: {', '.join(sorted(unknown))}")
    for key in ("name", "url", "host"):
        if not isinstance(table.get(key), str):
            raise Misnamed(f"tunnel {name}: {key} is missing")
    if not isinstance(commands, dict) or not commands or set(commands) - set(ROLES):
        raise Misnamed(f"tunnel {name}: commands are those of server and agent")
    if not all(
        isinstance(words, list) and words and all(isinstance(w, str) for w in words) for words in commands.values()
    ):
        raise Misnamed(f"tunnel {name}: a command is a list of words")
    if not isinstance(files, dict) or not _are_texts(files.values()):
        raise Misnamed(f"tunnel {name}: files are texts by name")
    ordered = {role: commands[role] for role in ROLES if role in commands}
    return Entry(str(name), str(table["url"]), str(table["host"]), ordered, files)


def _are_texts(values: Iterable[object]) -> bool:
    return all(isinstance(one, str) for one in values)


def filled(text: str, values: Mapping[str, str]) -> str:
    """`text` with {word} replaced by its value. Raises Misnamed for a word that has none."""

    def value(match: re.Match[str]) -> str:
        if match[1] not in values:
            raise Misnamed(f"unknown placeholder {match[0]}; there are {', '.join(sorted(values))}")
        return values[match[1]]

    return re.sub(r"\{(\w+)\}", value, text)


@contextmanager
def start_other(servers: Servers, entry: Entry) -> Iterator[Contender]:
    """Returns when it has served a request. Raises Failed when it doesn't."""
    directory = servers.directory / f"other-{entry.name}"
    directory.mkdir(exist_ok=True)
    values = {
        "port": str(free_port()),
        "link": str(free_port()),
        "local": str(servers.nginx_port),
        "directory": str(directory),
    }
    for name, text in entry.files.items():
        (directory / name).write_text(filled(text, values))
    port = urlsplit(filled(entry.url, values)).port
    if port is None:
        raise Misnamed(f"tunnel {entry.name}: the URL names no port")
    ports = [int(values[word]) for word in ("port", "link")]
    processes: dict[str, Process] = {}
    try:
        for role, words in entry.commands.items():
            command = [which(words[0]), *(filled(word, values) for word in words[1:])]
            processes[role] = Process(*command, directory=directory)
            if role == "server":  # an agent may try only once in a long while
                poll(lambda: any(map(is_listening, ports)), f"{entry.name}'s server listens", 30)
        try:
            poll(lambda: serves(port, entry.host), f"{entry.name} serves a request", 30)
        except Failed as exc:
            raise Failed("\n".join([str(exc), *(one.output()[-2000:] for one in processes.values())])) from None
        yield Contender(entry.name, port, entry.host, processes, is_guest=True)
    finally:
        for process in reversed(processes.values()):
            process.stop()


def serves(port: int, host: str, path: str = "/k1") -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request("GET", path, headers={"Host": host})
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()
