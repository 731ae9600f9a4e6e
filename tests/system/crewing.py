"""What the tests of several workers share: which process is which worker, and visitors who know what became of theirs.

pids(core)                       # {worker: process id} of a running core or agent
OldAgent(core, local)            # an agent that knows nothing of workers: one link, like a release before them
with Visitors(core, 8) as load:  # that many ask again and again; load.wait(200); then load.answered, load.failed
"""

from __future__ import annotations

import json
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from running import Program, RunningCore, poll
from visiting import Broken, Connection

from tunnel.workers import VARIABLE

FORGETFUL = (
    "import tunnel.wire.control as control; control.WORKERS = 'none of that'; "
    "from tunnel.agent.__main__ import main; raise SystemExit(main())"
)


def pids(program: Program) -> dict[int, int]:
    """Process ids by worker."""
    found = {}
    for child in Path(f"/proc/{program.pid}/task/{program.pid}/children").read_text().split():
        with suppress(FileNotFoundError, ProcessLookupError):
            for entry in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"):
                if entry.startswith(f"{VARIABLE}=".encode()):
                    found[int(json.loads(entry.partition(b"=")[2])["number"])] = int(child)
    return found


def wait_links(core: RunningCore, count: int, *, after: int = 0) -> None:
    """Until so many links are up (after this mark)."""
    poll(lambda: len(core.find("agent connected", after=after)) >= count, f"{count} links are up", 20)


class OldAgent(Program):
    def __init__(self, core: RunningCore, local: str, *flags: str) -> None:
        trust = f"-server-fingerprint={core.fingerprint}" if core.fingerprint else "-tls=false"
        super().__init__(
            "old agent",
            ["-c", FORGETFUL, "-log-json", f"-server=127.0.0.1:{core.agents[1]}", trust, f"-local={local}",
             "-agent-id=old", "-metrics-addr=127.0.0.1:0", *flags],
            {"AGENT_TOKEN": core.token},
        )  # fmt: skip
        self.wait_for("tunnel ready", timeout=30)


class _Visitor(threading.Thread):
    """Asks on a kept connection, on a new one every `kept` requests; its request ids are `name-connection-number`."""

    def __init__(self, load: Visitors, name: str, kept: int) -> None:
        super().__init__(daemon=True)
        self._load, self._label, self._kept = load, name, kept

    def run(self) -> None:
        load = self._load
        visitor: Connection | None = None
        opened, count, number = 0.0, 0, 0
        while not load.ended.is_set():
            if visitor is None:
                opened, number, count = time.monotonic(), number + 1, 0
            request_id = f"{self._label}-{number}-{count}"
            try:
                if visitor is None:
                    visitor = Connection(load.core.public, load.host)
                answer = visitor.ask(load.line, f"X-Request-Id: {request_id}")
                load.answered[request_id] = answer.status
                count = self._kept if answer["connection"].lower() == "close" else count + 1
            except (Broken, OSError) as exc:
                load.failed.append((request_id, opened, repr(exc)))
                count = self._kept
            if count >= self._kept and visitor is not None:
                visitor.close()
                visitor = None
            time.sleep(load.pause)
        if visitor is not None:
            visitor.close()


class Visitors:
    """answered: statuses by request id. failed: (request id, when its connection was opened, what happened)."""

    def __init__(
        self,
        core: RunningCore,
        count: int,
        line: str = "GET /echo",
        *,
        host: str = "app.localhost",
        kept: int = 10,
        pause: float = 0.005,
    ) -> None:
        self.core, self.line, self.host, self.pause = core, line, host, pause
        self.ended = threading.Event()
        self.answered: dict[str, int] = {}
        self.failed: list[tuple[str, float, str]] = []
        self._threads = [_Visitor(self, f"v{at}", kept) for at in range(count)]

    def __enter__(self) -> Visitors:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()

    def end(self) -> None:
        """Let all finish what they have begun."""
        self.ended.set()
        for thread in self._threads:
            thread.join(20)

    def wait(self, more: int, timeout: float = 20.0) -> None:
        """Until so many more are answered."""
        target = len(self.answered) + more
        poll(lambda: len(self.answered) >= target, f"{more} more answers", timeout)


__all__ = ["OldAgent", "Visitors", "pids", "wait_links"]
