"""Prometheus: one table of everything that is measured, and the collectors that fill it.

Gauges and counters of the runtime are read from ``runtime.snapshot()`` at scrape time, so that they cannot drift from
``/status`` and that a scrape never wakes a model. What only the gateway sees (requests, latencies) is counted where it
happens. Labels are bounded by the folder: only ids of known models become one. ``docs/metrics.md`` lists the table.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Final, Literal

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.registry import Collector

from planner.types import Device
from supervisor.api import DeviceLedger, ModelCounters, RunnerView, Runtime, Snapshot
from supervisor.status.view import is_ready, measured_on, planned_on

CONTENT_TYPE: Final = CONTENT_TYPE_PLAIN_0_0_4
# A first byte takes milliseconds from a warm runner and minutes where a large model is loaded for it.
LATENCY_BUCKETS_S: Final = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
# The ``model`` label of a request that named no model of the folder.
NO_MODEL: Final = "(none)"

Samples = Iterable[tuple[tuple[str, ...], float | None]]


@dataclass(frozen=True, slots=True)
class MetricRow:
    """One line of the table. ``read`` takes its samples from a snapshot; None: the gateway counts it itself."""

    name: str
    kind: Literal["gauge", "counter", "histogram"]
    labels: tuple[str, ...]
    help: str
    read: Callable[[Snapshot], Samples] | None = None


def _one(value: Callable[[Snapshot], float | None]) -> Callable[[Snapshot], Samples]:
    return lambda snapshot: [((), value(snapshot))]


def _by_model(value: Callable[[RunnerView], float | None]) -> Callable[[Snapshot], Samples]:
    return lambda snapshot: [((runner.model,), value(runner)) for runner in snapshot.runners]


def _counted(value: Callable[[ModelCounters], int]) -> Callable[[Snapshot], Samples]:
    return lambda snapshot: [
        ((model.id,), value(snapshot.counters.get(model.id, ModelCounters()))) for model in snapshot.models
    ]


def _by_device(value: Callable[[Device, Snapshot], float | None]) -> Callable[[Snapshot], Samples]:
    def read(snapshot: Snapshot) -> Samples:
        machine = snapshot.machine
        for device in () if machine is None else (*machine.devices, machine.host):
            yield (device.name, str(device.kind)), value(device, snapshot)

    return read


def _by_account(value: Callable[[DeviceLedger], float]) -> Callable[[Snapshot], Samples]:
    def read(snapshot: Snapshot) -> Samples:
        for account in snapshot.ledger:
            yield (account.device,), value(account)

    return read


def _uses(snapshot: Snapshot) -> Iterator[tuple[tuple[str, str], int | None, int | None]]:
    for runner in snapshot.runners:
        for use in runner.uses:
            yield (runner.model, use.device), use.planned_bytes, use.measured_bytes


def _deviation(snapshot: Snapshot) -> Samples:
    for labels, planned, measured in _uses(snapshot):
        yield labels, None if planned is None or measured is None else measured - planned


METRICS: Final = (
    MetricRow(
        "loadmaster_build_info",
        "gauge",
        ("version", "llama_version"),
        "Always 1; the labels name this build and the llama-server that it launches.",
        lambda snapshot: [((snapshot.version, snapshot.llama_version or "unknown"), 1)],
    ),
    MetricRow(
        "loadmaster_start_time_seconds",
        "gauge",
        (),
        "When the service started, in seconds since the epoch.",
        _one(lambda snapshot: snapshot.started_at),
    ),
    MetricRow(
        "loadmaster_ready",
        "gauge",
        (),
        "1 while /readyz answers 200, else 0.",
        _one(is_ready),
    ),
    MetricRow(
        "loadmaster_queue_length",
        "gauge",
        (),
        "Requests that wait for a runner.",
        _one(lambda snapshot: snapshot.queue_length),
    ),
    MetricRow(
        "loadmaster_queue_limit",
        "gauge",
        (),
        "MAX_QUEUE: as many requests may wait.",
        _one(lambda snapshot: snapshot.queue_limit),
    ),
    MetricRow(
        "loadmaster_models",
        "gauge",
        ("role",),
        "Models in the folder.",
        lambda snapshot: [((str(model.role),), 1) for model in snapshot.models],
    ),
    MetricRow(
        "loadmaster_models_unusable",
        "gauge",
        (),
        "Models in the folder that cannot be served; /status says why.",
        _one(lambda snapshot: sum(model.problem is not None for model in snapshot.models)),
    ),
    MetricRow(
        "loadmaster_runner_state",
        "gauge",
        ("model", "role", "state"),
        "1 for the state that a model's runner is in.",
        lambda snapshot: [((runner.model, str(runner.role), runner.state), 1) for runner in snapshot.runners],
    ),
    MetricRow(
        "loadmaster_runner_requests_in_flight",
        "gauge",
        ("model",),
        "Requests that a runner works on.",
        _by_model(lambda runner: runner.in_flight),
    ),
    MetricRow(
        "loadmaster_runner_requests_waiting",
        "gauge",
        ("model",),
        "Requests that wait for this runner.",
        _by_model(lambda runner: runner.waiting),
    ),
    MetricRow(
        "loadmaster_runner_slots",
        "gauge",
        ("model",),
        "Conversations that a runner serves at once (NUM_PARALLEL).",
        _by_model(lambda runner: runner.n_parallel),
    ),
    MetricRow(
        "loadmaster_runner_context_tokens",
        "gauge",
        ("model",),
        "Tokens that each conversation of a runner may hold.",
        _by_model(lambda runner: runner.n_ctx_per_slot),
    ),
    MetricRow(
        "loadmaster_runner_load_seconds",
        "gauge",
        ("model",),
        "How long the runner took from launch to ready.",
        _by_model(lambda runner: runner.load_seconds),
    ),
    MetricRow(
        "loadmaster_runner_planned_bytes",
        "gauge",
        ("model", "device"),
        "Bytes that a runner's plan takes on a device.",
        lambda snapshot: [(labels, planned) for labels, planned, _ in _uses(snapshot)],
    ),
    MetricRow(
        "loadmaster_runner_measured_bytes",
        "gauge",
        ("model", "device"),
        "Bytes that the runner reported to have reserved on a device.",
        lambda snapshot: [(labels, measured) for labels, _, measured in _uses(snapshot)],
    ),
    MetricRow(
        "loadmaster_runner_deviation_bytes",
        "gauge",
        ("model", "device"),
        "Measured minus planned bytes; absent while one of them is unknown.",
        _deviation,
    ),
    MetricRow(
        "loadmaster_device_total_bytes",
        "gauge",
        ("device", "kind"),
        "Memory of a device.",
        _by_device(lambda device, _: device.total_bytes),
    ),
    MetricRow(
        "loadmaster_device_free_bytes",
        "gauge",
        ("device", "kind"),
        "Free memory of a device, without what its driver reserves.",
        _by_device(lambda device, _: device.free_bytes),
    ),
    MetricRow(
        "loadmaster_device_planned_bytes",
        "gauge",
        ("device", "kind"),
        "Bytes that all runners' plans take on a device; absent where one is unknown.",
        _by_device(lambda device, snapshot: planned_on(device.name, snapshot.runners)),
    ),
    MetricRow(
        "loadmaster_device_measured_bytes",
        "gauge",
        ("device", "kind"),
        "Bytes that all runners reported on a device; absent where one is unknown.",
        _by_device(lambda device, snapshot: measured_on(device.name, snapshot.runners)),
    ),
    MetricRow(
        "loadmaster_device_held_bytes",
        "gauge",
        ("device",),
        "Bytes that our runners hold on a device by the ledger, promises to loads among them.",
        _by_account(lambda account: account.held_bytes),
    ),
    MetricRow(
        "loadmaster_device_promised_bytes",
        "gauge",
        ("device",),
        "The part of it that loads in progress are about to take.",
        _by_account(lambda account: account.promised_bytes),
    ),
    MetricRow(
        "loadmaster_device_usable",
        "gauge",
        ("device", "kind"),
        "1 where the installed llama-server can use the device, else 0.",
        _by_device(lambda device, _: device.usable),
    ),
    MetricRow(
        "loadmaster_launches_total",
        "counter",
        ("model",),
        "Runners started.",
        _counted(lambda counters: counters.launches),
    ),
    MetricRow(
        "loadmaster_crashes_total",
        "counter",
        ("model",),
        "Runners that died after they had been ready.",
        _counted(lambda counters: counters.crashes),
    ),
    MetricRow(
        "loadmaster_load_failures_total",
        "counter",
        ("model",),
        "Runners that died or were given up before they were ready.",
        _counted(lambda counters: counters.load_failures),
    ),
    MetricRow(
        "loadmaster_unloads_total",
        "counter",
        ("model",),
        "Runners that were stopped on purpose.",
        _counted(lambda counters: counters.unloads),
    ),
    MetricRow(
        "loadmaster_evictions_total",
        "counter",
        ("model",),
        "Runners that were stopped for the memory that another model or program needed.",
        _counted(lambda counters: counters.evictions),
    ),
    MetricRow(
        "loadmaster_out_of_memory_total",
        "counter",
        ("model",),
        "Runners that ran out of memory, while loading or serving.",
        _counted(lambda counters: counters.out_of_memory),
    ),
    MetricRow(
        "loadmaster_requests_granted_total",
        "counter",
        ("model",),
        "Requests that were given a runner.",
        _counted(lambda counters: counters.requests_granted),
    ),
    MetricRow(
        "loadmaster_requests_refused_total",
        "counter",
        ("model",),
        "Requests that were refused one.",
        _counted(lambda counters: counters.requests_refused),
    ),
    MetricRow(
        "loadmaster_http_requests_total",
        "counter",
        ("endpoint", "model", "status"),
        "Requests answered, by HTTP status; 499: the client left before the end.",
    ),
    MetricRow(
        "loadmaster_http_requests_in_flight",
        "gauge",
        ("endpoint",),
        "Requests that are being answered.",
    ),
    MetricRow(
        "loadmaster_http_first_byte_seconds",
        "histogram",
        ("endpoint", "model"),
        "From the request's arrival to the first byte of a runner's answer, waiting and loading included.",
    ),
    MetricRow(
        "loadmaster_http_request_seconds",
        "histogram",
        ("endpoint", "model"),
        "From a request's arrival to the end of its answer.",
    ),
    MetricRow(
        "loadmaster_http_broken_streams_total",
        "counter",
        ("model",),
        "Answers that had begun when their runner was lost.",
    ),
)


class HttpMetrics:
    """What the gateway counts as it happens. One instance belongs to one application and its own registry."""

    def __init__(self, registry: CollectorRegistry) -> None:
        """Register the rows of the table that no snapshot can fill."""
        self.requests = Counter(*_declared("loadmaster_http_requests_total"), registry=registry)
        self.in_flight = Gauge(*_declared("loadmaster_http_requests_in_flight"), registry=registry)
        self.first_byte = Histogram(
            *_declared("loadmaster_http_first_byte_seconds"), registry=registry, buckets=LATENCY_BUCKETS_S
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
