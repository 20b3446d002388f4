"""The table of everything that is measured. ``docs/metrics.md`` lists it.

Labels are bounded by the folder: only ids of known models become one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Final, Literal

from planner.types import Device
from supervisor.api.snapshot import DeviceLedger, ModelCounters, RunnerView, Snapshot, TokenCounts
from supervisor.status.view import is_ready, measured_on, planned_on

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


def _by_tokens(value: Callable[[TokenCounts], float]) -> Callable[[Snapshot], Samples]:
    def read(snapshot: Snapshot) -> Samples:
        for model in snapshot.models:
            counters = snapshot.counters.get(model.id)
            if counters is not None and counters.tokens is not None:
                yield (model.id,), value(counters.tokens)

    return read


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
        "loadmaster_runner_restarts",
        "gauge",
        ("model",),
        "How often the runner was started again after it had failed.",
        _by_model(lambda runner: runner.restarts),
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
        "loadmaster_prompt_tokens_total",
        "counter",
        ("model",),
        "Tokens of prompts that runners have read, without those found in their caches.",
        _by_tokens(lambda tokens: tokens.prompt),
    ),
    MetricRow(
        "loadmaster_prompt_seconds_total",
        "counter",
        ("model",),
        "The time that this took them.",
        _by_tokens(lambda tokens: tokens.prompt_s),
    ),
    MetricRow(
        "loadmaster_generated_tokens_total",
        "counter",
        ("model",),
        "Tokens that runners have generated, of requests that have ended.",
        _by_tokens(lambda tokens: tokens.generated),
    ),
    MetricRow(
        "loadmaster_generated_seconds_total",
        "counter",
        ("model",),
        "The time that this took them, requests that ran side by side added up.",
        _by_tokens(lambda tokens: tokens.generated_s),
    ),
    MetricRow(
        "loadmaster_first_token_seconds",
        "histogram",
        ("model",),
        "From a streamed request's arrival to its answer's first event, waiting and loading included.",
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
