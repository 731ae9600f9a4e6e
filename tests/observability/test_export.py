"""The way out: which exporter, real exports over HTTP, gRPC and Zipkin JSON, outages, and shutdown in time."""

from __future__ import annotations

import json
import logging
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import grpc  # type: ignore[import-untyped]
import pytest
import requests
from fakehost import FakeHost
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.collector.trace.v1.trace_service_pb2_grpc import (
    TraceServiceServicer,
    add_TraceServiceServicer_to_server,
)
from tracetools import a_request, a_stream, collecting, ends_well, until

from observability import tracing
from observability.export import Exporter
from observability.exporters import (
    CONSOLE,
    GRPC,
    HTTP,
    ZIPKIN,
    Limits,
    Target,
    choose_target,
    look_once,
    make_exporter,
    make_resource,
    missing_extra,
    read_limits,
)
from observability.record import ROOT
from observability.tracing import plugin
from tunnel.handler import Visit


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("OTEL_"):
            monkeypatch.delenv(name)


# Choosing --------------------------------------------------------------------------------------------------------

BASE = "http://collector:4318"
ENV = "OTEL_EXPORTER_OTLP_"


@pytest.mark.parametrize(
    ("options", "environment", "expected"),
    [
        ({}, {}, None),
        ({"endpoint": BASE}, {}, Target(HTTP, BASE + "/v1/traces")),
        ({"endpoint": BASE + "/"}, {}, Target(HTTP, BASE + "/v1/traces")),
        ({"endpoint": BASE + "/otlp"}, {}, Target(HTTP, BASE + "/otlp/v1/traces")),
        ({"endpoint": BASE + "/v1/traces"}, {}, Target(HTTP, BASE + "/v1/traces")),
        ({"endpoint": "collector:4318"}, {}, Target(HTTP, BASE + "/v1/traces")),
        ({}, {ENV + "ENDPOINT": BASE}, Target(HTTP, BASE + "/v1/traces")),
        ({}, {ENV + "TRACES_ENDPOINT": BASE + "/x"}, Target(HTTP, BASE + "/x")),
        ({}, {ENV + "ENDPOINT": BASE, ENV + "TRACES_ENDPOINT": BASE + "/x"}, Target(HTTP, BASE + "/x")),
        ({"endpoint": "http://own"}, {ENV + "ENDPOINT": BASE}, Target(HTTP, "http://own/v1/traces")),
        ({"endpoint": BASE, "protocol": "grpc"}, {}, Target(GRPC, BASE)),
        ({}, {ENV + "ENDPOINT": BASE, ENV + "PROTOCOL": "grpc"}, Target(GRPC, BASE)),
        ({"endpoint": BASE}, {ENV + "TRACES_PROTOCOL": "grpc", ENV + "PROTOCOL": "http/protobuf"}, Target(GRPC, BASE)),
        (
            {"endpoint": BASE},
            {ENV + "TRACES_PROTOCOL": "http/protobuf", ENV + "PROTOCOL": "grpc"},
            Target(HTTP, BASE + "/v1/traces"),
        ),
        ({"endpoint": "http://z:9411", "protocol": "zipkin"}, {}, Target(ZIPKIN, "http://z:9411/api/v2/spans")),
        ({"endpoint": "http://z/api/v2/spans", "protocol": "zipkin"}, {}, Target(ZIPKIN, "http://z/api/v2/spans")),
        (
            {},
            {"OTEL_TRACES_EXPORTER": "zipkin", "OTEL_EXPORTER_ZIPKIN_ENDPOINT": "http://z/x"},
            Target(ZIPKIN, "http://z/x"),
        ),
        ({}, {"OTEL_TRACES_EXPORTER": "zipkin"}, None),
        ({}, {"OTEL_TRACES_EXPORTER": "console"}, Target(CONSOLE, "")),
        ({}, {"OTEL_TRACES_EXPORTER": "none", ENV + "ENDPOINT": BASE}, None),
        *(
            ({"endpoint": BASE}, {"OTEL_TRACES_EXPORTER": other}, Target(HTTP, BASE + "/v1/traces"))
            for other in ("none", "zipkin", "console", "otlp")
        ),
        ({"endpoint": BASE}, {"OTEL_SDK_DISABLED": "TRUE"}, None),
        ({"endpoint": BASE}, {"OTEL_SDK_DISABLED": "1"}, Target(HTTP, BASE + "/v1/traces")),
    ],
)
def test_choice(options: dict[str, str], environment: dict[str, str], expected: Target | None) -> None:
    assert choose_target(options, environment) == expected


def test_limits_come_from_the_environment() -> None:
    names = ("MAX_QUEUE_SIZE", "MAX_EXPORT_BATCH_SIZE", "SCHEDULE_DELAY", "EXPORT_TIMEOUT")
    assert read_limits({}) == (Limits(2048, 512, 5.0, 30.0), [])
    values = ("100", "50", "200", "1500")
    assert read_limits({f"OTEL_BSP_{n}": v for n, v in zip(names, values, strict=True)}) == (
        Limits(100, 50, 0.2, 1.5),
        [],
    )
    limits, complaints = read_limits({"OTEL_BSP_MAX_QUEUE_SIZE": "100", "OTEL_BSP_SCHEDULE_DELAY": "soon"})
    assert limits == Limits(100, 100, 5.0, 30.0)
    assert len(complaints) == 1


def test_secrets_of_an_endpoint_are_not_shown() -> None:
    assert Target(HTTP, "https://user:pass@host:1/v1/traces?key=k").shown == "https://host:1/v1/traces"


def test_a_missing_extra_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    assert missing_extra(Target(HTTP, BASE)) == missing_extra(Target(GRPC, BASE)) == ""
    monkeypatch.setattr("observability.exporters.find_spec", lambda name: None)
    assert "trio-tunnel[grpc]" in missing_extra(Target(GRPC, BASE))
    assert "trio-tunnel[zipkin]" in missing_extra(Target(ZIPKIN, BASE))


def test_the_resource(monkeypatch: pytest.MonkeyPatch) -> None:
    assert make_resource("agent", "1.2.3").attributes["service.name"] == "tunnel-agent"
    assert make_resource("core", "1.2.3").attributes["service.version"] == "1.2.3"
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "service.name=edge,deployment.environment=test")
    attributes = make_resource("core", "1").attributes
    assert (attributes["service.name"], attributes["deployment.environment"]) == ("edge", "test")
    monkeypatch.setenv("OTEL_SERVICE_NAME", "mine")
    assert make_resource("core", "1").attributes["service.name"] == "mine"


# Exporting -------------------------------------------------------------------------------------------------------


async def send(options: dict[str, Any], role: str = "core") -> tuple[FakeHost, Visit, Visit]:
    """One request with its stream through the plug-in, which ends and so flushes."""
    host = FakeHost(role, {"tracing": options})
    async with plugin(host) as layer:
        request = a_request()
        stream = a_stream(request)

        async def handler(visit: Visit) -> None:
            await layer(ends_well)(stream)
            await ends_well(visit)

        await layer(handler)(request)
    return host, request, stream


def check_tree(request: ExportTraceServiceRequest, root: Visit, child: Visit) -> None:
    (resource_spans,) = request.resource_spans
    resource = {a.key: a.value.string_value for a in resource_spans.resource.attributes}
    assert (resource["service.name"], resource["telemetry.sdk.name"]) == ("tunnel-core", "opentelemetry")
    (scope_spans,) = resource_spans.scope_spans
    assert scope_spans.scope.name == "trio-tunnel"
    inner, outer = scope_spans.spans
    assert (outer.name, inner.name) == ("GET", "tunnel.stream")
    assert inner.parent_span_id == outer.span_id == bytes.fromhex(root.span_id)
    assert inner.trace_id == outer.trace_id == bytes.fromhex(child.trace_id)


@pytest.mark.system
@pytest.mark.parametrize("compression", ["", "gzip"])
async def test_over_http(monkeypatch: pytest.MonkeyPatch, compression: str) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "x-key=abc")
    if compression:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_COMPRESSION", compression)
    with collecting() as collector:
        host, request, stream = await send({"endpoint": collector.url})
    ((path, headers, body),) = collector.bodies
    assert path == "/v1/traces"
    assert (headers["x-key"], headers["content-type"]) == ("abc", "application/x-protobuf")
    if compression:
        import gzip

        assert headers["content-encoding"] == "gzip"
        body = gzip.decompress(body)
    check_tree(ExportTraceServiceRequest.FromString(body), request, stream)
    details = host.details()["tracing"]
    assert (details["exported"], details["failed"], details["dropped"]) == (2, 0, 0)


@pytest.mark.system
async def test_over_http_with_an_sdk_that_looks_different_inside(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the inner client that takes bytes, the SDK's own encoder is used."""
    from observability import sinks

    real = sinks.make_sink
    monkeypatch.setattr(sinks, "make_sink", lambda exporter, is_http, *rest: real(exporter, False, *rest))
    with collecting() as collector:
        _, request, stream = await send({"endpoint": collector.url})
    ((_, _, body),) = collector.bodies
    check_tree(ExportTraceServiceRequest.FromString(body), request, stream)


def test_the_environment_of_an_exporter_is_read_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Proxies, certificates and ~/.netrc are those that `requests` would take by itself."""
    authorities = tmp_path / "authorities.pem"
    authorities.touch()
    (tmp_path / "netrc").write_text("machine collector.example login me password secret")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy.example:3128")
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(authorities))
    session = requests.Session()
    look_once(session, "https://collector.example/v1/traces")
    monkeypatch.delenv("HTTPS_PROXY")
    monkeypatch.delenv("REQUESTS_CA_BUNDLE")
    monkeypatch.delenv("NETRC")
    settings = session.merge_environment_settings("https://collector.example/v1/traces", {}, None, None, None)
    assert settings["proxies"]["https"] == "http://proxy.example:3128"
    assert settings["verify"] == str(authorities)
    prepared = session.prepare_request(requests.Request("POST", "https://collector.example/v1/traces"))
    assert prepared.headers["Authorization"] == "Basic bWU6c2VjcmV0"


def test_the_sdks_certificates_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("REQUESTS_CA_BUNDLE", raising=False)
    monkeypatch.delenv("CURL_CA_BUNDLE", raising=False)
    session = requests.Session()
    session.verify, session.cert = "collector.pem", ("client.pem", "key.pem")
    look_once(session, "https://collector.example/v1/traces")
    assert (session.verify, session.cert) == ("collector.pem", ("client.pem", "key.pem"))


def test_a_credential_provider_brings_its_own_session(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is not installed is complained of by the SDK, which so has looked for it."""
    name = "OTEL_PYTHON_EXPORTER_OTLP_HTTP_CREDENTIAL_PROVIDER"
    monkeypatch.setenv(name, "nobody")
    with pytest.raises(RuntimeError, match="nobody"):
        make_exporter(Target(HTTP, "http://127.0.0.1:1/v1/traces"), Limits(), os.environ)


class Receiver(TraceServiceServicer):
    def __init__(self) -> None:
        self.requests: list[ExportTraceServiceRequest] = []

    def Export(self, request: ExportTraceServiceRequest, context: Any) -> ExportTraceServiceResponse:
        self.requests.append(request)
        return ExportTraceServiceResponse()


@pytest.fixture
def grpc_receiver() -> Iterator[tuple[Receiver, int]]:
    receiver, server = Receiver(), grpc.server(ThreadPoolExecutor(2))
    add_TraceServiceServicer_to_server(receiver, server)  # type: ignore[no-untyped-call]
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield receiver, port
    server.stop(None).wait(5)


@pytest.mark.system
async def test_over_grpc(grpc_receiver: tuple[Receiver, int]) -> None:
    receiver, port = grpc_receiver
    host, request, stream = await send({"endpoint": f"http://127.0.0.1:{port}", "protocol": "grpc"})
    (got,) = receiver.requests
    check_tree(got, request, stream)
    assert host.details()["tracing"]["exported"] == 2


@pytest.mark.system
async def test_as_zipkin_json() -> None:
    with collecting() as collector:
        host, request, stream = await send({"endpoint": collector.url, "protocol": "zipkin"})
    ((path, headers, body),) = collector.bodies
    assert (path, headers["content-type"]) == ("/api/v2/spans", "application/json")
    spans = {span["name"]: span for span in json.loads(body)}
    assert spans["GET"]["kind"] == "SERVER"
    assert spans["tunnel.stream"]["parentId"] == spans["GET"]["id"] == request.span_id
    assert {span["traceId"] for span in spans.values()} == {stream.trace_id}
    assert spans["GET"]["localEndpoint"]["serviceName"] == "tunnel-core"
    assert spans["GET"]["tags"]["http.url"] == "http://api.localhost/hello?q=REDACTED"
    assert host.details()["tracing"]["exported"] == 2


def test_grpc_is_not_loaded_for_http() -> None:
    code = (
        "import sys\n"
        "from observability.export import Exporter\n"
        "from observability.exporters import Limits, Target\n"
        "exporter = Exporter(Target('http/protobuf', 'http://127.0.0.1:9/v1/traces'), Limits(), 'core', '1')\n"
        "exporter.start(); exporter.stop()\n"
        "print([m for m in sys.modules if m.split('.')[0] == 'grpc'])\n"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=True)
    assert (done.stdout.strip(), done.stderr) == ("[]", "")


@pytest.mark.system
async def test_a_full_batch_is_sent_at_once_and_nothing_is_lost() -> None:
    with collecting() as collector:
        exporter = Exporter(Target(HTTP, collector.url + "/v1/traces"), Limits(1000, 100, 3600, 5), "core", "1")
        exporter.start()
        for _ in range(100):
            put(exporter)
        await until(lambda: exporter.exported == 100)  # though the delay is an hour
        for _ in range(450):
            put(exporter)
        exporter.stop()
    assert exporter.exported == 550
    assert (exporter.failed, exporter.queue.dropped) == (0, 0)


def put(exporter: Exporter, visit: Visit | None = None) -> None:
    visit = visit or a_request()
    visit.trace_id, visit.span_id = "1" * 32, "2" * 16
    exporter.put_all([(visit, visit.started + 1, ROOT, "")])


@pytest.mark.system
async def test_a_visit_with_impossible_facts_costs_the_others_nothing() -> None:
    with collecting() as collector:
        exporter = Exporter(Target(HTTP, collector.url), Limits(), "core", "1")
        exporter.start()
        bad = a_request()
        bad.target = None  # type: ignore[assignment]
        put(exporter)
        put(exporter, bad)
        put(exporter)
        exporter.stop()
    assert (exporter.exported, exporter.failed) == (2, 1)


@pytest.fixture
def root_records() -> Iterator[list[logging.LogRecord]]:
    """What reaches the root logger, as the program's own log does. (caplog also listens where nothing passes on.)"""
    records: list[logging.LogRecord] = []
    handler, root = logging.Handler(logging.DEBUG), logging.getLogger()
    handler.emit = records.append  # type: ignore[method-assign, assignment]
    level = root.level
    root.addHandler(handler)
    root.setLevel(logging.DEBUG)
    yield records
    root.removeHandler(handler)
    root.setLevel(level)


# Outages ---------------------------------------------------------------------------------------------------------


def has_failed(exporter: Exporter, count: int) -> bool:
    return exporter.failed == count


def has_exported(exporter: Exporter, count: int) -> bool:
    return exporter.exported == count


def dead_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.system
@pytest.mark.parametrize("protocol", ["http/protobuf", "grpc", "zipkin"])
async def test_a_dead_collector_delays_the_end_by_two_seconds_at_most(protocol: str) -> None:
    host = FakeHost("core", {"tracing": {"endpoint": f"http://127.0.0.1:{dead_port()}", "protocol": protocol}})
    async with plugin(host) as layer:
        await until(lambda: tracing._running["core"]._sink)
        for _ in range(2000):
            await layer(ends_well)(a_request())
        await until(lambda: len(tracing._running["core"].queue) < 2000)  # it is trying
        began = time.monotonic()
    assert time.monotonic() - began < 2.0
    details = host.details()["tracing"]
    assert details["exported"] == 0
    assert details["failed"] + details["dropped"] + 512 >= 2000  # a batch may still be in flight


@pytest.mark.system
async def test_a_collector_that_never_answers_delays_the_end_by_two_seconds_at_most() -> None:
    with collecting() as collector:
        collector.hold.clear()
        began = 0.0
        async with plugin(FakeHost("core", {"tracing": {"endpoint": collector.url}})) as layer:
            await layer(ends_well)(a_request())
            began = time.monotonic()
        assert time.monotonic() - began < 2.0


@pytest.mark.system
def test_a_process_ends_in_time_though_its_collector_hangs() -> None:
    code = (
        "import sys\n"
        "from observability.export import Exporter\n"
        "from observability.exporters import Limits, Target\n"
        "from observability.record import ROOT\n"
        "from tunnel.handler import QueryVisit\n"
        "exporter = Exporter(Target('http/protobuf', sys.argv[1]), Limits(), 'core', '1')\n"
        "exporter.start()\n"
        "visit = QueryVisit('a', 'sqlite'); visit.trace_id, visit.span_id = '1' * 32, '2' * 16\n"
        "exporter.put_all([(visit, visit.started, ROOT, '')])\n"
        "exporter.stop()\n"
    )
    with collecting() as collector:
        collector.hold.clear()
        root = Path(__file__).parents[2]
        done = subprocess.run(
            [sys.executable, "-c", code, collector.url + "/v1/traces"], cwd=root, capture_output=True, timeout=8
        )
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.system
async def test_an_outage_is_logged_once_and_its_end_once(root_records: list[logging.LogRecord]) -> None:
    with collecting() as collector:
        collector.status = 400  # not worth a retry, so fails at once
        target = Target(HTTP, collector.url.replace("//", "//user:secret@") + "/v1/traces")
        exporter = Exporter(target, Limits(100, 1, 3600, 5), "core", "1")
        exporter.start()
        for count in (1, 2, 3):
            put(exporter)
            await until(partial(has_failed, exporter, count))
        assert exporter.statistics()["collector_up"] is False
        collector.status = 200
        for count in (1, 2):
            put(exporter)
            await until(partial(has_exported, exporter, count))
        assert exporter.statistics()["collector_up"] is True
        exporter.stop()
    assert {r.name for r in root_records} == {"observability"}  # nothing of the SDK's own
    ours = root_records
    assert [(r.levelname, r.getMessage()) for r in ours] == [
        ("WARNING", "traces cannot be exported"),
        ("INFO", "traces are exported again"),
    ]
    assert "400" in ours[0].fields["reason"]  # type: ignore[attr-defined]
    assert not any("error" in f"{r.getMessage()} {vars(r).get('fields')}" for r in ours)
    assert "secret" not in repr([vars(r) for r in ours])


@pytest.mark.system
async def test_an_exporter_that_cannot_be_made_is_logged_and_costs_only_the_spans(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise OSError("no such certificate")

    monkeypatch.setattr("observability.export.make_exporter", broken)
    exporter = Exporter(Target(HTTP, "http://127.0.0.1:9/v1/traces"), Limits(10, 1, 3600, 5), "core", "1")
    exporter.start()
    put(exporter)
    lost = await until(lambda: exporter.failed or exporter.exported)
    exporter.stop()
    assert lost == exporter.failed == 1
    assert [r.getMessage() for r in caplog.records if r.name == "observability"] == ["traces cannot be exported"]
