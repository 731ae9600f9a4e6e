"""Benchmarks: `nox -s benchmarks`. They print their figures and hold the bounds that a release must keep."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from rig import Rig


@pytest.fixture(scope="session")
def rig() -> Iterator[Rig]:
    """Not under pytest's own directory: nginx's worker is another user and must be able to read."""
    with tempfile.TemporaryDirectory() as directory:
        made = Rig(Path(directory))
        yield made
        made.stop()
