"""The administration commands: what goes where, exit codes, and that a running core sees their work."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tunnel.core import phrases, records
from tunnel.core.accounts import Accounts
from tunnel.core.commands import run_command
from tunnel.core.database import Database
from tunnel.core.registry import Registry
from tunnel.core.store import Store
from tunnel.errors import Refused

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(database_url: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Run:
    """Run a command: (exit code, standard output, standard error). Nobody migrated the store before."""

    def run(*words: str) -> tuple[int, str, str]:
        code = run_command(list(words), database_url=database_url, data_dir=tmp_path)
        return code, *capfd.readouterr()

    return run


def ask(run: Run, *words: str) -> Any:
    code, out, _ = run(*words, "-json")
    assert code == 0
    return json.loads(out)


def test_accounts(run: Run) -> None:
    code, out, err = run("account", "create", "acme")
    assert (code, out) == (0, "")
    assert re.fullmatch(r"account acme was made \(id acme-[a-z0-9]{6}\); next: token create acme\n", err)
    assert ask(run, "account", "create", "beta")["name"] == "beta"
    code, out, err = run("account", "list")
    assert (code, err) == (0, "")
    assert [line.split()[0] for line in out.splitlines()] == ["NAME", "acme", "beta"]
    facts = ask(run, "account", "show", "acme")
    assert facts["disabled"] is False
    assert set(facts["limits"].values()) == {None}
    assert run("account", "disable", "acme")[0] == 0
    assert ask(run, "account", "list")[0]["disabled"] is True
    assert "disabled" in run("account", "show", "acme")[1]
    assert run("account", "enable", facts["id"])[0] == 0  # by id, too
    assert ask(run, "account", "show", "acme")["disabled"] is False
    assert run("account", "delete", "acme")[0] == 0
    assert [each["name"] for each in ask(run, "account", "list")] == ["beta"]


@pytest.mark.parametrize(
    "words",
    ["account list", "account show a", "account delete a", "account limit a -connections 1", "token create a",
     "token list", "token revoke t", "tunnel reserve n a", "tunnel release n", "tunnel list", "usage"],
)  # fmt: skip
def test_a_slip_in_the_path_makes_no_store(words: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    place = tmp_path / "slip" / "of the pen"
    for url, flag, file in (
        ("", "-data-dir", place / "tunnel.db"),
        (f"sqlite:///{place}/x", "-database-url", place / "x"),
    ):
        assert run_command(words.split(), database_url=url, data_dir=place) == 1
        said = capfd.readouterr()
        assert said.out == ""
        assert said.err == f"tunnel core: there is no store at {file}; is {flag} that of the core?\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("words", ["account create a", "migrate"])
def test_what_begins_a_store_makes_it(words: str, tmp_path: Path) -> None:
    assert run_command(words.split(), database_url="", data_dir=tmp_path / "new") == 0
    assert run_command(["account", "list"], database_url="", data_dir=tmp_path / "new") == 0


def test_limits(run: Run) -> None:
    run("account", "create", "acme")
    code, out, err = run(
        "account", "limit", "acme", "-requests-per-second", "100", "--requests-burst=200",
        "-requests-per-month=1000000", "-bandwidth", "10MiB", "-bandwidth-per-month", "1TiB", "-connections", "5",
        "-names", "20", "-ports=0",
    )  # fmt: skip
    assert (code, out) == (0, "")
    assert "100" in err and "10MiB" in err
    expected = {
        "max_connections": 5, "requests_per_second": 100.0, "requests_burst": 200, "requests_per_month": 1_000_000,
        "bandwidth_bytes_per_second": 10 << 20, "bandwidth_bytes_per_month": 1 << 40, "max_names": 20, "max_ports": 0,
    }  # fmt: skip
    assert ask(run, "account", "show", "acme")["limits"] == expected
    assert ask(run, "account", "limit", "acme", "-bandwidth", "none")["limits"] == {
        **expected, "bandwidth_bytes_per_second": None
    }  # fmt: skip
    shown = run("account", "show", "acme")[1]
    assert re.search(r"bytes a month +1TiB", shown)
    assert re.search(r"bytes a second +none", shown)
    assert re.search(r"names +20\n", shown) and re.search(r"TCP ports +0\n", shown)
    err = run("account", "limit", "acme", "-names", "none", "-ports=none")[2]
    assert "names" not in err and "none" not in err
    shown = run("account", "show", "acme")[1]
    assert re.search(r"names +none of its own \(the core's -max-names-per-account\)", shown)


def test_a_limit_is_shown_as_it_was_given(run: Run) -> None:
    """500GB are no 465.7 GiB, and what was used of them is said so that it can be compared."""
    run("account", "create", "acme")
    assert "bytes a month 500GB" in run("account", "limit", "acme", "-bandwidth-per-month", "500GB")[2]
    shown = run("account", "show", "acme")[1]
    assert re.search(r"bytes a month +500GB\n", shown) and re.search(r"bytes in, out this month +0B, 0B", shown)
    run("account", "limit", "acme", "-bandwidth-per-month", "500GiB")
    assert re.search(r"bytes a month +500GiB\n", run("account", "show", "acme")[1])


@pytest.mark.parametrize(
    "words",
    [
        ["-connections", "many"], ["-names=-1"], ["-ports", "some"],
        ["-connections=-1"], ["-connections", "1.5"], ["-requests-per-second", "0"],
        ["-requests-per-second", "nan"], ["-requests-per-second", "inf"], ["-requests-burst", "0"],
        ["-bandwidth", "10 parsecs"], ["-bandwidth", "0"], ["-bandwidth-per-month", "9999999999TiB"],
        ["-requests-per-month", str(1 << 63)], ["-requests-per-month", ""],
    ],
)  # fmt: skip
def test_bad_limits(tmp_path: Path, capfd: pytest.CaptureFixture[str], words: list[str]) -> None:
    run_command(["account", "create", "acme"], database_url="", data_dir=tmp_path)
    capfd.readouterr()
    assert run_command(["account", "limit", "acme", *words], database_url="", data_dir=tmp_path) == 1
    out, err = capfd.readouterr()
    assert out == ""
    assert re.fullmatch(r"tunnel core: -[a-z-]+ .*: expected .* from [0-9.]+, or none\n", err)


def test_the_token_stands_alone_on_standard_output(run: Run) -> None:
    run("account", "create", "acme")
    code, out, err = run("token", "create", "acme", "-name", "laptop", "-expires", "30d")
    assert code == 0
    assert re.fullmatch(r"tt_[0-9A-Za-z]{43}\n", out)
    assert out.strip() not in err
    assert "good until" in err
    [facts] = ask(run, "token", "list", "acme")
    assert (facts["name"], facts["state"], facts["prefix"]) == ("laptop", "usable", out[:9])
    assert out.strip() not in run("token", "list")[1]
    made = ask(run, "token", "create", "acme", "--expires", "none")
    assert made["token"].startswith(made["prefix"])
    assert made["expires_at"] is None


@pytest.mark.parametrize("which", ["id", "prefix", "token"])
def test_revoking(run: Run, which: str) -> None:
    run("account", "create", "acme")
    made = ask(run, "token", "create", "acme")
    other = ask(run, "token", "create", "acme")
    code, out, err = run("token", "revoke", made[which])
    assert (code, out) == (0, "")
    assert made["token"] not in err
    states = {each["id"]: each["state"] for each in ask(run, "token", "list")}
    assert states == {made["id"]: "revoked", other["id"]: "usable"}
    code, _, err = run("token", "revoke", made["id"])
    assert (code, err) == (1, f"tunnel core: token {made['id']} is revoked already\n")


@pytest.mark.parametrize("base", ["tunnel.example.com", "localhost"])
@pytest.mark.parametrize(
    "name", ["Foo.localhost", "foo", "www.example.org", "a.foo.localhost", "Foo.tunnel.example.com."]
)
def test_a_name_is_reserved_under_the_key_that_the_core_looks_up(tmp_path: Path, base: str, name: str) -> None:
    options: Any = {"database_url": "", "data_dir": tmp_path, "base_domain": base}
    run_command(["account", "create", "acme"], **options)
    assert run_command(["tunnel", "reserve", name, "acme"], **options) == 0
    with Database("", tmp_path).transaction() as conn:
        (row,) = records.list_names(conn)
    assert row["name"] == Registry(base, 600).name_of(name.lower().removesuffix("."))


def test_names(run: Run) -> None:
    run("account", "create", "acme")
    assert run("tunnel", "reserve", "API", "acme") == (0, "", "api is reserved for account acme\n")
    assert ask(run, "tunnel", "reserve", "www.Example.com", "acme")["name"] == "www.example.com"
    out = run("tunnel", "list")[1]
    assert [line.split()[:3] for line in out.splitlines()[1:]] == [
        ["api", "acme", "reserved"], ["www.example.com", "acme", "reserved"]
    ]  # fmt: skip
    assert run("tunnel", "reserve", "api", "acme")[2] == "tunnel core: api is reserved already, by account acme\n"
    assert run("tunnel", "release", "api") == (
        0, "", "api is no longer reserved; account acme keeps it while it serves it, and for -name-hold after that; to "
        "give it to another account: tunnel reserve api ACCOUNT\n",
    )  # fmt: skip
    assert [(each["name"], each["account"], each["state"]) for each in ask(run, "tunnel", "list")] == [
        ("api", "acme", "claimed"), ("www.example.com", "acme", "reserved")
    ]  # fmt: skip
    facts = ask(run, "tunnel", "release", "www.example.com")
    assert facts == {"name": "www.example.com", "account": "acme", "released": True}
    run("account", "create", "other")
    assert ask(run, "tunnel", "reserve", "api", "other")["taken_from"] == "acme"


def test_the_base_domain_is_nobodys_once_it_is_released(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    options: dict[str, Any] = {"database_url": "", "data_dir": tmp_path, "base_domain": "tunnel.example"}
    for words in (["account", "create", "acme"], ["tunnel", "reserve", "tunnel.example", "acme"]):
        assert run_command(words, **options) == 0
    capfd.readouterr()
    assert run_command(["tunnel", "release", "tunnel.example"], **options) == 0
    assert capfd.readouterr()[1] == "tunnel.example is no longer reserved\n"
    with Database("", tmp_path).transaction() as conn:
        assert records.list_names(conn) == []


def test_migrate(run: Run) -> None:
    assert run("migrate") == (0, "", "a new store was made, schema 0002\n")
    assert run("migrate") == (0, "", "the store is at schema 0002, the newest\n")
    facts = ask(run, "migrate")
    assert facts["schema"] == facts["before"] == "0002"
    assert "pg-secret-word" not in facts["store"]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["account", "create", "acme"], "account acme exists already"),
        (["account", "create", "Not A Name"], "an account's name has"),
        (["account", "create", ""], "an account's name has"),
        (["account", "show", "nobody"], "there is no account nobody"),
        (["account", "limit", "nobody", "-connections", "1"], "there is no account nobody"),
        (["account", "delete", "nobody"], "there is no account nobody"),
        (["token", "create", "nobody"], "there is no account nobody"),
        (["token", "create", "acme", "-expires", "soon"], "-expires soon: expected a duration"),
        (["token", "create", "acme", "-expires=-1d"], "-expires -1d: expected a duration"),
        (["token", "create", "acme", "-expires", "nand"], "-expires nand: expected a duration"),
        (["token", "list", "nobody"], "there is no account nobody"),
        (["token", "revoke", "tok_nothing"], "there is no such token"),
        (["token", "revoke", ""], "there is no such token"),
        (["token", "revoke", "%"], "there is no such token"),
        (["token", "revoke", "tok_"], "several tokens begin so: tok_"),
        (["tunnel", "reserve", "a b", "acme"], "'a b': expected a name such as app"),
        (["tunnel", "reserve", "api", "nobody"], "there is no account nobody"),
        (["tunnel", "release", "api"], "api is not reserved"),
        (["usage", "nobody"], "there is no account nobody"),
    ],
)
def test_what_cannot_be_done(tmp_path: Path, capfd: pytest.CaptureFixture[str], words: list[str], line: str) -> None:
    for setup in (["account", "create", "acme"], ["token", "create", "acme"], ["token", "create", "acme"]):
        run_command(setup, database_url="", data_dir=tmp_path)
    capfd.readouterr()
    assert run_command(words, database_url="", data_dir=tmp_path) == 1
    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith(f"tunnel core: {line}")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    "words",
    [
        [], ["nonsense"], ["account"], ["account", "nonsense"], ["account", "create"], ["account", "create", "a", "b"],
        ["account", "limit", "acme"], ["account", "limit", "acme", "-nonsense", "1"], ["account", "list", "-conn"],
        ["token"], ["token", "create"], ["tunnel", "reserve", "x"], ["usage", "-month", "2026-13"],
        ["usage", "-month"], ["migrate", "now"],
    ],
)  # fmt: skip
def test_asked_wrongly(tmp_path: Path, capfd: pytest.CaptureFixture[str], words: list[str]) -> None:
    assert run_command(words, database_url="", data_dir=tmp_path) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert re.fullmatch(r"tunnel core: .+; python -m tunnel\.core.* -h shows how\n", err)
    assert list(tmp_path.iterdir()) == []  # the store was not touched


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        (["--help"], "account"),
        (["account", "--help"], "disable"),
        (["account", "limit", "-h"], "-requests-per-second"),
        (["token", "create", "--help"], "-expires"),
        (["usage", "--help"], "-month"),
    ],
)
def test_help(tmp_path: Path, capfd: pytest.CaptureFixture[str], words: list[str], shown: str) -> None:
    assert run_command(words, database_url="", data_dir=tmp_path) == 0
    out, err = capfd.readouterr()
    assert shown in out
    assert err == ""


def test_an_unusable_store_is_one_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    url = "postgresql://u:hush-hush@127.0.0.1:1/x"
    assert run_command(["account", "list"], database_url=url, data_dir=tmp_path) == 1
    out, err = capfd.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert "refused" in err and "hush-hush" not in err


async def test_a_running_core_sees_it(run: Run, store: Store) -> None:
    run("account", "create", "acme")
    token = run("token", "create", "acme")[1].strip()
    accounts = Accounts(store)
    changes: list[int] = []
    await accounts.watch(lambda: changes.append(1))
    grant = await accounts.authenticate(token, "agent-1")
    account = await accounts.load(grant.account_id)
    await accounts.claim(["claimed"], account.id)
    account.admit_request()
    account.take_bytes(1536, 5 << 20)
    await accounts.flush()

    [row] = ask(run, "usage", "acme")
    assert (row["requests"], row["bytes_in"], row["bytes_out"]) == (1, 1536, 5 << 20)
    assert re.search(r"acme +\d{4}-\d\d +1 +1\.536kB +5\.243MB", run("usage")[1])
    for limit, shown in (("1TB", "1.536kB, 5.243MB"), ("1TiB", "1.5KiB, 5MiB")):
        run("account", "limit", "acme", "-bandwidth-per-month", limit)
        assert re.search(
            rf"bytes a month +{limit}\nrequests this month +1\nbytes .* month +{shown}\n",
            run("account", "show", "acme")[1],
        )
    assert ask(run, "usage", "-month", "2001-01")[0]["requests"] == 0
    assert run("tunnel", "list")[1].splitlines()[1].split()[:3] == ["claimed", "acme", "claimed"]
    assert ask(run, "token", "list")[0]["last_used_at"] is not None

    run("account", "limit", "acme", "-connections", "0")
    await accounts.watch(lambda: changes.append(1))
    with pytest.raises(Refused):
        account.admit_link()
    run("token", "revoke", token[:9])
    await accounts.watch(lambda: changes.append(1))
    found = accounts.check(grant)
    assert found is not None and found.reason == "revoked"
    assert len(changes) == 3


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1000", 1000), ("10MiB", 10 << 20), ("1TiB", 1 << 40), ("500kB", 500_000), ("500KB", 500_000),
        ("10M", 10 << 20),
        ("1.5GiB", 3 << 29), ("64 KiB", 65536), ("10MiB/s", 10 << 20), ("7B", 7), ("2PiB", 2 << 50), ("5Mi", 5 << 20),
        (str((1 << 53) + 1), (1 << 53) + 1), ("1.005MB", 1_005_000),
    ],
)  # fmt: skip
def test_sizes(text: str, size: int) -> None:
    assert phrases.parse_size(text) == size


@pytest.mark.parametrize("text", ["", "MiB", "-1", "1e3", "1 2", "10MiBs", "0x10"])
def test_bad_sizes(text: str) -> None:
    with pytest.raises(ValueError, match="is not a size"):
        phrases.parse_size(text)


def test_expiries() -> None:
    assert phrases.parse_expiry("30d") == 30 * 86400
    assert phrases.parse_expiry("2w") == 14 * 86400
    assert phrases.parse_expiry("90m") == 5400
    assert phrases.parse_expiry("none") == phrases.parse_expiry(None) == float("inf")
