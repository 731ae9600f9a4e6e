"""One program beside us, in a session of its own so that Ctrl-C is ours alone; ended within a bound."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Sequence
from pathlib import Path

import trio

from tunnel.errors import ConfigError, TunnelError
from tunnel.net import address_text

START_TIMEOUT = 60.0  # seconds until it must be ready; Prometheus reads its write-ahead log first
STOP_TIMEOUT = 5.0  # seconds between SIGTERM and SIGKILL
ASK_TIMEOUT = 2.0  # seconds for one look whether it is ready
ASK_INTERVAL = 0.1
TAIL = 4096  # bytes of its log in which the reason of its end is looked for


class Child:
    """address: (host, port) that it was told to listen on. Its output goes to `log`, from the start of this run."""

    def __init__(self, name: str, command: Sequence[str], address: tuple[str, int], log: Path) -> None:
        self.name, self.address, self.log = name, address, log
        self._command = list(command)
        self._process: trio.Process | None = None
        self._is_stopping = False

    @property
    def url(self) -> str:
        return f"http://{address_text(self.address)}"

    async def start(self) -> None:
        """Raises ConfigError when it can't be started."""
        try:
            with self.log.open("wb") as out:
                self._process = await trio.lowlevel.open_process(
                    self._command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True
                )
        except OSError as exc:
            raise ConfigError(f"{self.name} can't be started: {exc.strerror}: {self._command[0]}") from None

    async def watch(self) -> None:
        """Until it ends. Raises TunnelError unless we stopped it."""
        assert self._process is not None
        code = await self._process.wait()
        if not self._is_stopping:
            how = f"was ended by signal {-code}" if code < 0 else f"ended with code {code}"
            raise TunnelError(f"{self.name} {how}: {self.last_words()} (its log: {self.log})")

    async def wait_ready(self) -> None:
        """Until it says that it serves. Raises TunnelError after START_TIMEOUT; `watch` tells of an earlier end."""
        try:
            with trio.fail_after(START_TIMEOUT):
                while not await self._is_ready():  # noqa: ASYNC110 - only asking tells
                    await trio.sleep(ASK_INTERVAL)
        except trio.TooSlowError:
            raise TunnelError(
                f"{self.name} was not ready within {START_TIMEOUT:g} s: {self.last_words()} (its log: {self.log})"
            ) from None

    async def _is_ready(self) -> bool:
        with trio.move_on_after(ASK_TIMEOUT):
            try:
                async with await trio.open_tcp_stream(*self.address) as stream:
                    await stream.send_all(b"GET /-/ready HTTP/1.0\r\nHost: localhost\r\n\r\n")
                    return b" 200 " in await stream.receive_some(64)
            except (OSError, trio.BrokenResourceError):
                return False
        return False

    async def stop(self) -> None:
        """SIGTERM, and SIGKILL after STOP_TIMEOUT. Nothing when it does not run."""
        self._is_stopping = True
        process = self._process
        if process is None or process.poll() is not None:
            return
        process.terminate()
        with trio.move_on_after(STOP_TIMEOUT):
            await process.wait()
            return
        process.kill()
        await process.wait()

    def last_words(self) -> str:
        """The last error in its log, or its last line, without what says only when and where in its source."""
        with self.log.open("rb") as log:
            log.seek(max(0, log.seek(0, 2) - TAIL))
            lines = [line for line in log.read().decode(errors="replace").splitlines() if line.strip()]
        errors = [line for line in lines if "level=error" in line or line.startswith("panic: ")]
        said = (errors or lines or ["it said nothing"])[-1]
        return re.sub(r"\b(?:ts|time|caller|source|level)=\S+ *", "", said).strip()
