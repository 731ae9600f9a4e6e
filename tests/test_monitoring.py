"""The native mode without processes: its command line, the programs it looks for, the files it writes."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from tunnel.errors import ConfigError
from tunnel.monitoring import programs
from tunnel.monitoring.__main__ import main
from tunnel.monitoring.child import Child
from tunnel.monitoring.files import MARK, find_deploy, without, write_alertmanager, write_prometheus
from tunnel.monitoring.up import choose_address

TARGETS = {"core": "127.0.0.1:1", "agents": "127.0.0.1:2", "prometheus": "127.0.0.1:3", "alertmanager": "127.0.0.1:4"}


def check(program: str, *arguments: str) -> str:
    path = shutil.which(program)
    if path is None:
        pytest.fail(f"{program} is missing: install prometheus and prometheus-alertmanager (scripts/packages)")
    done = subprocess.run([path, *arguments], capture_output=True, text=True, timeout=20, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "Usage"),
        (["frob"], "there is only `up`"),
        (["up", "-nonsense"], "-nonsense"),
        (["up", "-prometheus-addr=9093"], "-prometheus-addr: expected an address"),
        (["up", "-scrape-interval=soon"], "-scrape-interval: expected a duration"),
        (["up", "-slack-url-file=/nowhere/slack"], "-slack-url-file: No such file or directory: /nowhere/slack"),
    ],
)
def test_a_wrong_command_line_ends_with_two(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main([*words, f"-data-dir={tmp_path}"] if words[1:] else words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert said in err
    assert err.count("\n") <= 1 or "Usage" in err


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    with pytest.raises(SystemExit):
        main(["up", "--help"])
    assert "  -pagerduty-key-file FILE" in capsys.readouterr().out


def test_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(programs, "PLACES", ())
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["up"]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("tunnel.monitoring up: prometheus and alertmanager not found on this machine: install them")
    assert "apt-get install --no-install-recommends prometheus prometheus-alertmanager" in line
    for name in ("prometheus", "alertmanager"):  # the latter as everybody but Debian calls it
        program = tmp_path / name
        program.touch(0o700)
    assert programs.find_programs() == {name: str(tmp_path / name) for name in ("prometheus", "alertmanager")}
    (tmp_path / "prometheus").unlink()
    with pytest.raises(ConfigError, match=r"^prometheus not found"):
        programs.find_programs()


def test_prometheus_reads_what_is_written(tmp_path: Path) -> None:
    (tmp_path / "rules").mkdir()
    (tmp_path / "rules" / "of-an-older-version.yml").write_text("groups: []\n")
    deploy = find_deploy()
    path = write_prometheus(deploy, tmp_path, TARGETS, "3s")
    check("promtool", "check", "config", str(path))
    written, shipped = yaml.safe_load(path.read_text()), yaml.safe_load((deploy / MARK).read_text())
    assert written.pop("global") == {
        "scrape_interval": "3s", "evaluation_interval": "3s",
        "external_labels": {"cluster": "tunnel-local", "environment": "local"},
    }  # fmt: skip
    del shipped["global"]
    assert written == shipped
    rules = sorted((deploy / "prometheus" / "rules").glob("*.yml"))
    assert {one.name: one.read_text() for one in (tmp_path / "rules").iterdir()} == {
        one.name: one.read_text() for one in rules
    }
    for one in (deploy / "prometheus" / "targets").glob("*.yml"):  # whoever is scraped there is scraped here
        [entry] = yaml.safe_load((tmp_path / "targets" / one.name).read_text())
        assert entry["labels"] == yaml.safe_load(one.read_text())[0]["labels"]
        assert entry["targets"] == [TARGETS[one.stem]]


def test_a_shipped_file_that_was_changed_is_refused(tmp_path: Path) -> None:
    source = tmp_path / MARK
    source.parent.mkdir()
    source.write_text("global:\n  scrape_interval: 15s\n")
    with pytest.raises(ConfigError, match="has not one line `evaluation_interval"):
        write_prometheus(tmp_path, tmp_path / "out", TARGETS, "3s")


@pytest.mark.parametrize("webhook", ["", "http://127.0.0.1:1/hook"])
@pytest.mark.parametrize("pager", ["", "key"])
@pytest.mark.parametrize("slack", ["", "it's a # url"])
def test_alertmanager_has_the_receivers_that_were_asked_for(
    tmp_path: Path, slack: str, pager: str, webhook: str
) -> None:
    secrets = [str(tmp_path / name) if name else "" for name in (slack, pager)]
    deploy = find_deploy()
    path = write_alertmanager(deploy, tmp_path / "alertmanager", *secrets, webhook)
    assert path.stat().st_mode & 0o077 == 0
    check("amtool", "check-config", str(path))
    written = yaml.safe_load(path.read_text())
    shipped = yaml.safe_load((deploy / "alertmanager" / "alertmanager.yml").read_text())
    assert written["global"].get("slack_api_url_file", "") == secrets[0]
    for name in ("route", "inhibit_rules"):
        assert written[name] == shipped[name]
    for now, before in zip(written["receivers"], shipped["receivers"], strict=True):
        assert now["name"] == before["name"]
        assert ("slack_configs" in now) == bool(slack and "slack_configs" in before)
        assert ("pagerduty_configs" in now) == bool(pager and "pagerduty_configs" in before)
        assert [one["url"] for one in now.get("webhook_configs", ())] == ([webhook] if webhook else [])
        for pages in now.get("pagerduty_configs", ()):
            assert pages["routing_key_file"] == secrets[1]


def test_a_key_is_cut_out_with_all_below_it() -> None:
    text = (
        "a:\n  - name: x\n    cut:\n      # why\n      - b: 1\n\n        c: 2\n    kept: 3\n  - cut: 4\ncut: 5\nd: 6\n"
    )
    assert without(text, "cut") == "a:\n  - name: x\n    kept: 3\n  - cut: 4\nd: 6\n"


def test_the_usual_port_or_a_free_one() -> None:
    host, port = choose_address("", 1)  # taken, unless we are root: then it is free
    assert host == "127.0.0.1" and port > 0
    assert choose_address("[::1]:7", 9093) == ("::1", 7)
    host, port = choose_address("127.0.0.1:0", 9093)
    assert host == "127.0.0.1" and port > 1024


@pytest.mark.parametrize(
    ("log", "said"),
    [
        (
            'ts=1 caller=main.go:1 level=info msg=begins\nts=2 caller=main.go:9 level=error err="no disk"\n\n',
            'err="no disk"',
        ),
        ("", "it said nothing"),
        ("panic: x\n", "panic: x"),
    ],
)
def test_its_last_words(tmp_path: Path, log: str, said: str) -> None:
    path = tmp_path / "log"
    path.write_text(log)
    assert Child("prometheus", [], ("127.0.0.1", 1), path).last_words() == said
