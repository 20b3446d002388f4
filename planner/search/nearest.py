"""What would have to change for a model to fit: single changes of the request or the machine, each really tried."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, Final, NamedTuple

from planner.search.ladder import SMALLEST_UBATCH
from planner.types.machine import HOST, Device, Machine
from planner.types.plan import NearestChange, NoFit, Plan, PlanOutcome
from planner.types.request import PlanRequest
from planner.units import format_size

MAX_PROCESSES: Final = 3  # of each device that is short, the largest: the others hold little

Answer = Callable[[PlanRequest, Machine], PlanOutcome]


class Change(NamedTuple):
    """A change of the request: whether it is one here, how it is written as flags, and the fields that it sets."""

    possible: bool
    flags: str
    fields: dict[str, Any]


def nearest(
    request: PlanRequest, machine: Machine, refused: NoFit, answer: Answer, *, has_experts: bool
) -> tuple[NearestChange, ...]:
    """Return each change that could free memory where it is lacking, the gentlest first, and whether it is enough."""
    tried = []
    for change in _changes(request, refused):
        if not change.possible:
            continue
        outcome = answer(replace(request, **change.fields), machine)
        # How long a context fits is known only now.
        n_ctx = outcome.request.n_ctx if _fits(outcome) and "n_ctx" in change.fields else None
        name = change.flags if n_ctx is None else f"--ctx-size {n_ctx}"
        tried.append(NearestChange(name, _fits(outcome)))
    if _may_leave_parts(request, refused):
        tried.append(_parts_on_cpu(request, machine, refused.model.n_layers, answer, has_experts=has_experts))
    short = {cause.device for cause in refused.causes}
    for device in (device for device in machine.devices if device.name in short):
        tried += _without_processes(request, machine, device, answer)
    return tuple(tried)


def _fits(outcome: PlanOutcome) -> bool:
    return isinstance(outcome, Plan) and not outcome.fit_by_llama


def _changes(request: PlanRequest, refused: NoFit) -> tuple[Change, ...]:
    knob = refused.request  # with every knob as it was tried
    host_is_short = any(cause.device == HOST for cause in refused.causes)
    no_gpu = {"devices": (), "n_gpu_layers": None, "tensor_split": None, "main_gpu": None}
    return (
        Change(request.n_gpu_layers not in {None, 0}, "-ngl auto", {"n_gpu_layers": None}),
        Change(request.tensor_split is not None, "no --tensor-split", {"tensor_split": None}),
        Change(request.n_ctx != "auto", "--ctx-size auto", {"n_ctx": "auto", "n_ctx_per_slot": None}),
        Change(knob.cache_type_k == "f16", "-ctk q8_0 -ctv q8_0", {"cache_type_k": "q8_0", "cache_type_v": "q8_0"}),
        Change(knob.slots > 1, "--parallel 1", {"n_parallel": 1}),
        Change(
            (knob.n_ubatch or 0) > SMALLEST_UBATCH, f"--ubatch-size {SMALLEST_UBATCH}", {"n_ubatch": SMALLEST_UBATCH}
        ),
        Change(bool(knob.cache_ram_mib) and host_is_short, "--cache-ram 0", {"cache_ram_mib": 0}),
        Change(bool(knob.devices) and not host_is_short, "--no-gpu", no_gpu),
    )


def _may_leave_parts(request: PlanRequest, refused: NoFit) -> bool:
    """Say whether layers are pinned to devices that are short, and none of their parts to the host."""
    pinned = request.n_gpu_layers not in {None, "auto", 0}
    parts = request.n_cpu_moe or request.cpu_moe or request.n_cpu_ffn or request.override_tensor
    return pinned and not parts and any(cause.device != HOST for cause in refused.causes)


def _parts_on_cpu(
    request: PlanRequest, machine: Machine, n_layers: int, answer: Answer, *, has_experts: bool
) -> NearestChange:
    """Return the fewest first layers whose experts, or feed-forward matrices, on the CPU would be enough."""
    flag, field = ("-ncmoe", "n_cpu_moe") if has_experts else ("-ncffn", "n_cpu_ffn")

    def fits(count: int) -> bool:
        return _fits(answer(replace(request, **{field: count}), machine))  # type: ignore[arg-type]

    if not fits(n_layers):
        return NearestChange(f"{flag} {n_layers}", fits=False)
    low, high = 0, n_layers
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return NearestChange(f"{flag} {high}", fits=True)


def _without_processes(
    request: PlanRequest, machine: Machine, device: Device, answer: Answer
) -> Iterator[NearestChange]:
    """Yield what it would change if one of the processes on a device were gone, the largest first."""
    known = [(process.used_bytes, process) for process in device.processes if process.used_bytes]
    for used_bytes, process in sorted(known, key=lambda each: (-each[0], each[1].pid))[:MAX_PROCESSES]:
        free_bytes = None if device.free_bytes is None else device.free_bytes + used_bytes
        freed = replace(device, free_bytes=free_bytes)
        others = tuple(freed if each is device else each for each in machine.devices)
        pools = tuple(
            replace(pool, free_bytes=pool.free_bytes + used_bytes)
            if pool.id == device.pool and pool.free_bytes is not None
            else pool
            for pool in machine.pools
        )
        outcome = answer(request, replace(machine, devices=others, pools=pools))
        name = f"{device.name} without {process.name or 'process'} ({process.pid}), {format_size(used_bytes)}"
        yield NearestChange(name, _fits(outcome))
