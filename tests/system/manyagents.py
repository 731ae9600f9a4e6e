"""Many agents in one process: `manyagents.py CORE_PORT FINGERPRINT LOCAL COUNT`, the token in AGENT_TOKEN.

Each is a whole `tunnel.agent.client.Agent` with its own link and the name many0, many1, …; SIGTERM ends them all.
They have no layers and no pages: the core is what is measured.
FINGERPRINT "-": no TLS.
"""

from __future__ import annotations

import os
import signal
import sys

import trio

from tunnel.agent.client import Agent
from tunnel.config import load_agent
from tunnel.log import setup


def make(port: str, fingerprint: str, local: str, number: int) -> Agent:
    flags = [
        f"-server=127.0.0.1:{port}",
        "-tls=false" if fingerprint == "-" else f"-server-fingerprint={fingerprint}",
        f"-local={local}",
        f"-subdomain=many{number}",
        f"-agent-id=many{number}",
        "-metrics-addr=",
        "-layers=",
    ]
    return Agent(load_agent(flags, os.environ))


async def main(port: str, fingerprint: str, local: str, count: str) -> None:
    agents = [make(port, fingerprint, local, number) for number in range(int(count))]
    async with trio.open_nursery() as nursery:
        for agent in agents:
            nursery.start_soon(agent.run)
        with trio.open_signal_receiver(signal.SIGTERM) as signals:
            async for _ in signals:
                break
        nursery.cancel_scope.cancel()


if __name__ == "__main__":
    setup("info", True)
    trio.run(main, *sys.argv[1:])
