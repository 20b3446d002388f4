"""Prometheus: the collectors that fill the table of metrics, and the text that a scrape gets.

Gauges and counters of the runtime are read from ``runtime.snapshot()`` at scrape time, so that they cannot drift from
``/status`` and that a scrape never wakes a model. What only the gateway sees (requests, latencies) is counted where it
happens.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any, Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.registry import Collector

from supervisor.api.runtime import Runtime
from supervisor.status.metric_table import METRICS, MetricRow, Samples

CONTENT_TYPE: Final = CONTENT_TYPE_PLAIN_0_0_4
# A first byte takes milliseconds from a warm runner and minutes where a large model is loaded for it.
LATENCY_BUCKETS_S: Final = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
# The ``model`` label of a request that named no model of the folder.
NO_MODEL: Final = "(none)"


class HttpMetrics:
    """What the gateway counts as it happens. One instance belongs to one application and its own registry."""

    def __init__(self, registry: CollectorRegistry) -> None:
        """Register the rows of the table that no snapshot can fill."""
        self.requests = Counter(*_declared("loadmaster_http_requests_total"), registry=registry)
        self.in_flight = Gauge(*_declared("loadmaster_http_requests_in_flight"), registry=registry)
        self.first_byte = Histogram(
            *_declared("loadmaster_http_first_byte_seconds"), registry=registry, buckets=LATENCY_BUCKETS_S
        )
        self.first_token = Histogram(
            *_declared("loadmaster_first_token_seconds"), registry=registry, buckets=LATENCY_BUCKETS_S
        )
        self.duration = Histogram(
            *_declared("loadmaster_http_request_seconds"), registry=registry, buckets=LATENCY_BUCKETS_S
        )
        self.broken_streams = Counter(*_declared("loadmaster_http_broken_streams_total"), registry=registry)


class SnapshotCollector(Collector):
    """Fills every row that has a ``read`` from one snapshot per scrape."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime

    def describe(self) -> Iterable[Metric]:
        """Name the metrics without taking a snapshot: registering must not need a runtime that is up."""
        return [_family(row) for row in METRICS if row.read]

    def collect(self) -> Iterator[Metric]:
        """Yield all families of one moment; a sample whose value is unknown is left out."""
        snapshot = self._runtime.snapshot()
        for row in METRICS:
            if row.read:
                family = _family(row)
                for labels, value in _summed(row.read(snapshot)).items():
                    family.add_metric([_text(label) for label in labels], value)
                yield family


class Exposition:
    """A registry of one application's metrics, and its text."""

    def __init__(self, runtime: Runtime) -> None:
        # The library would add a ``_created`` gauge to every counter; it can only be told so for the whole process.
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self._registry = CollectorRegistry()
        self._registry.register(SnapshotCollector(runtime))
        self.http = HttpMetrics(self._registry)

    def text(self) -> bytes:
        """Return the answer to a scrape, in the text format 0.0.4."""
        return generate_latest(self._registry)


def _declared(name: str) -> tuple[str, str, tuple[str, ...]]:
    row = next(row for row in METRICS if row.name == name)
    return row.name, row.help, row.labels


def _family(row: MetricRow) -> Any:
    family = CounterMetricFamily if row.kind == "counter" else GaugeMetricFamily
    return family(row.name, row.help, labels=row.labels)


def _summed(samples: Samples) -> dict[tuple[str, ...], float]:
    """Add up samples of equal labels: two runners of one model are one line."""
    totals: defaultdict[tuple[str, ...], float] = defaultdict(float)
    for labels, value in samples:
        if value is not None:
            totals[labels] += value
    return dict(totals)


def _text(label: str) -> str:
    """Return the label as UTF-8 can hold it; a file name need not be valid UTF-8."""
    return label.encode("utf-8", "replace").decode()
