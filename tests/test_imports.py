"""Who imports whom, read from the source: DESIGN's arrows, no cycles between rooms, and a wire that touches nothing.

A room is a package (`tunnel.wire`, …) or a module beside them (`tunnel.net`, …). Imports for type checkers only count
as well: what a room names it knows.
"""

import ast
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

import tunnel

ROOT = Path(tunnel.__file__).parent.parent

BOTH = {"tunnel.core", "tunnel.agent"}  # programs that run a core and an agent in one process may import these
SHARED = {
    "tunnel", "tunnel.errors", "tunnel.handler", "tunnel.log", "tunnel.net", "tunnel.plugins", "tunnel.config",
    "tunnel.wire", "tunnel.link", "tunnel.http", "tunnel.tuning", "tunnel.notify", "tunnel.workers",
    "tunnel.front", "tunnel.interrupts", "tunnel.listening", "tunnel.observers", "tunnel.openfiles", "tunnel.ready",
    "tunnel.tls", "tunnel.trust",
}  # fmt: skip

ARROWS: dict[str, set[str]] = {
    "tunnel": set(),
    "tunnel.errors": set(),
    "tunnel.handler": set(),
    "tunnel.tuning": set(),
    "tunnel.interrupts": {"tunnel.log"},
    "tunnel.openfiles": {"tunnel.log"},
    "tunnel.notify": set(),
    "tunnel.sample": set(),
    "tunnel.log": set(),
    "tunnel.tls": set(),
    "tunnel.trust": set(),
    "tunnel.net": {"tunnel.tls"},
    "tunnel.listening": {"tunnel.errors", "tunnel.net"},
    "tunnel.config": {"tunnel", "tunnel.errors"},
    "tunnel.wire": {"tunnel.errors"},
    "tunnel.front": set(),
    "tunnel.ready": {"tunnel.net", "tunnel.front"},
    "tunnel.link": {"tunnel.wire", "tunnel.errors", "tunnel.net", "tunnel.ready"},
    "tunnel.http": {"tunnel.errors", "tunnel.net", "tunnel.handler", "tunnel.trust"},
    "tunnel.workers": {"tunnel.errors", "tunnel.handler", "tunnel.log", "tunnel.link", "tunnel.plugins"},
    "tunnel.observers": {"tunnel.handler"},
    "tunnel.plugins": {"tunnel", "tunnel.errors", "tunnel.handler", "tunnel.log", "tunnel.observers"},
    "tunnel.core": SHARED,
    "tunnel.agent": SHARED,
    "tunnel.screen": SHARED,
    "tunnel.up": SHARED | BOTH | {"tunnel.screen", "tunnel.sample"},
    "tunnel.__main__": SHARED | BOTH | {"tunnel.up"},
    "tunnel.monitoring": SHARED | {"tunnel.up"},
    "observability": {"tunnel.handler"},
}


def modules() -> Iterator[tuple[str, Path]]:
    for top in ("tunnel", "observability"):
        for path in sorted((ROOT / top).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


NAMES = {name for name, _ in modules()}


def room_of(module: str) -> str:
    parts = module.split(".")
    return parts[0] if parts[0] == "observability" else ".".join(parts[:2])


def imported(path: Path, module: str) -> Iterator[str]:
    """Every module that a file imports, wherever it does."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} has a relative import"
            assert node.module is not None
            for alias in node.names:
                below = f"{node.module}.{alias.name}"
                yield below if below in NAMES else node.module


def ours(module: str, path: Path) -> set[str]:
    """The other rooms that a module imports."""
    tops = {name for name in imported(path, module) if name.split(".")[0] in ("tunnel", "observability")}
    return {room_of(name) for name in tops} - {room_of(module)}


def test_every_room_is_in_the_table() -> None:
    assert {room_of(name) for name in NAMES} == ARROWS.keys()


@pytest.mark.parametrize("room", ARROWS)
def test_the_arrows(room: str) -> None:
    for module, path in modules():
        if room_of(module) == room:
            wrong = ours(module, path) - ARROWS[room]
            assert not wrong, f"{module} imports {', '.join(sorted(wrong))}"


def test_http_knows_the_handlers_pages_and_nothing_else_of_it() -> None:
    for module, path in modules():
        if room_of(module) == "tunnel.http" and "tunnel.handler" in ours(module, path):
            assert module == "tunnel.http.pages"


def test_rooms_have_no_cycles() -> None:
    after: dict[str, set[str]] = {room: set() for room in ARROWS}
    for module, path in modules():
        after[room_of(module)] |= ours(module, path)
    while after:
        free = {room for room, others in after.items() if not others & after.keys()}
        assert free, f"a cycle within {sorted(after)}"
        for room in free:
            del after[room]


def test_the_wire_touches_nothing() -> None:
    allowed = {
        "__future__", "collections", "collections.abc", "dataclasses", "heapq", "msgspec", "struct", "typing",
        "weakref",
    }  # fmt: skip
    for module, path in modules():
        if room_of(module) == "tunnel.wire":
            foreign = {name for name in imported(path, module) if not name.startswith("tunnel.")} - allowed
            assert not foreign, f"{module} imports {', '.join(sorted(foreign))}"
            tree = ast.parse(path.read_text())
            waits = [node for node in ast.walk(tree) if isinstance(node, ast.Await | ast.AsyncFunctionDef)]
            assert not waits, f"{module} waits in line {waits[0].lineno}"


def test_every_directory_with_modules_is_a_package() -> None:
    """Or it would be missing in what is installed."""
    for _, path in modules():
        if "migrations" not in path.parts:
            assert (path.parent / "__init__.py").exists(), f"{path.parent} has no __init__.py"


def test_no_two_test_modules_share_a_name() -> None:
    """Or tests of two directories could not run in one call. (Each conftest.py is pytest's own business: nothing may be
    imported from one, for whose it would be depends on the call.)"""
    tests = [path for path in (ROOT / "tests").rglob("*.py") if path.name not in ("conftest.py", "__main__.py")]
    names = Counter(path.stem for path in tests if not (path.parent / "__init__.py").exists())
    assert not [name for name, count in names.items() if count > 1]
    for path in tests:
        assert "conftest" not in imported(path, path.stem), path
