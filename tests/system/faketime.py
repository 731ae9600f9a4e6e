"""A wall clock that a test sets while the program runs: libfaketime under it, so OpenSSL and SQLite see it too.

clock = WallClock(tmp_path / "clock")
core = start_core(environment=clock.environment)
clock.set(+5 * 3600)             # from now on 5 h ahead of ours; the monotonic clock goes on as it was
"""

from __future__ import annotations

from pathlib import Path

import pytest


class WallClock:
    """file: where the offset is kept, one for each program."""

    def __init__(self, file: Path) -> None:
        self.offset = 0
        self._file = file
        found = sorted(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"))
        if not found:
            pytest.fail("libfaketime is missing: install the package libfaketime (scripts/packages)")
        self.environment = {
            "LD_PRELOAD": str(found[0]),
            "FAKETIME_TIMESTAMP_FILE": str(file),
            "FAKETIME_NO_CACHE": "1",
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
            "FAKETIME_DONT_RESET": "1",
        }
        self.set(0)

    def set(self, seconds: int) -> None:
        self.offset = seconds
        new = self._file.with_suffix(".new")
        new.write_text(f"{seconds:+d}\n")
        new.replace(self._file)
