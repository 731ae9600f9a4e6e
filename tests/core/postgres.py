"""A private PostgreSQL for tests: own directory, a kernel-chosen port on loopback, stopped at the end.

PostgreSQL refuses to run as root, so then it runs as the system's `postgres` user. It must be installed: these tests
fail without it, they don't skip.
"""

import os
import pwd
import secrets
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

PASSWORD = "pg-secret-word"


def _bin(name: str) -> str:
    found = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"), key=lambda path: int(path.parts[-3]))
    path = str(found[-1]) if found else shutil.which(name)
    if path is None:
        raise RuntimeError(f"PostgreSQL is not installed ({name} was not found): apt-get install postgresql")
    return path


class PostgreSQL:
    """A running server; `database()` makes a new, empty database in it."""

    def __init__(self) -> None:
        self._user: list[str] = []
        self.directory = Path(tempfile.mkdtemp(prefix="tunnel-pg-"))
        if os.geteuid() == 0:
            user = pwd.getpwnam("postgres")
            os.chown(self.directory, user.pw_uid, user.pw_gid)
            self._user = ["setpriv", f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups"]
        password = self.directory / "password"
        password.write_text(PASSWORD)
        password.chmod(0o644)
        data = str(self.directory / "data")
        self._run(
            [_bin("initdb"), "-D", data, "-U", "tunnel", "-A", "scram-sha-256", "--pwfile", str(password), "-E", "UTF8"]
        )
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]
        options = f"-c listen_addresses=127.0.0.1 -p {self.port} -k {self.directory} -F"
        self._start = [_bin("pg_ctl"), "-D", data, "-o", options, "-l", str(self.directory / "log"), "-w", "start"]
        self._stop = [_bin("pg_ctl"), "-D", data, "-m", "immediate", "-w", "stop"]
        self.is_running = False
        self.start()

    def start(self) -> None:
        self._run(self._start)
        self.is_running = True

    def stop(self) -> None:
        """As by a power cut."""
        self._run(self._stop)
        self.is_running = False

    def remove(self) -> None:
        if self.is_running:
            self.stop()
        shutil.rmtree(self.directory)

    def database(self) -> str:
        """The URL of a new database."""
        import psycopg

        name = f"t_{secrets.token_hex(6)}"
        with psycopg.connect(self.url("postgres"), autocommit=True) as conn:
            conn.execute(f"CREATE DATABASE {name}")  # our own letters
        return self.url(name)

    def url(self, name: str) -> str:
        return f"postgresql://tunnel:{PASSWORD}@127.0.0.1:{self.port}/{name}"

    def _run(self, command: Sequence[str]) -> None:
        done = subprocess.run(
            [*self._user, *command], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            cwd=self.directory, timeout=120, check=False,
        )  # fmt: skip
        if done.returncode:
            log = self.directory / "log"
            tail = log.read_text(errors="replace")[-2000:] if log.exists() else ""
            raise RuntimeError(f"{command[0]} failed: {done.stdout.decode(errors='replace')}\n{tail}")
