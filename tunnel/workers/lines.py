"""One log of several processes: each worker writes to a pipe of its own, the supervisor passes whole lines on.

So lines never mix, also where the output is a pipe that takes only a part of a write, and it is the supervisor's
output alone that can be full: it drops and counts as ever, and workers go on. Every record tells its worker: a field is
put at the end of each line, of all lines of a batch in one step. A line that its writer could not finish, because it
was killed, is dropped.
"""

from __future__ import annotations

import fcntl
import logging
import os
from collections.abc import Callable

import trio

READ = 256 * 1024
PIPE_SIZE = 1 << 20
MAX_LINE = 1 << 20  #: bytes of a line; what is longer is none of ours
_F_SETPIPE_SZ = 1031  # fcntl.F_SETPIPE_SZ, which fcntl has from 3.10 on but mypy not on every platform


def open_pipe() -> tuple[int, int]:
    """(end to read, end to write), both for one process only until they are passed on."""
    near, far = os.pipe()
    try:
        fcntl.fcntl(far, _F_SETPIPE_SZ, PIPE_SIZE)
    except OSError:
        pass  # more than an unprivileged user may have in pipes: the usual 64 KiB do as well
    return near, far


def marked(lines: bytes, worker: int, is_json: bool) -> bytes:
    """Whole lines with a field that tells their worker. A JSON record is one object a line, text is free of line
    breaks (tunnel/log), so the end of a line is found without reading it."""
    if is_json:
        return lines.replace(b"}\n", b',"worker":%d}\n' % worker)
    return lines.replace(b"\n", b" worker=%d\n" % worker)


def write_lines(lines: bytes) -> None:
    """Write them where this process's own records go."""
    for handler in logging.getLogger().handlers:
        write = getattr(handler, "write_lines", None)
        if write is not None:
            write(lines)
            return


async def pass_on(near: int, worker: int, is_json: bool, write: Callable[[bytes], None] = write_lines) -> None:
    """Pass on what a worker writes until its last process has closed the other end."""
    rest = b""
    async with trio.lowlevel.FdStream(near) as stream:
        while data := await stream.receive_some(READ):
            end = data.rfind(b"\n") + 1
            if not end:
                rest = (rest + data)[: MAX_LINE + 1]
                continue
            lines, rest = rest + data[:end], data[end:]
            write(marked(lines, worker, is_json))
