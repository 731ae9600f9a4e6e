"""Listening, with words for what goes wrong, and accepting for ever."""

import errno
import socket as stdlib_socket

import pytest
import trio
import trio.testing

from tunnel import listening
from tunnel.errors import ConfigError
from tunnel.net import Socket, dial


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", ""])
def test_port_0_is_chosen_by_the_kernel_and_the_same_for_all(host: str) -> None:
    sockets = listening.listen(host, 0, "-public-addr")
    try:
        (port,) = {sock.getsockname()[1] for sock in sockets}
        assert port > 0
        with stdlib_socket.create_connection(("127.0.0.1", port)):
            pass
    finally:
        for sock in sockets:
            sock.close()


def test_a_port_in_use() -> None:
    with stdlib_socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"^-metrics-addr: 127\.0\.0\.1:{port} is in use by another program"):
            listening.listen("127.0.0.1", port, "-metrics-addr")


def test_a_host_that_nobody_knows() -> None:
    with pytest.raises(ConfigError, match=r"^-agent-addr: can't resolve 'no-such-host\.invalid' \(.*\); give an addr"):
        listening.listen("no-such-host.invalid", 0, "-agent-addr")


@pytest.mark.parametrize("host", ["a..b", "x" * 64])
def test_a_host_that_is_no_name(host: str) -> None:
    with pytest.raises(ConfigError, match=rf"^-agent-addr: can't resolve '{host}' \(not a host name\); give an addr"):
        listening.listen(host, 0, "-agent-addr")


def test_an_address_that_is_not_ours() -> None:
    with pytest.raises(ConfigError, match=r"^-public-addr: can't listen on 192\.0\.2\.1:80"):
        listening.listen("192.0.2.1", 8080, "-public-addr")


def test_a_port_that_is_not_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(listening, "_bind", refuse)
    with pytest.raises(ConfigError, match=r"^-public-addr: not allowed to listen on \*:80; use a port above 1023"):
        listening.listen("", 80, "-public-addr")


async def test_accepted_connections_outlive_the_accepting_task() -> None:
    (listener,) = listening.listen("127.0.0.1", 0, "x")
    address = listener.getsockname()
    served = trio.Event()

    async def handle(socket: Socket, peer: tuple[str, int]) -> None:
        with socket.sock:
            assert await socket.recv() == b"ping"
            await socket.send(peer[0].encode())
            assert await socket.recv() == b""
            served.set()
            socket.close()

    async with trio.open_nursery() as handling:
        with trio.CancelScope() as accepting:
            async with trio.open_nursery() as nursery:

                async def accept() -> None:
                    await listening.accept_each(listener, handle, handling, problems.append)

                problems: list[OSError] = []
                nursery.start_soon(accept)
                client = await dial(*address)
                await trio.testing.wait_all_tasks_blocked(0.01)
                accepting.cancel()
        assert listener.fileno() == -1
        with trio.fail_after(10):
            await client.send(b"ping")
            assert await client.recv() == b"127.0.0.1"
            client.close()
            await served.wait()
    assert not problems


async def test_running_out_of_files_is_reported_and_waited_for(autojump_clock: object) -> None:
    class Full:
        """A listener whose accept fails as it does without free file descriptors."""

        def __init__(self) -> None:
            self.errors = [OSError(errno.EMFILE, "Too many open files"), OSError(errno.ECONNABORTED, "aborted")]

        def accept(self) -> None:
            if self.errors:
                raise self.errors.pop(0)
            raise _EnoughError

        def fileno(self) -> int:
            return spare.fileno()

        def close(self) -> None:
            pass

    problems: list[OSError] = []
    spare, other = stdlib_socket.socketpair()
    full = Full()

    async def handle(socket: Socket, address: object) -> None: ...

    async with trio.open_nursery() as nursery:
        began = trio.current_time()
        with pytest.raises(_EnoughError):
            await listening.accept_each(full, handle, nursery, problems.append)  # type: ignore[arg-type]
        assert trio.current_time() - began == pytest.approx(0.1)
    assert [exc.errno for exc in problems] == [errno.EMFILE]
    spare.close()
    other.close()


class _EnoughError(Exception):
    pass
