"""Files and directories that only their owner can read, whatever the umask is."""

from __future__ import annotations

import os
import secrets
from pathlib import Path


def make_private(directory: Path) -> None:
    """A directory that only its owner can enter, and so each above it that is made with it. Raises OSError."""
    for one in [*reversed(directory.parents), directory]:
        if not one.exists():
            one.mkdir(mode=0o700, exist_ok=True)


def write_secret(path: Path, text: str) -> None:
    """A file that only its owner can read, from its first moment, whole or not at all."""
    make_private(path.parent)
    draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with os.fdopen(os.open(draft, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
