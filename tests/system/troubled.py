"""A TCP proxy that gets into trouble on command, between an agent and its core.

    with Troubled(core.agents) as net:             # agents dial net.address
        net.delay = 0.1                            # seconds that every piece waits, each direction
        net.rate = 100_000                         # bytes a second, each direction; 0: as fast as it goes
        net.stall()                                # half-open: takes bytes and loses them; new connections too
        net.heal()                                 # new connections pass again; what lost bytes is cut
        net.heal(cut=False)                        # … or hangs for ever
    net.heal(cut=False)                        # … or hangs for ever
        net.cut(reset=True)                        # ends what is open, by RST or by FIN
        net.corrupt("up")                          # flips bits in the next piece towards the core ("down": the agent)

One thread for each direction of a connection; `connections` counts those that were accepted.
"""

from __future__ import annotations

import socket
import struct
import threading
import time
from contextlib import suppress

from running import Address

PIECE = 16 * 1024
TICK = 0.05  #: seconds


class _Pair:
    """near: the agent's end; far: the core's, None while the network loses everything."""

    def __init__(self, near: socket.socket, far: socket.socket | None) -> None:
        self.near = near
        self.far = far
        self.has_lost = far is None


class Troubled:
    def __init__(self, target: Address, listener: socket.socket | None = None) -> None:
        self.delay = 0.0
        self.rate = 0
        self.connections = 0
        self._target = target
        self._stalled = False
        self._corrupt = ""
        self._lock = threading.Lock()
        self._pairs: list[_Pair] = []
        self._ended = threading.Event()
        self._listener = listener or socket.create_server(("127.0.0.1", 0))
        self.address: Address = self._listener.getsockname()[:2]
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> Troubled:
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut()

    @property
    def flag(self) -> str:
        return f"-server=127.0.0.1:{self.address[1]}"

    def stall(self) -> None:
        self._stalled = True

    def heal(self, *, cut: bool = True) -> None:
        """A stream that has lost bytes can't go on: it is reset, as by a peer that knows nothing of it, or silent."""
        self._stalled = False
        if cut:
            self._end(lambda pair: pair.has_lost, reset=True)

    def cut(self, *, reset: bool = False) -> None:
        self._end(lambda pair: True, reset)

    def corrupt(self, direction: str) -> None:
        self._corrupt = direction

    def _end(self, which, reset: bool) -> None:  # type: ignore[no-untyped-def]
        with self._lock:
            ending = [pair for pair in self._pairs if which(pair)]
            self._pairs = [pair for pair in self._pairs if pair not in ending]
        for pair in ending:
            for sock in (pair.near, pair.far):
                if sock is not None:
                    _end(sock, reset)

    def _accept(self) -> None:
        while not self._ended.is_set():
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            try:
                far = None if self._stalled else socket.create_connection(self._target, 5)
            except OSError:
                _end(near, True)
                continue
            pair = _Pair(near, far)
            with self._lock:
                self._pairs.append(pair)
            threading.Thread(target=self._pass, args=(pair, "up"), daemon=True).start()
            if far is not None:
                threading.Thread(target=self._pass, args=(pair, "down"), daemon=True).start()

    def _pass(self, pair: _Pair, direction: str) -> None:
        one, other = (pair.near, pair.far) if direction == "up" else (pair.far, pair.near)
        assert one is not None
        try:
            while data := one.recv(PIECE):
                if self._stalled or pair.has_lost or other is None:
                    pair.has_lost = True
                    continue
                if self.delay:
                    time.sleep(self.delay)
                if self.rate:
                    time.sleep(len(data) / self.rate)
                if self._corrupt == direction:
                    self._corrupt = ""
                    data = bytes(byte ^ 0x55 for byte in data)
                other.sendall(data)
            if other is not None and not self._stalled:
                other.shutdown(socket.SHUT_WR)
        except OSError:
            self._end(lambda each: each is pair, reset=True)


class Full:
    """A listener whose queue is full: the kernel drops further SYNs, as a route that leads nowhere does."""

    def __init__(self) -> None:
        self.listener = socket.socket()
        self.listener.bind(("127.0.0.1", 0))
        self.listener.listen(0)
        self.address: Address = self.listener.getsockname()[:2]
        self._plugs: list[socket.socket] = []
        while True:
            self._plugs.append(socket.socket())
            self._plugs[-1].settimeout(0.3)
            try:
                self._plugs[-1].connect(self.address)
            except TimeoutError:
                break

    def heal(self, target: Address) -> Troubled:
        """The route leads to `target` from now on."""
        for plug in self._plugs:
            plug.close()
        self.listener.listen(100)
        return Troubled(target, self.listener)


def _end(sock: socket.socket, reset: bool) -> None:
    """Wakes the thread that reads it, too."""
    with suppress(OSError):
        if reset:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        else:
            sock.shutdown(socket.SHUT_RDWR)
    # A close alone does not wake a thread in recv; a shutdown would send FIN before the reset, so the peer's data or
    # our own closing of the last reference decides: detach it from the reader by a zero-length shutdown of reading.
    with suppress(OSError):
        sock.shutdown(socket.SHUT_RD)
    sock.close()
