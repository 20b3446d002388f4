"""An outcome as one sentence and as JSON. Decides nothing: whatever is said here was decided by the search.

The JSON is a contract that scripts rely on (``SCHEMA``); ``planner.explain_text`` renders the same for a terminal.
"""

from __future__ import annotations

from typing import Any, Final, assert_never

from planner import flags, overrides
from planner.types.machine import DeviceKind
from planner.types.plan import DecodeEstimate, NoFit, PlacementKind, Plan, PlanOutcome, Refused
from planner.types.request import PlanRequest, Role
from planner.types.usage import DeviceUsage, HostDetail
from planner.units import format_size

SCHEMA: Final = 1
BUILT_IN_OVERHEAD: Final = "the driver and its libraries are known to take about that much beside the buffers"


def headline(outcome: PlanOutcome) -> str:
    """Return the sentence that a newcomer reads first, without a full stop."""
    match outcome:
        case Plan():
            return _plan_headline(outcome)
        case NoFit():
            worst = max(outcome.causes, key=lambda cause: cause.shortfall_bytes, default=None)
            lacks = "" if worst is None else f"{worst.device} lacks {format_size(worst.shortfall_bytes)}"
            return ": ".join(part for part in ("Does not fit", outcome.because, lacks) if part)
        case Refused():
            return f"llama.cpp would refuse this: {outcome.reason}"
        case _:
            assert_never(outcome)


def _plan_headline(plan: Plan) -> str:
    capacity = _capacity(plan.request, plan.n_ctx_per_slot)
    if plan.fit_by_llama:
        return "Can run, but how much memory it takes is not known beforehand: llama.cpp places it while it loads"
    if plan.is_known:
        return _where(plan, capacity)
    where = _where(plan, capacity).replace("Fits", "Probably fits", 1)
    return f"{where} (how much memory computing takes is not known)"


def _where(plan: Plan, capacity: str) -> str:
    n_layers = len(plan.placement.layer_devices)
    on_gpu = sum(index >= 0 for index in plan.placement.layer_devices)
    match plan.placement.kind:
        case PlacementKind.GPU:
            where = f"on {_gpus(plan)}: {on_gpu} of {n_layers} layers"
            spilled = overrides.spilled(plan.request)
            return f"Runs {where}, {spilled}, {capacity}" if spilled else f"Fits {where}, {capacity}"
        case PlacementKind.GPU_AND_CPU:
            return f"Runs, but slowly: {on_gpu} of {n_layers} layers fit on {_gpus(plan)}, {capacity}"
        case PlacementKind.CPU:
            return f"Runs on the CPU alone, slowly: {capacity}"


def _gpus(plan: Plan) -> str:
    used = [usage for usage in plan.usages if usage.layers and usage.kind is not DeviceKind.HOST]
    if any(usage.kind is DeviceKind.RPC for usage in used):
        return "the remote device" if len(used) == 1 else f"{len(used)} devices"
    return "the GPU" if len(used) == 1 else f"{len(used)} GPUs"


def _capacity(request: PlanRequest, n_ctx_per_slot: int | None) -> str:
    tokens = "a context of unknown length" if n_ctx_per_slot is None else f"{n_ctx_per_slot:,} tokens"
    if request.role is not Role.CHAT:
        return f"texts of up to {tokens}"
    return f"one conversation of {tokens}" if request.slots == 1 else f"{request.slots} conversations of {tokens} each"


def overhead_because(usage: DeviceUsage) -> str | None:
    """Return where the overhead of this device comes from, None where none is charged and nobody said so."""
    return usage.overhead_because or (BUILT_IN_OVERHEAD if usage.overhead_bytes else None)


# ---------------------------------------------------------------------------------------------------------------------
# JSON


def to_json(outcome: PlanOutcome) -> dict[str, Any]:
    """Return the object that ``planner explain --json`` prints. Unknown is None, never 0."""
    plan = outcome if isinstance(outcome, Plan) else None
    no_fit = outcome if isinstance(outcome, NoFit) else None
    is_placed = plan is None or not plan.fit_by_llama
    rows = [] if isinstance(outcome, Refused) else _devices(outcome.usages, outcome.host, is_placed=is_placed)
    return {
        "schema": SCHEMA,
        "fits": plan is not None,
        "placement": plan.placement.kind.value if plan is not None and is_placed else None,
        "headline": headline(outcome),
        "context_per_slot": None if isinstance(outcome, Refused) else outcome.n_ctx_per_slot,
        "model": _model(outcome),
        "request": flags.as_json(outcome.request),
        "devices": rows,
        "decode_tokens_per_second": plan and plan.decode and _decode(plan.decode),
        "launch": plan and {"argv": list(plan.launch.argv), "env": dict(plan.launch.env)},
        "decisions": [{"step": d.step, "chosen": d.chosen, "because": d.because} for d in outcome.decisions],
        "warnings": list(outcome.warnings),
        "refused": {"reason": outcome.reason} if isinstance(outcome, Refused) else None,
        "no_fit": no_fit and _no_fit(no_fit),
    }


def _model(outcome: PlanOutcome) -> dict[str, Any]:
    model = outcome.model
    return {
        "path": model.path,
        "name": model.name,
        "architecture": model.architecture,
        "quantization": model.quantization,
        "file_bytes": model.file_bytes,
        "tensor_bytes": model.tensor_bytes,
        "n_params": model.n_params,
        "n_layers": model.n_layers,
        "n_ctx_train": model.n_ctx_train,
    }


def _decode(decode: DecodeEstimate) -> dict[str, Any]:
    return {
        "estimate": round(decode.tokens_per_second, 2),
        "basis": decode.basis,
        "parts": [
            {
                "place": part.place,
                "read_bytes": part.read_bytes,
                "bytes_per_second": part.bytes_per_second,
                "assumed": not part.is_known,
                "seconds": part.seconds,
            }
            for part in decode.parts
        ],
        "crossings_seconds": decode.crossings_s,
    }


def _devices(usages: tuple[DeviceUsage, ...], host: HostDetail, *, is_placed: bool) -> list[dict[str, Any]]:
    return [
        _device(usage, is_placed=is_placed) | (_host(host) if usage.kind is DeviceKind.HOST else {}) for usage in usages
    ]


def _device(usage: DeviceUsage, *, is_placed: bool) -> dict[str, Any]:
    """Return one row. What llama-server itself will place has no layers yet that anybody knows."""
    open_yet = not is_placed and usage.model.bytes is None
    return {
        "name": usage.name,
        "kind": usage.kind.value,
        "total_bytes": usage.total_bytes,
        "free_bytes": usage.free_bytes,
        "budget_bytes": usage.budget_bytes,
        "layers": None if open_yet else list(usage.layers),
        "output": None if open_yet else usage.output,
        "model_bytes": usage.model.bytes,
        "context_bytes": usage.context.bytes,
        "compute_bytes": usage.compute.bytes,
        "overhead_bytes": usage.overhead_bytes,
        "overhead_because": overhead_because(usage),
        "planned_bytes": usage.planned_bytes,
        "image_reserve_bytes": usage.image_reserve_bytes,
        "source": {
            "model": usage.model.source.value,
            "context": usage.context.source.value,
            "compute": usage.compute.source.value,
        },
    }


def _host(host: HostDetail) -> dict[str, int | None]:
    return {
        "mapped_bytes": host.mapped_bytes,
        "resident_bytes": host.resident_bytes,
        "allocated_bytes": host.allocated_bytes,
        "pinned_bytes": host.pinned_bytes,
        "output_buffer_bytes": host.output_buffer_bytes,
        "prompt_cache_bytes": host.prompt_cache_bytes,
        "checkpoint_bytes": host.checkpoint_bytes,
        "image_reserve_bytes": host.image_reserve_bytes,
    }


def _no_fit(no_fit: NoFit) -> dict[str, Any]:
    return {
        "because": no_fit.because or None,
        "causes": [
            {
                "device": cause.device,
                "needed_bytes": cause.needed_bytes,
                "available_bytes": cause.available_bytes,
                "shortfall_bytes": cause.shortfall_bytes,
            }
            for cause in no_fit.causes
        ],
        "nearest": [{"change": near.change, "fits": near.fits} for near in no_fit.nearest],
    }
