"""Ports of TCP tunnels: an account has so many, over all workers, and gets its last ones again."""

import pytest

from tunnel.core import ports
from tunnel.core.inherited import Inherited
from tunnel.core.ports import OwnPorts, SharedPorts
from tunnel.errors import Refused


@pytest.fixture
def source() -> OwnPorts:
    return OwnPorts("127.0.0.1", range(1), Inherited({}))


def close(taken: list[object]) -> None:
    for sockets in taken:
        for sock in sockets:  # type: ignore[attr-defined]
            sock.close()


def test_an_account_has_so_many_ports(source: OwnPorts) -> None:
    taken = [source.take_nowait("acme", name, 2) for name in ("db", "ssh")]
    with pytest.raises(Refused) as caught:
        source.take_nowait("acme", "more", 2)
    assert caught.value.reason == "port_quota"
    assert str(caught.value) == (
        "the account's limit of 2 TCP ports is reached: serve fewer TCP tunnels, or ask the core's operator for more "
        "(account limit acme -ports N)"
    )
    taken.append(source.take_nowait("other", "db", 2))
    assert source.by_account == {"acme": 2, "other": 1}
    source.give_back("acme", "db")
    source.give_back("acme", "db")
    taken.append(source.take_nowait("acme", "more", 2))
    for account, name in (("acme", "more"), ("acme", "ssh"), ("other", "db"), ("acme", "never")):
        source.give_back(account, name)
    assert source.by_account == {}
    with pytest.raises(Refused):
        source.take_nowait("acme", "db", 0)
    close(taken)  # type: ignore[arg-type]


def test_a_port_that_is_not_to_be_had_counts_for_nobody() -> None:
    taken = OwnPorts("127.0.0.1", range(1), Inherited({})).take_nowait("acme", "db", 9)
    port = taken[0].getsockname()[1]
    source = OwnPorts("127.0.0.1", range(port, port + 1), Inherited({}))
    with pytest.raises(Refused) as caught:
        source.take_nowait("acme", "db", 9)
    assert caught.value.reason == "no_port" and source.by_account == {}
    close([taken])


def test_ports_of_a_predecessor_count(source: OwnPorts) -> None:
    sockets = source.take_nowait("acme", "db", 9)
    successor = OwnPorts("127.0.0.1", range(1), Inherited(source.sockets()))
    assert successor.take_nowait("acme", "db", 1) == sockets
    with pytest.raises(Refused):
        successor.take_nowait("acme", "ssh", 1)
    close([sockets])


def test_workers_share_a_tunnels_port_and_the_accounts_limit(source: OwnPorts) -> None:
    shared = SharedPorts(source)
    assert shared.take("w1", "acme", "db", 1) is shared.take("w2", "acme", "db", 1)
    for worker in ("w1", "w2"):
        with pytest.raises(Refused) as caught:
            shared.take(worker, "acme", "ssh", 1)
        assert caught.value.reason == "port_quota"
    shared.drop("w1")
    assert shared.by_account == {"acme": 1}
    shared.drop("w2")
    assert shared.by_account == {}
    shared.take("w1", "acme", "ssh", 1)
    shared.close_all()


def test_last_ports_fill_no_memory(source: OwnPorts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ports, "MAX_LAST", 3)
    for number in range(10):
        taken = source.take_nowait("acme", f"n{number}", 1)
        last = taken[0].getsockname()[1]
        close([taken])
        source.give_back("acme", f"n{number}")
    assert len(source._last) == 3
    again = source.take_nowait("acme", "n9", 1)
    assert again[0].getsockname()[1] == last
    close([again])
