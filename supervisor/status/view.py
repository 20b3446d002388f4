"""``Snapshot`` -> the JSON of ``GET /status``, schema 1. ``docs/status.md`` explains every key.

Bytes are integers, times are seconds since the epoch, unknown is ``null``. Keys are only ever added within a schema.
"""

from __future__ import annotations

from typing import Any, Final

from planner.types import Device, Machine
from supervisor.api.models import ModelView
from supervisor.api.snapshot import DeviceLedger, FailureView, ModelCounters, RunnerView, Snapshot, TokenCounts

SCHEMA: Final = 1
# A model that no runner serves at the moment, and one that none can serve.
UNLOADED: Final = "unloaded"
UNUSABLE: Final = "unusable"

Json = dict[str, Any]


def status(snapshot: Snapshot) -> Json:
    """Return everything that ``GET /status`` tells, ready for ``json.dumps``."""
    return {
        "schema": SCHEMA,
        "version": snapshot.version,
        "started_at": snapshot.started_at,
        "now": snapshot.now,
        "ready": is_ready(snapshot),
        "not_ready": list(snapshot.not_ready),
        "draining": snapshot.draining,
        "llama_server": {"path": snapshot.llama_server, "version": snapshot.llama_version},
        "queue": {"waiting": snapshot.queue_length, "limit": snapshot.queue_limit},
        "devices": None if snapshot.machine is None else _devices(snapshot.machine, snapshot),
        "runners": [_runner(runner) for runner in snapshot.runners],
        "models": [model_entry(model, snapshot) for model in snapshot.models],
        "warnings": [*snapshot.warnings, *(snapshot.machine.warnings if snapshot.machine else ())],
    }


def is_ready(snapshot: Snapshot) -> bool:
    """Say whether new requests are welcome: the truth behind ``/readyz``."""
    return not snapshot.draining and not snapshot.not_ready


def model_state(model: ModelView, snapshot: Snapshot) -> str:
    """Return the state of the runner that serves this model, ``unloaded``, or ``unusable``."""
    for runner in snapshot.runners:
        if runner.model == (model.runner or model.id):
            return runner.state
    return UNLOADED if model.problem is None else UNUSABLE


def planned_on(device: str, runners: tuple[RunnerView, ...]) -> int | None:
    """Return the bytes that the runners' plans take on a device together, None where one of them is not known."""
    parts = [use.planned_bytes for runner in runners for use in runner.uses if use.device == device]
    return None if None in parts else sum(part or 0 for part in parts)


def measured_on(device: str, runners: tuple[RunnerView, ...]) -> int | None:
    """Return the bytes that the runners reported on a device together, None where one has not (yet)."""
    parts = [use.measured_bytes for runner in runners for use in runner.uses if use.device == device]
    return None if None in parts else sum(part or 0 for part in parts)


def model_entry(model: ModelView, snapshot: Snapshot) -> Json:
    """Return one model of the folder, its state, and what happened to it since the service started."""
    counters = snapshot.counters.get(model.id, ModelCounters())
    return {
        "id": model.id,
        "state": model_state(model, snapshot),
        "role": str(model.role),
        "path": model.path,
        "architecture": model.architecture,
        "file_bytes": model.file_bytes,
        "modified_at": model.modified_at,
        "context_train": model.n_ctx_train,
        "context_per_slot": model.n_ctx_per_slot,
        "problem": model.problem,
        "counters": _counters(counters),
        "tokens": None if counters.tokens is None else _tokens(counters.tokens),
    }


def _devices(machine: Machine, snapshot: Snapshot) -> list[Json]:
    accounts = {account.device: account for account in snapshot.ledger}
    return [
        _device(device, snapshot.runners) | _account(accounts.get(device.name))
        for device in (*machine.devices, machine.host)
    ]


def _account(account: DeviceLedger | None) -> Json:
    return {
        "held_bytes": None if account is None else account.held_bytes,
        "promised_bytes": None if account is None else account.promised_bytes,
        "settling_bytes": None if account is None else account.settling_bytes,
        "cap_bytes": None if account is None else account.cap_bytes,
        "difference_bytes": None if account is None else account.difference_bytes,
    }


def _device(device: Device, runners: tuple[RunnerView, ...]) -> Json:
    return {
        "name": device.name,
        "kind": str(device.kind),
        "description": device.description,
        "uuid": device.uuid,
        "pci_bus_id": device.pci_bus_id,
        "pool": device.pool,
        "total_bytes": device.total_bytes,
        "free_bytes": device.free_bytes,
        "planned_bytes": planned_on(device.name, runners),
        "measured_bytes": measured_on(device.name, runners),
        "usable": device.usable,
        "why_not": device.why_not,
        "processes": [{"pid": use.pid, "name": use.name, "used_bytes": use.used_bytes} for use in device.processes],
    }


def _runner(runner: RunnerView) -> Json:
    return {
        "id": runner.id,
        "model": runner.model,
        "role": str(runner.role),
        "state": runner.state,
        "since": runner.since,
        "pid": runner.pid,
        "url": runner.url,
        "in_flight": runner.in_flight,
        "waiting": runner.waiting,
        "restarts": runner.restarts,
        "context_per_slot": runner.n_ctx_per_slot,
        "slots": runner.n_parallel,
        "load_seconds": runner.load_seconds,
        "expires_at": runner.expires_at,
        "retry_at": runner.retry_at,
        "devices": [
            {"device": use.device, "planned_bytes": use.planned_bytes, "measured_bytes": use.measured_bytes}
            for use in runner.uses
        ],
        "plan": None if runner.plan is None else dict(runner.plan),
        "last_failure": None if runner.last_failure is None else _failure(runner.last_failure),
        "remedies": [{"step": step.step, "chosen": step.chosen, "because": step.because} for step in runner.remedies],
    }


def _failure(failure: FailureView) -> Json:
    return {"at": failure.at, "reason": failure.reason, "exit": failure.exit, "log_tail": list(failure.log_tail)}


def _counters(counters: ModelCounters) -> Json:
    return {
        "launches": counters.launches,
        "crashes": counters.crashes,
        "load_failures": counters.load_failures,
        "requests_granted": counters.requests_granted,
        "requests_refused": counters.requests_refused,
        "unloads": counters.unloads,
        "evictions": counters.evictions,
        "out_of_memory": counters.out_of_memory,
    }


def _tokens(tokens: TokenCounts) -> Json:
    return {
        "prompt": tokens.prompt,
        "generated": tokens.generated,
        "prompt_per_second": tokens.prompt / tokens.prompt_s if tokens.prompt_s else None,
        "generated_per_second": tokens.generated / tokens.generated_s if tokens.generated_s else None,
    }
