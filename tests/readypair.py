"""A pair of sockets, one of which a Ready tells of."""

import socket as stdlib_socket

from tunnel.net import RECV_SIZE, Socket
from tunnel.ready import Ready


class Pair:
    """near is told of; what it was told stands in `told`, and what it read then in `got`."""

    def __init__(self, ready: Ready, size: int = RECV_SIZE) -> None:
        near, self.far = stdlib_socket.socketpair()
        near.setblocking(False)
        self.near = Socket(near)
        self.told: list[bool] = []
        self.got: list[bytes | None] = []
        self._size = size
        self.ready = ready
        assert ready.add(self.near, self._hear)

    def _hear(self, has_ended: bool) -> None:
        self.told.append(has_ended)
        if not self.near.is_closed:
            self.got.append(self.near.recv_nowait(self._size))

    def close(self) -> None:
        self.near.close()
        self.far.close()
