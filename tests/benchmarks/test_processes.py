"""What is measured of a process, and that nothing outlives the harness."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from benchmarks.processes import Failed, Process, clean_environment, poll

pytestmark = pytest.mark.system
TESTS = Path(__file__).parents[1]

FAMILY = """
import os, sys
print("begun", flush=True)
if os.fork() == 0:
    sum(range(3_000_000))
    print("child done", flush=True)
    while True:
        os.read(0, 1) or __import__("signal").pause()
blob = bytearray(30_000_000)
__import__("signal").pause()
"""


def is_there(pid: int) -> bool:
    """Whether it runs (one that waits for its parent's last look does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_the_whole_family_is_charged_and_ended(tmp_path: Path) -> None:
    process = Process(sys.executable, "-c", FAMILY, directory=tmp_path)
    try:
        process.wait_line("child done")
        assert process.cpu() >= 0.02
        poll(lambda: process.rss() > 30_000_000, "its memory is seen", 10)
        family = [int(path.name) for path in Path("/proc").glob("[0-9]*") if _session(path) == process.pid]
        assert len(family) == 2
    finally:
        process.stop()
    poll(lambda: not any(is_there(pid) for pid in family), "both are gone", 10)


def _session(path: Path) -> int:
    try:
        return int((path / "stat").read_text().rpartition(")")[2].split()[3])
    except OSError:
        return 0


def test_what_ends_too_early_says_what_it_wrote(tmp_path: Path) -> None:
    process = Process("sh", "-c", "echo oh no; exit 3", directory=tmp_path)
    try:
        with pytest.raises(Failed, match=r"(?s)ended before 'ready'.*oh no"):
            process.wait_line("ready")
    finally:
        process.stop()


def test_nothing_configures_the_programs_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TUNNEL_X", "AGENT_X", "OTEL_X", "PYTHONPATH"):
        monkeypatch.setenv(name, "1")
    assert not {"TUNNEL_X", "AGENT_X", "OTEL_X", "PYTHONPATH"} & clean_environment().keys()
    assert clean_environment({"OTEL_X": "2"})["OTEL_X"] == "2"


HARNESS = """
import sys
from pathlib import Path
from benchmarks.processes import Process
process = Process("sleep", "1000", directory=Path("."))
print(process.pid, flush=True)
sys.stdin.read()
"""


def test_a_killed_harness_takes_all_with_it(tmp_path: Path) -> None:
    harness = subprocess.Popen(
        [sys.executable, "-c", HARNESS], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(TESTS)},
    )  # fmt: skip
    assert harness.stdout is not None and harness.stdin is not None
    with harness, harness.stdout, harness.stdin:
        pid = int(harness.stdout.readline())
        comm = Path(f"/proc/{pid}/comm")
        poll(lambda: comm.read_text() == "sleep\n", "it runs, and setpriv has done its part", 10)
        harness.kill()
        harness.wait(10)
    poll(lambda: not is_there(pid), "it went with the harness", 10)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_leaves_nothing(tmp_path: Path, number: int) -> None:
    harness = subprocess.Popen(
        [sys.executable, "-m", "benchmarks", "quick"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(TESTS), "TMPDIR": str(tmp_path)},
    )  # fmt: skip
    assert harness.stderr is not None
    with harness.stderr:
        try:
            children: set[int] = set()

            def enough() -> bool:
                """nginx, floor, sink, core and agent"""
                children.update(_children(harness.pid))
                return len(children) >= 5

            poll(enough, "its programs run", 60)
            harness.send_signal(number)
            assert harness.wait(60) in (130, 143)
            assert harness.stderr.read() == b""
        finally:
            harness.kill()
            harness.wait()
    poll(lambda: not any(is_there(pid) for pid in children), "all of them are gone", 10)
    assert list(tmp_path.iterdir()) == []


def _children(pid: int) -> set[int]:
    found = set()
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            text = path.read_text()
        except OSError:
            continue
        if text.rpartition(")")[2].split()[1] == str(pid):
            found.add(int(path.parent.name))
    return found


def test_a_process_is_held_on_a_processor(tmp_path: Path) -> None:
    first = min(os.sched_getaffinity(0))
    process = Process("sleep", "60", directory=tmp_path)
    try:
        process.pin(first)
        assert os.sched_getaffinity(process.pid) == {first}
    finally:
        process.stop()
