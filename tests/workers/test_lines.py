"""One log: whole lines only, each with its worker, whatever pieces they come in."""

import io
import json
import logging
import os

import pytest
import trio

from tunnel.log import get_logger, setup
from tunnel.workers import lines
from tunnel.workers.lines import MAX_LINE, marked, open_pipe, pass_on, write_lines


async def passed(data: bytes, step: int, is_json: bool = True) -> bytes:
    near, far = open_pipe()
    out: list[bytes] = []
    async with trio.open_nursery() as nursery:
        nursery.start_soon(pass_on, near, 3, is_json, out.append)
        for at in range(0, len(data), step):
            os.write(far, data[at : at + step])
            await trio.lowlevel.checkpoint()
        os.close(far)
    assert all(part.endswith(b"\n") for part in out)
    return b"".join(out)


@pytest.mark.parametrize("step", [1, 3, 1000])
async def test_records_get_their_worker(step: int) -> None:
    records = [{"msg": "a"}, {"msg": 'odd "}\\n" {} end}'}, {}, {"list": [{"a": {}}]}]
    data = b"".join(json.dumps(record, separators=(",", ":")).encode() + b"\n" for record in records if record)
    out = await passed(data, step)
    assert [json.loads(line) for line in out.splitlines()] == [{**record, "worker": 3} for record in records if record]


@pytest.mark.parametrize("step", [1, 5, 1000])
async def test_text_gets_it_too(step: int) -> None:
    assert await passed(b"one\ntwo three=3\n", step, False) == b"one worker=3\ntwo three=3 worker=3\n"


async def test_a_line_that_was_not_finished_is_dropped() -> None:
    assert await passed(b'{"a":1}\n{"b":', 4) == b'{"a":1,"worker":3}\n'
    assert await passed(b'{"b":', 4) == b""


async def test_a_line_without_an_end_takes_no_memory() -> None:
    data = b"x" * (3 * MAX_LINE) + b'\n{"a":1}\n'
    out = await passed(data, 65536)
    assert out.endswith(b'{"a":1,"worker":3}\n') and len(out) < 2 * MAX_LINE


def test_they_go_where_our_own_records_go() -> None:
    out = io.StringIO()
    handler = setup("info", json=True, stream=out)
    try:
        get_logger("tunnel.core").info("ours")
        write_lines(marked(b'{"msg":"theirs"}\n', 1, True))
    finally:
        logging.getLogger().removeHandler(setup("info", json=False, stream=io.StringIO()))
        handler.close()
    ours, theirs = out.getvalue().splitlines()
    assert json.loads(ours)["msg"] == "ours" and json.loads(theirs) == {"msg": "theirs", "worker": 1}


def test_the_pipe_is_larger_than_usual_where_that_is_allowed() -> None:
    import fcntl

    near, far = open_pipe()
    assert fcntl.fcntl(far, 1032) in (lines.PIPE_SIZE, 65536)  # F_GETPIPE_SZ
    os.close(near)
    os.close(far)
