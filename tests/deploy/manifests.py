"""Kubernetes' files as objects, and what the Prometheus operator would make of the monitors among them.

load("core")                     # every object that this kustomization lists, those of its bases included
scrapes(objects)                 # {job: Scrape(path, service, honor_labels, pods)}: as in a scrape configuration
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

KUBERNETES = Path(__file__).parents[2] / "deploy" / "kubernetes"
Object = dict[str, Any]


def kustomization(directory: Path) -> Object:
    found: Object = yaml.safe_load((directory / "kustomization.yaml").read_text())
    return found


def load(name: str) -> list[Object]:
    return [*_load((KUBERNETES / name).resolve())]


def _load(directory: Path) -> Iterator[Object]:
    for resource in kustomization(directory).get("resources", []):
        path = (directory / resource).resolve()
        if path.is_dir():
            yield from _load(path)
        else:
            yield from yaml.safe_load_all(path.read_text())


def one(objects: list[Object], kind: str, name: str) -> Object:
    [found] = [each for each in objects if (each["kind"], each["metadata"]["name"]) == (kind, name)]
    return found


def pods(objects: list[Object]) -> list[Object]:
    """The pod templates of all workloads."""
    return [each["spec"]["template"] for each in objects if each["kind"] in ("StatefulSet", "Deployment")]


def ports(pod: Object) -> dict[str, int]:
    [container] = pod["spec"]["containers"]
    return {port["name"]: port["containerPort"] for port in container["ports"]}


def chosen(selector: dict[str, str], objects: list[Object]) -> list[Object]:
    """Those with all these labels."""
    return [each for each in objects if selector.items() <= each["metadata"]["labels"].items()]


@dataclass(frozen=True)
class Scrape:
    path: str
    service: str
    honor_labels: bool
    port: int
    interval: str


def scrapes(objects: list[Object]) -> dict[str, Scrape]:
    """By job. Asserts that each monitor finds exactly one service or pod, and a port of that name."""
    found: dict[str, Scrape] = {}
    services = [each for each in objects if each["kind"] == "Service"]
    for monitor in objects:
        if monitor["kind"] not in ("ServiceMonitor", "PodMonitor"):
            continue
        spec = monitor["spec"]
        if monitor["kind"] == "ServiceMonitor":
            [source] = chosen(spec["selector"]["matchLabels"], services)
            [pod] = chosen(source["spec"]["selector"], pods(objects))
            numbers = {port["name"]: ports(pod)[port["targetPort"]] for port in source["spec"]["ports"]}
        else:
            [source] = chosen(spec["selector"]["matchLabels"], pods(objects))
            numbers = ports(source)
        for endpoint in spec.get("endpoints", []) + spec.get("podMetricsEndpoints", []):
            labels = {"job": source["metadata"]["labels"][spec["jobLabel"]]}
            labels.update({rule["targetLabel"]: rule["replacement"] for rule in endpoint["relabelings"]
                           if "replacement" in rule})  # fmt: skip
            assert labels["job"] not in found, f"two scrapes have the job {labels['job']}"
            honor = endpoint.get("honorLabels", False)
            found[labels["job"]] = Scrape(
                endpoint["path"], labels["service"], honor, numbers[endpoint["port"]], endpoint["interval"]
            )
    return found
