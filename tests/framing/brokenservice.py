"""A local service that does what the table of broken answers says, and answers /ok/… properly on any connection."""

from __future__ import annotations

import itertools
import socket
import struct
import threading

from framing.answers import CLOSE, FLOOD, LATE, RESET, SILENCE, Case, Step

PATIENCE = 10.0  #: seconds that any wait here may last


class BrokenService:
    """served: path → number of the local connection it came on. `late` and `has_sent_late` of the case under way."""

    def __init__(self, cases: list[Case]) -> None:
        self.served: dict[str, int] = {}
        self.has_answer: dict[int, threading.Event] = {number: threading.Event() for number in range(len(cases))}
        self.has_sent_late: dict[int, threading.Event] = {number: threading.Event() for number in range(len(cases))}
        self._cases = cases
        self._numbers = itertools.count(1)
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(PATIENCE)

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            connection.setsockopt(
                socket.IPPROTO_TCP, socket.TCP_NODELAY, 1
            )  # "a little later" is not with the next request
            threading.Thread(target=self._serve, args=(connection, next(self._numbers)), daemon=True).start()

    def _serve(self, connection: socket.socket, number: int) -> None:
        try:
            with connection:
                data = b""
                while True:
                    while b"\r\n\r\n" not in data:
                        part = connection.recv(65536)
                        if not part:
                            return
                        data += part
                    head, _, data = data.partition(b"\r\n\r\n")
                    path = head.split(b" ")[1].decode()
                    self.served[path] = number
                    if path.startswith("/ok/"):
                        connection.sendall(
                            b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(path), path.encode())
                        )
                    else:
                        index = int(path.removeprefix("/case/"))
                        if not self._act(connection, index, self._cases[index].steps):
                            return
        except OSError:
            pass  # the agent has ended the connection, as it should for most of these

    def _act(self, connection: socket.socket, index: int, steps: tuple[Step, ...]) -> bool:
        """Whether the connection goes on."""
        last = b""
        is_late = False
        for step in steps:
            if isinstance(step, bytes):
                last = step
                connection.sendall(step)
            elif step == FLOOD:
                connection.settimeout(PATIENCE)
                while True:
                    connection.sendall(last)
            elif step == LATE:
                assert self.has_answer[index].wait(PATIENCE)
                is_late = True
            elif step == RESET:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            elif step == SILENCE:
                while connection.recv(65536):  # until the agent gives up
                    pass
            else:
                assert step == CLOSE
        if steps[-1] in (CLOSE, RESET):
            connection.close()
        if is_late:
            self.has_sent_late[index].set()
        return steps[-1] not in (CLOSE, RESET, SILENCE)
