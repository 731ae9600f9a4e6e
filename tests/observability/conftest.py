from __future__ import annotations

from collections.abc import Callable

import pytest
from fakehost import FakeHost


@pytest.fixture
def host() -> Callable[..., FakeHost]:
    """A factory: `host(role="agent", options={"metrics": {...}}, nursery=nursery)`."""
    return FakeHost
