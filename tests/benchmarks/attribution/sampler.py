"""Runs a module and samples its main thread: `sampler.py DIRECTORY MODULE ARGUMENT…`. SIGRTMIN+1 starts counting
afresh, SIGRTMIN+2 writes what was counted into DIRECTORY/MODULE.json.

A profiler that hooks calls (cProfile, sys.setprofile) makes cheap calls look dear. Here the kernel sends a signal for
every few milliseconds of CPU that the thread has used (its CPU clock ticks with the kernel's timer, 250 times a second
at most), and Python runs the handler as soon as the C function that it interrupts returns: C functions are charged to
the Python frame that called them. What other threads use the kernel counts itself.

Each signal also wakes Trio's loop; what that costs shows against a process that is not sampled (`attribute.py`).
"""

from __future__ import annotations

import ctypes
import json
import runpy
import signal
import sys
import threading
from collections import Counter
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

INTERVAL_NS = 1_000_000
CLOCK_THREAD_CPUTIME_ID = 3
SIGEV_THREAD_ID = 4
DEEPEST = 40  #: frames of a stack that are kept, innermost first


class _Event(ctypes.Structure):
    """struct sigevent of 64-bit Linux"""

    _fields_ = (
        ("value", ctypes.c_void_p),
        ("signo", ctypes.c_int),
        ("notify", ctypes.c_int),
        ("thread", ctypes.c_int),
        ("rest", ctypes.c_byte * 44),
    )


class _Timer(ctypes.Structure):
    """struct itimerspec"""

    _fields_ = tuple((name, ctypes.c_long) for name in ("period_s", "period_ns", "first_s", "first_ns"))


class Sampler:
    def __init__(self, output: Path) -> None:
        self._output = output
        self._stacks: Counter[tuple[int, tuple[CodeType, ...]]] = Counter()
        self._threads_before: dict[int, float] = {}
        self._timer = ctypes.c_void_p()

    def install(self) -> None:
        """In the main thread, which is the one that is sampled."""
        signal.signal(signal.SIGPROF, self._sample)
        signal.siginterrupt(signal.SIGPROF, False)
        signal.signal(signal.SIGRTMIN + 1, lambda *_: self._begin())
        signal.signal(signal.SIGRTMIN + 2, lambda *_: self._write())
        libc = ctypes.CDLL(None, use_errno=True)
        event = _Event(signo=signal.SIGPROF, notify=SIGEV_THREAD_ID, thread=threading.get_native_id())
        if libc.timer_create(CLOCK_THREAD_CPUTIME_ID, ctypes.byref(event), ctypes.byref(self._timer)):
            raise OSError(ctypes.get_errno(), "timer_create")
        times = _Timer(0, INTERVAL_NS, 0, INTERVAL_NS)
        if libc.timer_settime(self._timer, 0, ctypes.byref(times), None):
            raise OSError(ctypes.get_errno(), "timer_settime")

    def _sample(self, _: int, frame: FrameType | None) -> None:
        line = frame.f_lineno if frame is not None else 0
        codes: list[CodeType] = []
        while frame is not None and len(codes) < DEEPEST:
            codes.append(frame.f_code)
            frame = frame.f_back
        self._stacks[line, tuple(codes)] += 1

    def _begin(self) -> None:
        self._stacks.clear()
        self._threads_before = _thread_cpu()

    def _write(self) -> None:
        stacks, threads = self._stacks.copy(), _thread_cpu()
        used = {id: seconds - self._threads_before.get(id, 0.0) for id, seconds in threads.items()}
        modules = {file: name for name, module in sys.modules.items() if (file := getattr(module, "__file__", None))}

        def name_of(code: CodeType) -> str:
            return f"{modules.get(code.co_filename, Path(code.co_filename).stem)}:{code.co_qualname}"

        main = threading.get_native_id()
        names = {thread.native_id: thread.name for thread in threading.enumerate()}
        report: dict[str, Any] = {
            "main": used.pop(main),
            "threads": [[names.get(id, "other"), seconds] for id, seconds in used.items()],
            "stacks": [[count, line, [name_of(one) for one in codes]] for (line, codes), count in stacks.items()],
        }
        part = self._output.with_suffix(".part")
        part.write_text(json.dumps(report))
        part.rename(self._output)  # whole or not there


def _thread_cpu() -> dict[int, float]:
    """Seconds of CPU by thread id."""
    used = {}
    for path in Path("/proc/self/task").iterdir():
        try:
            used[int(path.name)] = int((path / "schedstat").read_text().split()[0]) / 1e9
        except OSError:  # it has just ended
            continue
    return used


if __name__ == "__main__":
    sys.path.pop(0)  # this directory, whose modules are none of the program's business
    directory, module = sys.argv[1:3]
    sys.argv[1:3] = []
    Sampler(Path(directory) / f"{module}.json").install()
    runpy.run_module(module, run_name="__main__", alter_sys=True)
