"""Sizes and numbers: a real nginx with 1 KiB and 100 MiB, memory meanwhile, and 1,000 requests over 50 connections."""

import hashlib
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from nginx import Nginx
from pair import Tunnel
from running import Program, RunningAgent, poll
from visiting import Connection

pytestmark = pytest.mark.system

KIB, MIB = 1024, 1024 * 1024
GROWTH = 60 * MIB  #: what either process may need more while bodies pass


@pytest.fixture(scope="module")
def files(tunnel: Tunnel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Nginx, RunningAgent, str]]:
    """nginx, its agent, and the host name of its tunnel."""
    nginx = Nginx(tmp_path_factory.mktemp("nginx"))
    block = hashlib.sha256(b"").digest() * (MIB // 32)
    with (nginx.files / "big").open("wb") as file:
        for number in range(100):
            file.write(number.to_bytes(4, "big") + block[4:])
    (nginx.files / "small").write_bytes(block[:KIB])
    agent = RunningAgent(tunnel.core, nginx.url, "-subdomain=files", agent_id="files")
    yield nginx, agent, "files.localhost"
    agent.close()
    nginx.close()


class Memory:
    """The most that programs have grown by, looked at again and again until the end of the block."""

    def __init__(self, *programs: Program) -> None:
        self._programs = programs
        self._before = [program.rss() for program in programs]
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self.growth = 0

    def _watch(self) -> None:
        while not self._over.wait(0.05):
            now = [program.rss() for program in self._programs]
            self.growth = max(self.growth, *(one - before for one, before in zip(now, self._before, strict=True)))

    def __enter__(self) -> "Memory":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()


@pytest.mark.parametrize(("name", "size"), [("small", KIB), ("big", 100 * MIB)])
def test_files_come_down_whole(tunnel: Tunnel, files: tuple[Nginx, RunningAgent, str], name: str, size: int) -> None:
    nginx, agent, host = files
    digest = hashlib.sha256()
    with Memory(tunnel.core, agent) as memory, Connection(tunnel.core.public, host, timeout=30) as visitor:
        visitor.send(visitor.request(f"GET /{name}"))
        head = visitor.read_head()
        assert (head.status, head["content-length"], head["server"][:5]) == (200, str(size), "nginx")
        left = size
        while left:
            part = visitor.receive()
            left -= len(part)
            digest.update(part)
        assert visitor.ask("HEAD /small").status == 200  # nothing more came, and the connection goes on
    assert digest.hexdigest() == hash_of(nginx.files / name)
    assert memory.growth < GROWTH


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize(("name", "size"), [("small", KIB), ("big", 100 * MIB)])
def test_files_go_up_whole(
    tunnel: Tunnel, files: tuple[Nginx, RunningAgent, str], name: str, size: int, chunked: bool
) -> None:
    nginx, agent, host = files
    target = f"up/{name}-{chunked}"
    with (
        Memory(tunnel.core, agent) as memory,
        Connection(tunnel.core.public, host, timeout=30) as visitor,
        (nginx.files / name).open("rb") as file,
    ):
        framing = "Transfer-Encoding: chunked" if chunked else f"Content-Length: {size}"
        visitor.send(visitor.request(f"PUT /{target}", framing))
        while part := file.read(256 * KIB):
            visitor.send(b"%x\r\n%b\r\n" % (len(part), part) if chunked else part)
        if chunked:
            visitor.send(b"0\r\n\r\n")
        assert visitor.read().status == 201
    assert hash_of(nginx.files / target) == hash_of(nginx.files / name)
    assert memory.growth < GROWTH


def test_ranges_and_conditions_work(tunnel: Tunnel, files: tuple[Nginx, RunningAgent, str]) -> None:
    _, _, host = files
    with Connection(tunnel.core.public, host) as visitor:
        whole = visitor.ask("GET /small")
        part = visitor.ask("GET /small", "Range: bytes=100-199")
        assert (part.status, part.body, part["content-range"]) == (206, whole.body[100:200], "bytes 100-199/1024")
        kept = visitor.ask("GET /small", f"If-None-Match: {whole['etag']}")
        assert (kept.status, kept["etag"]) == (304, whole["etag"])
        assert visitor.ask("GET /missing").status == 404


def test_a_thousand_requests_over_fifty_connections(tunnel: Tunnel) -> None:
    """Each answer is the one to its own request: number, size and content differ."""
    wrong: list[object] = []

    def ask(connection: int) -> None:
        with tunnel.connect(timeout=30) as visitor:
            for number in range(20):
                name = f"{connection}-{number}".encode()
                answer = visitor.ask(
                    f"POST /echo?{name.decode()}", f"X-Request-Id: {name.decode()}", body=name * number
                )
                if (answer.status, answer.body, answer["x-request-id"]) != (200, name * number, name.decode()):
                    wrong.append((name, answer))

    threads = [threading.Thread(target=ask, args=(connection,)) for connection in range(50)]
    seen = tunnel.core.mark()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not wrong and not any(thread.is_alive() for thread in threads)
    sent = {f"{connection}-{number}" for connection in range(50) for number in range(20)}

    def unlogged() -> set[str]:
        return sent - {one["request_id"] for one in tunnel.core.find("request", after=seen, outcome="ok")}

    poll(lambda: not unlogged(), "a record of each request")


def test_an_http_library_agrees(tunnel: Tunnel, tmp_path: Path) -> None:
    """httpx: another reading of HTTP than ours."""
    url = f"http://127.0.0.1:{tunnel.core.public[1]}"
    with httpx.Client(base_url=url, headers={"Host": tunnel.host}, timeout=20, trust_env=False) as client:
        assert client.post("/echo", content=b"hello").content == b"hello"
        assert (
            client.post("/echo", content=(b"part%d " % n for n in range(5))).content
            == b"part0 part1 part2 part3 part4 "
        )
        assert client.get("/gzip").text == "squeezed " * 100
        assert client.get("/chunked?parts=3&size=2").text == "001122"
        assert client.get("/close-delimited?size=100").num_bytes_downloaded == 100
        assert client.head("/download?size=77").headers["content-length"] == "77"
        assert client.get("/headers").headers.get_list("set-cookie") == ["a=1; Path=/", "b=2"]
        assert client.get("/status/204").status_code == 204
        for path in ("/break-length", "/break-chunked", "/break-close"):
            with pytest.raises(httpx.TransportError):
                client.get(path)
        assert client.get("/nothing").headers["x-tunnel-outcome"] == "local_broken"


def hash_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
