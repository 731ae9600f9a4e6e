"""Log lines of real programs through Promtail's, Alloy's and Filebeat's pipelines: time stamp, level, trace id, labels.

Loki, Promtail, Alloy and Filebeat themselves cannot be had from a package index; their stages are read here as their
documentation has them (promtail.py, alloy.py, filebeat.py beside this file).
"""

from __future__ import annotations

import ast
import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from datetime import datetime
from pathlib import Path
from typing import Any

import alloy
import filebeat
import promtail
import pytest
import yaml
from promtail import Entry

from observability.accesslog import Line

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
sys.path.insert(0, str(ROOT / "tests" / "system"))

from running import RunningAgent, RunningCore, clean_environment  # noqa: E402
from service import Service  # noqa: E402
from visiting import Connection  # noqa: E402
from watching import ask  # noqa: E402

LOG_CALLS = ("debug", "info", "warning", "error", "exception", "critical", "log")
TEXT = re.compile(r"(\S+Z) (DEBUG|INFO|WARNING|ERROR) +")
DEAD = "http://127.0.0.1:1"  # a collector that nobody is: spans are made, and lost


class Lines:
    """What each program wrote, by the format: {"tunnel-core": [line, …], …}."""

    def __init__(self) -> None:
        self.json: dict[str, list[str]] = {}
        self.text: dict[str, list[str]] = {}

    def all(self) -> Iterator[tuple[str, str]]:
        for kind in (self.json, self.text):
            for program, lines in kind.items():
                for line in lines:
                    yield program, line


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lines]:
    """A core and two agents, one refused, under a few requests; the core once more with its log as text."""
    found = Lines()
    directory = tmp_path_factory.mktemp("shippers")
    with ExitStack() as stack:
        service = Service()
        stack.callback(service.close)
        core = RunningCore(directory / "core", f"-tracing-endpoint={DEAD}", "-log-level=debug")
        stack.callback(core.close)
        flags = (f"-tracing-endpoint={DEAD}", "-log-level=debug")
        agent = RunningAgent(core, f"app={service.url},closed=http://127.0.0.1:1", *flags)
        stack.callback(agent.close)
        stranger = RunningAgent(core, DEAD, token="tt_" + "s" * 43, agent_id="stranger", ready=False)
        stranger.expected_code = 1
        stack.callback(stranger.close)
        stranger.wait()
        for line in ("GET /echo", "GET /status/500", "GET /status/404", "POST /upload", "TRACE /"):
            ask(core, line, body=b"x" if line.startswith("POST") else None)
        ask(core, 'GET /"%20trace_id=' + "f" * 32)
        ask(core, "GET /", host="nobody.localhost")
        ask(core, "GET /", host="closed.localhost")
        core.wait_for("request", host="closed.localhost")
        stack.pop_all().close()
    found.json = {"tunnel-core": core.lines, "tunnel-agent": agent.lines + stranger.lines}
    found.text = {"tunnel-core": text_of_a_core(directory / "text")}
    yield found


def text_of_a_core(data_dir: Path) -> list[str]:
    """The lines of a core that writes text: a start, a request, an end."""
    addresses = [f"-{name}-addr=127.0.0.1:0" for name in ("public", "agent", "metrics", "dashboard")]
    core = subprocess.Popen(
        [sys.executable, "-m", "tunnel.core", f"-data-dir={data_dir}", f"-tracing-endpoint={DEAD}", *addresses],
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, encoding="utf-8",
        env=clean_environment(),
    )  # fmt: skip
    written: list[str] = []
    try:
        assert core.stderr is not None
        for line in core.stderr:  # ends with the program
            written.append(line)
            if " core ready " in line:
                public = re.search(r"public=127\.0\.0\.1:(\d+)", line)
                assert public is not None
                visit(int(public[1]))
                core.send_signal(signal.SIGTERM)
        assert core.wait(20) == 0, "".join(written)
    finally:
        core.kill()
        core.wait()
        assert core.stderr is not None
        core.stderr.close()
    return written


def visit(port: int) -> None:
    with Connection(("127.0.0.1", port), "nobody.localhost") as visitor:
        assert visitor.ask("GET /echo").status == 404


def expected(line: str) -> dict[str, Any]:
    """Time stamp, level and ids, read from the line by other means than a pipeline's."""
    if line.startswith("{"):
        record = json.loads(line)
        time, level, ids = record["time"], record["level"], record
    else:
        match = TEXT.match(line)
        assert match is not None, line
        time, level = match[1], match[2]
        ids = dict(re.findall(r" (trace_id|span_id)=([0-9a-f]+)", re.sub(r'"(?:[^"\\]|\\.)*"', "", line)))
    return {
        "time": datetime.fromisoformat(time).timestamp(), "level": level,
        "ids": {name: ids[name] for name in ("trace_id", "span_id") if name in ids},
    }  # fmt: skip


def in_docker(line: str, tag: str | None, stream: str = "stdout") -> str:
    """The line as Docker's json-file driver writes it."""
    wrapped: dict[str, Any] = {"log": line.rstrip("\n") + "\n", "stream": stream, "time": "2026-02-09T09:00:00.5Z"}
    return json.dumps(wrapped if tag is None else {**wrapped, "attrs": {"tag": tag}}) + "\n"


def jobs(name: str = "promtail.yml") -> dict[str, dict[str, Any]]:
    return {one["job_name"]: one for one in promtail.load(DEPLOY / "promtail" / name)["scrape_configs"]}


def check(entry: Entry | None, program: str, line: str) -> None:
    wanted = expected(line)
    assert entry is not None, line
    assert entry.labels["container"] == program
    assert entry.labels["level"] == wanted["level"], line
    assert entry.time == pytest.approx(wanted["time"], abs=0.0005), line
    assert entry.metadata == wanted["ids"], line
    assert set(entry.labels) <= {"container", "level", "stream"}
    assert entry.line == line.rstrip("\n")


# Promtail and Alloy ----------------------------------------------------------------------------------------------


@pytest.mark.system
def test_lines_of_every_kind_are_there(lines: Lines) -> None:
    """The tests below say something: each level, lines with ids and without, in both formats."""
    for kind in (lines.json, lines.text):
        seen = [expected(line) for program in kind.values() for line in program]
        assert any(one["ids"] for one in seen) and any(not one["ids"] for one in seen)
    assert {expected(line)["level"] for line in lines.json["tunnel-agent"]} >= {"DEBUG", "INFO", "ERROR"}


@pytest.mark.system
def test_promtail_reads_files_of_real_programs(lines: Lines) -> None:
    stages = jobs()["files"]["pipeline_stages"]
    for program, line in lines.all():
        check(promtail.run(stages, Entry(line.rstrip("\n"), {"container": program})), program, line)


@pytest.mark.system
def test_promtail_reads_containers_of_real_programs(lines: Lines) -> None:
    job = jobs()["docker"]
    labels = {**job["static_configs"][0]["labels"], "filename": "/var/lib/docker/containers/1/1-json.log"}
    del labels["__path__"]
    for program, line in lines.all():
        entry = promtail.run(job["pipeline_stages"], Entry(in_docker(line, program), labels))
        check(entry, program, line)
        assert entry is not None and entry.labels["stream"] == "stdout"
        for tag in (None, "nginx", "tunnel-corex", ""):
            assert promtail.run(job["pipeline_stages"], Entry(in_docker(line, tag), labels)) is None, tag


@pytest.mark.system
def test_the_journal_of_real_programs(lines: Lines) -> None:
    job = jobs("journal.yml")["journal"]
    for program, line in lines.all():
        check(promtail.run(job["pipeline_stages"], Entry(line.rstrip("\n"), {"container": program})), program, line)


def test_the_journals_units() -> None:
    keep, name = jobs("journal.yml")["journal"]["relabel_configs"]
    assert (keep["action"], name["target_label"], keep["regex"]) == ("keep", "container", name["regex"])
    for unit, wanted in {"tunnel-core.service": "tunnel-core", "tunnel-agent@acme.service": "tunnel-agent",
                         "tunnel-corex.service": None, "ssh.service": None}.items():  # fmt: skip
        match = re.fullmatch(keep["regex"], unit)
        assert (match and match[1]) == wanted, unit
    for path in (DEPLOY / "systemd").glob("*.service"):
        assert re.fullmatch(keep["regex"], path.name), path


@pytest.mark.parametrize("line", [
    "Fatal Python error: init_import_site: Failed to import the site module", "", "{", '{"a": 1}', "[1]",
    '{"time": 5, "level": null}', "2026-02-09T09:00:00.123Z NOTICE x",
])  # fmt: skip
def test_what_is_no_line_of_ours_passes_as_it_is(line: str) -> None:
    entry = promtail.run(jobs()["files"]["pipeline_stages"], Entry(line, {"container": "tunnel-core"}))
    assert entry is not None
    assert (entry.line, entry.metadata, entry.labels) == (line, {}, {"container": "tunnel-core"})
    assert entry.time is None or "2026" in line
    [event] = [filebeat.run(one, beats()["processors"], line) for one in beats()["filebeat.inputs"][:1]]
    assert event is not None
    assert "trace" not in event and (event["message"] == line)


def test_a_visitor_cannot_write_a_trace_id_into_a_text_line() -> None:
    forged, real, span = "f" * 32, "a" * 32, "b" * 16
    start = "2026-02-09T09:00:00.123Z ERROR   request method=GET"
    quoted = f'error="it said \\" trace_id={forged} span_id={span} x"'
    for line, wanted in {
        f"{start} {quoted}": {},
        f"{start} {quoted} trace_id={real} span_id={span}": {"trace_id": real, "span_id": span},
        f"{start} trace_id={real} span_id={span} {quoted}": {"trace_id": real, "span_id": span},
    }.items():
        entry = promtail.run(jobs()["files"]["pipeline_stages"], Entry(line, {"container": "tunnel-core"}))
        assert entry is not None and entry.metadata == wanted, line
        event = filebeat.run(beats()["filebeat.inputs"][0], beats()["processors"], line)
        assert event is not None and event.get("trace", {}).get("id") == wanted.get("trace_id"), line


def test_alloy_and_promtail_say_the_same() -> None:
    blocks = [one for path in sorted((DEPLOY / "alloy").glob("*.alloy")) for one in alloy.parse(path.read_text())]
    named = {(one.kind, one.label): one for one in blocks}
    assert len(named) == len(blocks)
    *unwrap, shared = jobs()["docker"]["pipeline_stages"]
    [ours] = jobs()["files"]["pipeline_stages"]
    assert ours == shared and jobs("journal.yml")["journal"]["pipeline_stages"] == [ours]
    assert alloy.stages_of(named["loki.process", "ours"]) == ours["match"]["stages"]
    assert alloy.stages_of(named["loki.process", "docker"]) == unwrap
    rules = [one.values for one in named["loki.relabel", "units"].blocks]
    assert rules == jobs("journal.yml")["journal"]["relabel_configs"]


@pytest.mark.parametrize("environment", [
    {}, {"LOKI_URL": "http://other:1", "TUNNEL_LOGS": "/a", "TUNNEL_DOCKER_LOGS": "/b"},
])  # fmt: skip
def test_alloy_and_promtail_read_the_same_files(environment: dict[str, str]) -> None:
    blocks = {(one.kind, one.label): one for one in alloy.parse((DEPLOY / "alloy" / "config.alloy").read_text())}
    config = promtail.load(DEPLOY / "promtail" / "promtail.yml", environment)
    for job in config["scrape_configs"]:
        targets = alloy.evaluate(blocks["local.file_match", job["job_name"]].values["path_targets"], environment)
        assert targets == [one["labels"] for one in job["static_configs"]]
    [endpoint] = blocks["loki.write", "loki"].blocks
    assert alloy.evaluate(endpoint.values["url"], environment) == config["clients"][0]["url"]


def test_every_reference_in_alloys_files_leads_somewhere() -> None:
    blocks = [one for path in (DEPLOY / "alloy").glob("*.alloy") for one in alloy.parse(path.read_text())]
    there = {f"{one.kind}.{one.label}" for one in blocks}
    for block in blocks:
        values = [one for value in block.values.values() for one in (value if isinstance(value, list) else [value])]
        for value in values:
            if isinstance(value, alloy.Name):
                assert value.path.rpartition(".")[0] in there, value


def test_dashboards_ask_for_labels_that_the_pipelines_make() -> None:
    asked = set()
    for path in [*(DEPLOY / "grafana").rglob("*.json"), *(DEPLOY / "grafana" / "provisioning").rglob("*.yml")]:
        for text in re.findall(r"\{container(?:=~|=)\\?\"([^\"\\]+)", path.read_text()):
            asked.update(text.split("|"))
    made = {one["labels"]["container"] for one in jobs()["files"]["static_configs"]}
    assert asked == made == {"tunnel-core", "tunnel-agent"}
    [sources] = (DEPLOY / "grafana" / "provisioning" / "datasources").glob("*.yml")
    loki = next(one for one in yaml.safe_load(sources.read_text())["datasources"] if one["type"] == "loki")
    for field in loki["jsonData"]["derivedFields"]:
        for line in ('{"trace_id":"' + "a" * 32 + '"}', f"request trace_id={'a' * 32} span_id=1"):
            match = re.search(field["matcherRegex"], line)
            assert match is not None and match[1] == "a" * 32


# Filebeat and Elasticsearch --------------------------------------------------------------------------------------


def beats() -> dict[str, Any]:
    return filebeat.load(DEPLOY / "filebeat" / "filebeat.yml")


def template() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((DEPLOY / "elasticsearch" / "index-template.json").read_text())
    return found


def mapped(properties: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Type by dotted name."""
    found = {}
    for name, one in properties.items():
        found.update(mapped(one["properties"], f"{prefix}{name}.") if "properties" in one else
                     {prefix + name: one["type"]})  # fmt: skip
    return found


FIELDS = mapped(template()["template"]["mappings"]["properties"])
FITS: dict[str, tuple[type, ...]] = {
    "keyword": (str,), "text": (str,), "match_only_text": (str,), "wildcard": (str,), "long": (int,),
    "date": (int, float),
}  # fmt: skip


@pytest.mark.system
def test_filebeat_reads_real_programs_and_elasticsearch_knows_every_field(lines: Lines) -> None:
    config = beats()
    inputs = {one["id"]: one for one in config["filebeat.inputs"]}
    for program, line in lines.all():
        wanted = expected(line)
        by_file = filebeat.run(inputs[f"{program}-files"], config["processors"], line)
        by_docker = filebeat.run(inputs["tunnel-docker"], config["processors"], in_docker(line, program))
        assert by_docker is not None and by_file is not None
        by_docker["message"] = by_docker["message"].rstrip("\n")
        assert by_file == by_docker
        fields = filebeat.flat(by_file)
        assert fields["service.name"] == program
        assert fields["@timestamp"] == pytest.approx(wanted["time"], abs=0.0005)
        assert fields["log.level"] == wanted["level"]
        assert (fields.get("trace.id"), fields.get("span.id")) == (
            wanted["ids"].get("trace_id"), wanted["ids"].get("span_id"),
        )  # fmt: skip
        for name, value in fields.items():
            assert name in FIELDS, f"index-template.json does not know {name}, of {line}"
            for one in value if isinstance(value, list) else [value]:
                assert isinstance(one, FITS[FIELDS[name]]) and not isinstance(one, bool), (name, one)
        assert filebeat.run(inputs["tunnel-docker"], config["processors"], in_docker(line, "nginx")) is None


@pytest.mark.system
def test_access_records_have_the_names_of_ecs(lines: Lines) -> None:
    config = beats()
    for line in lines.json["tunnel-core"]:
        record = json.loads(line)
        if record["msg"] != "request":
            continue
        event = filebeat.run(config["filebeat.inputs"][0], config["processors"], line)
        assert event is not None
        assert event["http"]["response"]["status_code"] == record["status"]
        assert event["http"]["request"] == {"id": record["request_id"], "method": record["method"],
                                            "body": {"bytes": record["bytes_in"]}}  # fmt: skip
        assert event["url"] == {"domain": record["host"], "path": record["path"]}
        number, unit = re.fullmatch(r"([\d.]+)(m?s)", record["duration"]).groups()  # type: ignore[union-attr]
        assert event["event"]["duration"] == pytest.approx(float(number) * {"s": 1e9, "ms": 1e6}[unit])


def named_in_the_program() -> dict[str, str]:
    """Every field that a log line may have, and where it comes from: `log.info("…", name=…)`, {"fields": {"name": …}},
    `fields = {"name": …}`, the access records."""
    found = dict.fromkeys(Line.__struct_fields__[3:], "observability/accesslog.py")
    for path in [*(ROOT / "tunnel").rglob("*.py"), *(ROOT / "observability").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            names: set[Any] = set()
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in LOG_CALLS:
                if "log" in ast.unparse(node.func.value):
                    names = {one.arg for one in node.keywords} - {"extra", "exc_info", "stack_info", None}
            elif isinstance(node, ast.Dict):
                for key, value in zip(node.keys, node.values, strict=True):
                    if isinstance(key, ast.Constant) and key.value == "fields":
                        names |= keys(value)
            elif isinstance(node, (ast.Assign, ast.AnnAssign)) and node.value is not None:
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                if any(isinstance(one, ast.Name) and one.id == "fields" for one in targets):
                    names = keys(node.value)
            found.update({str(name): f"{path.relative_to(ROOT)}:{node.lineno}" for name in names})
    return found


def keys(value: ast.expr) -> set[Any]:
    return {one.value for one in value.keys if isinstance(one, ast.Constant)} if isinstance(value, ast.Dict) else set()


def test_every_field_that_a_log_call_names_is_in_the_template() -> None:
    renamed: set[str] = set()
    for processor in [*beats()["processors"], *beats()["processors"][-1]["then"]]:
        renamed |= {one["from"].removeprefix("tunnel.") for one in processor.get("rename", {}).get("fields", [])}
    named = named_in_the_program()
    assert len(named) > 30
    missing = {name: where for name, where in named.items() if name not in renamed and f"tunnel.{name}" not in FIELDS}
    assert not missing, "add these to deploy/elasticsearch/index-template.json, under tunnel"


def test_index_template_policy_and_filebeat_name_each_other() -> None:
    [pattern] = template()["index_patterns"]
    index = beats()["output.elasticsearch"]["index"]
    assert index.startswith(pattern.removesuffix("*"))
    assert template()["template"]["settings"]["index.lifecycle.name"] == "tunnel-logs"
    phases = json.loads((DEPLOY / "elasticsearch" / "ilm-policy.json").read_text())["policy"]["phases"]
    assert phases["delete"] == {"min_age": "14d", "actions": {"delete": {}}}


# Keys -------------------------------------------------------------------------------------------------------------

#: What the documentation of each program allows, as far as these files go: a typing mistake would stop the program.
LOKI = {
    "": "auth_enabled server common schema_config compactor limits_config analytics",
    "server": "http_listen_address http_listen_port grpc_listen_address grpc_listen_port log_level log_format",
    "common": "instance_addr path_prefix replication_factor ring storage compactor_address",
    "common.ring": "kvstore", "common.ring.kvstore": "store",
    "common.storage": "filesystem", "common.storage.filesystem": "chunks_directory rules_directory",
    "schema_config": "configs",
    "schema_config.configs": "from store object_store schema index chunks row_shards",
    "schema_config.configs.index": "prefix period tags path_prefix",
    "compactor": "working_directory compaction_interval retention_enabled retention_delete_delay delete_request_store "
                 "retention_delete_worker_count",
    "limits_config": "retention_period allow_structured_metadata reject_old_samples reject_old_samples_max_age "
                     "max_label_names_per_series ingestion_rate_mb ingestion_burst_size_mb max_query_length "
                     "volume_enabled discover_service_name discover_log_levels",
    "analytics": "reporting_enabled",
}  # fmt: skip
PROMTAIL = {
    "": "server positions clients scrape_configs limits_config target_config",
    "server": "http_listen_address http_listen_port grpc_listen_address grpc_listen_port log_level",
    "positions": "filename sync_period ignore_invalid_yaml", "clients": "url tenant_id batchwait batchsize",
    "scrape_configs": "job_name static_configs journal relabel_configs pipeline_stages",
    "scrape_configs.static_configs": "targets labels", "scrape_configs.static_configs.labels": "container __path__",
    "scrape_configs.journal": "path max_age json labels matches",
    "scrape_configs.relabel_configs": "source_labels separator target_label regex modulus replacement action",
}  # fmt: skip
FILEBEAT = {
    "": "filebeat.inputs processors output.elasticsearch setup.template.enabled setup.ilm.enabled",
    "filebeat.inputs": "type id enabled paths units fields fields_under_root processors file_identity.native "
                       "prospector.scanner.fingerprint.enabled",
    "filebeat.inputs.fields": "service.name",
    "output.elasticsearch": "hosts username password index",
}  # fmt: skip


def unknown(value: Any, allowed: dict[str, str], where: str = "") -> Iterator[str]:
    for one in value if isinstance(value, list) else [value]:
        if isinstance(one, dict) and where.rpartition(".")[2] not in ("pipeline_stages", "processors"):
            for name, inner in one.items():
                if name not in allowed.get(where, "").split():
                    yield f"{where}: {name}"
                yield from unknown(inner, allowed, f"{where}.{name}".lstrip("."))


def test_keys_are_those_of_the_documentation() -> None:
    assert not [*unknown(yaml.safe_load((DEPLOY / "loki" / "loki.yml").read_text()), LOKI)]
    for name in ("promtail.yml", "journal.yml"):
        assert not [*unknown(promtail.load(DEPLOY / "promtail" / name), PROMTAIL)]
    assert not [*unknown(beats(), FILEBEAT)]
    assert [*unknown({"server": {"http_listen_prot": 1}}, LOKI)] == ["server: http_listen_prot"]


def test_loki_deletes_after_fourteen_days_and_takes_trace_ids() -> None:
    loki = yaml.safe_load((DEPLOY / "loki" / "loki.yml").read_text())
    assert loki["limits_config"]["retention_period"] == f"{14 * 24}h"
    assert loki["compactor"]["retention_enabled"] and loki["compactor"]["delete_request_store"] == "filesystem"
    [schema] = loki["schema_config"]["configs"]
    assert (schema["store"], schema["schema"], schema["index"]["period"]) == ("tsdb", "v13", "24h")
    assert loki["limits_config"]["allow_structured_metadata"]
