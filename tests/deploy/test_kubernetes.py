"""deploy/kubernetes: real schemas, references that lead somewhere, and settings and probes that the programs know."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import kubernetes_validate
import manifests
import pytest
import yaml
from manifests import KUBERNETES, Object, chosen, kustomization, load, one, pods, ports

from tunnel.config import AgentSettings, CoreSettings, load_agent, load_core, parse_local

DEPLOY = KUBERNETES.parent
DIRECTORIES = ("core", "agent", "monitoring", "example")
ROOT = DEPLOY.parent
sys.path.insert(0, str(ROOT / "tests" / "system"))

from running import RunningAgent, RunningCore, poll  # noqa: E402
from service import Service  # noqa: E402
from watching import get  # noqa: E402

ALL = load("core") + load("agent") + load("monitoring")


@pytest.fixture(scope="module")
def operator() -> dict[str, Any]:
    """The Prometheus operator's objects, as models made from its own definitions."""
    from cloudcoil.models.prometheus_operator import v1  # late: takes seconds

    return {"ServiceMonitor": v1.ServiceMonitor, "PodMonitor": v1.PodMonitor, "PrometheusRule": v1.PrometheusRule}


# Schemas and references -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", ["1.29", "1.37"])
def test_kubernetes_own_objects_fit_their_schemas(version: str) -> None:
    own = [each for each in ALL if not each["apiVersion"].startswith("monitoring.coreos.com/")]
    assert {each["kind"] for each in own} == {
        "Namespace", "StatefulSet", "Deployment", "Service", "PodDisruptionBudget", "NetworkPolicy",
    }  # fmt: skip
    for each in own:
        kubernetes_validate.validate(each, version, strict=True)
    wrong = json.loads(json.dumps(one(own, "StatefulSet", "tunnel-core")))
    wrong["spec"]["template"]["spec"]["containers"][0]["readinessProb"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, version, strict=True)


def test_the_operators_objects_fit_its_definitions(operator: dict[str, Any]) -> None:
    def check(each: Object) -> None:
        model = operator[each["kind"]].model_validate(each)
        known = model.model_dump(by_alias=True, exclude_unset=True, mode="json")
        assert known == each  # what the definitions do not know would be missing

    theirs = [each for each in ALL if each["apiVersion"] == "monitoring.coreos.com/v1"]
    assert {each["kind"] for each in theirs} == set(operator)
    for each in theirs:
        check(each)
    wrong = json.loads(json.dumps(one(theirs, "PodMonitor", "tunnel-agent")))
    wrong["spec"]["podMetricsEndpoints"][0]["prot"] = "metrics"
    with pytest.raises(AssertionError):
        check(wrong)


def test_rules_are_those_of_prometheus() -> None:
    made = subprocess.run(
        [sys.executable, "-c", "import runpy, sys; print(runpy.run_path(sys.argv[1])['text'](), end='')",
         KUBERNETES / "source" / "__main__.py"],
        check=True, capture_output=True, encoding="utf-8",
    ).stdout  # fmt: skip
    assert (KUBERNETES / "monitoring" / "rules.yaml").read_text() == made, "run: python deploy/kubernetes/source"
    groups = [group for each in ALL if each["kind"] == "PrometheusRule" for group in each["spec"]["groups"]]
    files = (DEPLOY / "prometheus" / "rules").glob("*.yml")
    assert sorted(group["name"] for group in groups) == sorted(
        group["name"] for path in files for group in yaml.safe_load(path.read_text())["groups"]
    )


def test_every_file_is_used_and_every_reference_leads_somewhere() -> None:
    for directory in [*(KUBERNETES / name for name in DIRECTORIES), DEPLOY / "grafana"]:
        found = kustomization(directory)
        generated = [file for each in found.get("configMapGenerator", []) for file in each["files"]]
        named = [*found.get("resources", []), *(each["path"] for each in found.get("patches", [])), *generated]
        for name in named:
            assert (directory / name).exists(), f"{directory.name}: {name}"
        there = {path.name for path in directory.iterdir() if path.is_file()} - {"kustomization.yaml"}
        assert there <= set(named), f"{directory.name}: {there - set(named)} is used by nobody"
        assert "patchesStrategicMerge" not in found and "commonLabels" not in found  # deprecated
    assert len({(each["kind"], each["metadata"]["name"]) for each in ALL}) == len(ALL)


def test_the_example_changes_what_is_there() -> None:
    found = kustomization(KUBERNETES / "example")
    for path in (KUBERNETES / "example" / each["path"] for each in found["patches"]):
        for patch in yaml.safe_load_all(path.read_text()):
            one(ALL, patch["kind"], patch["metadata"]["name"])
    images = {each["name"] for each in found["images"]}
    assert {
        container["image"].partition(":")[0] for pod in pods(ALL) for container in pod["spec"]["containers"]
    } == images
    workloads = {each["metadata"]["name"] for each in ALL if each["kind"] in ("Deployment", "StatefulSet")}
    assert {each["name"] for each in found["replicas"]} <= workloads
    made = {each["name"] for name in ("core", "agent")
            for each in kustomization(KUBERNETES / name)["configMapGenerator"]}  # fmt: skip
    assert {each["name"] for each in found["configMapGenerator"] if each["behavior"] == "replace"} == made


def test_services_budgets_and_policies_find_their_pods() -> None:
    everything = pods(ALL)
    for each in ALL:
        spec = each.get("spec", {})
        if each["kind"] == "Service":
            [pod] = chosen(spec["selector"], everything)
            assert {port["targetPort"] for port in spec["ports"]} <= set(ports(pod))
        elif each["kind"] in ("PodDisruptionBudget", "Deployment", "StatefulSet"):
            assert len(chosen(spec["selector"]["matchLabels"], everything)) == 1
        elif each["kind"] == "NetworkPolicy":
            [pod] = chosen(spec["podSelector"]["matchLabels"], everything)
            opened = {port["port"] for rule in spec["ingress"] for port in rule["ports"]}
            assert opened == set(ports(pod))
            for rule in spec["ingress"]:
                assert "metrics" not in {port["port"] for port in rule["ports"]} or "from" in rule
    core = one(ALL, "StatefulSet", "tunnel-core")
    assert one(ALL, "Service", core["spec"]["serviceName"])["spec"]["clusterIP"] == "None"


def test_jobs_are_those_of_prometheus() -> None:
    config = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())
    services = {path.stem: yaml.safe_load(path.read_text())[0]["labels"]["service"]
                for path in (DEPLOY / "prometheus" / "targets").glob("*.yml")}  # fmt: skip
    wanted = {}
    for job in config["scrape_configs"]:
        [file] = job["file_sd_configs"][0]["files"]
        rules = {rule["target_label"]: rule["replacement"] for rule in job.get("relabel_configs", [])}
        wanted[job["job_name"]] = (
            job.get("metrics_path", "/metrics"),
            rules.get("service", services[Path(file).stem]),
            job.get("honor_labels", False),
            config["global"]["scrape_interval"],
        )
    found = manifests.scrapes(ALL)
    assert {job: (one.path, one.service, one.honor_labels, one.interval) for job, one in found.items()} == {
        job: wanted[job] for job in ("tunnel-core", "tunnel-agents", "tunnel-agent")
    }


def test_dashboards_fit_into_config_maps() -> None:
    directory = DEPLOY / "grafana"
    found = kustomization(directory)
    assert found["generatorOptions"]["labels"]["grafana_dashboard"] == "1"
    files = [file for each in found["configMapGenerator"] for file in each["files"]]
    assert sorted(files) == sorted(f"dashboards/{path.name}" for path in directory.glob("dashboards/*.json"))
    for file in files:
        assert len(json.dumps((directory / file).read_text())) < 1_000_000, "a ConfigMap holds 1 MiB"


# Pods --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pod", pods(ALL), ids=lambda pod: pod["metadata"]["labels"]["app.kubernetes.io/name"])
def test_pods_have_no_rights(pod: Object) -> None:
    spec = pod["spec"]
    [container] = spec["containers"]
    assert spec["securityContext"]["runAsNonRoot"] and spec["securityContext"]["runAsUser"] > 0
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]},
    }  # fmt: skip
    assert not spec["automountServiceAccountToken"] and not spec["enableServiceLinks"]
    assert container["name"] == pod["metadata"]["labels"]["app.kubernetes.io/name"]  # the label of its log lines
    assert {"cpu", "memory"} <= set(container["resources"]["requests"]) and container["resources"]["limits"]["memory"]
    templates = one(ALL, "StatefulSet", "tunnel-core")["spec"]["volumeClaimTemplates"]
    there = {volume["name"] for volume in spec["volumes"]} | {each["metadata"]["name"] for each in templates}
    assert {mount["name"] for mount in container["volumeMounts"]} <= there
    assert "secretKeyRef" not in json.dumps(container)  # secrets are files


def settings_of(pod: Object, config: Path) -> CoreSettings | AgentSettings:
    """What the program makes of the pod's command, with this file as its configuration."""
    [container] = pod["spec"]["containers"]
    [mount] = [each for each in container["volumeMounts"] if each["name"] == "config"]
    module = container["command"][-1]
    inside = f"{mount['mountPath']}/{'core' if module == 'tunnel.core' else 'agent'}.toml"
    arguments = list(container["args"])
    arguments[arguments.index(f"-config={inside}")] = f"-config={config}"
    environment = {each["name"]: each.get("value", "x") for each in container.get("env", [])}
    if module == "tunnel.core":
        return load_core(arguments, environment)
    [secret] = [volume for volume in pod["spec"]["volumes"] if "secret" in volume]
    [place] = [each["mountPath"] for each in container["volumeMounts"] if each["name"] == secret["name"]]
    token = config.parent / "token"
    token.write_text("tt_test\n")
    arguments[arguments.index(f"-token-file={place}/token")] = f"-token-file={token}"
    return load_agent(arguments, environment)


def certificate_of_the_example(directory: Path) -> str:
    """Puts files like those of the example's Secret there; returns where the example mounts them."""
    for name in ("tls.crt", "tls.key"):
        (directory / name).touch()
    patch = yaml.safe_load((KUBERNETES / "example" / "certificate.yaml").read_text())
    [mount] = patch["spec"]["template"]["spec"]["containers"][0]["volumeMounts"]
    return str(mount["mountPath"])


@pytest.mark.parametrize("directory", ["", "example"])
@pytest.mark.parametrize("name", ["core", "agent"])
def test_commands_and_settings_are_understood(name: str, directory: str, tmp_path: Path) -> None:
    kind = "StatefulSet" if name == "core" else "Deployment"
    pod = one(ALL, kind, f"tunnel-{name}")["spec"]["template"]
    config = tmp_path / f"{name}.toml"
    mounted = certificate_of_the_example(tmp_path)
    config.write_text((KUBERNETES / (directory or name) / f"{name}.toml").read_text().replace(mounted, str(tmp_path)))
    settings = settings_of(pod, config)
    grace = pod["spec"]["terminationGracePeriodSeconds"]
    drain = settings.drain_timeout + (settings.drain_delay if isinstance(settings, CoreSettings) else 0)
    assert grace >= drain + 10
    numbers = ports(pod)
    assert settings.metrics_addr == f":{numbers['metrics']}" and settings.log_json
    if isinstance(settings, CoreSettings):
        assert settings.drain_delay >= 5, "Kubernetes takes some seconds to stop sending visitors"
        assert (settings.public_addr, settings.agent_addr) == (f":{numbers['public']}", f":{numbers['agents']}")
        assert settings.dashboard_addr.startswith("127.0.0.1:")
    else:
        assert settings.token == "tt_test" and settings.agent_id == "x"
        assert parse_local(settings.local, settings.subdomain)
        if not directory:
            host, _, port = settings.server.partition(":")
            assert one(ALL, "Service", host)["spec"]["ports"][0]["port"] == int(port)


@pytest.mark.system
def test_probes_and_scrapes_ask_for_pages_that_are_there(tmp_path: Path) -> None:
    service = Service()
    core = RunningCore(tmp_path / "core")
    try:
        agent = RunningAgent(core, service.url)
        try:
            for pod, where in zip(pods(ALL), (core.metrics, agent.metrics), strict=True):
                [container] = pod["spec"]["containers"]
                for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
                    request = container[probe]["httpGet"]
                    assert request["port"] == "metrics"
                    poll(lambda where=where, path=request["path"]: get(where, path)[0] == 200, request["path"])
            for job, scrape in manifests.scrapes(ALL).items():
                where = agent.metrics if job == "tunnel-agent" else core.metrics
                poll(lambda where=where, path=scrape.path: get(where, path)[0] == 200, scrape.path)
        finally:
            agent.close()
    finally:
        core.close()
        service.close()
