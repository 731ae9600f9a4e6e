"""Thousands of agents that only keep their links: `idleagents.py CORE_PORT COUNT TUNNELS`, the token in AGENT_TOKEN.

To the core they are like any other: a hello, heartbeats both ways, answers to its probes. On this side they share one
process and one sweeper and have nothing else, so that the core is what gets the machine. (`tests/system/manyagents.py`
runs whole agents; a few hundred of them fill a CPU with their own timers.) They serve no requests.
"""

from __future__ import annotations

import os
import signal
import sys
from functools import partial

import trio

from tunnel import __version__
from tunnel.link import transport
from tunnel.link.link import Link
from tunnel.link.stream import Stream
from tunnel.link.sweeper import Sweeper
from tunnel.net import dial
from tunnel.wire import control, frames
from tunnel.wire.control import Hello, TunnelRequest
from tunnel.wire.frames import NO_BODY, Response

AT_ONCE = 16  #: that are on their way in
HEARTBEAT, HEARTBEAT_TIMEOUT = 5.0, 60.0  #: seconds; patient, since one process plays all of them


def hello(number: int, tunnels: int) -> bytes:
    """Names as `manyagents.py` has them."""
    names = [f"many{number}x{index}" for index in range(tunnels)] if tunnels > 1 else [f"many{number}"]
    wanted = [TunnelRequest(name, "http", "http://127.0.0.1:1") for name in names]
    name = f"many{number}"
    return control.encode(Hello([frames.VERSION], __version__, name, os.environ["AGENT_TOKEN"], wanted, name, 1000))


async def attach(port: int, first: bytes, sweeper: Sweeper, nursery: trio.Nursery) -> None:
    """Returns when the core has let it in. Raises RuntimeError when it does not."""
    link = Link(False, HEARTBEAT, HEARTBEAT_TIMEOUT)

    def answer_probe(stream: Stream) -> None:
        link.session.respond(stream, Response(204, NO_BODY, 0, 0, b"OK\r\n"), end=True)

    link.on_opened = answer_probe
    socket = await dial("127.0.0.1", port)
    nursery.start_soon(link.run, await transport.connect(nursery, socket, "127.0.0.1", link.on_message))
    link.session.control(frames.HELLO, first)
    kind, payload = await link.receive_control()
    if kind != frames.WELCOME:
        raise RuntimeError(f"{frames.NAMES[kind]} instead of a welcome: {payload!r}")
    sweeper.add(link)


async def main(port: int, count: int, tunnels: int) -> None:
    numbers = iter(range(count))
    sweeper = Sweeper(lambda exc: sys.exit(f"a deadline check broke: {exc}"))
    async with trio.open_nursery() as nursery:

        async def attach_each() -> None:
            for number in numbers:
                await attach(port, hello(number, tunnels), sweeper, nursery)

        nursery.start_soon(sweeper.run)
        for _ in range(AT_ONCE):
            nursery.start_soon(attach_each)
        with trio.open_signal_receiver(signal.SIGTERM) as signals:
            async for _ in signals:
                break
        nursery.cancel_scope.cancel()


if __name__ == "__main__":
    trio.run(partial(main, *(int(word) for word in sys.argv[1:])))
