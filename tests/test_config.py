"""Configuration: precedence, every kind of value, every way to get it wrong, help and the reference document."""

from __future__ import annotations

import json
import pathlib
import re
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tunnel.config import (
    AgentSettings,
    CoreSettings,
    LocalService,
    data_dir,
    kinds,
    load_agent,
    load_core,
    parse_address,
    parse_duration,
    parse_local,
    parse_ports,
    parse_size,
    reference,
    sections,
    split_command,
)
from tunnel.config.asked import asks_for_json
from tunnel.config.hiding import hide_secrets, secrets_in
from tunnel.config.options import program
from tunnel.config.render import OFTEN, render_help
from tunnel.config.values import show_about, show_size
from tunnel.core.phrases import parse_commands
from tunnel.errors import ConfigError

ROOT = pathlib.Path(__file__).parent.parent


def core(*argv: str, **env: str) -> CoreSettings:
    return load_core(argv, env)


def agent(*argv: str, **env: str) -> AgentSettings:
    return load_agent(argv, env)


def fails(call: Any, *argv: str, **env: str) -> str:
    """The one line of the ConfigError."""
    with pytest.raises(ConfigError) as caught:
        call(*argv, **env)
    line = str(caught.value)
    assert "\n" not in line and line
    return line


def write(path: pathlib.Path, text: str) -> str:
    path.write_text(text, "utf-8")
    return str(path)


# Sources --------------------------------------------------------------------------------------------------------


def test_defaults() -> None:
    settings = core()
    assert settings == CoreSettings()
    assert (settings.agent_addr, settings.agent_tls, settings.heartbeat_timeout) == (":8443", True, 15.0)
    assert settings.layers == ("tracing", "metrics", "logs", "health")
    assert agent() == AgentSettings()
    assert agent().max_retries == -1


def test_flags_before_environment_before_file_before_defaults(tmp_path: pathlib.Path) -> None:
    file = write(
        tmp_path / "t.toml",
        'heartbeat = "1s"\nauth_timeout = 2\nbase_domain = "File.Example."\nlog_json = true\n'
        '[tracing]\nratio = 0.5\nendpoint = "http://file:4318"\n[metrics]\ngo_names = true\n',
    )
    settings = core(
        "-config", file, "-heartbeat=3s",
        TUNNEL_HEARTBEAT="2s", TUNNEL_AUTH_TIMEOUT="7s", TUNNEL_TRACING_RATIO="0.25", TUNNEL_DATABASE_URL="sqlite://",
    )  # fmt: skip
    assert settings.heartbeat == 3.0
    assert settings.auth_timeout == 7.0
    assert settings.base_domain == "file.example"
    assert settings.log_json is True
    assert settings.tracing.ratio == 0.25
    assert settings.tracing.endpoint == "http://file:4318"
    assert settings.metrics.go_names is True
    assert settings.database.url == "sqlite://"
    assert core(TUNNEL_CONFIG=file).heartbeat == 1.0
    assert core("-config=", TUNNEL_CONFIG=file).heartbeat == 5.0


@pytest.mark.parametrize(
    "argv",
    [
        ["-agent-addr", ":1"], ["--agent-addr", ":1"], ["-agent-addr=:1"], ["--agent-addr=:1"],
        ["-agent_addr=:1"], ["--agent_addr", ":1"],
    ],
)  # fmt: skip
def test_one_dash_or_two(argv: list[str]) -> None:
    assert core(*argv).agent_addr == ":1"


def test_booleans() -> None:
    assert core("-agent-tls=false").agent_tls is False
    assert core("-log-json").log_json is True
    assert core("-log-json=TRUE").log_json is True
    assert core("--go-metric-names").metrics.go_names is True
    assert core("-metrics-go-names").metrics.go_names is True
    assert fails(core, "-agent-tls", "false") == "a boolean takes no word after it: write -agent-tls=false"
    assert "expected true or false" in fails(core, "-agent-tls=maybe")


def test_values_may_begin_with_a_dash_unless_they_are_flags() -> None:
    assert agent("-max-retries", "-1").max_retries == -1
    assert fails(agent, "-token", "-agent-id", "x") == "-token: the value is missing; write -token=SECRET"
    assert "the value is missing" in fails(agent, "-server")
    assert agent("-token=-agent-id").token == "-agent-id"


def test_a_list_flag_given_twice_adds_up() -> None:
    assert core("-trusted-proxies=10.1.2.3/8", "-trusted-proxies", "::1").trusted_proxies == ("10.0.0.0/8", "::1/128")
    assert agent("-local=a=3000", "-local=b=3001").local == "a=3000,b=3001"
    assert agent("-agent-id=a", "-agent-id=b").agent_id == "b"
    assert core("-layers=").layers == ()


def test_environment_names() -> None:
    assert agent(AGENT_ID="a").agent_id == "a"
    assert agent(AGENT_AGENT_ID="a").agent_id == "a"
    assert "keep one" in fails(agent, AGENT_ID="a", AGENT_AGENT_ID="b")
    assert agent(AGENT_SERVER="").server == "localhost:8443"  # empty is as good as none
    assert fails(agent, AGENT_HEARTBEAT="x").startswith("AGENT_HEARTBEAT: expected a duration")


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("TUNNEL_LOG_LEVL", "TUNNEL_LOG_LEVEL"),
        ("TUNNEL_LOGLEVEL", "TUNNEL_LOG_LEVEL"),
        ("TUNNEL_DATABASE__URL", "TUNNEL_DATABASE_URL"),
        ("TUNNEL_BASE_DOMIAN", "TUNNEL_BASE_DOMAIN"),
        ("TUNNEL_TCP_PORT", "TUNNEL_TCP_PORTS"),
    ],
)
def test_a_slip_of_the_pen_in_a_variable(name: str, meant: str) -> None:
    assert fails(core, **{name: "5"}) == f"unknown environment variable {name}; did you mean {meant}?"


def test_foreign_variables_are_harmless() -> None:
    env = {
        "TUNNEL_CORE_SERVICE_HOST": "10.0.0.1",
        "TUNNEL_CORE_SERVICE_PORT": "8080",
        "TUNNEL_CORE_SERVICE_PORT_HTTP": "8080",
        "TUNNEL_CORE_PORT": "tcp://10.0.0.1:8080",
        "TUNNEL_CORE_PORT_8080_TCP": "tcp://10.0.0.1:8080",
        "TUNNEL_CORE_PORT_8080_TCP_PROTO": "tcp",
        "TUNNEL_CORE_PORT_8080_TCP_PORT": "8080",
        "TUNNEL_CORE_PORT_8080_TCP_ADDR": "10.0.0.1",
        "TUNNEL_TCP_PORT": "tcp://10.0.0.1:8080",
        "TUNNEL_SOMETHING_ELSE": "1",
        "TUNNELS": "1",
        "PATH": "/bin",
    }
    assert load_core([], env) == CoreSettings()
    kubernetes = {"AGENT_METRICS_PORT": "tcp://10.0.0.2:9091", "AGENT_METRICS_SERVICE_HOST": "10.0.0.2"}
    assert load_agent([], {**kubernetes, "AGENT_NAME": "builder", "AGENT_OS": "Linux"}) == AgentSettings()


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["-agent-adr=:1"], "unknown flag -agent-adr; did you mean -agent-addr?"),
        (["-Agent-Addr=:1"], "unknown flag; did you mean -agent-addr?"),
        (["-zzz"], "unknown flag -zzz; python -m tunnel.core -help lists all"),
        (["-subdomain=x"], "-subdomain is a flag of the agent (python -m tunnel.agent), not of the core"),
        (["serve"], 'unexpected argument "serve"; settings are given as -flag=value'),
        (["-max-connections=many"], "-max-connections: expected a whole number, not 'many'"),
        (["-max-connections=0"], "-max-connections: expected a whole number of at least 1, not '0'"),
        (["-log-level=loud"], "-log-level: expected one of debug, info, warning, error, not 'loud'"),
        (["-tracing-ratio=2"], "-tracing-ratio: expected a number from 0 to 1, not '2'"),
        (["-base-domain=a_b"], "-base-domain: expected a host name such as tunnel.example.com"),
        (["-trusted-proxies=home"], "-trusted-proxies: expected IP addresses or networks"),
        (["-agent-addr=8443"], "-agent-addr: expected an address such as 127.0.0.1:8080, :8080 or [::1]:8080"),
        (["-agent-cert=/nowhere.pem"], "-agent-cert: expected a file that can be read (No such file or directory)"),
        (["-heartbeat=20s"], "-heartbeat (20s) must be shorter than -heartbeat-timeout (15s)"),
        (["-public-tls"], "-public-tls needs -public-cert and -public-key, or -public-cert-dir"),
        (["-max-target=1MiB"], "-max-target must not be larger than -max-head"),
        (["-tcp-ports=9-5"], "-tcp-ports: expected a range of ports from 1 to 65535, the lower first"),
        (["-config=/nowhere.toml"], "/nowhere.toml: the settings file cannot be read (No such file or directory)"),
        (["-database-url=mysql://root:pw@h/x"], "-database-url: expected a database URL"),
    ],
)
def test_wrong_command_lines(argv: list[str], line: str) -> None:
    said = fails(core, *argv)
    assert said.startswith(line)
    assert "pw@" not in said


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("agent-addr = ':1'", "unknown key agent-addr in {}; did you mean agent_addr?"),
        ("database_url = 'x'", "unknown key database_url in {}; did you mean database.url?"),
        ("[log]\nlevel = 'info'", "unknown key log.level in {}; did you mean log_level?"),
        ("[tracing]\nration = 1", "unknown key tracing.ration in {}; did you mean tracing.ratio?"),
        ("xyzzy = 1", "unknown key xyzzy in {}; remove it; docs/CONFIGURATION.md lists all keys"),
        ("[xyzzy]", "unknown key xyzzy in {}; remove it; docs/CONFIGURATION.md lists all keys"),
        ("subdomain = 'x'", "unknown key subdomain in {}; it is a setting of the agent, not of the core"),
        ("config = 'x'", "config in {}: a settings file cannot name another one; remove the key"),
        ("tracing = 1", "tracing in {}: expected a table, [tracing]"),
        ("log_json = 'true'", "log_json in {}: expected true or false, not 'true'"),
        ("max_connections = '5'", "max_connections in {}: expected a whole number of at least 1, not '5'"),
        ("max_connections = true", "max_connections in {}: expected a whole number of at least 1, not true"),
        ("agent_addr = 8443", "agent_addr in {}: expected a text, not 8443"),
        ("layers = [1]", "layers in {}: expected a list of words"),
        ("heartbeat = []", "heartbeat in {}: expected a duration such as"),
        ("heartbeat = nan", "heartbeat in {}: expected a duration such as"),
        ("jwt_secret = 5", "jwt_secret in {}: expected a text"),
        ("a = ", "{}: the settings file is not valid TOML (Invalid value"),
    ],
)
def test_wrong_files(tmp_path: pathlib.Path, text: str, line: str) -> None:
    file = write(tmp_path / "t.toml", text)
    assert fails(core, "-config", file).startswith(line.format(file))


def test_files_that_are_no_text(tmp_path: pathlib.Path) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    assert "is not UTF-8" in fails(core, "-config", str(tmp_path / "binary"))
    assert "cannot be read (Is a directory)" in fails(core, "-config", str(tmp_path))


@pytest.mark.parametrize(
    "given", ["", "local", "app.test", "app.test:3000", "my_app", "127.0.0.1:80", "[::1]:3000", "[::1]"]
)
def test_what_services_may_get_as_host(given: str) -> None:
    assert agent(f"-host-header={given.upper()}", AGENT_HOST_HEADER="other").host_header == given
    assert agent(AGENT_HOST_HEADER=given).host_header == given


@pytest.mark.parametrize(
    "bad", ["http://app.test", "a b", "a/b", "a,b", "a:b", "::1", ":80", "app.test:99999", "é", "-a"]
)
def test_what_is_no_host(bad: str) -> None:
    said = fails(agent, f"-host-header={bad}")
    assert said == f"-host-header: expected local, or a host name such as app.test or app.test:3000, not {bad!a}"


@pytest.mark.parametrize(
    ("flag", "bad", "example"),
    [
        ("-tracing-endpoint", "foo", "http://localhost:4318"),
        ("-tracing-endpoint", "collector:4318", "http://localhost:4318"),
        ("-public-url", "tunnel.example.com", "https://tunnel.example.com"),
        ("-acme-directory", "http://acme.example.com/directory", "https://acme.example.com/directory"),
        ("-acme-directory", "", "https://acme.example.com/directory"),
    ],
)
def test_a_wrong_url_is_told_an_example_of_its_kind(flag: str, bad: str, example: str) -> None:
    said = fails(core, f"{flag}={bad}")
    assert said == f"{flag}: expected a URL such as {example}, not {bad!r}"


@pytest.mark.parametrize(
    "place", ["x.example:99999", "x.example:0", "x.example:port", "x.example:", "[::1", "a:1:2", ":1"]
)
def test_a_url_that_nobody_could_ask(place: str) -> None:
    said = fails(core, f"-public-url=https://{place}/")
    assert said.startswith("-public-url: expected a URL such as https://tunnel.example.com")


@pytest.mark.parametrize("place", ["x.example:65535", "x.example:8443/path", "[::1]:80", "127.0.0.1"])
def test_urls(place: str) -> None:
    assert core(f"-public-url=https://{place}").public_url == f"https://{place}"


@pytest.mark.parametrize("kind", [kinds.PUBLIC_URL, kinds.ENDPOINT, kinds.AUTHORITY])
def test_such_an_example_would_be_taken(kind: kinds.Kind) -> None:
    with pytest.raises(ValueError, match="such as") as caught:
        kind.check("foo")
    example = str(caught.value).rpartition(" ")[2]
    assert kind.check(example) == kind.check(example + "/") == example


def test_certificates_come_in_pairs(tmp_path: pathlib.Path) -> None:
    pem = write(tmp_path / "a.pem", "x")
    assert fails(core, "-agent-cert", pem) == "-agent-cert needs -agent-key too"
    assert fails(core, TUNNEL_PUBLIC_KEY=pem) == "TUNNEL_PUBLIC_KEY needs -public-cert too"
    assert core("-public-tls", "-public-cert", pem, "-public-key", pem).public_key == pem


def test_a_certificate_that_is_given_is_used(tmp_path: pathlib.Path) -> None:
    """From wherever it comes, and never for plain HTTP; only a plain word leaves it unused."""
    pem = write(tmp_path / "a.pem", "x")
    given = ("-public-cert", pem, "-public-key", pem)
    assert core(*given).public_tls
    assert core(TUNNEL_PUBLIC_CERT=pem, TUNNEL_PUBLIC_KEY=pem).public_tls
    pair = f"public_cert = {pem!r}\npublic_key = {pem!r}\n"
    assert core("-config", write(tmp_path / "pair.toml", pair)).public_tls
    assert core("-public-cert-dir", str(tmp_path)).public_tls
    assert core(*given, "-http-addr=:80").http_addr == ":80"
    assert not core(TUNNEL_PUBLIC_CERT="", TUNNEL_PUBLIC_KEY="").public_tls
    assert not core("-agent-cert", pem, "-agent-key", pem).public_tls
    off = write(tmp_path / "off.toml", "public_tls = false\n" + pair)
    assert not core("-config", off).public_tls and not core(*given, "-public-tls=false").public_tls
    assert "TLS for visitors" in fails(core, *given, "-public-tls=false", "-http-addr=:80")


def test_certificates_from_an_authority() -> None:
    given = ("-public-tls", "-http-addr=:80", "-acme-agree")
    acme = core(*given, "-acme-names=WWW.Example.com.,b.example.com", "-acme-email=a@b.example").acme
    assert acme.agree and acme.names == ("www.example.com", "b.example.com") and acme.email == "a@b.example"
    assert acme.directory == "https://acme-v02.api.letsencrypt.org/directory" and acme.on_demand == "served"
    assert "-http-addr" in fails(core, "-public-tls", "-acme-agree")
    assert "-public-tls" in fails(core, "-http-addr=:80", "-acme-agree")
    assert "-acme-agree" in fails(core, "-public-tls")
    assert "accept" in fails(core, "-public-tls", "-http-addr=:80", TUNNEL_ACME_EMAIL="a@b.example")
    assert fails(core, "-http-addr=:80") == (
        "-http-addr needs TLS for visitors, -public-cert or -public-tls: it sends them there"
    )
    assert "DNS challenge" in fails(core, *given, "-acme-names=*.example.com")
    assert "full host names" in fails(core, *given, "-acme-names=localhost")
    assert "https://" in fails(core, *given, "-acme-directory=http://ca.example.com/directory")
    assert "e-mail" in fails(core, *given, "-acme-email=nobody")
    assert "served, reserved, off" in fails(core, *given, "-acme-on-demand=all")


def test_contradictions_about_the_cores_certificate() -> None:
    pin = "AB:" * 31 + "AB"
    assert agent(f"-server-fingerprint=sha256:{pin}").server_fingerprint == "ab" * 32
    assert "keep one" in fails(agent, f"-server-fingerprint={pin}", "-tls=false")
    assert "keep one" in fails(agent, f"-server-fingerprint={pin}", "-tls-skip-verify")
    assert "fingerprint" in fails(agent, "-server-fingerprint=abc")
    assert "without a scheme" in fails(agent, "-server=wss://x:1")
    assert "host:port" in fails(agent, "-server=:8443")


# Secrets --------------------------------------------------------------------------------------------------------


def test_secrets_from_files(tmp_path: pathlib.Path) -> None:
    file = write(tmp_path / "token", "tt_abc\r\n")
    assert agent("-token-file", file).token == "tt_abc"
    assert core(TUNNEL_JWT_SECRET_FILE=file).jwt_secret == "tt_abc"
    assert agent("-token-file", file, AGENT_TOKEN="tt_other").token == "tt_abc"  # the flag comes first
    assert agent("-token", "tt_x", AGENT_TOKEN_FILE=file).token == "tt_x"
    assert fails(agent, "-token-file", file, "-token=tt_x") == "-token and -token-file exclude each other: keep one"
    assert "cannot be read" in fails(agent, "-token-file", str(tmp_path / "none"))
    assert "on one line" in fails(agent, "-token-file", write(tmp_path / "empty", "\n"))
    assert "on one line" in fails(agent, "-token-file", write(tmp_path / "two", "tt_secret\ntt_second\n"))
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    assert "does not hold text" in fails(agent, "-token-file", str(tmp_path / "binary"))


@pytest.mark.parametrize(
    "secret",
    [
        "tt_S3cr3tS3cr3tS3cr3t", "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiJhIn0.S3cr3t/x", "S3cr3t", "S3cr3t" * 100,
        "aB3/S3cr3t+S3cr3tS3cr3tS3cr3tS3cr3t/x==", "/run/tt_S3cr3t", "S3cr3t\x01", "S3cr3t with spaces",
    ],
)  # fmt: skip
def test_a_secret_in_the_place_of_its_file_is_not_shown(secret: str) -> None:
    for call, name, prefix in (
        (agent, "token", "AGENT_"),
        (core, "jwt_secret", "TUNNEL_"),
        (core, "dashboard_token", "TUNNEL_"),
    ):
        flag = f"-{name.replace('_', '-')}"
        for said in (fails(call, f"{flag}-file", secret), fails(call, **{f"{prefix}{name.upper()}_FILE": secret})):
            assert "S3cr3t" not in said
            assert said.startswith((f"{flag}-file: ", f"{prefix}{name.upper()}_FILE: "))
            if "\x01" not in secret:
                assert "cannot be read (" in said
                assert said.endswith(f"the value itself goes into {flag} or {prefix}{name.upper()}")


def test_a_secrets_file_that_is_away_is_named(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in ("/run/secrets/token", "./token", f"{tmp_path}/token"):
        assert fails(agent, "-token-file", path) == f"-token-file: {path} cannot be read (No such file or directory)"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    assert fails(agent, "-token-file", "here") == "-token-file: here cannot be read (Is a directory)"


def test_the_fingerprint_from_a_file(tmp_path: pathlib.Path) -> None:
    file = tmp_path / "fingerprint"
    file.write_text("sha256:" + "AB" * 32 + "\n")
    assert agent(f"-server-fingerprint-file={file}").server_fingerprint == "ab" * 32
    assert agent(f"-server-fingerprint-file={file}", AGENT_SERVER_FINGERPRINT="cd" * 32).server_fingerprint == "ab" * 32
    file.write_text("no fingerprint\n")
    with pytest.raises(ConfigError, match=rf"^-server-fingerprint-file: {file}: expected the SHA-256 fingerprint"):
        agent(f"-server-fingerprint-file={file}")


def test_secrets_never_show(tmp_path: pathlib.Path) -> None:
    secret = "tt_S3cr3t-S3cr3t"
    for settings in (agent("-token", secret), core("-jwt-secret", secret, TUNNEL_DATABASE_URL=f"sqlite://{secret}")):
        assert secret not in repr(settings) and secret not in str(settings) and "***" in repr(settings)
        assert secret not in repr(settings.__rich_repr__()) and secret not in str(sections(settings))
    for argv in (
        [secret], ["-token", secret, secret], [f"-tokn={secret}"], ["-log-json", secret], [f"-{secret}"],
        [f"-heartbeat={secret}"], ["-token", secret, "-heartbeat=x"], [f"-token={secret}\n"],
        [f"-agent-id={secret}\x00"], [f"-server={secret}"], [f"-log-level={secret}"],
        [f"-config={tmp_path}", "-token", secret],
    ):  # fmt: skip
        said = fails(agent, *argv)
        assert "S3cr3t" not in said, said
    file = write(tmp_path / "t.toml", f"token = '{secret}\n")
    assert secret not in fails(agent, "-config", file)


def test_which_flags_are_hidden_from_others() -> None:
    secret = "tt_S3cr3t"
    assert secrets_in(["-log-json", "-token", secret, "-server=x:1"], "agent") == [("-token", secret)]
    assert secrets_in(["--token=" + secret, "stray", "-token=x"], "agent") == [("-token", secret)]
    assert secrets_in(["-token=" + secret, "-nosuch=1"], "agent") == [("-token", secret)]
    assert secrets_in(["-token-file", "/x", "-token="], "agent") == []
    both = ["-jwt-secret=" + secret, "-dashboard-token", secret, "account", "list"]
    assert secrets_in(both, "core") == [("-jwt-secret", secret), ("-dashboard-token", secret)]
    for url, is_secret in (
        ("postgresql://u:p@h/x", True), ("postgresql://h/x?user=u&password=p", True), ("postgresql://u@h/x", False),
        ("sqlite:////x.db", False),
    ):  # fmt: skip
        assert bool(secrets_in(["-database-url=" + url], "core")) is is_secret, url
    assert hide_secrets(["-token", secret], "agent") == ["-token"], "not in this process's title: nothing happens"


# Values ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("30s", 30), ("200ms", 0.2), ("5m", 300), ("1.5h", 5400), ("1m30s", 90), ("7", 7), ("0.5", 0.5), (3, 3), ("0", 0)],
)
def test_durations(text: object, seconds: float) -> None:
    assert parse_duration(text) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", "s", "-1s", "1 s", "1d", "inf", "nan", "1e3", "5s5", True, None, -1, 1e400, "٣s"])
def test_no_durations(text: object) -> None:
    with pytest.raises(ValueError, match="expected a duration"):
        parse_duration(text)


@pytest.mark.parametrize("flag", ["-heartbeat-timeout", "-request-timeout", "-drain-timeout"])
def test_durations_longer_than_the_link_can_say(flag: str) -> None:
    for read in (core, agent):
        read(f"{flag}=1000h")
        assert fails(read, f"{flag}=1200h") == f"{flag}: expected a duration of at most 1000h, not '1200h'"
    assert 1000 * 3600 * 1000 < 1 << 32
    assert core("-name-hold=8760h").name_hold == 365 * 24 * 3600


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        (5, 5),
        ("64KiB", 65536),
        ("10MiB", 10 << 20),
        ("1.5 kib", 1536),
        ("5MB", 5_000_000),
        ("2gib", 2 << 30),
        ("500GB", 500 * 10**9),
        ("1.235kB", 1235),
        ("2TiB", 2 << 40),
    ],
)
def test_sizes(text: object, size: int) -> None:
    assert parse_size(text) == size
    assert core(f"-max-body={text}").max_body == size


@pytest.mark.parametrize(
    ("size", "shown"),
    [
        (0, "0"), (7, "7B"), (1000, "1kB"), (65536, "64KiB"), (3 << 29, "1.5GiB"), (500 * 10**9, "500GB"),
        (5_000_000, "5MB"), (1 << 40, "1TiB"), (123_456_789, "123456789B"), ((1 << 63) - 1, f"{(1 << 63) - 1}B"),
    ],
)  # fmt: skip
def test_sizes_are_shown_as_people_say_them(size: int, shown: str) -> None:
    assert show_size(size) == shown


@given(
    st.integers(0, (1 << 63) - 1)
    | st.builds(
        lambda n, base, power: n * base**power % (1 << 63),
        st.integers(0, 9999),
        st.sampled_from([1000, 1024]),
        st.integers(0, 5),
    )
)
def test_a_shown_size_is_all_of_it(size: int) -> None:
    assert parse_size(show_size(size)) == size


@pytest.mark.parametrize(
    ("size", "decimal", "binary"),
    [
        (0, "0B", "0B"), (999, "999B", "999B"), (1536, "1.536kB", "1.5KiB"), (5 << 20, "5.243MB", "5MiB"),
        (460_212_345_678, "460.2GB", "428.6GiB"), ((1 << 63) - 1, "9223PB", "8192PiB"),
    ],
)  # fmt: skip
def test_measured_sizes(size: int, decimal: str, binary: str) -> None:
    assert (show_about(size), show_about(size, is_binary=True)) == (decimal, binary)


@pytest.mark.parametrize(
    "text", ["", "-1", "10M", "MiB", "0.3KB5", "1.0001b", "9999PiB", -5, True, 1.5, "9" * 400, 10**40]
)
def test_no_sizes(text: object) -> None:
    with pytest.raises(ValueError, match="expected a"):
        parse_size(text)


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("localhost:80", ("localhost", 80)), (":8443", ("", 8443)), ("[::1]:0", ("::1", 0)),
        ("0.0.0.0:1", ("0.0.0.0", 1)), ("a-b.example:65535", ("a-b.example", 65535)),
        ("my_host.:1", ("my_host.", 1)), (f"{'a' * 63}:1", ("a" * 63, 1)),
    ],
)  # fmt: skip
def test_addresses(text: str, address: tuple[str, int]) -> None:
    assert parse_address(text) == address


@pytest.mark.parametrize(
    "text",
    [
        "", "80", "a:", "a:b", "a:65536", "::1:80", "[::1]", "[x]:1", "a b:1", "a:-1", "a:٣",
        "a..b:1", ".a:1", "a..:1", f"{'a' * 64}:1", f"{'a.' * 127}aa:1",
    ],
)  # fmt: skip
def test_no_addresses(text: str) -> None:
    with pytest.raises(ValueError, match="expected"):
        parse_address(text)


def test_ports() -> None:
    assert list(parse_ports("")) == []
    assert list(parse_ports("0")) == [0]
    assert parse_ports("20000-20100") == range(20000, 20101)
    assert list(parse_ports("7")) == [7]
    for text in ("0-5", "5-1", "x", "1-70000", "1-2-3"):
        with pytest.raises(ValueError, match="expected"):
            parse_ports(text)


@pytest.mark.parametrize("given", ["-metrics-port=9091", "-metrics-addr=127.0.0.1:9091", "-metrics-addr="])
def test_a_metrics_address_that_was_given_is_known_to_be(given: str, tmp_path: pathlib.Path) -> None:
    assert agent(given).is_metrics_addr_given
    assert agent(AGENT_METRICS_ADDR="127.0.0.1:9091").is_metrics_addr_given
    assert agent("-config", write(tmp_path / "a.toml", "metrics_port = 9091")).is_metrics_addr_given
    assert not agent("-log-json").is_metrics_addr_given
    assert "unknown" in fails(agent, "-is-metrics-addr-given")


def test_metrics_port_and_address_agree() -> None:
    assert agent("-metrics-port=0").metrics_addr == "127.0.0.1:0"
    settings = agent("-metrics-addr=:7000", AGENT_METRICS_PORT="9")
    assert (settings.metrics_addr, settings.metrics_port) == (":7000", 7000)
    assert agent("-metrics-port=9", AGENT_METRICS_ADDR=":7000").metrics_addr == "127.0.0.1:9"
    assert "different ports" in fails(agent, "-metrics-addr=:7000", "-metrics-port=9")
    assert agent("-metrics-addr=").metrics_addr == ""


def test_local_services() -> None:
    one = LocalService("", "http", "localhost", 3000)
    for text in ("http://localhost:3000", "http://localhost:3000/", "localhost:3000", "3000", ":3000", "HTTP://3000"):
        assert parse_local(text) == (one,), text
    assert parse_local("https://a.example") == (LocalService("", "https", "a.example", 443),)
    assert parse_local("http://[::1]") == (LocalService("", "http", "::1", 80),)
    assert parse_local("http://[::1]:5")[0].address == "[::1]:5"
    assert parse_local("3000", "App") == (LocalService("app", "http", "localhost", 3000),)
    assert parse_local("api=http://localhost:8000, Web=9,db=tcp://db.lan:5432") == (
        LocalService("api", "http", "localhost", 8000),
        LocalService("web", "http", "localhost", 9),
        LocalService("db", "tcp", "db.lan", 5432),
    )
    assert parse_local("app.example.com=1")[0].name == "app.example.com"


@pytest.mark.parametrize(
    ("text", "subdomain", "says"),
    [
        ("", "", "no service"), ("ftp://x:1", "", "http://, https:// or tcp://"), ("http://x:1/path", "", "path"),
        ("http://u:pw@x:1", "", "user or password"), ("a=1,a=2", "", "twice"), ("a=1,2", "", "needs a name"),
        ("a=1,b=2", "c", "-subdomain names one service"), ("a=1", "b", "differently"), ("-x=1", "", "name"),
        ("=1", "", "name"), ("tcp://x", "", "port"), ("http://x:0", "", "port"), ("http://x:99999", "", "port"),
        ("1", "a b", "-subdomain: expected a name such as app"), ("x y", "", "-local"),
        ("http://", "", '"http://" has no address'), ("a=https:///", "", '"a" has no address'),
        ("http://a..b:1", "", "host name"), (f"tcp://{'a' * 64}:1", "", "host name"),
    ],
)  # fmt: skip
def test_wrong_local_services(text: str, subdomain: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_local(text, subdomain)
    assert says in str(caught.value) and "\n" not in str(caught.value)
    assert "pw" not in str(caught.value).replace("password", "")


@given(st.text(max_size=40), st.sampled_from(program("core").entries))
@example("\x00\n", program("core").entries[0])
def test_any_value_is_taken_or_refused_in_one_line(text: str, entry: Any) -> None:
    try:
        core(f"-{entry.flags[0]}={text}")
    except ConfigError as exc:
        assert "\n" not in str(exc) and str(exc)


@given(st.lists(st.text(max_size=20), max_size=4))
def test_any_command_line_is_taken_or_refused(argv: list[str]) -> None:
    for call in (agent, core):
        try:
            call(*argv)
        except ConfigError as exc:
            assert str(exc).isprintable()
        except SystemExit as exc:
            assert exc.code == 0


# Commands, help, documents --------------------------------------------------------------------------------------


def test_split_command() -> None:
    assert split_command(["-data-dir", "D", "account", "create", "acme", "-json"]) == (
        ["-data-dir", "D"], ["account", "create", "acme", "-json"],
    )  # fmt: skip
    assert split_command(["-log-json", "token", "create"]) == (["-log-json"], ["token", "create"])
    assert split_command(["-log-json=false"]) == (["-log-json=false"], [])
    assert split_command(["--", "usage"]) == ([], ["usage"])
    assert split_command(["account", "-h"]) == ([], ["account", "-h"])
    assert split_command(["-h", "account"]) == (["-h", "account"], [])
    assert split_command([]) == ([], [])
    for argv, says in (
        (["acount"], 'unknown command "acount"; did you mean account?'),
        (["tt_secret"], "unknown command; there are account, token, tunnel, usage, migrate"),
        (["-log-json", "false"], "a boolean takes no word after it: write -log-json=false"),
        (["-agent-tls", "no"], "a boolean takes no word after it: write -agent-tls=no"),
        (["-heartbeat", "5s", "no"], 'unknown command "no"; there are account'),
        (["-bogus", "account"], "unknown flag -bogus"),
    ):
        with pytest.raises(ConfigError) as caught:
            split_command(argv)
        assert str(caught.value).startswith(says)


@pytest.mark.parametrize("flag", ["-h", "--help", "-help"])
@pytest.mark.parametrize("role", ["core", "agent"])
def test_help_names_every_flag(flag: str, role: str, capsys: pytest.CaptureFixture[str]) -> None:
    load = load_core if role == "core" else load_agent
    with pytest.raises(SystemExit) as caught:
        load(["-log-level=nonsense", flag], {})
    assert caught.value.code == 0
    out = capsys.readouterr().out
    for entry in program(role).entries:
        assert f"  -{entry.flags[0]}" in out
        assert entry.option.kind.show(entry.default) in out.replace("\n" + " " * 34, " ")
    assert out.isascii() and max(map(len, out.splitlines())) <= 100
    often = out[out.index("Most used:") : out.index("\n\n", out.index("Most used:"))]
    assert len(re.findall(r"(?m)^  -", often)) == len(OFTEN[role]) <= 12
    assert "Examples:\n  python -m tunnel." in out[: out.index("Most used:")]
    assert all(len(re.findall(rf"(?m)^  -{entry.flags[0]}\b(?!-)", out)) == 1 for entry in program(role).entries)


@pytest.mark.parametrize("role", ["core", "agent"])
def test_the_examples_in_help_are_right(role: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("full.pem", "key.pem", "token"):
        (tmp_path / name).write_text("x")
    lines = [line for line in render_help(program(role)).splitlines() if line.startswith(f"  python -m tunnel.{role}")]
    assert len(lines) >= 2
    for line in lines:
        words = line.partition("    ")[0].replace("...", "ab" * 32).split()[3:]
        if role == "agent":
            load_agent(words, {})
        else:
            flags, command = split_command([word for word in words if not word.startswith(">")])
            load_core(flags, {})
            assert not isinstance(parse_commands(command), int) if command else True


def test_help_on_a_narrow_terminal() -> None:
    text = render_help(program("core"), 80)
    assert max(map(len, text[text.index("Most used:") :].splitlines())) <= 80


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        load_agent(["--version"], {})
    assert caught.value.code == 0
    assert capsys.readouterr().out.startswith("tunnel-agent ")


def test_the_reference_document_is_current() -> None:
    """When this fails: python -c "import tunnel.config as c; print(c.reference(), end='')" > docs/CONFIGURATION.md"""
    assert (ROOT / "docs" / "CONFIGURATION.md").read_text("utf-8") == reference()


def test_every_default_is_a_valid_value() -> None:
    for role in ("core", "agent"):
        for entry in program(role).entries:
            assert entry.option.kind.check(entry.default) == entry.default, entry.name


def test_help_needs_neither_trio_nor_argparse() -> None:
    code = (
        "import sys, tunnel.config as c\n"
        "try: c.load_agent(['--help'], {})\n"
        "except SystemExit: print([m for m in ('trio','argparse','tomllib','difflib') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True, timeout=30
    )
    assert done.stdout.endswith("[]\n")


def test_data_dir(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    assert data_dir(core("-data-dir", str(tmp_path))) == tmp_path
    monkeypatch.setattr("os.geteuid", lambda: 0)
    monkeypatch.setattr("sys.platform", "linux")
    assert data_dir(core()) == pathlib.Path("/var/lib/tunnel")
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert data_dir(core()) == tmp_path / "tunnel"


def test_sections_are_plain_values() -> None:
    assert sections(core("-log-json", "-tracing-ratio=0.1")) == {
        "log": {"level": "info", "json": True},
        "metrics": {"go_names": False, "report_interval": 15.0},
        "tracing": {
            "endpoint": "", "protocol": "http/protobuf", "ratio": 0.1, "visitor_context": "join",
            "server_timing": False, "propagators": ("tracecontext", "baggage"),
        },
    }  # fmt: skip


@pytest.mark.parametrize(
    ("argv", "env", "expected"),
    [
        ([], {}, False),
        (["-log-json"], {}, True),
        (["-no-such-flag", "--log_json", "-public-cert"], {}, True),
        (["-log-json=no"], {"TUNNEL_LOG_JSON": "true"}, False),
        (["-log-json=perhaps"], {}, False),
        ([], {"TUNNEL_LOG_JSON": "1"}, True),
        (["-config=FILE"], {}, True),
        (["-config", "FILE"], {}, True),
        ([], {"TUNNEL_CONFIG": "FILE"}, True),
        (["-config=FILE", "-log-json=false"], {}, False),
        (["-config=/no/such/file"], {}, False),
        (["-config"], {}, False),
        (["-log-json", "token", "create", "acme"], {}, False),
    ],
)
def test_json_is_asked_for_as_far_as_it_can_be_read(
    argv: list[str], env: dict[str, str], expected: bool, tmp_path: pathlib.Path
) -> None:
    file = tmp_path / "core.toml"
    file.write_text('log_json = true\nno_such_key = "x"\n')
    here = [word.replace("FILE", str(file)) for word in argv]
    there = {name: value.replace("FILE", str(file)) for name, value in env.items()}
    assert asks_for_json(here, there, "core") is expected
    file.write_text("log_json = true\nthis is no TOML")
    assert asks_for_json([f"-config={file}"], {}, "core") is False


@pytest.mark.parametrize("role", ["core", "agent"])
def test_a_wrong_setting_is_a_record_where_records_are_asked_for(role: str) -> None:
    command = [sys.executable, "-m", f"tunnel.{role}", "-log-json", "-heartbeat=often"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (2, "")
    record = json.loads(done.stdout)
    assert (record["level"], record["msg"]) == ("ERROR", "can't start") and "-heartbeat" in record["error"]
    done = subprocess.run([*command[:3], command[4]], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "") and done.stderr.startswith(f"tunnel {role}: -heartbeat: ")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "unix:///run/app.sock",
            '"unix:///run/app.sock" is a Unix socket, which is not served; let it listen on a port',
        ),
        ("app=/run/app.sock", '"app" is a Unix socket, which is not served; let it listen on a port, or try socat'),
        ("./app.sock", '"./app.sock" is a Unix socket'),
        ("ws://localhost:3000", '"ws://localhost:3000" is given as http://: WebSockets pass through that'),
        ("wss://localhost:3000", "is given as https://: WebSockets pass through that"),
        ("api=3000,web", '"web": the port is missing'),
        ("http://user:secret@localhost:3000", "the service must not have a user or password"),
        ("tt_0123456789", "the service: the port is missing"),
        ("x" * 40, "the service: the port is missing"),
    ],
)
def test_a_service_that_can_not_be_served_says_which_and_why(text: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_local(text)
    assert str(caught.value).startswith("-local: the service") and said in str(caught.value)
    assert "secret" not in str(caught.value)


def test_a_cores_address_without_its_port() -> None:
    said = fails(agent, "-server=tunnel.example.com")
    expected = "expected the core's agent address as host:port, such as tunnel.example.com:8443"
    assert said == f"-server: {expected} (the port is missing), not 'tunnel.example.com'"
