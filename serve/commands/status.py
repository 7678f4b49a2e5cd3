"""List the servers that were started by name, and how busy they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from serve.deployment import Deployment

_HEADINGS = ("name", "url", "source", "since", "state", "requests", "refused", "images", "queue")

_ROUTE = "/v1/images"


@dataclass(frozen=True, kw_only=True)
class StatusConfig:
    """Settings of `python -m serve status`: none."""


def run(config: StatusConfig) -> None:
    """Print the table. Servers that have ended are listed once more, and forgotten."""
    from serve.deployment import all_deployments, forget

    found = all_deployments()
    if not found:
        print("no server; python -m serve up NAME --source ... starts one")
        return
    rows = [_HEADINGS, *(_row(deployment) for deployment in found)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print(
            "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip()
        )
    for deployment in found:
        if deployment.is_gone:
            forget(deployment)
            print(f"{deployment.name} has ended by itself; its log: {deployment.log}")


def _row(deployment: Deployment) -> tuple[str, ...]:
    source = deployment.settings["server"]["source"]
    facts = (deployment.name, deployment.url, source, deployment.since)
    return (*facts, *_activity(deployment))


def _activity(deployment: Deployment) -> tuple[str, ...]:
    """State; requests with images, requests refused as too many, images, images that wait."""
    from serve.client import ServerError

    unknown = ("-",) * 4
    if not deployment.process.is_here:
        return (f"on {deployment.process.host}", *unknown)
    if not deployment.process.is_alive:
        return ("ended", *unknown)
    client = deployment.client(timeout_sec=5)
    if not client.is_ready():
        return ("not ready", *unknown)  # it starts, or drains
    if num_replicas := deployment.settings["replicas"]["replicas"]:
        return (f"{num_replicas} replicas", *unknown)  # each counts for itself
    try:
        metrics = client.metrics()
    except ServerError as error:
        return (f"status {error.status}", *unknown)
    counts = (
        _total(metrics, "latentmill_requests_total", status="200", route=_ROUTE),
        _total(metrics, "latentmill_requests_total", status="429", route=_ROUTE),
        _total(metrics, "latentmill_images_total"),
        _total(metrics, "latentmill_queued_images"),
    )
    return ("ready", *(f"{count:,.0f}" for count in counts))


def _total(metrics: str, name: str, **labels: str) -> float:
    """Sum over the samples of this name that have these labels."""
    from prometheus_client.parser import text_string_to_metric_families

    return sum(
        sample.value
        for family in text_string_to_metric_families(metrics)
        for sample in family.samples
        if sample.name == name and labels.items() <= sample.labels.items()
    )
