"""The first start from a checkout makes an environment of its own (scripts/environment).

Stopped by Ctrl-C it says so in one line, and what was half made does not stand in the next start's way.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from running import clean_environment, poll

pytestmark = pytest.mark.system

SCRIPTS = Path(__file__).parents[2] / "scripts"
START = (
    'set -eu; root=$1; shift; . "$root/scripts/environment"; make_venv "$root/.venv"; install_into "$root/.venv" "$@"'
)
BOUND = 60.0

MAKING = "Making .venv, an environment for Python (a few seconds) ..."
INSTALLING = "Installing into .venv (once; about a minute) ..."
STOPPED = "Stopped. Run it again, and it begins anew."


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """What of a checkout the script looks at, and a package to install."""
    (tmp_path / "scripts").mkdir()
    shutil.copy(SCRIPTS / "environment", tmp_path / "scripts")
    (tmp_path / "pyproject.toml").write_text("")
    with zipfile.ZipFile(tmp_path / "one-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("one.py", "")
        wheel.writestr("one-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: one\nVersion: 1.0\n")
        wheel.writestr("one-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr("one-1.0.dist-info/RECORD", "")
    return tmp_path


@pytest.fixture
def index() -> Iterator[tuple[str, threading.Event]]:
    """A package index that never answers, and whether it was asked."""
    asked = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            with listener.accept()[0] as connection:
                asked.set()
                while connection.recv(4096):
                    pass

        thread = threading.Thread(target=serve)
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/simple", asked
        if not asked.is_set():
            socket.create_connection(listener.getsockname()).close()
        thread.join()


def start(checkout: Path, *what: str, **environment: str) -> subprocess.Popen[str]:
    """In a session of its own: Ctrl-C goes to all that runs on a terminal, not to the shell alone."""
    return subprocess.Popen(
        ["sh", "-c", START, "sh", str(checkout), *what], start_new_session=True, env=clean_environment(**environment),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8",
    )  # fmt: skip


def interrupt(process: subprocess.Popen[str]) -> list[str]:
    """What it still said."""
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=BOUND)
    assert (process.returncode, out) == (130, "")
    assert "Traceback" not in err
    return err.splitlines()


def check_next(checkout: Path, *said: str) -> None:
    """The next start does it all."""
    with start(checkout, "./one-1.0-py3-none-any.whl", PIP_NO_INDEX="1") as process:
        out, err = process.communicate(timeout=BOUND)
    assert (process.returncode, out) == (0, ""), err
    assert err.splitlines() == [*said, INSTALLING]
    python = checkout / ".venv" / "bin" / "python"
    assert subprocess.run([python, "-c", "import one"], check=False).returncode == 0
    with start(checkout, "./one-1.0-py3-none-any.whl") as process:  # and the one after that has nothing to do
        assert process.communicate(timeout=BOUND) == ("", "")


def test_while_the_environment_is_made(checkout: Path) -> None:
    with start(checkout, "one") as process:
        poll(lambda: list(checkout.glob(".venv/lib/python*/site-packages/pip/__init__.py")), "pip comes", BOUND, 0.001)
        said = interrupt(process)
    assert said == [MAKING, STOPPED]
    check_next(checkout, MAKING)


def test_while_packages_are_installed(checkout: Path, index: tuple[str, threading.Event]) -> None:
    url, asked = index
    with start(checkout, "one", PIP_INDEX_URL=url) as process:
        assert asked.wait(BOUND)
        said = interrupt(process)
    assert said == [MAKING, INSTALLING, STOPPED]
    assert not list(checkout.glob(".venv/.tmp"))
    check_next(checkout, MAKING)


def test_killed_while_the_environment_is_made(checkout: Path) -> None:
    """No trap runs then."""
    with start(checkout, "one") as process:
        poll(lambda: list(checkout.glob(".venv/lib/python*/site-packages/pip/__init__.py")), "pip comes", BOUND, 0.001)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate(timeout=BOUND)
    check_next(checkout, MAKING)


def test_an_environment_of_ones_own_stays(checkout: Path) -> None:
    """Whoever made .venv by hand may have more in it."""
    subprocess.run(["python3", "-m", "venv", str(checkout / ".venv")], check=True)
    (checkout / ".venv" / "mine").write_text("")
    check_next(checkout)
    assert (checkout / ".venv" / "mine").exists()


def test_an_environment_that_can_not_be_made(checkout: Path) -> None:
    (checkout / ".venv").write_text("in its way")
    with start(checkout, "one") as process:
        out, err = process.communicate(timeout=BOUND)
    assert (process.returncode, out) == (1, "")
    making, line = err.splitlines()
    assert making == MAKING
    assert line.startswith(f"{checkout}/.venv could not be made: ")
