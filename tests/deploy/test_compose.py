"""The stack of deploy/compose.yaml, without Docker: valid, closed, pinned, bounded, of files and names that exist."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from stackfile import DEPLOY, FILE, OURS, ROOT, SERVICES, VARIABLE, health_command, load, volumes

from tunnel.config import load_agent, load_core

#: no health check, and why (in the file too)
UNCHECKED = {"setup": "ends", "otel-collector": "one program in the image", "tempo": "one program in the image"}
PROJECT = load()


def check_schema(path: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", str(path)],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


def test_it_follows_the_compose_specification(tmp_path: Path) -> None:
    done = check_schema(FILE)
    assert done.returncode == 0, done.stdout + done.stderr
    wrong = tmp_path / "compose.yaml"
    wrong.write_text(FILE.read_text().replace("    command:", "    comand:", 1))
    assert "comand" in check_schema(wrong).stdout


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_is_pinned_bounded_and_without_rights(name: str) -> None:
    service = SERVICES[name]
    assert re.fullmatch(r"[a-z/-]+:v?\d+\.\d+\.\d+", service["image"]), service["image"]
    limits = service["deploy"]["resources"]["limits"]
    assert limits.keys() == {"cpus", "memory", "pids"}
    assert float(limits["cpus"]) <= 1, "a machine with one CPU would refuse it"
    assert service["read_only"] is True and service["tmpfs"] == ["/tmp"]
    assert service["cap_drop"] == ["ALL"] and service["security_opt"] == ["no-new-privileges:true"]
    assert "privileged" not in service
    assert (service.get("cap_add") is not None) == (name == "setup")
    logging = service["logging"]
    assert logging["driver"] == "json-file" and {"max-size", "max-file"} <= logging["options"].keys()
    assert service["restart"] == ("no" if name == "setup" else "unless-stopped")


@pytest.mark.parametrize("name", SERVICES)
def test_root_is_only_who_must_be(name: str) -> None:
    user = SERVICES[name].get("user", "10001:10001" if name in OURS else "")
    assert re.fullmatch(r"\d+:\d+", user), "an image's own choice of user is not to be relied on"
    assert user.startswith("0:") == (name in {"setup", "promtail", "alloy"})


def test_setup_has_no_network() -> None:
    assert SERVICES["setup"]["network_mode"] == "none" and "networks" not in SERVICES["setup"]


@pytest.mark.parametrize("name", SERVICES)
def test_ports_are_on_loopback_unless_asked(name: str) -> None:
    raw = yaml.safe_load(FILE.read_text())["services"][name]
    for port in raw.get("ports", []):
        public = port.rpartition(":")[2] in {"8080", "8443"}
        assert port.startswith("${BIND_PUBLIC:-127.0.0.1}:" if public else "${BIND:-127.0.0.1}:"), port


def test_ports_are_those_of_the_documents() -> None:
    published: dict[str, str] = {}
    for name, service in SERVICES.items():
        for port in service.get("ports", []):
            _, host, _ = port.split(":")
            assert host not in published, f"{name} and {published[host]} both want {host}"
            published[host] = name
    assert published == {
        "8080": "core", "8443": "core", "9090": "core", "9000": "core", "9091": "agent", "9093": "prometheus",
        "9094": "alertmanager", "3000": "grafana", "4317": "otel-collector", "4318": "otel-collector",
        "16686": "jaeger",
    }  # fmt: skip


def test_opening_visitors_ports_opens_no_other() -> None:
    opened = load({"BIND_PUBLIC": "0.0.0.0"})["services"]
    ports = {port for service in opened.values() for port in service.get("ports", []) if port.startswith("0.0.0.0")}
    assert ports == {"0.0.0.0:8080:8080", "0.0.0.0:8443:8443"}


@pytest.mark.parametrize("name", SERVICES)
def test_health_is_checked_or_there_is_a_reason(name: str) -> None:
    check = SERVICES[name]["healthcheck"]
    if name in UNCHECKED:
        assert check == {"disable": True}
    else:
        assert check["test"][0] == "CMD"
        assert check.keys() == {"test", "interval", "timeout", "retries", "start_period"}


@pytest.mark.parametrize("name", SERVICES)
def test_mounts_exist(name: str) -> None:
    for source, target, options in volumes(name):
        assert target.startswith("/")
        if source.startswith("./"):
            assert (DEPLOY / source).exists(), source
            assert "ro" in options, f"{source} is the repository's"
        elif source.startswith("/"):
            assert source == "/var/lib/docker/containers" and "ro" in options
        else:
            assert source in PROJECT["volumes"] and "nocopy" in options


def test_every_volume_has_an_owner_and_every_network_a_user() -> None:
    used = {source for name in SERVICES if name != "setup" for source, _, _ in volumes(name) if source[0] not in "./"}
    assert used == set(PROJECT["volumes"])
    prepared = {target.removeprefix("/volumes/"): source for source, target, _ in volumes("setup") if source in used}
    assert prepared == {name: name for name in used}
    owners = dict(word.split("=") for word in SERVICES["setup"]["command"][2:])
    for name, service in SERVICES.items():
        for source, _, options in volumes(name):
            if source in used and name != "setup":
                assert owners[source] == service.get("user", "10001:10001").partition(":")[0], (name, source, options)
    assert {one for service in SERVICES.values() for one in service.get("networks", [])} == set(PROJECT["networks"])


def test_nobody_starts_before_its_volumes_are_ready() -> None:
    for name, service in SERVICES.items():
        mounted = [source for source, _, _ in volumes(name) if source in PROJECT["volumes"]]
        waits = service.get("depends_on", {})
        if mounted and name not in {"setup", "agent"}:  # the agent waits for the core
            assert waits["setup"] == {"condition": "service_completed_successfully"}, name
    assert SERVICES["agent"]["depends_on"]["core"] == {"condition": "service_healthy"}


def test_every_setting_is_explained_and_has_a_default() -> None:
    text = FILE.read_text()
    head = text.partition("\nname:")[0]
    names = {match[1] for match in VARIABLE.finditer(text)}
    assert names == {"BIND", "BIND_PUBLIC", "BASE_DOMAIN", "PUBLIC_URL", "TRACING_RATIO", "GRAFANA_URL", "DOCKER_LOGS",
                     "PROMTAIL", "TRACES_TO"}  # fmt: skip
    assert not [name for name in names if not re.search(rf"\b{name}\b", head)]


# Our programs ---------------------------------------------------------------------------------------------------


def test_the_core_understands_its_environment() -> None:
    settings = load_core([], SERVICES["core"]["environment"])
    assert settings.metrics_addr == ":9090" and settings.dashboard_addr == ":9000" and settings.log_json
    assert settings.data_dir == "/var/lib/tunnel" and settings.invite_dir == "/invite"
    assert settings.base_domain == "localhost" and settings.tracing.ratio == 1 and settings.public_url == ""
    again = load({"BASE_DOMAIN": "t.example.com", "PUBLIC_URL": "https://t.example.com", "TRACING_RATIO": "0.1"})
    settings = load_core([], again["services"]["core"]["environment"])
    assert (settings.base_domain, settings.public_url) == ("t.example.com", "https://t.example.com")
    assert settings.tracing.ratio == 0.1


def test_the_agent_understands_its_environment(tmp_path: Path) -> None:
    environment: dict[str, str] = dict(SERVICES["agent"]["environment"])
    for variable, name in (("AGENT_TOKEN_FILE", "token"), ("AGENT_SERVER_FINGERPRINT_FILE", "fingerprint")):
        assert environment[variable] == f"/invite/{name}"
        environment[variable] = str(tmp_path / name)
    (tmp_path / "token").write_text("tt_word\n")
    (tmp_path / "fingerprint").write_text("sha256:" + "ab" * 32 + "\n")
    settings = load_agent([], environment)
    assert settings.server == f"{SERVICES['core']['container_name']}:8443" and settings.token == "tt_word"
    assert settings.local == "http://sample:3000" and settings.metrics_addr == ":9091" and settings.log_json


@pytest.mark.parametrize("name", ["core", "agent"])
def test_variables_are_settings_of_ours(name: str) -> None:
    documented = (ROOT / "docs" / "CONFIGURATION.md").read_text()
    for variable in SERVICES[name]["environment"]:
        assert f"`{variable}`" in documented or variable == "OTEL_EXPORTER_OTLP_ENDPOINT", variable


def test_log_lines_carry_the_tag_that_the_readers_look_for() -> None:
    for name, tag in (("core", "tunnel-core"), ("agent", "tunnel-agent")):
        assert SERVICES[name]["container_name"] == tag == SERVICES[name]["logging"]["options"]["tag"]
        for reader in ("promtail/promtail.yml", "alloy/config.alloy"):
            assert tag in (DEPLOY / reader).read_text()


# What watches ---------------------------------------------------------------------------------------------------


def hosts() -> dict[str, str]:
    """Names that services know each other by."""
    return {alias: name for name, one in SERVICES.items() for alias in (name, one.get("container_name", name))}


def test_prometheus_accepts_what_is_mounted(tmp_path: Path) -> None:
    program = shutil.which("promtool")
    if program is None:
        pytest.fail("promtool is missing: install the package prometheus (scripts/packages)")
    for source, target, _ in volumes("prometheus"):
        if source.startswith("./"):
            place = tmp_path / target.lstrip("/")
            place.parent.mkdir(parents=True, exist_ok=True)
            (shutil.copytree if (DEPLOY / source).is_dir() else shutil.copy)(DEPLOY / source, place)
    command = SERVICES["prometheus"]["command"]
    [config] = [word.partition("=")[2] for word in command if word.startswith("--config.file=")]
    done = subprocess.run(
        [program, "check", "config", str(tmp_path / config.lstrip("/"))],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "--storage.tsdb.retention.time=30d" in command and "--enable-feature=exemplar-storage" in command


def test_targets_are_services_on_prometheus_own_networks() -> None:
    names = {path.name for path in (DEPLOY / "compose" / "targets").iterdir()}
    assert names == {path.name for path in (DEPLOY / "prometheus" / "targets").iterdir()}
    scraped = set()
    for path in (DEPLOY / "compose" / "targets").iterdir():
        for group in yaml.safe_load(path.read_text()):
            assert "service" in group["labels"], path
            for target in group["targets"]:
                host, _, port = target.partition(":")
                name = "prometheus" if host == "localhost" else hosts()[host]
                assert set(SERVICES[name]["networks"]) & set(SERVICES["prometheus"]["networks"])
                assert "profiles" not in SERVICES[name], "absent unless asked for"
                scraped.add((name, int(port)))
    assert scraped == {
        ("core", 9090), ("agent", 9091), ("prometheus", 9090), ("alertmanager", 9094), ("loki", 3100),
        ("tempo", 3200), ("otel-collector", 8888), ("grafana", 3000),
    }  # fmt: skip
    assert set(UNCHECKED) - {"setup"} <= {name for name, _ in scraped}, "somebody has to see that they are down"


def test_grafana_finds_its_sources_and_has_no_default_password() -> None:
    sources = yaml.safe_load((DEPLOY / "grafana/provisioning/datasources/tunnel.yml").read_text())["datasources"]
    for source in sources:
        assert re.sub(r"^http://([a-z]+):\d+$", r"\1", source["url"]) in SERVICES
    providers = yaml.safe_load((DEPLOY / "grafana/provisioning/dashboards/tunnel.yml").read_text())["providers"]
    targets = {target: source for source, target, _ in volumes("grafana")}
    assert targets[providers[0]["options"]["path"]] == "./grafana/dashboards"
    environment = SERVICES["grafana"]["environment"]
    assert "GF_SECURITY_ADMIN_PASSWORD" not in environment and "GF_AUTH_ANONYMOUS_ENABLED" not in environment
    assert environment["GF_SECURITY_ADMIN_PASSWORD__FILE"] == "/run/grafana/password"
    assert targets["/run/grafana"] == "grafana-secrets"


def test_alertmanager_finds_its_secrets_where_setup_puts_them() -> None:
    config = (DEPLOY / "alertmanager" / "alertmanager.yml").read_text()
    files = set(re.findall(r"_file: (\S+)", config))
    assert files == {"/etc/alertmanager/slack_url", "/etc/alertmanager/pagerduty_key"}
    assert ("alertmanager-secrets", "/etc/alertmanager", {"ro", "nocopy"}) in volumes("alertmanager")


def collector() -> dict[str, Any]:
    text = (DEPLOY / "otel-collector" / "collector.yml").read_text()
    config: dict[str, Any] = yaml.safe_load(
        text.replace("${env:TRACES_TO}", SERVICES["otel-collector"]["environment"]["TRACES_TO"])
    )
    return config


def test_the_collector_passes_spans_on_to_tempo() -> None:
    config = collector()
    [pipeline] = config["service"]["pipelines"].values()
    assert pipeline["exporters"] == ["otlp_grpc/tempo"]
    for kind in ("receivers", "processors", "exporters"):
        assert set(pipeline[kind]) <= config[kind].keys()
    for name, exporter in config["exporters"].items():
        host, _, port = exporter["endpoint"].partition(":")
        assert name == f"otlp_grpc/{host}" and port == "4317"
        store = yaml.safe_load((DEPLOY / host / f"{host}.yml").read_text())
        receivers = store.get("receivers") or store["distributor"]["receivers"]
        assert receivers["otlp"]["protocols"]["grpc"]["endpoint"] == "0.0.0.0:4317"
    assert re.search(r'TRACES_TO="\[otlp_grpc/tempo, otlp_grpc/jaeger\]"', FILE.read_text())


def test_jaeger_names_what_it_defines() -> None:
    config = yaml.safe_load((DEPLOY / "jaeger" / "jaeger.yml").read_text())
    assert set(config["service"]["extensions"]) == config["extensions"].keys()
    [store] = config["extensions"]["jaeger_storage"]["backends"]
    assert config["extensions"]["jaeger_query"]["storage"]["traces"] == store
    assert config["exporters"]["jaeger_storage_exporter"]["trace_storage"] == store
    for place in config["extensions"]["jaeger_storage"]["backends"][store]["badger"]["directories"].values():
        assert place.startswith("/badger/")
    assert ":13133/" in health_command("jaeger")[-1]


def test_retention_is_what_the_documents_say() -> None:
    def config(name: str) -> Any:
        return yaml.safe_load((DEPLOY / name).read_text())

    assert config("loki/loki.yml")["limits_config"]["retention_period"] == "336h"
    assert config("loki/loki.yml")["compactor"]["retention_enabled"] is True
    assert config("tempo/tempo.yml")["compactor"]["compaction"]["block_retention"] == "72h"
    badger = config("jaeger/jaeger.yml")["extensions"]["jaeger_storage"]["backends"]["disk"]["badger"]
    assert badger["ttl"]["spans"] == "72h" and badger["ephemeral"] is False


@pytest.mark.parametrize(("name", "port"), [("promtail", "9080"), ("alloy", "12345")])
@pytest.mark.parametrize(("status", "code"), [(200, 0), (503, 1)])
def test_a_health_check_without_curl(name: str, port: str, status: int, code: int) -> None:
    class Page(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status if self.path.endswith("/ready") else 404)
            self.end_headers()

        def log_message(self, format: str, *arguments: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Page) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        command = health_command(name, **{f"p{port}": str(server.server_port)})
        done = subprocess.run(command, capture_output=True, timeout=20, check=False)
        server.shutdown()
        thread.join(10)
    assert done.returncode == code, done.stderr
    assert subprocess.run(command, capture_output=True, timeout=20, check=False).returncode != 0  # nobody there
