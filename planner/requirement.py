"""``--require gpu``: everything on devices, or it counts as not fitting."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Final

from planner import overrides
from planner.types.plan import NoFit, PlacementKind, Plan, PlanOutcome
from planner.types.request import PlanRequest

REQUIRED: Final = "--require gpu"
_GIVE_UP: Final = ("-ngl auto", "--no-gpu", "-ncmoe", "-ncffn")  # how changes begin that leave parts to the host


def all_on_devices(request: PlanRequest, search: Callable[[PlanRequest], PlanOutcome]) -> PlanOutcome:
    """Return the plan with everything on devices, or why there is none, with what each device lacks.

    The input embeddings are not meant: llama.cpp keeps them on the host, always. Raises InvalidRequest as the search
    does.
    """
    whole = replace(request, n_gpu_layers="all") if request.n_gpu_layers is None else request
    outcome = search(whole)
    if isinstance(outcome, NoFit):
        nearest = tuple(near for near in outcome.nearest if not near.change.startswith(_GIVE_UP))
        return replace(outcome, because=f"{REQUIRED} allows nothing on the host", nearest=nearest)
    if not isinstance(outcome, Plan) or (reason := left_on_host(outcome)) is None:
        return outcome
    return NoFit(
        model=outcome.model,
        request=outcome.request,
        build=outcome.build,
        usages=outcome.usages,
        host=outcome.host,
        n_ctx_per_slot=outcome.n_ctx_per_slot,
        causes=(),
        decisions=outcome.decisions,
        warnings=outcome.warnings,
        because=f"{REQUIRED}, but {reason}",
    )


def left_on_host(plan: Plan) -> str | None:
    """Return what of the model this plan leaves to the host and why, None where that is nothing."""
    request, placement = plan.request, plan.placement
    if plan.fit_by_llama:
        return "it is llama.cpp that places it while it loads"
    if not placement.devices:
        has_one = len(plan.usages) > 1
        return "no device is used" if has_one else "there is no device"
    if placement.kind is not PlacementKind.GPU or placement.output_device < 0:
        count = sum(index < 0 for index in placement.layer_devices)
        output = " and the output" if placement.output_device < 0 else ""
        left = f"{count} of {len(placement.layer_devices)} layers{output}"
        return f"-ngl {placement.n_gpu_layers} leaves {left} on the host"
    if request.kv_offload is False:
        return "--no-kv-offload keeps the caches on the host"
    return overrides.spilled(request) or None
